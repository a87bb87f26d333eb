"""``kvpool cluster pull``: a prefix from one cluster into another."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress as RichProgress

from kvpool.keys import KeyChain
from kvpool.options import Ca, Certificate, Insecure, JsonTo, Key, TokenFile, access, human, token_ids
from kvpool.security import DEFAULT_TENANT
from kvtransport import presets
from kvtransport.bench.output import console, write_json

from .cli import GBPS, Target, open_cluster
from .pulling import DEADLINE_S, Pulled

PULL_HELP = """Bring the longest prefix of a prompt that other clusters can restore into one cluster.

Its nodes read what they lack from the others' nodes, below live transfers, within a deadline and a bandwidth. Running it again copies only
what is still missing. Exit code 1: not all of it came (the reason is said).

Examples:

  kvpool cluster pull --into decode --model kimi-linear-48b --tokens prompt.json -d valkey://127.0.0.1:6379

  kvpool cluster pull --into decode --from prefill --model kimi-linear-48b --tokens - --gbps 2 --deadline 30 --json - -d valkey://10.0.0.5:6379 < prompt.json
"""


def pull(
    directory: Target,
    into: Annotated[str, typer.Option(help="The cluster that shall have it")],
    model: Annotated[str, typer.Option(help="Preset whose layout the tokens were stored under")],
    tokens: Annotated[str, typer.Option(help="JSON file with a list of token ids; '-' is standard input")],
    sources: Annotated[
        list[str] | None, typer.Option("--from", help="Cluster to read from; may be said several times \\[all others]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens, at most \\[all]", min=1)] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block")] = 64,
    tenant: Annotated[str, typer.Option(help="Whose it is: the tenant of the token or certificate")] = DEFAULT_TENANT,
    deadline: Annotated[
        float, typer.Option(help="Seconds; what is missing then stays missing", min=0.1, max=3600)
    ] = DEADLINE_S,
    gbps: Annotated[
        float | None, typer.Option(help="Bandwidth it may take, 1e9 bits a second \\[what the nodes allow]", min=0.001)
    ] = None,
    insecure: Insecure = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: TokenFile = None,
    json_to: JsonTo = None,
) -> None:
    config = access(insecure, ca, certificate, key, token)
    layout, ids = presets.load(model), token_ids(tokens)
    seconds = 0.0

    async def work() -> Pulled:
        nonlocal seconds
        async with await open_cluster(directory, config, tenant=tenant) as pool:
            ns = await pool.namespace(layout, block_tokens)
            with RichProgress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(f"pulling into {into}", total=None)
                begin = time.monotonic()
                pulled = await pool.pull(
                    ns,
                    KeyChain(ns, ids),
                    into=into,
                    sources=sources or None,
                    length=length,
                    deadline_s=deadline,
                    bytes_per_s=None if gbps is None else gbps * GBPS,
                    on_progress=lambda p: bar.update(task, total=p.parts or None, completed=p.done),
                )
                seconds = time.monotonic() - begin
                return pulled

    pulled = asyncio.run(work())
    body: dict[str, Any] = {**msgspec.to_builtins(pulled), "seconds": seconds}
    out = console(json_to)
    said = f"{human(pulled.moved_bytes)} in {seconds:.1f} s, {pulled.done:,} of {pulled.parts:,} parts"
    if pulled.wanted <= pulled.before:
        out.print(f"{into} has it already: {pulled.before:,} tokens, and the others no more")
    elif pulled.finished:
        out.print(f"{into} can restore {pulled.reached:,} tokens now ({pulled.before:,} before): {said}")
    else:
        out.print(
            f"{into} has not got all of it, {pulled.reached:,} of {pulled.wanted:,} tokens: {said} ({pulled.note})"
        )
    write_json(json_to, body)
    if not pulled.finished:
        raise typer.Exit(1)
