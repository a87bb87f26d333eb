"""``kvbench models``: the figures, the JSON contract, and errors as one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtransport import presets
from kvtransport.bench import cli, models, output
from kvtransport.errors import ConfigError

K = 1_024
runner = CliRunner(env={"COLUMNS": "200"})


def test_sizes_and_implied_prefill_seconds() -> None:
    row = models.model_row("minimax-m2.5")
    assert [s.tokens for s in row.sizes] == [K, 8 * K, 32 * K, 128 * K]
    assert (row.state_bytes, row.window_bytes, row.bytes_per_token) == (0, 0, 62 * 4096)
    at_32k = row.sizes[2]
    assert at_32k.bytes == 62 * 4096 * 32 * K
    assert at_32k.prefill_seconds == pytest.approx(62 * 4096 * 32 * K * 8 / 59.93e9)
    for name in presets.names():
        row = models.model_row(name)
        long = row.sizes[-1]
        assert long.bytes == row.state_bytes + row.window_bytes + row.bytes_per_token * long.tokens
        assert sum(row.group_bytes_32k.values()) == row.sizes[2].bytes


def test_the_case_study_implies_its_own_latencies() -> None:
    for size in models.model_row("prfaas-1t").sizes:
        assert size.published_prefill_seconds is not None
        assert size.prefill_seconds == pytest.approx(size.published_prefill_seconds, rel=0.03)


def test_ratios_say_what_comes_out_and_why_not() -> None:
    mimo, qwen, ring = models.ratios()
    assert (mimo.published, qwen.published, ring.published) == (13, 4, 36)
    assert mimo.from_table == pytest.approx(59.93 / 4.66)
    assert mimo.from_geometry == pytest.approx(10.66, abs=0.01)
    assert qwen.from_table == pytest.approx(33.35 / 8.25)
    assert qwen.from_geometry == pytest.approx(5.26, abs=0.01)
    for ratio in (mimo, qwen):
        assert ratio.comes_out
        assert ratio.from_table == pytest.approx(ratio.parts["cache_bytes"] * ratio.parts["prefill_time"])
    assert not ring.comes_out
    assert ring.from_geometry == pytest.approx(ring.parts["mla"] * ring.parts["pattern"])
    assert ring.parts["pattern"] == 8
    assert ring.parts["mla"] == pytest.approx(2048 / 576)
    assert "4.5x would need 5,184" in ring.why


def test_json_to_standard_output_leaves_the_tables_to_standard_error() -> None:
    result = runner.invoke(cli.app, ["models", "--json", "-"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert [m["preset"] for m in body["models"]] == presets.names()
    assert [r["comes_out"] for r in body["ratios"]] == [True, True, False]
    assert body["models"][0]["sizes"][0]["bytes"] == presets.load("kimi-linear-48b").bytes_at(K)
    assert "kimi-linear-48b" in result.stderr
    assert "comes" in result.stderr


def test_json_to_a_file_and_tables_to_standard_output(tmp_path: Path) -> None:
    target = tmp_path / "models.json"
    result = runner.invoke(cli.app, ["models", "--json", str(target)])
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written.pop("recorded").keys() >= {"at", "cpu", "cores", "kernel", "load_average_before"}
    assert written == {"command": "models", **json.loads(json.dumps(models.report()))}
    assert "ring-2.5-1t" in result.stdout
    assert result.stderr == ""


def test_help_has_examples() -> None:
    result = runner.invoke(cli.app, ["models", "--help"])
    assert result.exit_code == 0
    assert "kvbench models --json -" in result.output


def test_main_prints_an_error_of_ours_as_one_line_and_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "missing" / "models.json"
    monkeypatch.setattr(sys, "argv", ["kvbench", "models", "--json", str(target)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err == f"kvbench: config error: cannot write the JSON to '{target}': No such file or directory\n"


def test_write_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        output.write_json(str(tmp_path / "x.json"), {"rate": float("nan")})
    with pytest.raises(ConfigError, match="Is a directory"):
        output.write_json(str(tmp_path), {"rate": 1.0})
