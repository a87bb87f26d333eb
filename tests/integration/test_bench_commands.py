"""sweep, pipeline, serve and send, crowd, wan, report: JSON keys, clear errors, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtransport import presets
from kvtransport.bench import cli, plots, wan
from kvtransport.bench.send import SendOptions
from kvtransport.errors import ConfigError, HandshakeError, InsecureBindError, KVError, LimitError

from .test_bench_loopback import children, gone

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sixteen bytes or more"


def kvbench(*args: str, **env: str) -> tuple[dict, str]:
    """The JSON object of a command that works, and what it printed for people."""
    result = CliRunner(env={"COLUMNS": "160", **env}).invoke(cli.app, [*args, "--json", "-"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "kvtransport.bench.cli", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def assert_documented(body: dict) -> None:
    """Every key of the object, of its rounds and cells stands in docs/kvbench.md."""
    known = set(re.findall(r"[`.\[\]]([a-z_0-9]+)[`.\[\]]", (ROOT / "docs" / "kvbench.md").read_text())) | {
        "command",
        "recorded",
    }
    rounds = body.get("rounds", [])
    found = set(body) | {key for each in (rounds if isinstance(rounds, list) else []) for key in each}
    found |= {key for each in body.get("cells", []) for key in each}
    assert found <= known, f"not in docs/kvbench.md: {sorted(found - known)}"


def test_it_works_without_torch_and_matplotlib():
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib'): sys.modules[name] = None\n"
        "from kvtransport.bench import cli\n"
        "sys.argv = ['kvbench', 'crowd', '--count', '2', '--total-bytes', '1048576', '--repeat', '1', '--json', '-']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "crowd"


def test_sweep_pipeline_crowd_and_a_report_of_them(tmp_path):
    sweep, shown = kvbench(
        "sweep", "--tokens", "256", "--connections", "1,2", "--chunks", "262144,1048576", "--repeat", "2"
    )
    assert [(c["connections"], c["chunk_bytes"], c["page_bytes"]) for c in sweep["cells"]] == [
        (n, c, p) for p in (0, 18432) for n in (1, 2) for c in (262144, 1048576)
    ]
    for cell in sweep["cells"]:
        assert len(cell["rounds"]) == 2
        assert {r["connections"] for r in cell["rounds"]} == {cell["connections"]}
        assert cell["ratio_to_c"]["n"] == 2
    assert sweep["best"].keys() == {"connections", "chunk_bytes", "page_bytes"}
    assert [each["tokens"] for each in sweep["answer"]["lengths"]] == [1024, 8192, 32768, 131072]
    assert "instances" in shown

    pipeline, _ = kvbench("pipeline", "--tokens", "256", "--seconds", "0.27", "--repeat", "2")
    assert pipeline["bytes"] == presets.load("kimi-linear-48b").bytes_at(256)
    assert pipeline["prefill_seconds"] == 0.27
    for each in pipeline["rounds"]:
        assert each["prefill_s"] >= 0.267  # uvloop sleeps whole milliseconds
        assert each["sealed_s"] == pytest.approx(each["prefill_s"] + each["exposed_s"])
        assert each["bound_s"] == pytest.approx(each["last_layer_s"] + 1.5 * each["rtt_s"])
        ready = [layer["ready_s"] for layer in each["layers"]]
        assert len(ready) == 27
        assert ready == sorted(ready)
        for i, layer in enumerate(each["layers"]):
            # The loop's clock has milliseconds.
            assert layer["ready_s"] >= 0.01 * (i + 1) - 0.003
            assert layer["ready_s"] <= layer["applied_s"] + 0.003

    crowd, _ = kvbench(
        "crowd", "--count", "8", "--total-bytes", str(8 << 20), "--urgent-bytes", "65536", "--repeat", "2"
    )
    assert crowd["many_over_one"]["n"] == 2
    assert crowd["urgent_ratio"]["median"] > 0
    assert {k: len(v) for k, v in crowd["rounds"].items()} == {
        "one": 2,
        "many": 2,
        "urgent_alone": 2,
        "urgent_behind_bulk": 2,
    }

    for body in (sweep, pipeline, crowd):
        assert_documented(body)
    loopback, _ = kvbench("loopback", "--tokens", "256", "--repeat", "2", "--buffer-bytes", "0", "--baseline")
    doctor, _ = kvbench("doctor")
    files = []
    for body in (sweep, pipeline, crowd, loopback, doctor):
        path = tmp_path / f"{body['command']}.json"
        path.write_text(json.dumps(body))
        files.append(str(path))
        picture = tmp_path / f"{body['command']}.svg"
        if body["command"] != "doctor":
            plots.save(picture, body)
            assert "<svg" in picture.read_text()
    page = tmp_path / "report.html"
    told, _ = kvbench("report", *files, "--out", str(page), "--title", "Ours & theirs")
    text = page.read_text()
    assert told["sections"] == ["sweep", "pipeline", "crowd", "loopback", "doctor"]
    assert text.count("<svg") == 4
    assert "Ours &amp; theirs" in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "was not written by kvbench"),
        ('{"command": "sing"}', "was not written by kvbench"),
        ('{"command": "wan"}', "is not what this version of kvbench writes: KeyError"),
    ],
)
def test_a_report_of_something_else(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        kvbench("report", str(path), "--out", str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_pictures_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"writes .svg, .png, .pdf, not '.bmp'"):
        kvbench("crowd", "--plot", str(tmp_path / "x.bmp"))
    with pytest.raises(ConfigError, match="there is no directory"):
        kvbench("crowd", "--plot", str(tmp_path / "no" / "x.svg"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvtransport\[bench\]'"):
        kvbench("crowd", "--plot", str(tmp_path / "x.svg"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sweep", "--connections", "x"], "--connections takes numbers"),
        (["sweep", "--connections", ","], "--connections needs at least one"),
        (["sweep", "--chunks", "1"], "--chunks must be 4096"),
        (["pipeline", "--seconds", "0"], "--seconds must be"),
        (["crowd", "--count", "1"], "--count must be"),
        (["send", "127.0.0.1:0"], "the port must be"),
        (["wan", "--loss", "200"], "loss_percent of 0 to 100"),
    ],
)
def test_options_that_make_no_sense(args, words):
    with pytest.raises(ConfigError, match=words):
        kvbench(*args)


# -- serve and send ------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A server on a free port; its address."""
    started: list[subprocess.Popen] = []

    def make(*args: str) -> str:
        process = start("serve", "--port", "0", *args)
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("listening on"), line + process.stderr.read()
        return line.split()[-1]

    yield make
    for process in started:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert out.count("sends") == out.count("is done")


