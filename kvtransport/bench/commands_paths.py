"""The commands of ``kvbench`` that measure a path: ``sweep``, ``pipeline``, ``serve``, ``send``, ``doctor`` and ``report``."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer

from ..engine.native import default_threads
from ..flow.tuning import connections_for
from . import crowd as crowd_command
from . import doctor as doctor_command
from . import pipeline as pipeline_command
from . import plots
from . import report as report_command
from . import send as send_command
from . import serve as serve_command
from . import sweep as sweep_command
from .app import JsonOption, PlotOption, app, integers
from .output import console, write_result
from .path import emulation

PORT = 5_207
RttOption = Annotated[float | None, typer.Option("--rtt", help="Emulate a link with this round trip in ms (root).")]
RateOption = Annotated[float | None, typer.Option("--rate-mbit", help="Emulate a link of this rate; default 4000.")]
LossOption = Annotated[float | None, typer.Option("--loss", help="Emulate a link with this loss in percent.")]
PresetOption = Annotated[str, typer.Option(help="Whose cache to move; 'kvbench models' lists them.")]
TokensOption = Annotated[int, typer.Option(help="Length of the request.")]
CongestionOption = Annotated[str | None, typer.Option(help="cubic, bbr, ...; default: what the transport chooses.")]
ConnectionsOption = Annotated[int | None, typer.Option(help="TCP connections; default: what the transport chooses.")]
ChecksumOption = Annotated[bool, typer.Option(help="xxh3 of every chunk, verified on arrival.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Beyond loopback: nothing is encrypted, the network is trusted.")
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", help="PEM of the authorities the other end is held against: all connections are TLS 1.3."),
]
CertificateOption = Annotated[Path | None, typer.Option("--cert", help="PEM of this end's own certificate.")]
KeyOption = Annotated[Path | None, typer.Option("--key", help="PEM of its key.")]
TokenOption = Annotated[
    str | None,
    typer.Option(envvar="KVBENCH_TOKEN", help="A secret both ends know, at least 16 characters; also KVBENCH_TOKEN."),
]


@app.command(
    "sweep",
    epilog="Examples:  [bold]kvbench sweep[/]   |   [bold]kvbench sweep --connections 1,4,16 --rtt 10 --loss 0.01[/]   |   "
    "[bold]kvbench sweep --pages 0,18432 --no-checksum --plot sweep.svg[/]",
)
def sweep(
    preset: PresetOption = "kimi-linear-48b",
    tokens: TokensOption = 32_768,
    connections: Annotated[str, typer.Option(help="Connection counts, separated by commas.")] = "1,2,4,8",
    chunks: Annotated[str, typer.Option(help="Chunk sizes in bytes.")] = "262144,1048576,4194304",
    pages: Annotated[str, typer.Option(help="Page sizes in bytes at both ends; 0: contiguous.")] = "0,18432",
    congestion: CongestionOption = None,
    checksum: ChecksumOption = True,
    repeat: Annotated[int, typer.Option(help="Rounds through all combinations; medians are reported.")] = 7,
    baseline: Annotated[bool, typer.Option(help="The C loop of send and recv in every round.")] = True,
    rtt: RttOption = None,
    rate_mbit: RateOption = None,
    loss: LossOption = None,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Goodput over connections x chunk size x page size, in turns, beside the C loop; then what the best one carries."""
    options = sweep_command.SweepOptions(
        preset=preset,
        tokens=tokens,
        connections=integers(connections, "--connections"),
        chunk_bytes=integers(chunks, "--chunks"),
        page_bytes=integers(pages, "--pages"),
        congestion=congestion,
        checksum=checksum,
        repeat=repeat,
        conditions=emulation(rtt, rate_mbit, loss),
        baseline=baseline,
    )
    plots.check(plot)
    body = sweep_command.run(options, console(json_to))
    write_result(json_to, "sweep", body)
    plots.save(plot, {"command": "sweep", **body})


