"""``kvpool demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvtransport.bench.output import console, write_json
from kvtransport.errors import ConfigError, KVError

from ..config import parse_size
from ..engines.tiny_models import NAMES
from .plan import Plan
from .processes import supervise
from .progress import Progress
from .real import Corruption, RealOptions
from .real import command as run_real
from .report import render
from .run import run

EPILOG = """
Examples:

  kvpool demo                                    through a kvpoold, two requests with a shared prefix

  kvpool demo --direct                           from process to process

  kvpool demo --layer-ms 20 --connections 8      faster compute: less to hide behind

  kvpool demo --json -                           per layer when it was ready, arrived, was consumed

  kvpool demo --real --model qwen3_next          a real, tiny model: logits bitwise equal to no transfer

  kvpool demo --real --corrupt zero-state        the same, and it must be noticed
"""

WIDTH = 120
"""Columns where the output has no width of its own."""


def demo(
    ctx: typer.Context,
    preset: Annotated[str, typer.Option(help="Whose cache: a preset of `kvbench models`")] = "kimi-linear-48b",
    tokens: Annotated[int | None, typer.Option(help="Tokens of a request [32768; with --real 777]")] = None,
    prefix_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens the second request shares with the first \\[three quarters; with --real two thirds]"),
    ] = None,
    layer_ms: Annotated[float, typer.Option(help="Milliseconds prefill computes a layer of the whole request")] = 100.0,
    connections: Annotated[int, typer.Option(help="TCP connections of each link")] = 4,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the pool, such as 2GiB \\[room for both requests]")
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a prefix-cache block")] = 64,
    direct: Annotated[bool, typer.Option("--direct", help="From process to process: one request, no pool")] = False,
    seed: Annotated[int, typer.Option(help="Seed of tokens, and of the cache's bytes or the model's weights")] = 0,
    real: Annotated[
        bool, typer.Option("--real", help="A real, tiny, random model on the CPU: needs torch and transformers")
    ] = False,
    model: Annotated[
        str, typer.Option(help=f"With --real: {', '.join(NAMES)}, or a folder with a transformers model")
    ] = RealOptions.model,
    steps: Annotated[int, typer.Option(help="With --real: tokens decoded and compared")] = RealOptions.steps,
    corrupt: Annotated[
        Corruption | None,
        typer.Option(help="With --real: damage one layer's state, one byte, or every chunk; it must be noticed"),
    ] = None,
    json_to: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write one JSON object to PATH; '-' is standard output")
    ] = None,
) -> None:
    """The main job on loopback: prefill, pool and decode as processes of their own. Needs no torch.

    Prefill "computes" a request layer by layer and streams each finished layer into the pool; decode reads it out behind it
    and consumes layer k while k+1 is on its way. A second request shares a prefix: it is matched, fetched by prefill,
    and only the rest is computed and sent. Every byte is verified by checksum, and by content at its end.

    With --real a transformers model computes: prefill with a hook per layer, through the pool, decode in another process; the
    logits of every step must be bitwise those of a run without transfer. Status 1 when anything is not as it should be.
    """
    options: RealOptions | None = None
    try:
        if json_to not in (None, "-") and not Path(json_to).resolve().parent.is_dir():
            raise ConfigError(f"cannot write the JSON to {json_to!r}: there is no such folder")
        memory_bytes = None if memory is None else parse_size(memory)
        if real:
            _refuse(ctx, ("preset", "layer_ms", "block_tokens", "direct"), "means nothing with --real")
            length = RealOptions.tokens if tokens is None else tokens
            options = RealOptions(model, length, prefix_tokens, steps, connections, seed, corrupt)
        else:
            _refuse(ctx, ("model", "steps", "corrupt"), "needs --real")
            length = 32_768 if tokens is None else tokens
            prefix = Plan.default_prefix(length, block_tokens) if prefix_tokens is None else prefix_tokens
            plan = Plan(preset, length, prefix, block_tokens, layer_ms, connections, seed, direct)
            room = plan.pool_memory_bytes() if memory_bytes is None else memory_bytes
    except KVError as error:
        raise _failed(error, 2) from error
    out = console(json_to)
    if not out.is_terminal:
        out.width = WIDTH
    try:
        if options is not None:
            raise typer.Exit(run_real(options, memory_bytes, out, json_to))
        with Progress(out, plan) as progress:
            report = supervise(lambda crew: run(crew, plan, room, progress))
        render(out, report)
        write_json(json_to, report)
    except KVError as error:
        raise _failed(error, 1) from error
    except KeyboardInterrupt:
        print("kvpool demo: interrupted; its processes have ended", file=sys.stderr)
        raise typer.Exit(130) from None


def _refuse(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Raise ConfigError for the first of these options that was given."""
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def _failed(error: KVError, status: int) -> typer.Exit:
    print(f"kvpool demo: {error.code} error: {error.message}", file=sys.stderr)
    return typer.Exit(status)


def register(app: typer.Typer) -> None:
    """Add ``demo`` to ``kvpool``."""
    app.command("demo", epilog=EPILOG)(demo)
