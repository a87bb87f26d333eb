"""What a kvpoold says to Prometheus: sizes, hits by group and what ended them, evictions, bytes on the wire, latencies.

Needs the ``metrics`` extra (prometheus-client). Everything but latencies is read from the pool when it is asked for: counting costs
nothing in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvtransport.errors import ConfigError

BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of latencies, in seconds."""
REQUEST_BYTES = 8 << 10
REQUEST_S = 5.0
MAX_REQUESTS = 16
"""Requests at once; more are turned away."""


class Metrics:
    """The metrics of one pool. ``stat`` gives what :meth:`kvpool.server.PoolServer.stat` does. Raises ConfigError without the extra."""

    def __init__(self, stat: Callable[[], Mapping[str, Any]]) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigError("metrics need prometheus-client: pip install 'kvtransport[metrics]'") from error
        self._client = prometheus_client
        self._stat = stat
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(_Collector(self))
        self._calls = prometheus_client.Histogram(
            "kvpool_call_seconds", "Answering one call", ["verb", "outcome"], registry=self.registry, buckets=BUCKETS
        )
        self._transfers = prometheus_client.Histogram(
            "kvpool_transfer_seconds", "One put or get, from its call to its end", ["kind", "outcome"],
            registry=self.registry, buckets=BUCKETS,
        )  # fmt: skip

    def called(self, verb: str, seconds: float, outcome: str) -> None:
        """A call was answered; ``outcome`` is "ok" or the error's class."""
        self._calls.labels(verb, outcome).observe(seconds)

    def moved(self, kind: str, seconds: float, outcome: str) -> None:
        """A transfer ended; ``kind`` is "put" or "get"."""
        self._transfers.labels(kind, outcome).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return bytes(self._client.generate_latest(self.registry))

    def families(self) -> Iterator[Any]:
        """The metrics that come from the pool's own counts."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stat = self._stat()

        def family(kind: Any, name: str, text: str, labels: list[str], values: Mapping[Any, float]) -> Any:
            made = kind(f"kvpool_{name}", text, labels=labels)
            for key, value in values.items():
                made.add_metric(
                    [str(part) for part in (key if isinstance(key, tuple) else (key,))][: len(labels)], value
                )
            return made

        sizes = {kind: stat[f"{kind}_bytes"] for kind in ("total", "free", "used", "evictable")}
        yield family(GaugeMetricFamily, "memory_bytes", "The pool's memory", ["kind"], sizes)
        yield family(GaugeMetricFamily, "class_bytes", "Memory by what it is for", ["class"], stat["class_bytes"])
        yield family(GaugeMetricFamily, "group_bytes", "Memory by group of layers", ["group"], stat["group_bytes"])
        yield family(GaugeMetricFamily, "entries", "What is in the index", ["kind"], stat["entries"])
        open_now = {kind: stat[kind] for kind in ("active", "leases", "requests", "links", "transfers") if kind in stat}
        yield family(GaugeMetricFamily, "open", "What is in progress", ["kind"], open_now)
        yield family(CounterMetricFamily, "events", "What happened so far", ["event"], stat["counters"])
        yield family(CounterMetricFamily, "misses", "Lookups that found nothing", ["reason"], stat["misses"])
        yield family(CounterMetricFamily, "evictions", "Entries evicted", ["reason"], stat["evictions"])
        groups = stat["reach"]
        asked, reached = ({g: v[what] for g, v in groups.items()} for what in ("asked_tokens", "reached_tokens"))
        yield family(CounterMetricFamily, "asked_tokens", "Tokens looked up, by group", ["group"], asked)
        yield family(CounterMetricFamily, "reached_tokens", "Tokens a group alone could restore", ["group"], reached)
        ended = {(g, reason): n for g, v in groups.items() for reason, n in v["ended_by"].items()}
        yield family(CounterMetricFamily, "ended", "What ended a group's reach", ["group", "reason"], ended)
        yield family(CounterMetricFamily, "wire", "Payload through transfers", ["what"], stat.get("wire", {}))


class _Collector:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Any]:
        return []  # nothing is read when it is registered

    def collect(self) -> Iterator[Any]:
        return self._metrics.families()


class MetricsServer:
    """``GET /metrics`` over HTTP, in the pool's event loop: nothing else, to nobody for long."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Returns where it listens. Raises ConfigError."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES)
        except OSError as error:
            raise ConfigError(f"metrics_port = {port}: cannot listen there: {error.strerror or error}") from error
        name = self._server.sockets[0].getsockname()
        return name[0], name[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._open:
                writer.transport.abort()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            async with asyncio.timeout(REQUEST_S):
                if len(self._open) > MAX_REQUESTS:
                    await reader.read(REQUEST_BYTES)  # closing with unread bytes would reset the answer away
                    await self._answer(writer, "503 Service Unavailable", b"too many requests at once\n")
                    return
                line = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].split(b" ")
                if line[0] != b"GET" or len(line) < 2:
                    await self._answer(writer, "405 Method Not Allowed", b"only GET\n")
                elif line[1].split(b"?")[0] != b"/metrics":
                    await self._answer(writer, "404 Not Found", b"there is /metrics only\n")
                else:
                    await self._answer(writer, "200 OK", self._metrics.text())
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # not HTTP, too slow, too long, or gone
        finally:
            self._open.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @staticmethod
    async def _answer(writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
