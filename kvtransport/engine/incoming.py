"""The twin of ``native/receiving.c``: granted memory, claims, what is applied.

A chunk's destination is *claimed* by the connection whose header came first; any other copy drains into
scratch. A copy of a later attempt voids the claim before it may write. Closing voids all claims, and since a
receive never leaves the event loop half done, nothing writes to granted memory once that returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..buffers import PageList, copy_pages
from ..connection import Connection
from ..errors import LimitError
from ..flow.credit import ReceiverCredit
from ..wire.frames import Flag, Header
from ..wire.ranges import RangeSet
from .base import NOBODY, IncomingOwner, IncomingStats, Odd, Placed, Slot

if TYPE_CHECKING:
    from ..connection import AnyConnection
    from .python import PythonLanes


@dataclass(slots=True)
class _Claim:
    layer: int
    tensor: int
    start: int
    stop: int
    attempt: int


class PythonIncoming:
    """See :class:`.base.Incoming`."""

    def __init__(
        self,
        lanes: PythonLanes,
        owner: IncomingOwner,
        transfer: bytes,
        granted: Mapping[Slot, tuple[PageList, int]],
        *,
        window: int,
        unchecked: bool,
    ) -> None:
        self._lanes = lanes
        self._owner: IncomingOwner = owner
        self._loop = asyncio.get_running_loop()
        self.transfer = transfer
        self._granted = dict(granted)
        self._unchecked = unchecked
        self._ranges = {slot: RangeSet() for slot in granted}
        self._first: dict[Slot, float] = {}
        self._claims: dict[Connection, _Claim] = {}
        self._credit = ReceiverCredit(sum(nbytes for _, nbytes in granted.values()), window)
        self._chunks = self._verified = self._duplicates = self._applied = 0
        self._closed = False

    # -- what the receiver asks ----------------------------------------------------------------

    def applied(self) -> list[tuple[int, int, int, int]]:
        return [(*slot, *applied) for slot, ranges in self._ranges.items() for applied in ranges]

    def contains(self, layer: int, tensor: int, start: int, stop: int) -> bool:
        return self._ranges[layer, tensor].contains(start, stop)

    def connection_lost(self, connection: AnyConnection) -> None:
        self._claims.pop(connection, None)  # type: ignore[call-overload]  # a Connection, over a ByteStream

    def stats(self) -> IncomingStats:
        return IncomingStats(self._chunks, self._verified, self._duplicates, self._applied, self._credit.granted)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for connection in list(self._claims):
            connection.void_incoming()
        self._claims.clear()
        self._granted.clear()
        self._lanes.forget_incoming(self)
        self._owner = NOBODY

    # -- what the connections ask --------------------------------------------------------------

    def place_data(self, connection: Connection, header: Header) -> PageList:
        """Claim the destination of a chunk for ``connection``, or scratch."""
        slot = (header.layer, header.tensor)
        start, stop = header.offset, header.offset + header.length
        pages, nbytes = self._granted.get(slot, (None, 0))
        missing = None if pages is None else self._ranges[slot].missing(start, stop)
        odd = None
        if pages is None:
            odd = Odd.SLOT
        elif stop > nbytes:
            odd = Odd.BOUNDS
        elif header.flags & Flag.NO_CHECKSUM and not self._unchecked:
            odd = Odd.UNCHECKED
        elif missing and missing != [(start, stop)]:
            odd = Odd.OVERLAP  # writing it would put unverified bytes over verified ones
        if odd is not None or pages is None:
            self._owner.on_odd(odd or Odd.SLOT, header)
            return PageList.scratch(header.length)
        self._first.setdefault(slot, self._loop.time())
        if not missing or not self._win(slot, start, stop, header.sequence):
            self._duplicates += header.length
            return PageList.scratch(header.length)
        # Claims are disjoint, and so are they and what is applied: all of it cost the sender credit.
        on_its_way = self._applied + sum(claim.stop - claim.start for claim in self._claims.values())
        if on_its_way + header.length > self._credit.granted:
            self._owner.on_odd(Odd.CREDIT, header)
            return PageList.scratch(header.length)
        self._claims[connection] = _Claim(*slot, start, stop, header.sequence)
        return pages.slice(start, stop)

    def place(self, header: Header, raw: bytearray) -> Placed | Odd:
        slot, start, stop = (header.layer, header.tensor), header.offset, header.offset + len(raw)
        if self._closed:
            return Placed.LOST
        pages, nbytes = self._granted.get(slot, (None, 0))
        if pages is None:
            return Odd.SLOT
        if stop > nbytes:
            return Odd.BOUNDS
        missing = self._ranges[slot].missing(start, stop)
        if missing and missing != [(start, stop)]:
            return Odd.OVERLAP
        if not missing or not self._win(slot, start, stop, header.sequence):
            self._duplicates += len(raw)
            if missing:
                return Placed.LOST
            self._owner.acknowledge([(*slot, start, stop)])
            return Placed.THERE
        self._first.setdefault(slot, self._loop.time())
        into = pages.slice(start, stop)
        copy_pages(into.base, into.pieces, raw, None)
        try:
            self._apply(slot, start, stop, checked=True)
        except LimitError:
            return Odd.RANGES
        return Placed.DONE

    def _win(self, slot: Slot, start: int, stop: int, attempt: int) -> bool:
        """Whether a new copy may have the destination; voids the claims of earlier attempts if so."""
        rivals = [
            (connection, claim)
            for connection, claim in self._claims.items()
            if (claim.layer, claim.tensor) == slot and claim.start < stop and start < claim.stop
        ]
        if any(claim.attempt >= attempt for _, claim in rivals):
            return False
        for connection, _ in rivals:
            del self._claims[connection]
            connection.void_incoming()
        return True

    def data_done(self, connection: Connection, header: Header, verified: bool) -> None:
        if header.flags & Flag.CODED:  # it did not verify
            if not self._closed:
                self._owner.on_corrupt(header)
            return
        claim = self._claims.pop(connection, None)
        if self._closed:
            return
        slot, start, stop = (header.layer, header.tensor), header.offset, header.offset + header.length
        if claim is None:
            # A copy of what is there already (or is being received elsewhere): say again what is applied.
            if verified and slot in self._ranges and self._ranges[slot].contains(start, stop):
                self._owner.acknowledge([(*slot, start, stop)])
            return
        if not verified:
            self._owner.on_corrupt(header)
            return
        try:
            self._apply(slot, start, stop, checked=not header.flags & Flag.NO_CHECKSUM)
        except LimitError:
            self._owner.on_odd(Odd.RANGES, header)

    def _apply(self, slot: Slot, start: int, stop: int, *, checked: bool) -> None:
        """Verified bytes are in their place. Raises LimitError for too many separate ranges."""
        new = self._ranges[slot].add(start, stop)
        self._chunks += 1
        self._applied += new
        self._verified += checked
        self._owner.acknowledge([(*slot, start, stop)])
        limit = self._credit.applied(new)
        if limit is not None:
            self._owner.give_credit(limit)
        self._owner.on_applied([(*slot, start, stop, self._first[slot])])
