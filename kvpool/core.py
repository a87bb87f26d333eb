"""The pool as a state machine: one owner loop, no I/O, no sleeping; the clock is passed in.

Everything else (the embedded :class:`kvpool.pool.Pool`, the daemon) moves the bytes and calls this.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvtransport.errors import KVError

from .arena import BlockClass, PageArena
from .deadlines import Lease
from .errors import KeyChainError, LeaseError, MissError, PrefixMissingError
from .eviction import DEFAULT_POLICY
from .get import Get
from .index import Selection
from .keys import KeyChain, Namespace
from .lookups import Lookups
from .match import Reason
from .placement import page_lists
from .planning import follow, held_at, needs
from .put import Put
from .requests import Requests
from .shelves import Shelves
from .steps import Steps, run


class PoolCore(Lookups, Shelves):
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
        super().__init__(
            arena,
            clock=clock,
            tenant_quota_bytes=tenant_quota_bytes,
            prefix_floor_bytes=prefix_floor_bytes,
            policy=policy,
        )
        self.on_request: Callable[[str, bytes], None] | None = None
        """Called with (tenant, request) when a put with that request begins."""
        self.on_work: Callable[[], None] | None = None
        """Called when the policy has something to learn (:meth:`kvpool.eviction.Policy.work`); without it all is learnt at once."""
        self._requests = Requests()
        self._leases: dict[int, Lease] = {}
        self._lease_ids = itertools.count(1)

    # -- putting ------------------------------------------------------------------------------------

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

    # -- getting ------------------------------------------------------------------------------------

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

    # -- leases -------------------------------------------------------------------------------------

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

    # -- counters, clearing -------------------------------------------------------------------------

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

    # -- inside -------------------------------------------------------------------------------------

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
