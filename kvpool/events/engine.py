"""What an engine holds by its own events, for the router: how long a prefix it would find in its cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvpool.match import GroupRule, Match, View, match
from kvtransport.layout import GroupKind

from .messages import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, EventBatch

KINDS = {
    "full_attention": GroupKind.FULL,
    "mla_attention": GroupKind.FULL,
    "sink_full_attention": GroupKind.FULL,
    "sliding_window": GroupKind.SLIDING,
    "sliding_window_mla": GroupKind.SLIDING,
    "mamba": GroupKind.RECURRENT,
}
"""vLLM's kinds of caches; one that is not named is full attention. Others cannot be looked up."""


@dataclass
class _Group:
    kind: GroupKind | None
    window: int | None
    blocks: dict[BlockHash, set[str | None]] = field(default_factory=dict)
    """Hash -> the media that hold it, what was stored last at the end."""


class EngineCache:
    """Give :meth:`apply` and :meth:`reset` to an :class:`~kvpool.events.subscriber.EventSubscriber`.

    At most ``max_blocks`` hashes are remembered, the oldest are forgotten first: a shorter match, never a wrong one. ``media``
    limits to blocks in these ("GPU"); by default any.
    """

    def __init__(self, *, max_blocks: int = 4_000_000, media: Iterable[str] | None = None) -> None:
        self._max_blocks = max_blocks
        self._media = None if media is None else frozenset(media)
        self._groups: dict[int, _Group] = {}
        self._count = 0
        self.block_tokens = 0
        """Of the engine's blocks; 0 until it has stored one."""
        self.updated_s = 0.0
        """The engine's time (seconds since the epoch) of the last batch."""

    def __len__(self) -> int:
        """Hashes remembered, of all groups."""
        return self._count

    def reset(self) -> None:
        self._groups.clear()
        self._count = 0

    def apply(self, batch: EventBatch) -> None:
        self.updated_s = batch.ts
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.reset()
            elif isinstance(event, BlockStored):
                self._stored(event)
            else:
                self._removed(event)

    def _stored(self, event: BlockStored) -> None:
        if self._media is not None and event.medium is not None and event.medium not in self._media:
            return
        if event.block_size:
            self.block_tokens = event.block_size
        number = event.group_idx or 0
        group = self._groups.get(number)
        if group is None or (event.kv_cache_spec_kind and group.kind is not KINDS.get(event.kv_cache_spec_kind)):
            kind = KINDS.get(event.kv_cache_spec_kind) if event.kv_cache_spec_kind else GroupKind.FULL
            blocks = {} if group is None else group.blocks
            group = self._groups[number] = _Group(kind, event.kv_cache_spec_sliding_window, blocks)
        for key in event.block_hashes:
            media = group.blocks.pop(key, None)
            if media is None:
                media = set()
                self._count += 1
            media.add(event.medium)
            group.blocks[key] = media
        while self._count > self._max_blocks:
            fullest = max(self._groups.values(), key=lambda g: len(g.blocks))
            del fullest.blocks[next(iter(fullest.blocks))]
            self._count -= 1

    def _removed(self, event: BlockRemoved) -> None:
        groups = self._groups.values() if event.group_idx is None else filter(None, [self._groups.get(event.group_idx)])
        for group in groups:
            for key in event.block_hashes:
                media = group.blocks.get(key)
                if media is None:
                    continue
                if event.medium is None:
                    media.clear()
                else:
                    media.discard(event.medium)
                if not media:
                    del group.blocks[key]
                    self._count -= 1

    def match(self, hashes: Sequence[BlockHash], tokens: int) -> Match:
        """The lengths of a prompt of ``tokens`` tokens with these block hashes that the engine can start from; see :func:`kvpool.match.match`."""
        limit = max(tokens - 1, 0)
        known = sorted(self._groups.items())
        if not known or not self.block_tokens or any(g.kind is None for _, g in known):
            return Match(0, (), {}, limit)
        rules = tuple(
            GroupRule(str(n), g.kind, g.window if g.kind is GroupKind.SLIDING else None) for n, g in known if g.kind
        )
        rows = np.array([[h in g.blocks for h in hashes] for _, g in known], dtype=np.bool_)
        return match(View(self.block_tokens, rules, rows.reshape(len(known), len(hashes))), limit)
