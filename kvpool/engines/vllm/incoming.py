"""One request's cache on its way into a decode engine. Belongs to the transport's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint
from kvtransport.errors import (
    DeadlineError,
    Fault,
    KVError,
    ManifestError,
    RefusedError,
    TransferCancelledError,
    TransferError,
)
from kvtransport.layout import GroupKind
from kvtransport.link import Link
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation, Receiver
from kvtransport.transfer import TransferStats

from .geometry import Geometry
from .groups import GroupRule
from .staging import Budget, DeviceCopies, Event, aside, happened
from .steps import BlockRun, ReceiveJob

logger = logging.getLogger("vllm.kvtransport")

Slot = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Memory:
    """The engine's cache memory: ``base`` is a flat host buffer, or None with ``device`` for caches on a device."""

    geometry: Geometry
    base: Any
    device: DeviceCopies | None
    budget: Budget


@dataclass(slots=True)
class _Staged:
    """A slot that is received aside: which blocks get which of its bytes."""

    source: PageList
    host: Any
    skip: int
    """Bytes at the front that are here already."""
    ids: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Incoming:
    """Receives one job. ``on_end`` is called exactly once, when nothing writes to the engine's memory any more."""

    job: ReceiveJob
    memory: Memory
    endpoint: Endpoint
    window_bytes: int
    deadline_s: float
    on_end: Callable[[Incoming], None]
    attach: Callable[[], Awaitable[Link]] | None = None
    """Asks the producer for it, where this side dials."""
    drop_state: bool = False
    error: KVError | None = None
    cancelled: bool = False
    receiver: Receiver | None = None
    attached: bool = False
    """The producer was asked for it."""
    pages: dict[Slot, PageList] = field(default_factory=dict)
    """Everything that was received, as it lies while ``on_end`` runs."""
    _staged: dict[Slot, _Staged] = field(default_factory=dict)
    _taken: int = 0
    _task: asyncio.Task[None] = field(init=False)
    _reason: str = ""

    def __post_init__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._receive())
        self._task.add_done_callback(self._ended)

    @property
    def stats(self) -> TransferStats:
        return TransferStats() if self.receiver is None else self.receiver.stats

    @property
    def never_came(self) -> bool:
        """It was given up, or its deadline passed, before a producer opened it."""
        gone = self.cancelled or isinstance(self.error, DeadlineError)
        return gone and (self.receiver is None or self.receiver.stats.opened_s is None)

    @property
    def resident_bytes(self) -> int:
        """What came although it was here already."""
        return sum(staged.skip for staged in self._staged.values())

    def abort(self, reason: str) -> None:
        """Give it up and tell the producer. Idempotent."""
        if not self.cancelled and not self._task.done():
            self.cancelled, self._reason = True, reason
            self._task.cancel()

    async def settled(self) -> None:
        """Wait until ``on_end`` was called."""
        await asyncio.wait({self._task})

    # -- its life ------------------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        # A callback and not the end of the coroutine: a task that is cancelled before it began never runs.
        self.error = outcome(task, self._reason or "the engine is shutting down")
        self.memory.budget.give_back(self._taken)
        self.on_end(self)

    async def _receive(self) -> None:
        wanted = Expectation(
            grant=self._grant,
            deadline_s=self.deadline_s,
            window_bytes=self.window_bytes,
        )
        receiver = self.receiver = self.endpoint.expect(self.job.transfer, wanted)
        try:
            if self.attach is not None:
                await self.attach()
                self.attached = True
            await receiver.sealed()
        except BaseException:
            await receiver.cancel(self._reason or "the consumer could not ask for it")
            raise
        await self._land()
        if self.drop_state:
            self._zero_states()

    def _grant(self, manifest: Manifest) -> Mapping[Slot, PageList]:
        job, geometry = self.job, self.memory.geometry
        engine = manifest.meta.get("engine")
        geometry.check_identity(engine if isinstance(engine, Mapping) else {})
        manifest.check(geometry.layout)
        if manifest.start != 0 or manifest.boundary != job.boundary or manifest.checkpoints:
            raise ManifestError(
                f"the producer sends tokens {manifest.start}..{manifest.boundary}, this request needs 0..{job.boundary}: "
                "were both engines given the same prompt?"
            )
        for i, layer in enumerate(geometry.layers):
            run = job.runs[layer.group]
            here = resident_blocks(layer.rule, run, job.resident)
            for tensor, part in enumerate(geometry.parts[i]):
                if self.memory.device is None and not here:
                    self.pages[i, tensor] = part.of(run.ids, self.memory.base)
                    continue
                nbytes = part.nbytes * len(run.ids)
                if self.memory.device is None:
                    self.memory.budget.take(nbytes)
                    host: Any = None
                    source = aside(nbytes)
                else:
                    host = self.memory.device.host(nbytes)
                    source = PageList.of(host)
                self._taken += nbytes
                self._staged[i, tensor] = _Staged(source, host, here * part.nbytes, run.ids[here:])
                self.pages[i, tensor] = source
        return self.pages

    async def _land(self) -> None:
        """Copy what was received aside to where it belongs."""
        events: list[Event] = []
        device = self.memory.device
        for (i, tensor), staged in self._staged.items():
            part = self.memory.geometry.parts[i][tensor]
            if not staged.ids:
                continue
            if device is None:
                source = staged.source.slice(staged.skip, staged.source.nbytes)
                part.of(staged.ids, self.memory.base).copy_from(source)
                await asyncio.sleep(0)  # other transfers go on between two layers
            else:
                events.append(device.into(part, staged.ids, staged.host[staged.skip :]))
        interrupted: asyncio.CancelledError | None = None
        while not all(event() for event in events):
            # Also when it is given up meanwhile: until then the device writes.
            try:
                await happened(lambda: all(event() for event in events))
            except asyncio.CancelledError as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _zero_states(self) -> None:
        geometry = self.memory.geometry
        for layer in geometry.layers:
            if layer.recurrent:
                ids = self.job.runs[layer.group].ids
                zeros = PageList.zeros(layer.pages.nbytes * len(ids))
                layer.pages.of(ids, self.memory.base).copy_from(zeros)


def outcome(task: asyncio.Task[None], reason: str) -> KVError | None:
    """How a transfer's task ended; ``reason``: why, if it was cancelled. What nobody foresaw is an error too, never success."""
    if task.cancelled():
        return TransferCancelledError(reason)
    error = task.exception()
    if error is None or isinstance(error, KVError):
        return error
    logger.error("a transfer ended by an unexpected error", exc_info=error)
    return TransferError(f"unexpected {type(error).__name__}: {error}", fault=Fault.LOCAL)


def resident_blocks(rule: GroupRule, run: BlockRun, resident: int) -> int:
    """How many blocks at the front of ``run`` hold the first ``resident`` tokens already, and belong to others too."""
    if rule.kind is GroupKind.RECURRENT:
        return 0  # a state is of one position, and that one is not here
    return max(0, min(len(run.ids), resident // rule.block_tokens - run.first))


def refuse(endpoint: Endpoint, transfer: bytes, reason: str, deadline_s: float) -> None:
    """Say no to a transfer as soon as its producer opens it. Raises LimitError, ProtocolError as Endpoint.expect does."""

    def grant(_: Manifest) -> Mapping[Slot, PageList]:
        raise RefusedError(reason)

    endpoint.expect(transfer, Expectation(grant=grant, deadline_s=deadline_s))
