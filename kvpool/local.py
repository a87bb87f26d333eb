"""Clients on the pool's own machine read its memory where it is: a read-only mapping, nothing through a socket but where to look.

The pool's memory is one arena, and whoever maps it can read all of it. So it is lent by a pool that serves one tenant only
(``local_tenant``), over a Unix socket that only the daemon's own user may open, as memfds that nobody can map writable.

Nothing is pinned for such a reader. Every page has a generation that changes when it is given back or given out again; it is compared
before and after the bytes are copied, and what changed meanwhile is a miss. Flat objects are held against their checksum as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from kvtransport.buffers import Arena, PageList
from kvtransport.errors import ConfigError, ConnectError, KVError, ProtocolError

from .arena import PageArena, Pages

HELLO = struct.Struct("<8sQQI")
"""Magic, bytes of the memory, bytes of the generations, bytes a page; with two descriptors."""
MAGIC = b"kvlocal1"
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Located:
    """Where bytes lie: ``pieces`` (int64, (n, 2): offset and length in the arena), and the pages they touch with their generations."""

    pieces: NDArray[np.int64]
    pages: Pages
    generations: NDArray[np.int64]

    @classmethod
    def of(cls, arena: PageArena, pages: PageList) -> Located:
        pieces = pages.pieces
        first, last = pieces[:, 0] // arena.page_bytes, (pieces[:, 0] + pieces[:, 1] - 1) // arena.page_bytes
        counts = last - first + 1
        starts = np.cumsum(counts) - counts
        touched = np.repeat(first - starts, counts) + np.arange(int(counts.sum()))
        return cls(pieces, touched.astype(np.int32), arena.page_generation[touched])

    def to_wire(self) -> list[bytes]:
        return [
            self.pieces.astype("<i8").tobytes(),
            self.pages.astype("<i4").tobytes(),
            self.generations.astype("<i8").tobytes(),
        ]

    @classmethod
    def from_wire(cls, body: Any) -> Located:
        """Raises ProtocolError."""
        try:
            pieces, pages, generations = body
            found = cls(
                np.frombuffer(pieces, "<i8").reshape(-1, 2),
                np.frombuffer(pages, "<i4"),
                np.frombuffer(generations, "<i8"),
            )
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"not a place in the pool's memory: {error}") from error
        if len(found.pages) != len(found.generations):
            raise ProtocolError("not a place in the pool's memory: pages and generations differ in number")
        return found


class LocalServer:
    """Hands the memory out at a Unix socket. Raises ConfigError where that cannot be."""

    def __init__(self, path: Path, memory: Arena, pages: PageArena) -> None:
        generations = pages.generation_arena
        if generations is None or memory.fd < 0 or generations.fd < 0:
            raise ConfigError(
                "local_socket needs memory that can be shared (memfd): this system or this arena has none"
            )
        self._path = path
        self._fds = [memory.fd, generations.fd]
        self._hello = HELLO.pack(MAGIC, memoryview(memory).nbytes, memoryview(generations).nbytes, pages.page_bytes)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Raises ConfigError."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                if self._path.is_socket():
                    self._path.unlink()  # of a daemon that did not come to remove it
            before = os.umask(0o177)
            try:
                made.bind(str(self._path))
            finally:
                os.umask(before)
            made.listen(64)
        except OSError as error:
            made.close()
            raise ConfigError(f"local_socket = {self._path}: {error.strerror or error}") from error
        self._socket = made
        self._task = asyncio.get_running_loop().create_task(self._serve(made))

    async def _serve(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError:
                await asyncio.sleep(0.1)  # out of descriptors
                continue
            with client, contextlib.suppress(OSError):
                client.setblocking(False)
                socket.send_fds(client, [self._hello], self._fds)  # fits any socket buffer: never waits

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._socket is not None:
            self._socket.close()
            self._path.unlink(missing_ok=True)


class LocalMemory:
    """The pool's memory as a client on the same machine sees it. Raises ConnectError or ArenaError when it is not to be had."""

    def __init__(self, path: str | Path) -> None:
        fds: list[int] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
                asking.settimeout(CONNECT_S)
                asking.connect(str(path))
                data, fds, _, _ = socket.recv_fds(asking, HELLO.size, 2, socket.MSG_WAITALL)
            if len(data) != HELLO.size or len(fds) != 2:
                raise ConnectError(f"{path} does not hand out a pool's memory")
            magic, nbytes, generation_bytes, self.page_bytes = HELLO.unpack(data)
            if magic != MAGIC:
                raise ConnectError(f"{path} does not hand out a pool's memory")
            self._memory = Arena.attach(fds[0], nbytes)
            self._generations = Arena.attach(fds[1], generation_bytes)
        except OSError as error:
            raise ConnectError(f"cannot map the memory of the pool at {path}: {error.strerror or error}") from error
        finally:
            for fd in fds:
                os.close(fd)
        self._view = memoryview(self._memory)
        self._current = np.frombuffer(memoryview(self._generations), np.int64)

    def read(self, place: Located, into: PageList) -> bool:
        """Copy what lies at ``place``; False when it is not there any more: what was copied is then nothing.

        Raises ProtocolError for a place outside the memory, KVBufferError for an ``into`` of another size.
        """
        return bool(self.read_pages(place, into).all())

    def read_pages(self, place: Located, into: PageList) -> NDArray[np.bool_]:
        """:meth:`read`; for every page whether it was still the same afterwards."""
        pages = place.pages
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < len(self._current):
            raise ProtocolError("the pool names pages that are not in its memory")
        before: NDArray[np.bool_] = self._current[pages] == place.generations
        try:
            source = PageList(self._view, place.pieces)
        except KVError as error:
            raise ProtocolError(f"the pool names bytes that are not in its memory: {error.message}") from error
        into.copy_from(source)
        after: NDArray[np.bool_] = self._current[pages] == place.generations
        return before & after

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._view, self._current = memoryview(b""), np.empty(0, np.int64)
        self._memory.close()
        self._generations.close()


def pack_places(places: Sequence[Located]) -> bytes:
    """Many places as one value."""
    packed: bytes = msgpack.packb([place.to_wire() for place in places])
    return packed


def unpack_places(data: bytes) -> list[Located]:
    """Inverse of :func:`pack_places`; raises ProtocolError."""
    try:
        bodies = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not places in the pool's memory: {error}") from error
    if not isinstance(bodies, list):
        raise ProtocolError("not places in the pool's memory")
    return [Located.from_wire(body) for body in bodies]
