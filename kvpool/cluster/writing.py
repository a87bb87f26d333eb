"""Puts into a cluster: each segment opened on the node that placement gives, or on the one that holds its beginning."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from kvpool.client import PoolClient
from kvpool.errors import NoNodeError, PoolFullError, PrefixMissingError
from kvpool.keys import KeyChain, Namespace
from kvpool.protocol import DEFAULT_DEADLINE_S
from kvtransport.errors import KVError, LinkError, RefusedError
from kvtransport.layout import GroupKind
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.transfer import OutgoingTransfer

from .cut import Part, cut_put
from .links import NodeLinks
from .locate import Cut, Whole
from .lookup import Lookup
from .members import Member, Roster
from .placement import Placement
from .put import ClusterPut
from .segments import placement_name

TRIES = 3
"""Nodes that are asked to take a segment before the put fails."""
T = TypeVar("T")


class Writer:
    """Puts of one client. Seconds are those of ``now``."""

    def __init__(
        self, lookup: Lookup, links: NodeLinks, roster: Roster, placement: Placement, now: Callable[[], float]
    ) -> None:
        self._lookup, self._links, self._roster = lookup, links, roster
        self._placement = placement
        self._now = now

    async def put(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        priority: int = 0,
    ) -> OutgoingTransfer:
        units = self._lookup.units(ns)
        points = tuple(sorted({*checkpoints}))
        deadline = self._now() + deadline_s
        if chain is None or not units:
            return await self._put_whole(ns, chain, boundary, start, points, request, deadline, priority)
        manifest = Manifest.of_layout(
            ns.layout,
            boundary,
            transfer=new_transfer_id(),
            start=start,
            checkpoints=points,
            block_tokens=ns.block_tokens,
        )
        parts = cut_put(units, chain.blocks, start=start, boundary=boundary, points=points)
        owners: dict[tuple[GroupKind, int], list[str]] = {}
        if start:
            owners = await self._owners_of_prefix(ns, chain, start, parts)
        work = [
            self._open_put(
                ns, chain, part, owners.get((part.unit.kind, part.segment.index)), request, deadline, priority
            )
            for part in parts
        ]
        results = await asyncio.gather(*work, return_exceptions=True)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            opened = [r for r in results if not isinstance(r, BaseException)]
            await asyncio.gather(*(t.cancel("another part could not be opened") for t in opened))
            raise errors[0]
        transfers = [r for r in results if not isinstance(r, BaseException)]
        return ClusterPut(manifest, list(zip(parts, transfers, strict=True)))

    async def _owners_of_prefix(
        self, ns: Namespace, chain: KeyChain, start: int, parts: Sequence[Part]
    ) -> dict[tuple[GroupKind, int], list[str]]:
        """Where the first part must go, when it goes on inside a segment. Raises PrefixMissingError."""
        known = await self._lookup.find(ns, chain)
        assert isinstance(known, Cut)
        view = known.view()
        blocks = start // ns.block_tokens
        for group, rule in enumerate(view.rules):
            there = view.resident[group, :blocks]
            if rule.kind is GroupKind.FULL and not there.all():
                reached = int(there.argmin()) * ns.block_tokens
                raise PrefixMissingError(
                    f"the put starts at {start} tokens, but only {reached} before it are in the cluster (evicted meanwhile?): start "
                    "there or earlier",
                    resident=reached,
                )
        out: dict[tuple[GroupKind, int], list[str]] = {}
        for number, unit in enumerate(known.units):
            for part in parts:
                if part.unit is unit and unit.kind is GroupKind.FULL and part.start:
                    out[unit.kind, part.segment.index] = known.owners(number, part.segment, blocks)
        return out

    async def _open_put(
        self,
        ns: Namespace,
        chain: KeyChain,
        part: Part,
        owners: list[str] | None,
        request: bytes | None,
        deadline: float,
        priority: int,
    ) -> OutgoingTransfer:
        keys = part.unit.chain(chain.blocks, part.segment, part.stop_block)

        async def open_at(client: PoolClient, left: float) -> OutgoingTransfer:
            return await client.put(
                part.unit.ns,
                keys,
                boundary=part.boundary,
                start=part.start,
                checkpoints=part.points,
                request=of_part(request, part),
                deadline_s=left,
                priority=priority,
            )

        # Both units of a segment go to the same node.
        where = self.order(placement_name(chain.blocks[part.segment.first]))
        if owners is not None:
            where = [m for m in where if m.id in owners]
        return await self._first_that(where, part.unit.ns, open_at, deadline)

    async def _put_whole(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        boundary: int,
        start: int,
        points: tuple[int, ...],
        request: bytes | None,
        deadline: float,
        priority: int,
    ) -> OutgoingTransfer:
        async def open_at(client: PoolClient, left: float) -> OutgoingTransfer:
            return await client.put(
                ns,
                chain,
                boundary=boundary,
                start=start,
                checkpoints=points,
                request=request,
                deadline_s=left,
                priority=priority,
            )

        where = self.order(chain_name(chain, request))
        if chain is not None and start:
            known = await self._lookup.find(ns, chain)
            assert isinstance(known, Whole)
            holders = {
                node
                for node, view in known.views.items()
                if all(
                    view.resident[g, : start // ns.block_tokens].all()
                    for g, rule in enumerate(view.rules)
                    if rule.kind is GroupKind.FULL
                )
            }
            where = [m for m in where if m.id in holders]
            if not where:
                raise PrefixMissingError(
                    f"the put starts at {start} tokens, but no node holds all before it", resident=0
                )
        return await self._first_that(where, ns, open_at, deadline)

    def order(self, name: bytes) -> list[Member]:
        """The nodes that take what is placed by ``name``, best first, those that failed lately last."""
        members = self._placement.order(name, self._roster.writable())
        now = self._now()
        return sorted(members, key=lambda m: self._links.suspects.suspect(now, m.id))

    async def _first_that(
        self,
        where: Sequence[Member],
        ns: Namespace,
        open_at: Callable[[PoolClient, float], Awaitable[T]],
        deadline: float,
    ) -> T:
        """Open at the first of the nodes that takes it; at most TRIES are asked."""
        error: KVError = NoNodeError("no node of the cluster takes new data")
        for member in where[:TRIES]:
            try:
                client = await self._links.open(member, ns)
                return await open_at(client, max(deadline - self._now(), 0.001))
            except (LinkError, PoolFullError, RefusedError, NoNodeError) as why:
                error = why
                if isinstance(why, LinkError):
                    self._links.failed(member, why)
        raise error


def chain_name(chain: KeyChain | None, request: bytes | None) -> bytes:
    """What a whole chain (or a request without one) is placed by."""
    if chain is not None and chain.blocks:
        return placement_name(chain.blocks[0])
    return placement_name(request or b"")


def of_part(request: bytes | None, part: Part) -> bytes | None:
    """The request id under which one part can be followed."""
    if request is None:
        return None
    return hashlib.blake2b(part.segment.key, digest_size=16, key=request).digest()
