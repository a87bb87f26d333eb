"""First-in-first-out with second thoughts: SIEVE and S3-FIFO.

Both keep queues, and neither moves an entry when it is used. Here a queue is a heap by place: entries that leave it because
something depends on them come back to where they were.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .base import BLOCKED, GONE, Floats, Name, Order, Shelf, Ticks
from .heap import MIN_STALE
from .lru import Lru

_Heap = list[tuple[float, Name]]


class SieveOrder:
    """A hand goes from old to new over the entries: it spares what was used since it last came by."""

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self._shelves = shelves
        self._ahead: _Heap = []
        self._behind: _Heap = []
        self._hand = float("-inf")
        self._stale = 0

    def push(self, name: Name, rank: float) -> None:
        heapq.heappush(self._ahead if rank >= self._hand else self._behind, (rank, name))

    def push_all(self, names: Iterable[Name], ranks: Iterable[float]) -> None:
        for name, rank in zip(names, ranks, strict=True):
            self.push(name, rank)

    def head(self) -> tuple[float, Name] | None:
        while self._ahead or self._behind:
            if not self._ahead:
                self._ahead, self._behind = self._behind, self._ahead
            rank, name = self._ahead[0]
            shelf, unit, node, generation = name
            owner = self._shelves[shelf]
            self._hand = rank
            if owner.check(unit, node, generation) in (BLOCKED, GONE):
                heapq.heappop(self._ahead)
            elif owner.uses(unit, node):
                owner.set_uses(unit, node, 0)
                heapq.heappop(self._ahead)
                heapq.heappush(self._behind, (rank, name))
            else:
                return rank, name
        return None

    def pop(self) -> None:
        heapq.heappop(self._ahead)
        if not self._ahead:  # the newest went: the hand starts anew, whoever comes is ahead of it
            self._ahead, self._behind = self._behind, self._ahead
            self._hand = float("-inf")

    def forget(self, count: int) -> None:
        self._stale += count
        if self._stale > len(self) // 2 + MIN_STALE:
            self._ahead = _live(self._ahead, self._shelves)
            self._behind = _live(self._behind, self._shelves)
            self._stale = 0

    def __len__(self) -> int:
        return len(self._ahead) + len(self._behind)


class Sieve(Lru):
    """SIEVE (Zhang et al., NSDI 2024): one queue in the order of placing, a hand, one bit per entry."""

    name = "sieve"
    queues_interior = True

    def order(self) -> Order:
        return SieveOrder(self._shelves)

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], kind: int) -> Floats | None:
        return None


SMALL_SHARE = 0.1
MOST_USES = 3


class S3FifoOrder:
    """A small queue that newcomers must leave by being used, a main queue, and a list of who left it early."""

    def __init__(self, shelves: Sequence[Shelf], capacity_pages: int) -> None:
        self._shelves = shelves
        self._small_limit = max(1, int(capacity_pages * SMALL_SHARE))
        self._small: _Heap = []
        self._main: _Heap = []
        self._small_pages = 0
        self._at: dict[Name, tuple[bool, float, int]] = {}  # in main?, place, pages
        self._ghosts: OrderedDict[tuple[int, int, bytes], None] = OrderedDict()
        self._next = 0.0
        self._from_main = False
        self._stale = 0
        self._checked = 0

    def push(self, name: Name, rank: float) -> None:
        known = self._at.get(name)
        if known is None:
            shelf, unit, node, _ = name
            owner = self._shelves[shelf]
            main = self._ghosts.pop((shelf, unit, owner.key(unit, node)), name) is None
            known = self._at[name] = (main, rank, owner.pages_of(unit, node))
            if not main:
                self._small_pages += known[2]
            self._next = max(self._next, rank)
        heapq.heappush(self._main if known[0] else self._small, (known[1], name))

    def push_all(self, names: Iterable[Name], ranks: Iterable[float]) -> None:
        for name, rank in zip(names, ranks, strict=True):
            self.push(name, rank)

    def head(self) -> tuple[float, Name] | None:
        while self._small or self._main:
            self._from_main = not self._small or (self._small_pages <= self._small_limit and bool(self._main))
            queue = self._main if self._from_main else self._small
            place, name = queue[0]
            shelf, unit, node, generation = name
            owner = self._shelves[shelf]
            rank = owner.check(unit, node, generation)
            if rank == BLOCKED:
                heapq.heappop(queue)
                continue
            if rank == GONE:
                heapq.heappop(queue)
                self._drop(name)
                continue
            uses = owner.uses(unit, node)
            if not self._from_main and uses > 1:
                heapq.heappop(queue)
                self._move_to_main(name)
                owner.set_uses(unit, node, 0)
            elif self._from_main and uses:
                heapq.heappop(queue)
                owner.set_uses(unit, node, min(uses, MOST_USES) - 1)
                self._move_to_main(name)
            else:
                return place, name
        return None

    def pop(self) -> None:
        _, name = heapq.heappop(self._main if self._from_main else self._small)
        if not self._from_main:
            shelf, unit, node, _ = name
            self._ghosts[shelf, unit, self._shelves[shelf].key(unit, node)] = None
        self._drop(name)
        while len(self._ghosts) > len(self._at) + 1:
            self._ghosts.popitem(last=False)

    def forget(self, count: int) -> None:
        self._stale += count
        # Entries that were not queued because something depended on them may be gone as well.
        if self._stale > len(self) // 2 + MIN_STALE or len(self._at) > 2 * self._checked + MIN_STALE:
            for name in [n for n in self._at if self._shelves[n[0]].check(*n[1:]) == GONE]:
                self._drop(name)
            self._small = _live(self._small, self._shelves)
            self._main = _live(self._main, self._shelves)
            self._stale, self._checked = 0, len(self._at)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _drop(self, name: Name) -> None:
        known = self._at.pop(name, None)
        if known is not None and not known[0]:
            self._small_pages -= known[2]

    def _move_to_main(self, name: Name) -> None:
        main, _, pages = self._at[name]
        if not main:
            self._small_pages -= pages
        # Newcomers' places are ticks, whole numbers: a fraction after the newest keeps the order of moving.
        self._next = float(np.nextafter(self._next, np.inf))
        self._at[name] = (True, self._next, pages)
        heapq.heappush(self._main, (self._next, name))


class S3Fifo(Lru):
    """S3-FIFO (Yang et al., SOSP 2023): a tenth of the memory for newcomers, uses counted up to three."""

    name = "s3fifo"
    queues_interior = True

    def order(self) -> Order:
        return S3FifoOrder(self._shelves, self._capacity)

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], kind: int) -> Floats | None:
        return None


def _live(heap: _Heap, shelves: Sequence[Shelf]) -> _Heap:
    live = [item for item in heap if shelves[item[1][0]].check(*item[1][1:]) not in (BLOCKED, GONE)]
    heapq.heapify(live)
    return live
