"""Engine tests: real vLLM engines in processes of their own. `make test-engines` runs them, in an environment of their own.

They are not collected otherwise: they need vLLM (3.5 GB) and minutes. Nothing is skipped here: what cannot run fails,
and a run with a skip ends non-zero.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .engine import Engine, EngineSettings, Result
from .models import MODELS, prompt
from .pair import PREFILL_CORE, KvTransportPair
from .plot import LayerTrace
from .report import Report

SELECTED = os.environ.get("KVPOOL_TEST_ENGINES") == "1"
OUT = Path(os.environ.get("ENGINES_OUT", "benchmarks/results/local/engines"))

if not SELECTED:
    collect_ignore_glob = ["test_*.py"]

# Multiples of the prefill step plus one: reference, prefill and a decode engine that recomputes then cut the prompt at
# the same tokens, and a cut elsewhere is not bitwise the same in bfloat16.
STEP = 512
LENGTHS = (STEP + 1, 2 * STEP + 1, 4 * STEP + 1)

FAST_LOSS = {
    "keepalive_s": 1.0,
    "dead_after_s": 5.0,
    "reconnect_s": 2.0,
    "receive_deadline_s": 180.0,
    "send_deadline_s": 180.0,
}

_report = Report()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engines: starts real inference engines; make test-engines")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)
            item.add_marker(pytest.mark.timeout(900))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if SELECTED and reporter is not None and reporter.stats.get("skipped") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if not _report.rows:
        return
    terminalreporter.section("vLLM over kvtransport")
    for line in _report.table():
        terminalreporter.write_line(line)
    if terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("skipped tests count as failures here", red=True)
    path = OUT / "vllm.json"
    _report.save(path, "passed" if exitstatus == 0 else "failed")
    terminalreporter.write_line(f"saved {path}")


@pytest.fixture(scope="session")
def report() -> Report:
    """Rows and figures of this run."""
    return _report


@pytest.fixture(scope="session")
def out() -> Path:
    """Where plots go."""
    OUT.mkdir(parents=True, exist_ok=True)
    return OUT


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every tiny model, made in a process of its own."""
    directory = tmp_path_factory.mktemp("models")
    subprocess.run(
        [sys.executable, "-m", "tests.engines.models", ",".join(MODELS), str(directory)],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    return directory


@dataclass(slots=True)
class Setup:
    """A pair of engines, and what an engine without any connector answers to the same prompts."""

    name: str
    pair: KvTransportPair
    expected: dict[int, Result]

    def prompt(self, tokens: int) -> list[int]:
        """The prompt of so many tokens that ``expected`` is about."""
        return prompt(tokens, tokens)


def start_setup(name: str, models: Path, work: Path) -> Iterator[Setup]:
    """Start the pair, let a reference engine answer meanwhile, end it; then the setup; then everything is ended."""
    settings = EngineSettings(models / name, PREFILL_CORE, max_batched_tokens=STEP)
    pair = KvTransportPair(models / name, work, extra=FAST_LOSS)
    with pair:
        with Engine(f"{name}-reference", settings, work / f"{name}-reference.log") as reference:
            reference.wait_ready()
            expected = {}
            for tokens in LENGTHS:
                reference.add(f"r{tokens}", prompt(tokens, tokens))
                expected[tokens] = reference.result(f"r{tokens}")
        pair.wait_ready()
        yield Setup(name, pair, expected)


@pytest.fixture(scope="session")
def hybrid(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """The hybrid model's engines, kept for the whole run: most cases use them."""
    yield from start_setup("qwen3_next", models, tmp_path_factory.mktemp("qwen3_next"))


@pytest.fixture(scope="module")
def dense_one_step(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvTransportPair]:
    """A dense pair that prefills a prompt in one step, so that every layer is computed once."""
    with KvTransportPair(
        models / "llama", tmp_path_factory.mktemp("llama"), FAST_LOSS, max_batched_tokens=4_096
    ) as pair:
        pair.wait_ready()
        pair.run("warm-up", prompt(4_000, 0))
        yield pair


@pytest.fixture(scope="module")
def traces() -> dict[str, LayerTrace]:
    """Filled by the cases of one module; the last one draws."""
    return {}