SEND_OPTIONS = {f.name for f in dataclasses.fields(SendOptions)}


def test_send_to_a_server(server):
    address = server()
    for extra in ([], ["--contiguous", "--no-checksum"], ["--page-bytes", "5000", "--connections", "2"]):
        body, shown = kvbench("send", address, "--tokens", "300", "--repeat", "2", *extra)
        assert len(body["rounds"]) == 2
        assert all(r["verified"] for r in body["rounds"])
        assert all(r["checksums_verified"] == (0 if "--no-checksum" in extra else r["chunks"]) for r in body["rounds"])
        assert body["bytes"] == presets.load("kimi-linear-48b").bytes_at(300)
        assert body["answer"]["goodput_gbps"] == body["goodput_gbps"]["median"]
        assert "every byte verified" in shown
        assert_documented({k: v for k, v in body.items() if k not in SEND_OPTIONS})


def test_send_over_tls(server, pki):
    address = server(
        "--ca", str(pki / "ca.pem"), "--cert", str(pki / "n1.pem"), "--key", str(pki / "n1.key"), "--token", SECRET
    )
    body, _ = kvbench(
        "send", address, "--tokens", "300", "--repeat", "1", "--ca", str(pki / "ca.pem"), "--token", SECRET
    )
    assert body["tls"] is True
    assert str(pki) not in json.dumps(body)
    with pytest.raises(KVError):
        kvbench("send", address, "--tokens", "300", "--repeat", "1", "--token", SECRET)  # not TLS
    for args, words in ((["--cert", "a"], "belong together"), (["--cert", "a", "--key", "b"], "needs --ca")):
        with pytest.raises(ConfigError, match=words):
            kvbench("send", address, *args)


