"""The producer's side of a transfer: ready units in, chunks out, memory given back as early as possible."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .buffers import PageList, copy_pages
from .coding import CodingStage, LinkCoding
from .connection import AnyConnection
from .engine.base import Slot
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
from .flow.spilling import SpillPolicy, WhenFull
from .flow.whole import travels_whole
from .manifest import Manifest
from .spill import SpillArea, Spilled
from .transfer import LayerTimes, TransferStats
from .units import Unit, bytes_of
from .wire import bodies
from .wire.frames import Flag, FrameType, Header, decode_control, encode_control
from .wire.ranges import RangeSet
from .wire.state import TransferEvent, TransferMachine, TransferRole

if TYPE_CHECKING:
    from .link import Link

POLL_S = 0.02
"""How often waiting units are looked at (spilling by age)."""
EVENT_POLL_S = 0.0005
"""How often ready events of device copies are polled."""


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
        coding: LinkCoding | None = None,
        whole_bytes: int = 0,
    ) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._manifest = manifest
        self._machine = TransferMachine(TransferRole.SENDER)
        self._chunk_bytes = chunk_bytes
        self._checksum = checksum
        self._policy = spill
        self._area = area
        self._out = link.lanes.outgoing(
            self, manifest.transfer, list(manifest.by_slot), priority=priority, checksum=checksum
        )
        self._handed: dict[Slot, RangeSet | None] = {}
        """What was handed over of each extent; None: all of it at once."""
        self._left_by_layer = {layer: sum(e.nbytes for e in es) for layer, es in manifest.by_layer.items()}
        self._unacked_by_layer = dict(self._left_by_layer)
        self._pending: deque[Unit] = deque()
        """Units whose ``event`` has not come."""
        self._units: dict[int, Unit] = {}
        """By the keys of their spans."""
        self._live: dict[int, Unit] = {}
        self._held: dict[int, Unit] = {}
        """Of those, what lies in the caller's memory and is not being copied out of it, oldest first."""
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
        self._sealing = False
        self._last: bytes | None = None
        self._copies: set[asyncio.Task[None]] = set()
        """Tasks that read the caller's memory: spilling, coding."""
        self._acked_bytes = 0
        self._acked_s = self._loop.time()
        """When that last changed."""
        self._stage: CodingStage | None = None
        if coding is not None and checksum:
            self._stage = CodingStage(coding, self._out, self._became, link.work, self._copies)
        self._capped = False
        self._whole_bytes = whole_bytes
        self._early: list[Unit] | None = None
        """Until it is decided how it travels: what was handed over."""
        self._in_open: list[Unit] | None = None
        """Travels in its OPEN: all its units."""
        self._wants_seal = False
        if self._may_travel_whole():
            self._early = []
            # Twice: a task that was started for it has had its first turn by then.
            self._loop.call_soon(self._loop.call_soon, self._begin)
        else:
            self._send_open()

    # -- OutgoingTransfer ----------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def stats(self) -> TransferStats:
        out, stats = self._out.stats(), self._stats
        stats.chunks, stats.moved_bytes, stats.resent_bytes = out.chunks, out.moved_bytes, out.resent_bytes
        if self._in_open is not None:
            stats.chunks, stats.moved_bytes = 1, stats.total_bytes
        if self._stage is not None:
            stats.coded_raw_bytes, stats.coded_bytes = self._stage.raw_bytes, self._stage.coded_bytes
        stats.credit_stall_s = out.stalled_s + out.stalled_now_s
        return stats

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
        nbytes = extent.nbytes
        start, stop = (0, nbytes) if first is None else extent.byte_range(first, tokens)
        if pages.nbytes != stop - start:
            raise DestinationError(
                f"layer {layer} tensor {tensor}: the ready unit has {stop - start} bytes, the pages hold {pages.nbytes}"
            )
        return self._hand_over(layer, tensor, start, pages, event, nbytes)

    def hand_over(
        self, layer: int, tensor: int, start: int, pages: PageList, event: Callable[[], bool] | None = None
    ) -> Unit:
        """:meth:`ready` for bytes from ``start`` of the extent's byte space: what relays what it received itself."""
        return self._hand_over(layer, tensor, start, pages, event, self._manifest.extent(layer, tensor).nbytes)

    def _hand_over(
        self, layer: int, tensor: int, start: int, pages: PageList, event: Callable[[], bool] | None, nbytes: int
    ) -> Unit:
        """``nbytes``: of the whole extent."""
        if self._error is not None:
            raise self._error
        if self._finished.done():
            raise TransferError("this transfer is sealed; nothing more can be handed over")
        stop = start + pages.nbytes
        if start < 0 or stop > nbytes:
            raise DestinationError(
                f"layer {layer} tensor {tensor} has {nbytes} bytes, handed over were {start}..{stop}"
            )
        now = self._loop.time()
        unit = Unit(layer, tensor, start, pages, now, event)
        if start == stop:
            unit.release()
            return unit
        if not self._is_new((layer, tensor), start, stop, nbytes):
            raise TransferError(f"layer {layer} tensor {tensor}: bytes {start}..{stop} were handed over before")
        self._left_by_layer[layer] -= stop - start
        if self._left_by_layer[layer] == 0:
            self._stats.layers[layer].ready_s = now
        self._live[id(unit)] = self._held[id(unit)] = unit
        if event is None:
            self._add(unit)
            if self._out.stalled():
                self._spill_waiting()
        else:
            self._pending.append(unit)
            if len(self._pending) == 1:
                self._poll_events()
        if self._poller is None:
            self._schedule_poll()
        return unit

    def _is_new(self, slot: Slot, start: int, stop: int, nbytes: int) -> bool:
        """Notes bytes of an extent as handed over; False: some of them were before."""
        if slot not in self._handed:
            if stop - start == nbytes:
                self._handed[slot] = None
                return True
            self._handed[slot] = RangeSet()
        handed = self._handed[slot]
        return handed is not None and handed.add(start, stop) == stop - start

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
        self._wants_seal = True
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

    # -- how it travels ------------------------------------------------------------------------

    def _may_travel_whole(self) -> bool:
        total = self._manifest.total_bytes
        if total > self._whole_bytes:
            return False  # without making the manifest twice
        size = len(self._manifest.encode())
        others = self._link.in_open_bytes
        return travels_whole(total, size, most=self._whole_bytes, capped=self._capped, others=others)

    def _begin(self) -> None:
        """Open it: with all its bytes where they are here and the producer seals it, else as any other."""
        early, self._early = self._early, None
        if early is None or self._finished.done():
            return
        if self._wants_seal and not self._pending and self._may_travel_whole():
            self._in_open = early
            self._link.in_open_bytes += self._manifest.total_bytes
            self._send_open()
        else:
            self._send_open()
            for unit in early:
                self._add(unit)

    # -- handing over --------------------------------------------------------------------------

    def _add(self, unit: Unit) -> None:
        unit.event = None
        if self._early is not None:
            self._early.append(unit)
        elif self._stage is not None:
            self._stage.add(unit)
        else:
            unit.raw.append((unit.start, unit.stop))
            self._became(self._out.add(unit.layer, unit.tensor, unit.start, unit.pages), unit)

    def _became(self, key: int, unit: Unit) -> None:
        """A span of ``unit`` is the engine's."""
        unit.left += 1
        self._units[key] = unit

    def _poll_events(self) -> None:
        # Device copies finish in the order they were started: wait for the first one.
        while self._pending and ((event := self._pending[0].event) is None or event()):
            self._add(self._pending.popleft())
        if self._pending:
            self._loop.call_later(EVENT_POLL_S, self._poll_events)

    # -- what the link asks --------------------------------------------------------------------

    @property
    def transfer(self) -> bytes:
        return self._manifest.transfer

    def allow(self, limit: int | None) -> None:
        """Its tenant's cap lets it have sent so many bytes by now (None: there is no cap)."""
        self._capped = limit is not None
        self._out.allow((1 << 63) - 1 if limit is None else limit)

    def on_frame(self, header: Header, payload: bytes) -> None:
        """A control frame of this transfer."""
        final = header.type is FrameType.ACK and header.flags & Flag.FINAL
        if final and self._in_open is not None and not self._accepted.done():
            # The answer to an OPEN with all that there is: it stands for ACCEPT too, and the OPEN stood for SEAL.
            self._machine.fire(TransferEvent.RECV_ACCEPT)
            self._machine.fire(TransferEvent.SEND_SEAL)
            self._accepted.set_result(None)
        self._machine.fire(TransferEvent.received(header))
        body = decode_control(header, payload, verified=True)
        match body:
            case bodies.Ack(ranges=ranges):
                if header.flags & Flag.FINAL:
                    self._sealed()
                else:
                    self._on_ack(ranges)
            case bodies.Accept():
                self._chunk_bytes = min(self._chunk_bytes, body.chunk_bytes)
                if not self._machine.terminal:
                    self._out.accept(self._chunk_bytes, body.credit)
                    if self._stage is not None and not self._accepted.done():
                        self._stage.accept(self._chunk_bytes, body.credit, self._manifest.total_bytes)
                    if self._in_open is not None and not self._accepted.done():
                        # A consumer that would rather have it the long way.
                        units, self._in_open = self._in_open, None
                        self._link.in_open_bytes -= self._manifest.total_bytes
                        for unit in units:
                            self._add(unit)
                if not self._accepted.done():
                    self._accepted.set_result(None)
            case bodies.Resume(ranges=ranges):
                self._on_resume(ranges)
            case bodies.Cancel(reason=reason):
                said = reason or "no reason given"
                self._end(TransferCancelledError(f"cancelled by the consumer: {said}", fault=Fault.REMOTE))
            case bodies.Error():
                self._end(body.to_error(prefix="the consumer says: "))
            case None if header.type is FrameType.CREDIT:
                self._out.grant(header.offset)
            case _:
                raise ProtocolError(f"{header.type.name} is not for the producer of a transfer")

    def on_connection_lost(self, connection: AnyConnection) -> None:
        """Chunks that were on it go again, over what is left or comes back."""
        if not self._link.connections and self._accepted.done():
            self._out.hold()  # nothing travels before the consumer has said again what it has
        self._out.requeue(connection)

    def on_connection_stalled(self, connection: AnyConnection) -> None:
        """It lives, but what it has is sent again over others, which take it over."""
        self._out.requeue(connection)

    def say_again(self, via: AnyConnection | None) -> None:
        """OPEN and SEAL may have been lost with a connection."""
        if self._early is not None:
            return  # it comes
        if not self._accepted.done():
            self._send_open(via)
        elif self._sealing:
            self._send_seal(via)

    def on_link_lost(self, error: KVError) -> None:
        self._end(error)

    # -- acknowledgements ----------------------------------------------------------------------

    def _on_ack(self, ranges: tuple[bodies.ByteRange, ...]) -> None:
        for layer, tensor, start, stop in ranges:
            self._check_slot(layer, tensor, "acknowledged")
            self._out.ack(layer, tensor, start, stop)

    def _on_resume(self, ranges: tuple[bodies.ByteRange, ...]) -> None:
        for layer, tensor, start, stop in ranges:
            self._check_slot(layer, tensor, "asked again for")
            self._out.resend(layer, tensor, start, stop)

    def _check_slot(self, layer: int, tensor: int, what: str) -> None:
        if (layer, tensor) not in self._manifest.by_slot:
            raise ManifestError(f"{what} layer {layer} tensor {tensor}, which is not in the manifest")

    def on_acked(self, acked: Sequence[tuple[int, int, int]], keys: Sequence[int]) -> None:
        """See :class:`kvtransport.engine.base.OutgoingOwner`."""
        for layer, _, n in acked:
            left = self._unacked_by_layer[layer] = self._unacked_by_layer[layer] - n
            if left == 0:
                self._stats.layers[layer].acked_s = self._loop.time()
        for key in keys:
            unit = self._units.pop(key, None)
            if unit is not None:
                unit.left -= 1
                if unit.left == 0:
                    self._forget(unit)
        if self._stage is not None:
            self._stage.acked(keys)

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
        stalled_s, still_s = self._out.stalled(), self._still_s(now)
        if not self._accepted.done():
            stalled_s = now - (self._stats.opened_s or now)
        for unit in list(self._held.values()):
            if unit.event is not None:
                continue
            waited_s = now - unit.since
            if not self._policy.wants(waited_s=waited_s, stalled_s=stalled_s, still_s=still_s):
                break  # in order of age
            # What is on its way needs no credit, but an acknowledgement: a consumer that stands still gives neither.
            sent = not unit.staged and self._out.uncut(unit.layer, unit.tensor, unit.start) == 0
            if sent and not self._policy.wants(waited_s=waited_s, stalled_s=0.0, still_s=still_s):
                continue
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

    def _still_s(self, now: float) -> float:
        """For how long nothing was acknowledged, as far as the polls show it."""
        out = self._out.stats()
        acked = out.moved_bytes - out.inflight_bytes
        if acked != self._acked_bytes:
            self._acked_bytes, self._acked_s = acked, now
        return now - self._acked_s

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
        if id(unit) in self._live:
            unit.spilled = spilled
            unit.pages = target
            for start, stop in unit.raw:
                self._out.swap(unit.layer, unit.tensor, start, target.slice(start - unit.start, stop - unit.start))
            self._stats.spilled_bytes += target.nbytes
        else:
            self._area.give_back(spilled)
        if unit.coding is not None:  # it reads the old place; the next one will not
            await asyncio.wait({unit.coding})
        unit.spilling = None
        unit.release()

    # -- ending --------------------------------------------------------------------------------

    def _forget(self, unit: Unit) -> None:
        self._live.pop(id(unit), None)
        self._held.pop(id(unit), None)
        if unit.spilled is not None:
            spilled, unit.spilled = unit.spilled, None
            if unit.coding is None:
                self._area.give_back(spilled)
            else:
                unit.coding.add_done_callback(lambda _: self._area.give_back(spilled))
        reading = unit.spilling or unit.coding
        if reading is None:
            unit.release()
        else:
            # The source is still read: it is the caller's again when that is done (spilling waits for coding).
            reading.add_done_callback(lambda _: unit.release())

    def _sealed(self) -> None:
        self._stats.sealed_s = self._loop.time()
        if self._in_open is not None:
            for times in self._stats.layers.values():
                times.acked_s = self._stats.sealed_s
        self._finished.set_result(None)
        self._cleanup()

    def _expired(self) -> None:
        self.fail(
            DeadlineError(
                f"not sealed within {self._deadline_s:g} s: {self.stats.moved_bytes} of {self._stats.total_bytes} bytes sent to {self._link.peer}"
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
        self._pending.clear()
        if self._stage is not None:
            self._stage.close()
        self._link.forget_sender(self, self._last if self._machine.terminal and self._error is not None else None)
        # A half-sent frame of this transfer must not read its source again.
        self._out.close()
        self._units.clear()
        self._early = None
        if self._in_open is not None:
            self._in_open = []
            self._link.in_open_bytes -= self._manifest.total_bytes
        for unit in list(self._live.values()):
            self._forget(unit)

    async def _settle(self) -> None:
        """Wait for what still reads the caller's memory."""
        if self._copies:
            await asyncio.wait(self._copies)

    def _send_open(self, via: AnyConnection | None = None) -> None:
        self._machine.fire(TransferEvent.SEND_OPEN)
        body = bodies.Open.of(
            self._manifest.encode(),
            deadline_s=self._deadline_s,
            chunk_bytes=self._chunk_bytes,
            priority=self.priority,
            checksum="xxh3" if self._checksum else "none",
            whole=None if self._in_open is None else bytes_of(self._manifest, self._in_open),
        )
        self._send(FrameType.OPEN, body, via)

    def _send_seal(self, via: AnyConnection | None = None) -> None:
        self._machine.fire(TransferEvent.SEND_SEAL)
        body = bodies.Seal(
            total_bytes=self._manifest.total_bytes, digest=self._manifest.digest, chunks=self._out.stats().chunks
        )
        self._send(FrameType.SEAL, body, via)

    def _send(self, kind: FrameType, body: bodies.Body, via: AnyConnection | None = None) -> None:
        frame = encode_control(kind, body, transfer=self.transfer)
        if kind in (FrameType.CANCEL, FrameType.ERROR):
            self._last = frame
        self._link.send(frame, via)


def _observed(future: asyncio.Future[None]) -> None:
    # Failure is reported by every call of the transfer; nobody may be waiting right now.
    if not future.cancelled():
        future.exception()
