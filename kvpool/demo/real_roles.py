"""The processes of ``kvpool demo --real``: ``python -m kvpool.demo.real_roles prefill | decode | reference``.

Prefill and decode share nothing but the pool (and, through the parent, the first token, which a router would carry).
The reference knows neither pool nor transport nor adapter: bare transformers, its prompt cut where the others cut theirs.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from kvpool.client import PoolClient, connect
from kvpool.engines import tiny_models
from kvpool.engines.transformers import GRID, CacheRestore, PrefillRun, greedy, layout_of, require
from kvpool.keys import KeyChain, Namespace
from kvtransport.buffers import PageList
from kvtransport.errors import ConfigError, ProtocolError
from kvtransport.layout import CacheLayout, Extent, GroupKind
from kvtransport.transfer import Handover, OutgoingTransfer, TransferStats

from .worker import Channel, clock, serve

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = GRID
CHUNK_TOKENS = 2 * GRID
"""Prefill computes this many tokens at a time: a request of hundreds arrives in several ranges per layer."""
MAX_HELD_BYTES = 64 << 20
"""Bytes handed over and not yet released; the model waits beyond."""
DEADLINE_S = 60.0


def cuts(boundary: int, points: Iterable[int]) -> list[int]:
    """Where a prompt of ``boundary`` tokens is cut: ends of its chunks, ascending."""
    return sorted({*range(CHUNK_TOKENS, boundary, CHUNK_TOKENS), *points, boundary})


class Engine:
    """A model in memory, and where its cache lies in the pool."""

    def __init__(self, directory: str) -> None:
        self.model = tiny_models.load_tiny(directory)
        self.layout: CacheLayout = layout_of(self.model, block_tokens=BLOCK_TOKENS)
        self.pool: PoolClient | None = None
        self.ns: Namespace | None = None

    def describe(self) -> dict[str, Any]:
        text = self.model.config.get_text_config(decoder=True)
        return {
            "architecture": type(self.model).__name__,
            "vocabulary": int(text.vocab_size),
            "layout": self.layout.describe(),
            "fingerprint": self.layout.fingerprint(BLOCK_TOKENS).hex(),
        }

    async def connect(self, stack: AsyncExitStack, host: str, port: int, connections: int) -> None:
        self.pool = await stack.enter_async_context(await connect(host, port, connections=connections))
        self.ns = await self.pool.namespace(self.layout, BLOCK_TOKENS)

    def place(self, tokens: Sequence[int]) -> tuple[PoolClient, Namespace, KeyChain]:
        if self.pool is None or self.ns is None:
            raise ProtocolError("not connected to a pool yet: send 'connect' first")
        return self.pool, self.ns, KeyChain(self.ns, tokens)

    async def fetch(
        self, tokens: Sequence[int], boundary: int, *, request: bytes | None = None, zero_state: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The cache at ``boundary`` out of the pool, each layer restored while later ones still arrive.

        ``zero_state`` damages one layer after its checksums held: nothing but the output can tell.
        """
        pool, ns, chain = self.place(tokens)
        loop = asyncio.get_running_loop()
        extents = self.layout.extents(boundary, align=BLOCK_TOKENS)
        buffers = {(e.layer, e.tensor): bytearray(e.nbytes) for e in extents}
        building = CacheRestore(self.model, self.layout, boundary, extents)
        victim = _victim(self.layout) if zero_state else ()
        started_s = clock()
        consumed: dict[int, float] = {}
        incoming = await pool.get(
            ns,
            chain,
            boundary=boundary,
            into={slot: PageList.of(buffer) for slot, buffer in buffers.items()},
            request=request,
            deadline_s=DEADLINE_S,
        )
        try:
            async for layer in incoming.layers():
                mine = {tensor: buffer for (held, tensor), buffer in buffers.items() if held == layer}
                for tensor in mine:
                    if (layer, tensor) in victim:
                        mine[tensor][:] = bytes(len(mine[tensor]))
                await loop.run_in_executor(None, building.load, layer, mine)
                consumed[layer] = clock()
            await incoming.sealed()
        finally:
            await incoming.cancel("the reader stopped")
        told = {
            "started_s": started_s,
            "sealed_s": incoming.stats.sealed_s,
            "bytes_by_group": _by_group(self.layout, incoming.manifest.extents),
            "zeroed": [{"layer": layer, "tensor": tensor} for layer, tensor in victim],
            **_counters(incoming.stats),
            "layers": {
                layer: {"first_byte_s": times.first_byte_s, "applied_s": times.applied_s, "consumed_s": consumed[layer]}
                for layer, times in incoming.stats.layers.items()
            },
        }
        return building.finish(), told


