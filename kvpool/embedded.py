"""The two faces of a transfer, in memory: what the embedded pool hands out.

Copies happen on the event loop's thread, between two awaits: after a cancel, a failure or a deadline nothing
touches the caller's memory again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

from kvtransport.buffers import PageList
from kvtransport.errors import DestinationError, Fault, KVError, ManifestError, TransferCancelledError, TransferError
from kvtransport.manifest import Manifest
from kvtransport.transfer import LayerTimes, TransferStats
from kvtransport.wire.ranges import RangeSet

from .get import Get
from .placement import Slot
from .put import Put, PutState

COPY_STEP = 4 << 20
"""Bytes copied at once before other tasks get a turn (about a millisecond)."""
EVENT_POLL_S = 0.0005

Range = tuple[int, int, int, int]
"""(layer, tensor, start, stop)"""


def check_destinations(manifest: Manifest, into: Mapping[Slot, PageList]) -> None:
    """Raise DestinationError naming the first extent that ``into`` has no, too little, too much or read-only memory for."""
    for extent in manifest.extents:
        pages = into.get((extent.layer, extent.tensor))
        where = f"layer {extent.layer} tensor {extent.tensor}"
        if pages is None:
            raise DestinationError(f"{where}: no destination was given, {extent.nbytes} bytes are coming")
        if pages.nbytes != extent.nbytes:
            raise DestinationError(f"{where}: the destination has {pages.nbytes} bytes, {extent.nbytes} are coming")
        if pages.readonly:
            raise DestinationError(f"{where}: the destination is read-only")


class EmbeddedHandover:
    """A ready unit that was handed over; released as soon as it is copied, or the transfer has ended."""

    def __init__(self) -> None:
        self._done = asyncio.Event()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    async def released(self) -> None:
        await self._done.wait()

    def release(self) -> None:
        self._done.set()


class EmbeddedPut:
    """An :class:`~kvtransport.transfer.OutgoingTransfer` into the pool of this process."""

    def __init__(self, put: Put, transfer: bytes, on_end: Callable[[EmbeddedPut], None]) -> None:
        self.manifest = put.manifest(transfer)
        self.stats = TransferStats(total_bytes=self.manifest.total_bytes, opened_s=asyncio.get_running_loop().time())
        self._put = put
        self._on_end = on_end
        self._error: KVError | None = None
        self._claimed = {slot: RangeSet(max_ranges=65_536) for slot in put.extents}
        self._left = {layer: sum(e.nbytes for e in extents) for layer, extents in self.manifest.by_layer.items()}
        self._waiting: deque[tuple[Callable[[], bool], Range, PageList, EmbeddedHandover]] = deque()
        self._poll: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        put.on_failed = self._fail

    def ready(
        self,
        layer: int,
        tensor: int,
        pages: PageList,
        *,
        first: int | None = None,
        tokens: int = 0,
        event: Callable[[], bool] | None = None,
    ) -> EmbeddedHandover:
        """See :class:`~kvtransport.transfer.OutgoingTransfer`; a unit handed over twice is refused."""
        if self._error is not None:
            raise self._error
        if self._put.state is not PutState.OPEN:
            raise TransferError(f"the put is {self._put.state}: nothing can be handed over")
        extent = self.manifest.extent(layer, tensor)
        start, stop = (0, extent.nbytes) if first is None else extent.byte_range(first, tokens)
        where = f"layer {layer} tensor {tensor} bytes {start}..{stop}"
        if pages.nbytes != stop - start:
            raise DestinationError(f"{where}: the unit has {stop - start} bytes, the pages {pages.nbytes}")
        claimed = self._claimed[layer, tensor]
        if start < stop:
            if claimed.missing(start, stop) != [(start, stop)]:
                raise TransferError(f"{where} was handed over already", fault=Fault.LOCAL)
            claimed.add(start, stop)
        handover = EmbeddedHandover()
        unit = (layer, tensor, start, stop)
        if event is None or event():
            self._take(unit, pages)
            handover.release()
        else:
            self._waiting.append((event, unit, pages, handover))
            self._drained.clear()
            self._arm()
        return handover

    async def seal(self) -> None:
        if self._error is not None:
            raise self._error
        gaps = [
            (*slot, low, high)
            for slot, extent in self._put.extents.items()
            for low, high in self._claimed[slot].missing(0, extent.nbytes)
        ]
        if gaps:
            layer, tensor, low, high = gaps[0]
            raise ManifestError(
                f"cannot seal: {len(gaps)} ranges were never handed over, the first is layer {layer} tensor {tensor} bytes "
                f"{low}..{high}",
                fault=Fault.LOCAL,
            )
        await self._drained.wait()
        if self._error is not None:
            raise self._error
        if self._put.state is PutState.COMMITTED:
            return
        try:
            self._put.commit()
        except KVError as error:
            self._fail(error)
            raise
        self.stats.sealed_s = asyncio.get_running_loop().time()
        self._on_end(self)

    async def cancel(self, reason: str = "") -> None:
        self._fail(TransferCancelledError("cancelled by the producer" + (f": {reason}" if reason else "")))

    def _take(self, unit: Range, pages: PageList) -> None:
        """Copy a unit into the pool."""
        layer, tensor, start, stop = unit
        self._put.destinations[layer, tensor].slice(start, stop).copy_from(pages)
        now = asyncio.get_running_loop().time()
        times = self.stats.layers.setdefault(layer, LayerTimes())
        self.stats.moved_bytes += stop - start
        self.stats.chunks += 1
        self._left[layer] -= stop - start
        if not self._left[layer]:
            times.ready_s = times.acked_s = now
        self._put.progress(layer, tensor, start, stop)

    def _arm(self) -> None:
        if self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(EVENT_POLL_S, self._look)

    def _look(self) -> None:
        """Take the units whose events have come."""
        self._poll = None
        for _ in range(len(self._waiting)):
            event, unit, pages, handover = self._waiting.popleft()
            try:
                come = event()
            except Exception as error:  # noqa: BLE001  (the caller's own code; the transfer must not hang on it)
                handover.release()
                self._fail(TransferError(f"the ready event failed: {type(error).__name__} {error}", fault=Fault.LOCAL))
                return
            if come:
                self._take(unit, pages)
                handover.release()
            else:
                self._waiting.append((event, unit, pages, handover))
        if self._waiting:
            self._arm()
        else:
            self._drained.set()

    def _fail(self, error: KVError) -> None:
        """End; nothing is copied after this returns."""
        if self._error is not None or self._put.state is PutState.COMMITTED:
            return
        self._error = error
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        for _, _, _, handover in self._waiting:
            handover.release()
        self._waiting.clear()
        self._drained.set()
        self._put.abort(error)
        self._on_end(self)


class EmbeddedGet:
    """An :class:`~kvtransport.transfer.IncomingTransfer` from the pool of this process."""

    def __init__(
        self, get: Get, into: Mapping[Slot, PageList], transfer: bytes, on_end: Callable[[EmbeddedGet], None]
    ) -> None:
        self.manifest = get.manifest(transfer)
        check_destinations(self.manifest, into)
        loop = asyncio.get_running_loop()
        self.stats = TransferStats(total_bytes=self.manifest.total_bytes, opened_s=loop.time())
        self._get = get
        self._into = into
        self._on_end = on_end
        self._error: KVError | None = None
        self._ended = asyncio.Event()
        self._wake = asyncio.Event()
        self._left = {layer: sum(e.nbytes for e in extents) for layer, extents in self.manifest.by_layer.items()}
        self._applied = {layer: asyncio.Event() for layer in self._left}
        self._order: list[int] = []
        self._queue: deque[Range] = deque(get.ready_ranges())
        get.subscribe(self._arrived)
        get.on_sealed = self._wake.set
        get.on_failed = self._end
        self._task = loop.create_task(self._run(), name="kvpool embedded get")

    async def layer(self, layer: int) -> None:
        if layer not in self._applied:
            raise ManifestError(f"layer {layer} is not in this transfer: {self.manifest.layers}", fault=Fault.LOCAL)
        await self._applied[layer].wait()
        if self._left[layer] and self._error is not None:
            raise self._error

    async def layers(self) -> AsyncIterator[int]:
        """Layer indices as they complete."""
        for at in range(len(self._left)):
            while at >= len(self._order):
                if self._error is not None:
                    raise self._error
                waiting = [asyncio.ensure_future(e.wait()) for e in self._applied.values() if not e.is_set()]
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for waiter in waiting:
                        waiter.cancel()
            yield self._order[at]

    async def sealed(self) -> None:
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def cancel(self, reason: str = "") -> None:
        self._end(TransferCancelledError("cancelled by the consumer" + (f": {reason}" if reason else "")))
        await asyncio.gather(self._task, return_exceptions=True)

    def _arrived(self, layer: int, tensor: int, start: int, stop: int) -> None:
        self._queue.append((layer, tensor, start, stop))
        self._wake.set()

    async def _run(self) -> None:
        """Copy what is ready, a step at a time, until everything is there and sealed."""
        try:
            self._finish_empty_layers()
            while True:
                self._wake.clear()
                while self._queue:
                    layer, tensor, start, stop = self._queue.popleft()
                    for at in range(start, stop, COPY_STEP):
                        self._apply(layer, tensor, at, min(stop, at + COPY_STEP))
                        await asyncio.sleep(0)
                if self._get.sealed and not any(self._left.values()):
                    break
                await self._wake.wait()
        except (KVError, ValueError, BufferError) as error:
            self._end(error if isinstance(error, KVError) else TransferError(f"the copy failed: {error}"))
        else:
            self._end(None)

    def _apply(self, layer: int, tensor: int, start: int, stop: int) -> None:
        source = self._get.sources[layer, tensor].slice(start, stop)
        self._into[layer, tensor].slice(start, stop).copy_from(source)
        now = asyncio.get_running_loop().time()
        times = self.stats.layers.setdefault(layer, LayerTimes())
        times.first_byte_s = now if times.first_byte_s is None else times.first_byte_s
        self.stats.moved_bytes += stop - start
        self.stats.chunks += 1
        self._left[layer] -= stop - start
        if not self._left[layer]:
            times.applied_s = now
            self._order.append(layer)
            self._applied[layer].set()

    def _finish_empty_layers(self) -> None:
        for layer, left in self._left.items():
            if not left:
                self._order.append(layer)
                self._applied[layer].set()

    def _end(self, error: KVError | None) -> None:
        """End; nothing is copied after this returns, and everybody who waits wakes."""
        if self._ended.is_set():
            return
        self._error = error
        self._ended.set()
        if error is not None:
            self._queue.clear()
            for event in self._applied.values():
                event.set()
            if asyncio.current_task() is not self._task:
                self._task.cancel()
        else:
            self.stats.sealed_s = asyncio.get_running_loop().time()
        self._get.close()
        self._on_end(self)
