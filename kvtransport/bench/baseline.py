"""Plain ``send``/``recv`` loops in C (csrc/baseline.c): what the machine gives whoever does nothing but move bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from ..tls import TlsConfig
from .compiled import program
from .crew import Crew, Process
from .summary import paired_ratio, spread

CALLS = (1 << 20, 256 << 10)
"""Receive pieces that are tried: 256 KiB stay in the cache, 1 MiB is a system call less in four."""
START_S = 120.0
ROUND_S = 150.0
GB = 1e9


@dataclass(frozen=True, slots=True)
class BaselineRound:
    """One round of the C loop. CPU seconds are user and system time of all threads of that process."""

    seconds: float
    goodput_gbps: float
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float
    verified: bool


class Measured(Protocol):
    """One round of whatever is held against the C loop."""

    @property
    def goodput_gbps(self) -> float: ...
    @property
    def sender_cpu_s_per_gb(self) -> float: ...
    @property
    def receiver_cpu_s_per_gb(self) -> float: ...


class Baseline:
    """Two C processes with ``connections`` TCP connections between them; use as a context manager.

    Each end keeps ``copies`` buffers of ``nbytes`` and takes the next one each round. ``congestion`` None: the system's
    default. ``prefixes`` (receiver, sender) come before the commands, as in ``ip netns exec NAME``.
    With ``tls`` the same loops over SSL_write and SSL_read (csrc/tls_baseline.c).
    Raises ConfigError without a C compiler, RemoteError when a process dies.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        connections: int,
        copies: int = 1,
        congestion: str | None = None,
        host: str = "127.0.0.1",
        prefixes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
        tls: TlsConfig | None = None,
    ) -> None:
        self.nbytes = nbytes
        self.congestion = "unknown"
        self._host = host
        self._prefixes = prefixes
        self._tls = tls
        self._shape = [str(connections), str(nbytes), str(copies), congestion or "-"]
        self._crew = Crew()
        self._receiver: Process
        self._sender: Process

    def __enter__(self) -> Self:
        environment: dict[str, str] | None = None
        if self._tls is None:
            executable = str(program("baseline", headers=("xxhash.h",)))
        else:
            executable = str(program("tls_baseline", headers=("baseline.c", "openssl.h", "xxhash.h")))
            environment = {**os.environ, "KV_TLS_PEM": str(self._tls.certificate), "KV_TLS_KEY": str(self._tls.key)}
        try:
            receiver = self._crew.start(
                "C receiver", [*self._prefixes[0], executable, "receive", self._host, *self._shape], environment
            )
            port = self._crew.wait(receiver, "listening", START_S)["port"]
            sender = self._crew.start(
                "C sender", [*self._prefixes[1], executable, "send", self._host, str(port), *self._shape], environment
            )
            self.congestion = self._crew.wait(sender, "ready", START_S)["congestion"]
            self._crew.wait(receiver, "ready", START_S)
        except BaseException:
            self.close()
            raise
        self._receiver, self._sender = receiver, sender
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        return self._crew.pids

    def round(self, call: int, *, hashing: bool = False, send_call: int = CALLS[0]) -> BaselineRound:
        """Move the bytes once, ``call`` of them per receive and ``send_call`` per send.

        ``hashing``: xxh3_64 of every MiB at both ends.
        """
        self._receiver.say(f"move {call} {int(hashing)}")
        self._crew.wait(self._receiver, "expecting", ROUND_S)
        self._sender.say(f"move {send_call} {int(hashing)}")
        sent = self._crew.wait(self._sender, "done", ROUND_S)
        received = self._crew.wait(self._receiver, "done", ROUND_S)
        gb = self.nbytes / GB
        return BaselineRound(
            seconds=sent["seconds"],
            goodput_gbps=gb * 8 / sent["seconds"],
            sender_cpu_s_per_gb=sent["cpu_s"] / gb,
            receiver_cpu_s_per_gb=received["cpu_s"] / gb,
            verified=sent["digest"] == received["digest"],
        )

    def ping(self, nbytes: int, count: int) -> tuple[float, float]:
        """Seconds of ``count`` round trips of ``nbytes`` each way on one connection: median, 99th percentile."""
        self._receiver.say(f"ping {nbytes} {count}")
        self._crew.wait(self._receiver, "expecting", ROUND_S)
        self._sender.say(f"ping {nbytes} {count}")
        sent = self._crew.wait(self._sender, "done", ROUND_S)
        self._crew.wait(self._receiver, "done", ROUND_S)
        return sent["p50_s"], sent["p99_s"]

    def close(self) -> None:
        """End both processes. Idempotent."""
        self._crew.close()


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the C loop: bytes per receive, hashing or not."""

    call: int
    hashing: bool

    @property
    def name(self) -> str:
        return f"{'hashing' if self.hashing else 'plain'}-{self.call >> 10}KiB"


def variants(*, hashing: bool) -> list[Variant]:
    """Both receive pieces plain; with ``hashing`` both hashing too."""
    return [Variant(call, kind) for kind in ((False, True) if hashing else (False,)) for call in CALLS]


def compare(ours: Sequence[Measured], rounds: dict[Variant, list[BaselineRound]]) -> dict[str, Any]:
    """Hold rounds of ours against the C loop's, taken in turns; round i of each belongs together.

    For ``plain`` and ``hashing``, whichever was run: the better receive piece (by median goodput), the ratio of
    goodputs and of CPU seconds per GB (both ends together), and every round.
    """
    out: dict[str, Any] = {}
    for kind in ("plain", "hashing"):
        tried = {v: r for v, r in rounds.items() if v.hashing == (kind == "hashing")}
        if not tried:
            continue
        goodput = {v: spread([r.goodput_gbps for r in each]) for v, each in tried.items()}
        best = max(tried, key=lambda v: float(goodput[v]["median"]))
        out[kind] = {
            "receive_bytes": best.call,
            "goodput_gbps": goodput[best],
            "sender_cpu_s_per_gb": spread([r.sender_cpu_s_per_gb for r in tried[best]])["median"],
            "receiver_cpu_s_per_gb": spread([r.receiver_cpu_s_per_gb for r in tried[best]])["median"],
            "verified": all(r.verified for each in tried.values() for r in each),
            "goodput_ratio": paired_ratio([r.goodput_gbps for r in ours], [r.goodput_gbps for r in tried[best]]),
            "cpu_ratio": paired_ratio([_cpu(r) for r in ours], [_cpu(r) for r in tried[best]]),
            "rounds": {v.name: [asdict(r) for r in each] for v, each in tried.items()},
        }
    return out


def _cpu(measured: Measured) -> float:
    return measured.sender_cpu_s_per_gb + measured.receiver_cpu_s_per_gb