# -- prefill -----------------------------------------------------------------------------------


class UnitStream:
    """``PrefillRun.on_unit`` for a transfer that belongs to an event loop: called in the thread that computes.

    What the transfer has to say (it failed, a unit does not fit) is raised in that thread and ends the run. The thread
    waits while more than ``MAX_HELD_BYTES`` are handed over and not released.
    """

    def __init__(self, transfer: OutgoingTransfer) -> None:
        self._loop = asyncio.get_running_loop()
        self._transfer = transfer
        self._held: deque[tuple[Handover, int]] = deque()
        self._held_bytes = 0

    def __call__(self, layer: int, tensor: int, data: memoryview, first: int, tokens: int) -> None:
        work = self._hand_over(layer, tensor, PageList.of(data), first, tokens)
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _hand_over(self, layer: int, tensor: int, pages: PageList, first: int, tokens: int) -> None:
        while self._held and (self._held[0][0].done or self._held_bytes + pages.nbytes > MAX_HELD_BYTES):
            handover, nbytes = self._held.popleft()
            await handover.released()
            self._held_bytes -= nbytes
        handover = self._transfer.ready(layer, tensor, pages, first=first, tokens=tokens)
        self._held.append((handover, pages.nbytes))
        self._held_bytes += pages.nbytes


async def prefill(engine: Engine, tokens: Sequence[int], checkpoints: Sequence[int], request: bytes) -> dict[str, Any]:
    """Match, fetch the prefix, compute the rest, stream it into the pool; returns what is to be told."""
    pool, ns, chain = engine.place(tokens)
    started_s = clock()
    found = await pool.match(ns, chain)
    start, cache, fetched = found.length, None, None
    if start:
        cache, fetched = await engine.fetch(tokens, start)
    points = [point for point in checkpoints if point > start]
    outgoing = await pool.put(
        ns, chain, boundary=len(tokens), start=start, checkpoints=points, request=request, deadline_s=DEADLINE_S
    )
    try:
        run = PrefillRun(
            engine.model,
            engine.layout,
            tokens,
            start=start,
            cache=cache,
            checkpoints=points,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=CHUNK_TOKENS,
            on_unit=UnitStream(outgoing),
        )
        computing_s = clock()
        result = await asyncio.get_running_loop().run_in_executor(None, run.run)
        computed_s = clock()
        await outgoing.seal()
    finally:
        await outgoing.cancel("the prefill was given up")
    return {
        "started_s": started_s,
        "computing_s": computing_s,
        "computed_s": computed_s,
        "sealed_s": clock(),
        "matched": start,
        "restorable": list(found.restorable),
        "fetched": fetched,
        "cuts": [stop for _, stop in run.chunks],
        "first_token": result.first_token,
        "logits_sha256": _digest(result.logits),
        "bytes_by_group": _by_group(engine.layout, outgoing.manifest.extents),
        **_counters(outgoing.stats),
        "layers": {
            layer: {"ready_s": times.ready_s, "acked_s": times.acked_s}
            for layer, times in outgoing.stats.layers.items()
        },
    }


# -- reference ---------------------------------------------------------------------------------


def compute(model: Any, tokens: Sequence[int], ends: Sequence[int], steps: int) -> dict[str, Any]:
    """The whole request in one process, by transformers alone: prefill cut at ``ends``, then ``steps`` greedy steps."""
    torch = require("torch")
    cache = require("transformers").DynamicCache(config=model.config)
    digests, chosen = [], []
    with torch.no_grad():
        first = 0
        for stop in ends:
            ids = torch.tensor([list(tokens[first:stop])])
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            first = stop
        for step in range(steps + 1):
            logits = out.logits[:, -1]
            digests.append(_digest(logits))
            chosen.append(int(logits.argmax(-1)))
            if step < steps:
                out = model(input_ids=torch.tensor([chosen[-1:]]), past_key_values=cache, use_cache=True)
    return {"logits_sha256": digests, "tokens": chosen}


