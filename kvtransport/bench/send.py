"""``kvbench send``: one request's cache to a ``kvbench serve``, and what the path between them can carry."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import presets
from ..endpoint import Endpoint, EndpointConfig
from ..errors import ConfigError, IntegrityError
from ..identity import Token
from ..io.tcp import TcpOptions
from ..link import Link
from ..manifest import Manifest
from ..tls import TlsConfig
from . import prefill
from .connections import congestion_of_link, describe_telemetry
from .loopback import MAX_CONNECTIONS
from .loopback_memory import CacheMemory, page_sizes
from .pipeline import render_answer
from .progress import Steps
from .serve import PREPARE, REPORT
from .summary import spread
from .worker import cpu_seconds

GB = 1e9
ANSWER_S = 60.0
SECRETS = ("token", "ca", "cert", "key")
"""Options that are not written down: a secret, and paths that mean nothing elsewhere."""


@dataclass(frozen=True, slots=True)
class SendOptions:
    """Where to and what. None of ``connections``, ``congestion``, ``chunk_bytes``: what the transport chooses."""

    host: str
    port: int
    preset: str = "kimi-linear-48b"
    tokens: int = 32_768
    connections: int | None = None
    congestion: str | None = None
    chunk_bytes: int | None = None
    page_bytes: int | None = None
    contiguous: bool = False
    checksum: bool = True
    repeat: int = 5
    insecure: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    token: str | None = None
    deadline_s: float = 120.0

    def check(self) -> None:
        """Raises ConfigError naming the first option that makes no sense."""
        presets.preset(self.preset)
        for name, value, low, high in (
            ("the port", self.port, 1, 65_535),
            ("--tokens", self.tokens, 1, 1 << 24),
            ("--repeat", self.repeat, 1, 10_000),
            ("--connections", self.connections or 1, 1, MAX_CONNECTIONS),
            ("--page-bytes", self.page_bytes or 64, 64, 1 << 30),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, got {value}")


def tls_config(
    ca: Path | None, cert: Path | None, key: Path | None, server_name: str | None = None
) -> TlsConfig | None:
    """None without ``--ca``. Raises ConfigError for a certificate without its key, or without authorities."""
    if (cert is None) != (key is None):
        raise ConfigError("--cert and --key belong together")
    if ca is None:
        if cert is not None:
            raise ConfigError("TLS needs --ca, the authorities the other end is held against")
        return None
    return TlsConfig(ca, cert, key, server_name=server_name)


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """``host``, ``host:port`` or ``[v6]:port``. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if text.startswith("[") and text.endswith("]"):
        return text[1:-1], default_port
    if not colon or (":" in host and not host.startswith("[")):
        return text, default_port
    if not host or not port.isdigit():
        raise ConfigError(f"an address is HOST or HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)


async def measure(options: SendOptions, step: Callable[[str], None]) -> dict[str, Any]:
    """Dial, send ``repeat`` times after one that does not count; returns what ``--json`` writes.

    Raises ConnectError, InsecureBindError, the server's error, IntegrityError when bytes differ.
    """
    options.check()
    layout = presets.load(options.preset)
    settings: dict[str, Any] = {
        "name": "kvbench-send",
        "insecure": options.insecure,
        "tls": tls_config(options.ca, options.cert, options.key, options.server_name),
    }
    if options.token is not None:
        settings["token"] = Token.shared(options.token)
    if options.congestion is not None:
        settings["tcp"] = TcpOptions(congestion=options.congestion)
    if options.chunk_bytes is not None:
        settings["chunk_bytes"] = options.chunk_bytes
    empty = Manifest.of_layout(layout, options.tokens, transfer=bytes(16))
    async with Endpoint(EndpointConfig(**settings)) as endpoint:
        step(f"dialling {options.host}:{options.port}")
        dialled = time.monotonic()
        link = await endpoint.connect(options.host, options.port, connections=options.connections)
        dial_s = time.monotonic() - dialled
        sizes = page_sizes(layout, options.page_bytes, contiguous=options.contiguous)
        memory = CacheMemory(empty, sizes, count=1, seed=2, name="kvbench-send")
        try:
            step("filling memory with random bytes")
            memory.fill_random()
            digests = memory.digests(0)
            rounds = []
            for i in range(-1, options.repeat):
                step("warming up" if i < 0 else f"round {i + 1} of {options.repeat}")
                measured = await _round(options, link, memory, digests)
                if i >= 0:
                    rounds.append(measured)
            told = describe_telemetry(link)
            facts = {"connections": len(link.connections), "congestion": congestion_of_link(link)}
        finally:
            await link.close()
            memory.close()
    reached = statistics.median(r["goodput_gbps"] for r in rounds)
    times = prefill.of_preset(options.preset)
    return {
        **{k: v for k, v in asdict(options).items() if k not in SECRETS},
        "tls": options.ca is not None,
        **facts,
        "bytes": empty.total_bytes,
        "dial_s": dial_s,
        "goodput_gbps": spread([r["goodput_gbps"] for r in rounds]),
        "sender_cpu_s_per_gb": statistics.median(r["sender_cpu_s_per_gb"] for r in rounds),
        "receiver_cpu_s_per_gb": statistics.median(r["receiver_cpu_s_per_gb"] for r in rounds),
        "telemetry": told,
        "rounds": rounds,
        "answer": prefill.answer(options.preset, times, reached, told.get("rtt_s") or 0.0),
    }


async def _round(options: SendOptions, link: Link, memory: CacheMemory, digests: list[int]) -> dict[str, Any]:
    asked = {
        "preset": options.preset,
        "tokens": options.tokens,
        "contiguous": options.contiguous,
        "checksum": options.checksum,
        "page_bytes": options.page_bytes,
        "deadline_s": options.deadline_s,
    }
    prepared = await link.call(PREPARE, asked, timeout_s=ANSWER_S)
    manifest = Manifest.of_layout(presets.load(options.preset), options.tokens, transfer=prepared["transfer"])
    cpu, started = cpu_seconds(), time.monotonic()
    sender = link.open(manifest, checksum=options.checksum, deadline_s=options.deadline_s)
    for (layer, tensor), pages in memory.pages[0].items():
        sender.ready(layer, tensor, pages)
    await sender.seal()
    seconds, cpu = time.monotonic() - started, cpu_seconds() - cpu
    told = await link.call(REPORT, timeout_s=ANSWER_S)
    if told["digests"] != digests:
        raise IntegrityError("bytes that arrived are not the bytes that were sent")
    gb = manifest.total_bytes / GB
    return {
        "seconds": seconds,
        "goodput_gbps": gb * 8 / seconds,
        "sender_cpu_s_per_gb": cpu / gb,
        "receiver_cpu_s_per_gb": told["cpu_s"] / gb,
        "chunks": told["chunks"],
        "checksums_verified": told["checksums_verified"],
        "resent_bytes": sender.stats.resent_bytes,
        "spilled_bytes": sender.stats.spilled_bytes,
        "verified": True,
    }


async def run(options: SendOptions, out: Console) -> dict[str, Any]:
    """:func:`measure` with live progress and the tables."""
    options.check()
    with Steps(options.repeat + 3, "send") as steps:
        body = await measure(options, steps.step)
    render(out, body)
    return body


def render(out: Console, body: dict[str, Any]) -> None:
    """The same for people."""
    table = Table(title=f"{body['preset']}, {body['tokens']:,} tokens, {body['bytes'] / 1e6:,.1f} MB to {body['host']}")
    for heading in ("round", "seconds", "Gbps", "sender CPU s/GB", "receiver CPU s/GB"):
        table.add_column(heading, justify="right")
    for i, each in enumerate(body["rounds"], 1):
        table.add_row(
            str(i),
            f"{each['seconds']:.3f}",
            f"{each['goodput_gbps']:.2f}",
            f"{each['sender_cpu_s_per_gb']:.3f}",
            f"{each['receiver_cpu_s_per_gb']:.3f}",
        )
    out.print(table)
    rtt = body["telemetry"].get("rtt_s")
    shown = "unknown" if rtt is None else f"{rtt * 1e3:.2f} ms"
    out.print(f"{body['connections']} connections, {body['congestion']}, round trip {shown}, every byte verified")
    render_answer(out, body["answer"])
