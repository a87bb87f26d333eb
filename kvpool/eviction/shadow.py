"""A pool without bytes that replays what was stored under other weights: what would have been hit?

It keeps the rules of the real one (leaves first, checkpoints apart from blocks, orphans at once) at the granularity of
segments.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from .base import FIRST, Stored

Key = tuple[int, bytes]


@dataclass(slots=True)
class _Node:
    parent: Key | None
    pages: int
    rank: float = 0.0
    children: int = 0
    end_pages: int = 0
    end_rank: float = 0.0
    pinned: int = -1
    needs_end: bool = field(default=False)


class Shadow:
    """One candidate's cache of ``capacity`` pages."""

    def __init__(self, alpha: float, beta: float, capacity: int) -> None:
        self.alpha, self.beta = alpha, beta
        self._capacity = capacity
        self._used = 0
        self._nodes: dict[Key, _Node] = {}
        self._heap: list[tuple[float, bool, Key]] = []  # rank, is a checkpoint, key
        self._tick = 0
        self._placed = 0.0
        self._placed_ticks = 0.0
        self._now = 0

    @property
    def nodes(self) -> int:
        """Segments it holds."""
        return len(self._nodes)

    @property
    def used(self) -> int:
        """Pages it holds."""
        return self._used

    def request(self, stored: Stored, value: Sequence[float], ends: Sequence[tuple[int, int, float]], turn: int) -> int:
        """Look ``stored`` up, then store it; tokens hit. ``value`` and ``ends`` have values relative to the mean."""
        nodes, keys = self._nodes, stored.keys
        self._now += 1
        known = 0
        hit = 0
        for i, key in enumerate(keys):
            node = nodes.get(key)
            if node is None:
                break
            known = i + 1
            if not stored.needs_ends or node.end_pages:
                hit = known
        self._tick += len(keys)
        span = self._placed_ticks / self._placed * self._capacity if self._placed else 0.0
        bonus = self._tick + span * self.beta * turn
        weight = span * self.alpha
        for i in range(known):
            node = nodes[keys[i]]
            node.pinned = self._now
            node.rank = bonus + weight * value[i] - i
        if hit and stored.needs_ends:
            nodes[keys[hit - 1]].end_rank = bonus
        need = sum(stored.pages[known:])
        for i, pages, _ in ends:
            if i >= known or not nodes[keys[i]].end_pages:
                need += pages
        if not self._room(need):
            return sum(stored.tokens[:hit])
        for i in range(known, len(keys)):
            node = nodes[keys[i]] = _Node(keys[i - 1] if i else None, stored.pages[i], bonus + weight * value[i] - i)
            node.pinned, node.needs_end = self._now, stored.needs_ends
            if i:
                nodes[keys[i - 1]].children += 1
            heapq.heappush(self._heap, (node.rank, False, keys[i]))
        if known < len(keys):
            self._placed_ticks += len(keys) - known
        for i, pages, relative in ends:
            node = nodes[keys[i]]
            if not node.end_pages:
                node.end_pages = pages
                node.end_rank = bonus + weight * relative
                heapq.heappush(self._heap, (node.end_rank, True, keys[i]))
                self._placed_ticks += 1
        self._used += need
        self._placed += need
        if self._placed > 4 * self._capacity:
            self._placed /= 2
            self._placed_ticks /= 2
        self._supersede(stored, ends)
        return sum(stored.tokens[:hit])

    def _supersede(self, stored: Stored, ends: Sequence[tuple[int, int, float]]) -> None:
        """The checkpoint before the last goes first, unless its sequence branched there."""
        if not stored.needs_ends or not ends:
            return
        for i in range(max(e[0] for e in ends) - 1, -1, -1):
            node = self._nodes[stored.keys[i]]
            if node.end_pages:
                if node.children <= 1:
                    node.end_rank = FIRST / 2
                    heapq.heappush(self._heap, (node.end_rank, True, stored.keys[i]))
                return

    def _room(self, need: int) -> bool:
        """Evict until ``need`` pages are free; False, having evicted what could be, when that is impossible."""
        if need > self._capacity:
            return False
        heap, nodes = self._heap, self._nodes
        later: list[tuple[float, bool, Key]] = []
        while self._used + need > self._capacity and heap:
            item = heapq.heappop(heap)
            rank, is_end, key = item
            node = nodes.get(key)
            if node is None or (is_end and not node.end_pages):
                continue
            if node.pinned == self._now:
                later.append(item)
                continue
            current = node.end_rank if is_end else node.rank
            if current != rank:
                heapq.heappush(heap, (current, is_end, key))
            elif is_end:
                self._used -= node.end_pages
                node.end_pages = 0
                self._orphan(key, node)
            elif not node.children:
                self._drop(key, node)
            # A node with children comes back when the last of them goes.
        for item in later:
            heapq.heappush(heap, item)
        return self._used + need <= self._capacity

    def _drop(self, key: Key, node: _Node) -> None:
        self._used -= node.pages + node.end_pages
        del self._nodes[key]
        parent = None if node.parent is None else self._nodes.get(node.parent)
        if parent is not None and node.parent is not None:
            parent.children -= 1
            if not parent.children:
                self._orphan(node.parent, parent)
                heapq.heappush(self._heap, (parent.rank, False, node.parent))

    def _orphan(self, key: Key, node: _Node) -> None:
        if node.needs_end and not node.children and not node.end_pages:
            node.rank = FIRST
            heapq.heappush(self._heap, (FIRST, False, key))
