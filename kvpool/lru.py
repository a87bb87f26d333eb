"""What goes first: least recently used, over everything that can be evicted.

Touching is a store into the owner's array and nothing here; an entry that comes up for eviction with an old
touch is put back at its current place. An eviction is therefore O(log n), amortised over touches. Who owns
entries is a :class:`Shelf`: a prefix tree, or the flat objects of a tenant.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol

from .match import Ghost

BLOCKED = -1
"""The entry is gone, pinned, or has dependents: its shelf offers it again when that changes."""

Entry = tuple[int, int, int, int, int]
"""(touch, shelf, unit, node, generation)"""


class Shelf(Protocol):
    """Owns evictable entries, named by (unit, node, generation)."""

    @property
    def tenant(self) -> str: ...

    @property
    def unpinned_pages(self) -> int:
        """Pages that evictions could free."""

    def check(self, unit: int, node: int, generation: int) -> int:
        """The entry's current touch, or BLOCKED; after BLOCKED the shelf must push it again to have it evicted."""

    def evict(self, unit: int, node: int, why: str) -> None:
        """Free the entry."""


class Lru:
    """One recency order per tenant; the oldest of their heads is the pool's. Tenants are few, entries are many."""

    def __init__(self) -> None:
        self._touch = 0
        self._shelves: list[Shelf] = []
        self._heaps: dict[str, list[Entry]] = {}
        self._stale: dict[str, int] = {}

    def add(self, shelf: Shelf) -> int:
        """Register a shelf; its number goes into its entries."""
        self._shelves.append(shelf)
        return len(self._shelves) - 1

    def tick(self, count: int = 1) -> int:
        """Reserve ``count`` ascending touches and return the first."""
        first = self._touch + 1
        self._touch += count
        return first

    def push(self, tenant: str, entry: Entry) -> None:
        heapq.heappush(self._heaps.setdefault(tenant, []), entry)

    def forget(self, tenant: str, count: int) -> None:
        """``count`` queued entries of ``tenant`` went without being popped; rebuilds its order when most are void."""
        heap = self._heaps.get(tenant, [])
        self._stale[tenant] = self._stale.get(tenant, 0) + count
        if self._stale[tenant] > len(heap) // 2 + 256:
            live = []
            for _, shelf, unit, node, generation in heap:
                touch = self._shelves[shelf].check(unit, node, generation)
                if touch != BLOCKED:
                    live.append((touch, shelf, unit, node, generation))
            heapq.heapify(live)
            self._heaps[tenant] = live
            self._stale[tenant] = 0

    def evict(self, tenant: str | None, why: str) -> bool:
        """Evict the least recently used entry of ``tenant`` (None: of all); False when there is nothing to evict."""
        tenants = list(self._heaps) if tenant is None else [tenant]
        heads = [head for head in map(self._head, tenants) if head is not None]
        if not heads:
            return False
        _, number, unit, node, _ = min(heads)
        shelf = self._shelves[number]
        heapq.heappop(self._heaps[shelf.tenant])
        shelf.evict(unit, node, why)
        return True

    def unpinned_pages(self, tenant: str | None = None) -> int:
        """Pages that could be freed by evicting."""
        return sum(s.unpinned_pages for s in self._shelves if tenant is None or s.tenant == tenant)

    @property
    def queued(self) -> int:
        """Entries in all orders, void ones included."""
        return sum(map(len, self._heaps.values()))

    def _head(self, tenant: str) -> Entry | None:
        heap = self._heaps.get(tenant)
        while heap:
            touch, shelf, unit, node, generation = heap[0]
            current = self._shelves[shelf].check(unit, node, generation)
            if current == touch:
                return heap[0]
            if current == BLOCKED:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (current, shelf, unit, node, generation))
        return None


class GhostList:
    """The last ``limit`` evictions, for explaining; the oldest are forgotten first."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._ghosts: OrderedDict[tuple[int, int, bytes], Ghost] = OrderedDict()

    def add(self, shelf: int, unit: int, key: bytes, ghost: Ghost) -> None:
        name = (shelf, unit, key)
        self._ghosts.pop(name, None)
        self._ghosts[name] = ghost
        while len(self._ghosts) > self._limit:
            self._ghosts.popitem(last=False)

    def drop(self, shelf: int, unit: int, key: bytes) -> None:
        """It is there again."""
        self._ghosts.pop((shelf, unit, key), None)

    def get(self, shelf: int, unit: int, key: bytes) -> Ghost | None:
        return self._ghosts.get((shelf, unit, key))

    def __len__(self) -> int:
        return len(self._ghosts)
