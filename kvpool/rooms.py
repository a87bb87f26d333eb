"""What a pool is made of: trees by namespace, shelves of flat objects by tenant, one memory, one eviction, deadlines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvtransport.layout import CacheLayout

from .arena import PageArena, Slab, Slabs
from .deadlines import Deadlines, Timed
from .errors import KeyChainError, NamespaceError, PoolLimitError
from .eviction import DEFAULT_POLICY, Eviction, GhostList, Policy, make_policy
from .eviction.flops import FlopsModel
from .flat import FlatShelf
from .index import Tree, Watcher
from .keys import KeyChain, Namespace, check_tenant
from .memory import Memory
from .placement import Geometry

MAX_TENANTS = 1_024
MAX_NAMESPACES = 4_096
MAX_ACTIVE = 65_536
"""Puts, gets and leases together."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the core keeps of one namespace."""

    tree: Tree
    geometry: Geometry


class Rooms:
    """See :class:`kvpool.core.PoolCore` for the parameters."""

    def __init__(
        self,
        arena: PageArena,
        *,
        clock: Callable[[], float],
        tenant_quota_bytes: Mapping[str, int] | None = None,
        prefix_floor_bytes: int | None = None,
        policy: str = DEFAULT_POLICY,
    ) -> None:
        self.arena = arena
        self.clock = clock
        self.watcher: Watcher | None = None
        """Told of every change in trees made after it was set."""
        self._eviction = Eviction(make_policy(policy), arena.total_pages)
        self.memory = Memory(arena, self._eviction, tenant_quota_bytes, prefix_floor_bytes)
        self._ghosts = GhostList()
        self._rooms: dict[bytes, Room] = {}
        self._flat: dict[str, FlatShelf] = {}
        self._deadlines = Deadlines()
        self._counts: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._reach: dict[str, Counter[str]] = {}

    def open_namespace(self, tenant: str, layout: CacheLayout, block_tokens: int, salt: bytes = b"") -> Namespace:
        """The namespace of these, the same one every time. Raises KeyChainError or NamespaceError (too many)."""
        ns = Namespace(tenant, layout, block_tokens, salt)
        room = self._rooms.get(ns.id)
        if room is None:
            if len(self._rooms) >= MAX_NAMESPACES:
                raise NamespaceError(f"the pool has {MAX_NAMESPACES} namespaces, its limit: use fewer layouts or salts")
            self._shelf(tenant)
            geometry = Geometry(layout)
            tree = Tree(
                ns,
                self._eviction,
                self._ghosts,
                lambda slabs: self._free(tenant, slabs),
                self.clock,
                geometry,
                self.arena,
            )
            tree.watcher = self.watcher
            room = self._rooms[ns.id] = Room(tree, geometry)
        return room.tree.ns

    def namespaces(self) -> list[Namespace]:
        """All that are open."""
        return [room.tree.ns for room in self._rooms.values()]

    @property
    def policy(self) -> Policy:
        """What decides who is evicted."""
        return self._eviction.policy

    def use_flops(self, ns: Namespace, flops: FlopsModel) -> None:
        """Have ``flops`` say what prefixes of ``ns`` save (default: estimated from its layout)."""
        self._room(ns, None).tree.flops = flops

    # -- time ---------------------------------------------------------------------------------------

    def expire(self, now: float | None = None) -> int:
        """End every put, get and lease whose deadline has passed; returns how many."""
        return self._deadlines.expire(self.clock() if now is None else now)

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`expire` has something to do next (seconds on the pool's clock)."""
        return self._deadlines.next

    # -- inside -------------------------------------------------------------------------------------

    def _room(self, ns: Namespace, chain: KeyChain | None) -> Room:
        room = self._rooms.get(ns.id)
        if room is None:
            raise NamespaceError(
                f"the namespace of {ns.layout.model!r} for tenant {ns.tenant!r} is not open: open it first"
            )
        if chain is not None and chain.ns.id != ns.id:
            raise KeyChainError(
                f"the key chain belongs to another namespace ({chain.ns.layout.model!r}, {chain.ns.tenant!r})"
            )
        return room

    def _shelf(self, tenant: str) -> FlatShelf:
        shelf = self._flat.get(tenant)
        if shelf is None:
            check_tenant(tenant)
            if len(self._flat) >= MAX_TENANTS:
                raise NamespaceError(f"the pool has {MAX_TENANTS} tenants, its limit")
            shelf = self._flat[tenant] = FlatShelf(tenant, self._eviction, lambda slabs: self._free(tenant, slabs))
        return shelf

    def _check_active(self) -> None:
        if self._deadlines.active >= MAX_ACTIVE:
            raise PoolLimitError(
                f"{MAX_ACTIVE} puts, gets and leases are open, the limit: close some or try again later"
            )

    def _closed(self, timed: Timed) -> None:
        self._deadlines.closed(timed)

    def _free(self, tenant: str, slabs: Sequence[Slab | Slabs]) -> None:
        self.memory.free(tenant, slabs)
