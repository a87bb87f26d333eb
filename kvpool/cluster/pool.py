"""The client of a cluster: many nodes with the interface of one pool (:class:`kvpool.protocol.PoolProtocol`)."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random as _random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

import numpy as np

from kvpool.admission import CheckpointHints, hints_of_view
from kvpool.client import Into, PoolClient
from kvpool.errors import (
    DirectoryError,
    LeaseError,
    MissError,
    NamespaceError,
    NoNodeError,
    PoolFullError,
    PrefixMissingError,
)
from kvpool.keys import KeyChain, Namespace, check_tenant
from kvpool.match import Explanation, Match, View, explain, match, rules_of
from kvpool.protocol import DEFAULT_BLOCK_TOKENS, DEFAULT_DEADLINE_S, LeaseInfo
from kvpool.security import DEFAULT_TENANT
from kvtransport.buffers import PageList
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, KVError, LinkError, RefusedError
from kvtransport.layout import CacheLayout, GroupKind
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.transfer import IncomingTransfer, OutgoingTransfer

from .cut import Part, check_aligned, cut_get, cut_put
from .directory import Directory
from .get import ClusterGet, Source
from .links import NodeLinks
from .locate import Cut, Whole, empty_view
from .members import Member, Roster, by_cluster
from .objects import FlatObjects
from .peers import PeerDirectory, ask_entries
from .placement import LocalFirst, Placement, Rendezvous
from .put import ClusterPut
from .segments import Slot, Unit, can_be_cut, placement_name, units_of
from .tasks import end

TRIES = 3
"""Nodes that are asked to take a segment before the put fails."""
T = TypeVar("T")


class ClusterPool:
    """Made by :func:`connect_cluster`. Belongs to one event loop; use as an async context manager.

    Chains are stored in segments of 64 blocks, each where ``placement`` says (``"segments"``); layouts with sliding windows, or all with
    ``whole_chains``, whole on one node.
    """

    def __init__(
        self,
        directory: Directory,
        links: NodeLinks,
        *,
        placement: Placement,
        whole_chains: bool = False,
        tenant: str = DEFAULT_TENANT,
        ttl_s: float = 3.0,
        answer_s: float = 1.0,
    ) -> None:
        self._tenant = check_tenant(tenant)
        self.directory = directory
        self.links = links
        self.roster = Roster(ttl_s)
        self._placement = placement
        self._whole_chains = whole_chains
        self._answer_s = answer_s
        self._units: dict[bytes, tuple[Unit, ...]] = {}
        self._leases: dict[int, list[tuple[Member, int]]] = {}
        self._lease_ids = itertools.count(1)
        self._watch: asyncio.Task[None] | None = None
        self._now = asyncio.get_running_loop().time
        self._objects = FlatObjects(links, self._order)

    async def start(self) -> None:
        """Learn the members and keep up with them. Raises NoNodeError when there is none, DirectoryError."""
        self.roster.update(self._now(), await self.directory.snapshot())
        if not self.roster.members:
            raise NoNodeError("the cluster has no node: start a kvpoold that joins it")
        self._watch = asyncio.get_running_loop().create_task(self._keep_up(), name="cluster members")

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(self.roster.ttl_s / 3)
            await self.refresh()

    async def refresh(self) -> None:
        """Ask for the members now; a directory that does not answer leaves the last view."""
        try:
            async with asyncio.timeout(self._answer_s * 2):
                snapshot = await self.directory.snapshot()
        except (DirectoryError, TimeoutError):
            self.roster.failed()
        else:
            self.roster.update(self._now(), snapshot)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._watch is not None:
            await end([self._watch])
            self._watch = None
        await self.links.close()
        await self.directory.close()

    # -- lookups -------------------------------------------------------------------------------

    async def namespace(
        self, layout: CacheLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, *, salt: bytes = b""
    ) -> Namespace:
        # Nodes open it when they are first used for it. They go by the session's tenant; ours finds it in the directory.
        ns = Namespace(self._tenant, layout, block_tokens, salt)
        self._units[ns.id] = () if self._whole_chains or not can_be_cut(layout, block_tokens) else units_of(ns)
        return ns

    async def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        known = await self._find(ns, chain)
        limit = self._limit(chain, limit)
        if isinstance(known, Cut):
            return match(known.view(), limit)
        best = Match(0, (), {g.name: 0 for g in ns.layout.groups}, limit)
        for view in known.views.values():
            found = match(view, limit)
            if found.length > best.length:
                best = found
        return best

    async def match_across_clusters(
        self, ns: Namespace, chain: KeyChain, limit: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Cluster -> the lengths (tokens, ascending) that its nodes can restore by themselves."""
        known = await self._find(ns, chain)
        limit = self._limit(chain, limit)
        out = {}
        for cluster, members in by_cluster(self.roster.members.values()).items():
            nodes = frozenset(m.id for m in members)
            if isinstance(known, Cut):
                out[cluster] = match(known.view(nodes), limit).restorable
            else:
                lengths = {
                    n for node in nodes if node in known.views for n in match(known.views[node], limit).restorable
                }
                out[cluster] = tuple(sorted(lengths))
        return out

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        known = await self._find(ns, chain)
        limit = self._limit(chain, None)
        views = [known.view()] if isinstance(known, Cut) else list(known.views.values()) or [empty_view(ns)]
        best = max(views, key=lambda v: match(v, limit).length)
        return explain(best, limit, 0.0, lambda group, position: None)

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        """See :meth:`kvpool.protocol.PoolProtocol.checkpoint_hints`; the directory does not say what follows a block, so every end
        of what is known that cannot be restored counts as a branch.
        """
        known = await self._find(ns, chain)
        limit = self._limit(chain, None)
        views = [known.view()] if isinstance(known, Cut) else list(known.views.values())
        nothing = View(ns.block_tokens, rules_of(ns.layout), np.zeros((len(ns.layout.groups), 0), dtype=np.bool_))
        best = max(views, key=lambda v: match(v, limit).length, default=nothing)
        off_grid = not isinstance(known, Cut) and not chain.opaque
        return hints_of_view(best, chain.tokens, branches=True, off_grid=off_grid, insists=insists)

    async def _find(self, ns: Namespace, chain: KeyChain) -> Cut | Whole:
        """Ask the directory about the whole chain, in one round trip."""
        units = self._of(ns)
        known: Cut | Whole = Cut(ns, units, chain.blocks) if units else Whole(ns, chain)
        known.fill(await self._look(known.keys), self.roster.incarnations())
        return known

    async def _look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        if not self.roster.frozen(self._now()):
            try:
                async with asyncio.timeout(self._answer_s):
                    return await self.directory.look(keys)
            except (DirectoryError, TimeoutError):
                self.roster.failed()
        return await ask_entries(self.links, self.roster.members.values(), keys, self._answer_s)

    def _of(self, ns: Namespace) -> tuple[Unit, ...]:
        units = self._units.get(ns.id)
        if units is None:
            raise NamespaceError(f"the namespace of {ns.layout.model!r} is not open: open it first")
        return units

    @staticmethod
    def _limit(chain: KeyChain, limit: int | None) -> int:
        most = max(0, chain.tokens - 1)
        return most if limit is None else max(0, min(limit, most))

    # -- prefixes ------------------------------------------------------------------------------

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
    ) -> OutgoingTransfer:
        units = self._of(ns)
        points = tuple(sorted({*checkpoints}))
        deadline = self._now() + deadline_s
        if chain is None or not units:
            return await self._put_whole(ns, chain, boundary, start, points, request, deadline)
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
            self._open_put(ns, chain, part, owners.get((part.unit.kind, part.segment.index)), request, deadline)
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
        known = await self._find(ns, chain)
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
    ) -> OutgoingTransfer:
        keys = part.unit.chain(chain.blocks, part.segment, part.stop_block)

        async def open_at(client: PoolClient, left: float) -> OutgoingTransfer:
            return await client.put(
                part.unit.ns,
                keys,
                boundary=part.boundary,
                start=part.start,
                checkpoints=part.points,
                request=_of_part(request, part),
                deadline_s=left,
            )

        # Both units of a segment go to the same node.
        where = self._order(placement_name(chain.blocks[part.segment.first]))
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
    ) -> OutgoingTransfer:
        async def open_at(client: PoolClient, left: float) -> OutgoingTransfer:
            return await client.put(
                ns, chain, boundary=boundary, start=start, checkpoints=points, request=request, deadline_s=left
            )

        where = self._order(self._name(chain, request))
        if chain is not None and start:
            known = await self._find(ns, chain)
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

    @staticmethod
    def _name(chain: KeyChain | None, request: bytes | None) -> bytes:
        """What a whole chain (or a request without one) is placed by."""
        if chain is not None and chain.blocks:
            return placement_name(chain.blocks[0])
        return placement_name(request or b"")

    def _order(self, name: bytes) -> list[Member]:
        members = self._placement.order(name, self.roster.writable())
        now = self._now()
        return sorted(members, key=lambda m: self.links.suspects.suspect(now, m.id))

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
                client = await self.links.open(member, ns)
                return await open_at(client, max(deadline - self._now(), 0.001))
            except (LinkError, PoolFullError, RefusedError, NoNodeError) as why:
                error = why
                if isinstance(why, LinkError):
                    self.links.failed(member, why)
        raise error

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
    ) -> IncomingTransfer:
        units = self._of(ns)
        deadline = self._now() + deadline_s
        if chain is None or not units:
            return await self._get_whole(ns, chain, boundary, into, start, request, deadline)
        manifest = Manifest.of_layout(
            ns.layout, boundary, transfer=new_transfer_id(), start=start, block_tokens=ns.block_tokens
        )
        check_aligned(ns.block_tokens, (start, boundary))
        parts = cut_get(units, chain.blocks, start=start, boundary=boundary)
        known = await self._find(ns, chain)
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
            sources.append(Source(part, self.links.suspects.sorted(self._now(), nodes)))

        async def open_part(node: str, part: Part, places: Mapping[Slot, PageList], left: float) -> IncomingTransfer:
            member = self._member(node)
            try:
                client = await self.links.open(member, part.unit.ns)
                return await client.get(
                    part.unit.ns,
                    part.unit.chain(chain.blocks, part.segment, part.stop_block),
                    boundary=part.boundary,
                    start=part.start,
                    into=places,
                    request=_of_part(request, part),
                    deadline_s=left,
                )
            except LinkError as error:
                self.links.failed(member, error)
                raise
            except MissError:
                await self._stale(member, known, part)
                raise

        return ClusterGet(manifest, sources, into(manifest) if callable(into) else into, open_part, deadline)

    async def _stale(self, member: Member, known: Cut, part: Part) -> None:
        """Tell an owner that its entry, of the generation we saw, was not true: it says it again unless that is the current one."""
        number = next(n for n, u in enumerate(known.units) if u.kind is part.unit.kind)
        for holder in known.holders.get((number, part.segment.index), ()):
            if holder.node == member.id:
                args = {"keys": [part.segment.key], "generations": [holder.generation]}
                with suppress(KVError):
                    await (await self.links.client(member)).link.call("stale", args, timeout_s=self._answer_s)

    async def _get_whole(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        boundary: int,
        into: Into,
        start: int,
        request: bytes | None,
        deadline: float,
    ) -> IncomingTransfer:
        async def open_at(client: PoolClient, left: float) -> IncomingTransfer:
            return await client.get(
                ns, chain, boundary=boundary, start=start, into=into, request=request, deadline_s=left
            )

        nodes: list[Member] = []
        best = 0
        if chain is not None:
            known = await self._find(ns, chain)
            assert isinstance(known, Whole)
            for node, view in known.views.items():
                length = match(view, boundary).length
                best = max(best, length)
                if length == boundary:
                    nodes.append(self._member(node))
        if not nodes and request is not None:
            nodes = self._order(self._name(chain, request))[:1]
        if not nodes:
            raise MissError(
                f"{boundary} tokens cannot be restored from any one node; the longest that can is {best}",
                restorable=best,
            )
        now = self._now()
        nodes.sort(key=lambda m: self.links.suspects.suspect(now, m.id))
        error: KVError | None = None
        for member in nodes[:TRIES]:
            try:
                client = await self.links.open(member, ns)
                return await open_at(client, max(deadline - self._now(), 0.001))
            except (LinkError, MissError, RefusedError, NoNodeError) as why:
                error = why
                if isinstance(why, LinkError):
                    self.links.failed(member, why)
        assert error is not None
        raise error

    def _member(self, node: str) -> Member:
        member = self.roster.members.get(node)
        if member is None:
            raise NoNodeError(f"node {node!r} has left the cluster")
        return member

    # -- leases --------------------------------------------------------------------------------

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        units = self._of(ns)
        held: list[tuple[Member, int]] = []
        known = await self._find(ns, chain)
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
                client = await self.links.open(member, where)
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
                await (await self.links.client(member)).release(number)
            except KVError:
                continue  # its node is gone, and the lease with it; or its time was up

    # -- flat objects --------------------------------------------------------------------------

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._objects.exists(keys)

    async def put_objects(self, objects: Mapping[bytes, Any]) -> None:
        """As the embedded pool's, but all or none on each node, not over nodes."""
        await self._objects.put(objects)

    async def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return await self._objects.get(keys)

    async def get_objects_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        return await self._objects.get_into(keys, into)

    # -- the whole -----------------------------------------------------------------------------

    async def stat(self) -> dict[str, Any]:
        """Sums over the nodes that answer, and each node's own under "nodes" (None: it did not answer)."""
        members = list(self.roster.members.values())

        async def one(member: Member) -> dict[str, Any] | None:
            try:
                async with asyncio.timeout(self._answer_s):
                    return await (await self.links.client(member)).stat()
            except (KVError, TimeoutError):
                return None

        answers = await asyncio.gather(*(one(m) for m in members))
        total: dict[str, Any] = {"total_bytes": 0, "used_bytes": 0, "free_bytes": 0}
        for answer in answers:
            if answer is not None:
                for name in total:
                    total[name] += int(answer.get(name, 0))
        total["frozen"] = self.roster.frozen(self._now())
        total["nodes"] = {m.id: a for m, a in zip(members, answers, strict=True)}
        return total

    async def clear(self) -> int:
        members = self.roster.members.values()
        clients = await asyncio.gather(*(self.links.client(m) for m in members))
        return sum(await asyncio.gather(*(c.clear() for c in clients)))


