"""A short, seeded run of tests/fuzz/fuzz_wire.py, and proof that it would find something."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvtransport.wire import reader

TARGET = Path(__file__).parents[1] / "fuzz" / "fuzz_wire.py"


@pytest.fixture(scope="module")
def target():
    spec = importlib.util.spec_from_file_location("fuzz_wire", TARGET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(target, *, seed: int, inputs: int) -> list[tuple[bytes, Exception]]:
    outcomes = target.fuzz(target.load(None), seed=seed, go_on=lambda done: done < inputs)
    return [(data, exc) for data, exc in outcomes if exc is not None]


@pytest.mark.parametrize("seed", range(4))
def test_no_finding(target, seed):
    for data, exc in run(target, seed=seed, inputs=1500):
        pytest.fail(f"{exc!r} on {data.hex()}")


def test_mutations_reach_the_bodies(target):
    """Most inputs must get past the checks, or the fuzzer would only ever test xxh3."""
    rng = target.random.Random(7)
    frames = [frame for _ in range(300) for frame in target.parse([target.mutate(rng, target.GOLDEN)])[0]]
    assert len(frames) > 300
    assert {f.header.type for f in frames} == set(target.FrameType)
    refused = 0
    for frame in frames:
        if frame.error is None and frame.header.type is not target.FrameType.DATA:
            try:
                target.decode_control(frame.header, frame.payload)
            except target.KVError:
                refused += 1
    assert refused > 30


def test_it_finds_a_parser_that_does_not_verify(target, monkeypatch):
    monkeypatch.setattr(reader, "check_payload", lambda header, payload: None)
    assert run(target, seed=0, inputs=400)


def test_it_finds_a_foreign_exception(target, monkeypatch):
    def broken(header, payload, **_):
        raise KeyError(header.type)

    monkeypatch.setattr(target, "decode_control", broken)
    assert isinstance(run(target, seed=0, inputs=30)[0][1], KeyError)


def test_command_line_reports_and_keeps_findings(target, monkeypatch, tmp_path, capsys):
    assert target.main(["--seconds", "0.05", str(tmp_path)]) == 0
    assert "0 findings" in capsys.readouterr().out
    monkeypatch.setattr(target, "hold_machines", lambda frames: 1 // 0)
    assert target.main(["--seconds", "5", str(tmp_path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert len(list(tmp_path.glob("crash-*.bin"))) > 1
