"""The twin of ``native/sending.c``: spans, chunks, credit, acknowledgements, resends."""

from __future__ import annotations

import asyncio
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..buffers import PageList
from ..connection import Connection, OutFrame, data_head
from ..flow.chunking import MIN_CHUNK, next_cut
from ..flow.credit import SenderCredit
from .base import NOBODY, OutgoingOwner, OutgoingStats, Slot

if TYPE_CHECKING:
    from ..connection import AnyConnection
    from .python import PythonLanes


@dataclass(slots=True, eq=False)
class Span:
    """Bytes ``[start, stop)`` of an extent, and where they lie."""

    key: int
    layer: int
    tensor: int
    start: int
    stop: int
    pages: PageList
    cut: int
    unacked: int
    coded: bool = False
    """``pages`` is what the bytes became: one chunk."""
    chunks: list[Chunk] = field(default_factory=list)

    def source(self, start: int, stop: int) -> PageList:
        if self.coded or (start == self.start and stop == self.stop):
            return self.pages
        return self.pages.slice(start - self.start, stop - self.start)


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes ``[start, stop)`` of a span, on connection ``on`` or waiting to go again."""

    span: Span
    start: int
    stop: int
    attempt: int = 0
    on: Connection | None = None
    queued: bool = False
    acked: bool = False


class PythonOutgoing:
    """See :class:`.base.Outgoing`."""

    def __init__(
        self,
        lanes: PythonLanes,
        owner: OutgoingOwner,
        transfer: bytes,
        slots: Sequence[Slot],
        *,
        priority: int,
        checksum: bool,
    ) -> None:
        self._lanes = lanes
        self._owner: OutgoingOwner = owner
        self._loop = asyncio.get_running_loop()
        self.transfer = transfer
        self.priority = priority
        self._checksum = checksum
        self._chunk_bytes = 1
        self._open = False
        self._closed = False
        self._credit = SenderCredit()
        self._spans: dict[Slot, list[Span]] = {slot: [] for slot in slots}
        self._queue: deque[Span] = deque()
        self._retries: deque[Chunk] = deque()
        self._next_key = 0
        self._inflight = self._moved = self._resent = self._chunks = 0
        self._stalled_since: float | None = None
        self._stalled_s = 0.0

    # -- what the sender asks ------------------------------------------------------------------

    def accept(self, chunk_bytes: int, credit: int) -> None:
        self._open = True
        self._chunk_bytes = chunk_bytes
        self._credit.grant(credit)
        self._lanes.has_work(self)

    def hold(self) -> None:
        self._open = False

    def allow(self, limit: int) -> None:
        self._credit.allowed = limit
        self._lanes.has_work(self)

    def grant(self, credit: int) -> None:
        if self._credit.grant(credit):
            self._lanes.has_work(self)

    def add(self, layer: int, tensor: int, start: int, pages: PageList) -> int:
        return self._add(layer, tensor, start, pages.nbytes, pages, coded=False)

    def add_coded(self, layer: int, tensor: int, start: int, nbytes: int, payload: bytes) -> int:
        return self._add(layer, tensor, start, nbytes, PageList.of(payload), coded=True)

    def _add(self, layer: int, tensor: int, start: int, nbytes: int, pages: PageList, *, coded: bool) -> int:
        key = self._next_key
        self._next_key += 1
        span = Span(key, layer, tensor, start, start + nbytes, pages, start, nbytes, coded)
        insort(self._spans[layer, tensor], span, key=_start)
        self._queue.append(span)
        self._lanes.has_work(self)
        return key

    def uncut(self, layer: int, tensor: int, start: int) -> int:
        span = self._find(layer, tensor, start)
        return 0 if span is None else span.stop - span.cut

    def swap(self, layer: int, tensor: int, start: int, pages: PageList) -> bool:
        span = self._find(layer, tensor, start)
        if span is None:
            return False
        span.pages = pages
        for connection in self._lanes.connections:
            chunk = _sending(connection)
            if chunk is not None and chunk.span is span:
                connection.swap_source(span.source(chunk.start, chunk.stop))
        return True

    def ack(self, layer: int, tensor: int, start: int, stop: int) -> None:
        spans = self._spans[layer, tensor]
        acked, keys = 0, []
        for span in self._touched(spans, start, stop):
            for chunk in span.chunks:
                if not chunk.acked and start <= chunk.start and chunk.stop <= stop:
                    chunk.acked = True
                    n = chunk.stop - chunk.start
                    self._inflight -= n
                    span.unacked -= n
                    acked += n
            if span.unacked == 0:
                spans.remove(span)
                self._drop(span)
                keys.append(span.key)
        if not self._inflight and self._queue:
            # With nothing on its way what credit is left is used, however little: no other frame may come to say so.
            self._lanes.has_work(self)
        if acked:
            self._owner.on_acked([(layer, tensor, acked)], keys)

    def resend(self, layer: int, tensor: int, start: int, stop: int) -> int:
        spans = self._touched(self._spans[layer, tensor], start, stop)
        return self._again([c for s in spans for c in s.chunks if c.start < stop and start < c.stop])

    def requeue(self, connection: AnyConnection) -> int:
        return self._again([c for spans in self._spans.values() for s in spans for c in s.chunks if c.on is connection])

    def stalled(self) -> float:
        return 0.0 if self._stalled_since is None else self._loop.time() - self._stalled_since

    def stats(self) -> OutgoingStats:
        return OutgoingStats(
            chunks=self._chunks,
            moved_bytes=self._moved,
            resent_bytes=self._resent,
            inflight_bytes=self._inflight,
            credit_left=self._credit.left,
            stalled_now_s=self.stalled(),
            stalled_s=self._stalled_s,
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._open = False
        self._queue.clear()
        self._retries.clear()
        self._lanes.forget(self)
        for spans in self._spans.values():
            for span in spans:
                self._drop(span)
            spans.clear()
        self._owner = NOBODY

    # -- what the connections ask --------------------------------------------------------------

    def next_data(self, connection: Connection) -> OutFrame | None:
        """The next chunk as a frame for ``connection``."""
        if not self._open:
            return None
        chunk = self._retry() or self._cut()
        if chunk is None:
            return None
        chunk.on = connection
        span = chunk.span
        pages = span.source(chunk.start, chunk.stop)
        head = data_head(
            self.transfer,
            span.layer,
            span.tensor,
            chunk.start,
            chunk.attempt,
            pages,
            checksum=self._checksum,
            coded=span.coded,
        )
        if chunk.attempt:
            self._resent += chunk.stop - chunk.start
        return OutFrame(head, pages, chunk, self._checksum)

    # -- inside --------------------------------------------------------------------------------

    def _retry(self) -> Chunk | None:
        while self._retries:
            chunk = self._retries.popleft()
            chunk.queued = False
            if not chunk.acked:  # what was lost may have been the acknowledgement only, and it was said again
                return chunk
        return None

    def _cut(self) -> Chunk | None:
        if not self._queue:
            return None
        span = self._queue[0]
        wanted = span.stop - span.cut if span.coded else next_cut(span.cut, span.stop, self._chunk_bytes)
        # Rather wait for acknowledgements than send a runt; with nothing on its way there is none to wait for.
        least = wanted if span.coded else MIN_CHUNK if self._inflight else 1
        n = self._credit.take(wanted, least)
        if n == 0:
            if self._stalled_since is None and self._credit.allowed >= self._credit.limit:
                self._stalled_since = self._loop.time()  # who waits for its allowance does not stall
            return None
        if self._stalled_since is not None:
            self._stalled_s += self._loop.time() - self._stalled_since
            self._stalled_since = None
        chunk = Chunk(span, span.cut, span.cut + n)
        span.chunks.append(chunk)
        span.cut += n
        if span.cut == span.stop:
            self._queue.popleft()
        self._chunks += 1
        self._moved += n
        self._inflight += n
        return chunk

    def _again(self, chunks: list[Chunk]) -> int:
        total = 0
        for chunk in chunks:
            if not chunk.queued and not chunk.acked:
                chunk.queued = True
                chunk.attempt += 1
                chunk.on = None
                self._retries.append(chunk)
                total += chunk.stop - chunk.start
        if total:
            self._lanes.has_work(self)
        return total

    def _find(self, layer: int, tensor: int, start: int) -> Span | None:
        spans = self._spans[layer, tensor]
        at = bisect_right(spans, start, key=_start) - 1
        return spans[at] if at >= 0 and spans[at].start == start else None

    def _touched(self, spans: list[Span], start: int, stop: int) -> list[Span]:
        first = max(0, bisect_right(spans, start, key=_start) - 1)
        return [s for s in spans[first : bisect_right(spans, stop - 1, key=_start)] if start < s.stop]

    def _drop(self, span: Span) -> None:
        """A half-sent frame of it must not read its source again."""
        for connection in list(self._lanes.connections):
            chunk = _sending(connection)
            if chunk is not None and chunk.span is span:
                connection.void_outgoing()


def _start(span: Span) -> int:
    return span.start


def _sending(connection: Connection) -> Chunk | None:
    frame = connection.sending
    return frame.key if frame is not None and isinstance(frame.key, Chunk) else None
