"""A node reads a part of a chain from other nodes straight into its own memory, below everything that anybody waits for.

A part is an ordinary put of the tenant's, filled by a get: it takes what the pool gives any put, is verified as any transfer, and
becomes visible when it is whole. Sources are named by their ids; where those are is what this node's own view says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from kvpool.core import PoolCore
from kvpool.errors import MissError, NamespaceError, NoNodeError
from kvpool.keys import KeyChain, Namespace
from kvpool.messages import Args, chain_steps
from kvpool.put import Put, PutState
from kvpool.security import tenant_of
from kvpool.steps import run_in_turns
from kvtransport.errors import DeadlineError, KVError, ProtocolError
from kvtransport.link import Link

from .copying import PRIORITY
from .links import NodeLinks
from .members import Member
from .tasks import end

PLACES = 2
"""Parts that a node reads at a time; others wait. Each may take its share of what the node copies."""
MAX_SOURCES = 16


class Fetched(msgspec.Struct):
    """What a node has read from others because somebody asked it to, since the start."""

    parts: int = 0
    moved_bytes: int = 0
    failed: int = 0
    """Parts that ended with an error: no memory, no source, no time."""
    running: int = 0


class Fetcher:
    """Of one node. ``bytes_per_s``: what all its reads together may take (None: as fast as it goes); ``clock`` gives seconds."""

    def __init__(self, core: PoolCore, clock: Callable[[], float], bytes_per_s: float | None) -> None:
        self._core, self._clock, self._rate = core, clock, bytes_per_s
        self._places = asyncio.Semaphore(PLACES)
        self.fetched = Fetched()

    async def asked(
        self, link: Link, args: Args, links: NodeLinks, members: Callable[[], Mapping[str, Member]]
    ) -> dict[str, int]:
        """Answer the verb ``pull``: the bytes that came, when the part is there. Raises the errors of a put and of a get, and
        NoNodeError, DeadlineError. When the asking link ends, so does this.
        """
        ns = self._namespace(args.get("ns", bytes), tenant_of(link.identity))
        chain = await run_in_turns(chain_steps(ns, args.get("chain", dict), stores=True))
        assert chain is not None
        sources = args.get("sources", list)
        if not 0 < len(sources) <= MAX_SOURCES or not all(isinstance(s, str) for s in sources):
            raise ProtocolError(f"pull: 'sources' are the ids of 1 to {MAX_SOURCES} nodes")
        boundary, start = args.integer("boundary"), args.integer("start", 0)
        deadline = self._clock() + args.seconds("deadline_s")
        asked, mine = args.rate("bytes_per_s"), None if self._rate is None else self._rate / PLACES
        rate = min((r for r in (asked, mine) if r is not None), default=None)
        try:
            async with asyncio.timeout(max(0.001, deadline - self._clock())):
                await self._places.acquire()
        except TimeoutError:
            raise DeadlineError("the node read other parts until the deadline") from None
        self.fetched.running += 1
        try:
            moved = await self._fetch(ns, chain, boundary, start, sources, deadline, rate, links, members)
        except BaseException:
            self.fetched.failed += 1
            raise
        finally:
            self.fetched.running -= 1
            self._places.release()
        self.fetched.parts += 1
        self.fetched.moved_bytes += moved
        return {"bytes": moved}

    def _namespace(self, name: bytes, tenant: str) -> Namespace:
        for ns in self._core.namespaces():
            if ns.id == name and ns.tenant == tenant:
                return ns
        raise NamespaceError("pull: this link has not opened that namespace")

    async def _fetch(
        self,
        ns: Namespace,
        chain: KeyChain,
        boundary: int,
        start: int,
        sources: Sequence[str],
        deadline: float,
        rate: float | None,
        links: NodeLinks,
        members: Callable[[], Mapping[str, Member]],
    ) -> int:
        steps = self._core.put_steps(ns, chain, boundary=boundary, start=start, deadline=deadline)
        put = await run_in_turns(steps)

        async def fill() -> None:
            error: KVError = MissError("no source was asked")
            for source in sources:
                member = members().get(source)
                if member is None:
                    error = NoNodeError(f"node {source!r} is not in this node's view of the clusters")
                    continue
                try:
                    await self._read(put, chain, member, deadline, rate, links)
                except KVError as why:
                    links.failed(member, why)
                    error = why
                    continue
                return
            raise error

        filling = asyncio.get_running_loop().create_task(fill(), name="pull")

        def stop(error: KVError) -> None:
            filling.cancel()

        # Nothing of the memory is free before nothing writes there any more: not even when the put's time is up.
        put.on_failed = stop
        try:
            await asyncio.wait([filling])
            if put.error is not None:
                raise put.error
            await filling
            nbytes = 0
            for slot, extent in put.extents.items():
                nbytes += put.progress(*slot, 0, extent.nbytes)
            put.commit()
            return nbytes
        finally:
            try:
                await end([filling])
            finally:
                if filling.done() and not filling.cancelled():
                    filling.exception()  # looked at
                put.on_failed = None
                put.abort()

    async def _read(
        self, put: Put, chain: KeyChain, member: Member, deadline: float, rate: float | None, links: NodeLinks
    ) -> None:
        client = await links.open(member, put.ns)
        if put.state is not PutState.OPEN:
            return
        receiver = await client.get(
            put.ns,
            chain,
            boundary=put.boundary,
            start=put.start,
            into=put.destinations,
            deadline_s=max(0.001, deadline - self._clock()),
            priority=PRIORITY,
            bytes_per_s=rate,
        )
        try:
            await receiver.sealed()
        finally:
            await receiver.cancel("done")
