"""Flat objects of a client as one extent of a transfer: what lies where, and what is copied together on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from kvtransport.buffers import PageList
from kvtransport.errors import ProtocolError

from .messages import numbers_to_wire

SMALL_BYTES = 256 << 10
"""Smaller objects in memory of their own are copied together: that costs less than a frame each."""
GATHER_BYTES = 4 << 20
"""Copied together at most."""
RUN_BYTES = 2 << 20
"""Hashed in one go: keeps an event loop for some 0.2 ms."""

Sizes = NDArray[np.int64]
Sums = NDArray[np.uint64]


def pages_of(buffer: Any) -> PageList:
    """``buffer`` as a page list; one that is a page list already stays."""
    return buffer if isinstance(buffer, PageList) else PageList.of(buffer)


def joined(pages: Sequence[PageList]) -> PageList | None:
    """All of ``pages``, one after another, as one list; None when they do not lie in one buffer."""
    if pages:
        base = pages[0].base
        if any(p.base is not base for p in pages):
            return None
    return PageList.joined(pages)


def packed(pages: Sequence[PageList]) -> dict[str, bytes]:
    """Small objects as a call carries them: bytes, sizes and xxh3_64 of each."""
    sizes = numbers_to_wire([p.nbytes for p in pages])
    return {
        "sizes": sizes,
        "checksums": numbers_to_wire([p.hash() for p in pages]),
        "data": b"".join([p.tobytes() for p in pages]),
    }


def unpacked(
    data: object, found: Sequence[bool], sizes: Sequence[int], checksums: Sequence[int]
) -> tuple[list[bytes | None], list[int]]:
    """Small objects as an answer carries them: each, None where there is none, and which do not have their checksum (None too).

    ``sizes`` and ``checksums`` are of those ``found``, none negative. Raises ProtocolError when they do not go together.
    """
    if not isinstance(data, bytes) or len(data) != sum(sizes):
        raise ProtocolError("the objects that came with the answer are not as long as it says")
    objects: list[bytes | None] = [None] * len(found)
    wrong: list[int] = []
    at, each = 0, iter(zip(sizes, checksums, strict=True))
    for i, there in enumerate(found):
        if there:
            size, checksum = next(each)
            piece = data[at : at + size]
            at += size
            if xxh3_64_intdigest(piece) == checksum:
                objects[i] = piece
            else:
                wrong.append(i)
    return objects, wrong


def copied(objects: Sequence[bytes | None], into: Sequence[PageList]) -> list[int | None]:
    """Each object at the beginning of its place; bytes of each. Raises KVBufferError for one that does not fit, before any is copied."""
    places = [None if o is None else place.slice(0, len(o)) for o, place in zip(objects, into, strict=True)]
    for data, place in zip(objects, places, strict=True):
        if data is not None and place is not None:
            place.copy_from(PageList.of(data))
    return [None if o is None else len(o) for o in objects]


def sizes_of(pages: Sequence[PageList]) -> Sizes:
    """Bytes of each."""
    return np.fromiter((p.nbytes for p in pages), np.int64, len(pages))


def runs(sizes: Sizes, nbytes: int) -> Iterator[tuple[int, int]]:
    """Objects in runs of about ``nbytes`` bytes: (first, one after the last)."""
    ends = sizes.cumsum()
    first = base = 0
    while first < len(sizes):
        stop = max(first + 1, int(ends.searchsorted(base + nbytes, "right")))
        yield first, stop
        first, base = stop, int(ends[stop - 1])


async def checksums_of(pages: Sequence[PageList], sizes: Sizes, whole: PageList | None) -> Sums:
    """xxh3_64 of each object, with room for others between runs: an event loop that sends meanwhile goes on doing so.

    ``whole``: what :func:`joined` says of all of them.
    """
    sums = np.empty(len(pages), np.uint64)
    ends = sizes.cumsum()
    for first, stop in runs(sizes, RUN_BYTES):
        if first:
            await asyncio.sleep(0)
        if whole is not None:
            some = whole.slice(int(ends[first - 1]) if first else 0, int(ends[stop - 1]))
            sums[first:stop] = some.hash_each(sizes[first:stop])
        else:
            sums[first:stop] = [p.hash(0) for p in pages[first:stop]]
    return sums


async def are_right(whole: PageList, sizes: Sizes, checksums: Sums) -> NDArray[np.bool_]:
    """Which of the objects of ``sizes`` bytes, one after another in ``whole``, have their checksum; with room for others as above."""
    right = np.zeros(len(sizes), np.bool_)
    ends = sizes.cumsum()
    for first, stop in runs(sizes, RUN_BYTES):
        if first:
            await asyncio.sleep(0)
        pages = whole.slice(int(ends[first - 1]) if first else 0, int(ends[stop - 1]))
        right[first:stop] = pages.hash_each(sizes[first:stop]) == checksums[first:stop]
    return right


def units(pages: Sequence[PageList], whole: PageList | None) -> Iterator[tuple[int, PageList]]:
    """What to hand over of the extent that ``pages`` are one after another: (start in bytes, where it lies).

    ``whole`` when all lie in one buffer (see :func:`joined`); otherwise each large object by itself, and small ones copied together.
    """
    if whole is not None:
        yield 0, whole
        return
    at = first = 0
    small: list[PageList] = []
    for page_list in pages:
        if page_list.nbytes >= SMALL_BYTES or at + page_list.nbytes - first > GATHER_BYTES:
            if small:
                yield first, gathered(small)
                small = []
            first = at
        if page_list.nbytes >= SMALL_BYTES:
            yield at, page_list
            first = at + page_list.nbytes
        else:
            small.append(page_list)
        at += page_list.nbytes
    if small:
        yield first, gathered(small)


def gathered(pages: Sequence[PageList]) -> PageList:
    """A copy of all of ``pages``, one after another."""
    target = PageList.of(np.empty(sum(p.nbytes for p in pages), np.uint8))
    at = 0
    for page_list in pages:
        target.slice(at, at + page_list.nbytes).copy_from(page_list)
        at += page_list.nbytes
    return target


class Landing:
    """Where the objects of a get arrive: in memory of ours, or in the caller's when all of it lies in one buffer.

    ``into[i]`` takes the i-th object asked for and must be at least as large as it; None: all in memory of ours.
    """

    def __init__(self, into: Sequence[PageList] | None) -> None:
        self._into = into
        self._sizes: list[int] = []
        self._whole = PageList.of(b"")
        self._aside = True

    def grant(self, sizes: Sequence[int]) -> PageList:
        """The place for objects of ``sizes`` bytes (-1: not there). Raises KVBufferError for one that does not fit."""
        self._sizes = list(sizes)
        total = sum(n for n in sizes if n > 0)
        whole = None
        if self._into is not None:
            # slice() says which one is too small
            places = zip(self._into, sizes, strict=True)
            whole = joined([p if p.nbytes == n else p.slice(0, n) for p, n in places if n >= 0])
        self._aside = whole is None
        self._whole = PageList.of(np.empty(total, np.uint8)) if whole is None else whole
        return self._whole

    def deliver(self) -> None:
        """Have each object where the caller wants it: copied there when it arrived elsewhere. Valid after the transfer."""
        if self._aside and self._into is not None:
            self.objects()

    def objects(self) -> list[PageList | None]:
        """Each object where the caller wants it: copied there when it arrived elsewhere. Valid after the transfer."""
        found: list[PageList | None] = []
        at = 0
        for i, size in enumerate(self._sizes):
            if size < 0:
                found.append(None)
                continue
            pages = self._whole.slice(at, at + size)
            at += size
            if self._into is not None:
                place = self._into[i].slice(0, size)
                if self._aside:
                    place.copy_from(pages)
                pages = place
            found.append(pages)
        return found