# -- shared ------------------------------------------------------------------------------------


def _victim(layout: CacheLayout) -> tuple[tuple[int, int], ...]:
    """The (layer, tensor) slots of the first layer that has a recurrent state, else a window, else any cache."""
    order = {GroupKind.RECURRENT: 0, GroupKind.SLIDING: 1, GroupKind.FULL: 2}
    group = min(range(len(layout.groups)), key=lambda index: order[layout.groups[index].kind])
    layer = layout.groups[group].layers[0]
    return tuple((slot.layer, slot.tensor) for slot in layout.slots(group) if slot.layer == layer)


def _by_group(layout: CacheLayout, extents: Iterable[Extent]) -> dict[str, int]:
    group_of = {(slot.layer, slot.tensor): layout.groups[slot.group].name for slot in layout.slots()}
    sizes = Counter({group.name: 0 for group in layout.groups})
    for extent in extents:
        sizes[group_of[extent.layer, extent.tensor]] += extent.nbytes
    return dict(sizes)


def _counters(stats: TransferStats) -> dict[str, int]:
    return {
        "total_bytes": stats.total_bytes,
        "chunks": stats.chunks,
        "checksums_verified": stats.checksums_verified,
        "corrupt_chunks": stats.corrupt_chunks,
        "resent_bytes": stats.resent_bytes,
    }


def _digest(logits: torch.Tensor) -> str:
    """SHA-256 over the raw bytes: equal means equal bit by bit."""
    raw = logits.detach().contiguous().reshape(-1).view(require("torch").uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


# -- processes ---------------------------------------------------------------------------------


async def _process(channel: Channel, role: str) -> None:
    """Answer commands until the parent closes the pipe. Everything long runs in a thread: the loop keeps moving bytes."""
    loop = asyncio.get_running_loop()
    engine: Engine | None = None
    cache: Any = None
    async with AsyncExitStack() as stack:
        async for command in channel.commands():
            op = command["op"]
            if op == "save":
                await loop.run_in_executor(
                    None, tiny_models.save_tiny, command["model"], command["directory"], command["seed"]
                )
                channel.emit("saved")
                continue
            if op == "load":
                engine = await loop.run_in_executor(None, load, command["directory"])
                channel.emit("loaded", **engine.describe())
                continue
            if engine is None:
                raise ProtocolError(f"the {role} process was told to {op!r} before it was given a model")
            match role, op:
                case "prefill" | "decode", "connect":
                    await engine.connect(stack, command["host"], command["port"], command["connections"])
                    channel.emit("connected")
                case "prefill", "prefill":
                    request = bytes.fromhex(command["request"])
                    told = await prefill(engine, command["tokens"], command["checkpoints"], request)
                    channel.emit("prefilled", **told)
                case "decode", "receive":
                    tokens, request = command["tokens"], bytes.fromhex(command["request"])
                    cache, told = await engine.fetch(
                        tokens, len(tokens), request=request, zero_state=command["zero_state"]
                    )
                    channel.emit("received", **told)
                case "decode", "generate":
                    begun_s = clock()
                    chosen, _, logits = await loop.run_in_executor(
                        None, greedy, engine.model, cache, command["first_token"], command["steps"]
                    )
                    digests = [_digest(step) for step in logits]
                    channel.emit("generated", tokens=chosen, logits_sha256=digests, decode_s=clock() - begun_s)
                case "reference", "compute":
                    told = await loop.run_in_executor(
                        None, compute, engine.model, command["tokens"], command["cuts"], command["steps"]
                    )
                    channel.emit("computed", **told)
                case _:
                    raise ProtocolError(f"the {role} process knows no command {op!r}")


def load(directory: str) -> Engine:
    """The model of a directory. Raises ConfigError when there is none, LayoutError when its cache cannot be carried."""
    try:
        return Engine(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory} is not a causal language model that transformers can load: {error}") from error


ROLES = ("prefill", "decode", "reference")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        sys.exit(f"one role is wanted, of: {', '.join(ROLES)}")
    serve(lambda channel: _process(channel, sys.argv[1]))