@app.command(
    "pipeline",
    epilog="Examples:  [bold]kvbench pipeline[/]   |   [bold]kvbench pipeline --preset prfaas-1t --rtt 10 --plot overlap.svg[/]   |   "
    "[bold]kvbench pipeline --profile measured.csv --tokens 65536[/]",
)
def pipeline(
    preset: PresetOption = "kimi-linear-48b",
    tokens: TokensOption = 32_768,
    seconds: Annotated[float | None, typer.Option(help="Length of prefill; default: the profile's.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="CSV with tokens,prefill_seconds; default: the paper's, by preset.")
    ] = None,
    connections: ConnectionsOption = None,
    congestion: CongestionOption = None,
    checksum: ChecksumOption = True,
    repeat: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 7,
    rtt: RttOption = None,
    rate_mbit: RateOption = None,
    loss: LossOption = None,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Hand over layer after layer at the pace of a prefill: how much of the transfer is hidden, what remains after it.

    Where every layer computes for longer than it travels, the end of prefill to the confirmed seal should be no more
    than the last layer's transfer and 1.5 round trips. Then: how many prefill instances of this model the link
    carries, and how much the transfer adds to the time to first token.
    """
    options = pipeline_command.PipelineOptions(
        preset=preset,
        tokens=tokens,
        seconds=seconds,
        profile=profile,
        conditions=emulation(rtt, rate_mbit, loss),
        connections=connections,
        congestion=congestion,
        checksum=checksum,
        repeat=repeat,
    )
    plots.check(plot)
    body = pipeline_command.run(options, console(json_to))
    write_result(json_to, "pipeline", body)
    plots.save(plot, {"command": "pipeline", **body})


@app.command(
    "crowd",
    epilog="Examples:  [bold]kvbench crowd[/]   |   [bold]kvbench crowd --count 256 --rtt 10 --json -[/]",
)
def crowd(
    count: Annotated[int, typer.Option(help="Transfers at once.")] = 64,
    total_bytes: Annotated[int, typer.Option(help="Of all of them together.")] = 1 << 30,
    urgent_bytes: Annotated[int, typer.Option(help="Of the urgent transfer.")] = 4 << 20,
    connections: ConnectionsOption = None,
    congestion: CongestionOption = None,
    repeat: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 9,
    rtt: RttOption = None,
    rate_mbit: RateOption = None,
    loss: LossOption = None,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Many transfers at once against one of the same bytes, and an urgent transfer alone and behind bulk."""
    options = crowd_command.CrowdOptions(
        count=count,
        total_bytes=total_bytes,
        urgent_bytes=urgent_bytes,
        connections=connections,
        congestion=congestion,
        repeat=repeat,
        conditions=emulation(rtt, rate_mbit, loss),
    )
    plots.check(plot)
    body = crowd_command.run(options, console(json_to))
    write_result(json_to, "crowd", body)
    plots.save(plot, {"command": "crowd", **body})


@app.command(
    "serve",
    epilog="Examples:  [bold]kvbench serve[/]   |   [bold]kvbench serve --host 0.0.0.0 --ca ca.pem --cert cert.pem --key key.pem --token ...[/]",
)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = PORT,
    max_memory: Annotated[int, typer.Option(help="Bytes it gives a sender at most.")] = serve_command.MAX_MEMORY,
    insecure: InsecureOption = False,
    ca: CaOption = None,
    cert: CertificateOption = None,
    key: KeyOption = None,
    token: TokenOption = None,
) -> None:
    """Receive what 'kvbench send' sends, verify it, and tell what arrived; until Ctrl-C.

    Beyond loopback only with TLS (--ca, --cert, --key) and a token or a client certificate, or with --insecure.
    """
    from ..endpoint import EndpointConfig
    from ..identity import Token, TokenStore

    out = console(None)
    tokens = None if token is None else TokenStore([Token.shared(token)])
    config = EndpointConfig(
        name="kvbench-serve", insecure=insecure, tls=send_command.tls_config(ca, cert, key), tokens=tokens
    )

    async def work() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve_command.serve(
            config, host, port, max_memory=max_memory, say=lambda words: out.print(words, soft_wrap=True), stop=stop
        )

    asyncio.run(work())


@app.command(
    "send",
    epilog="Examples:  [bold]kvbench send 127.0.0.1[/]   |   [bold]kvbench send decode-3:5207 --ca ca.pem --token ... --json -[/]",
)
def send(
    host: Annotated[str, typer.Argument(help="HOST or HOST:PORT of a 'kvbench serve'.")],
    preset: PresetOption = "kimi-linear-48b",
    tokens: TokensOption = 32_768,
    connections: ConnectionsOption = None,
    congestion: CongestionOption = None,
    chunk_bytes: Annotated[int | None, typer.Option(help="Default: what the transport chooses.")] = None,
    page_bytes: Annotated[int | None, typer.Option(help="Page size at both ends; default: 16 tokens.")] = None,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="One piece per tensor instead of pages.")] = False,
    checksum: ChecksumOption = True,
    repeat: Annotated[int, typer.Option(help="Rounds, after one that does not count.")] = 5,
    insecure: InsecureOption = False,
    ca: CaOption = None,
    cert: CertificateOption = None,
    key: KeyOption = None,
    server_name: Annotated[str | None, typer.Option(help="What the server's certificate is made out to.")] = None,
    token: TokenOption = None,
    json_to: JsonOption = None,
) -> None:
    """Send one request's cache to a 'kvbench serve': goodput, CPU of both ends, and what this path carries.

    Answers how many prefill instances of the model the path carries, and how much TTFT the transfer adds.
    """
    address, port = send_command.parse_address(host, PORT)
    options = send_command.SendOptions(
        host=address,
        port=port,
        preset=preset,
        tokens=tokens,
        connections=connections,
        congestion=congestion,
        chunk_bytes=chunk_bytes,
        page_bytes=page_bytes,
        contiguous=contiguous,
        checksum=checksum,
        repeat=repeat,
        insecure=insecure,
        ca=ca,
        cert=cert,
        key=key,
        server_name=server_name,
        token=token,
    )
    body = asyncio.run(send_command.run(options, console(json_to)))
    write_result(json_to, "send", body)


