"""Engines as the tests see them: processes that are started, asked, killed and frozen, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

START_TIMEOUT_S = 240.0
REPLY_TIMEOUT_S = 180.0

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    # For the NIXL engines: TCP alone, over loopback.
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "lo",
    "NIXL_LOG_LEVEL": "WARN",
}


class EngineError(RuntimeError):
    """An engine that did not do what it was told; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request. ``first_s``, ``end_s``: CLOCK_MONOTONIC seconds of the first token and of the end."""

    tokens: list[int]
    logprobs: list[list[list[float]]]
    reason: str | None
    cached: int | None
    params: dict[str, Any] | None
    first_s: float | None
    end_s: float

    def same_output(self, other: Result) -> bool:
        """Equal tokens, and top-5 log probabilities equal bit by bit (JSON keeps doubles exactly)."""
        return self.tokens == other.tokens and self.logprobs == other.logprobs


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with. ``core`` is the CPU its compute threads are bound to."""

    model: Path
    core: int
    kv_transfer: Mapping[str, Any] | None = None
    max_batched_tokens: int = 512
    max_seqs: int = 16
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs."""
        arguments: dict[str, Any] = {
            "model": str(self.model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 4_096,
            "dtype": "bfloat16",
            "seed": 0,
            "enable_prefix_caching": False,  # a reused prefix would be computed in other chunks: not bitwise
            "max_num_batched_tokens": self.max_batched_tokens,
            "max_num_seqs": self.max_seqs,
            "disable_log_stats": False,
        }
        if self.kv_transfer is not None:
            arguments["kv_transfer_config"] = dict(self.kv_transfer)
        return arguments


class Engine:
    """A running engine process; use as a context manager, or :meth:`close` it.

    Made without waiting: several start side by side; :meth:`wait_ready` before the first request.
    """

    def __init__(self, name: str, settings: EngineSettings, log: Path) -> None:
        self.name = name
        self.settings = settings
        self.log = log
        self.ready: dict[str, Any] = {}
        self._refused: dict[str, str] = {}
        self._first: dict[str, float] = {}
        self._results: dict[str, Result] = {}
        self._states: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._frozen = False
        commands_read, self._commands = os.pipe()
        events, events_write = os.pipe()
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "VLLM_CPU_OMP_THREADS_BIND": str(settings.core),
            **settings.environment,
        }
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.engine_process", str(commands_read), str(events_write)],
                cwd=Path(__file__).parents[2],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(commands_read, events_write),
            )
        os.close(commands_read)
        os.close(events_write)
        self._reader = threading.Thread(target=self._read, args=(events,), name=f"events of {name}", daemon=True)
        self._reader.start()
        self._write(settings.arguments())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- asking ------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Until the model is loaded and the cache allocated."""
        self._wait(lambda: bool(self.ready), timeout_s, "start")
        return self

    def add(
        self, request: str, prompt: Sequence[int], *, max_tokens: int = 16, params: Mapping[str, Any] | None = None
    ) -> None:
        """Submit a request; ``params`` become its kv_transfer_params."""
        self._write(
            {
                "do": "add",
                "id": request,
                "prompt": list(prompt),
                "max_tokens": max_tokens,
                "params": params and dict(params),
            }
        )

    def abort(self, request: str) -> None:
        """What a server does when its client is gone."""
        self._write({"do": "abort", "id": request})

    def result(self, request: str, timeout_s: float = REPLY_TIMEOUT_S) -> Result:
        """Wait for a request's end; raises EngineError when it was refused."""
        self._wait(lambda: request in self._results or request in self._refused, timeout_s, f"finish {request}")
        if request in self._refused:
            raise EngineError(f"{self.name} refused {request}: {self._refused[request]}")
        return self._results[request]

    def finished(self, request: str) -> bool:
        """Whether the request has ended (a look, no wait)."""
        with self._changed:
            return request in self._results

    def state(self, timeout_s: float = REPLY_TIMEOUT_S) -> dict[str, Any]:
        """The scheduler's counts now: free_blocks, requests, running, waiting."""
        with self._changed:
            seen = len(self._states)
        self._write({"do": "state"})
        self._wait(lambda: len(self._states) > seen, timeout_s, "tell its state")
        return self._states[-1]

    def wait_idle(self, timeout_s: float = REPLY_TIMEOUT_S) -> int:
        """Until the scheduler holds no request at all (delayed frees included); returns the free blocks then."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state())["requests"]:
            if time.monotonic() > deadline:
                raise EngineError(f"{self.name} still holds requests after {timeout_s:g} s: {state}\n{self.log_tail()}")
            time.sleep(0.05)
        return int(state["free_blocks"])

    # -- hurting -----------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL: no goodbye to anybody."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP: its sockets stay open, nobody answers."""
        self.process.send_signal(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)
        self._frozen = False

    def close(self) -> None:
        """End the process, kindly first; always leaves it dead and its descriptors closed."""
        if self._frozen:
            self.thaw()
        if self._commands >= 0:
            with contextlib.suppress(OSError):
                self._write({"do": "quit"})
            os.close(self._commands)
            self._commands = -1
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(5)

    def log_tail(self, lines: int = 40) -> str:
        """The end of the process's log."""
        return "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-lines:])

    # -- the pipe ----------------------------------------------------------------------------------

    def _write(self, command: Mapping[str, Any]) -> None:
        data = (json.dumps(command) + "\n").encode()
        while data:
            data = data[os.write(self._commands, data) :]

    def _read(self, events: int) -> None:
        with os.fdopen(events, "r") as lines:
            for line in lines:
                event = json.loads(line)
                with self._changed:
                    self._take(event)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "ready":
            self.ready = event
        elif kind == "first":
            self._first[event["id"]] = event["t"]
        elif kind == "finished":
            self._results[event["id"]] = Result(
                event["tokens"],
                event["logprobs"],
                event["reason"],
                event["cached"],
                event["params"],
                self._first.get(event["id"]),
                event["t"],
            )
        elif kind == "refused":
            self._refused[event["id"]] = event["error"]
        elif kind == "state":
            self._states.append(event)

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not done():
                left = deadline - time.monotonic()
                if self.process.poll() is not None and not self._reader.is_alive():
                    raise EngineError(
                        f"{self.name} ended with {self.process.returncode} before it could {what}\n{self.log_tail()}"
                    )
                if left <= 0:
                    raise EngineError(f"{self.name} did not {what} within {timeout_s:g} s\n{self.log_tail()}")
                self._changed.wait(min(left, 0.5))


def free_port() -> int:
    """A TCP port of loopback that nobody listens on, below the range that outgoing connections take theirs from."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
