"""One byte budget cut into fixed pages: blocks, states and transfer-cache bytes draw from it alike.

Pages of one size have no fragmentation: what is free can hold anything, however long the pool has been churning.
An allocation is a *slab*: a list of pages that need not be neighbours, read and written through page lists.
No operation makes a Python call per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransport.buffers import Arena, PageList
from kvtransport.errors import ConfigError

from .errors import PoolFullError, SlabError

Pages = NDArray[np.int32]
Pieces = NDArray[np.int64]

MIN_PAGE_BYTES = 64
_FREED_TWICE = "a slab was freed twice: its pages belong to another one or to nobody"
NO_PIECES: Pieces = np.empty((0, 2), dtype=np.int64)


class BlockClass(IntEnum):
    """What a slab's bytes are for."""

    PREFIX = 0
    """Blocks of the prefix cache, and flat objects."""
    STATE = 1
    """Recurrent states."""
    TRANSFER = 2
    """Bytes kept for one transfer, freed when it is done."""


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """One allocation: page numbers in order (int32), the bytes asked for, and the generation of its pages."""

    pages: Pages
    nbytes: int
    generation: int
    kind: BlockClass

    @property
    def page_count(self) -> int:
        return len(self.pages)


@dataclass(frozen=True, slots=True, eq=False)
class Slabs:
    """Allocations of ``nbytes`` bytes each: row i of ``pages`` (int32, of shape (n, pages each)) has ``generation[i]`` (int64).

    What an index of millions of blocks keeps and hands around instead of as many :class:`Slab`.
    """

    pages: Pages
    nbytes: int
    generation: NDArray[np.int64]
    kind: BlockClass

    @classmethod
    def of(cls, slabs: Sequence[Slab]) -> Slabs:
        """One or more slabs of one size and kind."""
        generations = np.array([s.generation for s in slabs], dtype=np.int64)
        return cls(np.stack([s.pages for s in slabs]), slabs[0].nbytes, generations, slabs[0].kind)

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int) -> Slab:
        return Slab(self.pages[index], self.nbytes, int(self.generation[index]), self.kind)

    @property
    def page_count(self) -> int:
        return int(self.pages.size)

    def take(self, rows: NDArray[Any] | slice) -> Slabs:
        """Some of them: a slice, row numbers, or a mask."""
        return Slabs(self.pages[rows], self.nbytes, self.generation[rows], self.kind)


