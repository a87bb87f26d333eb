"""Greedy-Dual-Size-Frequency (Cherkasova, HP Laboratories 1998): inflation + frequency x cost / size.

Cost over size is the FLOPs a hit saves over the entry's bytes, in units of the mean of what was placed. An entry of
unknown cost counts as the mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import FIRST, Floats, Ticks
from .lru import Lru


class Gdsf(Lru):
    """The rank of the last evicted is the inflation that entries touched later start from."""

    name = "gdsf"

    def __init__(self) -> None:
        super().__init__()
        self._inflation = 0.0
        self._sum = 0.0
        self._count = 0

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], kind: int) -> Floats | None:
        mean = self._sum / self._count if self._count and self._sum else 1.0
        cost = np.nan_to_num(value.astype(np.float64) / mean, nan=1.0)
        return self._inflation + (1.0 + uses) * cost

    def first_rank(self, touches: Ticks, value: NDArray[np.float32], pages: NDArray[np.int32], kind: int) -> Floats:
        known = value[np.isfinite(value)]
        self._sum += float(known.sum())
        self._count += len(known)
        ranks = self.rank(touches, np.zeros(len(touches), np.int32), value, kind)
        assert ranks is not None
        return ranks

    def evicted(self, rank: float) -> None:
        if rank > FIRST:
            self._inflation = max(self._inflation, rank)
