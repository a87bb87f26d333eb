"""kvbench peers with a peer of our own: turns, freezing, ratios, what cannot be installed, what is void, and clean ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvtransport.bench import cli, peers, report
from kvtransport.bench.environments import Environment
from kvtransport.bench.peers import PeersOptions
from kvtransport.bench.peers_known import KNOWN, Known
from kvtransport.bench.progress import Steps
from kvtransport.errors import ConfigError

from .test_bench_loopback import gone

DRIVER = str(Path(__file__).with_name("bench_driver.py"))


class Here(Environment):
    """This interpreter, or a reason why not."""

    def make(self, say=lambda _: None) -> str:
        if self.advice:
            raise ConfigError(f"{self.name} cannot be installed: {self.advice}")
        return sys.executable


def known(name: str, *, documented: float | None = None, how: str = "", advice: str = "") -> Known:
    return Known(
        name,
        name.title(),
        DRIVER,
        Here(name, advice=advice),
        ("send",),
        ("echo",),
        "test",
        {} if documented is None else {"reno": documented},
        {"BENCH_DRIVER": how},
    )


OPTIONS = PeersOptions(
    congestion=("reno",), blocks=(64 << 10, 1 << 20), rounds=2, region_bytes=16 << 20, move_bytes=8 << 20, pings=20
)


def measure(monkeypatch, *them: Known) -> dict:
    monkeypatch.setattr(peers, "KNOWN", them)
    options = dataclasses.replace(OPTIONS, peers=tuple(k.name for k in them))
    options.check()
    with Steps(None, "peers") as steps:
        return peers.measure(options, "reno", steps)


def test_everyone_in_turns(monkeypatch):
    run = measure(
        monkeypatch,
        known("fair", documented=1e-6),
        known("slow", documented=1e6),
        known("missing", advice="no wheel"),
        known("broken", how="broken"),
        known("liar", how="corrupts"),
    )
    assert set(run["peers"]) == {"fair", "slow", "liar"}
    assert run["not_installed"]["missing"] == "missing cannot be installed: no wheel"
    assert "this one is broken" in run["not_installed"]["broken"]
    assert run["void"] == ["slow"]
    fair = run["peers"]["fair"]
    assert fair["verified"] is True
    assert run["peers"]["liar"]["verified"] is False
    assert set(fair["moves"]["send"]) == {"65536", "1048576"}
    for measured in fair["moves"]["send"].values():
        assert measured["gb_per_s"]["n"] == 2
        assert measured["initiator_cpu_s_per_gb"] > 0
        assert measured["target_cpu_s_per_gb"] > 0
    assert fair["p50_us"] > 0
    assert fair["to_c_at_1_mib"]["n"] == 2
    ours = run["kvtransport"]
    assert ours["verified"] is True
    assert set(ours["moves"]) == {"objects", "pages"}
    assert ours["facts"]["congestion"] == "reno"
    assert run["c"]["facts"] == {"connections": 4, "congestion": "reno"}
    ratio = fair["ours_over_it"]["objects"]["1048576"]
    rounds = ours["moves"]["objects"]["1048576"]["rounds"]
    theirs = fair["moves"]["send"]["1048576"]["rounds"]
    expected = sorted(a["gb_per_s"] / b["gb_per_s"] for a, b in zip(rounds, theirs, strict=True))
    assert [ratio["min"], ratio["max"]] == pytest.approx(expected)
    # The same object makes the table and the page.
    body = {"command": "peers", "options": dataclasses.asdict(OPTIONS), "ping_bytes": 4096, "runs": [run]}
    body = json.loads(json.dumps(body))
    out = Console(file=io.StringIO(), width=160)
    peers.render(out, body)
    assert "missing took no part" in out.file.getvalue()
    assert "void for slow" in out.file.getvalue()
    assert "(bytes differ)" in out.file.getvalue()
    assert "<svg" in report.page([("peers.json", body)], "x")


def test_a_peer_runs_the_congestion_control_and_is_frozen_between_its_turns():
    pair = peers.start_known(known("it"), OPTIONS, "reno", lambda _: None)
    try:
        assert pair.facts["congestion"] == "reno"
        pids = (pair.target.pid, pair.initiator.pid)
        assert all(state(pid) == "T" for pid in pids)
        with pair.turn():
            assert all(state(pid) != "T" for pid in pids)
            assert pair.move("send", 1 << 20, 0, 8 << 20)["gb_per_s"] > 0
            assert pair.agree(0, 8 << 20)
            assert not pair.agree(0, 16 << 20)
        assert all(state(pid) == "T" for pid in pids)
    finally:
        pair.close()
    assert gone(pids)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_peer_that_dies_is_left_out_and_named(monkeypatch):
    real = peers.Pair.move
    killed: list[int] = []

    def move(self, *args):
        if self.name == "mortal" and not killed:
            killed.append(self.target.pid)
            os.kill(self.target.pid, signal.SIGKILL)
        return real(self, *args)

    monkeypatch.setattr(peers.Pair, "move", move)
    run = measure(monkeypatch, known("mortal"), known("fair"))
    assert "mortal target process" in run["peers"]["mortal"]["failed"]
    assert run["peers"]["fair"]["moves"]["send"]["1048576"]["gb_per_s"]["n"] == 2
    assert run["peers"]["mortal"]["ours_over_it"] == {"objects": {}, "pages": {}}


HOLD = """
import sys
from kvtransport.bench import peers
pair = peers.start_ours(peers.PeersOptions(region_bytes=16 << 20), "reno")
print(pair.target.pid, pair.initiator.pid, flush=True)
sys.stdin.read()
"""


def test_frozen_peers_end_with_whoever_froze_them_however():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = [int(n) for n in process.stdout.readline().split()]
    assert all(state(pid) == "T" for pid in pids)
    process.kill()
    process.communicate(timeout=10)
    assert gone(pids)


def test_the_drivers_and_what_is_known_of_them():
    for each in KNOWN:
        text = (peers.DRIVERS / each.driver).read_text()
        compile(text, each.driver, "exec")
        assert "import kvtransport" not in text
        assert "from kvtransport" not in text
        assert each.pings
        assert each.moves or each.latency_only


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peers": ("nobody",)}, "no peer 'nobody'"),
        ({"rounds": 0}, "--rounds must be"),
        ({"blocks": (12345,)}, "do not divide"),
        ({"congestion": ("nosuch",)}, "modprobe tcp_nosuch"),
    ],
)
def test_options_that_make_no_sense(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(OPTIONS, **change).check()


def test_an_environment_is_made_once_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    empty = Environment("empty")
    python = empty.make()
    assert Path(python).exists()
    said: list[str] = []
    assert empty.make(said.append) == python
    assert said == []
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    bad = Environment("bad", ("kvbench-no-such-package",))
    with pytest.raises(ConfigError, match="bad cannot be installed"):
        bad.make()
    assert not bad.path.exists()
    with pytest.raises(ConfigError, match="nosuchprogram is not installed: apt-get"):
        Environment("p", programs=("nosuchprogram",), advice="apt-get install it").make()


def test_an_unknown_peer_is_one_line():
    result = CliRunner().invoke(cli.app, ["peers", "--only", "nobody"])
    assert isinstance(result.exception, ConfigError)
