"""The state machines: which frame is legal when, and what it leads to.

Two tables say everything: :data:`CONNECTION_TABLE` for one TCP connection, :data:`TRANSFER_TABLE` for one
transfer, which lives on all connections of its link and outlives any of them. An event that is not in the table
for the current state raises :class:`~kvtransport.errors.ProtocolError` naming what was expected; its fault is
*remote* for something received, *local* for something this side was about to send.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from kvtransport.errors import Fault, HandshakeError, ProtocolError, VersionError
from kvtransport.wire.bodies import Hello, require_incarnation
from kvtransport.wire.frames import (
    DEFAULT_LIMITS,
    NO_TRANSFER,
    VERSION,
    Flag,
    FrameType,
    Header,
    Limits,
    encode_control,
)
from kvtransport.wire.reader import FrameReader

__all__ = [
    "CONNECTION_TABLE",
    "TERMINAL",
    "TRANSFER_TABLE",
    "ConnectionEvent",
    "ConnectionMachine",
    "ConnectionState",
    "FrameReader",
    "Role",
    "TransferEvent",
    "TransferMachine",
    "TransferRole",
    "TransferState",
]

# --------------------------------------------------------------------------------------- one connection


class Role(StrEnum):
    DIAL = "dial"
    ACCEPT = "accept"


class ConnectionState(StrEnum):
    IDLE = "IDLE"
    """Nothing was sent or received."""
    HELLO_SENT = "HELLO_SENT"
    """Dialer: waits for the acceptor's HELLO."""
    HELLO_WAIT = "HELLO_WAIT"
    """Acceptor: waits for the dialer's HELLO."""
    HELLO_DUE = "HELLO_DUE"
    """Acceptor: the dialer's HELLO is good, ours has to follow."""
    READY = "READY"
    CLOSING = "CLOSING"
    """This side is done: nothing more is sent, what still arrives is ignored."""
    CLOSED = "CLOSED"


class ConnectionEvent(StrEnum):
    START = "START"
    """Acceptor: the connection is there."""
    SEND_HELLO = "SEND_HELLO"
    RECV_HELLO = "RECV_HELLO"
    SEND_FRAME = "SEND_FRAME"
    """Any frame but HELLO and a connection-wide ERROR."""
    RECV_FRAME = "RECV_FRAME"
    SEND_ERROR = "SEND_ERROR"
    """A connection-wide ERROR: transfer id zeros."""
    RECV_ERROR = "RECV_ERROR"
    CLOSE = "CLOSE"
    """This side wants to close."""
    EOF = "EOF"
    """The stream ended, in either direction, for whatever reason."""


_C = ConnectionState
_CE = ConnectionEvent

_HANDSHAKE: Final[dict[Role, dict[tuple[ConnectionState, ConnectionEvent], ConnectionState]]] = {
    Role.DIAL: {
        (_C.IDLE, _CE.SEND_HELLO): _C.HELLO_SENT,
        (_C.HELLO_SENT, _CE.RECV_HELLO): _C.READY,
    },
    Role.ACCEPT: {
        (_C.IDLE, _CE.START): _C.HELLO_WAIT,
        (_C.HELLO_WAIT, _CE.RECV_HELLO): _C.HELLO_DUE,
        (_C.HELLO_DUE, _CE.SEND_HELLO): _C.READY,
    },
}
_ALWAYS: Final[dict[tuple[ConnectionState, ConnectionEvent], ConnectionState]] = {
    (_C.IDLE, _CE.CLOSE): _C.CLOSED,
    (_C.IDLE, _CE.EOF): _C.CLOSED,
    (_C.READY, _CE.SEND_FRAME): _C.READY,
    (_C.READY, _CE.RECV_FRAME): _C.READY,
    (_C.CLOSING, _CE.RECV_HELLO): _C.CLOSING,
    (_C.CLOSING, _CE.RECV_FRAME): _C.CLOSING,
    (_C.CLOSING, _CE.RECV_ERROR): _C.CLOSING,
    (_C.CLOSING, _CE.CLOSE): _C.CLOSING,
    (_C.CLOSING, _CE.EOF): _C.CLOSED,
    (_C.CLOSED, _CE.CLOSE): _C.CLOSED,
    (_C.CLOSED, _CE.EOF): _C.CLOSED,
}
_END: Final[dict[ConnectionEvent, ConnectionState]] = {
    _CE.SEND_ERROR: _C.CLOSING,
    _CE.RECV_ERROR: _C.CLOSING,
    _CE.CLOSE: _C.CLOSING,
    _CE.EOF: _C.CLOSED,
}


