"""kvbench loopback: what it reports, that it verifies, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvtransport import presets
from kvtransport.bench.loopback import Loopback, LoopbackOptions
from kvtransport.bench.loopback_memory import CacheMemory, copies, page_sizes
from kvtransport.errors import ConfigError, RemoteError
from kvtransport.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"preset": "kimi-linear-48b", "tokens": 512, "connections": 2, "repeat": 2, "warmup": 0, "buffer_bytes": 0}


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pids) -> bool:
    for _ in range(1000):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


def kvbench(*args: str, **kwargs) -> subprocess.Popen:
    # As at a terminal, also where the tests run in the background of a script, which ignores Ctrl-C for its children.
    kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    return subprocess.Popen(
        [sys.executable, "-m", "kvtransport.bench.cli", "loopback", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_the_json_object():
    args = ["--tokens", "512", "--connections", "2", "--repeat", "2", "--warmup", "0", "--buffer-bytes", "0"]
    process = kvbench(*args, "--json", "-")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    body = json.loads(out)  # standard output carries the object alone
    total = presets.load("kimi-linear-48b").bytes_at(512)
    assert (body["preset"], body["tokens"], body["bytes"]) == ("kimi-linear-48b", 512, total)
    assert (body["connections"], body["chunk_bytes"], body["page_bytes"]) == (2, 1 << 20, 16 * 1024)
    assert body["page_bytes_by_tensor"]["mla/k_pe"] == 16 * 128
    assert body["page_bytes_by_tensor"]["kda/state"] == 0  # one piece
    assert body["checksum"] is True
    assert body["verified"] is True
    assert len(body["rounds"]) == 2
    assert body["goodput_gbps"] == pytest.approx(total * 8 / 1e9 / body["seconds"])
    assert body["seconds"] == pytest.approx(sum(r["seconds"] for r in body["rounds"]) / 2)
    assert body["sender_cpu_s_per_gb"] > 0
    assert body["receiver_cpu_s_per_gb"] > 0
    for each in body["rounds"]:
        assert each["checksums_verified"] == each["chunks"] > 0
    assert body["congestion"] in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    assert "median" in err
    assert "kimi-linear-48b, 512 tokens" in err


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        ({"checksum": False}, False),
        ({"contiguous": True}, True),
        ({"page_bytes": 5000, "chunk_bytes": 300_000}, True),
        ({"connections": 1, "buffer_bytes": 150_000_000}, True),
    ],
)
def test_every_way_of_laying_it_out_is_verified(change, checks):
    with Loopback(LoopbackOptions(**{**SMALL, **change})) as bench:
        rounds = [bench.round() for _ in range(bench.copies + 1)]  # each copy, and one of them again
        pids = bench.pids
    assert all(r.verified for r in rounds)
    assert all(r.checksums_verified == (r.chunks if checks else 0) for r in rounds)
    assert bench.copies == (4 if change.get("buffer_bytes") else 1)
    assert gone(pids)


def test_progress_is_live():
    told: list[int] = []
    with Loopback(LoopbackOptions(**{**SMALL, "tokens": 32_768, "connections": 1}), told.append) as bench:
        while not told:
            bench.round()
    assert 0 < told[0] <= bench.manifest.total_bytes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_workers_death_ends_everything_and_is_named(victim):
    with (
        pytest.raises(RemoteError, match=r"the (receiver|sender) process of this benchmark was killed by SIGKILL"),
        Loopback(LoopbackOptions(**SMALL)) as bench,
    ):
        pids = bench.pids
        bench.round()
        os.kill(pids[victim], signal.SIGKILL)
        bench.round()
    assert gone(pids)


def test_a_worker_that_fails_says_why():
    with pytest.raises(Exception, match="receiver: no arena 'kvbench-receiver'") as caught:
        Loopback(LoopbackOptions(**{**SMALL, "tokens": 1 << 24})).__enter__()
    assert caught.value.code == "arena"


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_nothing_is_left_after_ctrl_c_or_worse(how):
    args = ["--tokens", "512", "--repeat", "10000", "--buffer-bytes", "0"]
    process = kvbench(*args, start_new_session=True)
    workers: list[int] = []
    for _ in range(2000):
        workers = children(process.pid)
        if len(workers) == 2:
            break
        time.sleep(0.01)
    assert len(workers) == 2
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone
    else:
        process.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in err
    assert gone(workers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preset": "gpt-9"}, "gpt-9"),
        ({"tokens": 0}, "--tokens must be 1 to"),
        ({"connections": 65}, "--connections must be 1 to 64, got 65"),
        ({"chunk_bytes": 1 << 30}, "--chunk-bytes must be 4096 to 16777216"),
        ({"page_bytes": 1}, "--page-bytes must be 64 to"),
        ({"page_bytes": 4096, "contiguous": True}, "exclude each other"),
        ({"buffer_bytes": 1 << 50}, "--buffer-bytes must be 0 to"),
        ({"repeat": 0}, "--repeat must be 1 to"),
    ],
)
def test_options_that_make_no_sense(change, words):
    with pytest.raises(ConfigError, match=words):
        Loopback(LoopbackOptions(**{**SMALL, **change}))


def test_an_unknown_preset_is_one_line_on_the_command_line():
    process = kvbench("--preset", "gpt-9")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("kvbench: config error: ")
    assert len(err.splitlines()) == 1


# -- the memory ----------------------------------------------------------------------------------------


@pytest.fixture
def memory(hybrid):
    made: list[CacheMemory] = []

    def make(**kwargs) -> tuple[Manifest, CacheMemory]:
        manifest = Manifest.of_layout(hybrid, 300, transfer=bytes(16))
        sizes = page_sizes(hybrid, kwargs.pop("page_bytes", None), contiguous=kwargs.pop("contiguous", False))
        made.append(CacheMemory(manifest, sizes, count=2, name="test", **kwargs))
        return manifest, made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("how", [{}, {"page_bytes": 777}, {"contiguous": True}])
def test_no_two_places_share_memory(memory, how):
    manifest, cache = memory(seed=3, **how)
    for copy in range(2):
        for i, slot in enumerate(manifest.by_slot):
            pages = cache.pages[copy][slot]
            assert pages.nbytes == manifest.by_slot[slot].nbytes
            pages.copy_from(type(pages).of(np.full(pages.nbytes, 16 * copy + i + 1, np.uint8)))
    for copy in range(2):
        for i, slot in enumerate(manifest.by_slot):
            assert set(cache.pages[copy][slot].tobytes()) == {16 * copy + i + 1}


def test_pages_are_scattered_and_states_are_not(memory, hybrid):
    _, cache = memory(seed=3)
    full = cache.pages[0][5, 0].pieces
    assert len(full) == -(-300 // 16)
    neighbours = sum(full[1:, 0] == full[:-1, 0] + full[:-1, 1])
    assert neighbours < len(full) // 2
    assert len(cache.pages[0][0, 1].pieces) == 1


def test_blanking_and_a_flipped_bit_change_the_digests(memory):
    manifest, cache = memory(seed=3)
    cache.fill_random()
    before = [cache.digests(0), cache.digests(1)]
    first = next(iter(manifest.by_slot))
    cache.view[int(cache.pages[1][first].pieces[0, 0])] ^= 1
    after = cache.digests(1)
    assert [a == b for a, b in zip(before[1], after, strict=True)] == [False] + [True] * (len(after) - 1)
    cache.blank(0)
    assert all(a != b for a, b in zip(before[0], cache.digests(0), strict=True))
    assert cache.digests(1) == after


def test_copies():
    assert [copies(100, n) for n in (0, 1, 100, 101, 1000)] == [1, 1, 1, 2, 10]


def test_tls_takes_turns_with_plain_and_with_c_over_the_same_openssl():
    args = ["--tokens", "512", "--connections", "2", "--repeat", "2", "--warmup", "0", "--buffer-bytes", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "kvtransport.bench.cli", "loopback", "--tls", "--json", "-", *args],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["verified"]
    assert body["tls"]["cipher"] == "TLS_AES_128_GCM_SHA256"
    assert len(body["tls"]["plain_rounds"]) == len(body["rounds"]) == 2
    assert body["tls"]["goodput_ratio_to_plain"]["median"] > 0
    assert body["baseline"]["plain"]["verified"]
    assert body["baseline"]["hashing"]["goodput_ratio"]["median"] > 0
    assert "SSL_write" in done.stderr
    assert "CPU s/GB instead of" in " ".join(done.stderr.split())
