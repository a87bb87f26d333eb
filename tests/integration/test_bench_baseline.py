"""The C loop itself: it moves what it says, both ends end together, nothing is left."""

from __future__ import annotations

import json
import os
import signal

import pytest
from typer.testing import CliRunner

from kvtransport.bench import cli
from kvtransport.bench.baseline import CALLS, Baseline
from kvtransport.errors import RemoteError

from .test_bench_loopback import gone

NBYTES = 5_000_001  # divides by neither connections nor pieces


@pytest.mark.parametrize("connections", [1, 3])
def test_rounds_are_verified_plain_and_hashing(connections):
    with Baseline(NBYTES, connections=connections, copies=2) as loop:
        for hashing in (False, True):
            for call in (*CALLS, 4096):
                for _ in range(2):
                    measured = loop.round(call, hashing=hashing)
                    assert measured.verified
                    assert measured.goodput_gbps == pytest.approx(NBYTES * 8 / 1e9 / measured.seconds)
        p50, p99 = loop.ping(4096, 50)
        assert 0 < p50 <= p99
        pids = loop.pids
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_end_is_named_and_the_other_ended(victim):
    with (
        pytest.raises(RemoteError, match=r"C (sender|receiver) process"),
        Baseline(NBYTES, connections=1) as loop,
    ):
        pids = loop.pids
        os.kill(pids[victim], signal.SIGKILL)
        loop.round(CALLS[0])
    assert gone(pids)


def test_a_congestion_control_that_does_not_exist():
    with pytest.raises(RemoteError, match="may not be chosen here"):
        Baseline(NBYTES, connections=1, congestion="nosuch").__enter__()


def test_the_json_object_with_a_baseline():
    args = ["--tokens", "512", "--connections", "2", "--repeat", "2", "--warmup", "0", "--buffer-bytes", "0"]
    result = CliRunner().invoke(cli.app, ["loopback", "--baseline", *args, "--json", "-"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    for kind in ("plain", "hashing"):
        each = body["baseline"][kind]
        assert each["verified"] is True
        assert each["receive_bytes"] in CALLS
        assert {len(r) for r in each["rounds"].values()} == {2}
        best = each["rounds"][f"{kind}-{each['receive_bytes'] >> 10}KiB"]
        ratios = [a["goodput_gbps"] / b["goodput_gbps"] for a, b in zip(body["rounds"], best, strict=True)]
        assert each["goodput_ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    assert "ours / C" in result.stderr
