"""One request's cache on its way out of a prefill engine. Belongs to the transport's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvtransport.buffers import PageList
from kvtransport.errors import DeadlineError, KVError, TransferCancelledError
from kvtransport.link import Link
from kvtransport.manifest import Manifest
from kvtransport.sender import Sender
from kvtransport.transfer import Handover, TransferStats

from .incoming import outcome
from .staging import Event, happened


@dataclass(frozen=True, slots=True)
class ReadyUnit:
    """Bytes of (wire layer, tensor) that are ready: ``tokens`` from ``first``, or with 0 tokens the state at ``first``.

    With ``event`` the pages are a copy of the engine's memory: the copy is done when it says so, and the memory the
    engine's again. ``drop`` gives the copy's memory back.
    """

    layer: int
    tensor: int
    pages: PageList
    first: int
    tokens: int
    event: Event | None = None
    drop: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Outgoing:
    """Takes ready units from the first computed layer on, while the peer may still be dialled.

    ``on_free``: nothing of the engine's memory is read any more (acknowledged, spilled, copied, or the transfer has ended) and nothing
    more will be. ``on_end``: after that, with the error if there is one.
    """

    manifest: Manifest
    reach: Callable[[], Awaitable[Link]]
    deadline_s: float
    on_free: Callable[[], None]
    on_end: Callable[[Outgoing], None]
    on_unit: Callable[[ReadyUnit], None] | None = None
    error: KVError | None = None
    cancelled: bool = False
    sender: Sender | None = None
    _waiting: list[ReadyUnit] = field(default_factory=list)
    _held: list[tuple[Handover, ReadyUnit]] = field(default_factory=list)
    _drops: set[asyncio.Task[None]] = field(default_factory=set)
    _handed: asyncio.Future[None] = field(init=False)
    _task: asyncio.Task[None] = field(init=False)
    _freed: bool = False
    _reason: str = ""

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._handed = loop.create_future()
        self._task = loop.create_task(self._send())
        self._task.add_done_callback(self._ended)

    @property
    def stats(self) -> TransferStats:
        return TransferStats(total_bytes=self.manifest.total_bytes) if self.sender is None else self.sender.stats

    @property
    def _over(self) -> bool:
        return self._freed or self.cancelled or self._task.done()

    def hand_over(self, units: list[ReadyUnit]) -> None:
        """Ready units, in any order of layers; never raises: what is wrong ends the transfer."""
        for unit in units:
            if self._over:
                _drop(unit)
            elif self.sender is None:
                self._waiting.append(unit)
            else:
                self._give(self.sender, unit)

    def complete(self) -> None:
        """All units were handed over."""
        if not self._handed.done():
            self._handed.set_result(None)

    def abort(self, reason: str) -> None:
        """Give it up and tell the consumer. Idempotent; ``on_free`` follows as soon as nothing is read any more."""
        if self._over or self.cancelled:
            return
        self.cancelled, self._reason = True, reason
        if self.sender is None:
            # Reaching the consumer goes on, to tell it; the engine's memory is not needed for that.
            self._release_waiting()
            self._free()
        self.complete()

    async def evacuate(self) -> None:
        """When this returns, nothing handed over so far is read from the engine's memory again."""
        if self.sender is None:
            copies = [unit for unit in self._waiting if unit.event is not None]
            if len(copies) < len(self._waiting):
                self.abort("the request was preempted on prefill before the consumer was reached")
        else:
            await self.sender.evacuate()
        await happened(lambda: all(unit.event is None or unit.event() for unit in self._units()))

    async def settled(self) -> None:
        """Wait until ``on_end`` was called."""
        await asyncio.wait({self._task})

    def cancel_task(self) -> None:
        """The endpoint is closing: stop waiting for the peer."""
        self._task.cancel()

    # -- its life ------------------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.error = outcome(task, self._reason or "the engine is shutting down")
        self._release_waiting()
        self._free()
        self.on_end(self)

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.deadline_s
        try:
            async with asyncio.timeout_at(until):
                link = await self.reach()
        except TimeoutError:
            raise DeadlineError(f"the consumer was not reached within {self.deadline_s:g} s") from None
        sender = self.sender = link.open(self.manifest, deadline_s=max(0.001, until - loop.time()))
        waiting, self._waiting = self._waiting, []
        for unit in waiting:
            self._give(sender, unit)
        try:
            await sender.first_of(self._handed)
            if self.cancelled:
                await sender.cancel(self._reason)
                raise TransferCancelledError(self._reason)
            await self._memory_is_free()
            self._free()
            await sender.seal()
        finally:
            # Ended or not: when this is done no source memory is touched again.
            await sender.cancel("the engine is shutting down")

    def _give(self, sender: Sender, unit: ReadyUnit) -> None:
        if self.on_unit is not None and unit.event is None:
            self.on_unit(unit)
        try:
            handover = sender.ready(
                unit.layer, unit.tensor, unit.pages, first=unit.first, tokens=unit.tokens, event=unit.event
            )
        except KVError as error:
            _drop(unit)
            if sender.error is None:
                sender.fail(error)
            return
        self._held.append((handover, unit))
        if unit.drop is not None:
            task = asyncio.get_running_loop().create_task(_drop_when_released(handover, unit.drop))
            self._drops.add(task)
            task.add_done_callback(self._drops.discard)

    async def _memory_is_free(self) -> None:
        for handover, unit in self._held:
            if unit.event is None:
                await handover.released()
            else:
                await _copied(handover, unit.event)

    def _units(self) -> list[ReadyUnit]:
        return [*self._waiting, *(unit for handover, unit in self._held if not handover.done)]

    def _release_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for unit in waiting:
            _drop(unit)

    def _free(self) -> None:
        if not self._freed:
            self._freed = True
            self.on_free()


async def _copied(handover: Handover, event: Event) -> None:
    await happened(lambda: handover.done or event())


async def _drop_when_released(handover: Handover, drop: Callable[[], None]) -> None:
    await handover.released()
    drop()


def _drop(unit: ReadyUnit) -> None:
    if unit.drop is not None:
        unit.drop()
