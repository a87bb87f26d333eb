"""The default: recency, FLOPs saved per byte, and how likely a sequence is to go on.

After Marconi (MLSys 2025, arXiv 2411.19379; written from the paper): an entry's rank is its recency plus alpha times the FLOPs a hit
saves relative to its parent, per byte; blocks and states stand in one ranking, interior nodes give up only their state, and alpha
is tuned on-line by replaying what was asked for. Here the replay never stops (see :mod:`kvpool.eviction.shadow`), so there is no
pause, and new weights apply to an entry when it is touched.

Beyond the paper: beta, the weight of the odds that the sequence is continued (see :mod:`kvpool.eviction.continuing`). Where memory is
scarce, recency alone evicts everything before anybody comes back; keeping fewer sequences for longer, those that are likely to
go on, is worth several times the hits. Where there is room beta comes out small, and what is left is recency.

All weights are in units of *span*: the ticks in which traffic fills the pool once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import FIRST, Floats, Shelf, Stored, Ticks
from .continuing import REMEMBERED, Continuing, kind_of
from .lru import Lru
from .shadow import Shadow, Shown

HALF_LIFE = 2_000
"""Sequences after which what was learnt counts half."""
FADE = 0.5 ** (1 / HALF_LIFE)
MAX_WAITING = 64
"""Sequences that wait to be replayed; more are replayed at once."""
WARM = 200
"""Sequences to see before the weights are changed."""
SHADOW_SEGMENTS = 1 << 15
"""Larger pools replay a sample of the conversations against as much smaller shadows (as SHARDS does, FAST 2015)."""
MARGIN = 1.005
"""Candidates must have saved so many times what the weights in use would have."""
HORIZON_SPANS = 8
"""Who is continued later than this counts as not continued."""


@dataclass(frozen=True, slots=True)
class Weights:
    """``alpha`` of FLOPs per byte, ``beta`` of the odds of going on (both in doublings over the mean); in spans."""

    alpha: float = 0.0
    beta: float = 0.0


DEFAULT = Weights(0.0, 0.125)
CANDIDATES = (
    Weights(0.0, 0.0),
    Weights(0.0, 0.125),
    Weights(0.0, 0.5),
    Weights(0.0, 1.0),
    Weights(0.0, 2.5),
    Weights(0.0, 5.0),
    Weights(0.25, 2.5),
)


class Marconi(Lru):
    """``tuned=False`` keeps ``weights``. ``candidates`` are replayed beside the pool, each on its own shadow."""

    name = "marconi"
    learns = True
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
        self.tuned = tuned
        self._candidates = candidates
        self._continuing = Continuing()
        self._shadows: list[Shadow] = []
        self._waiting: deque[tuple[int, Shown]] = deque()
        self._scores = np.zeros(len(candidates))
        self._asked = 0.0
        self._seen = 0
        self._share = 1.0
        self._now = 0
        self._ticks = 0.0
        self._pages = 0.0
        self._logs = 0.0
        self._count = 0

    def bind(self, shelves: Sequence[Shelf], capacity_pages: int) -> None:
        super().bind(shelves, capacity_pages)
        # Pages are more than the sequences that a pool holds at a time: a small pool has no use for a long memory.
        self._continuing = Continuing(min(REMEMBERED, self._capacity))

    def kind_of(self, turn: int, added_tokens: int) -> int:
        return kind_of(turn, added_tokens)

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], kind: int) -> Floats | None:
        ranks = touches.astype(np.float64)
        w = self.weights
        if w.beta and kind:
            ranks += self.span * w.beta * self._continuing.odds(kind)
        if w.alpha:
            ranks += self.span * w.alpha * self._relative(value)
        return ranks

    def first_rank(self, touches: Ticks, value: NDArray[np.float32], pages: NDArray[np.int32], kind: int) -> Floats:
        known = value[np.isfinite(value) & (value > 0)]
        if len(known):
            self._logs += float(np.log2(known).sum())
            self._count += len(known)
        self._ticks += int(touches[0]) - self._now
        self._pages += float(pages.sum())
        self._now = int(touches[0])
        if self._pages > 4 * self._capacity:
            self._pages /= 2
            self._ticks /= 2
        ranks = self.rank(touches, np.zeros(0, np.int32), value, kind)
        assert ranks is not None
        return ranks

    @property
    def span(self) -> float:
        """Ticks in which what is placed fills the pool once (0 before anything was)."""
        return self._ticks / self._pages * self._capacity if self._pages else 0.0

    def superseded(self, rank: float) -> float:
        return FIRST / 2

    def learn(self, sequence: Stored) -> None:
        horizon = max(self.span, float(len(sequence.keys))) * HORIZON_SPANS
        tag = self._continuing.stored(sequence.keys, sequence.added, sequence.kind, self._now, horizon)
        if not self.tuned:
            return
        if not self._shadows:
            held = sum(sequence.pages) + sum(pages for _, pages, _ in sequence.ends)
            self._share = min(1.0, SHADOW_SEGMENTS * held / len(sequence.keys) / self._capacity)
            size = int(self._capacity * self._share)
            self._shadows = [Shadow(w.alpha, w.beta, size) for w in self._candidates]
        if tag < self._share * (1 << 32):
            while len(self._waiting) > (MAX_WAITING - 1) * len(self._candidates):
                self.work()
            self._show(sequence)

    def work(self) -> bool:
        """Replay the oldest sequence that waits on one more candidate's shadow."""
        if self._waiting:
            i, shown = self._waiting.popleft()
            if i == 0:
                self._asked = self._asked * FADE + sum(shown.tokens)
            self._scores[i] = self._scores[i] * FADE + self._shadows[i].request(shown)
            if i + 1 == len(self._candidates):
                self._choose()
        return bool(self._waiting)

    def describe(self) -> dict[str, Any]:
        tried = [
            {"alpha": w.alpha, "beta": w.beta, "token_hit_rate": float(score) / self._asked if self._asked else 0.0}
            for w, score in zip(self._candidates, self._scores, strict=True)
        ]
        chosen = {"alpha": self.weights.alpha, "beta": self.weights.beta, "tuned": self.tuned}
        return {**chosen, "candidates": tried if self.tuned else []}

    def _show(self, sequence: Stored) -> None:
        """Have the sequence replayed on every shadow."""
        mean = self._logs / self._count if self._count else 0.0
        shown = Shown(
            [hash(key) for key in sequence.keys],
            sequence.pages,
            sequence.tokens,
            [math.log2(v) - mean if v > 0 else 0.0 for v in sequence.value],
            [(i, pages, math.log2(v) - mean if v > 0 else 0.0) for i, pages, v in sequence.ends],
            sequence.needs_ends,
            self._continuing.odds(sequence.kind),
        )
        self._waiting += [(i, shown) for i in range(len(self._candidates))]

    def _choose(self) -> None:
        """A sequence was replayed everywhere: take the weights of the best when it is better by the margin."""
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
