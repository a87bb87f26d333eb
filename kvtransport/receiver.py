"""The consumer's side of a transfer: grants memory, decides on what is odd, hears of what is applied.

Claims, placing and verifying are the engine's (``engine/``); acknowledgements and credit too, where it is native.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from .buffers import PageList
from .compression import decode, raw_bytes
from .connection import AnyConnection
from .engine.base import Applied, Incoming, Odd, Placed
from .errors import (
    DeadlineError,
    DestinationError,
    Fault,
    IntegrityError,
    KVError,
    LimitError,
    ManifestError,
    ProtocolError,
    RefusedError,
    TransferCancelledError,
    TransferError,
)
from .layout import CacheLayout
from .manifest import Manifest
from .transfer import LayerTimes, TransferStats
from .wire import bodies
from .wire.frames import Flag, FrameType, Header, decode_control, encode_control
from .wire.state import TransferEvent, TransferMachine, TransferRole

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .link import Link

Grant = Callable[[Manifest], Mapping[tuple[int, int], PageList]]
"""Names the destination of every (layer, tensor) of an accepted manifest; may raise any KVError to refuse it."""

MAX_RESENDS = 1
"""A corrupt chunk is asked for again this often; then the transfer fails."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a consumer accepts.

    ``layout``: the manifest must fit it (None: flat objects, or the grant checks itself). ``window_bytes``
    bounds what is granted and not yet applied (None: what the path needs). ``on_range(layer, tensor, start, stop)`` runs after a
    range was verified; ``on_seal()`` runs before the seal is acknowledged and may raise to refuse it.
    """

    grant: Grant
    layout: CacheLayout | None = None
    block_tokens: int = 0
    deadline_s: float = 60.0
    window_bytes: int | None = None
    chunk_bytes: int = 16 << 20
    allow_unchecked: bool = False
    on_range: Callable[[int, int, int, int], None] | None = None
    on_seal: Callable[[], None] | None = None
    on_end: Callable[[KVError | None], None] | None = None


def _granted_nothing(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
    raise TransferError("this transfer has ended")


_OVER = Expectation(_granted_nothing)
"""In the place of what was wanted once it is over: what is called for a transfer usually refers to it, and would keep it alive."""


class Receiver:
    """One incoming transfer; made by :meth:`kvtransport.endpoint.Endpoint.expect`.

    Implements :class:`kvtransport.transfer.IncomingTransfer`. Belongs to the endpoint's event loop.
    """

    def __init__(self, endpoint: Endpoint, transfer: bytes, wanted: Expectation) -> None:
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self.transfer = transfer
        self._wanted = wanted
        self._machine = TransferMachine(TransferRole.RECEIVER)
        self._link: Link | None = None
        self._manifest: Manifest | None = None
        self._into: Incoming | None = None
        self._chunk_bytes = wanted.chunk_bytes
        self._window_bytes = 0
        self._last: bytes | None = None
        self._left: dict[int, int] = {}
        self._left_total = 0
        self._resent: dict[tuple[int, int, int], int] = {}
        self._asked: dict[tuple[int, int, int], int] = {}
        """Corrupt chunks that were asked for again: where they start, and their end."""
        self._decoding: dict[tuple[int, int, int], int] = {}
        """Coded chunks that are being decoded: where they start, and their bytes."""
        self._again_bytes = 0
        """Of coded copies of what was in its place already."""
        self._acks: list[tuple[int, int, int, int]] = []
        self._seal: bodies.Seal | None = None
        self._completed: list[int] = []
        self._error: KVError | None = None
        self._opened: asyncio.Future[Manifest] = self._loop.create_future()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._layers: dict[int, asyncio.Future[None]] = {}
        self._progress: asyncio.Future[None] = self._loop.create_future()
        self._opened.add_done_callback(_observed)
        self._finished.add_done_callback(_observed)
        self._stats = TransferStats()
        self._timer = self._loop.call_later(wanted.deadline_s, self._expired)

    # -- IncomingTransfer ----------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            raise self._error or TransferError("the producer has not opened this transfer yet")
        return self._manifest

    @property
    def stats(self) -> TransferStats:
        if self._into is not None:
            into, stats = self._into.stats(), self._stats
            stats.chunks, stats.checksums_verified = into.chunks, into.verified
            stats.moved_bytes, stats.duplicate_bytes = into.applied_bytes, into.duplicate_bytes + self._again_bytes
        return self._stats

    @property
    def error(self) -> KVError | None:
        return self._error

    @property
    def waiting(self) -> bool:
        """Whether no producer has opened this transfer yet."""
        return self._link is None and self._error is None

    @property
    def was_opened(self) -> bool:
        return self._link is not None

    async def opened(self) -> Manifest:
        """Wait for the producer's OPEN. Raises the transfer's error."""
        return await asyncio.shield(self._opened)

    async def layer(self, layer: int) -> None:
        manifest = await self.opened()
        if layer not in manifest.by_layer:
            raise ManifestError(f"layer {layer} is not in the manifest of this transfer", fault=Fault.LOCAL)
        if self._left[layer] == 0:
            return
        if self._error is not None:
            raise self._error
        future = self._layers.get(layer)
        if future is None:
            future = self._layers[layer] = self._loop.create_future()
            future.add_done_callback(_observed)
        await asyncio.shield(future)

    async def layers(self) -> AsyncIterator[int]:
        manifest = await self.opened()
        seen = 0
        while seen < len(manifest.by_layer):
            while seen < len(self._completed):
                yield self._completed[seen]
                seen += 1
            if seen == len(manifest.by_layer):
                return
            if self._error is not None:
                raise self._error
            await asyncio.shield(self._progress)

    async def sealed(self) -> None:
        await asyncio.shield(self._finished)

    async def cancel(self, reason: str = "") -> None:
        if not self._finished.done():
            said = reason or "no reason given"
            if self._link is not None:
                self._machine.fire(TransferEvent.SEND_CANCEL)
                self._send(FrameType.CANCEL, bodies.Cancel(reason=bodies.clip(reason)))
            self._end(TransferCancelledError(f"cancelled by this side: {said}"))

    # -- opening -------------------------------------------------------------------------------

    def on_open(self, link: Link, header: Header, body: bodies.Open) -> None:
        """The producer's OPEN: check the manifest, get the destinations, grant credit."""
        if self._link is not None and self._link is not link:
            error = RefusedError("this transfer was opened by another peer already", fault=Fault.LOCAL)
            link.send(encode_control(FrameType.ERROR, bodies.Error.of(error), transfer=self.transfer))
            return
        self._link = link
        self._machine.fire(TransferEvent.RECV_OPEN)
        if self._manifest is not None:
            return
        try:
            manifest = Manifest.decode(body.manifest)
            self._check(manifest, body)
            granted = dict(self._wanted.grant(manifest))
            self._check_grant(manifest, granted)
        except KVError as error:
            self.fail(error)
            return
        self._manifest = manifest
        if body.whole is not msgspec.UNSET:
            self._take_whole(manifest, granted, body.whole)
            return
        self._window_bytes = self._wanted.window_bytes or link.window_bytes()
        self._into = link.lanes.incoming(
            self,
            self.transfer,
            {slot: (granted[slot], extent.nbytes) for slot, extent in manifest.by_slot.items()},
            window=self._window_bytes,
            unchecked=self._wanted.allow_unchecked,
            eager=self._wanted.on_range is not None,
        )
        self._begin(manifest)
        accept = bodies.Accept(credit=self._into.stats().granted, chunk_bytes=min(body.chunk_bytes, self._wanted.chunk_bytes))
        self._send(FrameType.ACCEPT, accept)
        self._opened.set_result(manifest)
        for layer, left in self._left.items():
            if left == 0:
                self._layer_complete(layer)

    def _begin(self, manifest: Manifest) -> None:
        self._left = {layer: sum(e.nbytes for e in es) for layer, es in manifest.by_layer.items()}
        self._left_total = manifest.total_bytes
        self._stats.total_bytes = manifest.total_bytes
        self._stats.opened_s = self._loop.time()
        self._stats.layers = {layer: LayerTimes() for layer in manifest.layers}
        self._machine.fire(TransferEvent.SEND_ACCEPT)

    def _take_whole(self, manifest: Manifest, granted: Mapping[tuple[int, int], PageList], whole: bytes) -> None:
        """The OPEN carries all that there is, and stands for the SEAL; the answer stands for ACCEPT.

        The engine never hears of this transfer, so nothing else can be writing to its memory: DATA for it is a stray. What is
        here was verified with the frame.
        """
        self._begin(manifest)
        self._machine.fire(TransferEvent.RECV_SEAL)
        self._seal = bodies.Seal(total_bytes=manifest.total_bytes, digest=manifest.digest, chunks=1)
        at, view = 0, memoryview(whole)
        applied: list[Applied] = []
        for (layer, tensor), extent in manifest.by_slot.items():
            nbytes = extent.nbytes
            if nbytes:
                granted[layer, tensor].slice(0, nbytes).copy_from(PageList.of(view[at : at + nbytes]))
                applied.append((layer, tensor, 0, nbytes, self._loop.time()))
            at += nbytes
        self._stats.moved_bytes, self._stats.chunks, self._stats.checksums_verified = at, 1, 1
        self._opened.set_result(manifest)
        for layer, left in self._left.items():
            if left == 0:
                self._layer_complete(layer)
        self.on_applied(applied)

    def _check(self, manifest: Manifest, body: bodies.Open) -> None:
        if manifest.transfer != self.transfer:
            raise ManifestError("the manifest names another transfer than its OPEN")
        if body.whole is not msgspec.UNSET and len(body.whole) != manifest.total_bytes:
            raise ManifestError(
                f"the OPEN carries {len(body.whole)} bytes, the transfer that it names has {manifest.total_bytes}"
            )
        if body.checksum == "none" and not self._wanted.allow_unchecked:
            raise RefusedError("the producer wants to send without checksums and this side did not allow it")
        if self._wanted.layout is not None:
            manifest.check(self._wanted.layout, block_tokens=self._wanted.block_tokens)

    @staticmethod
    def _check_grant(manifest: Manifest, granted: Mapping[tuple[int, int], PageList]) -> None:
        for slot, extent in manifest.by_slot.items():
            pages = granted.get(slot)
            if pages is None:
                raise DestinationError(f"no destination for layer {slot[0]} tensor {slot[1]} ({extent.nbytes} bytes)")
            if pages.nbytes < extent.nbytes:
                raise DestinationError(
                    f"the destination of layer {slot[0]} tensor {slot[1]} holds {pages.nbytes} bytes, the transfer has {extent.nbytes}"
                )
            if pages.readonly:
                raise DestinationError(f"the destination of layer {slot[0]} tensor {slot[1]} is read-only memory")

    # -- data ----------------------------------------------------------------------------------

    def on_applied(self, ranges: Sequence[Applied]) -> None:
        """See :class:`kvtransport.engine.base.IncomingOwner`."""
        if self._finished.done():
            return
        now = self._loop.time()
        for layer, tensor, start, stop, first_s in ranges:
            times = self._stats.layers[layer]
            first_s = min(first_s, now)  # uvloop's clock counts milliseconds, the engine's does not: never later than applied
            if times.first_byte_s is None or first_s < times.first_byte_s:
                times.first_byte_s = first_s
            if self._wanted.on_range is not None:
                self._wanted.on_range(layer, tensor, start, stop)
            self._left_total -= stop - start
            left = self._left[layer] = self._left[layer] - (stop - start)
            if left == 0:
                self._layer_complete(layer)
        if self._left_total == 0:
            self._try_seal()

    def on_odd(self, why: Odd, header: Header) -> None:
        """See :class:`kvtransport.engine.base.IncomingOwner`."""
        what, stop = f"layer {header.layer} tensor {header.tensor}", header.offset + header.length
        error: KVError
        match why:
            case Odd.SLOT:
                error = ProtocolError(f"data for {what}, which is not in the manifest")
            case Odd.BOUNDS:
                extent = self.manifest.by_slot[header.layer, header.tensor]
                error = ProtocolError(
                    f"data for bytes {header.offset}..{stop} of {what}, which has {extent.nbytes} bytes"
                )
            case Odd.UNCHECKED:
                error = ProtocolError("a chunk without checksum in a transfer that was opened with checksums")
            case Odd.OVERLAP:
                error = ProtocolError(f"data for bytes {header.offset}..{stop} of {what} overlaps what was applied")
            case Odd.RANGES:
                error = LimitError(
                    f"received bytes of {what} lie in too many separate ranges: the sender must use larger chunks or send in order"
                )
            case Odd.CREDIT:
                granted = 0 if self._into is None else self._into.stats().granted
                error = LimitError(
                    f"data for bytes {header.offset}..{stop} of {what} goes beyond the credit of {granted} bytes: the sender must wait for CREDIT"
                )
        self.fail(error)

    def on_coded(self, header: Header, payload: bytes) -> None:
        """A coded chunk whose payload verified: decoded beside the loop, verified again, then put into its place."""
        if self._into is None or self._finished.done():
            return
        key = (header.layer, header.tensor, header.offset)
        try:
            nbytes = raw_bytes(payload)
        except ProtocolError as error:
            self.fail(error)
            return
        if self._into.contains(*key, header.offset + nbytes):
            self._again_bytes += nbytes
            self.acknowledge([(*key, header.offset + nbytes)])
            return
        if key in self._decoding:
            return  # a copy of what is here already
        most = max(self._window_bytes, nbytes)
        if sum(self._decoding.values()) + nbytes > most:
            # What a copy brought into its place meanwhile is not on the sender's account, but it is held.
            fresh = sum(n for (at, n) in self._decoding.items() if not self._into.contains(*at, at[2] + n))
            if fresh + nbytes > most:
                self.fail(LimitError(f"the producer sent more coded bytes than its credit of {self._window_bytes}"))
            else:
                self.missed(header._replace(length=nbytes))
            return
        self._decoding[key] = nbytes
        decoding = asyncio.ensure_future(self._endpoint.work(decode, payload))
        decoding.add_done_callback(lambda done: self._decoded(header, key, done))

    def _decoded(self, header: Header, key: tuple[int, int, int], done: asyncio.Future[bytearray]) -> None:
        del self._decoding[key]
        if self._into is None or self._finished.done() or done.cancelled():
            return
        error = done.exception()
        if isinstance(error, IntegrityError):
            self.on_corrupt(header)
        elif isinstance(error, KVError):
            self.fail(error)
        elif error is not None:
            raise error
        else:
            raw = done.result()
            placed = self._into.place(header, raw)
            if isinstance(placed, Odd):
                self.on_odd(placed, header._replace(length=len(raw)))
            elif placed is Placed.DONE:
                self._stats.coded_raw_bytes += len(raw)
                self._stats.coded_bytes += header.length

    def on_corrupt(self, header: Header) -> None:
        """See :class:`kvtransport.engine.base.IncomingOwner`."""
        if self._finished.done():
            return
        self._stats.corrupt_chunks += 1
        key = (header.layer, header.tensor, header.offset)
        times = self._resent.get(key, 0)
        if times >= MAX_RESENDS:
            self.fail(
                IntegrityError(
                    f"layer {header.layer} tensor {header.tensor}, {header.length} bytes at offset {header.offset}: "
                    f"checksum failed {times + 1} times; something on the path changes bytes"
                )
            )
            return
        self._resent[key] = times + 1
        self._asked[key] = stop = header.offset + header.length
        self._ask([(header.layer, header.tensor, header.offset, stop)])

    def missed(self, header: Header) -> None:
        """Data that had no place is asked for again: it came right behind a HELLO, before its connection was part of the link, or, coded,
        while as much as may be was being decoded."""
        if self._finished.done() or self._into is None:
            return
        slot, stop = (header.layer, header.tensor), header.offset + header.length
        extent = self.manifest.by_slot.get(slot)
        if extent is None or stop > extent.nbytes:
            self.fail(ProtocolError(f"data for layer {slot[0]} tensor {slot[1]} that is not in the manifest"))
        elif not self._into.contains(*slot, header.offset, stop):
            self._ask([(*slot, header.offset, stop)])

    def give_credit(self, limit: int) -> None:
        """See :class:`kvtransport.engine.base.IncomingOwner`."""
        self._machine.fire(TransferEvent.SEND_CREDIT)
        self._link_send(encode_control(FrameType.CREDIT, transfer=self.transfer, offset=limit))

    def _ask(self, ranges: list[tuple[int, int, int, int]], via: AnyConnection | None = None) -> None:
        for at in range(0, len(ranges), bodies.MAX_RANGES):
            self._machine.fire(TransferEvent.SEND_RESUME)
            some = bodies.byte_ranges(ranges[at : at + bodies.MAX_RANGES])
            self._send(FrameType.RESUME, bodies.Resume(ranges=some), via)

    def acknowledge(self, ranges: Sequence[tuple[int, int, int, int]]) -> None:
        """See :class:`kvtransport.engine.base.IncomingOwner`."""
        if not self._acks:
            # One frame for everything that was applied in this turn of the loop.
            self._loop.call_soon(self._flush_acks)
        self._acks += ranges

    def _flush_acks(self) -> None:
        acks, self._acks = self._acks, []
        if acks and self._machine.allows(TransferEvent.SEND_ACK):
            self._acknowledge(acks)

    def _acknowledge(self, ranges: list[tuple[int, int, int, int]], via: AnyConnection | None = None) -> None:
        for at in range(0, len(ranges), bodies.MAX_RANGES):
            self._machine.fire(TransferEvent.SEND_ACK)
            some = bodies.byte_ranges(ranges[at : at + bodies.MAX_RANGES])
            self._send(FrameType.ACK, bodies.Ack(ranges=some), via)

    def _layer_complete(self, layer: int) -> None:
        self._stats.layers[layer].applied_s = self._loop.time()
        self._completed.append(layer)
        future = self._layers.pop(layer, None)
        if future is not None:
            future.set_result(None)
        self._wake()

    def _wake(self) -> None:
        progress, self._progress = self._progress, self._loop.create_future()
        progress.set_result(None)

    # -- sealing and ending --------------------------------------------------------------------

    def on_frame(self, header: Header, payload: bytes) -> None:
        """A control frame of this transfer, other than OPEN."""
        self._machine.fire(TransferEvent.received(header))
        body = decode_control(header, payload, verified=True)
        match body:
            case bodies.Seal():
                self._seal = body
                self._try_seal()
            case bodies.Cancel(reason=reason):
                said = reason or "no reason given"
                self._end(TransferCancelledError(f"cancelled by the producer: {said}", fault=Fault.REMOTE))
            case bodies.Error():
                self._end(body.to_error(prefix="the producer says: "))
            case _:
                raise ProtocolError(f"{header.type.name} is not for the consumer of a transfer")

    def _try_seal(self) -> None:
        if self._seal is None or self._finished.done() or self._left_total:
            return
        if self._seal.digest != self.manifest.digest or self._seal.total_bytes != self.manifest.total_bytes:
            self.fail(ManifestError("the seal does not repeat the manifest that this transfer was opened with"))
            return
        try:
            if self._wanted.on_seal is not None:
                self._wanted.on_seal()
        except KVError as error:
            self.fail(error)
            return
        self._flush_acks()
        self._machine.fire(TransferEvent.SEND_ACK_FINAL)
        self._link_send(encode_control(FrameType.ACK, bodies.Ack(ranges=()), transfer=self.transfer, flags=Flag.FINAL))
        self._stats.sealed_s = self._loop.time()
        self._finished.set_result(None)
        self._cleanup(None)

    def on_connection_lost(self, connection: AnyConnection) -> None:
        """Its claim is void."""
        if self._into is not None:
            self._into.connection_lost(connection)

    def say_again(self, via: AnyConnection | None) -> None:
        """What is applied, granted and asked for is said again: frames saying so may be lost with a connection.

        In this order and on one connection (``via``, where given): a producer that resumes waits for ACCEPT, and
        knows then what need not travel.
        """
        into = self._into
        if into is None or not self._machine.allows(TransferEvent.SEND_ACCEPT):
            return
        self._acknowledge(into.applied(), via)
        self._send_accept(via)
        asked = [
            (layer, tensor, start, stop)
            for (layer, tensor, start), stop in self._asked.items()
            if not into.contains(layer, tensor, start, stop)
        ]
        if asked:
            self._ask(asked, via)

    def on_link_lost(self, error: KVError) -> None:
        self._end(error)

    def _expired(self) -> None:
        if self._link is None:
            what = "no producer opened it"
        else:
            what = f"{self.stats.moved_bytes} of {self._stats.total_bytes} bytes came from {self._link.peer}"
        self.fail(DeadlineError(f"not sealed within {self._wanted.deadline_s:g} s: {what}"))

    def fail(self, error: KVError) -> None:
        """End with ``error`` and tell the producer. Idempotent."""
        if self._finished.done():
            return
        if self._link is not None and self._machine.allows(TransferEvent.SEND_ERROR):
            self._machine.fire(TransferEvent.SEND_ERROR)
            self._send(FrameType.ERROR, bodies.Error.of(error))
        self._end(error)

    def _end(self, error: KVError) -> None:
        if self._finished.done():
            return
        self._error = error
        self._finished.set_exception(error)
        if not self._opened.done():
            self._opened.set_exception(error)
        for future in self._layers.values():
            future.set_exception(error)
        self._layers.clear()
        self._cleanup(error)
        self._wake()

    def _cleanup(self, error: KVError | None) -> None:
        self._timer.cancel()
        if self._into is not None:
            self._into.close()
        self._endpoint.forget_receiver(self)
        if self._link is not None:
            self._link.forget_receiver(self, self._last if self._machine.terminal else None)
        wanted, self._wanted = self._wanted, _OVER
        if wanted.on_end is not None:
            wanted.on_end(error)

    def _send_accept(self, via: AnyConnection | None) -> None:
        assert self._into is not None
        self._machine.fire(TransferEvent.SEND_ACCEPT)
        self._send(FrameType.ACCEPT, bodies.Accept(credit=self._into.stats().granted, chunk_bytes=self._chunk_bytes), via)

    def _send(self, kind: FrameType, body: bodies.Body, via: AnyConnection | None = None) -> None:
        self._link_send(encode_control(kind, body, transfer=self.transfer), via)

    def _link_send(self, frame: bytes, via: AnyConnection | None = None) -> None:
        self._last = frame
        if self._link is not None:
            self._link.send(frame, via)


def _observed(future: asyncio.Future[None] | asyncio.Future[Manifest]) -> None:
    # Failure is reported by every call of the transfer; nobody may be waiting right now.
    if not future.cancelled():
        future.exception()
