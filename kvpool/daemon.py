"""kvpoold: one node of the pool, in a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtransport.buffers import Arena
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import ConfigError, KVError
from kvtransport.flow.spilling import SpillPolicy

from .allocator import bound_heaps
from .arena import PageArena
from .cluster.agent import NodeAgent
from .cluster.announcing import Watchers
from .collecting import Collector
from .config import DaemonConfig, load, parse_size
from .core import PoolCore
from .events.log import EventLog
from .events.publisher import EventPublisher
from .local import LocalServer
from .metrics import Metrics, MetricsServer
from .security import RefusalReport
from .server import PoolServer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

EPILOG = """
Examples:

  kvpoold --memory 8GiB

  kvpoold --host 0.0.0.0 --tls-authority ca.pem --tls-certificate node1.pem --tls-key node1.key --memory 64GiB
  (files of 'kvpool certs')

  kvpoold --host 0.0.0.0 --insecure --memory 64GiB   (a network you trust)

  kvpoold --config /etc/kvpoold.toml

  kvpoold --memory 8GiB --events tcp://127.0.0.1:5557 --events-replay tcp://127.0.0.1:5558   (KV cache events, as vLLM's)

  kvpoold --memory 64GiB --join valkey://10.0.0.5:6379?name=pool --cluster east --advertise 10.0.0.7:7777
"""


@app.command(epilog=EPILOG)
def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for any free one [7777]")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory for the pool, such as 8GiB [1GiB]")] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction: marconi, lru, s3fifo, sieve or gdsf \\[marconi]")] = None,
    name: Annotated[str | None, typer.Option(help="Name shown to peers")] = None,
    tls_authority: Annotated[Path | None, typer.Option(help="PEM file of the certificate authority: TLS 1.3")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file of this node's certificate")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key")] = None,
    tokens: Annotated[Path | None, typer.Option(help="File of the tokens that clients may show")] = None,
    insecure: Annotated[
        bool | None, typer.Option(help="Listen beyond loopback without encryption", show_default=False)
    ] = None,
    join: Annotated[
        str | None, typer.Option(help="Directory of the cluster to join, such as valkey://HOST:PORT")
    ] = None,
    node: Annotated[str | None, typer.Option(help="Id of this node in the cluster (default: its address)")] = None,
    cluster: Annotated[str | None, typer.Option(help="Cluster (datacenter) this node is in (default: default)")] = None,
    advertise: Annotated[
        str | None, typer.Option(help="HOST:PORT under which others reach it (default: where it listens)")
    ] = None,
    events: Annotated[
        str | None, typer.Option(help="Publish what is stored and removed (ZeroMQ), such as tcp://127.0.0.1:5557 \\[off]")
    ] = None,
    events_replay: Annotated[
        str | None, typer.Option(help="Where subscribers ask for events they missed, such as tcp://127.0.0.1:5558 \\[off]")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port for Prometheus (GET /metrics), 0 for any free one \\[off]")
    ] = None,
    grace_s: Annotated[float | None, typer.Option(help="Seconds for transfers in progress after SIGTERM [10]")] = None,
) -> None:
    """Keep KVCache for reuse: the pool's daemon.

    Prints one line, "kvpoold listening on HOST:PORT", once it accepts connections. SIGTERM or Ctrl-C finishes
    transfers in progress, a second one stops at once.
    """
    try:
        given: dict[str, object] = {"host": host, "port": port, "memory": memory, "policy": policy, "name": name}
        given |= {
            "tls_authority": tls_authority,
            "tls_certificate": tls_certificate,
            "tls_key": tls_key,
            "tokens": tokens,
        }
        joining = {"join": join, "node": node, "cluster": cluster, "advertise": advertise}
        joining |= {"events": events, "events_replay": events_replay}
        settings = load(
            config, {**given, "insecure": insecure, "grace_s": grace_s, "metrics_port": metrics_port, **joining}
        )
        clean = _run(run(settings))
    except KVError as error:
        print(f"kvpoold: {error.message}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if clean else 1)


def _run(work: Coroutine[Any, Any, bool]) -> bool:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return bool(uvloop.run(work))


async def run(config: DaemonConfig) -> bool:
    """Serve until a signal; whether everything in progress could finish. Raises KVError when it cannot start."""
    loop = asyncio.get_running_loop()
    try:
        arena = Arena(config.memory_bytes, lock="auto" if config.lock else "off", name="kvpoold")
    except KVError as error:
        raise ConfigError(f"memory = {config.memory}: {error.message}") from error
    pages = PageArena(arena, config.page_bytes, share=bool(config.local_socket))
    core = PoolCore(
        pages,
        clock=time.monotonic,
        tenant_quota_bytes={tenant: parse_size(size) for tenant, size in config.quotas.items()},
        prefix_floor_bytes=parse_size(config.prefix_floor) if config.prefix_floor else None,
        policy=config.policy,
    )
    # What the daemon sends lies in its own blocks and stays pinned: there is nothing to spill.
    endpoint_config = EndpointConfig(
        name=config.name,
        insecure=config.insecure,
        keepalive_s=config.keepalive_s,
        dead_after_s=config.dead_after_s,
        reconnect_s=config.reconnect_s,
        tls=config.tls_config,
        tokens=config.token_store,
        tenant_bytes_per_s={tenant: gbps * 1e9 / 8 for tenant, gbps in config.tenant_gbps.items()},
        spill=SpillPolicy(budget_bytes=0),
    )
    endpoint = Endpoint(endpoint_config)
    server = PoolServer(endpoint, core, window_bytes=config.window_bytes, explain_tenants=config.explain_tenants)
    agent = NodeAgent(
        endpoint,
        core,
        node=config.node,
        cluster=config.cluster,
        capacity=config.memory_bytes,
        clock=time.monotonic,
        replicas=config.replica_policy,
        rebalance=config.rebalance,
        copy_bytes_per_s=config.copy_gbps * 1e9 / 8,
        load=lambda: server.sending_bytes,
    )
    server.on_read = agent.read
    agent.on_unreachable = lambda why: print(f"kvpoold: warning: {why}", file=sys.stderr, flush=True)
    publisher = _events(config, core)
    served: MetricsServer | None = None
    lent: LocalServer | None = None
    if config.local_socket:
        lent = LocalServer(Path(config.directory) / config.local_socket, arena, pages)
        server.only_tenant = config.local_tenant
    if config.metrics_port is not None:
        server.metrics = Metrics(server.stat)
        served = MetricsServer(server.metrics)
    stops = Stops(loop)
    collector = Collector(time.monotonic)
    collector.start()
    server.on_tick = lambda: collector.tick(quiet=not server.active)
    try:
        host, port = await endpoint.listen(config.host, config.port)
        for note in [*arena.info.notes, *_security(endpoint, config)]:
            print(f"kvpoold: note: {note}", file=sys.stderr)
        if lent is not None:
            lent.listen()
        if publisher is not None:
            await publisher.start()
            print(f"kvpoold: events on {publisher.endpoint}, replays on {publisher.replay or 'none'}", file=sys.stderr, flush=True)
        if served is not None:
            where = await served.listen(config.metrics_host, config.metrics_port or 0)
            print(f"kvpoold: metrics on http://{where[0]}:{where[1]}/metrics", file=sys.stderr, flush=True)
        print(f"kvpoold listening on {host}:{port}, {arena.info.nbytes} bytes", flush=True)
        await _join(agent, config, f"{host}:{port}", endpoint_config)
        await stops.first.wait()
        print("kvpoold: stopping; transfers in progress may finish", file=sys.stderr)
        draining = loop.create_task(server.drain(config.grace_s))
        at_once = loop.create_task(stops.second.wait())
        await asyncio.wait({draining, at_once}, return_when=asyncio.FIRST_COMPLETED)
        clean = draining.done() and draining.result()
        for task in (draining, at_once):
            task.cancel()
        if not clean:
            print(f"kvpoold: {server.active} transfers were cut off", file=sys.stderr)
        return clean
    finally:
        stops.close()
        server.on_tick = None
        collector.stop()
        await agent.leave()
        if served is not None:
            await served.close()
        if lent is not None:
            await lent.close()
        await server.close()
        await endpoint.close()
        if publisher is not None:
            await publisher.close()
        pages.close()


def _events(config: DaemonConfig, core: PoolCore) -> EventPublisher | None:
    """The publisher of the pool's events, if they are wanted; it watches from now on."""
    if not config.events:
        return None
    log = EventLog(clock=time.time, tenant=config.events_tenant)
    core.watcher = log if core.watcher is None else Watchers(core.watcher, log)
    return EventPublisher(
        log, config.events, config.events_replay, topic=config.events_topic, insecure=config.insecure
    )


