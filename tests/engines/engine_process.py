"""One vLLM engine in a process of its own, stepped in a loop, told what to do by JSON lines.

The engine core lives in this very process (no worker processes), so that a SIGKILL or SIGSTOP hits all of it, and its
scheduler's counts can be read. The loop is vLLM's own busy loop in small: step while there is work, yield 1 ms
after a step that ran nothing, sleep in select() when idle.

Commands come on one inherited descriptor, events leave on the other; standard output stays vLLM's log. Times are CLOCK_MONOTONIC
seconds, comparable between processes of one machine.

    {"do": "add", "id": "a", "prompt": [..], "max_tokens": 16, "params": {..} | null}
    {"do": "abort", "id": "a"}      {"do": "state"}      {"do": "quit"}

    {"event": "ready", ..}  {"event": "first", "id", "t"}  {"event": "finished", "id", "t", "tokens", "logprobs", ..}
    {"event": "state", "free_blocks", ..}  {"event": "refused", "id", "error"}
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any


def die_with_parent() -> None:
    """Linux: SIGKILL for this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


class EngineProcess:
    """The loop around one LLMEngine."""

    def __init__(self, engine_args: dict[str, Any], commands: int, events: int) -> None:
        # Imported here: the environment variables that main() sets must be there first.
        import torch
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # vLLM's attention uses AMX where the processor has it; the kernel grants it per process, on request. oneDNN asks
        # at the first large product: a decode engine that never computes a prompt dies of SIGILL in its first step.
        torch.cpu._init_amx()
        self._commands = commands
        self._events = os.fdopen(events, "w", buffering=1)
        self._pending = b""
        self._quit = False
        self._first: set[str] = set()
        begin = time.monotonic()
        self._engine = LLMEngine.from_engine_args(EngineArgs(**engine_args), enable_multiprocessing=False)
        self._core = self._engine.engine_core.engine_core
        self._pool = self._core.scheduler.kv_cache_manager.block_pool
        config = self._core.scheduler.kv_cache_config
        self._say(
            event="ready",
            pid=os.getpid(),
            seconds=time.monotonic() - begin,
            blocks=config.num_blocks,
            groups=[
                {
                    "kind": type(group.kv_cache_spec).__name__,
                    "layers": list(group.layer_names),
                    "block_size": group.kv_cache_spec.block_size,
                }
                for group in config.kv_cache_groups
            ],
            free_blocks=self._pool.get_num_free_blocks(),
        )

    def _say(self, **event: Any) -> None:
        self._events.write(json.dumps(event) + "\n")

    def run(self) -> None:
        """Until told to quit or the parent closed the commands."""
        while not self._quit:
            busy = self._core.scheduler.has_requests() or self._engine.has_unfinished_requests()
            self._read(0.0 if busy else None)
            if busy and not self._quit:
                self._step()
        self._core.shutdown()

    def _read(self, timeout_s: float | None) -> None:
        if not select.select([self._commands], [], [], timeout_s)[0]:
            return
        data = os.read(self._commands, 1 << 20)
        if not data:
            self._quit = True
            return
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._do(json.loads(line))

    def _do(self, command: dict[str, Any]) -> None:
        what = command["do"]
        if what == "add":
            self._add(command)
        elif what == "abort":
            self._engine.abort_request([command["id"]])
        elif what == "state":
            scheduler = self._core.scheduler
            self._say(
                event="state",
                t=time.monotonic(),
                free_blocks=self._pool.get_num_free_blocks(),
                requests=len(scheduler.requests),
                running=len(scheduler.running),
                waiting=len(scheduler.requests) - len(scheduler.running),
            )
        elif what == "quit":
            self._quit = True
        else:
            raise ValueError(f"unknown command {what!r}")

    def _add(self, command: dict[str, Any]) -> None:
        from vllm import SamplingParams

        params = command["params"]
        sampling = SamplingParams(
            temperature=0,
            max_tokens=command["max_tokens"],
            detokenize=False,
            ignore_eos=True,
            logprobs=5,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        try:
            self._engine.add_request(command["id"], {"prompt_token_ids": command["prompt"]}, sampling)
        except Exception as error:  # noqa: BLE001 - whatever vLLM or the connector has against it is the answer
            self._say(event="refused", id=command["id"], error=f"{type(error).__name__}: {error}")

    def _step(self) -> None:
        outputs = self._engine.step()
        now = time.monotonic()
        for output in outputs:
            completion = output.outputs[0]
            if completion.token_ids and output.request_id not in self._first:
                self._first.add(output.request_id)
                self._say(event="first", id=output.request_id, t=now)
            if output.finished:
                self._first.discard(output.request_id)
                self._say(
                    event="finished",
                    id=output.request_id,
                    t=now,
                    tokens=list(completion.token_ids),
                    logprobs=[
                        [[token, entry.logprob] for token, entry in position.items()]
                        for position in completion.logprobs or []
                    ],
                    reason=completion.finish_reason,
                    cached=output.num_cached_tokens,
                    params=output.kv_transfer_params,
                )
        if not outputs:
            time.sleep(0.001)  # what vLLM's busy loop does, to give background threads the interpreter


def main() -> None:
    """argv: the descriptors of commands and events; the first command line is the engine's arguments."""
    die_with_parent()
    commands, events = int(sys.argv[1]), int(sys.argv[2])
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(commands, 1)
        if not byte:
            return
        line += byte
    try:
        EngineProcess(json.loads(line), commands, events).run()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # Threads of libraries (UCX's, torch's) must not keep a finished engine alive.
    os._exit(0)


if __name__ == "__main__":
    main()
