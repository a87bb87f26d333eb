"""The decode process: ``python -m kvpool.demo.decode``, run by :mod:`kvpool.demo.run`.

Layers are consumed in order, each as soon as it is there, while later ones are still computed and on their way.
Consuming a layer means computing what its bytes must be and comparing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from kvtransport.buffers import PageList
from kvtransport.layout import Extent
from kvtransport.transfer import IncomingTransfer

from .memory import EngineMemory, check
from .plan import Plan, by_layer, stats_dict
from .routes import ConsumerRoute, direct_consumer, pool_route
from .synthetic import SyntheticCache
from .worker import Channel, clock, serve

OnLayer = Callable[[str, int, float], None]
"""(station, layer, seconds): station is "applied" or "consumed"."""


async def decode(channel: Channel) -> None:
    """Serve requests until the parent closes the pipe."""
    setup = await channel.command("setup")
    plan = Plan.from_dict(setup["plan"])
    memory = EngineMemory(plan.decode_memory_bytes(), seed=plan.seed + 1, name="decode")
    if plan.direct:
        async with direct_consumer(plan) as (consumer, host, port):
            channel.emit("up", memory_bytes=memory.nbytes, host=host, port=port)
            await _serve(channel, plan, memory, consumer)
    else:
        async with pool_route(plan, setup["host"], setup["port"]) as route:
            channel.emit("up", memory_bytes=memory.nbytes)
            await _serve(channel, plan, memory, route)


async def _serve(channel: Channel, plan: Plan, memory: EngineMemory, route: ConsumerRoute) -> None:
    async for command in channel.commands():
        memory.reset()
        await handle(channel, plan, memory, route, int(command["number"]))


async def handle(channel: Channel, plan: Plan, memory: EngineMemory, route: ConsumerRoute, number: int) -> None:
    """One request: receive it behind its prefill and consume it."""
    cache = SyntheticCache(plan.request_tokens(number), plan.seed)
    extents = plan.layout.extents(plan.tokens, align=plan.block_tokens)
    into = memory.place(extents)
    begun = clock()
    transfer = await route.follow(number, into)
    try:
        consumed = await consume(
            transfer,
            extents,
            into,
            cache,
            lambda station, layer, at: channel.emit(station, number=number, layer=layer, at=at),
        )
        await transfer.sealed()
    finally:
        await transfer.cancel("decode gave the request up")
    stats = transfer.stats
    channel.emit(
        "done",
        number=number,
        begun_s=begun,
        sealed_s=clock(),
        first_byte_s=[(layer, times.first_byte_s) for layer, times in stats.layers.items()],
        applied_s=[(layer, times.applied_s) for layer, times in stats.layers.items()],
        consumed_s=consumed,
        content_verified=True,
        received=stats_dict(stats),
    )


async def consume(
    transfer: IncomingTransfer,
    extents: Sequence[Extent],
    into: Mapping[tuple[int, int], PageList],
    cache: SyntheticCache,
    on_layer: OnLayer,
) -> list[tuple[int, float]]:
    """Check each layer once it is there; returns (layer, when that was done). Raises IntegrityError at wrong content."""

    async def announce() -> None:
        async for layer in transfer.layers():
            on_layer("applied", layer, clock())

    announcing = asyncio.create_task(announce())
    consumed: list[tuple[int, float]] = []
    try:
        for layer, own in by_layer(extents).items():
            await transfer.layer(layer)
            await asyncio.to_thread(check, into, cache, own, f"layer {layer} of the request")
            consumed.append((layer, clock()))
            on_layer("consumed", *consumed[-1])
        await announcing
    finally:
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
    return consumed


if __name__ == "__main__":
    serve(decode)
