"""A prefill engine and a decode engine with a KV connector between them, and requests that pass through both."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .engine import Engine, EngineSettings, Result, free_port

PREFILL_CORE, DECODE_CORE = 0, 1
"""Compute threads are bound: two engines sharing a core's threads are six times slower."""

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class PairResult:
    """What both engines said of one request."""

    prefill: Result
    decode: Result

    @property
    def gap_s(self) -> float:
        """From the end of prefill (its step returned) to the first token of decode, seconds."""
        assert self.decode.first_s is not None
        return self.decode.first_s - self.prefill.end_s


class Turns:
    """Pairs that take turns: the processes of the one that waits are stopped."""

    prefill: Engine
    decode: Engine

    def pause(self) -> None:
        """Stop both engines (SIGSTOP) once they hold no request."""
        self.free_blocks()
        self.prefill.freeze()
        self.decode.freeze()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Self]:
        """The engines run inside."""
        self.decode.thaw()
        self.prefill.thaw()
        try:
            yield self
        finally:
            self.prefill.freeze()
            self.decode.freeze()

    def free_blocks(self) -> tuple[int, int]:
        """Free blocks of prefill and decode once both hold no request."""
        return self.prefill.wait_idle(), self.decode.wait_idle()


@dataclass
class KvTransportPair(Turns):
    """Two engines joined by our connector. ``extra`` goes into both sides' kv_connector_extra_config."""

    model: Path
    work: Path
    extra: Mapping[str, Any] = field(default_factory=dict)
    max_batched_tokens: int = 512
    port: int = field(default_factory=free_port)
    prefill: Engine = field(init=False)
    decode: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.decode = self.start_decode()
        self.prefill = self.start_prefill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait_ready(self) -> Self:
        """Until both engines answer."""
        self.prefill.wait_ready()
        self.decode.wait_ready()
        return self

    def close(self) -> None:
        """End both engines."""
        try:
            self.prefill.close()
        finally:
            self.decode.close()

    def start_prefill(self, **settings: Any) -> Engine:
        """A new prefill engine for this pair; the caller puts it in place and closes the old one."""
        return self._start("producer", PREFILL_CORE, {}, settings)

    @contextlib.contextmanager
    def with_decode(self, **extra: Any) -> Iterator[KvTransportPair]:
        """The same prefill engine with another decode engine, on another port, for a while."""
        other = copy.copy(self)
        other.port = free_port()
        other.decode = other.start_decode(**extra)
        with other.decode:
            other.decode.wait_ready()
            yield other

    @contextlib.contextmanager
    def with_prefill(self, **settings: Any) -> Iterator[KvTransportPair]:
        """The same decode engine with another prefill engine for a while; ``settings`` are fields of EngineSettings."""
        other = copy.copy(self)
        other.prefill = other.start_prefill(**settings)
        with other.prefill:
            other.prefill.wait_ready()
            yield other

    def start_decode(self, **extra: Any) -> Engine:
        """A new decode engine on the pair's port."""
        return self._start("consumer", DECODE_CORE, {"listen_host": "127.0.0.1", "listen_port": self.port, **extra}, {})

    def _start(self, role: str, core: int, extra: Mapping[str, Any], settings: Mapping[str, Any]) -> Engine:
        name = f"{self.model.name}-{role}-{next(_numbers)}"
        config = {
            "kv_connector": "KvTransportConnector",
            "kv_connector_module_path": "kvpool.engines.vllm",
            "kv_role": f"kv_{role}",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"debug_dir": str(self.work), "debug_hashes": True, **self.extra, **extra},
        }
        chosen = {"max_batched_tokens": self.max_batched_tokens, **settings}
        return Engine(name, EngineSettings(self.model, core, config, **chosen), self.work / f"{name}.log")

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, request: str, prompt: Sequence[int], *, max_tokens: int = 16, port: int | None = None) -> str:
        """Hand ``request`` to both engines at once; ``port``: a relay in front of decode. Returns the transfer's name.

        Decode hears of it first: it names the transfer and expects it.
        """
        transfer = os.urandom(16).hex()
        self.decode.add(
            request, prompt, max_tokens=max_tokens, params={"do_remote_prefill": True, "transfer_id": transfer}
        )
        self.prefill.add(
            request,
            prompt,
            max_tokens=1,
            params={
                "do_remote_decode": True,
                "transfer_id": transfer,
                "remote_host": "127.0.0.1",
                "remote_port": port or self.port,
            },
        )
        return transfer

    def run(self, request: str, prompt: Sequence[int], *, max_tokens: int = 16, port: int | None = None) -> PairResult:
        """One request through both engines, alone."""
        self.submit(request, prompt, max_tokens=max_tokens, port=port)
        return PairResult(self.prefill.result(request), self.decode.result(request))

    # -- what the connector wrote (its debug_dir) ----------------------------------------------------

    def records(self, kind: str, role: str) -> list[dict[str, Any]]:
        """The JSON lines of ``kind`` ("hashes", "transfers") that connectors of ``role`` wrote, all processes together."""
        lines: list[dict[str, Any]] = []
        for path in sorted(self.work.glob(f"{kind}-{role}-*.jsonl")):
            # A process that was killed may have left half a line.
            lines += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return lines

    def transfer(self, role: str, transfer: str) -> dict[str, Any]:
        """The record of one ended transfer on one side."""
        found = [record for record in self.records("transfers", role) if record["transfer"] == transfer]
        assert len(found) == 1, f"{role} wrote {len(found)} records of transfer {transfer}"
        return found[0]

    def hashes(self, role: str, transfer: str) -> dict[tuple[str, str], tuple[str, int]]:
        """(layer, tensor) -> (hash, bytes) of one transfer on one side."""
        return {
            (record["layer"], record["tensor"]): (record["hash"], record["bytes"])
            for record in self.records("hashes", role)
            if record["transfer"] == transfer
        }


@dataclass
class NixlPair(Turns):
    """The same two engines joined by vLLM's own NixlConnector, UCX over TCP. Decode reads when prefill has ended."""

    model: Path
    work: Path
    max_batched_tokens: int = 512
    prefill: Engine = field(init=False)
    decode: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.decode = self._start("consumer", DECODE_CORE)
        self.prefill = self._start("producer", PREFILL_CORE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait_ready(self) -> Self:
        """Until both engines answer."""
        self.prefill.wait_ready()
        self.decode.wait_ready()
        return self

    def close(self) -> None:
        """End both engines."""
        try:
            self.prefill.close()
        finally:
            self.decode.close()

    def _start(self, role: str, core: int) -> Engine:
        name = f"{self.model.name}-nixl-{role}-{next(_numbers)}"
        config = {
            "kv_connector": "NixlConnector",
            "kv_role": f"kv_{role}",
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "recompute",
        }
        environment = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        settings = EngineSettings(
            self.model, core, config, max_batched_tokens=self.max_batched_tokens, environment=environment
        )
        return Engine(name, settings, self.work / f"{name}.log")

    def run(self, request: str, prompt: Sequence[int], *, max_tokens: int = 16) -> PairResult:
        """One request: prefill, then what it answered goes to decode, as vLLM's proxy does it."""
        params = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        self.prefill.add(request, prompt, max_tokens=1, params=params)
        prefill = self.prefill.result(request)
        self.decode.add(request, prompt, max_tokens=max_tokens, params=prefill.params)
        return PairResult(prefill, self.decode.result(request))
