"""Ready units: what a producer handed over, until its memory is free again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from .buffers import PageList
from .manifest import Manifest
from .spill import Spilled


class Unit:
    """A ready unit: bytes ``[start, stop)`` of an extent's byte space, and where they lie."""

    __slots__ = (
        "_free",
        "_released",
        "coding",
        "event",
        "layer",
        "left",
        "pages",
        "raw",
        "since",
        "spilled",
        "spilling",
        "staged",
        "start",
        "stop",
        "tensor",
    )

    def __init__(
        self, layer: int, tensor: int, start: int, pages: PageList, since: float, event: Callable[[], bool] | None
    ) -> None:
        self.layer = layer
        self.tensor = tensor
        self.start = start
        self.stop = start + pages.nbytes
        self.pages = pages
        self.since = since
        self.event = event
        self.spilled: Spilled | None = None
        self.spilling: asyncio.Task[None] | None = None
        self.coding: asyncio.Task[None] | None = None
        self.left = 0
        self.raw: list[tuple[int, int]] = []
        self.staged = False
        self._free = False
        self._released: asyncio.Future[None] | None = None

    # -- kvtransport.transfer.Handover ---------------------------------------------------------

    @property
    def done(self) -> bool:
        return self._free

    async def released(self) -> None:
        if self._free:
            return
        if self._released is None:
            self._released = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._released)

    def release(self) -> None:
        self._free = True
        if self._released is not None and not self._released.done():
            self._released.set_result(None)


def bytes_of(manifest: Manifest, units: Iterable[Unit]) -> bytes:
    """A copy of all bytes of a transfer, in its manifest's order; ``units`` cover them."""
    places, total = {}, 0
    for slot, extent in manifest.by_slot.items():
        places[slot] = total
        total += extent.nbytes
    whole = bytearray(total)
    for unit in units:
        at = places[unit.layer, unit.tensor] + unit.start
        PageList.of(memoryview(whole)[at : at + unit.pages.nbytes]).copy_from(unit.pages)
    return bytes(whole)
