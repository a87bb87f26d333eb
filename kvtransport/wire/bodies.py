"""Typed bodies of the control frames: msgpack maps with string keys.

One :class:`msgspec.Struct` per frame type with a body. Decoding is strict about what it knows and silent
about what it does not: an unknown key is ignored (a later revision may add keys), a missing key, a wrong
type or a value out of bounds is a :class:`~kvtransport.errors.ProtocolError` naming the key.

Every length is bounded: the payload by :class:`~kvtransport.wire.frames.Limits` before it is read, every
container by the bytes that are there (msgspec allocates for what it has read, not for what a length field
claims), free-form bodies by :data:`MAX_DEPTH` and :data:`MAX_CONTAINERS`.

Constructing a body does not check the types of its fields; encoding it into a frame does, because
:func:`kvtransport.wire.frames.encode_control` decodes what it is about to send.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, TypeVar

import msgspec

from kvtransport.address import parse_address
from kvtransport.errors import ConfigError, Fault, IncarnationError, KVError, LimitError, ProtocolError, error_from_dict
from kvtransport.wire.scan import more_containers_than

MAX_DEPTH = 16
"""Levels of lists and maps in the ``args`` of a CALL and the ``result`` of a REPLY, the outermost included."""

MAX_CONTAINERS = 65536
"""Lists and maps in one CALL or REPLY."""

MAX_RANGES = 8192
"""Ranges in one ACK or RESUME: in their largest encoding (25 bytes each) they still fit 256 KiB."""

MAX_OFFSET = 2**63 - 1
"""Largest byte offset anywhere on the wire: it must fit a signed 64-bit integer in native code."""

MAX_TEXT = 1024
"""Characters in a reason or an error message."""

Bytes16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Token = Annotated[bytes, msgspec.Meta(min_length=1, max_length=1024)]
MAX_WHOLE = 2**18
"""Bytes of a transfer that travels in its OPEN."""

WHOLE = "open.whole"
"""Feature of a HELLO: its sender takes an OPEN that carries the transfer."""

ManifestBytes = Annotated[bytes, msgspec.Meta(min_length=1, max_length=2**20)]
WholeBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_WHOLE)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=2**16 - 1)]
I32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=MAX_OFFSET)]
ChunkBytes = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Versions = Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=255)], ...], msgspec.Meta(min_length=1, max_length=16)]
Features = Annotated[tuple[Word, ...], msgspec.Meta(max_length=32)]


class ByteRange(NamedTuple):
    """Bytes ``start`` (inclusive) to ``stop`` (exclusive) of the extent of one tensor of one layer."""

    layer: U16
    tensor: U16
    start: Offset
    stop: Offset


Ranges = Annotated[tuple[ByteRange, ...], msgspec.Meta(max_length=MAX_RANGES)]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame in each direction of a connection.

    ``incarnation`` is random per process start; ``link`` names the link that the connection joins (chosen by
    the dialer, echoed by the acceptor), of whose ``count`` connections this is number ``index``.
    ``peer_incarnation`` is what the sender believes the other side's incarnation to be, None when it has not
    met it. ``token`` proves that the dialer knows a secret, on this connection only (:mod:`kvtransport.identity`).
    ``window_bytes``: receive window the sender of the HELLO is ready to grant a transfer, 0 when it
    does not say. ``keepalive_s``: it sends a PING after so many seconds of silence. ``address``: where others can dial
    the process of ``address_incarnation`` (unset: the sender); not written when unset, see :attr:`advertised`.
    """

    versions: Versions
    incarnation: Bytes16
    link: Bytes16
    index: U16
    count: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    role: Literal["dial", "accept"]
    name: Name = ""
    features: Features = ()
    token: Token | None = None
    peer_incarnation: Bytes16 | None = None
    window_bytes: Offset = 0
    keepalive_s: float = 10.0
    address: Name | msgspec.UnsetType = msgspec.UNSET
    address_incarnation: Bytes16 | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        _seconds("keepalive_s", self.keepalive_s)
        if isinstance(self.address, str):
            try:
                parse_address(self.address)
            except ConfigError as error:
                raise ValueError(f"address: {error.message}") from None
        if self.index >= self.count:
            raise ValueError(f"index must be below count ({self.count}), got {self.index}")

    @property
    def advertised(self) -> tuple[str, bytes] | None:
        """Where others can dial, and the incarnation of the process that answers there; None when it does not say."""
        if not isinstance(self.address, str):
            return None
        return self.address, self.address_incarnation or self.incarnation

    def __repr__(self) -> str:
        # What proves a secret does not belong into a log.
        token = "None" if self.token is None else "<hidden>"
        shown = (f"{f}={token if f == 'token' else repr(getattr(self, f))}" for f in self.__struct_fields__)
        return f"Hello({', '.join(shown)})"


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Announces a transfer. ``manifest`` is opaque here; ``digest`` is its SHA-256 and is checked.

    ``deadline_s``: seconds from the arrival of the OPEN until the sender gives up. ``priority``: higher first.
    ``chunk_bytes``: the largest DATA payload the sender wants to use. ``whole``: the bytes of all extents in the manifest's
    order; the transfer is complete with them, and sealed.
    """

    manifest: ManifestBytes
    digest: Bytes32
    deadline_s: float
    chunk_bytes: ChunkBytes
    priority: I32 = 0
    checksum: Literal["xxh3", "none"] = "xxh3"
    whole: WholeBytes | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        _seconds("deadline_s", self.deadline_s)
        if hashlib.sha256(self.manifest).digest() != self.digest:
            raise ValueError("digest is not the SHA-256 of manifest")

    @classmethod
    def of(
        cls,
        manifest: bytes,
        *,
        deadline_s: float,
        chunk_bytes: int,
        priority: int = 0,
        checksum: str = "xxh3",
        whole: bytes | None = None,
    ) -> Self:
        """An OPEN whose digest is computed from ``manifest``."""
        if checksum not in ("xxh3", "none"):
            raise ProtocolError(f"checksum must be 'xxh3' or 'none', got {checksum!r}", fault=Fault.LOCAL)
        return cls(
            manifest=manifest,
            digest=hashlib.sha256(manifest).digest(),
            deadline_s=deadline_s,
            chunk_bytes=chunk_bytes,
            priority=priority,
            checksum=checksum,  # type: ignore[arg-type]
            whole=msgspec.UNSET if whole is None else whole,
        )

    @property
    def held_bytes(self) -> int:
        """What keeping it takes, but for the fixed part."""
        return len(self.manifest) + (0 if self.whole is msgspec.UNSET else len(self.whole))


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    """The receiver has destinations: it grants ``credit`` (absolute, payload bytes) and fixes the chunk size.

    ``chunk_bytes`` is at most what the OPEN named. A refusal is an ERROR frame on the transfer instead.
    """

    credit: Offset
    chunk_bytes: ChunkBytes


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges verified and applied in granted host memory. With flag FINAL and no ranges: the seal holds."""

    ranges: Ranges

    def __post_init__(self) -> None:
        _check_ranges(self.ranges)


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """Everything was sent: ``total_bytes`` in ``chunks`` chunks, of the manifest with this SHA-256."""

    total_bytes: Offset
    digest: Bytes32
    chunks: Offset


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """Either side gives the transfer up."""

    reason: Text = ""


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """A :class:`~kvtransport.errors.KVError` on its way; ``fault`` as its sender sees it."""

    code: Word
    message: Text
    fault: Literal["local", "remote", "network"]
    retryable: bool

    @classmethod
    def of(cls, error: KVError) -> Self:
        """The body for ``error``; a message too long to travel is cut, never refused."""
        return cls(code=error.code, message=clip(error.message), fault=error.fault.value, retryable=error.retryable)

    def to_error(self, *, prefix: str = "") -> KVError:
        """The error as this side raises it (*local* there is *remote* here)."""
        return error_from_dict(msgspec.structs.asdict(self), prefix=prefix)


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges the receiver does not have and the sender must send again; more may follow in another RESUME."""

    ranges: Ranges

    def __post_init__(self) -> None:
        _check_ranges(self.ranges)


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request of the layer above. ``args``: None, bool, int, float, str, bytes, lists, maps with str keys."""

    verb: Word
    args: dict[str, Any]

    def __post_init__(self) -> None:
        _check_tree("args", self.args)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a CALL: ``ok`` and ``result``, or not ok and ``error``."""

    ok: bool
    result: dict[str, Any] | None = None
    error: Error | None = None

    def __post_init__(self) -> None:
        if self.ok and (self.result is None or self.error is not None):
            raise ValueError("result must be a map, and error absent, when ok is true")
        if not self.ok and (self.error is None or self.result is not None):
            raise ValueError("error must be a map, and result absent, when ok is false")
        if self.result is not None:
            _check_tree("result", self.result)


Body: TypeAlias = Hello | Open | Accept | Ack | Seal | Cancel | Error | Resume | Call | Reply
AnyBody = TypeVar("AnyBody", Hello, Open, Accept, Ack, Seal, Cancel, Error, Resume, Call, Reply)


def clip(text: str, limit: int = MAX_TEXT) -> str:
    """``text`` made fit to travel: at most ``limit`` characters, lone surrogates replaced."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def byte_ranges(ranges: Iterable[tuple[int, int, int, int]]) -> tuple[ByteRange, ...]:
    """``(layer, tensor, start, stop)`` tuples as an :class:`Ack` or :class:`Resume` wants them."""
    return tuple(ByteRange(*r) for r in ranges)


