"""The memory the loopback benchmark moves bytes between: one request's cache, several times over, paged or not.

Both ends keep as many copies of the cache as make their memory larger than the processor's caches, and take the next
copy each round: otherwise a small cache would be sent from, and received into, the last-level cache.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from ..buffers import Arena, PageList
from ..layout import CacheLayout, GroupKind
from ..manifest import Manifest

BLOCK_TOKENS = 16
"""Tokens of a page by default: the block of vLLM and SGLang on CUDA devices."""
SPARE = 4
"""One page in so many more than are needed, so that neighbours in the cache are rarely neighbours in memory."""
MAX_BUFFER_BYTES = 1 << 30
_ALIGN = 64
_PIECE = 64 << 20


def default_buffer_bytes() -> int:
    """Twice the last-level cache, at most 1 GiB; 256 MiB where the system does not tell its caches."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return min(MAX_BUFFER_BYTES, 2 * max(sizes, default=128 << 20))


def copies(total_bytes: int, buffer_bytes: int) -> int:
    """How many copies of ``total_bytes`` make at least ``buffer_bytes``."""
    return max(1, -(-buffer_bytes // max(1, total_bytes)))


def page_sizes(layout: CacheLayout, page_bytes: int | None, *, contiguous: bool) -> dict[tuple[int, int], int]:
    """Bytes of a page by (layer, tensor); 0 means that the tensor lies in one piece.

    By default the block of 16 tokens of that tensor, and a recurrent state in one piece, as engines keep them;
    ``page_bytes`` cuts everything into pages of one size.
    """
    sizes = {}
    for slot in layout.slots():
        state = layout.groups[slot.group].kind is GroupKind.RECURRENT
        block = 0 if state else BLOCK_TOKENS * slot.spec.nbytes
        sizes[slot.layer, slot.tensor] = 0 if contiguous else block if page_bytes is None else page_bytes
    return sizes


class CacheMemory:
    """``count`` copies of a manifest's cache in one arena. ``pages[i]`` names copy i by (layer, tensor)."""

    def __init__(
        self, manifest: Manifest, sizes: dict[tuple[int, int], int], *, count: int, seed: int, name: str
    ) -> None:
        rng = np.random.Generator(np.random.SFC64(seed))
        self.total_bytes = manifest.total_bytes
        places: list[tuple[int, tuple[int, int], int, int]] = []
        at = 0
        for copy in range(count):
            for slot, extent in manifest.by_slot.items():
                page = sizes[slot] or max(1, extent.nbytes)
                wanted = -(-extent.nbytes // page)
                room = wanted + wanted // SPARE if sizes[slot] else wanted
                places.append((copy, slot, at, room))
                at += -(-room * page // _ALIGN) * _ALIGN
        self.arena = Arena(max(1, at), memfd=False, cuda="off", lock="off", name=name)
        self.view = memoryview(self.arena)
        self._bytes = np.frombuffer(self.view, np.uint8)
        self.pages: list[dict[tuple[int, int], PageList]] = [{} for _ in range(count)]
        for copy, slot, start, room in places:
            nbytes = manifest.by_slot[slot].nbytes
            page = sizes[slot] or max(1, nbytes)
            chosen = rng.permutation(room)[: -(-nbytes // page)] if sizes[slot] else np.arange(min(1, nbytes))
            self.pages[copy][slot] = PageList.pages(self.view, start + chosen * page, page, nbytes)
        self._rng = rng

    def fill_random(self) -> None:
        for start in range(0, len(self._bytes), _PIECE):
            part = self._bytes[start : start + _PIECE]
            # Raw 64-bit words: ten times faster than Generator.bytes.
            part[:] = self._rng.bit_generator.random_raw(-(-len(part) // 8)).view(np.uint8)[: len(part)]

    def blank(self, copy: int) -> None:
        """Overwrite one copy, so that bytes of an earlier round cannot pass for this round's."""
        for pages in self.pages[copy].values():
            pages.copy_from(PageList.zeros(pages.nbytes))

    def digests(self, copy: int) -> list[int]:
        """xxh3_64 of every (layer, tensor) in the manifest's order."""
        return [pages.hash() for pages in self.pages[copy].values()]

    def close(self) -> None:
        """Give the memory back; what a transfer that has just ended still holds of it is freed when it lets go."""
        self.pages.clear()
        del self._bytes
        with contextlib.suppress(BufferError):
            self.view.release()
            self.arena.close()
