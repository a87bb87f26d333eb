"""Host memory and page lists: what payload bytes lie in while they are sent, received, checked and copied.

The work is done by the C extension ``kvtransport._native``; where it was not built its pure-Python twin serves,
slower, with one warning. The functions re-exported here keep the twin's contract (``kvtransport/_pure.py``):
``send_pages``, ``recv_pages``, ``hash_pages``, ``hash_each``, ``copy_pages`` and ``Hasher`` raise the plain ValueError, OSError,
EOFError or BufferError; :class:`Arena` and :class:`PageList` raise errors of this project's tree.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import xxhash

from .errors import ArenaError, ConfigError, KVBufferError

if TYPE_CHECKING:
    from . import _native as _impl

    native_available: bool
else:
    try:
        from . import _native as _impl

        native_available = True
    except ImportError as error:
        if os.environ.get("KVTRANSPORT_REQUIRE_NATIVE") == "1":
            raise ConfigError(
                f"KVTRANSPORT_REQUIRE_NATIVE=1, but kvtransport._native cannot be imported ({error}): install a C "
                "compiler and Python's headers (gcc, python3-dev), then reinstall or run "
                "'python setup.py build_ext --inplace'; or unset the variable to use the slower pure-Python twin"
            ) from error
        from . import _pure as _impl

        native_available = False
        warnings.warn(
            "kvtransport._native is not built: the pure-Python twin serves. Sends, receives and copies hold the GIL and "
            "cost a Python call per piece; arenas get no huge pages, no locking and no CUDA registration. To build it: "
            "a C compiler, Python's headers, and 'python setup.py build_ext --inplace'",
            RuntimeWarning,
            stacklevel=2,
        )

__all__ = [
    "Arena",
    "ArenaInfo",
    "Hasher",
    "NativeEngine",
    "PageList",
    "View",
    "copy_pages",
    "hash_each",
    "hash_pages",
    "join_planes",
    "native_available",
    "recv_pages",
    "send_pages",
    "split_planes",
]

Hasher = _impl.Hasher
View = _impl.View
copy_pages = _impl.copy_pages
hash_each = _impl.hash_each
hash_pages = _impl.hash_pages
join_planes = _impl.join_planes
NativeEngine: type[_impl.Engine] | None = getattr(_impl, "Engine", None)
"""The I/O engine, on Linux with the extension."""
recv_pages = _impl.recv_pages
send_pages = _impl.send_pages
split_planes = _impl.split_planes

Choice = Literal["auto", "require", "off"]

_SCRATCH_BYTES = 1 << 20
_SMALL_BYTES = 64 << 10
_NO_PIECES: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)
_NO_PIECES.flags.writeable = False


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """What was asked of an arena and what it became. Sizes in bytes."""

    requested: int
    nbytes: int
    """The request rounded up to whole pages: all of it may be used."""
    page_bytes: int
    huge: str
    """"hugetlb" (reserved huge pages), "thp" (the kernel was told to use huge pages and allows it) or "none"."""
    locked: bool
    cuda: bool
    """Registered with CUDA: copies to and from a device need no staging."""
    fd: int
    """The memfd, or -1: not shareable, or unmapped already."""
    notes: tuple[str, ...]
    """What did not work although it was asked for with "auto", and what to do about it."""


class Arena(_impl.Arena):
    """Page-aligned host memory, made once and lent out in views.

    ``nbytes`` is rounded up to whole pages. ``memfd``: back it by a file descriptor that another process may
    :meth:`attach`, read-only. ``populate``: make every page present now (locking and CUDA registration do so too).
    ``huge``, ``lock``, ``cuda``: "auto" tries and says in ``info.notes`` what did not work, "require" makes that an
    error, "off" does not try. Without a current CUDA context, device 0's primary one is used.

    ``memoryview(arena)`` and :meth:`view` lend memory (the latter as buffer protocol and DLPack); :meth:`close` ends
    the lending, and the memory is unmapped when the last view, buffer or tensor is gone, never before.

    Raises :class:`~kvtransport.errors.ArenaError` where the arena cannot be made: asking for more memory than there
    is (MemAvailable, the cgroup's limit) fails before anything is touched.
    """

    def __new__(
        cls,
        nbytes: int,
        *,
        huge: Choice = "auto",
        lock: Choice = "auto",
        memfd: bool = True,
        cuda: Choice = "auto",
        populate: bool = True,
        name: str = "kvtransport",
    ) -> Self:
        try:
            return super().__new__(
                cls, nbytes, huge=huge, lock=lock, memfd=memfd, cuda=cuda, populate=populate, name=name
            )
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            raise ArenaError(f"no arena {name!r}: {_reason(error)}") from error

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Self:
        """Map ``nbytes`` of another arena's memfd, read-only; ``fd`` stays the caller's.

        Raises ArenaError where the descriptor is none, holds fewer bytes, or is not sealed against shrinking.
        """
        try:
            return super().attach(fd, nbytes)
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            raise ArenaError(f"cannot attach to an arena: {_reason(error)}") from error

    @property
    def info(self) -> ArenaInfo:  # type: ignore[override]  # the implementations give the plain dict
        """What was asked for, what it became, and why."""
        info = super().info
        return ArenaInfo(**{**info, "notes": tuple(info["notes"])})  # type: ignore[arg-type]


def _reason(error: BaseException) -> str:
    """An OSError's text without the "[Errno 12]" in front."""
    return str((isinstance(error, OSError) and error.strerror) or error)


def _flat(source: Any) -> memoryview:
    """The bytes of ``source`` as a flat memoryview, without a copy."""
    if type(source) is memoryview and source.format == "B" and source.ndim == 1 and source.contiguous:
        return source
    if _is_tensor(source):
        source = _tensor_bytes(source)
    elif isinstance(source, np.ndarray):
        if not source.flags.c_contiguous:
            raise KVBufferError("the array is not C-contiguous: a page list cannot name its bytes in order")
        # Through bytes at once: numpy exports no buffer of dtypes such as ml_dtypes' bfloat16.
        source = source.reshape(-1).view(np.uint8)
    try:
        view = memoryview(source)
    except TypeError:
        if not hasattr(source, "__dlpack__"):
            raise KVBufferError(
                f"{type(source).__name__} has no bytes to name: give a buffer (bytearray, memoryview, numpy array, "
                "arena) or a tensor in host memory"
            ) from None
        return _flat(np.from_dlpack(source))
    if not view.c_contiguous:
        raise KVBufferError("the buffer is not C-contiguous: a page list cannot name its bytes in order")
    if view.format == "B" and view.ndim == 1:
        return view
    # frombuffer reads formats that memoryview.cast refuses
    return memoryview(np.frombuffer(view, np.uint8).data) if view.nbytes else view.cast("B", (0,))


def _is_tensor(source: Any) -> bool:
    """A torch tensor, without importing torch for everyone."""
    return type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "data_ptr")


