"""Frames: a fixed 64-byte little-endian header, then the payload it announces.

The header carries its own check, so that its destination can be believed before a byte of payload is
stored; the payload's checksum is seeded with that check, so that right bytes under a wrong header do not verify.
The layout, field by field, is in ``docs/wire-format.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple

import xxhash

from kvtransport.errors import Fault, HeaderError, IntegrityError, LimitError, ProtocolError, VersionError
from kvtransport.wire import bodies
from kvtransport.wire.bodies import MAX_OFFSET, Body

MAGIC: Final = b"KVT1"
VERSION: Final = 1
HEADER_BYTES: Final = 64
NO_TRANSFER: Final = bytes(16)
"""The transfer id of a frame that belongs to no transfer."""

_CHECKED: Final = struct.Struct("<4sBBH16sHHIQQ")  # bytes 0..47: what the header check covers
_TAIL: Final = struct.Struct("<QQ")  # payload checksum, header check
_HEADER: Final = struct.Struct("<4sBBH16sHHIQQQQ")
_U64: Final = struct.Struct("<Q")
_CHECK_AT: Final = 56
_COVERED: Final = 48
_xxh3 = xxhash.xxh3_64_intdigest


class FrameType(IntEnum):
    HELLO = 1
    OPEN = 2
    ACCEPT = 3
    DATA = 4
    ACK = 5
    CREDIT = 6
    SEAL = 7
    CANCEL = 8
    RESUME = 9
    ERROR = 10
    PING = 11
    CALL = 12
    REPLY = 13


class Flag:
    """Bits of the header's flags, as plain integers (an ``IntFlag`` costs half a microsecond per test)."""

    NO_CHECKSUM: Final = 1 << 0
    """DATA: the payload carries no checksum; the checksum field is 0."""
    FINAL: Final = 1 << 1
    """ACK: the seal is acknowledged; the body has no ranges."""
    RESEND: Final = 1 << 2
    """DATA: these bytes were sent before (telemetry; the receiver decides by range and sequence)."""
    URGENT: Final = 1 << 3
    """Reserved: not set by this version, ignored on receipt."""
    REPLY: Final = 1 << 4
    """PING: the answer to a PING, with its echo token."""
    CODED: Final = 1 << 5
    """DATA: the payload is coded (:mod:`kvtransport.compression`); only to a peer that named the codec's feature."""


_FLAGS: Final[dict[FrameType, int]] = dict.fromkeys(FrameType, Flag.URGENT) | {
    FrameType.DATA: Flag.URGENT | Flag.NO_CHECKSUM | Flag.RESEND | Flag.CODED,
    FrameType.ACK: Flag.URGENT | Flag.FINAL,
    FrameType.PING: Flag.URGENT | Flag.REPLY,
}

_NEEDS_TRANSFER: Final = frozenset(
    {
        FrameType.OPEN,
        FrameType.ACCEPT,
        FrameType.DATA,
        FrameType.ACK,
        FrameType.CREDIT,
        FrameType.SEAL,
        FrameType.CANCEL,
        FrameType.RESUME,
    }
)
# Whether an all-zero transfer id is wrong (True), any other is wrong (False), or both are allowed (None).
_REFUSE_ZEROS: Final[dict[FrameType, bool | None]] = (
    dict.fromkeys(FrameType) | dict.fromkeys(_NEEDS_TRANSFER, True) | {FrameType.HELLO: False, FrameType.PING: False}
)

# Plain names for the hot path: an attribute of an enum class costs more than the comparison it feeds.
_TYPES: Final[dict[int, FrameType]] = {int(t): t for t in FrameType}
_DATA: Final = FrameType.DATA
_CREDIT: Final = FrameType.CREDIT
_NO_CHECKSUM: Final = Flag.NO_CHECKSUM
_CODED: Final = Flag.CODED

