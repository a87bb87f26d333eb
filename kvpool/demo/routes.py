"""The ways from prefill to decode: through a pool, or from process to process. Both give the same two faces of a transfer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint
from kvtransport.link import Link
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation
from kvtransport.transfer import IncomingTransfer, OutgoingTransfer

from ..client import connect
from ..keys import KeyChain, Namespace
from ..protocol import PoolProtocol
from .plan import Plan

Into = Mapping[tuple[int, int], PageList]


class ProducerRoute(Protocol):
    """What prefill needs."""

    async def match(self, number: int) -> int:
        """How many tokens of a request need not be computed."""

    async def open(self, number: int, start: int) -> OutgoingTransfer:
        """Open the way for tokens from ``start`` of a request."""

    async def fetch(self, number: int, length: int, into: Into) -> IncomingTransfer:
        """Receive what was matched: ``length`` tokens and the states there."""

    async def stat(self) -> dict[str, Any]: ...


class ConsumerRoute(Protocol):
    """What decode needs."""

    async def follow(self, number: int, into: Into) -> IncomingTransfer:
        """Receive all tokens of a request while they are produced."""


class PoolRoute:
    """Both, through a pool."""

    def __init__(self, plan: Plan, pool: PoolProtocol, ns: Namespace) -> None:
        self._plan = plan
        self._pool = pool
        self._ns = ns
        self._deadline_s = plan.deadline_s(plan.layout.bytes_at(plan.tokens))

    def _chain(self, number: int) -> KeyChain:
        return KeyChain(self._ns, self._plan.request_tokens(number))

    async def match(self, number: int) -> int:
        return (await self._pool.match(self._ns, self._chain(number))).length

    async def open(self, number: int, start: int) -> OutgoingTransfer:
        return await self._pool.put(
            self._ns,
            self._chain(number),
            boundary=self._plan.tokens,
            start=start,
            checkpoints=self._plan.checkpoints(start),
            request=self._plan.request_id(number),
            deadline_s=self._deadline_s,
        )

    async def fetch(self, number: int, length: int, into: Into) -> IncomingTransfer:
        return await self._pool.get(
            self._ns, self._chain(number), boundary=length, into=into, deadline_s=self._deadline_s
        )

    async def follow(self, number: int, into: Into) -> IncomingTransfer:
        return await self._pool.get(
            self._ns,
            self._chain(number),
            boundary=self._plan.tokens,
            into=into,
            request=self._plan.request_id(number),
            deadline_s=self._deadline_s,
        )

    async def stat(self) -> dict[str, Any]:
        return await self._pool.stat()


class DirectProducer:
    """From this process straight to decode: nothing is kept, so nothing is ever matched."""

    def __init__(self, plan: Plan, link: Link) -> None:
        self._plan = plan
        self._link = link

    async def match(self, number: int) -> int:
        return 0

    async def open(self, number: int, start: int) -> OutgoingTransfer:
        plan = self._plan
        manifest = Manifest.of_layout(
            plan.layout,
            plan.tokens,
            transfer=plan.request_id(number),
            start=start,
            checkpoints=plan.checkpoints(start),
            block_tokens=plan.block_tokens,
        )
        return self._link.open(manifest, deadline_s=plan.deadline_s(manifest.total_bytes))

    async def fetch(self, number: int, length: int, into: Into) -> IncomingTransfer:
        raise AssertionError("nothing was matched, so there is nothing to fetch")

    async def stat(self) -> dict[str, Any]:
        return {}


class DirectConsumer:
    """Where a :class:`DirectProducer` sends to."""

    def __init__(self, plan: Plan, endpoint: Endpoint) -> None:
        self._plan = plan
        self._endpoint = endpoint

    async def follow(self, number: int, into: Into) -> IncomingTransfer:
        plan = self._plan
        wanted = Expectation(
            lambda manifest: into,
            layout=plan.layout,
            block_tokens=plan.block_tokens,
            deadline_s=plan.deadline_s(plan.layout.bytes_at(plan.tokens)),
        )
        return self._endpoint.expect(plan.request_id(number), wanted)


@asynccontextmanager
async def pool_route(plan: Plan, host: str, port: int) -> AsyncIterator[PoolRoute]:
    """A route through the kvpoold at ``host:port``."""
    async with await connect(host, port, connections=plan.connections) as pool:
        yield PoolRoute(plan, pool, await pool.namespace(plan.layout, plan.block_tokens))


@asynccontextmanager
async def direct_producer(plan: Plan, host: str, port: int) -> AsyncIterator[DirectProducer]:
    """A route to the :func:`direct_consumer` at ``host:port``."""
    async with Endpoint() as endpoint:
        yield DirectProducer(plan, await endpoint.connect(host, port, connections=plan.connections))


@asynccontextmanager
async def direct_consumer(plan: Plan) -> AsyncIterator[tuple[DirectConsumer, str, int]]:
    """The other end, and where it listens."""
    async with Endpoint() as endpoint:
        host, port = await endpoint.listen()
        yield DirectConsumer(plan, endpoint), host, port
