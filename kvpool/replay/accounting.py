"""An arena that keeps accounts and no bytes: the pool over it decides as it would over memory, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from kvpool.arena import BlockClass, PageArena, Slab, Slabs
from kvpool.errors import PoolFullError, SlabError
from kvtransport.errors import ConfigError

UNLIMITED_PAGES = 1 << 50
FEW_PAGES = 32
"""A block is cut into at least so many pages."""


class AccountingArena(PageArena):
    """The interface of :class:`kvpool.arena.PageArena`; slabs have sizes, and page numbers that mean nothing.

    ``memory_bytes`` None: no limit. Reading or writing raises SlabError. Raises ConfigError for less than a page.
    """

    def __init__(self, memory_bytes: int | None, page_bytes: int = 65_536) -> None:
        self.page_bytes = page_bytes
        self.total_pages = UNLIMITED_PAGES if memory_bytes is None else memory_bytes // page_bytes
        if self.total_pages < 1:
            raise ConfigError(
                f"{memory_bytes} bytes are less than one page of {page_bytes}: give the replay more memory"
            )
        self._top = self.total_pages
        self._pages_of_class = [0] * len(BlockClass)
        self._generation = 0
        self._live: set[int] = set()

    def allocate_rows(self, count: int, nbytes: int, kind: BlockClass) -> Slabs:
        each = self.pages_for(nbytes)
        if count * each > self._top:
            raise PoolFullError(f"asked for {count * each} pages of {self.page_bytes} bytes, {self._top} are free")
        self._top -= count * each
        self._pages_of_class[kind] += count * each
        owners = np.arange(self._generation + 1, self._generation + count + 1, dtype=np.int64)
        self._generation += count
        self._live.update(owners.tolist())
        return Slabs(np.broadcast_to(np.int32(0), (count, each)), nbytes, owners, kind)

    def allocate_many(self, sizes: Sequence[int], kind: BlockClass) -> list[Slab]:
        return [self.allocate_rows(1, nbytes, kind)[0] for nbytes in sizes]

    def is_live(self, slab: Slab) -> bool:
        return slab.generation in self._live

    def free_many(self, slabs: Sequence[Slab | Slabs]) -> None:
        for slab in slabs:
            owners = {slab.generation} if isinstance(slab, Slab) else set(slab.generation.tolist())
            if not owners <= self._live:
                raise SlabError("a slab was freed twice")
            self._live -= owners
            self._top += slab.page_count
            self._pages_of_class[slab.kind] -= slab.page_count

    def pages(self, slab: Slab, start: int = 0, stop: int | None = None) -> NoReturn:
        raise SlabError("this arena keeps accounts only: there are no bytes in it")

    def close(self) -> None:
        self._live.clear()


def page_bytes_for(block_bytes: int, page_bytes: int = 65_536) -> int:
    """A multiple of ``page_bytes`` that cuts a block as exactly, into fewer pages: large blocks need not be many numbers."""
    pages = -(-block_bytes // page_bytes)
    factor = max((k for k in range(1, pages // FEW_PAGES + 1) if pages % k == 0), default=1)
    return factor * page_bytes
