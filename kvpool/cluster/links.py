"""One link to every node that is used, dialled once however many ask for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from kvpool.client import PoolClient, connect
from kvpool.errors import NoNodeError
from kvpool.keys import Namespace
from kvpool.security import DEFAULT_TENANT
from kvtransport.address import parse_address
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import AddressError, IncarnationError, KVError
from kvtransport.io.base import Network
from kvtransport.link import Link

from .members import Member
from .suspects import Suspects
from .tasks import end


class NodeLinks:
    """Links by member and incarnation. Belongs to one event loop. ``random()`` is for pauses after failures.

    ``on_unreachable`` is told when a node cannot reach the address that ``config`` advertises.
    """

    def __init__(
        self,
        config: EndpointConfig,
        *,
        random: Callable[[], float],
        connections: int = 2,
        dial_s: float = 3.0,
        network: Network | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        on_unreachable: Callable[[Link, AddressError], None] | None = None,
    ) -> None:
        self._network, self._entropy = network, entropy
        self._on_unreachable = on_unreachable
        self._config = config
        self._connections = connections
        self._dial_s = dial_s
        self._tasks: dict[str, tuple[bytes, asyncio.Task[PoolClient]]] = {}
        self._opened: dict[tuple[PoolClient, bytes], asyncio.Task[Namespace]] = {}
        self.suspects = Suspects(random)

    async def client(self, member: Member) -> PoolClient:
        """The link to ``member``. Raises NoNodeError (it failed moments ago), LinkError, or IncarnationError."""
        loop = asyncio.get_running_loop()
        known = self._tasks.get(member.id)
        if known is not None and not self._serves(known, member):
            await self._drop(member.id)
            known = None
        if known is None:
            if self.suspects.suspect(loop.time(), member.id):
                raise NoNodeError(f"node {member.id!r} failed moments ago and is left alone for now")
            # One asks whether it is well again; the others go elsewhere meanwhile.
            self.suspects.probing(loop.time(), member.id, self._dial_s)
            known = (member.incarnation, loop.create_task(self._dial(member), name=f"dial {member.id}"))
            self._tasks[member.id] = known
        client = await asyncio.shield(known[1])
        if member.incarnation not in (ANY, known[0], client.link.peer_incarnation):
            raise IncarnationError(f"at {member.addresses[0]} is not the process that node {member.id!r} announced")
        return client

    @classmethod
    def _serves(cls, known: tuple[bytes, asyncio.Task[PoolClient]], member: Member) -> bool:
        """Whether a link that was dialled is, or may come to be, one to ``member``.

        A node that is given by its address, and called by it, is first dialled as anybody, and then known: that is one link.
        """
        dialled, task = known
        if cls._ended(task):
            return False
        if member.incarnation in (ANY, dialled):
            return True
        return dialled == ANY and (not task.done() or task.result().link.peer_incarnation == member.incarnation)

    async def open(self, member: Member, ns: Namespace) -> PoolClient:
        """The link to ``member`` with ``ns`` opened on it."""
        client = await self.client(member)
        task = self._opened.get((client, ns.id))
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            # Named unless it is what everybody is who says nothing: then one that is not the session's is refused, not looked for.
            tenant = None if ns.tenant == DEFAULT_TENANT else ns.tenant
            work = client.namespace(ns.layout, ns.block_tokens, salt=ns.salt, tenant=tenant)
            task = self._opened[client, ns.id] = asyncio.get_running_loop().create_task(work)
        await asyncio.shield(task)
        return client

    def failed(self, member: Member, error: KVError) -> None:
        """Something with this node went wrong: it is left alone for a while if the node, not the request, is at fault."""
        if error.retryable:
            self.suspects.failed(asyncio.get_running_loop().time(), member.id)

    async def close(self) -> None:
        for node in tuple(self._tasks):
            await self._drop(node)

    @staticmethod
    def _ended(task: asyncio.Task[PoolClient]) -> bool:
        if not task.done():
            return False
        return task.cancelled() or task.exception() is not None or task.result().link.closed

    async def _dial(self, member: Member) -> PoolClient:
        error: KVError | None = None
        now = asyncio.get_running_loop().time
        for address in member.addresses:
            host, port = parse_address(address)
            try:
                async with asyncio.timeout(self._dial_s):
                    client = await connect(
                        host,
                        port,
                        connections=self._connections,
                        config=self._config,
                        network=self._network,
                        entropy=self._entropy,
                        on_unreachable=self._on_unreachable,
                    )
            except TimeoutError:
                error = NoNodeError(f"{address} of node {member.id!r} did not answer within {self._dial_s:g} s")
                continue
            except KVError as why:
                error = why
                continue
            if member.incarnation != ANY and client.link.peer_incarnation != member.incarnation:
                await client.close()
                error = IncarnationError(
                    f"{address} is not (or no longer) the process that node {member.id!r} announced"
                )
                continue
            self.suspects.well(member.id)
            return client
        self.suspects.failed(now(), member.id)
        assert error is not None
        raise error

    async def _drop(self, node: str) -> None:
        _, task = self._tasks.pop(node)
        await end([task])
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, KVError):
            raise error
        if error is None and not task.cancelled():
            client = task.result()
            for key in [k for k in self._opened if k[0] is client]:
                self._opened.pop(key).cancel()
            await client.close()


ANY = bytes(16)
"""An incarnation that is not known yet: of a node given by its address."""


def at_address(address: str) -> Member:
    """A stand-in for the node at an address, until it has said who it is."""
    parse_address(address)
    return Member(id=address, incarnation=ANY, cluster="", addresses=(address,), capacity=0)


async def gather_answers(tasks: Sequence[asyncio.Task[object]]) -> list[object | None]:
    """Results in order, None for those that failed with an error of ours."""
    out: list[object | None] = []
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            if not isinstance(result, KVError):
                raise result
            out.append(None)
        else:
            out.append(result)
    return out
