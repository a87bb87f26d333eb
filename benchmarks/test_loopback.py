"""Goodput of one cache from process to process over loopback; ``extra_info`` has Gbps and CPU seconds of both ends."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from kvtransport.bench.loopback import Loopback, LoopbackOptions, Round


def congestion() -> str | None:
    """cubic where it may be chosen: BBR halves a loopback path."""
    allowed = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
    return "cubic" if allowed.exists() and "cubic" in allowed.read_text().split() else None


@pytest.mark.parametrize("memory", ["pages", "contiguous"])
@pytest.mark.parametrize("checksum", [True, False], ids=["xxh3", "unchecked"])
@pytest.mark.parametrize("connections", [1, 2, 4])
def test_loopback(benchmark, connections, checksum, memory):
    options = LoopbackOptions(
        connections=connections, checksum=checksum, contiguous=memory == "contiguous", congestion=congestion()
    )
    rounds: list[Round] = []
    with Loopback(options) as bench:
        benchmark.pedantic(lambda: rounds.append(bench.round()), rounds=7, warmup_rounds=1)
        total, actual = bench.manifest.total_bytes, bench.congestion
    assert all(r.verified for r in rounds)
    timed = rounds[1:]
    benchmark.extra_info.update(
        bytes=total,
        congestion=actual,
        goodput_gbps=round(statistics.median(r.goodput_gbps for r in timed), 2),
        sender_cpu_s_per_gb=round(statistics.median(r.sender_cpu_s_per_gb for r in timed), 3),
        receiver_cpu_s_per_gb=round(statistics.median(r.receiver_cpu_s_per_gb for r in timed), 3),
    )
