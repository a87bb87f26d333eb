"""The prefill process: ``python -m kvpool.demo.prefill``, run by :mod:`kvpool.demo.run`.

What was matched is fetched, the rest is "computed" layer by layer at the plan's pace, and each layer is handed over
as soon as it is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

from kvtransport.buffers import PageList
from kvtransport.layout import Extent
from kvtransport.transfer import IncomingTransfer, OutgoingTransfer

from .memory import EngineMemory, check, fill
from .plan import Plan, by_layer, stats_dict
from .routes import ProducerRoute, direct_producer, pool_route
from .synthetic import SyntheticCache
from .worker import Channel, clock, serve


async def prefill(channel: Channel) -> None:
    """Serve requests until the parent closes the pipe."""
    setup = await channel.command("setup")
    plan = Plan.from_dict(setup["plan"])
    memory = EngineMemory(plan.prefill_memory_bytes(), seed=plan.seed, name="prefill")
    way = direct_producer if plan.direct else pool_route
    async with way(plan, setup["host"], setup["port"]) as route:
        channel.emit("up", memory_bytes=memory.nbytes)
        async for command in channel.commands():
            memory.reset()
            await handle(channel, plan, memory, route, int(command["number"]))


async def handle(channel: Channel, plan: Plan, memory: EngineMemory, route: ProducerRoute, number: int) -> None:
    """One request: match, open, fetch the prefix, compute the rest."""
    cache = SyntheticCache(plan.request_tokens(number), plan.seed)
    begun = clock()
    start = await route.match(number)
    channel.emit("matched", number=number, start=start)
    # Opened first: the put holds the prefix, so that it cannot be evicted before it is fetched.
    transfer = await route.open(number, start)
    prefix = None
    try:
        if start:
            prefix = await Prefix.fetch(plan, memory, route, cache, number, start)
        computing = clock()
        extents = plan.extents(start)
        ready = await produce(
            transfer,
            extents,
            memory.place(extents),
            cache,
            plan.layer_ms / 1e3 * (plan.tokens - start) / plan.tokens,
            lambda layer, at: channel.emit("ready", number=number, layer=layer, at=at),
            before=None if prefix is None else prefix.layer,
        )
        await transfer.seal()
        fetched = None if prefix is None else await prefix.result()
    finally:
        await transfer.cancel("prefill gave the request up")
        if prefix is not None:
            await prefix.transfer.cancel("prefill gave the prefix up")
    channel.emit(
        "done",
        number=number,
        start=start,
        begun_s=begun,
        computing_s=computing,
        sealed_s=clock(),
        ready_s=ready,
        prefix=fetched,
        sent=stats_dict(transfer.stats),
        pool=await route.stat(),
    )


class Prefix:
    """The matched prefix on its way into engine memory: a layer of it is needed when that layer is computed, not earlier."""

    def __init__(
        self,
        transfer: IncomingTransfer,
        extents: Sequence[Extent],
        into: Mapping[tuple[int, int], PageList],
        cache: SyntheticCache,
        length: int,
    ) -> None:
        self.transfer = transfer
        self._extents = by_layer(extents)
        self._into = into
        self._cache = cache
        self._length = length
        self._begun = clock()

    @classmethod
    async def fetch(
        cls, plan: Plan, memory: EngineMemory, route: ProducerRoute, cache: SyntheticCache, number: int, length: int
    ) -> Self:
        """Begin to fetch ``length`` tokens and the states there."""
        extents = plan.layout.extents(length, align=plan.block_tokens)
        into = memory.place(extents)
        return cls(await route.fetch(number, length, into), extents, into, cache, length)

    async def layer(self, layer: int) -> None:
        """Wait until a layer of the prefix is there, and check its content."""
        await self.transfer.layer(layer)
        await asyncio.to_thread(
            check, self._into, self._cache, self._extents[layer], f"layer {layer} of the prefix from the pool"
        )

    async def result(self) -> dict[str, Any]:
        """What came, once everything did; every layer was checked by then."""
        await self.transfer.sealed()
        stats = self.transfer.stats
        seconds = clock() - self._begun if stats.sealed_s is None else stats.sealed_s - self._begun
        return {"tokens": self._length, "seconds": seconds, "content_verified": True, **stats_dict(stats)}


async def produce(
    transfer: OutgoingTransfer,
    extents: Sequence[Extent],
    placed: Mapping[tuple[int, int], PageList],
    cache: SyntheticCache,
    layer_s: float,
    on_ready: Callable[[int, float], None],
    *,
    before: Callable[[int], Awaitable[None]] | None = None,
) -> list[tuple[int, float]]:
    """Compute layer after layer, each in ``layer_s`` seconds or more; returns (layer, when it was ready).

    ``before(layer)`` is awaited before a layer is computed.
    """
    ready: list[tuple[int, float]] = []
    for layer, own in by_layer(extents).items():
        if before is not None:
            await before(layer)
        due = clock() + layer_s
        await asyncio.to_thread(_compute, placed, cache, own)
        await asyncio.sleep(max(0.0, due - clock()))
        ready.append((layer, clock()))
        for extent in own:
            transfer.ready(layer, extent.tensor, placed[layer, extent.tensor])
        on_ready(*ready[-1])
    return ready


def _compute(placed: Mapping[tuple[int, int], PageList], cache: SyntheticCache, extents: Sequence[Extent]) -> None:
    for extent in extents:
        fill(placed[extent.layer, extent.tensor], cache, extent)


if __name__ == "__main__":
    serve(prefill)
