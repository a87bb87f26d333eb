"""A stored sequence as learning policies see it: in segments, so that long prompts of small blocks stay cheap to replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Floats, Stored
from .flops import FlopsModel

SEGMENT_TOKENS = 512
"""Segments end at multiples of this (or of the block, where that is larger), and at checkpoints."""
FINE_SEGMENTS = 16
"""So many segments; behind them they are four times as long, and so on, that long prompts have few."""


def describe(
    keys: Callable[[NDArray[np.intp]], Sequence[tuple[int, bytes]]],
    *,
    positions: NDArray[np.int64],
    pages: NDArray[np.int32],
    end_pages: NDArray[np.int64],
    end_values: Floats,
    needs_ends: bool,
    flops: FlopsModel,
    page_bytes: int,
    added: int,
    kind: int,
) -> Stored:
    """The sequence whose blocks end at ``positions`` (tokens) and hold ``pages``; ``end_pages`` are its checkpoints' (0: none).

    ``keys`` names the blocks of given indices; ``end_values`` are FLOPs saved per byte. Blocks from ``added`` on were new.
    """
    blocks = max(1, SEGMENT_TOKENS // int(positions[0]))
    cut = end_pages > 0
    first = 0
    while first < len(cut):
        last = FINE_SEGMENTS * blocks
        cut[first + blocks - 1 - first % blocks : last : blocks] = True
        first, blocks = max(first, last), blocks * 4
    cut[-1] = True
    at = np.flatnonzero(cut)
    total = np.add.reduceat(pages.astype(np.int64), np.r_[0, at[:-1] + 1])
    stops = positions[at]
    value = np.diff(flops.upto(stops), prepend=0.0) / np.maximum(1, total * page_bytes)
    ends = [(i, int(end_pages[b]), float(end_values[b])) for i, b in enumerate(at.tolist()) if end_pages[b]]
    tokens = np.diff(stops, prepend=0).tolist()
    new = min(int(np.searchsorted(at, added)), len(at) - 1)
    return Stored(keys(at), total.tolist(), value.tolist(), tokens, ends, needs_ends, new, kind)
