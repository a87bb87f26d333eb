"""A toy engine around the vLLM connector's two sides: blocks, tables and memory as vLLM has them, but no model and no vLLM.

What a layer "computes" is a pseudo-random function of the prompt, the layer and the tokens, so that any two engines agree on what a
block must hold, and a byte that is missing, late, or in another block is seen.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpool.engines.vllm.config import read_config
from kvpool.engines.vllm.geometry import Geometry, LayerCache, attention_tensors, state_tensors
from kvpool.engines.vllm.groups import GroupRule
from kvpool.engines.vllm.pages import page_shape
from kvpool.engines.vllm.scheduler import SchedulerSide
from kvpool.engines.vllm.worker import Place, WorkerSide
from kvtransport.layout import GroupKind
from kvtransport.sync import LoopThread

BLOCKS = 192
BLOCK_TOKENS = 16
PAGE = 512
RULES = (
    GroupRule(GroupKind.RECURRENT, 4_096, spare_blocks=1),
    GroupRule(GroupKind.FULL, BLOCK_TOKENS),
    GroupRule(GroupKind.SLIDING, BLOCK_TOKENS, window=40),
)
LAYERS = (("linear", 0), ("attn", 1), ("linear", 0), ("swa", 2), ("attn", 1), ("linear", 0))
"""(kind, group) in the order of execution; the last one has no attention layer after it."""
WAIT_S = 20.0


def until(done: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> None:
    """Wait for something that happens on the event loop."""
    deadline = time.monotonic() + wait_s
    while not done():
        assert time.monotonic() < deadline, f"{what} within {wait_s:g} s"
        time.sleep(0.002)


def toy_geometry(*, tp_size: int = 1, tp_rank: int = 0, **identity: str) -> Geometry:
    """Groups alias the same bytes, the n-th layer of each group in region n; states have padded pages of two tensors."""
    layers, seen = [], [0, 0, 0]
    for number, (kind, group) in enumerate(LAYERS):
        offset = seen[group] * BLOCKS * PAGE
        seen[group] += 1
        if kind == "linear":
            pages = page_shape((BLOCKS, 1, 1, 48), (PAGE, PAGE, PAGE, 1), 1, offset, BLOCKS)
            tensors = state_tensors(pages, [(3, 4), (6,)], ["bfloat16", "float32"])
        else:
            pages = page_shape((BLOCKS, 2, BLOCK_TOKENS, 8), (256, 128, 8, 1), 2, offset, BLOCKS)
            tensors = attention_tensors(pages, BLOCK_TOKENS, "bfloat16")
        layers.append(LayerCache(f"model.layers.{number}.{kind}", group, RULES[group], pages, tensors))
    return Geometry("toy", "", layers, RULES, tp_size=tp_size, tp_rank=tp_rank, identity=identity)


@dataclass
class ToyRequest:
    """What the connector uses of vLLM's Request. ``seed`` stands for the prompt's tokens."""

    request_id: str
    num_prompt_tokens: int
    seed: int
    kv_transfer_params: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    max_tokens: int = 16
    prompt_token_ids: list[int] | None = None
    prompt_embeds: Any = None
    prompt_is_token_ids: list[bool] | None = None
    _all_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_token_ids = [0] * self.num_prompt_tokens
        self._all_token_ids = [0] * self.num_prompt_tokens


def content(seed: int, layer: int, block: int, tokens: int, nbytes: int) -> bytes:
    """What ``layer`` computes for block ``block`` of a prompt when ``tokens`` tokens of it are in that block (a state: in all)."""
    return np.random.default_rng([seed, layer, block, tokens]).bytes(nbytes)


class Toy:
    """One engine. Use as a context manager."""

    def __init__(
        self,
        role: str,
        extra: dict[str, Any],
        *,
        geometry: Geometry | None = None,
        streams: Any = None,
        place: Place | None = None,
    ) -> None:
        producer, consumer = role in ("producer", "both"), role in ("consumer", "both")
        config = read_config(
            {"keepalive_s": 0.5, "dead_after_s": 3, "receive_deadline_s": 15, "connections": 2, **extra}
        )
        self.geometry = geometry or toy_geometry()
        self.memory = np.full(3 * BLOCKS * PAGE, 0xEE, np.uint8)
        self.thread = LoopThread()
        self.scheduler = SchedulerSide(config, RULES, producer=producer, consumer=consumer)
        self.worker = WorkerSide(config, self.thread, producer=producer, consumer=consumer, place=place)
        self.free = set(range(1, BLOCKS))
        self.requests: dict[str, ToyRequest] = {}
        self.tables: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.loading: set[str] = set()
        self.kept: set[str] = set()
        """Ended requests whose blocks the connector still needs."""
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self._finished: set[str] = set()
        storage: Any = self.memory
        if streams is not None:
            import torch

            storage = torch.from_numpy(self.memory)
        try:
            self.worker.register(self.geometry, storage, streams)
        except BaseException:
            self.thread.stop()
            raise

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.worker.close()
        self.thread.stop()

    # -- requests ----------------------------------------------------------------------------------

    def add(self, request: ToyRequest) -> ToyRequest:
        self.requests[request.request_id] = request
        self.scheduler.on_new_request(request)
        return request

    def allocate(self, request: ToyRequest, tokens: int, *, resident: tuple[int, ...] = ()) -> None:
        """Blocks for ``tokens`` tokens as vLLM gives them: window blocks before the window are null. ``resident``: the full group's first."""
        count = -(-tokens // BLOCK_TOKENS)
        skipped = max(0, tokens - 39) // BLOCK_TOKENS
        full = (*resident, *self._take(count - len(resident)))
        sliding = (*[0] * skipped, *self._take(count - skipped))
        self.tables[request.request_id] = (tuple(self._take(2)), full, sliding)

    def _take(self, count: int) -> list[int]:
        # From the far end first, so that tables of two engines differ and runs are not contiguous.
        taken = sorted(self.free, key=lambda i: (i * 37) % BLOCKS)[:count]
        self.free -= set(taken)
        return taken

    def give_back(self, request: str) -> None:
        self.free |= {i for ids in self.tables.pop(request) for i in ids if i}
        self.requests.pop(request)
        self.kept.discard(request)

    def finish(self, request: str, status: str = "FINISHED_LENGTH_CAPPED") -> dict[str, Any] | None:
        """A request ends; its blocks stay while the connector, or a load in progress, needs them."""
        keep, answer = self.scheduler.finished(self.requests[request], status)
        self._finished.add(request)
        if keep or request in self.loading:
            self.kept.add(request)
        elif request in self.tables:
            self.give_back(request)
        else:
            self.requests.pop(request)
        return answer

    # -- steps -------------------------------------------------------------------------------------

    def step(self, scheduled: dict[str, int] | None = None, preempted: tuple[str, ...] = ()) -> None:
        """One step in vLLM's order of calls; nothing here may wait for the network."""
        scheduled = scheduled or {}
        step = self.scheduler.step(scheduled, self.tables.get, preempted)
        step = pickle.loads(pickle.dumps(step))  # workers are other processes
        self.worker.preempted(step)
        self.worker.begin(step)
        for number, (kind, _) in enumerate(LAYERS):
            for request, tokens in scheduled.items():
                self._compute(self.requests[request], number, tokens)
            if kind != "linear" and scheduled:
                self.worker.layer_computed(self.geometry.layers[number].name)
        for request, tokens in scheduled.items():
            self.requests[request].num_computed_tokens += tokens
        self.worker.start_receives(step)
        self.worker.computed()
        finished, self._finished = self._finished, set()
        sent, received, failed = self.worker.results(finished)
        self.scheduler.received(received)
        for request in sent:
            assert request in self.kept, f"{request} was reported as sent and vLLM did not say that it had ended"
            self.give_back(request)
        for request in received:
            self.loading.remove(request)
            if request in self.kept:
                self.give_back(request)
        self.received |= received
        self.failed |= failed

    def _compute(self, request: ToyRequest, number: int, tokens: int) -> None:
        kind, group = LAYERS[number]
        ids = self.tables[request.request_id][group]
        stop = request.num_computed_tokens + tokens
        if kind == "linear":
            self.write(number, ids[0], content(request.seed, number, 0, stop, 48))
            return
        for block in range(request.num_computed_tokens // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)):
            if ids[block]:
                inside = min(BLOCK_TOKENS, stop - block * BLOCK_TOKENS)
                self.write(number, ids[block], content(request.seed, number, block, inside, PAGE))

    def write(self, number: int, block: int, data: bytes) -> None:
        pages = self.geometry.layers[number].pages
        at = pages.offset + block * pages.stride
        self.memory[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, number: int, block: int) -> bytes:
        pages = self.geometry.layers[number].pages
        at = pages.offset + block * pages.stride
        return self.memory[at : at + pages.nbytes].tobytes()

    # -- both sides --------------------------------------------------------------------------------

    def expect(self, request: ToyRequest, *, resident: tuple[int, ...] = ()) -> None:
        """Decode's scheduler: allocate, and load what the other engine sends."""
        self.add(request)
        here = len(resident) * BLOCK_TOKENS
        tokens, later = self.scheduler.matched_tokens(request, here)
        assert later
        self.allocate(request, here + tokens, resident=resident)
        self.scheduler.allocated(request, self.tables[request.request_id], tokens)
        self.loading.add(request.request_id)

    def settle(self, request: str) -> None:
        """Step until the load of ``request`` has ended."""
        until(lambda: self.step() or request in self.received, f"{request} ends")

    def idle(self) -> bool:
        """After a step: every block is free and nothing is remembered."""
        self.step()
        return len(self.free) == BLOCKS - 1 and self.scheduler.idle and not self.requests

    def check_holds(self, request: ToyRequest, boundary: int, *, skip: int = 0) -> None:
        """This engine's blocks hold what computing ``boundary`` tokens of the prompt gives; the first ``skip`` blocks do not count."""
        table = self.tables[request.request_id]
        for number, (kind, group) in enumerate(LAYERS):
            if kind == "linear":
                assert self.read(number, table[0][0]) == content(request.seed, number, 0, boundary, 48), number
                continue
            first, stop = RULES[group].span(boundary)
            for block in range(max(first, skip if group == 1 else 0), stop):
                inside = min(BLOCK_TOKENS, boundary - block * BLOCK_TOKENS)
                wanted = content(request.seed, number, block, inside, PAGE)
                assert self.read(number, table[group][block]) == wanted, f"layer {number} block {block}"


@dataclass
class Pair:
    """A prefill and a decode engine that know each other's address."""

    prefill: Toy
    decode: Toy
    dial: str
    port: int

    def requests(self, name: str, tokens: int, *, seed: int = 1) -> tuple[ToyRequest, ToyRequest]:
        """The same prompt for both sides, with the parameters that a router gives them."""
        transfer = os.urandom(16).hex()
        where = {"remote_host": "127.0.0.1", "remote_port": self.port}
        send: dict[str, Any] = {"do_remote_decode": True, "transfer_id": transfer}
        receive: dict[str, Any] = {"do_remote_prefill": True, "transfer_id": transfer}
        (send if self.dial == "producer" else receive).update(where)
        return ToyRequest(name, tokens, seed, send), ToyRequest(name, tokens, seed, receive)

    def compute(self, request: ToyRequest, *cuts: int) -> None:
        """Prefill ``request`` in steps that end at ``cuts`` (default: at once), and finish it."""
        boundary = request.num_prompt_tokens
        for stop in (*cuts, boundary):
            self.prefill.step({request.request_id: stop - request.num_computed_tokens})
        self.prefill.finish(request.request_id)

    def done(self) -> None:
        """Both engines are empty: every block free, nothing remembered."""
        for request in list(self.decode.requests):
            self.decode.finish(request)
        until(lambda: self.prefill.idle() and self.decode.idle(), "all blocks are free again")


@contextlib.contextmanager
def pair(
    dial: str = "producer",
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    streams: Callable[[], Any] = lambda: None,
) -> Iterator[Pair]:
    """Both engines, the listening one first."""
    port = free_port()
    listens = {"listen_port": port}
    extra = {
        "producer": {"dial": dial, **(listens if dial == "consumer" else {}), **(prefill or {})},
        "consumer": {"dial": dial, **(listens if dial == "producer" else {}), **(decode or {})},
    }
    with contextlib.ExitStack() as stack:
        toys = {
            role: stack.enter_context(Toy(role, extra[role], streams=streams())) for role in ("consumer", "producer")
        }
        yield Pair(toys["producer"], toys["consumer"], dial, port)


def free_port() -> int:
    """A loopback port below the range outgoing connections take theirs from."""
    import random
    import socket

    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
