"""``kvpool cluster``: who is in a cluster and how full."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.table import Table

from kvpool.options import Ca, Certificate, Insecure, JsonTo, Key, TokenFile, access, human
from kvpool.security import DEFAULT_TENANT
from kvtransport.bench.output import console, write_json
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, KVError

from .members import Member, State
from .pool import ClusterPool, connect_cluster

cluster = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at a cluster of pool nodes.")

Target = Annotated[
    str,
    typer.Option("--directory", "-d", help="Directory (valkey://HOST:PORT?name=POOL), or nodes as HOST:PORT,HOST:PORT"),
]


async def open_cluster(target: str, config: EndpointConfig, *, tenant: str = DEFAULT_TENANT) -> ClusterPool:
    """The cluster that a user named. Raises ConfigError, DirectoryError, NoNodeError."""
    if "://" in target:
        return await connect_cluster(target, config=config, connections=1, tenant=tenant)
    nodes = [n for n in target.split(",") if n]
    if not nodes:
        raise ConfigError("--directory is a URL such as valkey://HOST:PORT, or nodes as HOST:PORT,HOST:PORT")
    return await connect_cluster(nodes, config=config, connections=1, tenant=tenant)


async def status_of(pool: ClusterPool) -> dict[str, Any]:
    """What ``kvpool cluster status --json`` writes. Sizes in bytes."""
    stat = await pool.stat()
    nodes = []

    async def ask(member: Member) -> dict[str, Any]:
        try:
            return await (await pool.links.client(member)).link.call("member", timeout_s=1.0)
        except KVError:
            return {}

    members = sorted(pool.roster.members.values(), key=lambda m: (m.cluster, m.id))
    own = await asyncio.gather(*(ask(m) for m in members))
    for member, mine in zip(members, own, strict=True):
        answer = stat["nodes"].get(member.id)
        nodes.append(
            {
                "node": member.id,
                "cluster": member.cluster,
                "address": member.addresses[0],
                "state": str(member.state),
                "incarnation": member.incarnation.hex(),
                "capacity_bytes": member.capacity,
                "used_bytes": member.used if answer is None else answer["used_bytes"],
                "answers": answer is not None,
                "transfers": None if answer is None else answer.get("transfers"),
                "segments": mine.get("segments"),
                "unannounced": mine.get("unannounced"),
                "drain": mine.get("drain"),
                "keeping": mine.get("keeping"),
            }
        )
    return {
        "frozen": stat["frozen"],
        "used_bytes": stat["used_bytes"],
        "total_bytes": stat["total_bytes"],
        "nodes": nodes,
    }


@cluster.command(
    epilog="Examples:  [bold]kvpool cluster status -d valkey://127.0.0.1:6379[/]   |   "
    "[bold]kvpool cluster status -d 127.0.0.1:7777,127.0.0.1:7778 --json -[/]"
)
def status(
    directory: Target,
    insecure: Insecure = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: TokenFile = None,
    json_to: JsonTo = None,
) -> None:
    """Nodes by cluster: state, memory, segments, whether they answer, and how far drains and copies are.

    Copies are made when there should be more than one, when a node is lost, and for nodes that join. "held up": there is
    work, and the directory is away or has lost everything.
    """
    config = access(insecure, ca, certificate, key, token)

    async def work() -> dict[str, Any]:
        async with await open_cluster(directory, config) as pool:
            return await status_of(pool)

    body = asyncio.run(work())
    out = console(json_to)
    table = Table(title="the view is frozen: the directory is away or has lost everything" if body["frozen"] else None)
    for name in ("cluster", "node", "state", "memory", "segments", "transfers"):
        table.add_column(
            name, justify="left" if name in ("cluster", "node", "state") else "right", no_wrap=name == "memory"
        )
    for node in body["nodes"]:
        state = node["state"]
        if node["drain"] and node["drain"]["running"]:
            state += f" {node['drain']['done']:,}/{node['drain']['chains']:,}"
        named = node["node"] if node["node"] == node["address"] else f"{node['node']}\n{node['address']}"
        segments = "-" if node["segments"] is None else f"{node['segments']:,}"
        keeping = node["keeping"]
        if keeping and keeping["waiting"]:
            # Of a node that joined or was lost: how many chains have been looked at; else what is new or read most.
            done = (
                f"{max(keeping['scanned'] - keeping['waiting'], 0):,}/{keeping['scanned']:,}, "
                if keeping["scanned"]
                else ""
            )
            state += f"\ncopying, {done}{human(keeping['moved_bytes'])} so far" + (
                ", held up" if keeping["held_up"] else ""
            )
        if node["unannounced"]:
            segments += f"\n{node['unannounced']:,} to announce"
        table.add_row(
            node["cluster"],
            named,
            state if node["answers"] else f"[red]{state}, no answer",
            f"{human(node['used_bytes'])} of {human(node['capacity_bytes'])}",
            segments,
            "-" if node["transfers"] is None else f"{node['transfers']:,}",
        )
    out.print(table)
    write_json(json_to, body)


DRAIN_HELP = """Move what a node holds to the others, within a deadline and a bandwidth, and let it leave the cluster.

