"""Cache bytes of a model that is not there: cheap to make, reproducible anywhere, wrong when anything moved.

As in a real model, what a layer caches for a token depends on the token, on all tokens before it, on the layer
and on the tensor. Each token's bytes are a window into one table of random bytes; where the window begins is a
hash of all of that. So a whole layer is a page list over the table: making it is one copy, checking it one hash,
at the speed of memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtransport.buffers import PageList
from kvtransport.layout import Extent, Span

TABLE_BYTES = 1 << 20
"""Windows begin at any byte of the first 1 MiB: two tokens look alike once in a million."""
SEGMENT_BYTES = 4096
"""Longest window: larger units (states) are several windows."""

Words = NDArray[np.uint64]


def mix(values: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class SyntheticCache:
    """The cache of one request: ``tokens`` uint32 of shape (n,)."""

    def __init__(self, tokens: NDArray[np.uint32], seed: int) -> None:
        self._table = np.random.default_rng(seed).integers(0, 256, TABLE_BYTES + SEGMENT_BYTES, np.uint8)
        at = np.arange(len(tokens), dtype=np.uint64)
        # A running sum: what stands at p depends on every token up to p.
        self._context: Words = np.cumsum(mix(tokens.astype(np.uint64) | at << np.uint64(32)), dtype=np.uint64)

    def extent(self, extent: Extent) -> PageList:
        """The bytes of an extent's whole byte space, read-only."""
        salt = mix(np.array([extent.layer << 16 | extent.tensor], np.uint64))[0]
        parts = [self._windows(span, salt, extent.unit) for span in extent.spans]
        return PageList(self._table, np.concatenate(parts))

    def _windows(self, span: Span, salt: np.uint64, unit: int) -> NDArray[np.int64]:
        """Pieces (offset, length) of the table for one span."""
        if span.tokens:
            keys = self._context[span.first : span.stop] ^ salt
        else:
            # The state after p tokens: that of the last one, and never the bytes that token itself has.
            keys = mix(self._context[span.first - 1 : span.first] ^ ~salt)
        count = -(-unit // SEGMENT_BYTES)
        numbers = np.arange(count, dtype=np.uint64)
        offsets = mix((keys[:, None] + mix(numbers)[None, :]).reshape(-1)) % np.uint64(TABLE_BYTES)
        lengths = np.full((len(keys), count), SEGMENT_BYTES, np.int64)
        lengths[:, -1] = unit - (count - 1) * SEGMENT_BYTES
        return np.stack([offsets.astype(np.int64), lengths.reshape(-1)], axis=1)