def test_a_server_refuses_what_it_must(server):
    address = server("--token", SECRET, "--max-memory", "60000000")
    with pytest.raises(HandshakeError):
        kvbench("send", address, "--tokens", "300")
    body, _ = kvbench("send", address, "--tokens", "300", "--repeat", "1", KVBENCH_TOKEN=SECRET)
    assert SECRET not in json.dumps(body)
    with pytest.raises(LimitError, match="--max-memory"):
        kvbench("send", address, "--tokens", "30000", "--repeat", "1", "--token", SECRET)


def test_beyond_loopback_only_where_it_is_said():
    process = start("serve", "--host", "0.0.0.0", "--port", "0")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "insecure" in err
    with pytest.raises(InsecureBindError):
        kvbench("send", "192.0.2.1", "--tokens", "300")


# -- ending --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
@pytest.mark.parametrize(
    "args",
    [["sweep", "--tokens", "512", "--repeat", "1000"], ["crowd", "--total-bytes", "4194304", "--repeat", "1000"]],
)
def test_nothing_is_left_after_ctrl_c_or_worse(args, how):
    process = start(*args)
    workers: set[int] = set()
    while len(workers) < 2:
        workers |= set(children(process.pid))
        assert process.poll() is None, process.stderr.read()
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    workers |= set(children(process.pid))
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in err
    assert gone(workers)


# -- wan -----------------------------------------------------------------------------------------------

SMALL = ["--connections", "2", "--congestion", "reno", "--seconds", "1", "--repeat", "1", "--finals", "1"]


@pytest.mark.netns
def test_wan_on_a_small_grid(tmp_path, monkeypatch):
    nbytes = presets.load("kimi-linear-48b").bytes_at(256)
    for name, value in (("COLD_TOKENS", 256), ("COLD_BYTES", nbytes), ("BEFORE_S", 0.5), ("AFTER_S", 1.5)):
        monkeypatch.setattr(wan, name, value)
    out = tmp_path / "wan.json"
    args = ["wan", *SMALL, "--rtt", "2,6", "--loss", "0.01", "--rate-mbit", "800"]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, [*args, "--json", str(out)])
    assert result.exit_code == 0, result.output
    body = json.loads(out.read_text())
    assert_documented(body)
    assert [c["conditions"]["rtt_ms"] for c in body["cells"]] == [2.0, 6.0]
    for cell in body["cells"]:
        steady, cold = cell["steady"], cell["cold"]
        assert steady["best"] == "reno x2"
        assert steady["ratio"] == pytest.approx(steady["ours_gbps"] / steady["best_gbps"])
        assert 0 < steady["ours_gbps"] <= 0.8
        assert cold["bytes"] == nbytes
        assert 0 < cold["ours_gbps"] <= 0.8
        assert cell["link"][0]["segments"] > 10_000
        assert cell["link"][0]["lost"] > 0
    assert len(body["changes"]) == 2
    for change in body["changes"]:
        assert change["reference"] == "the best of iperf3"
        assert len(change["rounds"][0]["series_gbps"]) > 15
    told, _ = kvbench("report", str(out), "--out", str(tmp_path / "r.html"))
    assert told["sections"] == ["wan"]


@pytest.mark.netns
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_wan_leaves_no_process_and_no_device(how):
    before = set(os.listdir("/sys/class/net"))
    process = start("wan", *SMALL, "--rtt", "2", "--loss", "0")
    workers: set[int] = set()
    while len(workers) < 3:  # the emulator, iperf3 twice
        workers |= set(children(process.pid))
        assert process.poll() is None, process.stderr.read()
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert gone(workers)
    assert set(os.listdir("/sys/class/net")) == before
