"""A wire that changes bytes: a TCP relay that flips bits in DATA payloads, to show that checksums catch it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from kvtransport.errors import KVError
from kvtransport.wire.frames import HEADER_BYTES, FrameType, Header, unpack_header

READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit that was changed: bit 0 of the payload byte ``at`` of the chunk at ``offset`` of (layer, tensor)."""

    layer: int
    tensor: int
    offset: int
    at: int
    attempt: int


class Flipper:
    """One direction of one connection, without I/O: bytes in, bytes out, as many.

    ``wanted(header)`` says whether a DATA frame is to be damaged; headers stay as they are. ``on_payload(n)`` is told the
    DATA payload bytes that passed. What is not a stream of frames passes unchanged and unseen (``lost``).
    """

    def __init__(
        self,
        wanted: Callable[[Header], bool],
        on_flip: Callable[[Flip], None],
        on_payload: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._wanted = wanted
        self._on_flip = on_flip
        self._on_payload = on_payload
        self._head = bytearray()
        self._left = 0
        self._is_data = False
        self._flip_in: int | None = None
        self.lost = False

    def feed(self, data: bytes) -> bytes:
        out = bytearray(data)
        at = 0
        while at < len(out) and not self.lost:
            if self._left:
                n = min(self._left, len(out) - at)
                if self._flip_in is not None and self._flip_in < n:
                    out[at + self._flip_in] ^= 1
                    self._flip_in = None
                elif self._flip_in is not None:
                    self._flip_in -= n
                if self._is_data:
                    self._on_payload(n)
                self._left -= n
                at += n
                continue
            n = min(HEADER_BYTES - len(self._head), len(out) - at)
            self._head += out[at : at + n]
            at += n
            if len(self._head) == HEADER_BYTES:
                self._begin(bytes(self._head))
                self._head.clear()
        return bytes(out)

    def _begin(self, head: bytes) -> None:
        try:
            header = unpack_header(head)
        except KVError:
            self.lost = True
            return
        self._left = header.length
        self._is_data = header.type is FrameType.DATA
        if self._is_data and header.length and self._wanted(header):
            self._flip_in = header.length // 2
            self._on_flip(Flip(header.layer, header.tensor, header.offset, self._flip_in, header.sequence))


class FlippingRelay:
    """Relays connections on a loopback port to ``host:port``; use as an async context manager.

    ``upstream``: damage what the dialling side sends, else what it receives. ``always`` damages every DATA frame, else only
    the first one of all connections. ``flips`` says what was done.
    """

    def __init__(self, host: str, port: int, *, upstream: bool, always: bool) -> None:
        self.flips: list[Flip] = []
        self._target = host, port
        self._upstream = upstream
        self._always = always
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def address(self) -> tuple[str, int]:
        """Where to dial instead of the target."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return str(host), int(port)

    def _wanted(self, header: Header) -> bool:
        return self._always or not self.flips

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        writers = [near_out]
        try:
            far_in, far_out = await asyncio.open_connection(*self._target)
            writers.append(far_out)
            flipper = Flipper(self._wanted, self.flips.append)
            up, down = (flipper.feed, bytes) if self._upstream else (bytes, flipper.feed)
            # Either end closing ends both directions: the far side must see it as it would without a relay.
            pumps = [
                asyncio.ensure_future(_pump(near_in, far_out, up)),
                asyncio.ensure_future(_pump(far_in, near_out, down)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the target is gone: closing says so
        except asyncio.CancelledError:
            for writer in writers:
                writer.transport.abort()  # nobody may be reading what is left
            raise
        finally:
            for writer in writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, change: Callable[[bytes], bytes]) -> None:
    while data := await source.read(READ_BYTES):
        sink.write(change(data))
        await sink.drain()
