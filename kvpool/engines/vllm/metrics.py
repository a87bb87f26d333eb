"""Counters and durations of a connector's transfers, in the form that vLLM aggregates, logs and exports.

An interval is a plain dictionary (it crosses processes): counters add up, lists of samples are joined. Bytes and seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from kvtransport.transfer import TransferStats

Interval = dict[str, Any]

COUNTERS: Mapping[str, str] = {
    "sent_transfers": "Caches handed to a decode engine and confirmed by it.",
    "failed_sends": "Caches that a decode engine did not take completely.",
    "received_transfers": "Caches received completely and verified.",
    "failed_receives": "Caches that did not come; vLLM follows kv_load_failure_policy.",
    "aborted": "Transfers given up because their request ended.",
    "sent_bytes": "Payload bytes sent.",
    "received_bytes": "Payload bytes received and verified.",
    "resent_bytes": "Payload bytes sent again, after a lost connection or a failed checksum.",
    "spilled_bytes": "Bytes copied aside because the decode engine did not take them in time.",
    "resident_bytes": "Bytes received although the decode engine had them in its prefix cache.",
    "corrupt_chunks": "Chunks whose checksum failed.",
}
SAMPLES: Mapping[str, str] = {
    "send_seconds": "From a request's first ready layer to the confirmation of the last byte.",
    "tail_seconds": "From a request's last ready layer to the confirmation of the last byte: what prefill did not hide.",
    "receive_seconds": "From the first byte of a cache to its completion.",
    "wait_seconds": "From the allocation of its blocks to the completion of a cache.",
}
MAX_SAMPLES = 4_096
"""Per interval and list; an engine that nobody asks for statistics must not grow."""


def empty() -> Interval:
    return {**dict.fromkeys(COUNTERS, 0), **{name: [] for name in SAMPLES}}


def is_empty(interval: Interval) -> bool:
    return not any(interval.values())


def add(into: Interval, other: Mapping[str, Any]) -> Interval:
    """``into`` with the observations of ``other`` added to it."""
    for name in COUNTERS:
        into[name] += other.get(name, 0)
    for name in SAMPLES:
        into[name] = (into[name] + list(other.get(name, ())))[:MAX_SAMPLES]
    return into


def summary(interval: Interval) -> dict[str, int | float]:
    """One line for vLLM's log: counts, MB, and the median and largest of each duration in ms."""
    out: dict[str, int | float] = {
        "sent": interval["sent_transfers"],
        "received": interval["received_transfers"],
        "failed": interval["failed_sends"] + interval["failed_receives"],
        "aborted": interval["aborted"],
        "MB sent": round(interval["sent_bytes"] / 1e6, 3),
        "MB received": round(interval["received_bytes"] / 1e6, 3),
    }
    for name in ("resent_bytes", "spilled_bytes", "resident_bytes", "corrupt_chunks"):
        if interval[name]:
            out[name] = interval[name]
    for name in SAMPLES:
        samples = sorted(interval[name])
        if samples:
            label = name.removesuffix("_seconds")
            out[f"{label} p50 ms"] = round(samples[len(samples) // 2] * 1e3, 3)
            out[f"{label} max ms"] = round(samples[-1] * 1e3, 3)
    return out


class Recorder:
    """Collects an interval; written on the event loop, taken by the engine's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._interval = empty()

    def take(self) -> Interval | None:
        """Everything since the last call; None when nothing happened."""
        with self._lock:
            interval, self._interval = self._interval, empty()
        return None if is_empty(interval) else interval

    def sent(self, stats: TransferStats, *, failed: bool, cancelled: bool) -> None:
        ready = [times.ready_s for times in stats.layers.values() if times.ready_s is not None]
        with self._lock:
            self._end(stats, "sent_transfers", "failed_sends", failed=failed, cancelled=cancelled)
            self._interval["sent_bytes"] += stats.moved_bytes
            self._interval["spilled_bytes"] += stats.spilled_bytes
            if not failed and stats.sealed_s is not None and ready:
                self._sample("send_seconds", stats.sealed_s - min(ready))
                self._sample("tail_seconds", stats.sealed_s - max(ready))

    def received(
        self, stats: TransferStats, *, failed: bool, cancelled: bool, waited_s: float, resident_bytes: int = 0
    ) -> None:
        first = [times.first_byte_s for times in stats.layers.values() if times.first_byte_s is not None]
        with self._lock:
            self._end(stats, "received_transfers", "failed_receives", failed=failed, cancelled=cancelled)
            self._interval["received_bytes"] += stats.moved_bytes
            self._interval["resident_bytes"] += resident_bytes
            if not failed:
                self._sample("wait_seconds", waited_s)
                if stats.sealed_s is not None and first:
                    self._sample("receive_seconds", stats.sealed_s - min(first))

    def _end(self, stats: TransferStats, good: str, bad: str, *, failed: bool, cancelled: bool) -> None:
        self._interval["aborted" if cancelled else bad if failed else good] += 1
        self._interval["resent_bytes"] += stats.resent_bytes
        self._interval["corrupt_chunks"] += stats.corrupt_chunks

    def _sample(self, name: str, seconds: float) -> None:
        if len(self._interval[name]) < MAX_SAMPLES:
            self._interval[name].append(max(0.0, seconds))
