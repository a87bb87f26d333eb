"""The client of a cluster: many nodes with the interface of one pool (:class:`kvpool.protocol.PoolProtocol`)."""

from __future__ import annotations

import asyncio
import os
import random as _random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from kvpool.admission import CheckpointHints
from kvpool.client import Into
from kvpool.errors import DirectoryError, NoNodeError
from kvpool.keys import KeyChain, Namespace, check_tenant
from kvpool.match import Explanation, Match
from kvpool.protocol import DEFAULT_BLOCK_TOKENS, DEFAULT_DEADLINE_S, LeaseInfo
from kvpool.security import DEFAULT_TENANT
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, KVError
from kvtransport.layout import CacheLayout
from kvtransport.transfer import IncomingTransfer, OutgoingTransfer

from .computing import Turn, Turns
from .directory import Directory
from .links import NodeLinks
from .lookup import Lookup
from .members import Member, Roster
from .objects import FlatObjects
from .peers import PeerDirectory
from .placement import LocalFirst, Placement, Rendezvous
from .pulling import DEADLINE_S, Pulled, Puller
from .reading import Reader
from .tasks import end, keep_running
from .writing import Writer


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
        random: Callable[[], float] = _random.random,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.directory = directory
        self.links = links
        self.roster = Roster(ttl_s)
        self._answer_s = answer_s
        self._watch: asyncio.Task[None] | None = None
        self._now = now = asyncio.get_running_loop().time
        self._lookup = Lookup(
            directory,
            links,
            self.roster,
            tenant=check_tenant(tenant),
            whole_chains=whole_chains,
            answer_s=answer_s,
            now=now,
        )
        self._writer = Writer(self._lookup, links, self.roster, placement, now)
        self._reader = Reader(
            self._lookup, links, self.roster, self._writer.order, answer_s=answer_s, now=now, random=random
        )
        self._turns = Turns(
            self._length,
            self._writer.order,
            links,
            holder=lambda: entropy(16),
            random=random,
            answer_s=answer_s,
            now=now,
        )
        self._puller = Puller(self._lookup, links, self.roster, self._writer.order, now)
        self._objects = FlatObjects(links, self._writer.order)

    async def start(self) -> None:
        """Learn the members and keep up with them. Raises NoNodeError when there is none, DirectoryError."""
        asked = self._now()
        snapshot = await self.directory.snapshot()
        self.roster.update(asked, snapshot, heard=self._now())
        if not self.roster.members:
            raise NoNodeError("the cluster has no node: start a kvpoold that joins it")
        watch = keep_running(self._keep_up, "cluster members")
        self._watch = asyncio.get_running_loop().create_task(watch, name="cluster members")

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(self.roster.ttl_s / 3)
            await self.refresh()

    async def refresh(self) -> None:
        """Ask for the members now; a directory that does not answer leaves the last view."""
        asked = self._now()
        try:
            async with asyncio.timeout(self._answer_s * 2):
                snapshot = await self.directory.snapshot()
        except (DirectoryError, TimeoutError):
            self.roster.failed()
        else:
            self.roster.update(asked, snapshot, heard=self._now())

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
        return self._lookup.open(layout, block_tokens, salt)

    async def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        return await self._lookup.match(ns, chain, limit)

    async def match_across_clusters(
        self, ns: Namespace, chain: KeyChain, limit: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Cluster -> the lengths (tokens, ascending) that its nodes can restore by themselves."""
        return await self._lookup.match_across_clusters(ns, chain, limit)

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        return await self._lookup.explain(ns, chain)

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        return await self._lookup.checkpoint_hints(ns, chain, insists)

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
        priority: int = 0,
    ) -> OutgoingTransfer:
        return await self._writer.put(
            ns,
            chain,
            boundary=boundary,
            start=start,
            checkpoints=checkpoints,
            request=request,
            deadline_s=deadline_s,
            priority=priority,
        )

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
        return await self._reader.get(
            ns,
            chain,
            boundary=boundary,
            into=into,
            start=start,
            request=request,
            deadline_s=deadline_s,
            priority=priority,
        )

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        return await self._reader.lease(ns, chain, length, seconds)

    async def release(self, lease_id: int) -> None:
        await self._reader.release(lease_id)

    async def turn(
        self, ns: Namespace, chain: KeyChain, length: int, *, wait_s: float = 30.0, seconds: float = 60.0
    ) -> Turn:
        """Ask before computing ``length`` tokens of ``chain`` that may be missing: of all who ask at once one computes.

        The first who misses computes (``turn.computes``), with the right to for ``seconds``; the others wait for its put up to ``wait_s``
        seconds, and compute then. The right is kept by one node and lost with it: nobody waits for what nobody can say.

        >>> async with await pool.turn(ns, chain, 4096) as turn:  # doctest: +SKIP
        ...     if turn.computes:
        ...         await prefill_and_put(start=turn.length)
        """
        return await self._turns.take(ns, chain, length, wait_s=wait_s, seconds=seconds)

    async def _length(self, ns: Namespace, chain: KeyChain) -> int:
        return (await self.match(ns, chain, chain.tokens)).length

    # -- across clusters -----------------------------------------------------------------------

    async def pull(
        self,
        ns: Namespace,
        chain: KeyChain,
        *,
        into: str,
        sources: Collection[str] | None = None,
        length: int | None = None,
        deadline_s: float = DEADLINE_S,
        bytes_per_s: float | None = None,
        on_progress: Callable[[Pulled], None] = lambda pulled: None,
    ) -> Pulled:
        """Bring the longest prefix of ``chain`` that can be restored, up to ``length`` tokens, from other clusters into cluster ``into``.

        Its nodes read what they lack of it from nodes of the clusters ``sources`` (all others), below live transfers and all together at
        no more than ``bytes_per_s`` (and what each node's ``copy_gbps`` allows), until ``deadline_s`` seconds have passed. What is
        short of memory, time or a source ends it early and is told, not raised: what came stays, and the next pull copies only what is
        missing. ``on_progress`` is called with the same object after every part. Cancelled, the parts under way (at most two) still end.

        Raises ConfigError for a cluster that is not there, NamespaceError, LinkError.
        """
        return await self._puller.pull(
            ns,
            chain,
            into=into,
            sources=sources,
            length=length,
            deadline_s=deadline_s,
            bytes_per_s=bytes_per_s,
            on_progress=on_progress,
        )

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
        hedges = self._reader.hedges
        total["reads"] = {"parts": hedges.reads, "hedged": hedges.asked, "hedges_won": hedges.won}
        total["frozen"] = self.roster.frozen(self._now())
        total["nodes"] = {m.id: a for m, a in zip(members, answers, strict=True)}
        return total

    async def clear(self) -> int:
        members = self.roster.members.values()
        clients = await asyncio.gather(*(self.links.client(m) for m in members))
        return sum(await asyncio.gather(*(c.clear() for c in clients)))


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
