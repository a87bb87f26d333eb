"""The twin of the native engine, on the event loop: see :class:`.base.Lanes`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..buffers import PageList
from ..connection import Connection, OutFrame
from ..flow.turns import Turns
from ..wire.frames import Header
from .base import IncomingOwner, OutgoingOwner, Slot
from .incoming import PythonIncoming
from .outgoing import PythonOutgoing

if TYPE_CHECKING:
    from ..connection import AnyConnection

PUMP_ROUNDS = 4
"""Frames per connection before the loop turns to reading."""


class PythonLanes:
    """See :class:`.base.Lanes`; the connections ask it for chunks and places."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.connections: list[Connection] = []
        self._turns: Turns[PythonOutgoing] = Turns()
        self._incoming: dict[bytes, PythonIncoming] = {}
        self._pumping = False

    # -- Lanes ---------------------------------------------------------------------------------

    def join(self, connection: AnyConnection) -> None:
        assert isinstance(connection, Connection)
        connection.chunks = self
        self.connections.append(connection)
        self.schedule()

    def leave(self, connection: AnyConnection) -> None:
        self.connections = [c for c in self.connections if c is not connection]

    def schedule(self) -> None:
        if not self._pumping and self.connections:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def outgoing(
        self, owner: OutgoingOwner, transfer: bytes, slots: Sequence[Slot], *, priority: int, checksum: bool
    ) -> PythonOutgoing:
        return PythonOutgoing(self, owner, transfer, slots, priority=priority, checksum=checksum)

    def incoming(
        self,
        owner: IncomingOwner,
        transfer: bytes,
        granted: Mapping[Slot, tuple[PageList, int]],
        *,
        window: int,
        unchecked: bool,
        eager: bool,
    ) -> PythonIncoming:
        into = PythonIncoming(self, owner, transfer, granted, window=window, unchecked=unchecked)
        self._incoming[transfer] = into
        return into

    # -- what transfers ask --------------------------------------------------------------------

    def has_work(self, outgoing: PythonOutgoing) -> None:
        self._turns.add(outgoing, outgoing.priority)
        self.schedule()

    def forget(self, outgoing: PythonOutgoing) -> None:
        self._turns.discard(outgoing)

    def forget_incoming(self, incoming: PythonIncoming) -> None:
        self._incoming.pop(incoming.transfer, None)

    # -- what connections ask ------------------------------------------------------------------

    def next_data(self, connection: Connection) -> OutFrame | None:
        while not connection.parked and (outgoing := self._turns.next()) is not None:
            frame = outgoing.next_data(connection)
            if frame is not None:
                return frame
            self._turns.discard(outgoing)
        return None

    def place_data(self, connection: Connection, header: Header) -> PageList:
        into = self._incoming.get(header.transfer)
        if into is not None:
            return into.place_data(connection, header)
        connection.owner.stray(connection, header)
        return PageList.scratch(header.length)

    def data_done(self, connection: Connection, header: Header, verified: bool) -> None:
        into = self._incoming.get(header.transfer)
        if into is not None:
            into.data_done(connection, header, verified)

    # -- inside --------------------------------------------------------------------------------

    def _pump(self) -> None:
        self._pumping = False
        ready = [c for c in self.connections if not c.blocked]
        for _ in range(PUMP_ROUNDS):
            # One frame each in turn: a small transfer is striped too, instead of filling the first socket.
            ready = [c for c in ready if c.pump(1)]
            if not ready:
                return
        self.schedule()
