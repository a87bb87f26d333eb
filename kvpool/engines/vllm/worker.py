"""The worker's side: called from the engine's thread in every step, never waits for the network there.

Everything that moves bytes runs on kvtransport's background loop (:mod:`.transport`); this module only says what became
ready when, and hands what the loop reports back to the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kvtransport.errors import ConfigError, KVError
from kvtransport.sync import LoopThread

from .config import ConnectorConfig
from .geometry import Geometry
from .incoming import Memory
from .metrics import Interval
from .outgoing import ReadyUnit
from .staging import Budget, CudaStreams, DeviceCopies, Streams, require_dense
from .steps import SendStep, Step
from .transport import Transport

CLOSE_S = 30.0
"""Longest wait for transfers to be given up at shutdown."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which worker this is. ``index``: of its data parallel engine."""

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0

    @property
    def listen_offset(self) -> int:
        """From ``listen_port`` to this worker's port. Who dials names rank 0 of one data parallel engine and adds the rank only."""
        return self.dp_rank * self.tp_size + self.tp_rank


@dataclass(slots=True)
class _Current:
    """The step that is being computed."""

    step: Step
    begin_s: float
    left: dict[str, set[int]] = field(default_factory=dict)
    """By sending request: wire layers of which nothing left yet in this step."""


