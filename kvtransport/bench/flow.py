"""Two processes of ours that keep a path full, here or in the namespaces of an emulated link; see :mod:`.flow_worker`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from .. import presets
from .crew import Crew, Process
from .environment import child_environment

START_S = 120.0
MARGIN_S = 30.0
GB = 1e9
COLD_TOKENS = 27_904
"""Kimi Linear at this length is 268,435,456 bytes: 256 MiB exactly."""


@dataclass(frozen=True, slots=True)
class FlowOptions:
    """What is sent. None of ``connections``, ``congestion`` and ``chunk_bytes``: what the transport chooses."""

    preset: str = "kimi-linear-48b"
    tokens: int = COLD_TOKENS
    connections: int | None = None
    congestion: str | None = None
    chunk_bytes: int | None = None
    page_bytes: int | None = None
    contiguous: bool = False
    checksum: bool = True
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """``nbytes`` were verified and in place at ``at_s`` on the system's monotonic clock."""

    at_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class FlowRun:
    """One run on a fresh link. CPU seconds are of the whole run, per GB that arrived."""

    samples: tuple[Sample, ...]
    started_s: float
    connections: int
    congestion: str
    telemetry: dict[str, Any]
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float

    def goodput_gbps(self, skip_s: float, stop_s: float | None = None) -> float:
        """Mean goodput from ``skip_s`` after the start to ``stop_s`` (the end), 1e9 bits a second."""
        return goodput(self.samples, self.started_s + skip_s, None if stop_s is None else self.started_s + stop_s)


@dataclass(frozen=True, slots=True)
class OnceRun:
    """One transfer alone on a fresh link; ``seconds`` from opening it to the confirmed seal."""

    seconds: float
    dial_seconds: float
    goodput_gbps: float
    connections: int
    congestion: str
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float


def goodput(samples: Sequence[Sample], first_s: float, last_s: float | None = None) -> float:
    """Mean goodput in Gbps between two moments of the clock, linear between samples; 0 where there are none."""
    if len(samples) < 2:
        return 0.0
    end = samples[-1].at_s if last_s is None else min(last_s, samples[-1].at_s)
    begin = max(first_s, samples[0].at_s)
    if end <= begin:
        return 0.0
    return (_bytes_at(samples, end) - _bytes_at(samples, begin)) * 8 / GB / (end - begin)


def _bytes_at(samples: Sequence[Sample], at_s: float) -> float:
    before = samples[0]
    for sample in samples:
        if sample.at_s >= at_s:
            span = sample.at_s - before.at_s
            share = (at_s - before.at_s) / span if span > 0 else 1.0
            return before.nbytes + (sample.nbytes - before.nbytes) * min(1.0, max(0.0, share))
        before = sample
    return float(before.nbytes)


