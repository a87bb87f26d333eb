"""What a connection still has to say when its link has let go of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from .buffers import PageList
from .errors import KVError
from .io.base import LAST_WORD_S, ByteStream

Piece = tuple[bytes, PageList | None]
"""A head and, behind it, pages."""


class LastWords:
    """Sends ``pieces``, the first of them from byte ``at`` on, for at most :data:`~kvtransport.io.base.LAST_WORD_S`; then finishes the stream.

    What arrives meanwhile is thrown away: a peer that is itself in the middle of sending must not wait for this side.
    """

    def __init__(self, stream: ByteStream, pieces: Sequence[Piece], at: int) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        """Done when nothing of the connection is left."""
        self._stream = stream
        self._pieces = deque(pieces)
        self._at = at
        self._scratch = bytearray(1 << 16)
        self._timer = loop.call_later(LAST_WORD_S, self._end)
        stream.on_readable(self._discard)
        stream.on_writable(self._writable)

    def _writable(self) -> None:
        try:
            while self._pieces:
                head, pages = self._pieces[0]
                n = self._stream.send(head, pages, self._at)
                if n == 0:
                    return
                self._at += n
                if self._at == len(head) + (0 if pages is None else pages.nbytes):
                    self._pieces.popleft()
                    self._at = 0
        except (KVError, OSError):
            pass  # it is gone, and so is whom it was for
        self._end()

    def _discard(self) -> None:
        try:
            for _ in range(16):  # and then others have their turn
                if not self._stream.recv(None, 0, self._scratch, 0):
                    return
        except (KVError, OSError, EOFError):
            self._end()

    def _end(self) -> None:
        if self.gone.done():
            return
        self._timer.cancel()
        self._stream.on_writable(None)
        self._stream.finish().add_done_callback(self._finished)

    def _finished(self, _: asyncio.Future[None]) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