class PageArena:
    """Cuts ``arena`` into pages of ``page_bytes`` bytes. Not thread-safe: one owner loop.

    ``page_generation[p]`` is the generation of the slab that owns page p, 0 when free: whoever reads pages
    without holding a pin compares it before and after. ``share`` puts it into memory that other processes may map
    (``generation_arena``).
    """

    def __init__(self, arena: Arena, page_bytes: int = 65536, *, share: bool = False) -> None:
        if page_bytes < MIN_PAGE_BYTES or page_bytes % MIN_PAGE_BYTES:
            raise ConfigError(f"page_bytes must be a multiple of {MIN_PAGE_BYTES}, got {page_bytes}")
        view = memoryview(arena)
        size = view.nbytes
        count = size // page_bytes
        if not 0 < count < 1 << 31:
            raise ConfigError(
                f"an arena of {size} bytes has {count} pages of {page_bytes} bytes, 1 to {(1 << 31) - 1} are possible: "
                "give the pool more memory or choose another page size"
            )
        self.arena = arena
        self._view = view
        self._whole = PageList.of(view)
        self.page_bytes = page_bytes
        self.total_pages = count
        self.generation_arena = (
            Arena(count * 8, lock="off", cuda="off", huge="off", name="kvpool-generations") if share else None
        )
        self.page_generation: NDArray[np.int64] = (
            np.empty(count, dtype=np.int64)
            if self.generation_arena is None
            else np.frombuffer(memoryview(self.generation_arena), np.int64, count)
        )
        self.page_generation[:] = 0  # written: memory that is touched for the first time takes its time, later, from a put
        # Popped from the end: the first allocations get ascending, adjacent pages.
        self._free = np.arange(count - 1, -1, -1, dtype=np.int32)
        self._top = count
        self._generation = 0
        self._pages_of_class = [0] * len(BlockClass)

    # -- accounting ------------------------------------------------------------------------------

    @property
    def total_bytes(self) -> int:
        return self.total_pages * self.page_bytes

    @property
    def free_pages(self) -> int:
        return self._top

    @property
    def free_bytes(self) -> int:
        return self._top * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return (self.total_pages - self._top) * self.page_bytes

    def bytes_of(self, kind: BlockClass) -> int:
        """Bytes of the pages held by slabs of ``kind``."""
        return self._pages_of_class[kind] * self.page_bytes

    def pages_for(self, nbytes: int) -> int:
        """Pages that a slab of ``nbytes`` takes."""
        return -(-nbytes // self.page_bytes)

    # -- allocating ------------------------------------------------------------------------------

    def allocate(self, nbytes: int, kind: BlockClass) -> Slab:
        """One slab of ``nbytes`` bytes; raises PoolFullError when there are not enough free pages."""
        return self.allocate_many([nbytes], kind)[0]

    def allocate_many(self, sizes: Sequence[int], kind: BlockClass) -> list[Slab]:
        """A slab of each size, all or none; they get neighbouring pages where there are any."""
        counts = [-(-n // self.page_bytes) for n in sizes]
        if any(n < 0 for n in sizes):
            raise SlabError(f"a slab cannot have {min(sizes)} bytes")
        pages = self._take(sum(counts), kind)
        slabs, at = [], 0
        for nbytes, count in zip(sizes, counts, strict=True):
            slabs.append(Slab(pages[at : at + count], nbytes, self._generation, kind))
            at += count
        return slabs

    def allocate_rows(self, count: int, nbytes: int, kind: BlockClass) -> Slabs:
        """``count`` slabs of ``nbytes`` bytes, all or none; raises as :meth:`allocate_many`."""
        if count < 0 or nbytes < 0:
            raise SlabError(f"there are no {count} slabs of {nbytes} bytes")
        pages = self._take(count * self.pages_for(nbytes), kind)
        owners = np.full(count, self._generation, dtype=np.int64)
        return Slabs(pages.reshape(count, self.pages_for(nbytes)), nbytes, owners, kind)

    def _take(self, total: int, kind: BlockClass) -> Pages:
        """``total`` free pages in ascending order, under a new generation."""
        if total > self._top:
            raise PoolFullError(
                f"asked for {total} pages of {self.page_bytes} bytes, {self._top} of {self.total_pages} are free"
            )
        self._top -= total
        pages = self._free[self._top : self._top + total].copy()
        if total > 1:
            pages.sort()
        self._generation += 1
        self.page_generation[pages] = self._generation
        self._pages_of_class[kind] += total
        return pages

    def is_live(self, slab: Slab) -> bool:
        """Whether the slab still owns all its pages."""
        if len(slab.pages) == 1:
            return bool(self.page_generation[slab.pages[0]] == slab.generation)
        return bool((self.page_generation[slab.pages] == slab.generation).all())

    def free(self, slab: Slab | Slabs) -> None:
        """Give a slab back; raises SlabError, changing nothing, when it was freed already."""
        self.free_many([slab])

    def free_many(self, slabs: Sequence[Slab | Slabs]) -> None:
        """Give slabs back in one go; raises SlabError, changing nothing, when any of them was freed already."""
        if not any(s.page_count for s in slabs):
            return
        if len(slabs) == 1 and isinstance(slabs[0], Slab) and len(slabs[0].pages) == 1:
            self._free_page(slabs[0])  # a small object, without arrays
            return
        pages = np.concatenate([s.pages.reshape(-1) for s in slabs])
        single = [s for s in slabs if isinstance(s, Slab)]
        counts = np.fromiter((len(s.pages) for s in single), np.int64, len(single))
        owners = np.repeat(np.fromiter((s.generation for s in single), np.int64, len(single)), counts)
        if len(single) < len(slabs):
            parts = iter(np.split(owners, counts.cumsum()[:-1]) if single else ())
            owners = np.concatenate(
                [next(parts) if isinstance(s, Slab) else np.repeat(s.generation, s.pages.shape[1]) for s in slabs]
            )
        # Descending, so that the next allocation finds neighbours in ascending order.
        order = np.sort(pages)[::-1]
        if not (self.page_generation[pages] == owners).all() or (order[1:] == order[:-1]).any():
            raise SlabError(_FREED_TWICE)
        self.page_generation[pages] = 0
        self._free[self._top : self._top + len(pages)] = order
        self._top += len(pages)
        for slab in slabs:
            self._pages_of_class[slab.kind] -= slab.pages.size

    def _free_page(self, slab: Slab) -> None:
        """:meth:`free_many` of one slab of one page."""
        page = slab.pages[0]
        if self.page_generation[page] != slab.generation:
            raise SlabError(_FREED_TWICE)
        self.page_generation[page] = 0
        self._free[self._top] = page
        self._top += 1
        self._pages_of_class[slab.kind] -= 1

    # -- reading and writing -----------------------------------------------------------------------

    def pages(self, slab: Slab, start: int = 0, stop: int | None = None) -> PageList:
        """Bytes ``[start, stop)`` of a slab; raises SlabError outside it, or when it was freed."""
        stop = slab.nbytes if stop is None else stop
        if not 0 <= start <= stop <= slab.nbytes:
            raise SlabError(f"bytes {start}..{stop} are not inside a slab of {slab.nbytes} bytes")
        if not self.is_live(slab):
            raise SlabError("a slab was used after it was freed")
        if len(slab.pages) == 1:
            at = int(slab.pages[0]) * self.page_bytes
            return self._whole.slice(at + start, at + stop)
        return self.page_list([self.pieces(slab.pages[None, :], start, stop - start)])

    def pages_of_blocks(self, slabs: Sequence[Slab] | Slabs | Pages, offset: int, nbytes_each: int) -> PageList:
        """Bytes ``[offset, offset + nbytes_each)`` of every slab, one after another.

        All slabs have the same number of pages; :meth:`stack` once, and pass the result, to take many ranges.
        """
        matrix = slabs if isinstance(slabs, np.ndarray) else self.stack(slabs)
        return self.page_list([self.pieces(matrix, offset, nbytes_each)])

    def pages_in_order(self, slabs: Sequence[Slab]) -> PageList:
        """All bytes of all slabs, one after another; raises SlabError when one was freed."""
        if not slabs:
            return self.page_list([NO_PIECES])
        if len(slabs) == 1:
            return self.pages(slabs[0])
        counts = np.fromiter((len(s.pages) for s in slabs), np.int64, len(slabs))
        pages = np.concatenate([s.pages for s in slabs])
        owners = np.repeat(np.fromiter((s.generation for s in slabs), np.int64, len(slabs)), counts)
        if not (self.page_generation[pages] == owners).all():
            raise SlabError("a slab was used after it was freed")
        pieces = np.empty((len(pages), 2), dtype=np.int64)
        np.multiply(pages, self.page_bytes, out=pieces[:, 0], dtype=np.int64)
        pieces[:, 1] = self.page_bytes
        some = counts > 0
        last = np.cumsum(counts)[some] - 1
        sizes = np.fromiter((s.nbytes for s in slabs), np.int64, len(slabs))
        pieces[last, 1] = (sizes - (counts - 1) * self.page_bytes)[some]
        return self.page_list([pieces])

    @staticmethod
    def stack(slabs: Sequence[Slab] | Slabs) -> Pages:
        """Page numbers of equally long slabs: int32 of shape (slabs, pages)."""
        if isinstance(slabs, Slabs):
            return slabs.pages
        if not slabs:
            return np.empty((0, 0), dtype=np.int32)
        return np.concatenate([s.pages for s in slabs]).reshape(len(slabs), -1)

    def pieces(self, matrix: Pages, offset: int, nbytes: int) -> Pieces:
        """(arena offset, length) of bytes ``[offset, offset + nbytes)`` of each row of ``matrix``; int64 of shape (n, 2)."""
        rows, columns = matrix.shape
        if rows == 0 or nbytes == 0:
            return NO_PIECES
        size = self.page_bytes
        first, last = offset // size, (offset + nbytes - 1) // size
        if offset < 0 or last >= columns:
            raise SlabError(
                f"bytes {offset}..{offset + nbytes} are not inside slabs of {columns} pages of {size} bytes"
            )
        out = np.empty((rows, last - first + 1, 2), dtype=np.int64)
        np.multiply(matrix[:, first : last + 1], size, out=out[:, :, 0], dtype=np.int64)
        out[:, :, 1] = size
        out[:, -1, 1] = offset + nbytes - last * size
        head = offset - first * size
        out[:, 0, 0] += head
        out[:, 0, 1] -= head
        return out.reshape(-1, 2)

    def page_list(self, parts: Sequence[Pieces]) -> PageList:
        """A page list over this arena of all ``parts`` in order, adjacent pieces joined."""
        return PageList(self._view, parts[0] if len(parts) == 1 else np.concatenate([NO_PIECES, *parts])).merged()

    def close(self) -> None:
        """Give the memory back; it stays mapped while page lists over it live."""
        self._view = memoryview(b"")
        self._whole = PageList.of(b"")
        self.arena.close()
        if self.generation_arena is not None:
            self.page_generation = np.zeros(0, dtype=np.int64)
            self.generation_arena.close()
