"""A node's side of the cluster: joins, says that it is there, announces what it holds, and leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kvpool.core import PoolCore
from kvpool.errors import DirectoryError
from kvpool.messages import Args
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import ConfigError, HandshakeError, KVError, ProtocolError
from kvtransport.link import Link

from .announcing import Announcer
from .directory import Directory
from .links import parse_address
from .members import Member, Pulse, State
from .tasks import end

ANNOUNCE_S = 0.05
"""Between two rounds of announcements while something changes."""
ROUND = 512
"""Segments of one round."""
ENTRY_TTL_S = 1800.0
"""Entries are forgotten after this unless said again; they are, at half of it."""
PROBE_S = 5.0


class NodeAgent:
    """Keeps the entries of ``core`` from its making on (before anything is stored); :meth:`join` puts it into a directory.

    ``clock`` gives seconds. Without a directory it still answers clients that ask this node directly.
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
    ) -> None:
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
        self.announced = 0
        self.failures = 0
        core.watcher = self.announcer
        endpoint.handlers["member"] = self._on_member
        endpoint.handlers["entries"] = self._on_entries

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
        )

    # -- asked by clients ------------------------------------------------------------------------

    async def _on_member(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        return {
            "member": self.member.encode(),
            "segments": len(self.announcer),
            "unannounced": self.announcer.pending if self._directory is not None else 0,
        }

    async def _on_entries(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        keys = Args("entries", args).key_list()
        if len(keys) > 4_096:
            raise ProtocolError("entries: at most 4096 segments in one question")
        return {"entries": self.announcer.entries(keys)}

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
        pulse = Pulse(ttl_s)
        pulse.beaten(self._clock(), await directory.beat(self.member, ttl_s))
        self.announcer.again()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._beat(directory, pulse), name="cluster beat"),
            loop.create_task(self._announce(directory), name="cluster announce"),
        ]

    async def probe(self, address: str, config: EndpointConfig | None = None) -> None:
        """Dial the advertised address and see whether this process answers."""
        host, port = parse_address(address)
        async with Endpoint(config) as endpoint:
            try:
                async with asyncio.timeout(PROBE_S):
                    link = await endpoint.connect(host, port, connections=1)
            except HandshakeError:
                # It speaks our protocol and wants a token, which a node without certificates has none of.
                return
            except (KVError, TimeoutError) as error:
                raise ConfigError(
                    f"the advertised address {address} does not reach this node ({type(error).__name__}: {error}): set advertise "
                    "to an address that other machines can dial"
                ) from error
            if link.peer_incarnation != self._endpoint.incarnation:
                raise ConfigError(
                    f"another process answers at the advertised address {address}: set advertise to this node's own"
                )

    async def leave(self) -> None:
        """Stop announcing and leave the directory, as far as it can be reached."""
        await end(self._tasks)
        self._tasks = []
        if self._directory is not None:
            with suppress(DirectoryError):
                await self._directory.leave(self.member)
            await self._directory.close()
            self._directory = None

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
            self.announcer.refresh(self._clock() - ENTRY_TTL_S / 2, ROUND)
            changes = self.announcer.take(self._clock(), ROUND)
            if changes:
                try:
                    await directory.announce(self.node, changes, ENTRY_TTL_S)
                    self.announced += len(changes)
                except DirectoryError:
                    self.failures += 1
                    self.announcer.failed(changes)
                    await asyncio.sleep(1.0)
            if len(changes) < ROUND:
                await asyncio.sleep(ANNOUNCE_S)
