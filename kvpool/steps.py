"""Long work in steps, so that an event loop can serve others in between.

What yields keeps everything consistent at every ``yield``, and gives back what it holds when it is closed there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""Work that returns a T in the end; a step takes about a millisecond."""


def run(steps: Steps[T]) -> T:
    """All of it at once."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


async def run_in_turns(steps: Steps[T]) -> T:
    """A step each time the event loop comes round; cancelled, the work is closed where it is."""
    try:
        while True:
            try:
                next(steps)
            except StopIteration as done:
                result: T = done.value
                return result
            await asyncio.sleep(0)
    finally:
        steps.close()


class Background:
    """Has ``step`` called each time the event loop comes round, from :meth:`start` until it says that nothing is left."""

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step: Callable[[], bool] | None = step
        self._busy = False

    def start(self) -> None:
        """There is work (again). Called on the event loop."""
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        """Leave the rest undone. Final."""
        self._step = None

    def _turn(self) -> None:
        self._busy = False
        if self._step is not None and self._step():
            self.start()
