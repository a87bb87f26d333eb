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
    """What is open, ordered by deadline. What was closed early is skipped, and cleaned out when it is most of the order."""

    def __init__(self) -> None:
        self.active = 0
        self._order: list[tuple[float, int, Timed]] = []
        self._ids = itertools.count()

    def __len__(self) -> int:
        """Entries, closed ones included."""
        return len(self._order)

    def add(self, timed: Timed) -> None:
        self.active += 1
        if len(self._order) > 2 * self.active + 64:
            self._order = [entry for entry in self._order if not entry[2].closed]
            heapq.heapify(self._order)
        heapq.heappush(self._order, (timed.deadline, next(self._ids), timed))

    def closed(self) -> None:
        """One of them was closed."""
        self.active -= 1

    def expire(self, now: float) -> int:
        """End all whose deadline has passed; returns how many."""
        ended = 0
        while self._order and self._order[0][0] <= now:
            _, _, timed = heapq.heappop(self._order)
            if not timed.closed:
                timed.expire()
                ended += 1
        return ended

    @property
    def next(self) -> float | None:
        """When :meth:`expire` has something to do next."""
        while self._order and self._order[0][2].closed:
            heapq.heappop(self._order)
        return self._order[0][0] if self._order else None