def _security(endpoint: Endpoint, config: DaemonConfig) -> list[str]:
    """Tell of peers that are refused and of files that were read again; returns what there is to say at the start."""

    def say(line: str) -> None:
        print(f"kvpoold: {line}", file=sys.stderr, flush=True)

    endpoint.on_refused = RefusalReport(time.monotonic, say).refused
    notes: list[str] = []
    credentials = endpoint.admission.credentials
    if credentials is not None:
        credentials.on_change = say
        notes += credentials.get().notes
    tokens = endpoint.config.tokens
    if tokens is not None and tokens.file is not None:
        tokens.file.on_change = say
        if credentials is None:
            notes.append(
                "tokens without TLS keep strangers out by mistake, not on purpose: who reads the network can use them"
            )
    if config.insecure:
        notes.append("insecure = true: nothing is encrypted or authenticated unless TLS is configured")
    return notes


async def _join(agent: NodeAgent, config: DaemonConfig, listening: str, endpoint_config: EndpointConfig) -> None:
    """Join the configured cluster, if there is one."""
    address = config.advertise or listening
    agent.node = config.node or address
    agent.addresses = (address,)
    if not config.join:
        return
    if not config.advertise and config.host in ("", "0.0.0.0", "::"):
        raise ConfigError(
            f"listening on {config.host or 'all addresses'} says nothing of where others reach this node: set advertise"
        )
    from .cluster.valkey import open_directory

    directory = open_directory(config.join)
    try:
        await agent.join(directory, address, ttl_s=config.ttl_s, config=endpoint_config)
    except KVError:
        await directory.close()
        raise
    print(f"kvpoold joined as {agent.node} of cluster {config.cluster}", flush=True)


class Stops:
    """The first and the second SIGTERM or SIGINT."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)


def main() -> None:
    bound_heaps()
    app()


if __name__ == "__main__":
    main()
