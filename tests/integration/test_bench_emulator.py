"""The link emulator: its delay, rate, queue and loss are what was asked for, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvtransport.bench.baseline import CALLS, Baseline
from kvtransport.bench.emulator import Conditions, EmulatedLink, why_not
from kvtransport.errors import ConfigError, RemoteError

from .test_bench_loopback import alive, gone

pytestmark = pytest.mark.netns
ROOT = Path(__file__).resolve().parents[2]
BURST = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(int(sys.argv[2])):
    try:
        s.sendto(bytes(int(sys.argv[3])), (sys.argv[1], 9))
    except ConnectionRefusedError:
        pass
"""


def pair(link: EmulatedLink, nbytes: int = 1 << 20, **kwargs) -> Baseline:
    """C receiver on side 1, C sender on side 0."""
    return Baseline(nbytes, host=link.hosts[1], prefixes=(link.enter(1), link.enter(0)), **kwargs)


def burst(link: EmulatedLink, count: int, nbytes: int) -> dict[str, Any]:
    """``count`` datagrams from side 0; what their direction says once all of them have come by."""
    subprocess.run([*link.enter(0), sys.executable, "-c", BURST, link.hosts[1], str(count), str(nbytes)], check=True)
    for _ in range(1000):
        there, _ = link.stats()
        if there["segments"] >= count:
            break
        time.sleep(0.01)
    assert there["segments"] == count
    return there


def test_the_delay_is_the_one_asked_for_and_changes_while_it_runs():
    with EmulatedLink(Conditions(rtt_ms=8)) as link, pair(link, connections=1) as loop:

        def pings(least_s: float, most_s: float) -> None:
            """No packet is early; how late one is depends on how busy the machine is, so the best of a few looks counts."""
            for _ in range(10):
                p50_s, _ = loop.ping(64, 11)
                assert p50_s >= least_s
                if p50_s < most_s:
                    return
            raise AssertionError(f"a round trip of {least_s} s takes {p50_s} s")

        pings(0.008, 0.016)
        link.change(Conditions(rtt_ms=40))
        pings(0.040, 0.060)
        link.change(Conditions(rtt_ms=2))
        pings(0.002, 0.010)


def test_the_rate_is_kept():
    payload = 1448 / 1538  # of a full segment with its Ethernet framing
    with EmulatedLink(Conditions(rtt_ms=1, rate_mbit=200)) as link, pair(link, 10 << 20, connections=2) as loop:
        gbps = loop.round(CALLS[0]).goodput_gbps
        assert 0.6 * 0.2 * payload < gbps <= 1.02 * 0.2 * payload
        link.change(Conditions(rtt_ms=1, rate_mbit=40))
        assert loop.round(CALLS[0]).goodput_gbps <= 1.1 * 0.04 * payload


def test_the_queue_drops_at_its_tail():
    # 200 ms of 0.8 Mbit/s are 20,000 bytes: 20 packets of 1,000 and one more every 10 ms of the burst.
    with EmulatedLink(Conditions(rate_mbit=0.8, queue_ms=200)) as link:
        there = burst(link, 400, 934)  # 934 + 28 + 38 = 1,000 on the wire
    assert there["lost"] == 0
    passed = there["segments"] - there["dropped"]
    assert passed * 1000 == there["wire_bytes"]
    assert 20 <= passed < 200
    assert 0.18 < there["longest_queue_s"] <= 0.2


COUNT = 8_000  # fewer than the device queues while the emulator waits for a processor


@pytest.mark.parametrize("percent", [1.0, 10.0])
def test_single_packets_are_lost_at_the_rate_asked_for(percent):
    with EmulatedLink(Conditions(loss_percent=percent), seed=7) as link:
        there = burst(link, COUNT, 10)
    assert there["dropped"] == 0
    # Five standard deviations.
    expected = COUNT * percent / 100
    assert abs(there["lost"] - expected) < 5 * (expected * (1 - percent / 100)) ** 0.5


def test_segments_are_cut_out_of_super_packets_and_the_rest_is_whole():
    with EmulatedLink(Conditions(loss_percent=0.5), seed=3) as link, pair(link, 20 << 20, connections=4) as loop:
        assert loop.round(CALLS[0], hashing=True).verified
        there, _ = link.stats()
    # Super-packets carry many segments each, and each segment has its own fate.
    assert there["packets"] < there["segments"] / 2
    expected = there["segments"] * 0.005
    assert abs(there["lost"] - expected) < 5 * expected**0.5


def test_without_loss_nothing_is_lost_and_order_is_kept():
    with EmulatedLink(Conditions(rtt_ms=4)) as link, pair(link, 4 << 20, connections=1) as loop:
        for rtt in (1, 20, 0, 4):
            link.change(Conditions(rtt_ms=rtt))
            assert loop.round(CALLS[0]).verified
        assert all(d["lost"] == d["dropped"] == 0 for d in link.stats())


HOLD = """
import os, subprocess, sys
from kvtransport.bench.emulator import Conditions, EmulatedLink
with EmulatedLink(Conditions()) as link:
    child = subprocess.Popen([*link.enter(1), sys.executable, "-c", "import time; time.sleep(600)"])
    print(link.pid, child.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_whoever_made_it_is_killed(how):
    before = set(os.listdir("/sys/class/net"))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    emulator, child = map(int, process.stdout.readline().split())
    for _ in range(500):  # until it has entered
        if os.readlink(f"/proc/{child}/ns/net") != os.readlink("/proc/self/ns/net"):
            break
        time.sleep(0.01)
    namespace = os.readlink(f"/proc/{child}/ns/net")
    assert namespace != os.readlink("/proc/self/ns/net")
    process.send_signal(how)
    process.communicate(timeout=10)
    assert gone([emulator, child])
    assert set(os.listdir("/sys/class/net")) == before
    assert namespace not in open_namespaces()


def open_namespaces() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                found.add(os.readlink(entry / "ns" / "net"))
            except OSError:
                continue
    return found


def test_a_dead_emulator_is_named():
    with (
        pytest.raises(RemoteError, match="link emulator process of this benchmark was killed by SIGKILL"),
        EmulatedLink(Conditions()) as link,
    ):
        os.kill(link.pid, signal.SIGKILL)
        time.sleep(0.05)
        link.stats()


@pytest.mark.parametrize("change", [{"rtt_ms": -1}, {"loss_percent": 101}, {"rate_mbit": 1e9}, {"queue_ms": -2}])
def test_links_that_cannot_be(change):
    with pytest.raises(ConfigError, match=f"an emulated link needs {next(iter(change))}"):
        EmulatedLink(Conditions(**change))


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    assert why_not() is None
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="need root: run it with sudo"):
        EmulatedLink(Conditions()).__enter__()
    monkeypatch.setattr("kvtransport.bench.emulator.TUN", tmp_path / "tun")
    with pytest.raises(ConfigError, match="modprobe tun"):
        EmulatedLink(Conditions()).__enter__()