def require_incarnation(hello: Hello, own: bytes, known: bytes | None) -> None:
    """Fences a peer that talks to, or is, an earlier incarnation.

    ``own``: this process; ``known``: the peer's incarnation as this side has met it, None when it has not.
    Raises :class:`~kvtransport.errors.IncarnationError`.
    """
    if hello.peer_incarnation is not None and hello.peer_incarnation != own:
        raise IncarnationError(
            f"the peer expected incarnation {hello.peer_incarnation.hex()} of this process, which is {own.hex()}: "
            "this process restarted; the peer must drop its state of the earlier one and join a new link",
            fault=Fault.LOCAL,
        )
    if known is not None and hello.incarnation != known:
        raise IncarnationError(
            f"expected incarnation {known.hex()} of the peer, got {hello.incarnation.hex()}: "
            "the peer restarted; drop the state of the earlier one and join a new link"
        )


def encode_body(body: Body | Mapping[str, Any]) -> bytes:
    """The msgpack of a body. Raises :class:`ProtocolError` (fault local) for what msgpack cannot carry."""
    try:
        return msgspec.msgpack.encode(body)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise ProtocolError(f"{_kind(body)} body cannot be encoded: {exc}", fault=Fault.LOCAL) from exc


def decode_body(kind: type[AnyBody], payload: bytes | bytearray | memoryview) -> AnyBody:
    """Decode and validate one body. ``payload`` must hold exactly one msgpack map.

    Raises :class:`ProtocolError` naming the offending key, :class:`LimitError` for a CALL or REPLY of too many
    lists and maps.
    """
    if kind in (Call, Reply) and more_containers_than(MAX_CONTAINERS, payload):
        raise LimitError(
            f"{kind.__name__} body holds more than {MAX_CONTAINERS} lists and maps: send fewer, flatter ones"
        )
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except RecursionError as exc:
        raise ProtocolError(f"{kind.__name__} body is nested too deep (at most {MAX_DEPTH} levels)") from exc
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as exc:
        raise ProtocolError(f"{kind.__name__} body is not valid: {exc}") from exc


