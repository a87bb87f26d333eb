"""``kvpool``: the admin command, the demo and the planner."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from kvtransport import presets
from kvtransport.address import parse_address
from kvtransport.bench.output import console, write_json
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import KVError

from .client import PoolClient, connect
from .cluster.cli import register as register_cluster
from .commands_security import register as register_security
from .demo.cli import register as register_demo
from .events.cli import register as register_events
from .keys import KeyChain
from .options import Ca, Certificate, Insecure, JsonTo, Key, TokenFile, access, human, token_ids
from .replay.cli import register as register_replay
from .scheduling.cli import register as register_scheduling

app = typer.Typer(
    name="kvpool",
    help="Look into a pool daemon or a cluster of them, run the demo, plan a deployment.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Address = Annotated[str, typer.Option("--address", "-a", help="HOST:PORT of a kvpoold")]


def main() -> None:
    """Entry point of ``kvpool``: an error of ours is one line on standard error and exit code 2."""
    try:
        app()
    except KVError as error:
        print(f"kvpool: {error.code} error: {error.message}", file=sys.stderr)
        sys.exit(2)


def _with_pool(address: str, config: EndpointConfig, work: Callable[[PoolClient], Awaitable[Any]]) -> Any:
    host, port = parse_address(address)

    async def run() -> Any:
        async with await connect(host, port, connections=1, config=config) as pool:
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
    body = _with_pool(address, access(insecure, ca, certificate, key, token), lambda pool: pool.stat())
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

    explanation = _with_pool(address, access(insecure, ca, certificate, key, token), work)
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
    entries = _with_pool(address, access(insecure, ca, certificate, key, token), lambda pool: pool.clear())
    console(json_to).print(f"{entries:,} entries evicted")
    write_json(json_to, {"entries": entries})


register_cluster(app)
register_demo(app)
register_events(app)
register_security(app)
register_scheduling(app)
register_replay(app)

if __name__ == "__main__":
    main()
