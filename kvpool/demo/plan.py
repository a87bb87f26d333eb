"""What a demo runs: every process of it computes the same from these few values."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvtransport import presets
from kvtransport.errors import ConfigError
from kvtransport.layout import CacheLayout, Extent, GroupKind
from kvtransport.transfer import TransferStats

from ..keys import MAX_BLOCK_TOKENS, MAX_CHAIN_TOKENS, MIN_BLOCK_TOKENS
from .memory import EngineMemory

POOL_PAGE_BYTES = 65_536
VOCABULARY = 163_840
MAX_LAYER_MS = 60_000.0
SLOWEST_BYTES_S = 50e6
"""Deadlines leave room for a machine that moves no more than this."""


@dataclass(frozen=True)
class Plan:
    """Settings of one demo. ``prefix_tokens`` are shared by both requests, a multiple of ``block_tokens``.

    ``layer_ms`` is how long prefill computes one layer of all ``tokens``; fewer tokens take their share of it.
    Raises ConfigError for settings that do not fit together, LayoutError for an unknown preset.
    """

    preset: str = "kimi-linear-48b"
    tokens: int = 32_768
    prefix_tokens: int = 24_576
    block_tokens: int = 64
    layer_ms: float = 100.0
    connections: int = 4
    seed: int = 0
    direct: bool = False

    def __post_init__(self) -> None:
        if not MIN_BLOCK_TOKENS <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise ConfigError(
                f"--block-tokens must be {MIN_BLOCK_TOKENS} to {MAX_BLOCK_TOKENS}, got {self.block_tokens}"
            )
        if not self.block_tokens < self.tokens <= MAX_CHAIN_TOKENS:
            raise ConfigError(
                f"--tokens must be more than one block ({self.block_tokens} tokens) and at most {MAX_CHAIN_TOKENS}, "
                f"got {self.tokens}"
            )
        if not self.block_tokens <= self.prefix_tokens < self.tokens or self.prefix_tokens % self.block_tokens:
            raise ConfigError(
                f"--prefix-tokens must be a multiple of the block size ({self.block_tokens}) below --tokens "
                f"({self.tokens}), got {self.prefix_tokens}"
            )
        if not 0 <= self.layer_ms <= MAX_LAYER_MS:
            raise ConfigError(f"--layer-ms must be 0 to {MAX_LAYER_MS:g} milliseconds, got {self.layer_ms:g}")
        if not 1 <= self.connections <= 64:
            raise ConfigError(f"--connections must be 1 to 64, got {self.connections}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed must be 0 to 2^63 - 1, got {self.seed}")

    @staticmethod
    def default_prefix(tokens: int, block_tokens: int) -> int:
        """Three quarters of the tokens in whole blocks, at least one."""
        return max(block_tokens, tokens * 3 // 4 // block_tokens * block_tokens)

    # -- travelling ------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        return cls(**body)

    # -- what follows ----------------------------------------------------------------------------

    @cached_property
    def layout(self) -> CacheLayout:
        return presets.load(self.preset)

    @property
    def requests(self) -> tuple[int, ...]:
        """Numbers of the requests: the second one reuses the pool's copy of the first one's prefix."""
        return (1,) if self.direct else (1, 2)

    def request_id(self, number: int) -> bytes:
        """16 bytes. Both sides know a request by it; here they compute it, a router would hand it out."""
        return hashlib.sha256(f"kvpool demo {self.seed} {number}".encode()).digest()[:16]

    def request_tokens(self, number: int) -> NDArray[np.uint32]:
        """Token ids of a request, uint32 of shape (tokens,); all requests start with the same ``prefix_tokens``."""
        prefix = np.random.default_rng([self.seed, 0]).integers(0, VOCABULARY, self.prefix_tokens, np.uint32)
        own = np.random.default_rng([self.seed, number]).integers(
            0, VOCABULARY, self.tokens - self.prefix_tokens, np.uint32
        )
        return np.concatenate([prefix, own])

    def deadline_s(self, nbytes: int) -> float:
        """Seconds that a transfer of ``nbytes`` may take, its computation included."""
        return 30.0 + 2 * len(self.layout.layers) * self.layer_ms / 1e3 + nbytes / SLOWEST_BYTES_S

    # -- what is moved and kept --------------------------------------------------------------------

    def checkpoints(self, start: int) -> tuple[int, ...]:
        """Where prefill keeps states on its way from ``start``, so that the prefix can be reused."""
        return () if self.direct or start >= self.prefix_tokens else (self.prefix_tokens,)

    def extents(self, start: int) -> tuple[Extent, ...]:
        """What prefill computes when it starts at ``start``."""
        return self.layout.extents(
            self.tokens, start=start, checkpoints=self.checkpoints(start), align=self.block_tokens
        )

    def prefill_memory_bytes(self) -> int:
        """Engine memory for the largest request on the prefill side."""
        prefix = self.layout.extents(self.prefix_tokens, align=self.block_tokens)
        resumed = EngineMemory.size_of((*prefix, *self.extents(self.prefix_tokens)))
        return max(EngineMemory.size_of(self.extents(0)), 0 if self.direct else resumed)

    def decode_memory_bytes(self) -> int:
        """Engine memory for a request on the decode side."""
        return EngineMemory.size_of(self.layout.extents(self.tokens, align=self.block_tokens))

    def pool_memory_bytes(self) -> int:
        """Pool memory that holds both requests and the checkpoint, nothing evicted."""
        need = self._pooled(self.extents(0)) + self._pooled(self.extents(self.prefix_tokens))
        return need + need // 16 + (16 << 20)

    def _pooled(self, extents: Iterable[Extent]) -> int:
        spans = {self._group_of[e.layer, e.tensor]: e.spans for e in extents}
        total = 0
        for index, group in enumerate(self.layout.groups):
            if index not in spans:
                continue
            if group.kind is GroupKind.RECURRENT:
                pieces, size = len(spans[index]), group.unit_bytes
            else:
                step = self.block_tokens
                pieces = sum(-(-s.stop // step) - s.first // step for s in spans[index])
                size = group.unit_bytes * step
            total += pieces * -(-size // POOL_PAGE_BYTES) * POOL_PAGE_BYTES
        return total

    @cached_property
    def _group_of(self) -> dict[tuple[int, int], int]:
        return {(slot.layer, slot.tensor): slot.group for slot in self.layout.slots()}


def by_layer(extents: Iterable[Extent]) -> dict[int, list[Extent]]:
    """Extents by layer, in the order they were given."""
    found: dict[int, list[Extent]] = {}
    for extent in extents:
        found.setdefault(extent.layer, []).append(extent)
    return found


def stats_dict(stats: TransferStats) -> dict[str, Any]:
    """The counters of a transfer without the times of its layers."""
    return {
        "total_bytes": stats.total_bytes,
        "moved_bytes": stats.moved_bytes,
        "chunks": stats.chunks,
        "resent_bytes": stats.resent_bytes,
        "duplicate_bytes": stats.duplicate_bytes,
        "spilled_bytes": stats.spilled_bytes,
        "corrupt_chunks": stats.corrupt_chunks,
        "checksums_verified": stats.checksums_verified,
        "credit_stall_s": stats.credit_stall_s,
    }
