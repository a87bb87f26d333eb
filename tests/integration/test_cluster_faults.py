"""make test-cluster leaves nothing behind, however it ends; its switch does to packets what it is told. The faults themselves: make test-cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster_faults.switch import Line, Switch

from .test_bench_loopback import alive, gone

pytestmark = pytest.mark.netns
ROOT = Path(__file__).resolve().parents[2]
PING = """
import json, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 9999))
s.settimeout(float(sys.argv[3]))
begin = time.monotonic()
s.sendto(b"?", (sys.argv[2], 9999))
try:
    s.recv(10)
except TimeoutError:
    print(json.dumps(None))
else:
    print(json.dumps(time.monotonic() - begin))
"""
PONG = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 9999))
print("ready", flush=True)
while True:
    data, peer = s.recvfrom(10)
    print("heard", flush=True)
    s.sendto(data, peer)
"""


def start(tmp_path: Path) -> tuple[subprocess.Popen, list[int]]:
    """``make test-cluster`` with its cluster up, and the processes it consists of."""
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster_faults", "--only", "rolling", "--at-once", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        # As at a terminal, also where the tests run in the background of a script, which ignores Ctrl-C for its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until and run.poll() is None:
        folders = list(tmp_path.iterdir())
        logs = {f.stem: f.read_text() for f in folders[0].glob("*.log")} if folders else {}
        if sum("joined as" in text for text in logs.values()) == 3:
            children = [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
            if len(children) >= 6:  # a switch, a Valkey, three nodes, a client
                return run, children
        time.sleep(0.05)
    run.kill()
    raise AssertionError(run.communicate()[1][-2000:])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_is_left_when_it_is_interrupted(tmp_path, how):
    run, children = start(tmp_path)
    assert all(map(alive, children))
    run.send_signal(how)
    _, said = run.communicate(timeout=120)
    assert gone(children)
    if how is signal.SIGKILL:
        return  # nobody was left to remove the folder
    assert run.returncode == 130
    assert "interrupted: everything that was started has ended" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_cannot_start_is_said_and_nothing_is_left(tmp_path):
    """No server: the stage fails half way."""
    program = "import sys; from tests.cluster_faults import __main__, stage; stage.valkey_program = lambda: '/bin/false'; sys.exit(__main__.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "--only", "flushall"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no stage: RuntimeError: valkey ended" in done.stdout
    assert not list(tmp_path.iterdir())


def test_links_are_delayed_and_cut_in_one_direction_alone():
    with Switch(3) as switch:
        pong = subprocess.Popen(
            [*switch.enter(1), sys.executable, "-c", PONG, switch.address(1)], stdout=subprocess.PIPE, text=True
        )

        def ping(host: int, patience_s: float) -> float | None:
            argv = [*switch.enter(host), sys.executable, "-c", PING, switch.address(host), switch.address(1)]
            done = subprocess.run([*argv, str(patience_s)], capture_output=True, text=True, check=True, timeout=60)
            answer: float | None = json.loads(done.stdout)
            return answer

        try:
            assert pong.stdout.readline() == "ready\n"
            assert ping(0, 20.0) is not None
            assert pong.stdout.readline() == "heard\n"
            switch.set([(0, 1, Line(delay_ms=100)), (1, 0, Line(delay_ms=200))])
            took = ping(0, 20.0)
            assert took is not None
            assert took >= 0.3
            assert pong.stdout.readline() == "heard\n"
            switch.set([(1, 0, Line(cut=True))])
            assert ping(0, 0.5) is None
            assert pong.stdout.readline() == "heard\n"  # it was heard, and its answer was not
            assert ping(2, 20.0) is not None
            assert pong.stdout.readline() == "heard\n"
            switch.set([(1, 0, Line()), (0, 1, Line(cut=True))])
            before = switch.stats()[0]["dropped"]
            assert ping(0, 0.5) is None
            assert switch.stats()[0]["dropped"] == before + 1
        finally:
            pong.kill()
            pong.communicate()


def test_without_root_it_says_what_is_needed():
    program = "import os, sys; os.geteuid = lambda: 1000; from tests.cluster_faults.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "make test-cluster puts processes into network namespaces" in done.stderr
    assert "need root" in done.stderr
