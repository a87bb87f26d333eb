"""A pool without bytes that replays what was stored under other weights: what would have been hit?

It keeps the rules of the real one (leaves first, checkpoints apart from blocks, orphans at once) at the granularity of
segments.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence

from .base import FIRST, Stored

Key = tuple[int, bytes]


class Shadow:
    """One candidate's cache of ``capacity`` pages.

    Segments are rows of arrays: hundreds of thousands of objects would make the garbage collector pause.
    """

    def __init__(self, alpha: float, beta: float, capacity: int) -> None:
        self.alpha, self.beta = alpha, beta
        self._capacity = capacity
        self._used = 0
        self._rows: dict[Key, int] = {}
        self._keys: list[Key | None] = []
        self._free: list[int] = []
        self._parent = array("q")
        self._pages = array("q")
        self._rank = array("d")
        self._children = array("q")
        self._end_pages = array("q")
        self._end_rank = array("d")
        self._pinned = array("q")
        self._needs_end = array("b")
        self._heap: list[tuple[float, bool, Key]] = []  # rank, is a checkpoint, key
        self._tick = 0
        self._placed = 0.0
        self._placed_ticks = 0.0
        self._now = 0

    @property
    def nodes(self) -> int:
        """Segments it holds."""
        return len(self._rows)

    @property
    def used(self) -> int:
        """Pages it holds."""
        return self._used

    def request(self, stored: Stored, value: Sequence[float], ends: Sequence[tuple[int, int, float]], turn: int) -> int:
        """Look ``stored`` up, then store it; tokens hit. ``value`` and ``ends`` have values relative to the mean."""
        rows, keys = self._rows, stored.keys
        path: list[int] = []
        self._now += 1
        known = 0
        hit = 0
        for i, key in enumerate(keys):
            row = rows.get(key)
            if row is None:
                break
            path.append(row)
            known = i + 1
            if not stored.needs_ends or self._end_pages[row]:
                hit = known
        self._tick += len(keys)
        span = self._placed_ticks / self._placed * self._capacity if self._placed else 0.0
        bonus = self._tick + span * self.beta * turn
        weight = span * self.alpha
        for i, row in enumerate(path):
            self._pinned[row] = self._now
            self._rank[row] = bonus + weight * value[i] - i
        if hit and stored.needs_ends:
            self._end_rank[path[hit - 1]] = bonus
        need = sum(stored.pages[known:])
        for i, pages, _ in ends:
            if i >= known or not self._end_pages[path[i]]:
                need += pages
        if not self._room(need):
            return sum(stored.tokens[:hit])
        for i in range(known, len(keys)):
            rank = bonus + weight * value[i] - i
            row = self._new(keys[i], path[i - 1] if i else -1, stored.pages[i], rank, stored.needs_ends)
            path.append(row)
            if i:
                self._children[path[i - 1]] += 1
            heapq.heappush(self._heap, (rank, False, keys[i]))
        if known < len(keys):
            self._placed_ticks += len(keys) - known
        for i, pages, relative in ends:
            row = path[i]
            if not self._end_pages[row]:
                self._end_pages[row] = pages
                self._end_rank[row] = bonus + weight * relative
                heapq.heappush(self._heap, (self._end_rank[row], True, keys[i]))
                self._placed_ticks += 1
        self._used += need
        self._placed += need
        if self._placed > 4 * self._capacity:
            self._placed /= 2
            self._placed_ticks /= 2
        self._supersede(stored, path, ends)
        return sum(stored.tokens[:hit])

    def _supersede(self, stored: Stored, path: list[int], ends: Sequence[tuple[int, int, float]]) -> None:
        """The checkpoint before the last goes first, unless its sequence branched there."""
        if not stored.needs_ends or not ends:
            return
        for i in range(max(e[0] for e in ends) - 1, -1, -1):
            row = path[i]
            if self._end_pages[row]:
                if self._children[row] <= 1:
                    self._end_rank[row] = FIRST / 2
                    heapq.heappush(self._heap, (self._end_rank[row], True, stored.keys[i]))
                return

    def _room(self, need: int) -> bool:
        """Evict until ``need`` pages are free; False, having evicted what could be, when that is impossible."""
        if need > self._capacity:
            return False
        heap, rows = self._heap, self._rows
        later: list[tuple[float, bool, Key]] = []
        while self._used + need > self._capacity and heap:
            item = heapq.heappop(heap)
            rank, is_end, key = item
            row = rows.get(key)
            if row is None or (is_end and not self._end_pages[row]):
                continue
            if self._pinned[row] == self._now:
                later.append(item)
                continue
            current = self._end_rank[row] if is_end else self._rank[row]
            if current != rank:
                heapq.heappush(heap, (current, is_end, key))
            elif is_end:
                self._used -= self._end_pages[row]
                self._end_pages[row] = 0
                self._orphan(key, row)
            elif not self._children[row]:
                self._drop(key, row)
            # A node with children comes back when the last of them goes.
        for item in later:
            heapq.heappush(heap, item)
        return self._used + need <= self._capacity

    def _new(self, key: Key, parent: int, pages: int, rank: float, needs_end: bool) -> int:
        if self._free:
            row = self._free.pop()
        else:
            row = len(self._keys)
            self._keys.append(None)
            for column in (self._parent, self._pages, self._children, self._end_pages, self._pinned):
                column.append(0)
            self._rank.append(0.0)
            self._end_rank.append(0.0)
            self._needs_end.append(0)
        self._rows[key], self._keys[row] = row, key
        self._parent[row], self._pages[row], self._rank[row] = parent, pages, rank
        self._children[row] = self._end_pages[row] = 0
        self._end_rank[row] = 0.0
        self._pinned[row], self._needs_end[row] = self._now, needs_end
        return row

    def _drop(self, key: Key, row: int) -> None:
        self._used -= self._pages[row] + self._end_pages[row]
        del self._rows[key]
        self._keys[row] = None
        self._free.append(row)
        parent = self._parent[row]
        above = self._keys[parent] if parent >= 0 else None
        if above is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                self._orphan(above, parent)
                heapq.heappush(self._heap, (self._rank[parent], False, above))

    def _orphan(self, key: Key, row: int) -> None:
        if self._needs_end[row] and not self._children[row] and not self._end_pages[row]:
            self._rank[row] = FIRST
            heapq.heappush(self._heap, (FIRST, False, key))
