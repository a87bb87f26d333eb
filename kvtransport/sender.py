"""The producer's side of a transfer: ready units in, chunks out, memory given back as early as possible."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .buffers import PageList, copy_pages
from .connection import Connection, OutFrame, data_head
from .errors import (
    DeadlineError,
    DestinationError,
    Fault,
    KVError,
    ManifestError,
    ProtocolError,
    SpillFullError,
    TransferCancelledError,
    TransferError,
)
from .flow.chunking import MIN_CHUNK, next_cut
from .flow.credit import SenderCredit
from .flow.spilling import SpillPolicy, WhenFull
from .manifest import Manifest
from .spill import SpillArea, Spilled
from .transfer import LayerTimes, TransferStats
from .wire import bodies
from .wire.frames import Flag, FrameType, Header, decode_control, encode_control
from .wire.ranges import RangeSet
from .wire.state import TransferEvent, TransferMachine, TransferRole

if TYPE_CHECKING:
    from .link import Link

POLL_S = 0.05
"""How often waiting units are looked at (spilling by age)."""
EVENT_POLL_S = 0.0005
"""How often ready events of device copies are polled."""


class Unit:
    """A ready unit: bytes ``[start, stop)`` of an extent's byte space, and where they lie."""

    __slots__ = (
        "_released",
        "cut",
        "event",
        "layer",
        "pages",
        "since",
        "spilled",
        "spilling",
        "start",
        "stop",
        "tensor",
        "unacked",
    )

    def __init__(
        self, layer: int, tensor: int, start: int, pages: PageList, since: float, event: Callable[[], bool] | None
    ) -> None:
        self.layer = layer
        self.tensor = tensor
        self.start = start
        self.stop = start + pages.nbytes
        self.cut = start
        self.pages = pages
        self.since = since
        self.event = event
        self.unacked = pages.nbytes
        self.spilled: Spilled | None = None
        self.spilling: asyncio.Task[None] | None = None
        self._released: asyncio.Future[None] | None = None

    def source(self, start: int, stop: int) -> PageList:
        if start == self.start and stop == self.stop:
            return self.pages
        return self.pages.slice(start - self.start, stop - self.start)

    # -- kvtransport.transfer.Handover ---------------------------------------------------------

    @property
    def done(self) -> bool:
        return self._released is not None and self._released.done()

    async def released(self) -> None:
        if self._released is None:
            self._released = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._released)

    def release(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._released is None:
            self._released = loop.create_future()
        if not self._released.done():
            self._released.set_result(None)


@dataclass(slots=True)
class Chunk:
    """Bytes ``[start, stop)`` of a unit, on connection ``on`` or waiting to go again."""

    unit: Unit
    start: int
    stop: int
    attempt: int = 0
    on: Connection | None = None
    queued: bool = False
    """Waits to go again."""
    acked: bool = False


@dataclass(slots=True)
class _Slot:
    """What was handed over and acknowledged of one (layer, tensor)."""

    nbytes: int
    handed: RangeSet = field(default_factory=RangeSet)
    inflight: dict[int, Chunk] = field(default_factory=dict)


class Sender:
    """One outgoing transfer over a link; made by :meth:`kvtransport.link.Link.open`.

    Implements :class:`kvtransport.transfer.OutgoingTransfer`. Belongs to the link's event loop.
    """

    def __init__(
        self,
        link: Link,
        manifest: Manifest,
        *,
        deadline_s: float,
        priority: int,
        chunk_bytes: int,
        checksum: bool,
        spill: SpillPolicy,
        area: SpillArea,
    ) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._manifest = manifest
        self._machine = TransferMachine(TransferRole.SENDER)
        self._chunk_bytes = chunk_bytes
        self._checksum = checksum
        self._policy = spill
        self._area = area
        self._credit = SenderCredit()
        self._slots = {slot: _Slot(e.nbytes) for slot, e in manifest.by_slot.items()}
        self._left_by_layer = {layer: sum(e.nbytes for e in es) for layer, es in manifest.by_layer.items()}
        self._unacked_by_layer = dict(self._left_by_layer)
        self._queue: deque[Unit] = deque()
        self._live: dict[int, Unit] = {}
        self._held: dict[int, Unit] = {}
        """Of those, what lies in the caller's memory and is not being copied out of it, oldest first."""
        self._retries: deque[Chunk] = deque()
        self._stalled_since: float | None = None
        self._error: KVError | None = None
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        for future in (self._accepted, self._finished):
            future.add_done_callback(_observed)
        self._stats = TransferStats(total_bytes=manifest.total_bytes, opened_s=self._loop.time())
        self._stats.layers = {layer: LayerTimes() for layer in manifest.layers}
        self.priority = priority
        self._deadline_s = deadline_s
        self._timer = self._loop.call_later(deadline_s, self._expired)
        self._poller: asyncio.TimerHandle | None = None
        self._inflight_bytes = 0
        self._sealing = False
        self._resuming = False
        """Every connection was lost: nothing travels before the consumer has said again what it has."""
        self._last: bytes | None = None
        self._copies: set[asyncio.Task[None]] = set()
        self._send_open()

    # -- OutgoingTransfer ----------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def stats(self) -> TransferStats:
        return self._stats

    @property
    def error(self) -> KVError | None:
        return self._error

    async def accepted(self) -> None:
        """Wait until the consumer granted its memory. Raises the transfer's error."""
        await asyncio.shield(self._accepted)

    def ready(
        self,
        layer: int,
        tensor: int,
        pages: PageList,
        *,
        first: int | None = None,
        tokens: int = 0,
        event: Callable[[], bool] | None = None,
    ) -> Unit:
        extent = self._manifest.extent(layer, tensor)
        start, stop = (0, extent.nbytes) if first is None else extent.byte_range(first, tokens)
        if pages.nbytes != stop - start:
            raise DestinationError(
                f"layer {layer} tensor {tensor}: the ready unit has {stop - start} bytes, the pages hold {pages.nbytes}"
            )
        return self.hand_over(layer, tensor, start, pages, event)

    def hand_over(
        self, layer: int, tensor: int, start: int, pages: PageList, event: Callable[[], bool] | None = None
    ) -> Unit:
        """:meth:`ready` for bytes from ``start`` of the extent's byte space: what relays what it received itself."""
        if self._error is not None:
            raise self._error
        if self._finished.done():
            raise TransferError("this transfer is sealed; nothing more can be handed over")
        extent = self._manifest.extent(layer, tensor)
        stop = start + pages.nbytes
        if start < 0 or stop > extent.nbytes:
            raise DestinationError(
                f"layer {layer} tensor {tensor} has {extent.nbytes} bytes, handed over were {start}..{stop}"
            )
        now = self._loop.time()
        unit = Unit(layer, tensor, start, pages, now, event)
        if start == stop:
            unit.release(self._loop)
            return unit
        if self._slots[layer, tensor].handed.add(start, stop) != stop - start:
            raise TransferError(f"layer {layer} tensor {tensor}: bytes {start}..{stop} were handed over before")
        self._left_by_layer[layer] -= stop - start
        if self._left_by_layer[layer] == 0:
            self._stats.layers[layer].ready_s = now
        self._queue.append(unit)
        self._live[id(unit)] = self._held[id(unit)] = unit
        self._link.has_work(self)
        if self._credit.left <= 0 and event is None:
            self._spill_waiting()
        if self._poller is None:
            self._schedule_poll()
        return unit

    async def seal(self) -> None:
        if self._error is not None:
            raise self._error
        missing = [layer for layer, left in self._left_by_layer.items() if left]
        if missing:
            raise ManifestError(
                f"cannot seal: {sum(self._left_by_layer[m] for m in missing)} bytes of {len(missing)} layers were never handed over, "
                f"the first is layer {missing[0]}",
                fault=Fault.LOCAL,
            )
        await self.accepted()
        if not self._sealing and self._machine.allows(TransferEvent.SEND_SEAL):
            self._sealing = True
            self._send_seal()
        await asyncio.shield(self._finished)

    async def cancel(self, reason: str = "") -> None:
        if not self._finished.done():
            self._machine.fire(TransferEvent.SEND_CANCEL)
            self._send(FrameType.CANCEL, bodies.Cancel(reason=bodies.clip(reason)))
            self._end(TransferCancelledError(f"cancelled by this side: {reason or 'no reason given'}"))
        await self._settle()

    async def first_of(self, other: asyncio.Future[None]) -> None:
        """Wait until ``other`` is done or the transfer has ended, whichever comes first; raises nothing."""
        await asyncio.wait({self._finished, other}, return_when=asyncio.FIRST_COMPLETED)

    # -- what the link asks --------------------------------------------------------------------

    @property
    def transfer(self) -> bytes:
        return self._manifest.transfer

    def next_data(self, connection: Connection) -> OutFrame | None:
        """The next chunk as a frame for ``connection``."""
        if self._resuming:
            return None
        chunk = self._retry() or self._cut()
        if chunk is None:
            return None
        chunk.on = connection
        unit = chunk.unit
        pages = unit.source(chunk.start, chunk.stop)
        self._slots[unit.layer, unit.tensor].inflight[chunk.start] = chunk
        head = data_head(
            self.transfer, unit.layer, unit.tensor, chunk.start, chunk.attempt, pages, checksum=self._checksum
        )
        if chunk.attempt:
            self._stats.resent_bytes += chunk.stop - chunk.start
        return OutFrame(head, pages, chunk, self._checksum)

    def _retry(self) -> Chunk | None:
        while self._retries:
            chunk = self._retries.popleft()
            chunk.queued = False
            if not chunk.acked:  # what was lost may have been the acknowledgement only, and it was said again
                return chunk
        return None

    def _cut(self) -> Chunk | None:
        if self._machine.terminal or not self._accepted.done():
            return None
        while self._queue:
            unit = self._queue[0]
            if unit.event is not None:
                if not unit.event():
                    # Device copies finish in the order they were started: wait for the first one.
                    self._loop.call_later(EVENT_POLL_S, self._link.has_work, self)
                    return None
                unit.event = None
            wanted = next_cut(unit.cut, unit.stop, self._chunk_bytes)
            # Rather wait for acknowledgements than send a runt; with nothing on its way there is none to wait for.
            n = self._credit.take(wanted, MIN_CHUNK if self._inflight_bytes else 1)
            now = self._loop.time()
            if n == 0:
                if self._stalled_since is None:
                    self._stalled_since = now
                self._spill_waiting()
                return None
            if self._stalled_since is not None:
                self._stats.credit_stall_s += now - self._stalled_since
                self._stalled_since = None
            chunk = Chunk(unit, unit.cut, unit.cut + n)
            unit.cut += n
            if unit.cut == unit.stop:
                self._queue.popleft()
            self._stats.chunks += 1
            self._stats.moved_bytes += n
            self._inflight_bytes += n
            return chunk
        return None

    def on_frame(self, header: Header, payload: bytes) -> None:
        """A control frame of this transfer."""
        self._machine.fire(TransferEvent.received(header))
        body = decode_control(header, payload, verified=True)
        match body:
            case bodies.Ack(ranges=ranges):
                if header.flags & Flag.FINAL:
                    self._sealed()
                else:
                    self._on_ack(ranges)
            case bodies.Accept():
                self._resuming = False
                self._chunk_bytes = min(self._chunk_bytes, body.chunk_bytes)
                self._credit.grant(body.credit)
                if not self._accepted.done():
                    self._accepted.set_result(None)
                self._link.has_work(self)
            case bodies.Resume(ranges=ranges):
                self._on_resume(ranges)
            case bodies.Cancel(reason=reason):
                said = reason or "no reason given"
                self._end(TransferCancelledError(f"cancelled by the consumer: {said}", fault=Fault.REMOTE))
            case bodies.Error():
                self._end(body.to_error(prefix="the consumer says: "))
            case None if header.type is FrameType.CREDIT:
                if self._credit.grant(header.offset):
                    self._link.has_work(self)
            case _:
                raise ProtocolError(f"{header.type.name} is not for the producer of a transfer")

    def on_connection_lost(self, connection: Connection) -> None:
        """Chunks that were on it go again, over what is left or comes back."""
        if not self._link.connections and self._accepted.done():
            self._resuming = True
        for slot in self._slots.values():
            for chunk in slot.inflight.values():
                if chunk.on is connection:
                    self._again(chunk)
        self._link.has_work(self)

    def say_again(self, via: Connection | None) -> None:
        """OPEN and SEAL may have been lost with a connection."""
        if not self._accepted.done():
            self._send_open(via)
        elif self._sealing:
            self._send_seal(via)
        self._link.has_work(self)

    def on_link_lost(self, error: KVError) -> None:
        self._end(error)

    # -- acknowledgements ----------------------------------------------------------------------

    def _on_ack(self, ranges: tuple[bodies.ByteRange, ...]) -> None:
        for layer, tensor, start, stop in ranges:
            slot = self._slots.get((layer, tensor))
            if slot is None:
                raise ManifestError(f"acknowledged layer {layer} tensor {tensor}, which is not in the manifest")
            while start < stop and (chunk := slot.inflight.pop(start, None)) is not None:
                start = chunk.stop
                self._acked(chunk)
            if start < stop and slot.inflight:
                # A range that is said again, joined, after a connection was lost: parts of it are known already.
                for at in sorted(at for at, c in slot.inflight.items() if start <= at and c.stop <= stop):
                    self._acked(slot.inflight.pop(at))
        if not self._inflight_bytes and self._queue:
            # With nothing on its way what credit is left is used, however little: no other frame may come to say so.
            self._link.has_work(self)

    def _acked(self, chunk: Chunk) -> None:
        chunk.acked = True
        unit = chunk.unit
        n = chunk.stop - chunk.start
        self._inflight_bytes -= n
        # Half sent although another copy arrived, earlier or later: its source is about to be given back.
        for connection in list(self._link.connections) if chunk.attempt else filter(None, [chunk.on]):
            if connection.sending is not None and connection.sending.key is chunk:
                connection.void_outgoing()
        unit.unacked -= n
        left = self._unacked_by_layer[unit.layer] = self._unacked_by_layer[unit.layer] - n
        if left == 0:
            self._stats.layers[unit.layer].acked_s = self._loop.time()
        if unit.unacked == 0:
            self._forget(unit)

    def _on_resume(self, ranges: tuple[bodies.ByteRange, ...]) -> None:
        for layer, tensor, start, stop in ranges:
            slot = self._slots.get((layer, tensor))
            if slot is None:
                raise ManifestError(f"asked again for layer {layer} tensor {tensor}, which is not in the manifest")
            for chunk in slot.inflight.values():
                if chunk.start < stop and start < chunk.stop:
                    self._again(chunk)
        self._link.has_work(self)

    def _again(self, chunk: Chunk) -> None:
        if not chunk.queued:
            chunk.queued = True
            chunk.attempt += 1
            chunk.on = None
            self._retries.append(chunk)

    # -- spilling ------------------------------------------------------------------------------

    def _schedule_poll(self) -> None:
        if not self._finished.done():  # spilling may have failed the transfer
            self._poller = self._loop.call_later(POLL_S, self._poll)

    def _poll(self) -> None:
        self._poller = None
        if self._live and not self._finished.done():
            self._spill_waiting()
            self._schedule_poll()

    def _spill_waiting(self) -> None:
        now = self._loop.time()
        stalled_s = 0.0
        if not self._accepted.done():
            stalled_s = now - (self._stats.opened_s or now)
        elif self._stalled_since is not None:
            stalled_s = now - self._stalled_since
        for unit in list(self._held.values()):
            if unit.event is not None:
                continue
            # What is on its way needs no credit, but an acknowledgement: a consumer that stands still gives neither.
            sent = unit.cut == unit.stop
            if not self._policy.wants(waited_s=now - unit.since, stalled_s=0.0 if sent else stalled_s):
                if sent:
                    continue
                break  # in order of age
            spilled = self._area.take(unit.pages.nbytes)
            if spilled is None:
                if self._policy.when_full is WhenFull.FAIL and not sent:
                    self.fail(
                        SpillFullError(
                            f"no credit from {self._link.peer} and the spill budget of {self._area.budget_bytes} bytes is full; "
                            "raise spill_bytes, or let the producer wait (when_full = 'wait')"
                        )
                    )
                return
            self._start_spill(unit, spilled)

    def _start_spill(self, unit: Unit, spilled: Spilled) -> None:
        del self._held[id(unit)]
        unit.spilling = self._loop.create_task(self._spill(unit, spilled))
        self._copies.add(unit.spilling)
        unit.spilling.add_done_callback(self._copies.discard)

    async def evacuate(self) -> None:
        """Copy aside what still lies in the caller's memory: when this returns, none of it is read again.

        For a producer that has to give its memory back now and goes on later (an engine that preempts a request). Where the
        spill budget does not allow it the transfer fails with SpillFullError; this raises nothing. Units whose ``event``
        has not come yet stay: their source is a copy already.
        """
        for unit in [unit for unit in self._held.values() if unit.event is None]:
            spilled = self._area.take(unit.pages.nbytes)
            if spilled is None:
                self.fail(
                    SpillFullError(
                        f"{unit.pages.nbytes} bytes have to leave the engine's memory now and the spill budget of "
                        f"{self._area.budget_bytes} bytes is full; raise spill_bytes"
                    )
                )
                break
            self._start_spill(unit, spilled)
        await self._settle()

    async def _spill(self, unit: Unit, spilled: Spilled) -> None:
        source, target = unit.pages, spilled.pages
        # In a thread: copying tens of megabytes would hold up every connection.
        await self._loop.run_in_executor(None, copy_pages, target.base, target.pieces, source.base, source.pieces)
        unit.spilling = None
        if id(unit) not in self._live:
            self._area.give_back(spilled)
            return
        unit.spilled = spilled
        unit.pages = target
        for connection in self._link.connections:
            frame = connection.sending
            if frame is not None and isinstance(frame.key, Chunk) and frame.key.unit is unit:
                connection.swap_source(unit.source(frame.key.start, frame.key.stop))
        self._stats.spilled_bytes += target.nbytes
        unit.release(self._loop)

    # -- ending --------------------------------------------------------------------------------

    def _forget(self, unit: Unit) -> None:
        self._live.pop(id(unit), None)
        self._held.pop(id(unit), None)
        if unit.spilled is not None:
            self._area.give_back(unit.spilled)
            unit.spilled = None
        if unit.spilling is None:
            unit.release(self._loop)
        else:
            # The copy still reads the source: it is the caller's again when the copy is done.
            unit.spilling.add_done_callback(lambda _: unit.release(self._loop))

    def _sealed(self) -> None:
        self._stats.sealed_s = self._loop.time()
        self._finished.set_result(None)
        self._cleanup()

    def _expired(self) -> None:
        self.fail(
            DeadlineError(
                f"not sealed within {self._deadline_s:g} s: {self._stats.moved_bytes} of {self._stats.total_bytes} bytes sent to {self._link.peer}"
            )
        )

    def fail(self, error: KVError) -> None:
        """End with ``error`` and tell the consumer. Idempotent."""
        if not self._finished.done():
            self._machine.fire(TransferEvent.SEND_ERROR)
            self._send(FrameType.ERROR, bodies.Error.of(error))
            self._end(error)

    def _end(self, error: KVError) -> None:
        if self._finished.done():
            return
        self._error = error
        for future in (self._accepted, self._finished):
            if not future.done():
                future.set_exception(error)
        self._cleanup()

    def _cleanup(self) -> None:
        self._timer.cancel()
        if self._poller is not None:
            self._poller.cancel()
        self._queue.clear()
        self._retries.clear()
        self._link.forget_sender(self, self._last if self._machine.terminal and self._error is not None else None)
        # A half-sent frame of this transfer must not read its source again.
        for connection in list(self._link.connections):
            frame = connection.sending
            if frame is not None and isinstance(frame.key, Chunk) and id(frame.key.unit) in self._live:
                connection.void_outgoing()
        for slot in self._slots.values():
            slot.inflight.clear()
        for unit in list(self._live.values()):
            self._forget(unit)

    async def _settle(self) -> None:
        """Wait for spill copies in progress: they read the caller's memory."""
        if self._copies:
            await asyncio.wait(self._copies)

    def _send_open(self, via: Connection | None = None) -> None:
        self._machine.fire(TransferEvent.SEND_OPEN)
        body = bodies.Open.of(
            self._manifest.encode(),
            deadline_s=self._deadline_s,
            chunk_bytes=self._chunk_bytes,
            priority=self.priority,
            checksum="xxh3" if self._checksum else "none",
        )
        self._send(FrameType.OPEN, body, via)

    def _send_seal(self, via: Connection | None = None) -> None:
        self._machine.fire(TransferEvent.SEND_SEAL)
        body = bodies.Seal(
            total_bytes=self._manifest.total_bytes, digest=self._manifest.digest, chunks=self._stats.chunks
        )
        self._send(FrameType.SEAL, body, via)

    def _send(self, kind: FrameType, body: bodies.Body, via: Connection | None = None) -> None:
        self._last = encode_control(kind, body, transfer=self.transfer)
        self._link.send(self._last, via)


def _observed(future: asyncio.Future[None]) -> None:
    # Failure is reported by every call of the transfer; nobody may be waiting right now.
    if not future.cancelled():
        future.exception()
