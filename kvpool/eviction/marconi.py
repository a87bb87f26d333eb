"""The default: recency, FLOPs saved per byte, and how long a conversation already is.

After Marconi (MLSys 2025, arXiv 2411.19379; written from the paper): an entry's rank is its recency plus alpha times the FLOPs a hit
saves relative to its parent, per byte; blocks and states stand in one ranking, interior nodes give up only their state, and alpha
is tuned on-line by replaying what was asked for. Here the replay never stops (see :mod:`kvpool.eviction.shadow`), so there is no
pause, and a new alpha applies to an entry when it is touched.

Beyond the paper: beta, the weight of an entry's *turn*. A sequence that continued another one, which continued another one,
is far likelier to be continued again than a new one (on the Mooncake conversation trace 73% after eight turns, 32% after one);
turns are remembered for a while after eviction, else memory too small for a conversation would never learn that it is one.

All weights are in units of *span*: the ticks in which traffic fills the pool once.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import FIRST, Floats, Stored, Ticks
from .lru import Lru
from .shadow import Shadow

MOST_TURNS = 8
"""Longer conversations rank alike."""
HALF_LIFE = 1_000
"""Sequences after which what was learnt counts half."""
WARM = 200
"""Sequences to see before the weights are changed."""
SHADOW_PAGES = 1 << 19
"""Larger pools replay a sample of the sequences against as much smaller shadows (as SHARDS does, FAST 2015)."""
MARGIN = 1.01
"""Candidates must have saved so many times what the weights in use would have."""


@dataclass(frozen=True, slots=True)
class Weights:
    """``alpha`` of FLOPs per byte (in doublings over the mean), ``beta`` of the turn; both in spans."""

    alpha: float = 0.0
    beta: float = 0.0


DEFAULT = Weights(0.0, 0.25)
CANDIDATES = (
    Weights(0.0, 0.0),
    Weights(0.0, 0.0625),
    Weights(0.0, 0.25),
    Weights(0.0, 1.0),
    Weights(0.0, 3.0),
    Weights(0.125, 0.25),
    Weights(-0.125, 0.25),
)


class Marconi(Lru):
    """``tuned=False`` keeps ``weights``. ``candidates`` are replayed beside the pool, each on its own shadow."""

    name = "marconi"
    orphans_first = True

    def __init__(
        self,
        weights: Weights = DEFAULT,
        *,
        candidates: tuple[Weights, ...] = CANDIDATES,
        tuned: bool = True,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.learns = tuned
        self._candidates = candidates
        self._shadows: list[Shadow] = []
        self._scores = np.zeros(len(candidates))
        self._seen = 0
        self._ticks = 0.0
        self._pages = 0.0
        self._logs = 0.0
        self._count = 0

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], turn: int) -> Floats | None:
        ranks = touches.astype(np.float64)
        w = self.weights
        if w.beta:
            ranks += self.span * w.beta * min(turn, MOST_TURNS)
        if w.alpha:
            ranks += self.span * w.alpha * self._relative(value)
        return ranks

    def first_rank(self, touches: Ticks, value: NDArray[np.float32], pages: NDArray[np.int32], turn: int) -> Floats:
        known = value[np.isfinite(value) & (value > 0)]
        self._logs += float(np.log2(known).sum())
        self._count += len(known)
        self._ticks += len(touches)
        self._pages += float(pages.sum())
        if self._pages > 4 * self._capacity:
            self._pages /= 2
            self._ticks /= 2
        ranks = self.rank(touches, np.zeros(0, np.int32), value, turn)
        assert ranks is not None
        return ranks

    @property
    def span(self) -> float:
        """Ticks in which what is placed fills the pool once (0 before anything was)."""
        return self._ticks / self._pages * self._capacity if self._pages else 0.0

    def superseded(self, rank: float) -> float:
        return FIRST / 2

    def learn(self, sequence: Stored) -> None:
        share = min(1.0, SHADOW_PAGES / self._capacity)
        if zlib.crc32(sequence.keys[0][1]) >= share * (1 << 32):
            return
        if not self._shadows:
            self._shadows = [Shadow(w.alpha, w.beta, int(self._capacity * share)) for w in self._candidates]
        fade = 0.5 ** (1 / HALF_LIFE)
        mean = self._logs / self._count if self._count else 0.0
        relative = [math.log2(v) - mean if v > 0 else 0.0 for v in sequence.value]
        ends = [(i, pages, math.log2(v) - mean if v > 0 else 0.0) for i, pages, v in sequence.ends]
        turn = min(sequence.turn, MOST_TURNS)
        for i, shadow in enumerate(self._shadows):
            self._scores[i] = self._scores[i] * fade + shadow.request(sequence, relative, ends, turn)
        self._seen += 1
        if self._seen >= WARM:
            best = int(np.argmax(self._scores))
            now = self._candidates.index(self.weights) if self.weights in self._candidates else None
            if now is None or self._scores[best] > MARGIN * self._scores[now]:
                self.weights = self._candidates[best]

    def _relative(self, value: NDArray[np.float32]) -> Floats:
        """Doublings over the mean of what was placed; 0 where the value is unknown."""
        mean = self._logs / self._count if self._count else 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log2(value.astype(np.float64)) - mean
        return np.where(np.isfinite(logs), logs, 0.0)
