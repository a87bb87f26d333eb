"""A node's side of the cluster: joins, says that it is there, announces what it holds, and leaves."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from kvpool.core import PoolCore
from kvpool.errors import DirectoryError
from kvpool.keys import KeyChain, Namespace
from kvpool.messages import Args
from kvpool.security import tenant_of
from kvtransport.address import parse_address
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import AddressError, ConfigError, ProtocolError, RefusedError
from kvtransport.io.base import Network
from kvtransport.link import Link
from kvtransport.probing import who_answers

from .announcing import ENTRY_TTL_S, Announcer, Watchers
from .claims import Claims
from .directory import Directory
from .fetching import Fetcher
from .keeping import Keeper
from .links import NodeLinks
from .members import Member, Pulse, Roster, State
from .moving import Mover
from .placement import Rendezvous
from .replicas import ReplicaPolicy
from .tasks import end, keep_running

log = logging.getLogger("kvpool")
ANNOUNCE_S = 0.05
"""Between two rounds of announcements while something changes."""
ROUND = 512
"""Segments of one round."""
PROBE_S = 5.0
MAX_UNREACHED = 256
"""Nodes that are told of."""
FAREWELL_S = 2.0
"""For taking its entries back when it leaves; those that stay are void without it, and forgotten in time."""


class NodeAgent:
    """Keeps the entries of ``core`` from its making on (before anything is stored); :meth:`join` puts it into a directory.

    ``clock`` gives seconds, ``load`` the bytes of reads in progress. ``replicas``, ``rebalance`` and ``copy_bytes_per_s`` are for
    :class:`~kvpool.cluster.keeping.Keeper`. Without a directory it still answers clients that ask this node directly.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        core: PoolCore,
        *,
        node: str,
        cluster: str,
        capacity: int,
        clock: Callable[[], float],
        network: Network | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        replicas: ReplicaPolicy | None = None,
        rebalance: bool = True,
        copy_bytes_per_s: float | None = None,
        load: Callable[[], int] = lambda: 0,
    ) -> None:
        self._network, self._entropy = network, entropy
        self._load = load
        self.announcer = Announcer(endpoint.incarnation)
        self.node = node
        self.state = State.UP
        self._endpoint = endpoint
        self._core = core
        self._cluster = cluster
        self._capacity = capacity
        self._clock = clock
        self.addresses: tuple[str, ...] = ()
        self._directory: Directory | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._mover: Mover | None = None
        self._draining: asyncio.Task[None] | None = None
        self._config: EndpointConfig | None = None
        self.on_unreachable: Callable[[str], None] = log.warning
        """Told once for each other node that cannot reach this one's address, in words."""
        self._unreached: set[str] = set()
        self.announced = 0
        self.announcing = False
        """Whether an announcement is on its way."""
        self.failures = 0
        self._ttl_s = 0.0
        self._keeping = (replicas or ReplicaPolicy(), rebalance, copy_bytes_per_s)
        self.keeper: Keeper | None = None
        self._links: NodeLinks | None = None
        self._roster = Roster(0.0)
        core.watcher = self._watchers = Watchers(self.announcer)
        endpoint.handlers["member"] = self._on_member
        endpoint.handlers["entries"] = self._on_entries
        endpoint.handlers["stale"] = self._on_stale
        endpoint.handlers["drain"] = self._on_drain
        endpoint.handlers["claim"] = self._on_claim
        endpoint.handlers["pull"] = self._on_pull
        self._fetcher = Fetcher(core, clock, copy_bytes_per_s)
        self._claims = Claims()

    @property
    def member(self) -> Member:
        """What this node says of itself."""
        return Member(
            id=self.node,
            incarnation=self._endpoint.incarnation,
            cluster=self._cluster,
            addresses=self.addresses or ("0.0.0.0:0",),
            capacity=self._capacity,
            used=self._core.arena.total_bytes - self._core.arena.free_bytes,
            state=self.state,
            load=self._load(),
        )

    def read(self, ns: Namespace, chain: KeyChain, boundary: int) -> None:
        """Somebody reads ``chain`` up to ``boundary`` (tokens) here."""
        if self.keeper is not None:
            self.keeper.read(ns, chain, boundary)

    # -- asked by clients ------------------------------------------------------------------------

    async def _on_member(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        return {
            "member": self.member.encode(),
            "segments": len(self.announcer),
            "unannounced": self.announcer.pending if self._directory is not None else 0,
            "drain": None if self._mover is None else msgspec.to_builtins(self._mover.progress),
            "keeping": None if self.keeper is None else msgspec.to_builtins(self.keeper.progress),
            "pulled": msgspec.to_builtins(self._fetcher.fetched),
        }

    async def _on_entries(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        keys = Args("entries", args).key_list()
        if len(keys) > 4_096:
            raise ProtocolError("entries: at most 4096 segments in one question")
        return {"entries": self.announcer.entries(keys)}

    async def _on_pull(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """A client wants what other nodes have to be here too."""
        if self._links is None:
            raise RefusedError("this node is in no cluster whose other nodes it could read from")
        if self.state is not State.UP:
            raise RefusedError(f"node {self.node} takes nothing new: it is {self.state}", retryable=True)
        return await self._fetcher.asked(link, Args("pull", args), self._links, lambda: self._roster.members)

    async def _on_stale(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """A client was sent here by entries that were not true: those that are not of the current generation are said again."""
        values = Args("stale", args)
        keys, generations = values.key_list(), values.integers("generations")
        if len(keys) != len(generations):
            raise ProtocolError("stale: one generation per segment")
        return {"current": self.announcer.validate(dict(zip(keys, generations, strict=True)))}

    async def _on_claim(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """A client missed and wants to compute, or (``end``) need not any more."""
        values = Args("claim", args)
        name, holder = values.get("name", bytes), values.get("holder", bytes)
        if len(name) != 16 or len(holder) != 16:
            raise ProtocolError("claim: name and holder have 16 bytes")
        # Tenants do not see one another's.
        name = tenant_of(link.identity).encode() + b"/" + name
        if values.get("end", bool, False):
            self._claims.end(name, holder)
            return {"left_s": 0.0}
        return {"left_s": self._claims.ask(self._clock(), name, holder, values.seconds("seconds"))}

    # -- in a directory --------------------------------------------------------------------------

    async def join(
        self, directory: Directory, address: str, *, ttl_s: float, config: EndpointConfig | None = None
    ) -> None:
        """Join as reachable under ``address``, after asking there for this very process.

        Raises ConfigError when somebody else, or nobody, answers there; DirectoryError when the directory does not answer.
        """
        await self.probe(address, config)
        self.addresses = (address,)
        self._directory = directory
        self._config = config
        self._ttl_s = ttl_s
        pulse = Pulse(ttl_s)
        pulse.beaten(self._clock(), await directory.beat(self.member, ttl_s))
        self.announcer.again()
        roster = self._roster = Roster(ttl_s)
        self._links = self._make_links()
        policy, rebalance, rate = self._keeping
        keeper = self.keeper = Keeper(
            self._core,
            self.node,
            self._cluster,
            policy,
            self._clock,
            rebalance=rebalance,
            bytes_per_s=rate,
            grace_s=ttl_s,
        )
        self._watchers.add(keeper)
        links = self._links
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "cluster members": lambda: self._follow(directory, roster),
            "cluster keeping": lambda: keeper.run(directory, links, roster, lambda: self.state),
            "cluster beat": lambda: self._beat(directory, pulse),
            "cluster announce": lambda: self._announce(directory),
        }
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(keep_running(work, name), name=name) for name, work in loops.items()]

    async def probe(self, address: str, config: EndpointConfig | None = None) -> None:
        """Dial the advertised address and see whether this process answers."""
        parse_address(address)
        async with Endpoint(config, network=self._network, entropy=self._entropy) as endpoint:
            answer = await who_answers(endpoint, address, timeout_s=PROBE_S)
        if answer.problem:
            raise ConfigError(
                f"the advertised address {address} does not reach this node ({answer.problem}): set advertise to an address that "
                "other machines can dial"
            )
        if answer.verdict(self._endpoint.incarnation):
            raise ConfigError(
                f"another process answers at the advertised address {address}: set advertise to this node's own"
            )

    # -- draining --------------------------------------------------------------------------------

    async def _on_drain(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """Begin to drain, or tell how far it is; with "stop" end it and take new data again."""
        values = Args("drain", args)
        if values.get("stop", bool, False):
            await self.stop_drain()
        elif self._draining is None or self._draining.done():
            await self.drain(deadline_s=values.seconds("deadline_s", 300.0), bytes_per_s=values.rate("bytes_per_s"))
        return await self._on_member(link, args)

    async def drain(self, *, deadline_s: float, bytes_per_s: float | None = None) -> None:
        """Take nothing new, copy what is worth it to the others within ``deadline_s`` seconds, then leave; goes on in the background.

        Raises ConfigError without a directory or another node, DirectoryError.
        """
        directory = self._directory
        if directory is None:
            raise ConfigError("this node is in no cluster that it could leave")
        roster, links = self._roster, self._links
        assert links is not None
        asked = self._clock()
        snapshot = await directory.snapshot()
        roster.update(asked, snapshot, heard=self._clock())

        def others() -> list[Member]:
            return [m for m in roster.writable() if m.id != self.node and m.cluster == self._cluster]

        if not others():
            raise ConfigError(
                f"cluster {self._cluster!r} has no other node that takes new data: what this one holds would be lost"
            )
        self.state = State.DRAINING
        await directory.beat(self.member, self._ttl_s)
        mover = self._mover = Mover(
            self._core, links, Rendezvous(), others, self._clock, lambda: roster.steady(self._clock())
        )

        async def work() -> None:
            deadline = self._clock() + deadline_s
            # Clients write by a view that is a moment old.
            await asyncio.sleep(min(self._ttl_s / 2, deadline_s / 4))
            await mover.run(deadline=deadline, bytes_per_s=bytes_per_s)
            await self.leave()

        self._draining = asyncio.get_running_loop().create_task(work(), name="cluster drain")

    async def stop_drain(self) -> None:
        """End a drain in progress; the node takes new data again."""
        if self._draining is not None:
            await end([self._draining])
            self._draining = None
        if self._mover is not None:
            self._mover.progress.running = False
        self.state = State.UP

    async def _follow(self, directory: Directory, roster: Roster) -> None:
        while True:
            asked = self._clock()
            try:
                snapshot = await directory.snapshot()
            except DirectoryError:
                roster.failed()
            else:
                roster.update(asked, snapshot, heard=self._clock())
                if self.keeper is not None:
                    self.keeper.seen(roster)
            await asyncio.sleep(self._ttl_s / 3)

    def _make_links(self) -> NodeLinks:
        """Links to the other nodes, which are told where they find this one, and say so when they do not."""
        config = replace(
            self._config or EndpointConfig(),
            advertise=self.addresses[0],
            advertise_incarnation=self._endpoint.incarnation,
        )
        return NodeLinks(
            config,
            random=random.Random(self._endpoint.incarnation).random,
            connections=2,
            network=self._network,
            entropy=self._entropy,
            on_unreachable=self._on_unreachable,
        )

    def _on_unreachable(self, link: Link, error: AddressError) -> None:
        if link.peer not in self._unreached and len(self._unreached) < MAX_UNREACHED:
            self._unreached.add(link.peer)
            self.on_unreachable(error.message)

    async def stop(self) -> None:
        """Stop all that goes on in the background, and say nothing: as far as others can tell the node is dead."""
        if self._draining is not None and self._draining is not asyncio.current_task():
            await end([self._draining])
        await end(self._tasks)
        self._tasks = []
        if self._links is not None:
            await self._links.close()
            self._links = None

    async def leave(self) -> None:
        """Stop announcing and leave the directory, as far as it can be reached."""
        await self.stop()
        directory, self._directory = self._directory, None
        if directory is not None:
            with suppress(DirectoryError, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await directory.leave(self.member)
                    names = self.announcer.names
                    for at in range(0, len(names), ROUND):
                        await directory.announce(self.node, dict.fromkeys(names[at : at + ROUND]), ENTRY_TTL_S)
            await directory.close()

    async def _beat(self, directory: Directory, pulse: Pulse) -> None:
        while True:
            await asyncio.sleep(pulse.interval_s)
            try:
                epoch = await directory.beat(self.member, pulse.ttl_s)
            except DirectoryError:
                self.failures += 1
                continue
            if pulse.beaten(self._clock(), epoch):
                self.announcer.again()

    async def _announce(self, directory: Directory) -> None:
        while True:
            self.announcer.refresh(self._clock(), ROUND)
            changes = self.announcer.take(self._clock(), ROUND)
            if changes:
                self.announcing = True
                try:
                    await directory.announce(self.node, changes, ENTRY_TTL_S)
                    self.announced += len(changes)
                except DirectoryError:
                    self.failures += 1
                    self.announcer.failed(self._clock(), changes)
                    await asyncio.sleep(1.0)
                finally:
                    self.announcing = False
            if len(changes) < ROUND:
                await asyncio.sleep(ANNOUNCE_S)