class Flow:
    """A receiver and a sender process; use as a context manager, then :meth:`run` or :meth:`once`.

    ``prefixes`` (receiver, sender) come before the commands. Beyond loopback both are insecure, as an emulated link is.
    """

    def __init__(
        self,
        options: FlowOptions,
        *,
        host: str = "127.0.0.1",
        prefixes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    ) -> None:
        self.options = options
        self.nbytes = presets.load(options.preset).bytes_at(options.tokens)
        self._crew = Crew()
        self._host = host
        self._prefixes = prefixes
        self._receiver: Process
        self._sender: Process

    def __enter__(self) -> Self:
        config = {**asdict(self.options), "insecure": not self._host.startswith("127."), "host": self._host}
        try:
            self._receiver = self._start(0, {**config, "role": "receiver", "seed": 1, "port": 0})
            port = self._crew.wait(self._receiver, "started", START_S)["port"]
            self._sender = self._start(1, {**config, "role": "sender", "seed": 2, "port": port})
            self._crew.wait(self._sender, "started", START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        return self._crew.pids

    def _start(self, side: int, config: dict[str, Any]) -> Process:
        argv = [*self._prefixes[side], sys.executable, "-m", "kvtransport.bench.flow_worker"]
        worker = self._crew.start(config["role"], argv, child_environment())
        worker.say(config)
        return worker

    def _begin(self, *, samples: bool, connections: int | None = None) -> tuple[str, float]:
        run = os.urandom(8).hex()
        self._receiver.say({"do": "expect", "run": run, "samples": samples})
        self._crew.wait(self._receiver, "expecting", MARGIN_S)
        self._sender.say({"do": "dial", "connections": connections})
        return run, self._crew.wait(self._sender, "dialled", MARGIN_S)["seconds"]

    def _end(self) -> dict[str, Any]:
        self._receiver.say({"do": "stop"})
        received = self._crew.wait(self._receiver, "received", MARGIN_S)
        self._crew.wait(self._receiver, "stopped", MARGIN_S)
        return received

    def run(self, seconds: float, during: Callable[[float], None] | None = None) -> FlowRun:
        """Fill a fresh link for ``seconds``. ``during(start)`` runs meanwhile, here, with the start on the monotonic clock.

        Raises the workers' errors, RemoteError when one dies, DeadlineError when one does not answer.
        """
        run, _ = self._begin(samples=True)
        started = time.monotonic()
        self._sender.say({"do": "flow", "run": run, "seconds": seconds})
        if during is not None:
            during(started)
        flowed = self._crew.wait(self._sender, "flowed", seconds + MARGIN_S)
        received = self._end()
        samples = tuple(
            Sample(r["at_s"], r["bytes"]) for r in self._receiver.take("sample") if r["at_s"] <= started + seconds
        )
        gb = max(1, samples[-1].nbytes if samples else 1) / GB
        return FlowRun(
            samples,
            started,
            flowed["connections"],
            flowed["congestion"],
            flowed["telemetry"],
            flowed["cpu_s"] / gb,
            received["cpu_s"] / gb,
        )

    def once(self, *, connections: int | None = None, chunk_bytes: int | None = None, warm: int = 0) -> OnceRun:
        """One transfer on a fresh link; ``warm``: after so many others on that link, which do not count."""
        run, dial = self._begin(samples=False, connections=connections)
        sent, received = {}, {}
        for number in range(warm + 1):
            sent = self._once(run, number, chunk_bytes)
        received = self._end()
        gb = self.nbytes / GB
        return OnceRun(
            sent["seconds"],
            dial,
            gb * 8 / sent["seconds"],
            sent["connections"],
            sent["congestion"],
            sent["cpu_s"] / gb,
            received["cpu_s"] / gb / (warm + 1),
        )

    def _once(self, run: str, number: int, chunk_bytes: int | None) -> dict[str, Any]:
        self._sender.say({"do": "once", "run": run, "number": number, "chunk_bytes": chunk_bytes})
        return self._crew.wait(self._sender, "sent", self.options.deadline_s + MARGIN_S)

    def layers(self, seconds: float) -> dict[str, Any]:
        """A prefill of ``seconds`` that hands over layer by layer, on a link that has carried two bulk transfers.

        Returns the worker's times (monotonic clock, seconds) with ``bulk_seconds`` of the second of these transfers.
        """
        run, _ = self._begin(samples=False)
        for number in (0, 1):
            bulk = self._once(run, number, None)["seconds"]
        self._sender.say({"do": "layers", "run": run, "number": 2, "seconds": seconds})
        told = self._crew.wait(self._sender, "piped", seconds + self.options.deadline_s + MARGIN_S)
        received = self._end()
        for each in told["layers"]:
            first, applied = received["layers"].get(str(each["layer"]), (None, None))
            each.update(first_byte_s=first, applied_s=applied)
        return {**told, "bulk_seconds": bulk}

    def close(self) -> None:
        """End both processes. Idempotent."""
        self._crew.close()
