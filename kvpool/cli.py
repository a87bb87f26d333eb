"""``kvpool``: the admin command, the demo and the planner."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from kvtransport import presets
from kvtransport.bench.output import console, write_json
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, KVError

from .client import PoolClient, connect
from .cluster.cli import register as register_cluster
from .commands_security import register as register_security
from .demo.cli import register as register_demo
from .events.cli import register as register_events
from .keys import KeyChain
from .replay.cli import register as register_replay
from .scheduling.cli import register as register_scheduling
from .security import client_config

app = typer.Typer(
    name="kvpool",
    help="Look into a pool daemon or a cluster of them, run the demo, plan a deployment.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Address = Annotated[str, typer.Option("--address", "-a", help="HOST:PORT of a kvpoold")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Connect beyond loopback without encryption")]
Ca = Annotated[
    Path | None, typer.Option("--ca", envvar="KVPOOL_CA", help="PEM file of the pool's certificate authority: TLS")
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", envvar="KVPOOL_CERTIFICATE", help="PEM file of a client certificate")
]
Key = Annotated[Path | None, typer.Option("--key", envvar="KVPOOL_KEY", help="PEM file of its key")]
TokenFile = Annotated[
    Path | None, typer.Option("--token", envvar="KVPOOL_TOKEN", help="File with a token, instead of a certificate")
]
JsonTo = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write one JSON object to PATH; '-' is standard output")
]

UNIT = 1024.0


def main() -> None:
    """Entry point of ``kvpool``: an error of ours is one line on standard error and exit code 2."""
    try:
        app()
    except KVError as error:
        print(f"kvpool: {error.code} error: {error.message}", file=sys.stderr)
        sys.exit(2)


def human(nbytes: float) -> str:
    """ "1.5 GiB" """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < UNIT:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= UNIT
    return f"{nbytes:.1f} TiB"


def _access(
    insecure: bool, ca: Path | None, certificate: Path | None, key: Path | None, token: Path | None
) -> EndpointConfig:
    return client_config(name="kvpool", insecure=insecure, authority=ca, certificate=certificate, key=key, token=token)


def _with_pool(address: str, config: EndpointConfig, work: Callable[[PoolClient], Awaitable[Any]]) -> Any:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is not an address: write HOST:PORT, such as 127.0.0.1:7777")

    async def run() -> Any:
        async with await connect(host.strip("[]"), int(port), connections=1, config=config) as pool:
            return await work(pool)

    return asyncio.run(run())


@app.command(epilog="Examples:  [bold]kvpool stat[/]   |   [bold]kvpool stat -a 127.0.0.1:7777 --json -[/]")
def stat(
    address: Address = "127.0.0.1:7777",
    insecure: Insecure = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: TokenFile = None,
    json_to: JsonTo = None,
) -> None:
    """What a pool holds: bytes by class and group, entries, hits and misses by reason."""
    body = _with_pool(address, _access(insecure, ca, certificate, key, token), lambda pool: pool.stat())
    out = console(json_to)
    table = Table(title=f"kvpoold at {address}", show_header=False)
    table.add_row("memory", f"{human(body['used_bytes'])} used of {human(body['total_bytes'])}")
    for name, nbytes in body["class_bytes"].items():
        table.add_row(f"class {name}", human(nbytes))
    for name, nbytes in body["group_bytes"].items():
        table.add_row(f"group {name}", human(nbytes))
    for section in ("entries", "counters", "misses", "evictions", "wire"):
        for name, number in body[section].items():
            table.add_row(f"{section}: {name}", f"{number:,}")
    for name in ("namespaces", "leases", "requests", "links", "transfers"):
        table.add_row(name, f"{body[name]:,}")
    out.print(table)
    write_json(json_to, body)


@app.command(
    epilog="Examples:  [bold]kvpool explain --model kimi-linear-48b --tokens prompt.json[/]   |   "
    "[bold]kvpool explain --model kimi-linear-48b --tokens - --json - < prompt.json[/]"
)
def explain(
    model: Annotated[str, typer.Option(help="Preset whose layout the tokens were stored under")],
    tokens: Annotated[str, typer.Option(help="JSON file with a list of token ids; '-' is standard input")],
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block")] = 64,
    address: Address = "127.0.0.1:7777",
    insecure: Insecure = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: TokenFile = None,
    json_to: JsonTo = None,
) -> None:
    """Why a prompt's match is as long as it is: per group how far it reaches and what ends it."""
    layout = presets.load(model)
    ids = token_ids(tokens)

    async def work(pool: PoolClient) -> Any:
        ns = await pool.namespace(layout, block_tokens)
        return await pool.explain(ns, KeyChain(ns, ids))

    explanation = _with_pool(address, _access(insecure, ca, certificate, key, token), work)
    console(json_to).print(str(explanation), soft_wrap=True)
    write_json(json_to, explanation.as_dict())


@app.command(epilog="Example:  [bold]kvpool clear --yes[/]")
def clear(
    address: Address = "127.0.0.1:7777",
    insecure: Insecure = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: TokenFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    json_to: JsonTo = None,
) -> None:
    """Evict everything of this tenant that is not in use."""
    if not yes and not typer.confirm(f"Evict everything from the pool at {address}?"):
        raise typer.Exit(1)
    entries = _with_pool(address, _access(insecure, ca, certificate, key, token), lambda pool: pool.clear())
    console(json_to).print(f"{entries:,} entries evicted")
    write_json(json_to, {"entries": entries})


def token_ids(source: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The JSON list of token ids in a file, or on standard input for "-". Raises ConfigError."""
    try:
        body = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text())
        ids = np.asarray(body)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ConfigError(f"{source}: expected a JSON list of token ids")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read token ids from {source}: {error}") from error
    return ids.astype(np.int64)


register_cluster(app)
register_demo(app)
register_events(app)
register_security(app)
register_scheduling(app)
register_replay(app)

if __name__ == "__main__":
    main()
