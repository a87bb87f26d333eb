"""Live progress of a benchmark made of many steps, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """Use as a context manager; :meth:`step` says what is measured now. ``total`` steps, or None where unknown."""

    def __init__(self, total: int | None, title: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=total)
        self._begun = False

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, what: str) -> None:
        """The step before this one is done; this one begins."""
        self._progress.update(self._task, description=f"{self._title}: {what}", advance=1 if self._begun else 0)
        self._begun = True

    def add(self, more: int) -> None:
        """So many more steps than were announced."""
        total = self._progress.tasks[0].total
        self._progress.update(self._task, total=None if total is None else total + more)
