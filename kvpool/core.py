"""The pool as a state machine: one owner loop, no I/O, no sleeping; the clock is passed in.

Everything else (the embedded :class:`kvpool.pool.Pool`, the daemon) moves the bytes and calls this.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtransport.errors import KVError
from kvtransport.layout import CacheLayout, GroupKind

from .admission import CheckpointHints, hints_of_view
from .arena import BlockClass, PageArena, Slab, Slabs
from .deadlines import Deadlines, Lease, Timed
from .errors import KeyChainError, LeaseError, MissError, NamespaceError, PoolLimitError, PrefixMissingError
from .eviction import DEFAULT_POLICY, Eviction, GhostList, Policy, make_policy
from .eviction.flops import FlopsModel
from .flat import FlatGet, FlatPut, FlatShelf
from .get import Get
from .index import Nodes, Path, Selection, Tree, Watcher
from .keys import KeyChain, Namespace, check_flat_keys, check_tenant
from .match import Explanation, Ghost, Match, Reason, View, explain, match
from .memory import Memory
from .placement import Geometry, page_lists
from .planning import follow, held_at, needs
from .put import Put
from .requests import Requests
from .steps import Steps, run

MAX_TENANTS = 1_024
MAX_NAMESPACES = 4_096
MAX_ACTIVE = 65_536
"""Puts, gets and leases together."""
MAX_FLAT_KEYS = 65_536
"""Flat keys of one call."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the core keeps of one namespace."""

    tree: Tree
    geometry: Geometry


