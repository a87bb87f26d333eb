"""Orders by rank: a heap whose entries are corrected when they come up.

Touching is a store into the owner's array and nothing here; an entry that comes up with an old rank is put
back at its current place. An eviction is therefore O(log n), amortised over touches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .base import BLOCKED, GONE, Name, Shelf

MIN_STALE = 256
"""Void entries that are not worth rebuilding a heap for."""


class HeapOrder:
    """The entries of one tenant by rank; see :class:`kvpool.eviction.base.Order`."""

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self._shelves = shelves
        self._heap: list[tuple[float, Name]] = []
        self._stale = 0

    def push(self, name: Name, rank: float) -> None:
        heapq.heappush(self._heap, (rank, name))

    def head(self) -> tuple[float, Name] | None:
        heap = self._heap
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
        heapq.heappop(self._heap)

    def forget(self, count: int) -> None:
        self._stale += count
        if self._stale > len(self._heap) // 2 + MIN_STALE:
            live = []
            for _, name in self._heap:
                rank = self._shelves[name[0]].check(*name[1:])
                if rank not in (BLOCKED, GONE):
                    live.append((rank, name))
            heapq.heapify(live)
            self._heap = live
            self._stale = 0

    def __len__(self) -> int:
        return len(self._heap)
