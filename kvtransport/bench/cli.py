"""``kvbench``: the command, and where its subcommands are registered."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import IntegrityError, KVError
from . import commands_network as _network  # noqa: F401  registers its commands
from . import commands_paths as _paths  # noqa: F401  registers its commands
from . import loopback as loopback_command
from . import models as models_command
from .app import JsonOption, app
from .output import console, write_result


@app.command(
    "models",
    epilog="Examples:  [bold]kvbench models[/]   |   [bold]kvbench models --json -[/]   |   "
    "[bold]kvbench models --json models.json[/]",
)
def models(json_to: JsonOption = None) -> None:
    """Cache sizes of the paper's models at 1K, 8K, 32K and 128K tokens, from their public geometry.

    Beside them the prefill time the paper's KV throughput implies, and the paper's ratios (13x, 4x, 36x)
    computed again: published, computed, and why where they differ. K is 1,024 tokens.
    """
    models_command.render(console(json_to))
    write_result(json_to, "models", models_command.report())


@app.command(
    "loopback",
    epilog="Examples:  [bold]kvbench loopback[/]   |   [bold]kvbench loopback --connections 1 --no-checksum --json -[/]   |   "
    "[bold]kvbench loopback --preset minimax-m2.5 --tokens 8192 --congestion cubic --contiguous[/]   |   "
    "[bold]kvbench loopback --baseline --congestion cubic --repeat 9[/]   |   [bold]kvbench loopback --tls --json -[/]",
)
def loopback(
    preset: Annotated[str, typer.Option(help="Whose cache to move; 'kvbench models' lists them.")] = "kimi-linear-48b",
    tokens: Annotated[int, typer.Option(help="Length of the request.")] = 32_768,
    connections: Annotated[int, typer.Option(help="TCP connections of the link.")] = 4,
    chunk_bytes: Annotated[int, typer.Option(help="Unit of striping and checksum.")] = 1 << 20,
    page_bytes: Annotated[
        int | None, typer.Option(help="Page size at both ends; default: each tensor's block of 16 tokens.")
    ] = None,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="One piece per tensor instead of pages.")] = False,
    checksum: Annotated[bool, typer.Option(help="xxh3 of every chunk, verified on arrival.")] = True,
    congestion: Annotated[str | None, typer.Option(help="cubic, bbr, ...; default: the system's.")] = None,
    repeat: Annotated[
        int | None, typer.Option(help="Timed rounds; the median is reported. Default: 5, with --baseline or --tls 7.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not count.")] = 1,
    buffer_bytes: Annotated[
        int | None, typer.Option(help="Memory per end, at least; default: more than the caches hold.")
    ] = None,
    tls: Annotated[
        bool,
        typer.Option("--tls", help="TLS 1.3, in turns with the same without it and a C loop over the same OpenSSL."),
    ] = False,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="The same bytes through a C loop of send and recv, in turns with ours.")
    ] = False,
    json_to: JsonOption = None,
) -> None:
    """Move one request's cache between two processes over loopback, verified byte by byte.

    A round is timed from opening the transfer until the receiver has confirmed the seal: everything verified
    and in its place. Afterwards source and destination are compared by hash. With --baseline the ratio to plain C
    is reported, the only figure that means something on a machine that is shared.
    """
    options = loopback_command.LoopbackOptions(
        preset=preset,
        tokens=tokens,
        connections=connections,
        chunk_bytes=chunk_bytes,
        page_bytes=page_bytes,
        contiguous=contiguous,
        checksum=checksum,
        congestion=congestion,
        repeat=repeat if repeat is not None else 7 if baseline or tls else 5,
        warmup=warmup,
        buffer_bytes=buffer_bytes,
        baseline=baseline,
        tls=tls,
    )
    body = loopback_command.run(options, console(json_to))
    write_result(json_to, "loopback", body)
    if not body["verified"]:
        raise IntegrityError("bytes that arrived are not the bytes that were sent")


def main() -> None:
    """Entry point of ``kvbench``: an error of ours is one line on standard error and exit code 2."""
    try:
        app()
    except KVError as error:
        print(f"kvbench: {error.code} error: {error.message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