class PoolCore:
    """Blocks, states, transfer-cache bytes and flat objects of many tenants over one arena.

    ``clock`` gives seconds and never goes back. ``tenant_quota_bytes`` limits tenants by name (pages count
    whole); those not named are limited by the arena only. ``prefix_floor_bytes`` of blocks and states are never evicted for the
    sake of transfer-cache bytes (default: half the arena). ``policy`` names what is evicted first
    (:data:`kvpool.eviction.POLICIES`); ConfigError for others.
    """

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
        self.on_request: Callable[[str, bytes], None] | None = None
        """Called with (tenant, request) when a put with that request begins."""
        self.on_work: Callable[[], None] | None = None
        """Called when the policy has something to learn (:meth:`kvpool.eviction.Policy.work`); without it all is learnt at once."""
        self.watcher: Watcher | None = None
        """Told of every change in trees made after it was set."""
        self._eviction = Eviction(make_policy(policy), arena.total_pages)
        self.memory = Memory(arena, self._eviction, tenant_quota_bytes, prefix_floor_bytes)
        self._ghosts = GhostList()
        self._rooms: dict[bytes, Room] = {}
        self._flat: dict[str, FlatShelf] = {}
        self._requests = Requests()
        self._leases: dict[int, Lease] = {}
        self._lease_ids = itertools.count(1)
        self._deadlines = Deadlines()
        self._counts: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._reach: dict[str, Counter[str]] = {}

    # -- namespaces and lookups --------------------------------------------------------------------

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

    def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        """The restorable lengths of ``chain`` up to ``limit`` tokens; what the longest needs is now recently used.

        A match never covers the chain's last token: engines must compute it.
        """
        tree = self._room(ns, chain).tree
        path = tree.find(chain.blocks)
        found = match(tree.view(chain, path), self._limit(chain, limit))
        self._counts["matches"] += 1
        self._counts["asked_tokens"] += found.limit
        self._counts["matched_tokens"] += found.length
        if found.length:
            self._counts["hits"] += 1
            tree.touch(tree.select(path, found.length, self._tail(tree, chain, path, found.length)))
        else:
            self._misses[self._miss_reason(tree, chain, path)] += 1
        self._count_reach(tree, chain, path, found)
        return found

    def namespaces(self) -> list[Namespace]:
        """All that are open."""
        return [room.tree.ns for room in self._rooms.values()]

    def chains(self, ns: Namespace) -> list[Path]:
        """See :meth:`kvpool.index.Tree.chains`."""
        return self._room(ns, None).tree.chains()

    def _count_reach(self, tree: Tree, chain: KeyChain, path: Nodes, found: Match) -> None:
        """For the statistics: how far each group reaches, and in a word what ends it (:meth:`explain` says more)."""
        step = tree.ns.block_tokens
        for group, rule in enumerate(tree.rules):
            counts = self._reach.setdefault(f"{tree.ns.layout.model}/{rule.name}", Counter())
            reach = found.reach[rule.name]
            counts["asked_tokens"] += found.limit
            counts["reached_tokens"] += reach
            missing = len(path) if rule.kind is GroupKind.RECURRENT else reach // step
            if reach >= found.limit // step * step:
                counts[Reason.COMPLETE] += 1
            elif rule.kind is GroupKind.RECURRENT and reach < len(path) * step:
                counts[Reason.NO_CHECKPOINT] += 1
            elif tree.ghost(group, chain.blocks[missing]) is not None:
                counts[Reason.EVICTED] += 1
            else:
                counts[Reason.NEVER_STORED] += 1

    def view(self, ns: Namespace, chain: KeyChain) -> View:
        """What is resident of ``chain``, as the rules of :mod:`kvpool.match` take it; touches nothing."""
        tree = self._room(ns, chain).tree
        return tree.view(chain, tree.find(chain.blocks))

    def explain(
        self, ns: Namespace, chain: KeyChain, limit: int | None = None, *, operator: bool = False
    ) -> Explanation:
        """Why :meth:`match` is as long as it is; touches nothing.

        Only an ``operator`` is told that another tenant has the same tokens; to a tenant they were never stored.
        """
        tree = self._room(ns, chain).tree
        view = tree.view(chain, tree.find(chain.blocks))

        def ghost(group: int, position: int) -> Ghost | None:
            named = 0 < position <= chain.tokens and not (chain.opaque and position % ns.block_tokens)
            return tree.ghost(group, chain.key_at(position)) if named else None

        others = {
            r.tree.tenant == ns.tenant
            for r in self._rooms.values()
            if r.tree is not tree
            and (operator or r.tree.tenant == ns.tenant)
            and len(r.tree)
            and (key := chain.first_block_in(r.tree.ns)) is not None
            and len(r.tree.find([key]))
        }
        elsewhere = None
        if others:
            elsewhere = Reason.OTHER_FINGERPRINT if True in others else Reason.OTHER_TENANT
        return explain(view, self._limit(chain, limit), self.clock(), ghost, elsewhere=elsewhere)

    @property
    def policy(self) -> Policy:
        """What decides who is evicted."""
        return self._eviction.policy

    def use_flops(self, ns: Namespace, flops: FlopsModel) -> None:
        """Have ``flops`` say what prefixes of ``ns`` save (default: estimated from its layout)."""
        self._room(ns, None).tree.flops = flops

    def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        """Where states of ``chain`` are worth taking, before it is prefilled (see :mod:`kvpool.admission`); touches nothing.

        ``insists``: lengths the engine wants in any case.
        """
        tree = self._room(ns, chain).tree
        path = tree.find(chain.blocks)
        return hints_of_view(
            tree.view(chain, path),
            chain.tokens,
            branches=tree.branches_after(path),
            known=len(path),
            off_grid=not chain.opaque,
            insists=insists,
        )

    def has_off_grid(self, ns: Namespace, chain: KeyChain) -> bool:
        """Whether a checkpoint off the grid lies along the known part of ``chain``."""
        tree = self._room(ns, chain).tree
        return tree.has_tails and tree.tails_along(tree.find(chain.blocks))

    # -- putting -----------------------------------------------------------------------------------

    def begin_put(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        request: bytes | None = None,
        deadline: float,
    ) -> Put:
        """Allocate a put of tokens ``[start, boundary)`` with states at ``checkpoints`` and the boundary.

        ``start`` is block-aligned, and full-attention blocks before it must be resident (they are kept until the
        put ends). ``request`` (16 bytes) lets a reader follow it before the seal. Without a ``chain`` the
        bytes belong to that request alone: they go when its reader is done, at an abort or at the deadline
        (seconds on the pool's clock), and never push blocks and states below the floor.

        Raises LayoutError (bad positions), KeyChainError (the chain does not reach the boundary), PrefixMissingError,
        DuplicateRequestError, QuotaError, PoolFullError, PoolLimitError; nothing is held after an error.
        """
        return run(
            self.put_steps(
                ns,
                chain,
                boundary=boundary,
                start=start,
                checkpoints=checkpoints,
                request=request,
                deadline=deadline,
            )
        )

    def put_steps(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        request: bytes | None = None,
        deadline: float,
    ) -> Steps[Put]:
        """:meth:`begin_put` in steps of about a millisecond, between which the pool may be used; given up by closing it."""
        room = self._room(ns, chain)
        tree, step = room.tree, ns.block_tokens
        points = tuple(sorted({*checkpoints, boundary}))
        extents = ns.layout.extents(boundary, start=start, checkpoints=points, align=step)
        self._requests.check_new(ns.tenant, request, chain)
        self._check_active()
        lease: Selection = []
        if chain is not None:
            if start % step:
                raise KeyChainError(
                    f"a put must start at a block boundary (multiples of {step} tokens), got start {start}"
                )
            self._check_reach(chain, boundary, points)
            keys = chain.blocks[: boundary // step]
            tree.check_path(keys)
            path = tree.find(keys[: start // step])
            if tree.full is not None and len(path) * step < start:
                raise PrefixMissingError(
                    f"the put starts at {start} tokens, but only {len(path) * step} before it are in the pool (evicted "
                    "meanwhile?): start there or earlier",
                    resident=len(path) * step,
                )
            lease = tree.only_resident(tree.select(path, start, None))
            tree.pin(lease)
        try:
            need = needs(ns, room.geometry, extents, points, transfer=chain is None)
            yield from self.memory.room_for(ns.tenant, need.rows)
            self._requests.check_new(ns.tenant, request, chain)  # others ran meanwhile
            self._check_active()
            slabs = self.memory.allocate_rows(ns.tenant, need.rows)
        except BaseException:
            tree.unpin(lease)
            raise
        put = Put(
            self,
            room,
            chain,
            boundary=boundary,
            start=start,
            points=points,
            request=request,
            deadline=deadline,
            extents=extents,
        )
        need.hand(put, slabs)
        put.lease = lease
        self._deadlines.add(put)
        self._counts["puts"] += 1
        self._requests.begin(put)
        if request is not None and self.on_request is not None:
            self.on_request(ns.tenant, request)
        return put

    # -- getting -----------------------------------------------------------------------------------

    def plan_get(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        request: bytes | None = None,
        deadline: float,
    ) -> Get:
        """Pin tokens ``[start, boundary)`` and the state at ``boundary`` for reading.

        With a ``request`` whose put is in progress the get follows it: its boundary must be the put's, and what lies before
        the put's start comes from the index. Raises MissError (saying what could be restored), KeyChainError, LayoutError, the
        error of a request that failed, PoolLimitError.
        """
        room = self._room(ns, chain)
        self._check_active()
        extents = ns.layout.extents(boundary, start=start, align=ns.block_tokens)
        if chain is not None:
            self._check_reach(chain, boundary, (boundary,))
        put = self._requests.follow(ns, chain, request, boundary)
        by_slot = {(e.layer, e.tensor): e for e in extents}
        if put is not None:
            selection, sources = follow(self.arena, room.tree, room.geometry, put, by_slot)
        elif chain is not None:
            waits = request is not None and not self._requests.known(ns.tenant, request)
            path, tail, selection = self._restorable(room.tree, chain, boundary, counts=not waits)
            held = held_at(room.tree, path, tail, boundary)
            sources = page_lists(self.arena, room.geometry, ns.block_tokens, extents, held)
        else:
            raise MissError(f"request {request.hex() if request else None} is not in the pool")
        room.tree.touch(selection, used=True)
        room.tree.pin(selection)
        get = Get(
            self,
            room,
            boundary=boundary,
            start=start,
            deadline=deadline,
            extents=by_slot,
            sources=sources,
            pinned=selection,
            put=put,
        )
        self._deadlines.add(get)
        self._counts["gets"] += 1
        return get

    def request_known(self, tenant: str, request: bytes) -> bool:
        """Whether a put with this request has begun (and its outcome is not forgotten yet)."""
        return self._requests.known(tenant, request)

    def _restorable(
        self, tree: Tree, chain: KeyChain, length: int, *, counts: bool = True
    ) -> tuple[Nodes, int | None, Selection]:
        """Path, tail node and needed units of ``length``; MissError when it cannot be restored.

        ``counts``: that is a miss. (A reader that came before its request's put waits for it: not yet.)
        """
        path = tree.find(chain.blocks)
        lengths = match(tree.view(chain, path), length)
        if lengths.length != length:
            if counts:
                self._misses[self._miss_reason(tree, chain, path)] += 1
            raise MissError(
                f"{length} tokens cannot be restored; the longest that can is {lengths.length} "
                f"(groups alone: {', '.join(f'{g} {n}' for g, n in lengths.reach.items())})",
                restorable=lengths.length,
            )
        tail = self._tail(tree, chain, path, length)
        return path, tail, tree.select(path, length, tail)

    # -- leases ------------------------------------------------------------------------------------

    def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> Lease:
        """Keep what restoring ``length`` tokens needs for ``seconds``; raises MissError, PoolLimitError."""
        tree = self._room(ns, chain).tree
        self._check_active()
        self._check_reach(chain, length, (length,))
        _, _, selection = self._restorable(tree, chain, length)
        tree.touch(selection, used=True)
        tree.pin(selection)
        number = next(self._lease_ids)

        def end() -> None:
            tree.unpin(selection)
            self._closed(self._leases.pop(number))

        lease = self._leases[number] = Lease(number, length, self.clock() + seconds, end)
        self._deadlines.add(lease)
        return lease

    def release(self, lease_id: int) -> None:
        """End a lease; raises LeaseError when there is none (any more)."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseError(f"there is no lease {lease_id}: it was released, or its deadline has passed")
        lease.expire()

    # -- flat objects ------------------------------------------------------------------------------

    def exists(self, tenant: str, keys: Sequence[bytes]) -> list[bool]:
        """Which flat keys of the tenant are there; touches nothing."""
        return self._shelf(tenant).has(check_flat_keys(self._bounded(keys)))

    def exists_packed(self, tenant: str, keys: bytes, lengths: bytes) -> bytes:
        """:meth:`exists` of keys one after another, whose ``lengths`` are little-endian u16: a bit each. Raises KeyChainError."""
        self._check_count(len(lengths) // 2)
        return self._shelf(tenant).which(keys, lengths)

    def begin_put_flat(self, tenant: str, sizes: Mapping[bytes, int], *, deadline: float) -> FlatPut:
        """Allocate objects of ``sizes`` bytes by key; all or none. Raises KeyChainError, QuotaError, PoolFullError, PoolLimitError."""
        return run(self.put_flat_steps(tenant, sizes, deadline=deadline))

    def put_flat_steps(self, tenant: str, sizes: Mapping[bytes, int], *, deadline: float) -> Steps[FlatPut]:
        """:meth:`begin_put_flat` in steps, as :meth:`put_steps`."""
        shelf = self._shelf(tenant)
        self._check_active()
        keys = check_flat_keys(self._bounded(list(sizes)))
        yield from self.memory.room_for(tenant, [(1, sizes[k], BlockClass.PREFIX) for k in keys])
        self._check_active()
        slabs = self.memory.allocate(tenant, [sizes[k] for k in keys], BlockClass.PREFIX)
        put = FlatPut(self, shelf, dict(zip(keys, slabs, strict=True)), deadline)
        self._deadlines.add(put)
        self._counts["flat_puts"] += len(keys)
        return put

    def plan_get_flat(self, tenant: str, keys: Sequence[bytes], *, deadline: float) -> FlatGet:
        """Pin the objects under ``keys`` that are there, and make them recently used."""
        shelf = self._shelf(tenant)
        self._check_active()
        get = FlatGet(self, shelf, shelf.get(check_flat_keys(self._bounded(keys))), deadline)
        hits = sum(get.found)
        self._counts["flat_hits"] += hits
        self._counts["flat_misses"] += len(keys) - hits
        self._deadlines.add(get)
        return get

    def drop_flat(self, tenant: str, key: bytes, *, corrupt: bool = False) -> bool:
        """Forget one object; ``corrupt`` when its bytes no longer have their checksum. Whether it was there."""
        self._counts["flat_corrupt"] += corrupt
        return self._shelf(tenant).drop(key)

    # -- time, counters, clearing --------------------------------------------------------------------

    def expire(self, now: float | None = None) -> int:
        """End every put, get and lease whose deadline has passed; returns how many."""
        return self._deadlines.expire(self.clock() if now is None else now)

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`expire` has something to do next (seconds on the pool's clock)."""
        return self._deadlines.next

    def stat(self, tenant: str | None = None) -> dict[str, Any]:
        """Sizes (bytes), entries and counters; ``tenant`` restricts groups and entries to its own."""
        groups: Counter[str] = Counter()
        entries: Counter[str] = Counter()
        for room in self._rooms.values():
            tree = room.tree
            if tenant is None or tree.tenant == tenant:
                for rule, pages in zip(tree.rules, tree.group_pages, strict=True):
                    groups[f"{tree.ns.layout.model}/{rule.name}"] += pages * self.arena.page_bytes
                entries.update(tree.entries())
        shelves = [s for t, s in self._flat.items() if tenant is None or t == tenant]
        entries["flat"] = sum(map(len, shelves))
        return {
            "page_bytes": self.arena.page_bytes,
            "total_bytes": self.arena.total_bytes,
            "free_bytes": self.arena.free_bytes,
            "used_bytes": self.arena.used_bytes if tenant is None else self.memory.used_bytes(tenant),
            "evictable_bytes": self.memory.evictable_bytes(tenant),
            "class_bytes": {k.name.lower(): self.arena.bytes_of(k) for k in BlockClass},
            "group_bytes": {**groups, "flat": sum(s.pages for s in shelves) * self.arena.page_bytes},
            "entries": dict(entries),
            "namespaces": sum(tenant is None or r.tree.tenant == tenant for r in self._rooms.values()),
            "active": self._deadlines.active,
            "leases": len(self._leases),
            "requests": len(self._requests),
            "ghosts": len(self._ghosts),
            "counters": dict(self._counts),
            "misses": dict(self._misses),
            "reach": {
                group: {
                    "asked_tokens": counts["asked_tokens"],
                    "reached_tokens": counts["reached_tokens"],
                    "ended_by": {str(reason): counts[reason] for reason in Reason if counts[reason]},
                }
                for group, counts in self._reach.items()
            },
            "evictions": dict(self.memory.evictions),
        }

    def clear(self, ns: Namespace | None = None, *, tenant: str | None = None) -> int:
        """Evict all that is not pinned: of one namespace, of a tenant, or everything. Returns the number of entries."""
        rooms = [self._room(ns, None)] if ns is not None else list(self._rooms.values())
        count = sum(r.tree.clear() for r in rooms if tenant is None or r.tree.tenant == tenant)
        if ns is None:
            count += sum(s.clear() for t, s in self._flat.items() if tenant is None or t == tenant)
        return count

    # -- inside --------------------------------------------------------------------------------------

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

    @staticmethod
    def _limit(chain: KeyChain, limit: int | None) -> int:
        most = max(0, chain.tokens - 1)
        return most if limit is None else max(0, min(limit, most))

    @staticmethod
    def _tail(tree: Tree, chain: KeyChain, path: Nodes, length: int) -> int | None:
        return tree.find_tail(chain, length, path) if length % tree.ns.block_tokens else None

    @staticmethod
    def _miss_reason(tree: Tree, chain: KeyChain, path: Nodes) -> str:
        if len(path):
            return str(Reason.NO_CHECKPOINT) if tree.state is not None else "incomplete"
        if chain.blocks and any(tree.ghost(group, chain.blocks[0]) for group in range(len(tree.rules))):
            return str(Reason.EVICTED)
        return str(Reason.NEVER_STORED)

    @staticmethod
    def _check_count(count: int) -> None:
        if count > MAX_FLAT_KEYS:
            raise KeyChainError(f"{count} flat keys in one call, at most {MAX_FLAT_KEYS} are possible: split the call")

    @classmethod
    def _bounded(cls, keys: Sequence[bytes]) -> Sequence[bytes]:
        cls._check_count(len(keys))
        return keys

    @staticmethod
    def _check_reach(chain: KeyChain, boundary: int, points: Iterable[int]) -> None:
        if boundary > chain.tokens:
            raise KeyChainError(f"the key chain has {chain.tokens} tokens, the boundary is {boundary}: extend it first")
        if not all(chain.names(p) for p in points if p % chain.ns.block_tokens):
            raise KeyChainError(
                f"a chain of engine hashes can only end at multiples of {chain.ns.block_tokens} tokens, got {sorted(points)}"
            )

    def _check_active(self) -> None:
        if self._deadlines.active >= MAX_ACTIVE:
            raise PoolLimitError(
                f"{MAX_ACTIVE} puts, gets and leases are open, the limit: close some or try again later"
            )

    def _closed(self, timed: Timed) -> None:
        self._deadlines.closed(timed)

    def _put_ended(self, put: Put, error: KVError | None) -> None:
        """``put`` was committed or failed: its request is answered by the index, or with the error, from now on."""
        self._counts["puts_committed" if error is None else "puts_failed"] += 1
        if put.chain is not None or error is not None:
            self._requests.finish(put, error)
        if error is None and self.on_work is not None:
            self.on_work()
        while error is None and self.on_work is None and self.policy.work():
            pass

    def _put_closed(self, put: Put) -> None:
        """``put`` holds nothing any more."""
        self._closed(put)
        self._requests.finish(put, put.error)

    def _free(self, tenant: str, slabs: Sequence[Slab | Slabs]) -> None:
        self.memory.free(tenant, slabs)
