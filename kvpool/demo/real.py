"""``kvpool demo --real``: a real, tiny model; prefill, pool and decode in processes of their own, compared bit by bit.

Two requests. The first is prefilled layer by layer into a kvpoold while decode reads it out behind; the second
shares a prefix with it, resumes from the pooled checkpoint and sends the rest only. A further process computes both
without any transfer. The verdict is over raw logits bytes of the prefill and of every decode step.

``corrupt`` shows that the verdict can be another one, see :class:`Corruption`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console

from kvpool.engines import tiny_models
from kvpool.engines.hf_layout import GRID
from kvtransport.bench.output import write_json
from kvtransport.errors import ConfigError, KVError
from kvtransport.layout import CacheLayout

from .plan import POOL_PAGE_BYTES
from .processes import Child, Crew, supervise
from .real_flipper import FlippingRelay
from .real_report import INTO_POOL, OUT_OF_POOL, Outcome, render, report
from .real_roles import BLOCK_TOKENS, cuts
from .run import START_S, start_pool

POSITIONS = 4_096
"""Tokens the tiny models have positions for."""
WAIT_S = 120.0
"""No answer of a process takes longer."""
MIN_POOL_BYTES = 64 << 20


class Corruption(StrEnum):
    """What to damage on purpose."""

    ZERO_STATE = "zero-state"
    """Decode zeroes one layer's state after it arrived: the output must differ (exit 1)."""
    FLIP_BYTE = "flip-byte"
    """One byte of the first chunk changes on the wire into the pool, another one on the wire out of it: both must be
    caught by their checksums and sent again; the output is right (exit 0)."""
    FLIP_ALWAYS = "flip-always"
    """Every chunk changes on the wire into the pool: the transfer must fail, by name (exit 1)."""


_DAMAGED: Mapping[Corruption | None, tuple[str, ...]] = {
    Corruption.FLIP_BYTE: (INTO_POOL, OUT_OF_POOL),
    Corruption.FLIP_ALWAYS: (INTO_POOL,),
}


