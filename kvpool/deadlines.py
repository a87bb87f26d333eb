"""Everything that is open in a pool and ends by itself when its time has come."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Timed(Protocol):
    """A put, a get or a lease; ``deadline`` in seconds on the pool's clock."""

    deadline: float

    @property
    def closed(self) -> bool: ...

    def expire(self) -> None:
        """The deadline has passed."""


@dataclass(slots=True, eq=False)
class Lease:
    """A pin on what restoring ``length`` tokens needs, until ``deadline`` (seconds on the pool's clock)."""

    id: int
    length: int
    deadline: float
    end: Callable[[], None]
    closed: bool = False

    def expire(self) -> None:
        """End it: released, or past its deadline."""
        if not self.closed:
            self.closed = True
            self.end()


class Deadlines:
    """What is open, ordered by deadline.

    Of what was closed early only its place in the order is left, which is skipped, and cleaned out when most are such.
    """

    def __init__(self) -> None:
        self._order: list[tuple[float, int]] = []
        self._open: dict[int, Timed] = {}
        self._numbers: dict[Timed, int] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        """Places in the order, those of closed ones included."""
        return len(self._order)

    @property
    def active(self) -> int:
        """How many are open."""
        return len(self._open)

    def add(self, timed: Timed) -> None:
        number = self._numbers[timed] = next(self._ids)
        self._open[number] = timed
        if len(self._order) > 2 * len(self._open) + 64:
            self._order = [place for place in self._order if place[1] in self._open]
            heapq.heapify(self._order)
        heapq.heappush(self._order, (timed.deadline, number))

    def closed(self, timed: Timed) -> None:
        """It was closed, and is let go of."""
        del self._open[self._numbers.pop(timed)]

    def expire(self, now: float) -> int:
        """End all whose deadline has passed; returns how many."""
        ended = 0
        while self._order and self._order[0][0] <= now:
            timed = self._open.get(heapq.heappop(self._order)[1])
            if timed is not None and not timed.closed:
                timed.expire()
                ended += 1
        return ended

    @property
    def next(self) -> float | None:
        """When :meth:`expire` has something to do next."""
        while self._order and self._order[0][1] not in self._open:
            heapq.heappop(self._order)
        return self._order[0][0] if self._order else None