def _kind(body: object) -> str:
    return "a mapping" if isinstance(body, Mapping) else type(body).__name__


def _seconds(name: str, value: float) -> None:
    # NaN compares false with everything, so it is named rather than bounded away.
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number of seconds above 0, got {value!r}")


def _check_ranges(ranges: tuple[ByteRange, ...]) -> None:
    for position, (_, _, start, stop) in enumerate(ranges):
        if stop <= start:
            raise ValueError(f"ranges[{position}] must have start < stop, got {start}..{stop}")


_SCALARS: frozenset[type] = frozenset({type(None), bool, int, float, str, bytes})
_STR: frozenset[type] = frozenset({str})


def _check_tree(name: str, root: dict[str, Any]) -> None:
    """Bounds nesting and keeps out what is not plain data (msgpack extension types, non-string keys)."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                if not _STR.issuperset(map(type, node)):
                    raise ValueError(f"{name} holds a map whose keys are not all strings")
                values: Iterable[Any] = node.values()
            else:
                values = node
            # One set per container: checking the kinds costs C speed per value, which long lists need.
            kinds = set(map(type, values))
            if kinds <= _SCALARS:
                continue
            for kind in kinds - _SCALARS:
                if not issubclass(kind, (dict, list, tuple)):
                    raise ValueError(
                        f"{name} holds a {kind.__name__}; allowed: None, bool, int, float, str, bytes, list, map"
                    )
            deeper.extend(v for v in values if isinstance(v, (dict, list, tuple)))
        if not deeper:
            return
        level = deeper
    raise ValueError(f"{name} is nested deeper than {MAX_DEPTH} levels")
