"""vLLM's cache tensors as page lists: which bytes of the backing memory a block of a layer is, without padding.

A layer's tensor is a view of ``[blocks, …]`` over memory that other layers and groups alias; its pages may be padded
and its blocks may be cut into kernel blocks. What travels is the content of a page in address order; the order of
its axes goes into the fingerprint (:attr:`PageShape.order`), so that sides which lay pages out differently refuse each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtransport.buffers import PageList
from kvtransport.errors import DestinationError, LayoutError

Pieces = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageShape:
    """The geometry of a layer's tensor, block by block. Bytes, relative to the start of the backing memory."""

    offset: int
    """Where block 0 begins."""
    stride: int
    """From one block to the next."""
    blocks: int
    pieces: Pieces
    """(offset in the block, length) of its content, ascending; shape (n, 2)."""
    order: str
    """Axes of the content from slow to fast, with their sizes."""

    @property
    def nbytes(self) -> int:
        """Content of one block."""
        return int(self.pieces[:, 1].sum())

    def part(self, start: int, stop: int) -> PageShape:
        """Bytes [start, stop) of the content only."""
        ends = np.cumsum(self.pieces[:, 1])
        begins = ends - self.pieces[:, 1]
        lo, hi = np.maximum(begins, start), np.minimum(ends, stop)
        kept = lo < hi
        pieces = np.stack((self.pieces[:, 0] + lo - begins, hi - lo), axis=1)[kept]
        return PageShape(self.offset, self.stride, self.blocks, pieces, f"{self.order}[{start}:{stop}]")

    def of(self, ids: Sequence[int], base: Any) -> PageList:
        """The page list of blocks ``ids`` in order. Raises DestinationError for an id that is no block."""
        blocks = np.asarray(ids, np.int64)
        if blocks.size and (blocks.min() < 1 or blocks.max() >= self.blocks):
            raise DestinationError(
                f"blocks are 1 to {self.blocks - 1} here, asked for {blocks.min()} to {blocks.max()}"
            )
        starts = self.offset + blocks * self.stride
        out = np.empty((len(blocks), len(self.pieces), 2), np.int64)
        out[:, :, 0] = starts[:, None] + self.pieces[None, :, 0]
        out[:, :, 1] = self.pieces[None, :, 1]
        return PageList(base, out.reshape(-1, 2)).merged()


def page_shape(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, offset: int, blocks: int, axes: str = "BHNC"
) -> PageShape:
    """The pages of a tensor ``shape`` with ``strides`` (elements), whose first axis is ``blocks`` or a multiple of it.

    ``offset``: bytes from the start of the backing memory to the first element. Raises LayoutError for tensors whose blocks overlap
    or cannot be told apart.
    """
    if len(shape) != len(axes) or not shape or shape[0] % blocks or shape[0] == 0:
        raise LayoutError(
            f"a cache tensor of shape {tuple(shape)} is not [{', '.join(axes)}] with a multiple of {blocks} blocks first"
        )
    ratio = shape[0] // blocks
    named = [
        (size, stride * itemsize, axis) for size, stride, axis in zip(shape[1:], strides[1:], axes[1:], strict=True)
    ]
    if ratio > 1:
        # Kernel blocks: a manager block is a few of them, a constant stride apart.
        named.append((ratio, strides[0] * itemsize, "K"))
    inner = sorted((d for d in named if d[0] > 1), key=lambda d: -d[1])
    order = "".join(f"{axis}{size}" for size, _, axis in inner) + f"x{itemsize}"
    # The innermost axes that lie densely are one piece; the others enumerate pieces.
    length = itemsize
    while inner and inner[-1][1] == length:
        length *= inner.pop()[0]
    starts = [sum(at) for at in itertools.product(*([i * stride for i in range(size)] for size, stride, _ in inner))]
    pieces = np.array([(start, length) for start in starts], np.int64)
    stride = strides[0] * itemsize * ratio
    gaps = np.diff(pieces[:, 0])
    if length <= 0 or (gaps < length).any() or (blocks > 1 and not inner and stride < length):
        raise LayoutError(f"a cache tensor of shape {tuple(shape)} with strides {tuple(strides)} has overlapping pages")
    assert len(pieces) * length == math.prod(shape[1:]) * ratio * itemsize
    return PageShape(offset, stride, blocks, pieces, order)
