"""What a run is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..profiles import GBPS, Floats
from .arrivals import Requests


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Running totals at one time: instance-seconds or place-seconds used and offered, bytes; and N_p then."""

    at: float
    local_busy: float
    remote_busy: float
    decode_taken: float
    sent: float
    capacity: float
    local_offered: float
    remote_offered: float
    decode_offered: float
    n_p: int


@dataclass(frozen=True, slots=True)
class Distribution:
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Floats) -> Distribution | None:
        if not len(values):
            return None
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(float(values.mean()), float(p50), float(p90), float(p99))


class Recorder:
    """Filled by the engine, one slot per request; NaN where something did not happen."""

    def __init__(self, n: int) -> None:
        nan = float("nan")
        self.wait = [nan] * n
        self.ready = [nan] * n
        """Arrival to the last byte of KVCache on the decode side."""
        self.ttft = [nan] * n
        """Arrival to a place in a decode batch: what the first token waits for."""
        self.tpot = [nan] * n
        self.done = [nan] * n
        self.uncached = [nan] * n
        self.path = bytearray(n)
        """0 local, 1 PrfaaS, 2 shed."""
        self.begin: Snapshot | None = None
        self.end: Snapshot | None = None
        self.retired_taken = 0.0
        self.retired_offered = 0.0
        self.conversions: list[tuple[float, str]] = []
        self.series: list[tuple[float, ...]] = []
        """(at, threshold, local queue, PrfaaS queue, decode queue, goodput, capacity, N_p) per tick, thinned."""
        self._thin = 1
        self._ticks = 0
        self._outputs = 0.0
        self.finished_count = 0
        self.first = 0
        self.requests: Requests | None = None
        self.threshold = 0.0

    def shed(self, i: int) -> None:
        self.path[i] = 2

    def routed(self, i: int, prfaas: bool, uncached: float) -> None:
        self.path[i] = 1 if prfaas else 0
        self.uncached[i] = uncached

    def arrived(self, i: int, seconds: float) -> None:
        self.ready[i] = seconds

    def finished(self, i: int, now: float, tpot: float) -> None:
        self.tpot[i] = tpot
        self.done[i] = now

    def mean_output(self, default: float) -> float:
        """Mean output tokens of what has finished lately; ``default`` at first."""
        return self._outputs if self.finished_count >= 256 else default

    def observed_output(self, tokens: float) -> None:
        # A plain mean first, forgetting slowly later: the first to finish are the short ones.
        self.finished_count += 1
        self._outputs += (tokens - self._outputs) / min(self.finished_count, 512)

    def tick(self, *row: float) -> None:
        if self._ticks % self._thin == 0:
            self.series.append(row)
            if len(self.series) >= 4000:  # halve the resolution instead of growing for ever
                self.series = self.series[::2]
                self._thin *= 2
        self._ticks += 1

    def close(self, requests: Requests, first: int, threshold: float) -> None:
        self.requests, self.first, self.threshold = requests, first, threshold

    def summary(self, *, slo_tpot: float, slo_ttft: float) -> dict[str, Any]:
        """Figures over the requests after the warm-up. ``goodput`` counts requests within both limits (seconds)."""
        assert self.requests is not None
        assert self.begin is not None
        assert self.end is not None
        window = slice(self.first, None)
        path = np.frombuffer(bytes(self.path), dtype=np.uint8)[window]
        served = path != 2
        ttft = np.asarray(self.ttft)[window][served]
        tpot = np.asarray(self.tpot)[window][served]
        ready = np.asarray(self.ready)[window][served]
        wait = np.asarray(self.wait)[window][served]
        tokens = self.requests.tokens[window][served]
        uncached = np.asarray(self.uncached)[window][served]
        done = np.asarray(self.done)
        begin, end = self.begin, self.end
        span = max(end.at - begin.at, 1e-12)
        good = (ttft <= slo_ttft) & (tpot <= slo_tpot)
        offered = len(path) / span

        def part(used: float, capacity: float) -> float:
            return used / capacity if capacity > 0 else 0.0

        def dist(values: Floats) -> dict[str, float] | None:
            found = Distribution.of(values)
            return None if found is None else {k: getattr(found, k) for k in ("mean", "p50", "p90", "p99")}

        sent, capacity = end.sent - begin.sent, end.capacity - begin.capacity
        series = np.array([row[:5] for row in self.series if begin.at <= row[0] <= end.at])
        queues = series[:, 2:5] if len(series) else np.zeros((1, 3))
        return {
            "requests": len(path),
            "seconds": span,
            "offered_per_s": offered,
            "throughput_per_s": float(((done > begin.at) & (done <= end.at)).sum()) / span,
            "goodput_per_s": offered * float(good.sum()) / max(len(path), 1),
            "shed_share": float((~served).mean()) if len(path) else 0.0,
            "offload_share": float((path[served] == 1).mean()) if served.any() else None,
            "ttft_s": dist(ttft),
            "wait_s": dist(wait),
            "kv_ready_s": dist(ready),
            "tpot_s": dist(tpot),
            "slo_tpot_share": float((tpot <= slo_tpot).mean()) if len(tpot) else None,
            "slo_ttft_share": float((ttft <= slo_ttft).mean()) if len(ttft) else None,
            "hit_rate": 1.0 - float(uncached.sum() / tokens.sum()) if len(tokens) else None,
            "utilisation": {
                "prfaas": part(end.remote_busy - begin.remote_busy, end.remote_offered - begin.remote_offered),
                "pd_prefill": part(end.local_busy - begin.local_busy, end.local_offered - begin.local_offered),
                "pd_decode": part(end.decode_taken - begin.decode_taken, end.decode_offered - begin.decode_offered),
                "link": part(sent, capacity),
            },
            "egress_gbps": sent / span / GBPS,
            "queues_mean": dict(zip(("pd_prefill", "prfaas", "decode"), map(float, queues.mean(axis=0)), strict=True)),
            "queues_max": dict(zip(("pd_prefill", "prfaas", "decode"), map(float, queues.max(axis=0)), strict=True)),
            "threshold_tokens": self.threshold,
            "n_p": end.n_p,
            "conversions": [{"at_s": at, "reason": reason} for at, reason in self.conversions],
        }
