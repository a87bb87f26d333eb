"""``kvpool demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvtransport.bench.output import console, write_json
from kvtransport.errors import ConfigError, KVError

from ..config import parse_size
from .plan import Plan
from .processes import supervise
from .progress import Progress
from .report import render
from .run import run

EPILOG = """
Examples:

  kvpool demo                                    through a kvpoold, two requests with a shared prefix

  kvpool demo --direct                           from process to process

  kvpool demo --layer-ms 20 --connections 8      faster compute: less to hide behind

  kvpool demo --json -                           per layer when it was ready, arrived, was consumed
"""

WIDTH = 120
"""Columns where the output has no width of its own."""


def demo(
    preset: Annotated[str, typer.Option(help="Whose cache: a preset of `kvbench models`")] = "kimi-linear-48b",
    tokens: Annotated[int, typer.Option(help="Tokens of a request")] = 32_768,
    prefix_tokens: Annotated[
        int | None, typer.Option(help="Tokens the second request shares with the first [three quarters]")
    ] = None,
    layer_ms: Annotated[float, typer.Option(help="Milliseconds prefill computes a layer of the whole request")] = 100.0,
    connections: Annotated[int, typer.Option(help="TCP connections of each link")] = 4,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the pool, such as 2GiB [room for both requests]")
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a prefix-cache block")] = 64,
    direct: Annotated[bool, typer.Option("--direct", help="From process to process: one request, no pool")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the tokens and of the cache's bytes")] = 0,
    json_to: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write one JSON object to PATH; '-' is standard output")
    ] = None,
) -> None:
    """The main job on loopback: prefill, pool and decode as processes of their own. Needs no torch.

    Prefill "computes" a request layer by layer and streams each finished layer into the pool; decode reads it out behind it
    and consumes layer k while k+1 is on its way. A second request shares a prefix: it is matched, fetched by prefill,
    and only the rest is computed and sent. Every byte is verified by checksum, and by content at its end.
    """
    try:
        prefix = Plan.default_prefix(tokens, block_tokens) if prefix_tokens is None else prefix_tokens
        plan = Plan(preset, tokens, prefix, block_tokens, layer_ms, connections, seed, direct)
        memory_bytes = plan.pool_memory_bytes() if memory is None else parse_size(memory)
        if json_to not in (None, "-") and not Path(json_to).resolve().parent.is_dir():
            raise ConfigError(f"cannot write the JSON to {json_to!r}: there is no such folder")
    except KVError as error:
        raise _failed(error, 2) from error
    out = console(json_to)
    if not out.is_terminal:
        out.width = WIDTH
    try:
        with Progress(out, plan) as progress:
            report = supervise(lambda crew: run(crew, plan, memory_bytes, progress))
        render(out, report)
        write_json(json_to, report)
    except KVError as error:
        raise _failed(error, 1) from error
    except KeyboardInterrupt:
        print("kvpool demo: interrupted; its processes have ended", file=sys.stderr)
        raise typer.Exit(130) from None


def _failed(error: KVError, status: int) -> typer.Exit:
    print(f"kvpool demo: {error.code} error: {error.message}", file=sys.stderr)
    return typer.Exit(status)


def register(app: typer.Typer) -> None:
    """Add ``demo`` to ``kvpool``."""
    app.command("demo", epilog=EPILOG)(demo)