def _connection_table() -> dict[tuple[Role, ConnectionState, ConnectionEvent], ConnectionState]:
    table: dict[tuple[Role, ConnectionState, ConnectionEvent], ConnectionState] = {}
    for role, handshake in _HANDSHAKE.items():
        rows = handshake | _ALWAYS
        for state in set(handshake.values()):  # the open states this role passes through
            rows |= {(state, event): to for event, to in _END.items()}
        table |= {(role, state, event): to for (state, event), to in rows.items()}
    # An acceptor that is full refuses at once: its ERROR may be here before the dialer has said a word.
    table[Role.DIAL, _C.IDLE, _CE.RECV_ERROR] = _C.CLOSING
    return table


CONNECTION_TABLE: Final = _connection_table()


class ConnectionMachine:
    """Which frames may cross one connection, and the handshake at its start.

    No I/O: the owner sends what :meth:`hello_to_send` returns, passes each header to :meth:`receive` and the
    peer's HELLO to :meth:`receive_hello`, and tells :meth:`sent` what it sends.

    ``incarnation``: this process (16 bytes). ``peer_incarnation``: the peer as an earlier connection of the
    link met it, None on the first. ``versions``: protocol versions this side speaks.
    """

    def __init__(
        self,
        role: Role,
        *,
        incarnation: bytes,
        peer_incarnation: bytes | None = None,
        versions: tuple[int, ...] = (VERSION,),
    ) -> None:
        self.role = role
        self.state = ConnectionState.IDLE
        self.incarnation = incarnation
        self.peer_incarnation = peer_incarnation
        self.versions = versions
        self.version: int | None = None
        """The protocol version agreed on, once the peer's HELLO was taken."""
        self.peer: Hello | None = None
        """The peer's HELLO."""
        self._link: bytes | None = None
        if role is Role.ACCEPT:
            self.fire(ConnectionEvent.START)

    def fire(self, event: ConnectionEvent) -> ConnectionState:
        """Follow the table. Raises :class:`ProtocolError` for an event that the state does not know."""
        to = CONNECTION_TABLE.get((self.role, self.state, event))
        if to is None:
            raise ProtocolError(
                f"{event} in {self.state} ({self.role} side); expected {self._expected()}", fault=_event_fault(event)
            )
        self.state = to
        return to

    def hello_to_send(
        self, *, link: bytes, index: int = 0, count: int = 1, limits: Limits = DEFAULT_LIMITS, **fields: Any
    ) -> bytes:
        """This side's HELLO frame; ``fields`` are the other fields of :class:`~kvtransport.wire.bodies.Hello`."""
        if (self.role, self.state, ConnectionEvent.SEND_HELLO) not in CONNECTION_TABLE:
            self.fire(ConnectionEvent.SEND_HELLO)  # raises
        if self.peer is not None and link != self.peer.link:
            raise HandshakeError(
                f"expected to answer link {self.peer.link.hex()}, got link {link.hex()}", fault=Fault.LOCAL
            )
        hello = Hello(
            versions=self.versions,
            incarnation=self.incarnation,
            link=link,
            index=index,
            count=count,
            role=self.role.value,
            peer_incarnation=self.peer_incarnation,
            **fields,
        )
        frame = encode_control(FrameType.HELLO, hello, limits=limits)
        self._link = link
        self.fire(ConnectionEvent.SEND_HELLO)
        return frame

    def receive(self, header: Header) -> None:
        """Whether this frame may arrive now; raises :class:`ProtocolError` saying what was expected.

        A HELLO does not move the state yet: its body has to be believed first (:meth:`receive_hello`).
        """
        event = _connection_event(header, "RECV")
        if (self.role, self.state, event) not in CONNECTION_TABLE:
            raise ProtocolError(f"got {header.type.name} in {self.state}; expected {self._expected()}")
        if event is not ConnectionEvent.RECV_HELLO:
            self.fire(event)

    def receive_hello(self, hello: Hello) -> None:
        """Take the peer's HELLO: agree on a version, check role, link and incarnations.

        Raises :class:`VersionError`, :class:`HandshakeError` or :class:`IncarnationError`; the state then
        stays, and the owner sends an ERROR and closes.
        """
        if (self.role, self.state, ConnectionEvent.RECV_HELLO) not in CONNECTION_TABLE:
            self.fire(ConnectionEvent.RECV_HELLO)  # raises
        if self.state is ConnectionState.CLOSING:
            return
        if hello.role == self.role.value:
            raise HandshakeError(
                f"both sides say they {self.role}: expected the peer to {_other(self.role)}; is this a loop to itself?"
            )
        common = set(self.versions) & set(hello.versions)
        if not common:
            raise VersionError(
                f"expected a protocol version among {sorted(self.versions)}, the peer speaks {sorted(hello.versions)}: "
                "upgrade the older side"
            )
        if self._link is not None and hello.link != self._link:
            raise HandshakeError(f"expected the answer to link {self._link.hex()}, got link {hello.link.hex()}")
        require_incarnation(hello, self.incarnation, self.peer_incarnation)
        self.fire(ConnectionEvent.RECV_HELLO)
        self.peer = hello
        self.peer_incarnation = hello.incarnation
        self.version = max(common)

    def sent(self, type: FrameType, transfer: bytes = NO_TRANSFER) -> None:
        """Tell that a frame is about to be sent; raises :class:`ProtocolError` (fault local) when it may not be."""
        if type is FrameType.HELLO:
            event = ConnectionEvent.SEND_HELLO
        elif type is FrameType.ERROR and transfer == NO_TRANSFER:
            event = ConnectionEvent.SEND_ERROR
        else:
            event = ConnectionEvent.SEND_FRAME
        if (self.role, self.state, event) not in CONNECTION_TABLE:
            raise ProtocolError(f"cannot send {type.name} in {self.state} ({self.role} side)", fault=Fault.LOCAL)
        self.fire(event)

    @property
    def ready(self) -> bool:
        """Whether frames other than HELLO may cross."""
        return self.state is ConnectionState.READY

    def _expected(self) -> str:
        return _EXPECTED.get(self.state, "nothing more")


