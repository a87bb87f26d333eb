"""The commands of ``kvbench`` that compare with other tools: ``wan`` and ``peers``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import plots
from . import wan as wan_command
from .app import JsonOption, PlotOption, app, integers, numbers
from .output import console, write_json


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
            write_json(json_to, {"command": "wan", **body})

    body = wan_command.run(wan_command.quick(options) if quick else options, console(json_to), keep)
    write_json(json_to, {"command": "wan", **body})
    plots.save(plot, {"command": "wan", **body})
