"""The reference parser: bytes in, verified frames out.

Control frames and tests go through it. The data path receives payloads straight into their places, in native
code, and is held to this parser by the golden vectors and a differential fuzzer.
"""

from __future__ import annotations

from kvtransport.errors import Fault, IntegrityError, KVError, ProtocolError
from kvtransport.wire.frames import (
    DEFAULT_LIMITS,
    HEADER_BYTES,
    Frame,
    FrameType,
    Header,
    Limits,
    check_payload,
    unpack_header,
)


class FrameReader:
    """The reference parser: bytes in, verified frames out.

    Holds at most one incomplete frame, which is at most a header and the largest payload of its type: a longer
    one is refused at its header. After an error nothing more is parsed.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._header: Header | None = None
        self._error: KVError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Take bytes as they came and return the frames they complete, in order.

        Raises what :func:`~kvtransport.wire.frames.unpack_header` raises, and :class:`IntegrityError` for a
        damaged control payload. Frames completed ahead of the damage, in the same call, are returned first; the
        error is then raised by the next call, and is in :attr:`error` at once. So how the stream was cut makes
        no difference.
        """
        if self._error is not None:
            raise self._error
        frames: list[Frame] = []
        self._buffer += data
        at = 0
        try:
            # A view pins the buffer: it must be gone before the consumed bytes are dropped below.
            with memoryview(self._buffer) as view:
                while True:
                    if self._header is None:
                        if len(view) - at < HEADER_BYTES:
                            break
                        self._header = unpack_header(bytes(view[at : at + HEADER_BYTES]), self._limits)
                        at += HEADER_BYTES
                    header = self._header
                    if len(view) - at < header.length:
                        break
                    frames.append(_verified(header, bytes(view[at : at + header.length])))
                    at += header.length
                    self._header = None
        except KVError as exc:
            self._error = exc
            self._buffer.clear()
            if not frames:
                raise
            return frames
        del self._buffer[:at]
        return frames

    def close(self) -> None:
        """The stream ended. Raises :class:`ProtocolError` (fault network) when it ended inside a frame."""
        if self._error is not None:
            raise self._error
        if self._header is not None:
            raise ProtocolError(
                f"the stream ended inside a {self._header.type.name} frame: expected {self._header.length} payload "
                f"bytes, got {len(self._buffer)}",
                fault=Fault.NETWORK,
            )
        if self._buffer:
            raise ProtocolError(
                f"the stream ended inside a frame header: expected {HEADER_BYTES} bytes, got {len(self._buffer)}",
                fault=Fault.NETWORK,
            )

    @property
    def buffered(self) -> int:
        """Bytes held of an incomplete frame."""
        return len(self._buffer)

    @property
    def error(self) -> KVError | None:
        """What stopped the parser, None while it runs."""
        return self._error


def _verified(header: Header, payload: bytes) -> Frame:
    try:
        check_payload(header, payload)
    except IntegrityError as exc:
        # A void DATA frame is routine (its sender gave the source back in mid-frame); a damaged control frame
        # is a message lost, and the connection cannot go on without it.
        if header.type is not FrameType.DATA:
            raise
        return Frame(header, b"", exc)
    return Frame(header, payload)
