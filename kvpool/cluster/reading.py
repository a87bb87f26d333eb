"""Gets and leases of a cluster: from the nodes that the directory says hold the parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from kvpool.client import Into, PoolClient
from kvpool.errors import LeaseError, MissError, NoNodeError
from kvpool.keys import KeyChain, Namespace
from kvpool.match import match
from kvpool.protocol import DEFAULT_DEADLINE_S, LeaseInfo
from kvtransport.buffers import PageList
from kvtransport.errors import KVError, LinkError, RefusedError
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.transfer import IncomingTransfer

from .cut import Part, check_aligned, cut_get
from .get import ClusterGet, Routes, Source
from .hedging import Hedges
from .links import NodeLinks
from .loads import Loads
from .locate import Cut, Whole
from .lookup import Lookup
from .members import Member, Roster
from .segments import Slot, placement_name
from .writing import TRIES, chain_name, of_part


class Reader:
    """Gets and leases of one client; ``order(name)`` says where a put would go. Seconds are those of ``now``."""

    def __init__(
        self,
        lookup: Lookup,
        links: NodeLinks,
        roster: Roster,
        order: Callable[[bytes], list[Member]],
        *,
        answer_s: float,
        now: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._random = random
        self.loads = Loads(links.suspects, random)
        self.hedges = Hedges()
        self._lookup, self._links, self._roster, self._order = lookup, links, roster, order
        self._answer_s = answer_s
        self._now = now
        self._leases: dict[int, list[tuple[Member, int]]] = {}
        self._lease_ids = itertools.count(1)

    async def get(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        into: Into,
        start: int = 0,
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        priority: int = 0,
    ) -> IncomingTransfer:
        units = self._lookup.units(ns)
        deadline = self._now() + deadline_s
        if chain is None or not units:
            return await self._get_whole(ns, chain, boundary, into, start, request, deadline, priority)
        manifest = Manifest.of_layout(
            ns.layout, boundary, transfer=new_transfer_id(), start=start, block_tokens=ns.block_tokens
        )
        check_aligned(ns.block_tokens, (start, boundary))
        parts = cut_get(units, chain.blocks, start=start, boundary=boundary)
        known = await self._lookup.find(ns, chain)
        assert isinstance(known, Cut)
        sources = []
        for part in parts:
            nodes = known.owners(units.index(part.unit), part.segment, part.stop_block)
            if not nodes and request is not None:
                # Its put may be in progress: it is where a put of it would go.
                nodes = [m.id for m in self._order(placement_name(chain.blocks[part.segment.first]))[:1]]
            if not nodes:
                found = match(known.view(), boundary)
                raise MissError(
                    f"{boundary} tokens cannot be restored; the longest that can is {found.length} "
                    f"(groups alone: {', '.join(f'{g} {n}' for g, n in found.reach.items())})",
                    restorable=found.length,
                )
            sources.append(Source(part, nodes))

        async def open_part(node: str, part: Part, places: Mapping[Slot, PageList], left: float) -> IncomingTransfer:
            member = self._member(node)
            try:
                client = await self._links.open(member, part.unit.ns)
                return await client.get(
                    part.unit.ns,
                    part.unit.chain(chain.blocks, part.segment, part.stop_block),
                    boundary=part.boundary,
                    start=part.start,
                    into=places,
                    request=of_part(request, part),
                    deadline_s=left,
                    priority=priority,
                )
            except LinkError as error:
                self._links.failed(member, error)
                raise
            except MissError:
                await self._stale(member, known, part)
                raise

        async def again(part: Part) -> Sequence[str]:
            anew = await self._lookup.find(ns, chain)
            assert isinstance(anew, Cut)
            nodes = anew.owners(units.index(part.unit), part.segment, part.stop_block)
            if not nodes:
                raise MissError("no node holds a part of what was asked for (any more)")
            return nodes

        routes = Routes(
            self._best,
            self.loads,
            # Who follows a put waits for its producer: no second node is faster. What is below all others is no hurry.
            self.hedges if request is None and priority >= 0 else None,
            again,
            self._random,
        )
        return ClusterGet(manifest, sources, into(manifest) if callable(into) else into, open_part, deadline, routes)

    def _best(self, nodes: Sequence[str]) -> list[str]:
        return self.loads.order(self._now(), nodes, self._roster.members)

    async def _stale(self, member: Member, known: Cut, part: Part) -> None:
        """Tell an owner that its entry, of the generation we saw, was not true: it says it again unless that is the current one."""
        number = next(n for n, u in enumerate(known.units) if u.kind is part.unit.kind)
        for holder in known.holders.get((number, part.segment.index), ()):
            if holder.node == member.id:
                args = {"keys": [part.segment.key], "generations": [holder.generation]}
                with suppress(KVError):
                    await (await self._links.client(member)).link.call("stale", args, timeout_s=self._answer_s)

    async def _get_whole(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        boundary: int,
        into: Into,
        start: int,
        request: bytes | None,
        deadline: float,
        priority: int,
    ) -> IncomingTransfer:
        async def open_at(client: PoolClient, left: float) -> IncomingTransfer:
            return await client.get(
                ns,
                chain,
                boundary=boundary,
                start=start,
                into=into,
                request=request,
                deadline_s=left,
                priority=priority,
            )

        nodes: list[Member] = []
        best = 0
        if chain is not None:
            known = await self._lookup.find(ns, chain)
            assert isinstance(known, Whole)
            for node, view in known.views.items():
                length = match(view, boundary).length
                best = max(best, length)
                if length == boundary:
                    nodes.append(self._member(node))
        if not nodes and request is not None:
            nodes = self._order(chain_name(chain, request))[:1]
        if not nodes:
            raise MissError(
                f"{boundary} tokens cannot be restored from any one node; the longest that can is {best}",
                restorable=best,
            )
        nodes = [self._member(n) for n in self._best([m.id for m in nodes])]
        error: KVError | None = None
        for member in nodes[:TRIES]:
            try:
                client = await self._links.open(member, ns)
                return await open_at(client, max(deadline - self._now(), 0.001))
            except (LinkError, MissError, RefusedError, NoNodeError) as why:
                error = why
                if isinstance(why, LinkError):
                    self._links.failed(member, why)
        assert error is not None
        raise error

    def _member(self, node: str) -> Member:
        member = self._roster.members.get(node)
        if member is None:
            raise NoNodeError(f"node {node!r} has left the cluster")
        return member

    # -- leases --------------------------------------------------------------------------------

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        units = self._lookup.units(ns)
        held: list[tuple[Member, int]] = []
        known = await self._lookup.find(ns, chain)
        wanted: list[tuple[list[str], Namespace, KeyChain, int]] = []
        if isinstance(known, Cut):
            for part in cut_get(units, chain.blocks, start=0, boundary=length):
                nodes = known.owners(units.index(part.unit), part.segment, part.stop_block)
                wanted.append(
                    (nodes, part.unit.ns, part.unit.chain(chain.blocks, part.segment, part.stop_block), part.boundary)
                )
        else:
            nodes = [n for n, v in known.views.items() if match(v, length).length == length]
            wanted.append((nodes, ns, chain, length))
        try:
            for nodes, where, keys, boundary in wanted:
                if not nodes:
                    raise MissError(f"{length} tokens cannot be restored: there is nothing to keep")
                member = self._member(nodes[0])
                client = await self._links.open(member, where)
                held.append((member, (await client.lease(where, keys, boundary, seconds)).id))
        except BaseException:
            await self._release(held)
            raise
        number = next(self._lease_ids)
        self._leases[number] = held
        return LeaseInfo(number, length, seconds)

    async def release(self, lease_id: int) -> None:
        held = self._leases.pop(lease_id, None)
        if held is None:
            raise LeaseError(f"there is no lease {lease_id}: it was released")
        await self._release(held)

    async def _release(self, held: Iterable[tuple[Member, int]]) -> None:
        for member, number in held:
            try:
                await (await self._links.client(member)).release(number)
            except KVError:
                continue  # its node is gone, and the lease with it; or its time was up
