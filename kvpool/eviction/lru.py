"""Least recently used goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Floats, Order, Shelf, Stored, Ticks
from .heap import HeapOrder


class Lru:
    """Ranks by the tick of the last touch. Base of the other policies that rank by number."""

    name = "lru"
    learns = False
    orphans_first = False
    queues_interior = False

    def __init__(self) -> None:
        self._shelves: Sequence[Shelf] = ()
        self._capacity = 1

    def bind(self, shelves: Sequence[Shelf], capacity_pages: int) -> None:
        self._shelves, self._capacity = shelves, max(1, capacity_pages)

    def order(self) -> Order:
        return HeapOrder(self._shelves)

    def kind_of(self, turn: int, added_tokens: int) -> int:
        return 0

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], kind: int) -> Floats | None:
        return touches.astype(np.float64)

    def first_rank(self, touches: Ticks, value: NDArray[np.float32], pages: NDArray[np.int32], kind: int) -> Floats:
        return touches.astype(np.float64)

    def superseded(self, rank: float) -> float:
        return rank

    def evicted(self, rank: float) -> None:
        pass

    def learn(self, sequence: Stored) -> None:
        pass

    def work(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {}
