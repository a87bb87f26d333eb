"""All entries that can be evicted, under one policy: an order per tenant, the lowest of their heads is the pool's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .base import Name, Order, Policy, Shelf


class Eviction:
    """Tenants are few, entries are many. ``capacity_pages`` is the size of the pool."""

    def __init__(self, policy: Policy, capacity_pages: int) -> None:
        self.policy = policy
        self._shelves: list[Shelf] = []
        self._orders: dict[str, Order] = {}
        self._tick = 0
        policy.bind(self._shelves, capacity_pages)

    def add(self, shelf: Shelf) -> int:
        """Register a shelf; its number goes into its entries."""
        self._shelves.append(shelf)
        return len(self._shelves) - 1

    def tick(self, count: int = 1) -> int:
        """Reserve ``count`` ascending touches and return the first."""
        first = self._tick + 1
        self._tick += count
        return first

    def push_all(self, tenant: str, names: Sequence[Name], ranks: Sequence[float]) -> None:
        """Queue entries that can be evicted."""
        if not names:
            return
        order = self._orders.get(tenant)
        if order is None:
            order = self._orders[tenant] = self.policy.order()
        order.push_all(names, ranks)

    def forget(self, tenant: str, count: int) -> None:
        """``count`` queued entries of ``tenant`` went without being popped; its order is rebuilt when most are void."""
        order = self._orders.get(tenant)
        if order is not None:
            order.forget(count)

    def evict(self, tenant: str | None, why: str, pages: int = 0) -> int:
        """Evict the entry of ``tenant`` (None: of all) that goes first; how many went, 0 when there is nothing to evict.

        Those that only it kept, and that would go next, go with it while fewer than ``pages`` pages came free.
        """
        if tenant is None:
            orders = list(self._orders.values())
        else:
            orders = [self._orders[tenant]] if tenant in self._orders else []
        best, lowest = _lowest(orders)
        if best is None or lowest is None:
            return 0
        rank, (number, unit, node, _) = lowest
        best.pop()
        self.policy.evicted(rank)
        below = float("-inf")
        if pages and not self.policy.queues_interior:
            _, following = _lowest(orders)
            below = float("inf") if following is None else following[0]
        return self._shelves[number].evict(unit, node, why, below=below, pages=pages)

    def unpinned_pages(self, tenant: str | None = None) -> int:
        """Pages that could be freed by evicting."""
        return sum(s.unpinned_pages for s in self._shelves if tenant is None or s.tenant == tenant)

    @property
    def queued(self) -> int:
        """Entries in all orders, void ones included."""
        return sum(map(len, self._orders.values()))


def _lowest(orders: Iterable[Order]) -> tuple[Order | None, tuple[float, Name] | None]:
    """The order whose head goes first, and that head."""
    best: Order | None = None
    lowest: tuple[float, Name] | None = None
    for order in orders:
        head = order.head()
        if head is not None and (lowest is None or head < lowest):
            best, lowest = order, head
    return best, lowest