def _of_part(request: bytes | None, part: Part) -> bytes | None:
    """The request id under which one part can be followed."""
    if request is None:
        return None
    return hashlib.blake2b(part.segment.key, digest_size=16, key=request).digest()


def open_placement(placement: str, cluster: str | None, local: str | None) -> tuple[Placement, bool]:
    """(placement, whether chains stay whole) by name: "segments", "chain" or "local". Raises ConfigError."""
    if placement == "segments":
        return Rendezvous(cluster), False
    if placement == "chain":
        return Rendezvous(cluster), True
    if placement == "local":
        if local is None:
            raise ConfigError('placement="local" needs the id of the local node')
        return LocalFirst(local, cluster), True
    raise ConfigError(f'placement is "segments", "chain" or "local", got {placement!r}')


async def connect_cluster(
    target: str | Sequence[str],
    *,
    placement: str = "segments",
    cluster: str | None = None,
    local: str | None = None,
    tenant: str = DEFAULT_TENANT,
    ttl_s: float = 3.0,
    answer_s: float = 1.0,
    connections: int = 2,
    config: EndpointConfig | None = None,
) -> ClusterPool:
    """Connect to a cluster by its directory's URL ("valkey://..."), or to a fixed list of nodes ("HOST:PORT").

    ``placement``: "segments" (64 blocks each, by rendezvous hashing), "chain" (whole chains by their beginning) or "local" (whole
    chains on the node ``local``); all clients of a pool use the same. ``cluster``: write to that cluster's nodes only. ``ttl_s``
    is the members' TTL, ``tenant`` the one that the nodes take this client for (by its token or certificate), ``answer_s`` the patience with the directory and with a node that is asked for its entries (seconds).

    Raises ConfigError, DirectoryError, NoNodeError.

    >>> async with await connect_cluster("valkey://127.0.0.1:6379") as pool:  # doctest: +SKIP
    ...     print(await pool.stat())
    """
    policy, whole = open_placement(placement, cluster, local)
    links = NodeLinks(config or EndpointConfig(), random=_random.random, connections=connections)
    directory: Directory
    if isinstance(target, str):
        from .valkey import open_directory

        directory = open_directory(target, timeout_s=answer_s)
    else:
        directory = PeerDirectory(links, list(target), timeout_s=answer_s)
    pool = ClusterPool(
        directory, links, placement=policy, whole_chains=whole, tenant=tenant, ttl_s=ttl_s, answer_s=answer_s
    )
    try:
        await pool.start()
    except BaseException:
        await pool.close()
        raise
    return pool
