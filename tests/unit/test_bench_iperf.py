"""iperf3 as it answers: results, errors, nonsense, and its absence."""

from __future__ import annotations

import json

import pytest

from kvtransport.bench import iperf
from kvtransport.bench.iperf import Setting
from kvtransport.errors import ConfigError, RemoteError

ANSWER = {
    "end": {
        "sum_sent": {"bits_per_second": 4e9, "retransmits": 7},
        "sum_received": {"bits_per_second": 3.5e9, "seconds": 5.0, "bytes": 2_187_500_000},
        "cpu_utilization_percent": {"host_total": 12.5, "remote_total": 20.0},
    }
}


def test_what_arrived_counts():
    told = iperf.parse(json.dumps(ANSWER), Setting(4, "bbr"))
    assert told == {
        "goodput_gbps": 3.5,
        "seconds": 5.0,
        "bytes": 2_187_500_000,
        "retransmits": 7,
        "sender_cpu_percent": 12.5,
        "receiver_cpu_percent": 20.0,
    }


def test_errors_and_nonsense_are_told():
    with pytest.raises(RemoteError, match=r"iperf3 \(bbr x4\): unable to connect"):
        iperf.parse('{"error": "unable to connect"}', Setting(4, "bbr"))
    with pytest.raises(RemoteError, match="gave no JSON: 'Killed'"):
        iperf.parse("Killed", Setting(1, "cubic"))


def test_its_absence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt-get install iperf3"):
        iperf.check()


def test_a_server_that_does_not_start(monkeypatch, tmp_path):
    fake = tmp_path / "iperf3"
    fake.write_text("#!/bin/sh\necho address already in use\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RemoteError, match="did not start: address already in use"):
        iperf.run(Setting(1, "cubic"), "127.0.0.1", server=(), client=(), seconds=1)
