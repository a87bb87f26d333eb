"""What a cached prefix saves: an estimate of prefill FLOPs from the cache layout alone.

Marconi (MLSys 2025, arXiv 2411.19379) counts, for a model of width D and L tokens, per layer

* attention: ``8 L D^2 + 4 L^2 D``; with a sliding window of W tokens the second term is ``4 L min(L, W) D``,
* state space of state dimension N: ``12 L D^2 + 16 L D N + 10 L D``,
* the MLP of every layer: ``16 L D^2``.

A cache layout knows neither D nor the number of query heads, so D is estimated: the values of a recurrent state over its key
dimension (heads x value dimension), or 8 times the K values per token of an attention layer (8 query heads per KV head), whichever
of all groups is largest. Policies only compare these numbers with one another, and tune how much they count.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtransport.layout import CacheGroup, CacheLayout, GroupKind

from .base import Floats

Ints = NDArray[np.int64]

QUERY_HEADS_PER_KV_HEAD = 8


class FlopsModel:
    """Prefill FLOPs of the first ``n`` tokens of ``layout`` (whole model, all tensor-parallel ranks' share of it)."""

    def __init__(self, layout: CacheLayout) -> None:
        self.width = max(_width(g) for g in layout.groups)
        d = float(self.width)
        self._linear = self._square = 0.0
        self._windows: list[tuple[int, float]] = []
        for group in layout.groups:
            layers = len(group.layers)
            self._linear += layers * 16 * d * d
            if group.kind is GroupKind.RECURRENT:
                self._linear += layers * (12 * d * d + 16 * d * _state_dim(group) + 10 * d)
                continue
            self._linear += layers * 8 * d * d
            if group.window is None:
                self._square += layers * 4 * d
            else:
                self._windows.append((group.window, layers * 4 * d))

    def upto(self, tokens: ArrayLike) -> Floats:
        """FLOPs of prefilling ``tokens`` tokens (elementwise), from nothing."""
        n = np.asarray(tokens, dtype=np.float64)
        total = self._linear * n + self._square * n * n
        for window, factor in self._windows:
            total = total + factor * n * np.minimum(n, window)
        return total

    def between_checkpoints(self, stops: Ints, earlier: Ints, gap: int) -> Floats:
        """FLOPs that each entry of a checkpoint at ``stops`` (tokens, ascending) saves after the last of ``earlier``.

        Entries not more than ``gap`` tokens apart are the blocks of one window: they serve one checkpoint, and share it.
        """
        saved = np.empty(len(stops))
        for run in np.split(np.arange(len(stops)), np.flatnonzero(np.diff(stops) > gap) + 1):
            before = earlier[earlier < stops[run[0]]]
            since = int(before[-1]) if len(before) else 0
            saved[run] = float(self.upto(int(stops[run[-1]])) - self.upto(since)) / len(run)
        return saved


def _state_dim(group: CacheGroup) -> int:
    """The key dimension of the largest state tensor (its last but one axis; 1 where it has none)."""
    shape = max((t.shape for t in group.tensors), key=prod)
    return shape[-2] if len(shape) > 1 else 1


def _width(group: CacheGroup) -> int:
    if group.kind is GroupKind.RECURRENT:
        shape = max((t.shape for t in group.tensors), key=prod)
        return max(1, prod(shape) // _state_dim(group))
    return QUERY_HEADS_PER_KV_HEAD * max(1, max(prod(t.shape) for t in group.tensors))
