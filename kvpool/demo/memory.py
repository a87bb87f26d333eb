"""The memory of a pretended engine: paged, its pages in no order, as a running engine's are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from kvtransport.buffers import Arena, PageList
from kvtransport.errors import IntegrityError
from kvtransport.layout import Extent

from .synthetic import SyntheticCache

PAGE_TOKENS = 16
"""Tokens of one engine page of one layer and tensor (vLLM's default block size)."""
ALIGN = 64


def _room(extent: Extent) -> int:
    page = PAGE_TOKENS * extent.unit
    size = extent.nbytes if _is_state(extent) else -(-extent.nbytes // page) * page
    return -(-size // ALIGN) * ALIGN


def _is_state(extent: Extent) -> bool:
    return all(span.tokens == 0 for span in extent.spans)


class EngineMemory:
    """Places extents in one arena; :meth:`reset` makes it empty again."""

    def __init__(self, nbytes: int, *, seed: int, name: str) -> None:
        self._arena = Arena(nbytes, name=name)
        self._size = nbytes
        self._used = 0
        self._rng = np.random.default_rng(seed)

    @staticmethod
    def size_of(extents: Iterable[Extent]) -> int:
        """Bytes that placing them takes."""
        return sum(_room(e) for e in extents)

    @property
    def nbytes(self) -> int:
        return self._size

    def reset(self) -> None:
        """Start over; the bytes of what was there are wiped, so that they cannot pass for new ones."""
        np.frombuffer(memoryview(self._arena)[: self._used], np.uint8).fill(0)
        self._used = 0

    def place(self, extents: Iterable[Extent]) -> dict[tuple[int, int], PageList]:
        """Memory for each extent: states in one piece, tokens in shuffled pages of PAGE_TOKENS tokens."""
        placed: dict[tuple[int, int], PageList] = {}
        for extent in extents:
            start, self._used = self._used, self._used + _room(extent)
            if self._used > self._size:
                raise AssertionError(f"the engine's memory of {self._size} bytes was sized too small")
            if _is_state(extent):
                pages = PageList(self._arena, [(start, extent.nbytes)])
            else:
                page = PAGE_TOKENS * extent.unit
                order = self._rng.permutation(-(-extent.nbytes // page))
                pages = PageList.pages(self._arena, start + order * page, page, extent.nbytes)
            placed[extent.layer, extent.tensor] = pages
        return placed


def fill(pages: PageList, cache: SyntheticCache, extent: Extent) -> None:
    """Compute an extent: write its bytes."""
    pages.copy_from(cache.extent(extent))


def check(
    placed: Mapping[tuple[int, int], PageList], cache: SyntheticCache, extents: Iterable[Extent], what: str
) -> None:
    """Compute what extents must hold and compare by hash. Raises IntegrityError naming the first that does not."""
    for extent in extents:
        pages = placed[extent.layer, extent.tensor]
        if pages.hash() != cache.extent(extent).hash():
            raise IntegrityError(
                f"{what}, tensor {extent.tensor}: its {extent.nbytes} bytes are not those that the tokens give, "
                "although every checksum was right"
            )
