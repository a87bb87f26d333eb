"""Prefix caches of a cluster, behind one small interface."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from ..traces import BlockCache


class PrefixCache(Protocol):
    """What the simulator asks of a cluster's cache; ``i`` is a request's number."""

    def match(self, i: int, tokens: float) -> float:
        """Tokens of the prompt that are cached here, below ``tokens``."""
        ...

    def insert(self, i: int, tokens: float) -> None:
        """The prompt was prefilled here."""
        ...


class NoCache:
    """Nothing is ever found."""

    def match(self, i: int, tokens: float) -> float:
        return 0.0

    def insert(self, i: int, tokens: float) -> None:
        return None


class SessionCache:
    """The last prompt of every session, least recently used first out, bounded in tokens.

    A hybrid model can be continued only where a state was kept: at multiples of ``block`` tokens and at the end of
    the stored prompt.
    """

    __slots__ = ("_held", "_session", "_shared", "_tokens", "block", "capacity")

    def __init__(self, capacity: float, block: int, session: list[int], shared: list[float]) -> None:
        self.capacity = capacity
        self.block = block
        self._session = session
        self._shared = shared
        self._held: OrderedDict[int, float] = OrderedDict()
        self._tokens = 0.0

    def match(self, i: int, tokens: float) -> float:
        stored = self._held.get(self._session[i])
        if stored is None:
            return 0.0
        shared = self._shared[i]
        if stored <= shared:
            return min(stored, tokens - 1.0)
        return min(shared, tokens - 1.0) // self.block * self.block

    def insert(self, i: int, tokens: float) -> None:
        held, key = self._held, self._session[i]
        before = held.pop(key, 0.0)
        # Turns can finish out of order; the longer prompt is the one worth keeping.
        kept = max(before, tokens)
        held[key] = kept
        self._tokens += kept - before
        while self._tokens > self.capacity and held:
            _, dropped = held.popitem(last=False)
            self._tokens -= dropped


class TraceCache:
    """Blocks of a trace, see :class:`kvpool.scheduling.traces.BlockCache`."""

    __slots__ = ("_blocks", "_cache")

    def __init__(self, capacity_tokens: float, block_tokens: int, blocks: tuple[tuple[int, ...], ...]) -> None:
        self._cache = BlockCache(int(capacity_tokens // block_tokens), block_tokens)
        self._blocks = blocks

    def match(self, i: int, tokens: float) -> float:
        return self._cache.match(self._blocks[i], tokens)

    def insert(self, i: int, tokens: float) -> None:
        self._cache.insert(self._blocks[i])
