"""The commands of ``kvbench`` that compare with other tools: ``wan`` and ``peers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import peers as peers_command
from . import plots
from . import wan as wan_command
from .app import JsonOption, PlotOption, app, integers, numbers
from .output import console, write_result
from .report import load


@app.command(
    "wan",
    epilog="Examples:  [bold]kvbench wan --quick[/]   |   [bold]kvbench wan --json wan.json --plot wan.svg[/]   |   "
    "[bold]kvbench wan --rtt 25 --loss 0,0.01 --no-changes[/]",
)
def wan(
    rtt: Annotated[str, typer.Option(help="Round-trip times in ms, separated by commas.")] = "10,30",
    loss: Annotated[str, typer.Option(help="Loss in percent of segments.")] = "0,0.01,0.1",
    rate_mbit: Annotated[float, typer.Option(help="Rate of the link, Ethernet framing included.")] = 4_000.0,
    queue_ms: Annotated[float, typer.Option(help="Drop-tail queue, in ms of the rate.")] = 20.0,
    connections: Annotated[str, typer.Option(help="Connections iperf3 is tried with.")] = "1,4,8,16",
    congestion: Annotated[str, typer.Option(help="Congestion controls it is tried with.")] = "cubic,bbr",
    seconds: Annotated[float, typer.Option(help="Length of a run, after a first second that does not count.")] = 5.0,
    repeat: Annotated[int, typer.Option(help="Runs of every setting.")] = 3,
    finals: Annotated[int, typer.Option(help="Runs of the best two in turns with ours.")] = 5,
    cold: Annotated[bool, typer.Option(help="The first 256 MiB of a fresh link too.")] = True,
    changes: Annotated[bool, typer.Option(help="Changes of round trip and loss while it runs too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Corners of the grid, one look each: two minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Of the losses.")] = 1,
    screened: Annotated[
        Path | None,
        typer.Option(help="JSON of an earlier run: its looks at iperf3's settings count, only the best run again."),
    ] = None,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Emulate a wide-area link and hold ours, with no flag set, against the best of iperf3's settings on it.

    Steady goodput over a grid of round-trip times and losses, the first 256 MiB of a fresh link, and how fast the goodput
    is back after the path changes. Needs root (network namespaces, TUN) and iperf3; the whole grid takes half an hour.
    """
    options = wan_command.WanOptions(
        rtt_ms=numbers(rtt, "--rtt"),
        loss_percent=numbers(loss, "--loss"),
        rate_mbit=rate_mbit,
        queue_ms=queue_ms,
        connections=integers(connections, "--connections"),
        congestion=tuple(name.strip() for name in congestion.split(",") if name.strip()),
        seconds=seconds,
        repeat=repeat,
        finals=finals,
        cold=cold,
        changes=changes,
        seed=seed,
    )
    plots.check(plot)

    def keep(body: dict[str, Any]) -> None:
        if json_to != "-":  # half an hour is not lost with the last minute
            write_result(json_to, "wan", body)

    earlier = None if screened is None else load(screened)
    body = wan_command.run(wan_command.quick(options) if quick else options, console(json_to), keep, earlier)
    write_result(json_to, "wan", body)
    plots.save(plot, {"command": "wan", **body})


@app.command(
    "peers",
    epilog="Examples:  [bold]kvbench peers --json peers.json[/]   |   [bold]kvbench peers --only mooncake,zeromq --congestion bbr[/]   |   "
    "[bold]kvbench peers --rounds 3 --plot peers.svg[/]",
)
def peers(
    only: Annotated[str | None, typer.Option(help="Some of the peers, separated by commas.")] = None,
    congestion: Annotated[str, typer.Option(help="One run under each of these, for everyone in it.")] = "cubic,bbr",
    rounds: Annotated[int, typer.Option(help="Rounds through all peers.")] = 7,
    pings: Annotated[int, typer.Option(help="Round trips of 4 KiB a round.")] = 1_000,
    blocks: Annotated[str, typer.Option(help="Bytes of a block.")] = "65536,1048576,4194304",
    connections: Annotated[int | None, typer.Option(help="Of our link; default: what it chooses.")] = None,
    move_bytes: Annotated[int, typer.Option(help="Bytes of one move; each end keeps twice as many.")] = 256 << 20,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Ours, a C loop, Mooncake, NIXL, gloo, ZeroMQ, aiohttp, gRPC and memcached's latency, in turns over loopback.

    Everyone moves blocks of host memory between two processes under one congestion control. Peers are installed into
    environments of their own when first needed; one that cannot be is named. A peer that falls below 0.85 of its own
    documented ratio to the C loop was not measured fairly, and its figures are void.
    """
    options = peers_command.PeersOptions(
        peers=tuple(n.strip() for n in only.split(",")) if only is not None else peers_command.PeersOptions().peers,
        congestion=tuple(name.strip() for name in congestion.split(",") if name.strip()),
        blocks=integers(blocks, "--blocks"),
        rounds=rounds,
        pings=pings,
        connections=connections,
        move_bytes=move_bytes,
        region_bytes=2 * move_bytes,
    )
    plots.check(plot)
    body = peers_command.run(options, console(json_to))
    write_result(json_to, "peers", body)
    plots.save(plot, {"command": "peers", **body})