@app.command(
    "doctor",
    epilog="Examples:  [bold]kvbench doctor[/]   |   [bold]kvbench doctor --rate-gbps 100 --rtt 30 --interface eth0 --json -[/]",
)
def doctor(
    rate_gbps: Annotated[float, typer.Option(help="The rate that shall be reached.")] = 10.0,
    rtt: Annotated[float, typer.Option(help="Round trip of the path in ms.")] = 10.0,
    connections: Annotated[
        int | None, typer.Option(help="Connections it is spread over; default: what a link begins with.")
    ] = None,
    interface: Annotated[str | None, typer.Option(help="One interface; default: all that are up.")] = None,
    json_to: JsonOption = None,
) -> None:
    """What of this system stands between a link and its speed: limits, congestion control, offloads, MTU, NUMA.

    Nothing is changed; each finding comes with the command that fixes it.
    """
    count = connections_for(rtt / 1e3, default_threads()) if connections is None else connections
    options = doctor_command.DoctorOptions(rate_gbps, rtt, count, interface)
    write_result(json_to, "doctor", doctor_command.run(options, console(json_to)))


@app.command(
    "report",
    epilog="Examples:  [bold]kvbench report peers.json wan.json --out report.html[/]",
)
def report(
    files: Annotated[list[Path], typer.Argument(help="What other commands wrote with --json.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("kvbench.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "kvbench",
    json_to: JsonOption = None,
) -> None:
    """One HTML page with tables and plots from saved JSON; it loads nothing from elsewhere. Needs matplotlib."""
    body = report_command.run(files, out, title, console(json_to))
    write_result(json_to, "report", body)