class WorkerSide:
    """Belongs to the engine's thread. Order within a step: preempted, begin, layer_computed…, start_receives, computed, results."""

    def __init__(
        self,
        config: ConnectorConfig,
        thread: LoopThread,
        *,
        producer: bool,
        consumer: bool,
        place: Place | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._thread = thread
        self._place = place or Place()
        self._producer = producer
        self._consumer = consumer
        self._clock = clock
        self._transport: Transport | None = None
        self._current: _Current | None = None
        self._sending: set[str] = set()
        self._geometry: Geometry | None = None
        self._memory: Memory | None = None

    def register(self, geometry: Geometry, storage: Any, streams: Streams | None = None) -> None:
        """The engine's caches are there: ``storage`` is a flat uint8 tensor, or buffer, over all of their memory; ``streams`` are those of
        its device (None: what the tensor's device calls for).

        Starts to listen, where this side listens. Raises ConfigError, LayoutError, InsecureBindError.
        """
        if self._transport is not None:
            raise ConfigError("the engine registered its caches twice; this connector serves one set of caches")
        budget = Budget(self._config.staging_bytes)
        device = getattr(getattr(storage, "device", None), "type", "cpu")
        if device == "cuda" and streams is None:
            streams = CudaStreams()
        if streams is not None:
            for parts in geometry.parts:
                for part in parts:
                    require_dense(part)
            memory = Memory(geometry, None, DeviceCopies(storage, streams, budget), budget)
        elif device == "cpu":
            base = memoryview(storage.numpy() if hasattr(storage, "numpy") else storage).cast("B")
            memory = Memory(geometry, base, None, budget)
        else:
            raise ConfigError(f"caches on a {device!r} device are not supported; cpu and cuda are")
        self._geometry, self._memory = geometry, memory
        rank = self._place.tp_rank
        transport = Transport(
            self._config,
            memory,
            name=f"vllm:{geometry.layout.model}:{rank}",
            rank=rank,
            listen_offset=self._place.listen_offset,
        )
        listen = self._config.listens(producer=self._producer, consumer=self._consumer)
        self._thread.run(transport.start(listen=listen), CLOSE_S)
        self._transport = transport

    @property
    def listening(self) -> tuple[str, int] | None:
        """Where other engines reach this worker."""
        return None if self._transport is None else self._transport.listening

    # -- each step -----------------------------------------------------------------------------

    def preempted(self, step: Step) -> None:
        """Before the engine writes to any block of this step: blocks of preempted requests belong to others from here on.

        Waits until nothing of them is read any more (a copy in host memory, not the network).
        """
        if step.preempted and self._transport is not None:
            self._thread.run(self._transport.evacuate(step.preempted))

    def begin(self, step: Step) -> None:
        """The step is about to be computed. Waits for nothing."""
        self._current = _Current(step, self._clock())
        transport = self._transport
        if transport is None or self._geometry is None:
            return
        for end in step.ended:
            self._call(transport.end_send, end)
        every = range(len(self._geometry.layers))
        for send in step.sends:
            if send.request not in self._sending:
                self._sending.add(send.request)
                self._call(transport.open, send)
            self._current.left[send.request] = {
                i for i in every if send.runs[self._geometry.layers[i].group] is not None
            }

    def layer_computed(self, name: str) -> None:
        """The engine has computed attention layer ``name`` (on a device: queued its computation)."""
        if self._current is None or not self._current.left or self._geometry is None:
            return
        layers = self._geometry.leaves_with.get(name)
        if layers is not None:
            self._leave(layers)

    def computed(self) -> None:
        """The whole step is computed: what has no hook of its own leaves now. Does not wait for the network."""
        current, self._current = self._current, None
        if current is None or not current.step.sends or self._geometry is None or self._transport is None:
            return
        self._current = current
        self._leave(range(len(self._geometry.layers)))
        self._current = None
        took_part = {send.request: send.final for send in current.step.sends}
        self._call(self._transport.step_done, took_part, current.begin_s, self._clock())

    def start_receives(self, step: Step) -> None:
        """Blocks that are to be filled are allocated, and zeroed where the engine zeroes them."""
        transport = self._transport
        if transport is None:
            return
        for job in step.receives:
            self._call(transport.receive, job)
        for request in step.cancelled:
            self._call(transport.cancel, request)
        for refusal in step.refused:
            self._call(transport.refuse, refusal)

    def results(self, finished: set[str]) -> tuple[set[str], set[str], set[str]]:
        """(sent, received, failed) requests; ``finished``: those that vLLM says ended in this step."""
        if self._transport is None:
            return set(), set(), set()
        sent, received, failed = self._transport.results.take(finished, self._sending)
        self._sending -= sent
        return sent, received, failed

    def statistics(self) -> Interval | None:
        """Since the last call; None when nothing happened."""
        return None if self._transport is None else self._transport.recorder.take()

    def close(self) -> None:
        """End all transfers; when this returns no cache memory is touched again. Idempotent."""
        transport, self._transport = self._transport, None
        if transport is not None:
            self._thread.run(transport.close(), CLOSE_S)

    # -- leaving -------------------------------------------------------------------------------

    def _leave(self, layers: Iterable[int]) -> None:
        current, geometry, memory, transport = self._current, self._geometry, self._memory, self._transport
        assert current is not None
        assert geometry is not None
        assert memory is not None
        assert transport is not None
        units: dict[str, list[ReadyUnit]] = {}
        mark: Any = None
        layers = tuple(layers)
        for send in current.step.sends:
            left = current.left[send.request]
            going = [i for i in layers if i in left]
            if not going:
                continue
            left.difference_update(going)
            if memory.device is not None and mark is None:
                mark = memory.device.mark()
            ready: list[ReadyUnit] = []
            try:
                for i in going:
                    ready += self._units(memory, send, i, mark)
            except KVError as error:
                # Out of staging memory, or blocks that cannot be: this transfer ends, the step goes on.
                self._call(transport.give_up, send.request, error.message)
            units[send.request] = ready
        if units:
            self._call(transport.hand_over, units, self._clock())

    @staticmethod
    def _units(memory: Memory, send: SendStep, index: int, mark: Any) -> Iterable[ReadyUnit]:
        geometry = memory.geometry
        layer = geometry.layers[index]
        run = send.runs[layer.group]
        assert run is not None
        if layer.recurrent:
            first, tokens = send.boundary, 0
        else:
            first, tokens = run.first * layer.rule.block_tokens, len(run.ids) * layer.rule.block_tokens
        for tensor, part in enumerate(geometry.parts[index]):
            if memory.device is None:
                yield ReadyUnit(index, tensor, part.of(run.ids, memory.base), first, tokens)
            else:
                pages, event, drop = memory.device.out(part, run.ids, mark)
                yield ReadyUnit(index, tensor, pages, first, tokens, event, drop)

    def _call(self, work: Callable[..., None], *args: Any) -> None:
        self._thread.loop.call_soon_threadsafe(work, *args)
