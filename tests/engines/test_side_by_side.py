"""Beside vLLM's own NixlConnector in one run, and what of the sending is hidden behind computing."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from .conftest import Setup
from .models import prompt
from .pair import KvTransportPair, NixlPair
from .plot import LayerTrace, exposed_s, plot_layers
from .relay import Relay
from .report import Report

ROUNDS = 9
TOKENS = 2_049
WARM_UP = 2


def test_time_from_prefill_end_to_first_token(hybrid: Setup, models: Path, tmp_path: Path, report: Report) -> None:
    """Same hybrid model, same machine, one request at a time, taking turns; NIXL moves over UCX TCP on loopback."""
    gaps: dict[str, list[float]] = {"kvtransport": [], "nixl": []}
    with NixlPair(models / hybrid.name, tmp_path) as nixl:
        nixl.wait_ready()
        for i in range(WARM_UP + ROUNDS):
            tokens = prompt(TOKENS, 40_000 + i)
            ours = hybrid.pair.run(f"ours-{i}", tokens, max_tokens=2)
            theirs = nixl.run(f"nixl-{i}", tokens, max_tokens=2)
            # Both must be right to be compared at all.
            assert ours.decode.same_output(theirs.decode)
            if i >= WARM_UP:
                gaps["kvtransport"].append(ours.gap_s)
                gaps["nixl"].append(theirs.gap_s)
    median = {name: statistics.median(values) for name, values in gaps.items()}
    report.figures["prefill_end_to_first_token_s"] = gaps
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
    rate = {"loopback": None, "slow": 12e6}[wire]
    with Relay("127.0.0.1", pair.port, bytes_per_s=rate) as relay:
        transfer = pair.submit(request, tokens, port=relay.port if rate else None)
        pair.prefill.result(request)
        pair.decode.result(request)
        pair.free_blocks()
    record = pair.transfer("producer", transfer)
    trace = LayerTrace.of(record, "12 MB/s" if rate else wire)
    assert len(trace.layers) == 12
    # Sent as computed: the first layer is handed over before the last one is computed.
    assert trace.ready_s[0] < trace.ready_s[-1]
    assert trace.acked_s[0] < trace.ready_s[-1]
    traces[wire] = trace
    report.figures.setdefault("layers", {})[wire] = trace.as_dict()
    report.row(
        f"12 layers, 4,000 tokens, {trace.wire}",
        f"computed in {trace.ready_s[-1] - trace.begin_s:.2f} s, sent in {trace.acked_s[-1] - trace.ready_s[0]:.2f} s, "
        f"exposed after the last layer {exposed_s(trace) * 1e3:.0f} ms",
    )
    if len(traces) == 2:
        report.row("plot", str(plot_layers(list(traces.values()), out / "vllm-layers.png")))
