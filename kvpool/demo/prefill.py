"""The prefill process: ``python -m kvpool.demo.prefill``, run by :mod:`kvpool.demo.run`.

What was matched is fetched, the rest is "computed" layer by layer at the plan's pace, and each layer is handed over
as soon as it is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvtransport.buffers import PageList
from kvtransport.layout import Extent
from kvtransport.transfer import OutgoingTransfer

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
    try:
        prefix = await fetch(plan, memory, route, cache, number, start) if start else None
        computing = clock()
        extents = plan.extents(start)
        ready = await produce(
            transfer,
            extents,
            memory.place(extents),
            cache,
            plan.layer_ms / 1e3 * (plan.tokens - start) / plan.tokens,
            lambda layer, at: channel.emit("ready", number=number, layer=layer, at=at),
        )
        await transfer.seal()
    finally:
        await transfer.cancel("prefill gave the request up")
    channel.emit(
        "done",
        number=number,
        start=start,
        begun_s=begun,
        computing_s=computing,
        sealed_s=clock(),
        ready_s=ready,
        prefix=prefix,
        sent=stats_dict(transfer.stats),
        pool=await route.stat(),
    )


async def fetch(
    plan: Plan, memory: EngineMemory, route: ProducerRoute, cache: SyntheticCache, number: int, length: int
) -> dict[str, Any]:
    """Receive the matched prefix into engine memory and check its content."""
    begun = clock()
    extents = plan.layout.extents(length, align=plan.block_tokens)
    into = memory.place(extents)
    transfer = await route.fetch(number, length, into)
    try:
        await transfer.sealed()
        arrived = clock()
        for layer, own in by_layer(extents).items():
            await asyncio.to_thread(check, into, cache, own, f"the prefix from the pool, layer {layer}")
    finally:
        await transfer.cancel("prefill gave the prefix up")
    return {"tokens": length, "seconds": arrived - begun, "content_verified": True, **stats_dict(transfer.stats)}


async def produce(
    transfer: OutgoingTransfer,
    extents: Sequence[Extent],
    placed: Mapping[tuple[int, int], PageList],
    cache: SyntheticCache,
    layer_s: float,
    on_ready: Callable[[int, float], None],
) -> list[tuple[int, float]]:
    """Compute layer after layer, each in ``layer_s`` seconds or more; returns (layer, when it was ready)."""
    ready: list[tuple[int, float]] = []
    for layer, own in by_layer(extents).items():
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