The node goes on by itself when this command is interrupted; the same command looks again, --stop takes it back (and ends a command that
waits, with exit code 1).

Examples:

  kvpool drain east-1 -d valkey://127.0.0.1:6379 --deadline 600 --gbps 10

  kvpool drain east-1 -d valkey://127.0.0.1:6379 --stop
"""
GBPS = 1e9 / 8


def drain(
    node: Annotated[str, typer.Argument(help="Id of the node")],
    directory: Target,
    deadline: Annotated[float, typer.Option(help="Seconds; what is left then is left to be missed", min=1)] = 300.0,
    gbps: Annotated[
        float | None, typer.Option(help="Bandwidth it may take, 1e9 bits a second \\[all]", min=0.001)
    ] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="End a drain in progress; the node takes new data again")
    ] = False,
    insecure: Insecure = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: TokenFile = None,
    json_to: JsonTo = None,
) -> None:
    config = access(insecure, ca, certificate, key, token)
    err = Console(stderr=True)

    async def work() -> dict[str, Any]:
        async with await open_cluster(directory, config) as pool:
            member = pool.roster.members.get(node)
            if member is None:
                raise ConfigError(f"there is no node {node!r}; there are {', '.join(sorted(pool.roster.members))}")
            client = await pool.links.client(member)
            args: dict[str, Any] = {"stop": True} if stop else {"deadline_s": deadline}
            if gbps is not None and not stop:
                args["bytes_per_s"] = gbps * GBPS
            answer = await client.link.call("drain", args)
            with RichProgress(console=err, transient=True) as bar:
                task = bar.add_task(f"draining {node}", total=None)
                while not stop and answer["drain"] is not None and not answer["drain"]["finished"]:
                    if Member.decode(answer["member"]).state is State.UP:
                        break  # taken back, by another who said --stop
                    await asyncio.sleep(0.2)
                    answer = await client.link.call("member")
                    bar.update(task, total=answer["drain"]["chains"] or None, completed=answer["drain"]["done"])
            return dict(answer["drain"] or {})

    body = asyncio.run(work())
    out = console(json_to)
    if stop:
        out.print(f"{node} takes new data again")
    elif not body.get("finished"):
        out.print(
            f"{node} takes new data again: its drain was ended by --stop, {body['done']:,} of {body['chains']:,} chains have been looked at, "
            f"{human(body['moved_bytes'])} moved"
        )
    else:
        out.print(
            f"{node} is drained and has left: {human(body['moved_bytes'])} moved, {body['skipped']:,} of {body['chains']:,} chains were "
            f"there already, {body['failed']:,} failed, {body['left']:,} left behind"
            + (f" ({body['note']})" if body["note"] else "")
        )
    write_json(json_to, body)
    if not stop and not body.get("finished"):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the cluster's commands to ``app``."""
    from .pull_cli import PULL_HELP, pull

    cluster.command("pull", help=PULL_HELP)(pull)
    app.add_typer(cluster, name="cluster")
    app.command("drain", help=DRAIN_HELP)(drain)
