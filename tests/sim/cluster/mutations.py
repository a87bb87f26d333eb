"""Faults put into the code on purpose: each must be caught, or the simulation proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from kvpool.cluster.announcing import Announcer
from kvpool.cluster.members import Roster
from kvpool.cluster.moving import Mover


class _Anyone(bytes):
    """Equal to whatever it is held against."""

    def __getitem__(self, key: Any) -> Any:
        return self

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


class _Everyone(dict[str, bytes]):
    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        return _Anyone(16)


_RUN = Mover.run


async def _delete_first(self: Mover, **options: Any) -> Any:
    self._core.clear()
    return await _RUN(self, **options)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "incarnation unchecked": lambda: mock.patch.object(Roster, "incarnations", return_value=_Everyone()),
    "generation unchecked": lambda: mock.patch.object(Announcer, "validate", lambda self, seen: [True] * len(seen)),
    "stale directory trusted": lambda: mock.patch.object(Roster, "frozen", return_value=False),
    "repair during a frozen view": lambda: mock.patch.object(Roster, "steady", return_value=True),
    "drain that deletes first": lambda: mock.patch.object(Mover, "run", _delete_first),
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Run with the fault ``name`` in the code; None: with the code as it is."""
    if name is None:
        yield
        return
    with MUTATIONS[name]():
        yield
