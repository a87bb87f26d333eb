"""Lossless coding of cache bytes: the exponents of bfloat16 shrink, signs and mantissas do not and stay as they are.

A coded payload is self-describing (docs/wire-format.md, "Coded payloads") and decodes to exactly the bytes that went in,
or raises: it has their checksum. Whether coding pays depends on the link: :mod:`kvtransport.flow.coding` decides.
"""

from __future__ import annotations

import struct
import threading
from enum import IntEnum
from functools import cache

import lz4.block

from .buffers import PageList, join_planes, split_planes
from .errors import ConfigError, IntegrityError, ProtocolError

HEADER: struct.Struct = struct.Struct("<BBHIIQ")
"""Codec, form, zero, raw bytes, bytes of the coded plane, xxh3_64 of the raw bytes."""
BF16_PLANES = 1
"""The form: exponents coded, then signs with mantissas as they are."""
MAX_RAW = 16 << 20
"""Bytes of a payload before coding: a chunk's."""


class Codec(IntEnum):
    """Codec ids of the wire format."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2

    @property
    def feature(self) -> str:
        """Its name in a HELLO: who names it decodes it."""
        return f"coded.{self.name.lower()}"


def available() -> tuple[Codec, ...]:
    """The codecs of this process, :attr:`Codec.NONE` first; zstandard is an extra."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return Codec.NONE, Codec.LZ4
    return Codec.NONE, Codec.LZ4, Codec.ZSTD


def choose_codecs(names: tuple[str, ...] = ()) -> tuple[Codec, ...]:
    """The codecs by their names, or all that are there. Raises ConfigError for one that is not."""
    there = {codec.name.lower(): codec for codec in available()[1:]}
    for name in names:
        if name not in there:
            hint = ": pip install 'kvtransport[codecs]'" if name == "zstd" else ""
            raise ConfigError(f"codec {name!r} is not there, only {', '.join(there)}{hint}")
    return tuple(there[name] for name in names or there)


def encode(pages: PageList, codec: Codec) -> bytes | None:
    """The bytes of ``pages`` coded as bfloat16; None where that would not make them fewer.

    ``pages`` holds an even number of bytes, at most :data:`MAX_RAW`. Raises ConfigError for a codec that is not there.
    """
    nbytes = pages.nbytes
    if codec is Codec.NONE or nbytes < 2 or nbytes % 2 or nbytes > MAX_RAW:
        return None
    exponents, rest = bytearray(nbytes // 2), bytearray(nbytes // 2)
    split_planes(pages.base, pages.pieces, exponents, rest)
    plane = _compress(codec, exponents)
    if HEADER.size + len(plane) + len(rest) >= nbytes:
        return None
    return b"".join((HEADER.pack(codec, BF16_PLANES, 0, nbytes, len(plane), pages.hash()), plane, rest))


def raw_bytes(payload: bytes | memoryview) -> int:
    """How many bytes ``payload`` says it decodes to, 2 to :data:`MAX_RAW`. Raises ProtocolError where it says nonsense."""
    if len(payload) < HEADER.size:
        raise ProtocolError(f"a coded payload has at least {HEADER.size} bytes, got {len(payload)}")
    number, form, zero, nbytes, plane_bytes, _ = HEADER.unpack_from(payload)
    if form != BF16_PLANES or zero or number not in (Codec.LZ4, Codec.ZSTD):
        raise ProtocolError(f"codec {number} in form {form} is not known here: expected codec 1 or 2 in form 1")
    if not 2 <= nbytes <= MAX_RAW or nbytes % 2:
        raise ProtocolError(f"a coded payload says it was {nbytes} bytes: expected an even number, 2 to {MAX_RAW}")
    if len(payload) != HEADER.size + plane_bytes + nbytes // 2:
        raise ProtocolError(
            f"a coded payload of {len(payload)} bytes says it has {HEADER.size + plane_bytes + nbytes // 2}"
        )
    return int(nbytes)


def decode(payload: bytes | memoryview) -> bytearray:
    """The bytes that ``payload`` was coded from, verified. Takes no more memory than a small multiple of :func:`raw_bytes`.

    Raises ProtocolError where it is no coded payload, IntegrityError where what comes out is not what went in.
    """
    nbytes = raw_bytes(payload)
    view = memoryview(payload)
    number, _, _, _, plane_bytes, checksum = HEADER.unpack_from(view)
    exponents = _decompress(Codec(number), view[HEADER.size : HEADER.size + plane_bytes], nbytes // 2)
    raw = bytearray(nbytes)
    join_planes(raw, None, exponents, view[HEADER.size + plane_bytes :])
    got = PageList.of(raw).hash()
    if got != checksum:
        raise IntegrityError(f"{nbytes} decoded bytes have checksum {got:#018x}, expected {checksum:#018x}")
    return raw


def _compress(codec: Codec, plane: bytearray) -> bytes:
    if codec is Codec.LZ4:
        return bytes(lz4.block.compress(plane, store_size=False))
    return bytes(_contexts().compressor.compress(plane))


def _decompress(codec: Codec, coded: memoryview, nbytes: int) -> bytes:
    try:
        plane = lz4.block.decompress(coded, uncompressed_size=nbytes) if codec is Codec.LZ4 else _inflate(coded, nbytes)
    except (ConfigError, ProtocolError):
        raise
    except Exception as error:
        raise ProtocolError(f"a coded plane cannot be decoded: {error}") from error
    if len(plane) != nbytes:
        raise ProtocolError(f"a coded plane has {len(plane)} bytes, expected {nbytes}")
    return bytes(plane)


def _inflate(coded: memoryview, nbytes: int) -> bytes:
    """One zstandard frame of ``nbytes``. A size that the frame names would be believed over any limit, so it is held against that first."""
    contexts = _contexts()
    named = contexts.content_size(coded)
    if named not in (-1, nbytes):  # -1: it names none, as ours
        raise ProtocolError(f"a coded plane says it has {named} bytes, expected {nbytes}")
    return bytes(contexts.decompressor.decompress(coded, max_output_size=nbytes, allow_extra_data=False))


class _Contexts(threading.local):
    """zstandard's, kept: making one costs more than a small plane. For one thread each."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError("codec zstd needs the package 'zstandard': pip install 'kvtransport[codecs]'") from None
        self.compressor = zstandard.ZstdCompressor(level=1, write_content_size=False, write_checksum=False)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 25)
        self.content_size = zstandard.frame_content_size


@cache
def _contexts() -> _Contexts:
    return _Contexts()
