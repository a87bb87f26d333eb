"""``kvbench loopback``: one request's cache from process to process over TCP on this machine.

Sender and receiver are processes of their own. A round is timed by the sender, from opening the transfer until
the consumer has confirmed that every byte is verified and in its place; after it the hashes of source and
destination are compared, tensor by tensor, and the destination is overwritten before the next one.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from .. import presets
from ..buffers import native_available
from ..errors import ConfigError
from ..manifest import Manifest, new_transfer_id
from ..tls import TlsConfig, implementation, require_cryptography
from . import throwaway
from .baseline import Baseline, BaselineRound, Variant, compare, variants
from .crew import Crew, Process
from .environment import child_environment
from .loopback_memory import default_buffer_bytes, page_sizes
from .summary import paired_ratio, spread

START_S = 120.0
"""For filling the memory with random bytes and dialling."""
GB = 1e9
MAX_CONNECTIONS = 64
MAX_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class LoopbackOptions:
    """What to measure. Bytes, tokens, seconds; ``page_bytes`` None: the block of 16 tokens of each tensor.

    ``congestion`` None: the system's default. ``buffer_bytes`` None: larger than the processor's caches.
    """

    preset: str = "kimi-linear-48b"
    tokens: int = 32_768
    connections: int = 4
    chunk_bytes: int = 1 << 20
    page_bytes: int | None = None
    contiguous: bool = False
    checksum: bool = True
    congestion: str | None = None
    repeat: int = 5
    warmup: int = 1
    buffer_bytes: int | None = None
    baseline: bool = False
    """The C loop in turns with ours, contiguous, plain and (with checksums) hashing the same bytes."""
    tls: bool = False
    """TLS 1.3, in turns with the same without it and with a C loop over the same OpenSSL."""
    deadline_s: float = 120.0

    def check(self) -> None:
        """Raises ConfigError naming the first option that makes no sense."""
        bounds = (
            ("--tokens", self.tokens, 1, 1 << 24),
            ("--connections", self.connections, 1, MAX_CONNECTIONS),
            ("--chunk-bytes", self.chunk_bytes, 4096, MAX_CHUNK),
            ("--repeat", self.repeat, 1, 10_000),
            ("--warmup", self.warmup, 0, 1_000),
            ("--buffer-bytes", self.buffer_bytes or 0, 0, 1 << 36),
            ("--page-bytes", self.page_bytes if self.page_bytes is not None else 64, 64, 1 << 30),
        )
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, got {value}")
        if self.tls:
            require_cryptography()
        if self.contiguous and self.page_bytes is not None:
            raise ConfigError("--contiguous and --page-bytes exclude each other: contiguous memory has no pages")
        presets.preset(self.preset)


@dataclass(frozen=True, slots=True)
class Round:
    """One transfer. CPU seconds are user and system time of all threads of that process."""

    seconds: float
    goodput_gbps: float
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float
    chunks: int
    resent_bytes: int
    spilled_bytes: int
    checksums_verified: int
    verified: bool


class Loopback:
    """Two processes and a link between them; use as a context manager, then :meth:`round`.

    Raises the workers' errors, RemoteError when one of them dies, DeadlineError when one does not answer;
    leaving the context ends both whatever happened.
    """

    def __init__(self, options: LoopbackOptions, progress: Callable[[int], None] | None = None) -> None:
        options.check()
        self.options = options
        self.layout = presets.load(options.preset)
        self.manifest = Manifest.of_layout(self.layout, options.tokens, transfer=bytes(16))
        self.congestion = "unknown"
        self.copies = 1
        self.port = 0
        """Where the receiver listens."""
        self.cipher = ""
        self.kernel_tls = False
        self.tls: TlsConfig | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._crew = Crew(progress)
        self._done = 0

    def __enter__(self) -> Self:
        buffer_bytes = default_buffer_bytes() if self.options.buffer_bytes is None else self.options.buffer_bytes
        config = {**asdict(self.options), "buffer_bytes": buffer_bytes}
        try:
            if self.options.tls:
                self._directory = tempfile.TemporaryDirectory()
                self.tls = throwaway.make(Path(self._directory.name))
                config["tls_files"] = [str(self.tls.authority), str(self.tls.certificate), str(self.tls.key)]
            self._receiver = self._start("receiver", {**config, "seed": 1})
            listening = self._crew.wait(self._receiver, "started", START_S)
            self.copies = listening["copies"]
            self.port = int(listening["port"])
            self._sender = self._start(
                "sender", {**config, "seed": 2, "host": listening["host"], "port": listening["port"]}
            )
            started = self._crew.wait(self._sender, "started", START_S)
            self.congestion, self.cipher, self.kernel_tls = (
                started[name] for name in ("congestion", "cipher", "kernel_tls")
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        return self._crew.pids

    def round(self) -> Round:
        """Move the cache once."""
        command = {"transfer": new_transfer_id().hex(), "round": self._done}
        self._done += 1
        limit = self.options.deadline_s + 30.0
        self._receiver.say(command)
        self._crew.wait(self._receiver, "expecting", limit)
        self._sender.say(command)
        sent = self._crew.wait(self._sender, "done", limit)
        received = self._crew.wait(self._receiver, "done", limit)
        nbytes = self.manifest.total_bytes
        return Round(
            seconds=sent["seconds"],
            goodput_gbps=nbytes * 8 / GB / sent["seconds"],
            sender_cpu_s_per_gb=sent["cpu_s"] / (nbytes / GB),
            receiver_cpu_s_per_gb=received["cpu_s"] / (nbytes / GB),
            chunks=received["chunks"],
            resent_bytes=sent["resent_bytes"],
            spilled_bytes=sent["spilled_bytes"],
            checksums_verified=received["checksums_verified"],
            verified=received["bytes"] == nbytes and received["digests"] == sent["digests"],
        )

    def close(self) -> None:
        """End both processes and wait for them. Idempotent."""
        self._crew.close()
        if self._directory is not None:
            self._directory.cleanup()

    def _start(self, role: str, config: Mapping[str, Any]) -> Process:
        worker = self._crew.start(
            role, [sys.executable, "-m", "kvtransport.bench.loopback_worker"], child_environment()
        )
        worker.say({**config, "role": role})
        return worker


Others = dict[Variant, list[BaselineRound]]


def tls_cost(rounds: list[Round], plain: list[Round], bench: Loopback) -> dict[str, Any]:
    """What TLS costs beside the same transfer without it, taken in turns: ratios of rounds that belong together."""

    def cpu(r: Round) -> float:
        return r.sender_cpu_s_per_gb + r.receiver_cpu_s_per_gb

    return {
        "cipher": bench.cipher,
        "kernel": bench.kernel_tls,
        "openssl": implementation().tls_version(),
        "plain_goodput_gbps": spread([r.goodput_gbps for r in plain]),
        "plain_cpu_s_per_gb": spread([cpu(r) for r in plain])["median"],
        "cpu_s_per_gb": spread([cpu(r) for r in rounds])["median"],
        "goodput_ratio_to_plain": paired_ratio([r.goodput_gbps for r in rounds], [r.goodput_gbps for r in plain]),
        "cpu_ratio_to_plain": paired_ratio([cpu(r) for r in rounds], [cpu(r) for r in plain]),
        "plain_rounds": [asdict(r) for r in plain],
    }


def report(
    bench: Loopback, rounds: list[Round], others: Others | None = None, plain: list[Round] | None = None
) -> dict[str, Any]:
    """Everything ``kvbench loopback --json`` prints. Medians over ``rounds``; Gbps is 1e9 payload bits a second."""
    options = bench.options
    sizes = page_sizes(bench.layout, options.page_bytes, contiguous=options.contiguous)
    by_tensor = {
        f"{bench.layout.groups[s.group].name}/{s.spec.name}": sizes[s.layer, s.tensor] for s in bench.layout.slots()
    }
    total = bench.manifest.total_bytes

    def median(name: str) -> float:
        return float(statistics.median(getattr(r, name) for r in rounds))

    seconds = median("seconds")
    return {
        "preset": options.preset,
        "tokens": options.tokens,
        "bytes": total,
        "seconds": seconds,
        "goodput_gbps": total * 8 / GB / seconds,
        "connections": options.connections,
        "chunk_bytes": options.chunk_bytes,
        "page_bytes": options.page_bytes if options.page_bytes is not None else max(by_tensor.values()),
        "page_bytes_by_tensor": by_tensor,
        "contiguous": options.contiguous,
        "checksum": options.checksum,
        "verified": all(r.verified for r in rounds),
        "sender_cpu_s_per_gb": median("sender_cpu_s_per_gb"),
        "receiver_cpu_s_per_gb": median("receiver_cpu_s_per_gb"),
        "congestion": bench.congestion,
        "congestion_asked": options.congestion,
        "copies": bench.copies,
        "native": native_available,
        "warmup": options.warmup,
        "goodput_gbps_spread": spread([r.goodput_gbps for r in rounds]),
        "rounds": [asdict(r) for r in rounds],
        "baseline": compare(rounds, others) if others else None,
        "tls": tls_cost(rounds, plain, bench) if plain else None,
    }


def run(options: LoopbackOptions, out: Console) -> dict[str, Any]:
    """Measure, with live progress on standard error, print the table to ``out``; returns :func:`report`."""
    options.check()  # before the display starts: its error is one line
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    rounds: list[Round] = []
    others: Others = {}
    with progress, contextlib.ExitStack() as stack:
        task = progress.add_task("starting the processes", total=None)
        bench = stack.enter_context(Loopback(options, lambda moved: progress.update(task, completed=moved)))
        total = bench.manifest.total_bytes
        loop: Baseline | None = None
        beside: Loopback | None = None
        plain: list[Round] = []
        if options.tls:
            beside = stack.enter_context(Loopback(replace(options, tls=False)))
        if options.baseline or options.tls:
            loop = stack.enter_context(
                Baseline(
                    total,
                    connections=options.connections,
                    copies=bench.copies,
                    congestion=options.congestion,
                    tls=bench.tls,
                )
            )
            others = {variant: [] for variant in variants(hashing=options.checksum)}
        for i in range(options.warmup + options.repeat):
            at = i - options.warmup
            what = "warming up" if at < 0 else f"round {at + 1} of {options.repeat}"
            progress.reset(task, description=what, total=total, completed=0)
            measured = bench.round()
            progress.update(task, completed=total)
            if at >= 0:
                rounds.append(measured)
            if beside is not None:
                progress.update(task, description=f"{what}, without TLS")
                measured = beside.round()
                if at >= 0:
                    plain.append(measured)
            for variant in others:
                assert loop is not None
                progress.update(task, description=f"{what}, C loop, {variant.name}")
                theirs = loop.round(variant.call, hashing=variant.hashing)
                if at >= 0:
                    others[variant].append(theirs)
        body = report(bench, rounds, others, plain)
    render(out, body)
    return body


def render(out: Console, body: Mapping[str, Any]) -> None:
    """The same for people."""
    table = Table(title=f"{body['preset']}, {body['tokens']:,} tokens, {body['bytes'] / 1e6:,.1f} MB over loopback")
    for heading in ("round", "seconds", "Gbps", "sender CPU s/GB", "receiver CPU s/GB", "verified"):
        table.add_column(heading, justify="right")

    def row(name: str, of: Mapping[str, Any], style: str | None = None) -> None:
        table.add_row(
            name,
            f"{of['seconds']:.3f}",
            f"{of['goodput_gbps']:.2f}",
            f"{of['sender_cpu_s_per_gb']:.3f}",
            f"{of['receiver_cpu_s_per_gb']:.3f}",
            "yes" if of["verified"] else "[red]NO[/]",
            style=style,
        )

    for i, each in enumerate(body["rounds"], 1):
        row(str(i), each, "dim")
    row("median", body)
    out.print(table)
    pages = "contiguous" if body["contiguous"] else f"pages of {body['page_bytes']:,} bytes, scattered at both ends"
    asked = body["congestion_asked"]
    refused = f" (asked for {asked}: not allowed here)" if asked not in (None, body["congestion"]) else ""
    out.print(
        f"{body['connections']} connections, {body['congestion']}{refused}, chunks of {body['chunk_bytes']:,} bytes, {pages}, "
        f"checksums {'on' if body['checksum'] else 'off'}"
    )
    if body["tls"]:
        _render_tls(out, body["tls"])
    if body["baseline"]:
        _render_baseline(out, body)


def _render_tls(out: Console, tls: Mapping[str, Any]) -> None:
    ratio, cpu, plain = tls["goodput_ratio_to_plain"], tls["cpu_ratio_to_plain"], tls["plain_goodput_gbps"]
    out.print(
        f"{tls['cipher']} by {tls['openssl']}, sealed by {'the kernel' if tls['kernel'] else 'the process'}: "
        f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f}) of the goodput without TLS ({plain['median']:.2f} Gbps), "
        f"{tls['cpu_s_per_gb']:.3f} CPU s/GB instead of {tls['plain_cpu_s_per_gb']:.3f} (both ends together, {cpu['median']:.2f} times)"
    )


def _render_baseline(out: Console, body: Mapping[str, Any]) -> None:
    table = Table(
        title=f"against the C loop of {'SSL_write and SSL_read' if body['tls'] else 'send and recv'}, in turns, contiguous (median, quartiles)"
    )
    for heading in ("C loop", "receive", "Gbps", "CPU s/GB", "ours / C, goodput", "ours / C, CPU"):
        table.add_column(heading, justify="right")
    for kind, each in body["baseline"].items():
        ratio, cpu, gbps = each["goodput_ratio"], each["cpu_ratio"], each["goodput_gbps"]
        table.add_row(
            kind,
            f"{each['receive_bytes'] >> 10} KiB",
            f"{gbps['median']:.2f} ({gbps['q1']:.2f}-{gbps['q3']:.2f})",
            f"{each['sender_cpu_s_per_gb']:.3f} + {each['receiver_cpu_s_per_gb']:.3f}",
            f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f})",
            f"{cpu['median']:.2f} ({cpu['q1']:.2f}-{cpu['q3']:.2f})",
        )
    out.print(table)
