"""Coding on the way out: what would wait for a connection anyway is made smaller meanwhile.

A transfer's ready units pass a :class:`CodingStage` where coding has paid on its link lately. It keeps the connections
busy first: bytes go as they are while little is queued in front of them, and are coded while enough is. So a codec that does
not keep up costs processor time, never goodput. Memory: coded payloads are held until they are acknowledged, at most
:data:`MAX_HELD` bytes of a transfer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from .compression import Codec, encode
from .engine.base import Outgoing, Slot
from .flow.coding import BusyRate, CodingChoice, out_of_reach

if TYPE_CHECKING:
    from .buffers import PageList
    from .connection import AnyConnection

AHEAD_S = 0.01
"""What is queued for the connections, in time on the link: less, and bytes go as they are."""
AHEAD_CHUNKS = 2
"""The same in chunks; and coding stops with twice as many beyond it."""
MAX_HELD = 64 << 20
POLL_S = 0.002
MAX_SLOTS = 4096
"""Extents of which a link remembers how they code."""


class _Path(Protocol):
    """What is asked of a link."""

    connections: list[AnyConnection]

    def telemetry(self) -> Any: ...


class StagedUnit(Protocol):
    """What is asked of a ready unit, and told to it."""

    layer: int
    tensor: int
    start: int
    stop: int
    pages: PageList
    coding: asyncio.Task[None] | None
    """Reads ``pages``."""
    left: int
    """Spans that are not acknowledged; one more while not all has become spans, and one while a part is being coded."""
    raw: list[tuple[int, int]]
    """Of those spans the ones that are read from ``pages``."""
    staged: bool


class LinkCoding:
    """What a link knows of coding: the codecs both sides have, what its data became, what the path carries."""

    def __init__(self, path: _Path, codecs: tuple[Codec, ...], clock: Callable[[], float], *, always: bool = False) -> None:
        self._path = path
        self._codecs = codecs
        self._clock = clock
        self.always = always
        self._choices: dict[Slot, CodingChoice] = {}
        self._speeds: dict[int, float] = {}
        self._rate = BusyRate()
        self._rtt_s = 0.0

    def rate(self) -> float | None:
        """What the path carries, bytes per second, as it was when something last wanted all of it; None: never yet."""
        now = self._clock()
        if self._rate.wants(now):
            link = self._path.telemetry()
            if link.rtt_s is not None:  # there is a real path, and its counters
                self._rtt_s = float(link.min_rtt_s or link.rtt_s)
                self._rate.look(now, link.sent_bytes, link.unsent_bytes, link.limited_by_sender_s)
        return self._rate.bytes_per_s

    def busy(self) -> bool:
        """Whether every connection has enough to send for :data:`AHEAD_S` by itself: it lies in its socket."""
        live = [c for c in self._path.connections if not c.closed]
        rate = self._rate.bytes_per_s
        if not live or rate is None:
            return False
        least = rate / len(live) * (AHEAD_S + self._rtt_s)
        return all(c.stream.unsent_bytes() >= least for c in live)

    def choose(self, slot: Slot) -> Codec | None:
        """The codec for the next chunk of ``slot``; None: as it is."""
        if self.always:
            return self._codecs[0]
        rate = self.rate()
        if rate is None or (slot not in self._choices and out_of_reach(self._codecs, self._speeds, rate)):
            return None  # for thousands of small extents, without a memory of each
        chosen = self._choice(slot).choose(rate)
        return None if chosen is None else Codec(chosen)

    def observe(self, slot: Slot, codec: Codec, raw: int, coded: int, seconds: float) -> None:
        self._choice(slot).observe(codec, raw, coded, seconds)

    def _choice(self, slot: Slot) -> CodingChoice:
        choice = self._choices.get(slot)
        if choice is None:
            if len(self._choices) >= MAX_SLOTS:
                self._choices.clear()
            choice = self._choices[slot] = CodingChoice(tuple(map(int, self._codecs)), self._speeds)
        return choice


def _timed(pages: PageList, codec: Codec) -> tuple[bytes | None, float]:
    begun = time.thread_time()
    payload = encode(pages, codec)
    return payload, time.thread_time() - begun


def _nobody(key: int, unit: Any) -> None:
    """In the place of a transfer that has ended."""


class CodingStage:
    """Of one outgoing transfer, between its ready units and the engine. ``added(key, unit)``: a span of it is the engine's."""

    def __init__(
        self,
        coding: LinkCoding,
        out: Outgoing,
        added: Callable[[int, Any], None],
        work: Callable[..., Awaitable[Any]],
        copies: set[asyncio.Task[None]],
    ) -> None:
        self._coding = coding
        self._out = out
        self._added = added
        self._work = work
        self._copies = copies
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Any, int]] = deque()
        """Units, and where what is left of them starts."""
        self._piece = 0
        self._given = 0
        """Bytes that are the engine's, or were."""
        self._held: dict[int, int] = {}
        self._held_bytes = 0
        self._job: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.raw_bytes = self.coded_bytes = 0
        """Bytes that were coded, and what they became."""

    def accept(self, chunk_bytes: int, credit: int, total: int) -> None:
        """The consumer takes chunks of ``chunk_bytes``; ``credit`` is its first, of ``total``."""
        # Never cut, a coded chunk waits for credit of all its bytes: half a window always comes.
        piece = chunk_bytes if credit >= total else min(chunk_bytes, credit // 2)
        self._piece = max(2, piece & ~1)
        self._pump()

    def add(self, unit: StagedUnit) -> None:
        """Its bytes go by this way or the straight one, whichever its link has found better."""
        slot = (unit.layer, unit.tensor)
        if not self._waiting and self._coding.choose(slot) is None:
            self._give(unit, unit.start, unit.stop)
            return
        unit.left, unit.staged = unit.left + 1, True
        self._waiting.append((unit, unit.start))
        self._pump()

    def acked(self, keys: Any) -> None:
        for key in keys:
            self._held_bytes -= self._held.pop(key, 0)
        if self._waiting:
            self._pump()
        else:
            self._coding.rate()  # looks now and then

    def close(self) -> None:
        """Nothing more is begun; a chunk that is being coded is read to its end (``copies`` has it)."""
        self._closed = True
        self._added = _nobody
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    # -- inside --------------------------------------------------------------------------------

    def _give(self, unit: StagedUnit, start: int, stop: int) -> None:
        self._given += stop - start
        unit.raw.append((start, stop))
        pages = unit.pages
        if stop - start != pages.nbytes:
            pages = pages.slice(start - unit.start, stop - unit.start)
        self._added(self._out.add(unit.layer, unit.tensor, start, pages), unit)

    def _pump(self) -> None:
        if self._closed or not self._piece:
            return
        least = 0 if self._coding.always else self._piece * AHEAD_CHUNKS
        least = max(least, int((self._coding.rate() or 0.0) * AHEAD_S) if least else 0)
        most = least + 2 * AHEAD_CHUNKS * self._piece
        while self._waiting:
            unit, start = self._waiting[0]
            queued = self._given - self._out.stats().moved_bytes
            straight = queued < least and not self._coding.busy()
            if not straight:
                if queued >= most or self._job is not None:
                    break
                codec = self._coding.choose((unit.layer, unit.tensor)) if self._held_bytes < MAX_HELD else None
                if codec is None and self._held_bytes >= MAX_HELD:
                    break
                straight = codec is None
            stop = self._cut(unit, start)
            if straight:
                self._give(unit, start, stop)
            else:
                assert codec is not None
                unit.left += 1
                self._job = unit.coding = self._loop.create_task(self._code(unit, start, stop, codec))
                self._copies.add(self._job)
                self._job.add_done_callback(self._copies.discard)
            if not unit.staged:
                unit.left -= 1
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_later(POLL_S, self._poll)

    def _cut(self, unit: StagedUnit, start: int) -> int:
        stop = min(unit.stop, start + self._piece)
        self._waiting.popleft()
        if stop < unit.stop:
            self._waiting.appendleft((unit, stop))
        else:
            unit.staged = False
        return stop

    def _poll(self) -> None:
        self._timer = None
        self._pump()

    async def _code(self, unit: StagedUnit, start: int, stop: int, codec: Codec) -> None:
        payload, seconds = await self._work(_timed, unit.pages.slice(start - unit.start, stop - unit.start), codec)
        self._job = unit.coding = None
        n = stop - start
        self._coding.observe((unit.layer, unit.tensor), codec, n, len(payload or b"") or n, seconds)
        if self._closed:
            return
        if payload is None:
            self._give(unit, start, stop)
        else:
            self._given += n
            key = self._out.add_coded(unit.layer, unit.tensor, start, n, payload)
            self._held[key] = len(payload)
            self._held_bytes += len(payload)
            self.raw_bytes += n
            self.coded_bytes += len(payload)
            self._added(key, unit)
        unit.left -= 1
        self._pump()
