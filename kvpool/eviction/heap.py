"""Orders by rank: a heap whose entries are corrected when they come up.

Touching is a store into the owner's array and nothing here; an entry that comes up with an old rank is put
back at its current place. An eviction is therefore O(log n), amortised over touches.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from .base import BLOCKED, GONE, Name, Shelf

MIN_STALE = 256
"""Void entries that are not worth rebuilding a heap for."""
MOVED = 8
"""Entries moved from a heap that is being rebuilt at every step."""


class HeapOrder:
    """The entries of one tenant by rank; see :class:`kvpool.eviction.base.Order`."""

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self._shelves = shelves
        self._heap: list[tuple[float, Name]] = []
        # Being emptied into the other because most of it is void: a few entries at every step, never all at once.
        self._old: list[tuple[float, Name]] = []
        self._stale = 0

    def push(self, name: Name, rank: float) -> None:
        heapq.heappush(self._heap, (rank, name))
        self._move(MOVED)

    def push_all(self, names: Iterable[Name], ranks: Iterable[float]) -> None:
        heap, before = self._heap, len(self._heap)
        for place in zip(ranks, names, strict=True):
            heapq.heappush(heap, place)
        self._move(MOVED * (len(heap) - before))

    def head(self) -> tuple[float, Name] | None:
        best, old = self._first(self._heap), self._first(self._old)
        return best if old is None or (best is not None and best <= old) else old

    def _first(self, heap: list[tuple[float, Name]]) -> tuple[float, Name] | None:
        while heap:
            rank, name = heap[0]
            shelf, unit, node, generation = name
            current = self._shelves[shelf].check(unit, node, generation)
            if current == rank:
                return heap[0]
            if current in (BLOCKED, GONE):
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (current, name))
        return None

    def pop(self) -> None:
        if not self._heap or (self._old and self._old[0] < self._heap[0]):
            heapq.heappop(self._old)
        else:
            heapq.heappop(self._heap)
        self._move(MOVED)

    def forget(self, count: int) -> None:
        self._stale += count
        if not self._old and self._stale > len(self._heap) // 2 + MIN_STALE:
            # The same two lists for ever: the garbage collector would look at all that is in a new one, again and again.
            self._old, self._heap = self._heap, self._old
            self._stale = 0
        self._move(MOVED * count)

    def _move(self, count: int) -> None:
        old = self._old
        for _ in range(min(count, len(old))):
            _, name = old.pop()  # a heap without its last item is one still
            rank = self._shelves[name[0]].check(*name[1:])
            if rank not in (BLOCKED, GONE):
                heapq.heappush(self._heap, (rank, name))

    def __len__(self) -> int:
        return len(self._heap) + len(self._old)
