"""Chains cut into segments, and layouts cut into what can be stored apart.

A segment is 64 blocks of a chain. On its node it is a chain of its own, so that the segments of one prompt can lie on
different nodes: the keys are the prompt's, the positions count from the segment's first block.

Full-attention groups and recurrent groups are stored as two *units*, each a namespace of its own: blocks can be read without
a state at their end, states without the blocks before them. Layouts with sliding windows or cache pages longer than
a block are not cut: a window crosses segments. Their chains stay whole, on one node each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvpool.keys import KeyChain, Namespace
from kvtransport.layout import CacheLayout, GroupKind

SEGMENT_BLOCKS = 64
PLACE_BYTES, TAG_BYTES = 16, 8
Slot = tuple[int, int]
"""(layer, tensor)"""


def placement_name(first: bytes) -> bytes:
    """16 bytes that a segment beginning with block key ``first`` is placed by: the same for all that is stored of it."""
    return hashlib.blake2b(first, digest_size=16, person=b"kvt1-place").digest()


def segment_key(ns: Namespace, first: bytes) -> bytes:
    """24 bytes that name what ``ns`` holds of the segment beginning with block key ``first``; also the directory's key for it.

    The first 16 are its :func:`placement_name`: all that is stored of a segment is found at one place.
    """
    return placement_name(first) + ns.id[:TAG_BYTES]


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks ``[first, stop)`` of a chain; ``key`` as of :func:`segment_key`."""

    index: int
    first: int
    stop: int
    key: bytes


def segments(ns: Namespace, blocks: Sequence[bytes], first: int = 0, stop: int | None = None) -> Iterator[Segment]:
    """The segments of ``ns`` that overlap blocks ``[first, stop)`` of a chain with these block keys."""
    stop = len(blocks) if stop is None else stop
    for index in range(first // SEGMENT_BLOCKS, -(-stop // SEGMENT_BLOCKS)):
        begin = index * SEGMENT_BLOCKS
        yield Segment(index, begin, min(begin + SEGMENT_BLOCKS, len(blocks)), segment_key(ns, blocks[begin]))


@dataclass(frozen=True)
class Unit:
    """Groups that are stored together: ``ns`` is their namespace, ``whole`` leads from its slots to those of the whole layout."""

    kind: GroupKind
    groups: tuple[int, ...]
    ns: Namespace
    whole: dict[Slot, Slot]

    @cached_property
    def part(self) -> dict[Slot, Slot]:
        """Slot of the whole layout -> slot of this unit."""
        return {w: p for p, w in self.whole.items()}

    def chain(self, blocks: Sequence[bytes], segment: Segment, stop: int) -> KeyChain:
        """The segment's blocks up to block ``stop`` of the whole chain."""
        keys = blocks[segment.first : stop]
        return KeyChain.of_hashes(self.ns, keys, len(keys) * self.ns.block_tokens)


def can_be_cut(layout: CacheLayout, block_tokens: int) -> bool:
    """Whether segments of this layout can be stored apart."""
    return all(g.kind is not GroupKind.SLIDING and block_tokens % g.page_tokens == 0 for g in layout.groups)


def units_of(ns: Namespace) -> tuple[Unit, ...]:
    """The units of a namespace that :func:`can_be_cut`: full attention, then recurrent; those it has."""
    out = []
    layout = ns.layout
    for kind in (GroupKind.FULL, GroupKind.RECURRENT):
        groups = tuple(i for i, g in enumerate(layout.groups) if g.kind is kind)
        if not groups:
            continue
        part = CacheLayout(
            layout.model, tuple(layout.groups[i] for i in groups), layout.revision, layout.tp_size, layout.tp_rank
        )
        # Caches of different whole layouts never meet, even if these groups are alike.
        salt = hashlib.sha256(b"kvt1-unit" + ns.root).digest()
        slots: dict[Slot, Slot] = {}
        for at, group in enumerate(groups):
            for mine, theirs in zip(part.slots(at), layout.slots(group), strict=True):
                slots[mine.layer, mine.tensor] = (theirs.layer, theirs.tensor)
        out.append(Unit(kind, groups, Namespace(ns.tenant, part, ns.block_tokens, salt), slots))
    return tuple(out)