_EXPECTED: Final[dict[ConnectionState, str]] = {
    ConnectionState.IDLE: "nothing before this side's HELLO",
    ConnectionState.HELLO_SENT: "HELLO",
    ConnectionState.HELLO_WAIT: "HELLO",
    ConnectionState.HELLO_DUE: "nothing before this side's HELLO",
    ConnectionState.READY: "any frame but HELLO",
}


def _other(role: Role) -> Role:
    return Role.ACCEPT if role is Role.DIAL else Role.DIAL


def _connection_event(header: Header, way: str) -> ConnectionEvent:
    if header.type is FrameType.HELLO:
        return ConnectionEvent(f"{way}_HELLO")
    if header.type is FrameType.ERROR and header.transfer == NO_TRANSFER:
        return ConnectionEvent(f"{way}_ERROR")
    return ConnectionEvent(f"{way}_FRAME")


def _event_fault(event: StrEnum) -> Fault:
    return Fault.REMOTE if event.startswith("RECV") else Fault.LOCAL


# ----------------------------------------------------------------------------------------- one transfer


class TransferRole(StrEnum):
    SENDER = "sender"
    RECEIVER = "receiver"


class TransferState(StrEnum):
    IDLE = "IDLE"
    """Known by its id; no OPEN yet."""
    OPENING = "OPENING"
    """Sender: OPEN is sent, ACCEPT is awaited."""
    AWAITING = "AWAITING"
    """Receiver: OPEN is here and waits, without credit, for destinations."""
    FLOWING = "FLOWING"
    SEALING = "SEALING"
    """SEAL is sent or here; ranges may still be missing."""
    SEALED = "SEALED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


