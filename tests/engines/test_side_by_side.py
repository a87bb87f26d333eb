"""Beside vLLM's own NixlConnector in one run, and what of the sending is hidden behind computing."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from .models import prompt
from .pair import KvTransportPair, NixlPair
from .plot import LayerTrace, exposed_s, plot_layers
from .relay import Relay
from .report import Report

ROUNDS = 9
TOKENS = 2_049
WARM_UP = 2


def test_time_from_prefill_end_to_first_token(models: Path, tmp_path: Path, report: Report) -> None:
    """Same hybrid model, same machine, one request at a time, taking turns; NIXL moves over UCX TCP on loopback.

    While one pair has its turn the other one's processes are stopped: idle engines that poll would take the two cores from it.
    The pair is one of its own: hashing for debugging takes time.
    """
    gaps: dict[str, list[float]] = {"kvtransport": [], "nixl": []}
    model = models / "qwen3_next"
    patient = {"debug_hashes": False, "keepalive_s": 60.0, "dead_after_s": 600.0}
    with KvTransportPair(model, tmp_path / "ours", patient) as ours, NixlPair(model, tmp_path) as nixl:
        pairs: dict[str, KvTransportPair | NixlPair] = {"kvtransport": ours, "nixl": nixl}
        for pair in pairs.values():
            pair.wait_ready()
            pair.pause()
        for i in range(WARM_UP + ROUNDS):
            tokens = prompt(TOKENS, 40_000 + i)
            results = {}
            for name in sorted(pairs, reverse=bool(i % 2)):
                with pairs[name].turn() as pair:
                    results[name] = pair.run(f"round-{i}", tokens)
                    pair.free_blocks()
            # Both must be right to be compared at all.
            assert results["kvtransport"].decode.same_output(results["nixl"].decode)
            if i >= WARM_UP:
                for name, result in results.items():
                    gaps[name].append(result.gap_s)
    median = {name: statistics.median(values) for name, values in gaps.items()}
    report.figures["prefill_end_to_first_token_s"] = {
        name: [round(v, 5) for v in values] for name, values in gaps.items()
    }
    for name, values in gaps.items():
        report.row(
            f"end of prefill to first token, {name}",
            f"median {median[name] * 1e3:.0f} ms (min {min(values) * 1e3:.0f}, max {max(values) * 1e3:.0f}; {ROUNDS} rounds in turn)",
        )
    assert median["kvtransport"] <= median["nixl"]


@pytest.mark.parametrize("wire", ["loopback", "slow"])
def test_layers_leave_while_later_ones_are_computed(
    dense_one_step: KvTransportPair, report: Report, out: Path, traces: dict[str, LayerTrace], wire: str
) -> None:
    """One request of one prefill step: when each layer was computed, and when its bytes were acknowledged."""
    pair = dense_one_step
    request = f"layers-{wire}"
    tokens = prompt(4_000, 1)
    rate = {"loopback": None, "slow": 50e6}[wire]
    with Relay("127.0.0.1", pair.port, bytes_per_s=rate) as relay:
        transfer = pair.submit(request, tokens, port=relay.port if rate else None)
        pair.prefill.result(request)
        pair.decode.result(request)
        pair.free_blocks()
    record = pair.transfer("producer", transfer)
    trace = LayerTrace.of(record, "50 MB/s" if rate else wire)
    assert len(trace.layers) == 12
    # Sent as computed: the first layer has arrived before the last one is computed.
    assert trace.acked_s[0] < trace.computed_s[-1]
    traces[wire] = trace
    report.figures.setdefault("layers", {})[wire] = trace.as_dict()
    report.row(
        f"12 layers, 4,000 tokens, {trace.wire}",
        f"{trace.nbytes / 1e6:.1f} MB, computed in {trace.computed_s[-1] - trace.begin_s:.2f} s, "
        f"acknowledged after the last layer was computed: {exposed_s(trace) * 1e3:.0f} ms",
    )
    if len(traces) == 2:
        report.row("plot", plot_layers(list(traces.values()), out / "vllm-layers.png").name)
