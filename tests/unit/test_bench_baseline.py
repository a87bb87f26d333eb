"""What surrounds the C loop: medians and ratios, compiling on demand, choosing the better variant."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from kvtransport.bench import compiled
from kvtransport.bench.baseline import BaselineRound, Variant, compare, variants
from kvtransport.bench.summary import paired_ratio, quartiles, spread
from kvtransport.errors import ConfigError


def test_spread():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "iqr": 2.0,
        "min": 1.0,
        "max": 5.0,
        "n": 5,
    }


def test_a_ratio_of_pairs_survives_what_disturbs_both():
    ours, theirs = [8.0, 4.0, 9.0], [10.0, 5.0, 10.0]
    ratio = paired_ratio(ours, theirs)
    assert (ratio["median"], ratio["n"]) == (0.8, 3)
    assert ratio["of_medians"] == 0.8
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def made(gbps: float, cpu: float = 0.1) -> BaselineRound:
    return BaselineRound(1 / gbps, gbps, cpu, cpu, verified=True)


def test_the_better_receive_piece_is_what_counts():
    assert [v.name for v in variants(hashing=True)] == [
        "plain-1024KiB",
        "plain-256KiB",
        "hashing-1024KiB",
        "hashing-256KiB",
    ]
    assert len(variants(hashing=False)) == 2
    rounds = {
        Variant(1 << 20, False): [made(10), made(10), made(100)],
        Variant(256 << 10, False): [made(20), made(20), made(20)],
        Variant(1 << 20, True): [made(8), made(8), made(8)],
    }
    out = compare([made(10, 0.2)] * 3, rounds)
    assert out["plain"]["receive_bytes"] == 256 << 10
    assert out["plain"]["goodput_ratio"]["median"] == pytest.approx(0.5)
    assert out["plain"]["cpu_ratio"]["median"] == pytest.approx(2.0)
    assert set(out["plain"]["rounds"]) == {"plain-1024KiB", "plain-256KiB"}
    assert out["hashing"]["goodput_ratio"]["median"] == pytest.approx(1.25)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvtransport"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that notes each call and writes what it was told to."""

    def make(body: str) -> Path:
        path = tmp_path / "cc"
        path.write_text(f'#!/bin/sh\ncase "$1" in --version) echo fake 1.0; exit;; esac\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))
        return path

    return make


GOOD = 'while [ "$1" != -o ]; do shift; done; echo program > "$2"; echo x >> "$0.calls"'


def test_a_program_is_compiled_once(cache, compiler):
    cc = compiler(GOOD)
    made = compiled.program("baseline", headers=("xxhash.h",))
    assert made.parent == cache
    assert compiled.program("baseline", headers=("xxhash.h",)) == made
    assert Path(f"{cc}.calls").read_text() == "x\n"
    assert [p.name for p in cache.iterdir()] == [made.name]  # no work left behind


def test_another_compiler_makes_another_program(cache, compiler):
    compiler(GOOD)
    first = compiled.program("baseline")
    compiler(GOOD).write_text(Path(compiler(GOOD)).read_text().replace("fake 1.0", "fake 2.0"))
    assert compiled.program("baseline") != first


def test_what_the_compiler_says_is_told_and_nothing_is_kept(cache, compiler):
    compiler("echo no such header >&2; exit 1")
    with pytest.raises(ConfigError, match=r"could not compile baseline\.c: no such header"):
        compiled.program("baseline")
    assert list(cache.iterdir()) == []


def test_no_compiler_says_what_to_install(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt-get install gcc"):
        compiled.program("baseline")
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(ConfigError, match="cannot run the C compiler '/nowhere/cc'"):
        compiled.program("baseline")
