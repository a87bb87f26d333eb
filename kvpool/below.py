"""Gets below all others: handed over piece by piece, each when nothing else is being sent, or after a while.

A priority orders the chunks of one link. Between links this does: while any other get is on its way out, one below makes room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from kvtransport.sender import Sender
from kvtransport.transfer import Handover

from .get import Get

PIECE_BYTES = 4 << 20
AHEAD_BYTES = 8 << 20
"""Handed over and not acknowledged at most: what is on its way when another get begins."""
YIELD_S = 0.25
"""A piece waits at most so long: behind gets without end it still goes on, at PIECE_BYTES in that time."""


class Below:
    """Of one server. ``live`` and ``done`` count the gets that go first."""

    def __init__(self) -> None:
        self._live = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.yielded = 0
        """Pieces that waited for others."""

    def live(self) -> None:
        self._live += 1
        self._quiet.clear()

    def done(self) -> None:
        self._live -= 1
        if not self._live:
            self._quiet.set()

    async def _turn(self) -> None:
        if self._live:
            self.yielded += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(YIELD_S):
                    await self._quiet.wait()

    async def hand_over(self, get: Get, sender: Sender) -> None:
        """All of a get that is there, as far as ``sender`` takes it. Raises the sender's error."""
        ahead: deque[tuple[int, Handover]] = deque()
        under_way, since = 0, PIECE_BYTES
        for layer, tensor, start, stop in get.ready_ranges():
            for low in range(start, stop, PIECE_BYTES):
                high = min(low + PIECE_BYTES, stop)
                if since >= PIECE_BYTES:
                    since = 0
                    await self._turn()
                while ahead and under_way + high - low > AHEAD_BYTES:
                    nbytes, handover = ahead.popleft()
                    await handover.released()
                    under_way -= nbytes
                if sender.error is not None:
                    raise sender.error
                ahead.append(
                    (high - low, sender.hand_over(layer, tensor, low, get.sources[layer, tensor].slice(low, high)))
                )
                under_way += high - low
                since += high - low