class TransferEvent(StrEnum):
    SEND_OPEN = "SEND_OPEN"
    RECV_OPEN = "RECV_OPEN"
    SEND_ACCEPT = "SEND_ACCEPT"
    RECV_ACCEPT = "RECV_ACCEPT"
    SEND_DATA = "SEND_DATA"
    RECV_DATA = "RECV_DATA"
    SEND_ACK = "SEND_ACK"
    RECV_ACK = "RECV_ACK"
    SEND_CREDIT = "SEND_CREDIT"
    RECV_CREDIT = "RECV_CREDIT"
    SEND_SEAL = "SEND_SEAL"
    RECV_SEAL = "RECV_SEAL"
    SEND_ACK_FINAL = "SEND_ACK_FINAL"
    RECV_ACK_FINAL = "RECV_ACK_FINAL"
    SEND_CANCEL = "SEND_CANCEL"
    RECV_CANCEL = "RECV_CANCEL"
    SEND_RESUME = "SEND_RESUME"
    RECV_RESUME = "RECV_RESUME"
    SEND_ERROR = "SEND_ERROR"
    RECV_ERROR = "RECV_ERROR"

    @classmethod
    def received(cls, header: Header) -> TransferEvent:
        """The event of a frame that arrived. Raises :class:`ProtocolError` for a frame of no transfer."""
        return cls._of("RECV", header.type, header.flags)

    @classmethod
    def sending(cls, type: FrameType, flags: int = 0) -> TransferEvent:
        """The event of a frame about to be sent."""
        return cls._of("SEND", type, flags)

    @classmethod
    def _of(cls, way: str, type: FrameType, flags: int) -> TransferEvent:
        name = f"{way}_{type.name}"
        if type is FrameType.ACK and flags & Flag.FINAL:
            name += "_FINAL"
        event = cls.__members__.get(name)
        if event is None:
            raise ProtocolError(
                f"{type.name} is no frame of a transfer", fault=Fault.REMOTE if way == "RECV" else Fault.LOCAL
            )
        return event


_T = TransferState
_TE = TransferEvent
TERMINAL: Final = frozenset({_T.SEALED, _T.CANCELLED, _T.FAILED})