_BODIES: Final[dict[FrameType, Any]] = {
    FrameType.HELLO: bodies.Hello,
    FrameType.OPEN: bodies.Open,
    FrameType.ACCEPT: bodies.Accept,
    FrameType.ACK: bodies.Ack,
    FrameType.SEAL: bodies.Seal,
    FrameType.CANCEL: bodies.Cancel,
    FrameType.RESUME: bodies.Resume,
    FrameType.ERROR: bodies.Error,
    FrameType.CALL: bodies.Call,
    FrameType.REPLY: bodies.Reply,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest payload per frame type, in bytes. Checked at the header, before anything is allocated."""

    hello: int = 4 << 10
    open: int = 1 << 20
    accept: int = 4 << 10
    data: int = 16 << 20
    ack: int = 256 << 10
    seal: int = 4 << 10
    cancel: int = 8 << 10
    resume: int = 256 << 10
    error: int = 8 << 10
    call: int = 4 << 20
    reply: int = 4 << 20
    by_type: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Indexed by frame type; CREDIT and PING have no payload."""

    def __post_init__(self) -> None:
        table = tuple(getattr(self, t.name.lower(), 0) for t in FrameType)
        for kind, limit in zip(FrameType, table, strict=True):
            if not 0 <= limit < 2**32:
                raise LimitError(f"limit of {kind.name} must be 0..2^32-1 bytes, got {limit}", fault=Fault.LOCAL)
        object.__setattr__(self, "by_type", (0, *table))

    def largest(self) -> int:
        """The largest payload of any type, in bytes."""
        return max(self.by_type)


DEFAULT_LIMITS: Final = Limits()
_SMALL: Final = 8 << 10
STRANGER_LIMITS: Final = Limits(open=_SMALL, data=_SMALL, ack=_SMALL, resume=_SMALL, call=_SMALL, reply=_SMALL)
"""Of a peer that dialled in and has not been let in yet: enough to tell it what is wrong, too little to fill memory."""


class Header(NamedTuple):
    """A verified header. Integers are unsigned; ``transfer`` is 16 bytes, zeros when there is none."""

    type: FrameType
    flags: int
    transfer: bytes
    layer: int
    tensor: int
    length: int
    """Payload bytes that follow."""
    offset: int
    """DATA: byte offset in the extent; CREDIT: absolute credit; CALL, REPLY: request id; PING: echo token."""
    sequence: int
    """DATA: attempt number of the chunk; otherwise 0."""
    checksum: int
    """xxh3_64 of the payload, seeded with ``check``; 0 with NO_CHECKSUM."""
    check: int
    """xxh3_64 of header bytes 0..47: the seed of the payload's checksum."""


class Frame(NamedTuple):
    """A frame as :class:`~kvtransport.wire.reader.FrameReader` gives it.

    ``error`` is None for verified payloads. A DATA frame whose payload does not verify has an empty payload
    and the error: it is void, but the stream behind it is in step, so the connection may go on.
    """

    header: Header
    payload: bytes
    error: IntegrityError | None = None


def pack_header(
    type: FrameType | int,
    *,
    transfer: bytes = NO_TRANSFER,
    flags: int = 0,
    layer: int = 0,
    tensor: int = 0,
    length: int = 0,
    offset: int = 0,
    sequence: int = 0,
    checksum: int = 0,
) -> bytes:
    """The 64 bytes of a header, its check included.

    The payload's checksum is seeded with the check, so a sender that has a checksum to put in packs first,
    hashes with :func:`data_seed`, then calls :func:`seal_header`. Raises :class:`ProtocolError` (fault local)
    for a value that does not fit its field; limits and flag rules are the reader's (:func:`unpack_header`).
    """
    if len(transfer) != 16:
        raise ProtocolError(f"a transfer id is 16 bytes, got {len(transfer)}", fault=Fault.LOCAL)
    try:
        covered = _CHECKED.pack(MAGIC, VERSION, type, flags, transfer, layer, tensor, length, offset, sequence)
        return covered + _TAIL.pack(checksum, _xxh3(covered))
    except struct.error as exc:
        raise ProtocolError(
            f"a header field is out of range ({exc}): type={type} flags={flags} layer={layer} tensor={tensor} "
            f"length={length} offset={offset} sequence={sequence} checksum={checksum}",
            fault=Fault.LOCAL,
        ) from exc


def data_seed(header: bytes | bytearray | memoryview) -> int:
    """The header check of a packed header: the seed of its payload's checksum."""
    return int(_U64.unpack_from(header, _CHECK_AT)[0])


def seal_header(header: bytes, checksum: int) -> bytes:
    """``header`` with the payload checksum put in; the header check does not cover it and stays."""
    return header[:_COVERED] + _U64.pack(checksum) + header[_CHECK_AT:]


def payload_checksum(payload: bytes | bytearray | memoryview, seed: int) -> int:
    """xxh3_64 of ``payload`` seeded with the header check."""
    return _xxh3(payload, seed)


def unpack_header(buf: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Verify and unpack 64 bytes.

    Checked in this order, so that the error names the real trouble: magic (:class:`ProtocolError`), header
    check (:class:`HeaderError`), version and type (:class:`VersionError`), flags and transfer id
    (:class:`ProtocolError`), lengths and offsets (:class:`LimitError`).
    """
    if len(buf) != HEADER_BYTES:
        raise HeaderError(f"a header is {HEADER_BYTES} bytes, got {len(buf)}", fault=Fault.LOCAL)
    magic, version, number, flags, transfer, layer, tensor, length, offset, sequence, checksum, check = _HEADER.unpack(
        buf
    )
    if magic != MAGIC:
        raise ProtocolError(_wrong_magic(magic))
    if _xxh3(buf[:_COVERED]) != check:
        raise HeaderError("frame header is damaged: its check does not match; the connection must be reset")
    if version != VERSION:
        raise VersionError(f"expected protocol version {VERSION}, got {version}: upgrade the older side")
    kind = _TYPES.get(number)
    if kind is None:
        raise VersionError(f"expected a frame type of 1..{len(_TYPES)} (protocol version {VERSION}), got {number}")
    if (
        flags & ~_FLAGS[kind]
        or (flags & _NO_CHECKSUM and (checksum or flags & _CODED))
        or (transfer == NO_TRANSFER) is _REFUSE_ZEROS[kind]
    ):
        raise _broken_rule(kind, flags, transfer, checksum)
    if length > limits.by_type[number]:
        raise LimitError(f"a {kind.name} payload is at most {limits.by_type[number]} bytes, got {length}")
    if kind is _DATA:
        if not length or offset + length > MAX_OFFSET:
            raise LimitError(
                f"DATA must carry at least 1 byte and end by 2^63-1, got {length} bytes at offset {offset}"
            )
    elif kind is _CREDIT and offset > MAX_OFFSET:
        raise LimitError(f"CREDIT is at most 2^63-1 bytes, got {offset}")
    return Header(kind, flags, transfer, layer, tensor, length, offset, sequence, checksum, check)


def check_payload(header: Header, payload: bytes | bytearray | memoryview) -> None:
    """Verify a payload against its header.

    Raises :class:`IntegrityError` when it is not the bytes that were sent, :class:`ProtocolError` (fault
    local) when its length is not the announced one. With NO_CHECKSUM only the length is checked.
    """
    if len(payload) != header.length:
        raise ProtocolError(
            f"{header.type.name} announced {header.length} payload bytes, got {len(payload)}", fault=Fault.LOCAL
        )
    if header.flags & _NO_CHECKSUM:
        return
    got = _xxh3(payload, header.check)
    if got != header.checksum:
        raise IntegrityError(
            f"payload of {header.type.name} (transfer {header.transfer.hex()}, layer {header.layer}, "
            f"tensor {header.tensor}, offset {header.offset}, {header.length} bytes) has checksum {got:#018x}, "
            f"expected {header.checksum:#018x}: it was damaged on its way, or voided by its sender"
        )


def encode_data(
    payload: bytes | bytearray | memoryview,
    *,
    transfer: bytes,
    layer: int,
    tensor: int,
    offset: int,
    sequence: int = 0,
    flags: int = 0,
) -> bytes:
    """The header of a DATA frame for ``payload``, its checksum included (0 with NO_CHECKSUM)."""
    packed = pack_header(
        FrameType.DATA,
        transfer=transfer,
        flags=flags,
        layer=layer,
        tensor=tensor,
        length=len(payload),
        offset=offset,
        sequence=sequence,
    )
    if flags & Flag.NO_CHECKSUM:
        return packed
    return seal_header(packed, _xxh3(payload, data_seed(packed)))


def encode_control(
    type: FrameType,
    body: Body | Mapping[str, Any] | None = None,
    *,
    transfer: bytes = NO_TRANSFER,
    offset: int = 0,
    flags: int = 0,
    limits: Limits = DEFAULT_LIMITS,
) -> bytes:
    """A whole control frame. ``body`` is the type's struct, a mapping with its keys, or None for CREDIT and PING.

    What it returns, :func:`unpack_header` and :func:`decode_control` accept: it is put through both. Raises
    :class:`ProtocolError` or :class:`LimitError` with fault local for a frame that a peer would refuse.
    """
    kind = _BODIES.get(type)
    if type is FrameType.DATA:
        raise ProtocolError("DATA is no control frame: use encode_data or pack_header", fault=Fault.LOCAL)
    if kind is None and body is not None:
        raise ProtocolError(f"{type.name} has no body, got {_describe(body)}", fault=Fault.LOCAL)
    if kind is not None and not isinstance(body, (kind, Mapping)):
        raise ProtocolError(
            f"{type.name} needs a {kind.__name__} or a mapping, got {_describe(body)}", fault=Fault.LOCAL
        )
    payload = b"" if body is None else bodies.encode_body(body)
    length = min(len(payload), 2**32 - 1)  # what does not fit the field is over any limit, and is refused as such
    packed = pack_header(type, transfer=transfer, flags=flags, length=length, offset=offset)
    packed = seal_header(packed, _xxh3(payload, data_seed(packed)))
    try:
        decode_control(unpack_header(packed, limits), payload, verified=True)
    except ProtocolError as exc:
        exc.fault = Fault.LOCAL
        raise
    return packed + payload


def decode_control(header: Header, payload: bytes | bytearray | memoryview, *, verified: bool = False) -> Body | None:
    """The typed body of a control frame; None for CREDIT and PING, which have none.

    ``verified``: the checksum was checked already. Raises :class:`IntegrityError`, or :class:`ProtocolError`
    naming the key that is wrong.
    """
    if header.type is _DATA:
        raise ProtocolError("DATA has no body to decode", fault=Fault.LOCAL)
    if not verified:
        check_payload(header, payload)
    kind = _BODIES.get(header.type)
    if kind is None:
        return None
    body: Body = bodies.decode_body(kind, payload)
    if header.flags & Flag.FINAL and isinstance(body, bodies.Ack) and body.ranges:
        raise ProtocolError(f"Ack body is not valid: with flag FINAL ranges must be empty, got {len(body.ranges)}")
    return body


def _describe(body: object) -> str:
    return "nothing" if body is None else f"a {type(body).__name__}"


def _wrong_magic(magic: bytes) -> str:
    hint = "is this a kvtransport port?"
    if magic[:2] == b"\x16\x03":
        hint = "these bytes start a TLS handshake: the peer uses TLS and this side does not"
    elif magic in (b"GET ", b"POST", b"HTTP", b"HEAD", b"PUT "):
        hint = "these bytes are HTTP: is this a kvtransport port?"
    return f"expected magic {MAGIC.decode()}, got {magic!r}; {hint}"


def _broken_rule(kind: FrameType, flags: int, transfer: bytes, checksum: int) -> ProtocolError:
    extra = flags & ~_FLAGS[kind]
    if extra:
        return ProtocolError(f"{kind.name} allows flags {_FLAGS[kind]:#06x}, got {extra:#06x} beyond them")
    if flags & _NO_CHECKSUM and flags & _CODED:
        return ProtocolError(f"{kind.name} has both NO_CHECKSUM and CODED: a coded payload has a checksum")
    if flags & _NO_CHECKSUM and checksum:
        return ProtocolError(f"{kind.name} has flag NO_CHECKSUM and a checksum ({checksum:#018x}); expected 0")
    if transfer == NO_TRANSFER:
        return ProtocolError(f"{kind.name} needs a transfer id, got none (16 zero bytes)")
    return ProtocolError(f"{kind.name} belongs to no transfer: expected transfer id zeros, got {transfer.hex()}")