def _tensor_bytes(tensor: Any) -> npt.NDArray[np.uint8]:
    import torch

    if tensor.device.type != "cpu":
        raise KVBufferError(f"the tensor is on {tensor.device}: stage it into host memory first")
    if not tensor.is_contiguous():
        raise KVBufferError("the tensor is not contiguous: a page list cannot name its bytes in order")
    # As bytes: numpy has no bfloat16 and no 8-bit floats.
    array: npt.NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


class PageList:
    """Bytes in order, scattered over one base: the immutable names of memory, not the memory itself.

    ``base`` is any C-contiguous buffer (or host tensor, of any dtype) and is kept alive; ``pieces`` are pairs
    (offset, length) in bytes of it, and may overlap or repeat. Raises KVBufferError where a piece does not
    fit its base.
    """

    __slots__ = ("_base", "_ends", "_nbytes", "_offset", "_pieces")

    _base: memoryview
    _nbytes: int
    _offset: int  # of the only piece; -1 when there are several
    _pieces: npt.NDArray[np.int64] | None  # made on demand for a single piece
    _ends: npt.NDArray[np.int64] | None  # cumulative lengths, on demand

    def __init__(self, base: Any, pieces: npt.ArrayLike | Iterable[tuple[int, int]]) -> None:
        self._base = _flat(base)
        self._set(_checked(pieces, len(self._base)))

    def _set(self, pieces: npt.NDArray[np.int64]) -> None:
        """Takes over checked pieces, none of length zero."""
        self._ends = None
        if len(pieces) > 1:
            self._offset, self._pieces = -1, pieces
            pieces.flags.writeable = False
            self._nbytes = int(pieces[:, 1].sum())
        else:
            self._pieces = None
            self._offset, self._nbytes = pieces[0].tolist() if len(pieces) else (0, 0)

    @classmethod
    def _one(cls, base: memoryview, offset: int, nbytes: int) -> PageList:
        self = _new(cls)
        self._base = base
        self._offset = offset
        self._nbytes = nbytes
        self._pieces = self._ends = None
        return self

    @classmethod
    def _several(cls, base: memoryview, pieces: npt.NDArray[np.int64]) -> PageList:
        self = _new(cls)
        self._base = base
        self._set(pieces)
        return self

    @classmethod
    def of(cls, buffer: Any) -> PageList:
        """All bytes of a C-contiguous buffer, array or host tensor."""
        base = _flat(buffer)
        return cls._one(base, 0, len(base))

    @classmethod
    def pages(cls, base: Any, offsets: npt.ArrayLike, page_bytes: int, nbytes: int | None = None) -> PageList:
        """Pages of ``page_bytes`` at ``offsets`` (bytes of the base); ``nbytes`` in all cuts the last one.

        Raises KVBufferError where ``nbytes`` would need more or fewer pages than were given.
        """
        starts = np.asarray(offsets).reshape(-1)
        n = len(starts)
        if page_bytes < 1:
            raise KVBufferError(f"a page must have at least 1 byte, got {page_bytes}")
        total = n * page_bytes if nbytes is None else nbytes
        if not max(0, (n - 1) * page_bytes) < total <= n * page_bytes and (n or total):
            raise KVBufferError(
                f"{total} bytes do not fill {n} pages of {page_bytes} bytes, the last one perhaps in part"
            )
        pieces = np.empty((n, 2), np.int64)
        if n:
            pieces[:, 0] = _int64(starts)
            pieces[:, 1] = page_bytes
            pieces[-1, 1] = total - (n - 1) * page_bytes
        return cls(base, pieces)

    @classmethod
    def from_pieces(cls, base: Any, pieces: npt.ArrayLike | Iterable[tuple[int, int]]) -> PageList:
        """The same as the constructor: pairs (offset, length), as a list or an array of shape (n, 2)."""
        return cls(base, pieces)

    @classmethod
    def joined(cls, pages: Sequence[PageList]) -> PageList:
        """The bytes of all ``pages``, one after another, neighbouring pieces joined; all must have the same ``base``. Raises KVBufferError."""
        if not pages:
            return cls._one(memoryview(b""), 0, 0)
        base = pages[0]._base
        if any(p._base is not base for p in pages):
            raise KVBufferError("page lists over several buffers cannot be one")
        if len(pages) == 1:
            return pages[0].merged()
        offsets = np.fromiter([p._offset for p in pages], np.int64, len(pages))
        if (offsets >= 0).all():
            pieces = np.empty((len(pages), 2), np.int64)
            pieces[:, 0] = offsets
            pieces[:, 1] = np.fromiter([p._nbytes for p in pages], np.int64, len(pages))
            pieces = pieces[pieces[:, 1] > 0]
        else:
            pieces = np.concatenate([p.pieces for p in pages])
        return cls._several(base, pieces).merged()

    @classmethod
    def scratch(cls, nbytes: int) -> PageList:
        """``nbytes`` of writable memory that nobody reads: one 1 MiB buffer, over and over.

        For draining what is not wanted. Do not send from it: it may hold another tenant's bytes, see :meth:`zeros`.
        """
        return cls._repeat(_scratch(), nbytes)

    @classmethod
    def zeros(cls, nbytes: int) -> PageList:
        """``nbytes`` of read-only zeros, over one 1 MiB buffer: for finishing a frame whose source is gone."""
        return cls._repeat(_zeros(), nbytes)

    @classmethod
    def _repeat(cls, base: memoryview, nbytes: int) -> PageList:
        if nbytes < 0:
            raise KVBufferError(f"a page list cannot have {nbytes} bytes")
        size = len(base)
        if nbytes <= size:
            return cls._one(base, 0, nbytes)
        pieces = np.zeros((-(-nbytes // size), 2), np.int64)
        pieces[:, 1] = size
        pieces[-1, 1] = nbytes - (len(pieces) - 1) * size
        return cls._several(base, pieces)

    @property
    def base(self) -> memoryview:
        """The memory the pieces lie in: flat, format "B"."""
        return self._base

    @property
    def pieces(self) -> npt.NDArray[np.int64]:
        """Pairs (offset, length), shape (n, 2), read-only; none of length zero."""
        pieces = self._pieces
        if pieces is None:
            if self._nbytes:
                pieces = np.array(((self._offset, self._nbytes),), np.int64)
                pieces.flags.writeable = False
            else:
                pieces = _NO_PIECES
            self._pieces = pieces
        return pieces

    @property
    def where(self) -> npt.NDArray[np.int64] | tuple[int, int]:
        """:attr:`pieces`, or (offset, length) where there is one: what the I/O engine takes without an array being made."""
        return (self._offset, self._nbytes) if self._offset >= 0 else self.pieces

    @property
    def nbytes(self) -> int:
        """Sum of the lengths."""
        return self._nbytes

    @property
    def readonly(self) -> bool:
        """True when the memory may not be written."""
        return self._base.readonly

    def slice(self, start: int, stop: int) -> PageList:
        """Bytes [start, stop) of this list. Raises KVBufferError unless 0 <= start <= stop <= nbytes."""
        if not 0 <= start <= stop <= self._nbytes:
            raise KVBufferError(f"bytes {start} to {stop} of a page list of {self._nbytes}")
        if self._offset >= 0:
            return PageList._one(self._base, self._offset + start, stop - start)
        if start == stop:
            return PageList._one(self._base, 0, 0)
        ends = self._ends
        if ends is None:
            ends = self._ends = np.cumsum(self.pieces[:, 1])
        first = int(ends.searchsorted(start, "right"))
        last = int(ends.searchsorted(stop, "left"))
        pieces = self.pieces[first : last + 1].copy()
        pieces[-1, 1] -= int(ends[last]) - stop
        skip = start - (int(ends[first - 1]) if first else 0)
        pieces[0, 0] += skip
        pieces[0, 1] -= skip
        return PageList._several(self._base, pieces)

    def merged(self) -> PageList:
        """The same bytes with neighbouring pieces joined."""
        if self._offset >= 0:
            return self
        offsets, lengths = self.pieces[:, 0], self.pieces[:, 1]
        apart = np.empty(len(offsets), np.bool_)
        apart[0] = True
        np.not_equal(offsets[1:], offsets[:-1] + lengths[:-1], out=apart[1:])
        firsts = np.flatnonzero(apart)
        if len(firsts) == len(offsets):
            return self
        return PageList._several(self._base, np.stack((offsets[firsts], np.add.reduceat(lengths, firsts)), axis=1))

    def copy_from(self, other: PageList) -> None:
        """Copy the bytes of ``other`` here. Raises KVBufferError where lengths differ or this is read-only."""
        if self.readonly:
            raise KVBufferError("cannot copy into read-only memory")
        if self._nbytes != other._nbytes:
            raise KVBufferError(f"cannot copy {other._nbytes} bytes into a page list of {self._nbytes}")
        if self._nbytes <= _SMALL_BYTES and self._offset >= 0 and other._offset >= 0:
            self._small()[:] = other._small()
            return
        copy_pages(self._base, self.pieces, other._base, other.pieces)

    def _small(self) -> memoryview:
        """The only piece: what is small is copied and hashed faster without arrays, and holds the GIL for some microseconds."""
        return self._base[self._offset : self._offset + self._nbytes]

    def copy_to(self, other: PageList) -> None:
        """Copy these bytes to ``other``; errors as in :meth:`copy_from`."""
        other.copy_from(self)

    def hash(self, seed: int = 0) -> int:
        """xxh3_64 of the bytes."""
        if not seed and self._nbytes <= _SMALL_BYTES and self._offset >= 0:
            return xxhash.xxh3_64_intdigest(self._small())
        return hash_pages(self._base, self.pieces, seed)

    def hash_each(self, sizes: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """xxh3_64 (seed 0) of each of the parts of ``sizes`` bytes that these bytes are, one after another. Raises ValueError."""
        each = np.asarray(sizes, np.int64)
        sums = np.empty(len(each), np.uint64)
        hash_each(self._base, self.pieces, np.ascontiguousarray(each), sums)
        return sums

    def tobytes(self) -> bytes:
        """The bytes, copied (for tests and small control data)."""
        if self._nbytes <= _SMALL_BYTES and self._offset >= 0:
            return self._small().tobytes()
        out = bytearray(self._nbytes)
        copy_pages(out, None, self._base, self.pieces)
        return bytes(out)

    def __repr__(self) -> str:
        return f"PageList({self._nbytes} bytes in {len(self.pieces)} pieces of {len(self._base)})"


_new = object.__new__


def _int64(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if values.size and (values.dtype.kind not in "iu" or values.max() > np.iinfo(np.int64).max):
        raise KVBufferError(f"offsets and lengths must be integers below 2^63, got {values.dtype}")
    return values.astype(np.int64)


def _checked(pieces: npt.ArrayLike | Iterable[tuple[int, int]], size: int) -> npt.NDArray[np.int64]:
    """A copy of ``pieces`` that fits a base of ``size`` bytes, without those of length zero."""
    given = np.asarray(pieces if isinstance(pieces, np.ndarray) else list(pieces))  # type: ignore[arg-type]
    if given.size == 0:
        return _NO_PIECES
    if given.ndim != 2 or given.shape[1] != 2:
        raise KVBufferError(f"pieces are pairs (offset, length): expected shape (n, 2), got {given.shape}")
    checked = _int64(given)
    offsets, lengths = checked[:, 0], checked[:, 1]
    bad = np.flatnonzero((offsets < 0) | (lengths < 0) | (offsets > size) | (lengths > size - offsets))
    if len(bad):
        i = int(bad[0])
        raise KVBufferError(f"piece {i}: offset {offsets[i]}, length {lengths[i]} does not fit a base of {size} bytes")
    return checked if lengths.all() else checked[lengths != 0]


_shared: dict[str, memoryview] = {}


def _scratch() -> memoryview:
    """Made when first needed: most processes never drain anything."""
    if "scratch" not in _shared:
        _shared["scratch"] = memoryview(bytearray(_SCRATCH_BYTES))
    return _shared["scratch"]


def _zeros() -> memoryview:
    if "zeros" not in _shared:
        _shared["zeros"] = memoryview(bytes(_SCRATCH_BYTES))
    return _shared["zeros"]