# Both tables read: in this state, these events are legal and lead there. Frames of one transfer travel on
# several connections and may overtake each other, and control frames are repeated after a lost connection:
# hence the repeated OPEN, ACCEPT and SEAL, and credit ahead of ACCEPT.
_SENDER: Final[dict[TransferState, dict[TransferEvent, TransferState]]] = {
    _T.IDLE: {_TE.SEND_OPEN: _T.OPENING},
    _T.OPENING: {
        _TE.SEND_OPEN: _T.OPENING,
        _TE.RECV_ACCEPT: _T.FLOWING,
        _TE.RECV_CREDIT: _T.OPENING,
        _TE.RECV_RESUME: _T.OPENING,
    },
    _T.FLOWING: {
        _TE.RECV_ACCEPT: _T.FLOWING,
        _TE.RECV_CREDIT: _T.FLOWING,
        _TE.RECV_RESUME: _T.FLOWING,
        _TE.RECV_ACK: _T.FLOWING,
        _TE.SEND_DATA: _T.FLOWING,
        _TE.SEND_SEAL: _T.SEALING,
    },
    _T.SEALING: {
        _TE.RECV_ACCEPT: _T.SEALING,
        _TE.RECV_CREDIT: _T.SEALING,
        _TE.RECV_RESUME: _T.SEALING,
        _TE.RECV_ACK: _T.SEALING,
        _TE.SEND_DATA: _T.SEALING,
        _TE.SEND_SEAL: _T.SEALING,
        _TE.RECV_ACK_FINAL: _T.SEALED,
    },
}
_RECEIVER: Final[dict[TransferState, dict[TransferEvent, TransferState]]] = {
    _T.IDLE: {_TE.RECV_OPEN: _T.AWAITING},
    _T.AWAITING: {_TE.RECV_OPEN: _T.AWAITING, _TE.SEND_ACCEPT: _T.FLOWING},
    _T.FLOWING: {
        _TE.RECV_OPEN: _T.FLOWING,
        _TE.SEND_ACCEPT: _T.FLOWING,
        _TE.SEND_CREDIT: _T.FLOWING,
        _TE.SEND_RESUME: _T.FLOWING,
        _TE.SEND_ACK: _T.FLOWING,
        _TE.RECV_DATA: _T.FLOWING,
        _TE.RECV_SEAL: _T.SEALING,
    },
    _T.SEALING: {
        _TE.RECV_OPEN: _T.SEALING,
        _TE.SEND_ACCEPT: _T.SEALING,
        _TE.SEND_CREDIT: _T.SEALING,
        _TE.SEND_RESUME: _T.SEALING,
        _TE.SEND_ACK: _T.SEALING,
        _TE.RECV_DATA: _T.SEALING,
        _TE.RECV_SEAL: _T.SEALING,
        _TE.SEND_ACK_FINAL: _T.SEALED,
    },
}
_GIVE_UP: Final = {
    _TE.SEND_CANCEL: _T.CANCELLED,
    _TE.RECV_CANCEL: _T.CANCELLED,
    _TE.SEND_ERROR: _T.FAILED,
    _TE.RECV_ERROR: _T.FAILED,
}
# What the other side may still have on its way when a transfer ends here: legal, and without effect.
_LATE: Final[dict[TransferRole, tuple[TransferEvent, ...]]] = {
    TransferRole.SENDER: (_TE.RECV_ACCEPT, _TE.RECV_CREDIT, _TE.RECV_RESUME, _TE.RECV_ACK, _TE.RECV_ACK_FINAL),
    TransferRole.RECEIVER: (_TE.RECV_OPEN, _TE.RECV_DATA, _TE.RECV_SEAL),
}


def _transfer_table() -> dict[tuple[TransferRole, TransferState, TransferEvent], TransferState]:
    table: dict[tuple[TransferRole, TransferState, TransferEvent], TransferState] = {}
    for role, rows in ((TransferRole.SENDER, _SENDER), (TransferRole.RECEIVER, _RECEIVER)):
        for state, row in rows.items():
            table |= {(role, state, event): to for event, to in (row | _GIVE_UP).items()}
        for state in TERMINAL:
            late = (*_LATE[role], _TE.RECV_CANCEL, _TE.RECV_ERROR)
            table |= {(role, state, event): state for event in late}
        # Said again when the peer did not hear it the first time.
        table[role, _T.CANCELLED, _TE.SEND_CANCEL] = _T.CANCELLED
        table[role, _T.FAILED, _TE.SEND_ERROR] = _T.FAILED
    table[TransferRole.RECEIVER, _T.SEALED, _TE.SEND_ACK_FINAL] = _T.SEALED
    return table


TRANSFER_TABLE: Final = _transfer_table()


class TransferMachine:
    """The states of one transfer on one side; see :data:`TRANSFER_TABLE`."""

    __slots__ = ("role", "state")

    def __init__(self, role: TransferRole) -> None:
        self.role = role
        self.state = TransferState.IDLE

    def fire(self, event: TransferEvent) -> TransferState:
        """Follow the table and return the new state.

        Raises :class:`ProtocolError` naming the state and the events it knows; the state then stays.
        """
        to = TRANSFER_TABLE.get((self.role, self.state, event))
        if to is None:
            known = ", ".join(e for e in TransferEvent if self.allows(e))
            raise ProtocolError(
                f"{event} in {self.state} ({self.role} side of a transfer); expected one of {known}",
                fault=_event_fault(event),
            )
        self.state = to
        return to

    def allows(self, event: TransferEvent) -> bool:
        """Whether ``event`` is legal now."""
        return (self.role, self.state, event) in TRANSFER_TABLE

    @property
    def terminal(self) -> bool:
        """Whether nothing more will happen: sealed, cancelled or failed."""
        return self.state in TERMINAL
