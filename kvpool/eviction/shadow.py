"""A pool without bytes that replays what was stored under other weights: what would have been hit?

It keeps the rules of the real one (leaves first, checkpoints apart from blocks, orphans at once) at the granularity of
segments.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .base import FIRST


@dataclass(frozen=True, slots=True)
class Shown:
    """One sequence as shadows see it: as :class:`kvpool.eviction.base.Stored`, with what all candidates share worked out.

    ``keys`` are hashes of the segments' names. ``value`` and the values of ``ends`` are in doublings over the mean, ``odds`` how much
    likelier than others (in doublings) the sequence is to be continued.
    """

    keys: Sequence[int]
    pages: Sequence[int]
    tokens: Sequence[int]
    value: Sequence[float]
    ends: Sequence[tuple[int, int, float]]
    needs_ends: bool
    odds: float


class Shadow:
    """One candidate's cache of ``capacity`` pages; ``alpha`` and ``beta`` as in :class:`kvpool.eviction.marconi.Weights`.

    Segments are rows of arrays: hundreds of thousands of objects would make the garbage collector pause.
    """

    def __init__(self, alpha: float, beta: float, capacity: int) -> None:
        self._alpha, self._beta = alpha, beta
        self._capacity = capacity
        self._used = 0
        self._rows: dict[int, int] = {}
        self._keys = array("q")
        self._free: list[int] = []
        self._parent = array("q")
        self._stop = array("q")  # tokens at its end
        self._pages = array("q")
        self._rank = array("d")
        self._children = array("q")
        self._end_pages = array("q")
        self._end_rank = array("d")
        self._pinned = array("q")
        self._needs_end = array("b")
        self._heap: list[tuple[float, bool, int]] = []  # rank, is a checkpoint, key
        self._tick = 0
        self._placed = 0.0
        self._ticks = 0.0
        self._now = 0

    @property
    def nodes(self) -> int:
        """Segments it holds."""
        return len(self._rows)

    @property
    def used(self) -> int:
        """Pages it holds."""
        return self._used

    def request(self, shown: Shown) -> int:
        """Look a sequence up, then store it; tokens hit."""
        rows, keys = self._rows, shown.keys
        path: list[int] = []
        self._now += 1
        hit = 0
        stops = list(accumulate(shown.tokens))
        for i, key in enumerate(keys):
            row = rows.get(key)
            if row is None:
                below = next((rows[k] for k in keys[i + 1 :] if k in rows), None)
                if below is None:
                    break
                row = self._split(below, key, stops[i])
            path.append(row)
            if self._end_pages[row] or not shown.needs_ends:
                hit = len(path)
        known = len(path)
        self._tick += len(keys)
        self._ticks += len(keys)
        span = self._ticks / self._placed * self._capacity if self._placed else 0.0
        bonus = self._tick + span * self._beta * shown.odds
        weight = span * self._alpha
        for i, row in enumerate(path):
            self._pinned[row] = self._now
            self._rank[row] = bonus + weight * shown.value[i] - i
        if hit and shown.needs_ends:
            self._end_rank[path[hit - 1]] = bonus
        need = sum(shown.pages[known:])
        for i, pages, _ in shown.ends:
            if i >= known or not self._end_pages[path[i]]:
                need += pages
        if self._room(need):
            self._place(shown, path, stops, need, bonus, weight)
        return sum(shown.tokens[:hit])

    def _split(self, row: int, key: int, stop: int) -> int:
        """The new segment ``key`` up to ``stop`` tokens, out of ``row`` or what is before it; its share of the pages is its.

        Sequences are cut where checkpoints are: a new one cuts in two what was one segment.
        """
        while (parent := self._parent[row]) >= 0 and self._stop[parent] > stop:
            row = parent
        first = self._stop[parent] if parent >= 0 else 0
        pages = self._pages[row] * (stop - first) // max(1, self._stop[row] - first)
        self._pages[row] -= pages
        new = self._new(key, parent, stop, pages, self._rank[row], bool(self._needs_end[row]))
        self._children[new] = 1
        self._parent[row] = new
        return new

    def _place(self, shown: Shown, path: list[int], stops: list[int], need: int, bonus: float, weight: float) -> None:
        keys, known = shown.keys, len(path)
        for i in range(known, len(keys)):
            rank = bonus + weight * shown.value[i] - i
            parent = path[-1] if path else -1
            path.append(self._new(keys[i], parent, stops[i], shown.pages[i], rank, shown.needs_ends))
            if i:
                self._children[path[i - 1]] += 1
        if known < len(keys):  # the others are queued when they have become leaves
            heapq.heappush(self._heap, (self._rank[path[-1]], False, keys[-1]))
        for i, pages, value in shown.ends:
            row = path[i]
            if not self._end_pages[row]:
                self._end_pages[row] = pages
                self._end_rank[row] = bonus + weight * value
                heapq.heappush(self._heap, (self._end_rank[row], True, keys[i]))
        self._used += need
        self._placed += need
        if self._placed > 4 * self._capacity:
            self._placed /= 2
            self._ticks /= 2
        self._supersede(shown, path)

    def _supersede(self, shown: Shown, path: list[int]) -> None:
        """The checkpoint before the last goes first, unless its sequence branched there."""
        if not shown.needs_ends or not shown.ends:
            return
        for i in range(max(e[0] for e in shown.ends) - 1, -1, -1):
            row = path[i]
            if self._end_pages[row]:
                if self._children[row] <= 1:
                    self._end_rank[row] = FIRST / 2
                    heapq.heappush(self._heap, (self._end_rank[row], True, shown.keys[i]))
                return

    def _room(self, need: int) -> bool:
        """Evict until ``need`` pages are free; False, having evicted what could be, when that is impossible."""
        if need > self._capacity:
            return False
        heap, rows = self._heap, self._rows
        later: list[tuple[float, bool, int]] = []
        while self._used + need > self._capacity and heap:
            item = heap[0]
            rank, is_end, key = item
            row = rows.get(key)
            if row is None or (not self._end_pages[row] if is_end else self._children[row]):
                heapq.heappop(heap)  # gone, or no leaf any more: it is queued again when it is one
                continue
            current = self._end_rank[row] if is_end else self._rank[row]
            if self._pinned[row] == self._now:
                later.append(heapq.heappop(heap))
            elif current != rank:
                heapq.heapreplace(heap, (current, is_end, key))
            else:
                heapq.heappop(heap)
                if is_end:
                    self._used -= self._end_pages[row]
                    self._end_pages[row] = 0
                    self._orphan(key, row)
                else:
                    self._drop(key, row)
        for item in later:
            heapq.heappush(heap, item)
        return self._used + need <= self._capacity

    def _drop(self, key: int, row: int) -> None:
        self._used -= self._pages[row] + self._end_pages[row]
        self._end_pages[row] = 0
        del self._rows[key]
        self._free.append(row)
        parent = self._parent[row]
        if parent >= 0:
            self._children[parent] -= 1
            if not self._children[parent]:
                above = self._keys[parent]
                if not self._orphan(above, parent):
                    heapq.heappush(self._heap, (self._rank[parent], False, above))

    def _orphan(self, key: int, row: int) -> bool:
        """Have a leaf that nothing can restore any more go at once; whether it is one."""
        if not self._needs_end[row] or self._children[row] or self._end_pages[row]:
            return False
        self._rank[row] = FIRST
        heapq.heappush(self._heap, (FIRST, False, key))
        return True

    def _new(self, key: int, parent: int, stop: int, pages: int, rank: float, needs_end: bool) -> int:
        if not self._free:
            self._free.append(len(self._keys))
            columns = (self._keys, self._parent, self._stop, self._pages, self._children, self._end_pages, self._pinned)
            for column in columns:
                column.append(0)
            self._rank.append(0.0)
            self._end_rank.append(0.0)
            self._needs_end.append(0)
        row = self._rows[key] = self._free.pop()
        self._keys[row], self._parent[row], self._stop[row] = key, parent, stop
        self._pages[row], self._rank[row] = pages, rank
        self._children[row] = self._end_pages[row] = 0
        self._pinned[row], self._needs_end[row] = self._now, needs_end
        return row