@dataclass(frozen=True)
class RealOptions:
    """``model`` is a name of :data:`kvpool.engines.tiny_models.NAMES` or a directory with a model; sizes in tokens.

    ``prefix_tokens`` defaults to two thirds of ``tokens``, on the grid. Raises ConfigError for what cannot be run.
    """

    model: str = "kimi_linear"
    tokens: int = 777
    prefix_tokens: int | None = None
    steps: int = 16
    connections: int = 4
    seed: int = 0
    corrupt: Corruption | None = None

    def __post_init__(self) -> None:
        if self.model not in tiny_models.NAMES and self.directory is None:
            raise ConfigError(
                f"no model {self.model!r}: name one of {', '.join(tiny_models.NAMES)}, or a directory with a "
                "transformers model (config.json and weights)"
            )
        if self.steps < 1:
            raise ConfigError(f"at least 1 step must be decoded, got --steps {self.steps}")
        if not GRID + 2 <= self.tokens <= POSITIONS - self.steps:
            raise ConfigError(
                f"prompts of {GRID + 2} to {POSITIONS - self.steps} tokens can be run (with {self.steps} steps), "
                f"got --tokens {self.tokens}"
            )
        if self.prefix % GRID or not GRID <= self.prefix < self.tokens - 1:
            raise ConfigError(
                f"the shared prefix must be a multiple of {GRID} tokens (only there a resumed prefill is exact) and end "
                f"before the last but one of {self.tokens}, got --prefix-tokens {self.prefix}"
            )
        if self.seed < 0:
            raise ConfigError(f"--seed must be 0 or more, got {self.seed}")
        if not 1 <= self.connections <= 64:
            raise ConfigError(f"1 to 64 connections can be used, got --connections {self.connections}")

    @property
    def directory(self) -> Path | None:
        """Where the model is, unless it is a tiny one that has to be made."""
        path = Path(self.model)
        return path if (path / "config.json").is_file() else None

    @property
    def prefix(self) -> int:
        """Tokens that both requests begin with; a checkpoint is stored there."""
        return max(GRID, self.tokens * 2 // 3 // GRID * GRID) if self.prefix_tokens is None else self.prefix_tokens

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Token ids of both requests; the second ends halfway between prefix and end of the first."""
        first = tiny_models.random_tokens(self.tokens, seed=self.seed + 1, vocabulary=vocabulary)
        more = (self.tokens - self.prefix) // 2
        other = tiny_models.random_tokens(more, seed=self.seed + 2, vocabulary=vocabulary)
        return [first, first[: self.prefix] + other]


async def run(
    crew: Crew, options: RealOptions, memory_bytes: int | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run the demo with processes that are ``crew``'s to end; returns its report, whose ``ok`` is the verdict.

    ``memory_bytes`` of the pool default to room for both requests; ``say`` is told what is going on. Raises KVError when
    something was refused or failed.
    """
    began_s = time.monotonic()
    async with AsyncExitStack() as stack:
        outcome = await _demo(crew, options, memory_bytes, stack, say)
    return report(outcome, time.monotonic() - began_s)


async def _demo(
    crew: Crew, options: RealOptions, memory_bytes: int | None, stack: AsyncExitStack, say: Callable[[str], None]
) -> Outcome:
    say("starting prefill, decode and a reference")
    reference, prefill, decode = [
        await crew.start(name, ["-m", "kvpool.demo.real_roles", name]) for name in ("reference", "prefill", "decode")
    ]
    engines = [prefill, decode, reference]
    with tempfile.TemporaryDirectory(prefix="kvpool-demo-") as made:
        if options.directory is None:
            await _ask(reference, "save", "saved", model=options.model, directory=made, seed=options.seed)
        directory = str(options.directory or made)
        loaded = await asyncio.gather(*(_ask(child, "load", "loaded", directory=directory) for child in engines))
    layout = CacheLayout.from_description(loaded[0]["layout"])
    prompts = options.prompts(loaded[0]["vocabulary"])
    memory = pool_bytes(layout, [len(tokens) for tokens in prompts]) if memory_bytes is None else memory_bytes
    say(f"{loaded[0]['architecture']} is loaded three times; starting a pool of {memory:,} bytes")
    up = await (await start_pool(crew, memory)).receive("up", timeout_s=START_S)

    relays: dict[str, FlippingRelay] = {}
    for child, wire in ((prefill, INTO_POOL), (decode, OUT_OF_POOL)):
        host, port = up["host"], up["port"]
        if wire in _DAMAGED.get(options.corrupt, ()):
            relay = FlippingRelay(
                host, port, upstream=wire == INTO_POOL, always=options.corrupt is Corruption.FLIP_ALWAYS
            )
            relays[wire] = await stack.enter_async_context(relay)
            host, port = relay.address
        await _ask(child, "connect", "connected", host=host, port=port, connections=options.connections)

    outcome = Outcome(
        options,
        loaded[0]["architecture"],
        loaded[0]["fingerprint"],
        [group.name for group in layout.groups],
        [len(tokens) for tokens in prompts],
        flips={wire: relay.flips for wire, relay in relays.items()},
    )
    for tokens in prompts:
        ends = cuts(len(tokens), [options.prefix])
        await reference.send(op="compute", tokens=tokens, cuts=ends, steps=options.steps)
    for number, tokens in enumerate(prompts, 1):
        say(f"request {number}: {len(tokens)} tokens through the pool")
        request = os.urandom(16).hex()
        zero = options.corrupt is Corruption.ZERO_STATE
        # Decode asks first: the pool lets it wait for the request and read behind its prefill.
        receiving = _ask(decode, "receive", "received", tokens=tokens, request=request, zero_state=zero)
        computing = _ask(prefill, "prefill", "prefilled", tokens=tokens, checkpoints=[options.prefix], request=request)
        received, prefilled = await asyncio.gather(receiving, computing)
        generated = await _ask(
            decode, "generate", "generated", first_token=prefilled["first_token"], steps=options.steps
        )
        outcome.add(prefilled, received, generated, await reference.receive("computed", timeout_s=WAIT_S))
    return outcome


async def _ask(child: Child, op: str, event: str, **arguments: Any) -> dict[str, Any]:
    await child.send(op=op, **arguments)
    return await child.receive(event, timeout_s=WAIT_S)


def pool_bytes(layout: CacheLayout, lengths: Sequence[int]) -> int:
    """Memory with room for both requests twice: every block and state takes whole pages."""
    pages = sum(len(layout.groups) * (length // BLOCK_TOKENS + 8) for length in lengths) * POOL_PAGE_BYTES
    whole = sum(
        sum(e.nbytes for e in layout.extents(length, checkpoints=[GRID], align=BLOCK_TOKENS)) for length in lengths
    )
    return max(MIN_POOL_BYTES, 2 * (pages + whole))


def command(options: RealOptions, memory_bytes: int | None, out: Console, json_to: str | None) -> int:
    """Run, show, write the JSON (``-`` is standard output); the exit status: 0 when everything is as it should be.

    A KVError that ends the demo is written to the JSON too, as ``error``, and raised.
    """
    try:
        body = supervise(lambda crew: run(crew, options, memory_bytes, lambda text: out.print(text, style="dim")))
    except KVError as error:
        head = {"demo": "real", "model": options.model, "corrupt": options.corrupt}
        write_json(json_to, {**head, "ok": False, "bitwise_equal": False, "error": error.as_dict()})
        raise
    render(out, body)
    write_json(json_to, body)
    return 0 if body["ok"] else 1
