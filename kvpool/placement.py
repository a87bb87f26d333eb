"""Where the bytes of a transfer lie in slabs.

A block of a group is one slab: layer by layer, tensor by tensor, ``block_tokens`` times the bytes per token. A partial
block of k tokens has the same order with k in place of ``block_tokens``; a state is the case of one unit. So the
bytes of one (layer, tensor) are the same range of every block's slab, and a page list of thousands of
pages is a few array operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvtransport.buffers import PageList
from kvtransport.layout import CacheLayout, Extent, GroupKind, Span

from .arena import BlockClass, PageArena, Pages, Pieces, Slab, Slabs

Slot = tuple[int, int]
"""(layer, tensor) as on the wire."""


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """``unit`` bytes per token (or state), after ``prefix`` bytes per token of the tensors before it in its group."""

    group: int
    unit: int
    prefix: int


class Geometry:
    """Offsets inside the slabs of one layout's groups."""

    def __init__(self, layout: CacheLayout) -> None:
        self.group_bytes = [0] * len(layout.groups)
        """Bytes per token, or per state, of each group (this tensor parallel rank's share)."""
        self.slots: dict[Slot, SlotPlace] = {}
        for slot in layout.slots():
            unit = slot.spec.nbytes
            self.slots[slot.layer, slot.tensor] = SlotPlace(slot.group, unit, self.group_bytes[slot.group])
            self.group_bytes[slot.group] += unit

    def spans(self, extents: Iterable[Extent]) -> dict[int, tuple[Span, ...]]:
        """Group -> the spans that all its extents share."""
        return {self.slots[e.layer, e.tensor].group: e.spans for e in extents}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Whole blocks of one group: ``slabs[i]`` is block ``index[i]`` (ascending)."""

    index: NDArray[np.int64]
    slabs: Slabs

    def rows(self, first: int, count: int) -> Pages:
        """Page numbers of blocks ``first`` to ``first + count``; KeyError when one of them is not there."""
        at = int(self.index.searchsorted(first))
        if at + count > len(self.index) or self.index[at] != first or self.index[at + count - 1] != first + count - 1:
            raise KeyError(f"blocks {first} to {first + count} are not all there")
        return self.slabs.pages[at : at + count]

    def __contains__(self, block: int) -> bool:
        at = int(self.index.searchsorted(block))
        return at < len(self.index) and self.index[at] == block


NO_BLOCKS = Blocks(
    np.empty(0, np.int64), Slabs(np.empty((0, 0), np.int32), 0, np.empty(0, np.int64), BlockClass.PREFIX)
)


@dataclass(slots=True)
class Held:
    """What is stored of one group: whole blocks, and partial blocks and states by position (tokens)."""

    blocks: Blocks = NO_BLOCKS
    tails: dict[int, Slab] = field(default_factory=dict)
    states: dict[int, Slab] = field(default_factory=dict)

    def slabs(self) -> list[Slab | Slabs]:
        return [self.blocks.slabs, *self.tails.values(), *self.states.values()]


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``[first, stop)`` of each of some slabs that hold ``tokens`` tokens (1: a state)."""

    matrix: Pages
    tokens: int
    first: int
    stop: int


def parts_of(arena: PageArena, block_tokens: int, spans: Iterable[Span], held: Held) -> list[Part]:
    """The slabs that ``spans`` lie in, in order."""
    parts: list[Part] = []
    for span in spans:
        if span.tokens == 0:
            parts.append(Part(arena.stack([held.states[span.first]]), 1, 0, 1))
            continue
        at, stop = span.first, span.stop
        while at < stop:
            block = at // block_tokens
            base = block * block_tokens
            if at == base and base + block_tokens <= stop:
                count = (stop - base) // block_tokens
                parts.append(Part(held.blocks.rows(block, count), block_tokens, 0, block_tokens))
                at = base + count * block_tokens
                continue
            end = min(stop, base + block_tokens)
            if end % block_tokens and end in held.tails:
                matrix, tokens = arena.stack([held.tails[end]]), end - base
            elif block in held.blocks:
                matrix, tokens = held.blocks.rows(block, 1), block_tokens
            else:
                longer = min(p for p in held.tails if end <= p < base + block_tokens)
                matrix, tokens = arena.stack([held.tails[longer]]), longer - base
            parts.append(Part(matrix, tokens, at - base, end - base))
            at = end
    return parts


def slot_pieces(arena: PageArena, place: SlotPlace, parts: Sequence[Part]) -> list[Pieces]:
    """One (layer, tensor)'s bytes in ``parts``."""
    return [
        arena.pieces(p.matrix, place.prefix * p.tokens + p.first * place.unit, (p.stop - p.first) * place.unit)
        for p in parts
    ]


def page_lists(
    arena: PageArena, geometry: Geometry, block_tokens: int, extents: Iterable[Extent], held: Mapping[int, Held]
) -> dict[Slot, PageList]:
    """For every extent a page list that matches its byte space exactly; ``held`` by group."""
    parts: dict[tuple[int, tuple[Span, ...]], list[Part]] = {}
    lists: dict[Slot, PageList] = {}
    for extent in extents:
        place = geometry.slots[extent.layer, extent.tensor]
        name = (place.group, extent.spans)
        if name not in parts:
            parts[name] = parts_of(arena, block_tokens, extent.spans, held[place.group])
        lists[extent.layer, extent.tensor] = arena.page_list(slot_pieces(arena, place, parts[name]))
    return lists


def whole_group(arena: PageArena, geometry: Geometry, group: int, parts: Sequence[Part]) -> PageList:
    """All bytes of one group in ``parts``, in the order of a slab that holds just them."""
    pieces: list[Pieces] = []
    for place in geometry.slots.values():
        if place.group == group:
            pieces += slot_pieces(arena, place, parts)
    return arena.page_list(pieces)


@dataclass(frozen=True, slots=True)
class PutPlan:
    """The slabs of a put.

    ``blocks`` are (group, block numbers, bytes each), ``tails`` and ``states`` (group, position in tokens, bytes). ``copies`` names
    the tails that are copied from longer blocks when the put is sealed: (group, position).
    """

    blocks: tuple[tuple[int, NDArray[np.int64], int], ...]
    tails: tuple[tuple[int, int, int], ...]
    states: tuple[tuple[int, int, int], ...]
    copies: frozenset[tuple[int, int]]


def plan_put(
    layout: CacheLayout, geometry: Geometry, block_tokens: int, extents: Sequence[Extent], points: Iterable[int]
) -> PutPlan:
    """What a put of ``extents`` with endpoints at ``points`` (checkpoints and boundary) must allocate.

    A partial block is needed for every position off the grid: where a span ends there, its bytes arrive
    into it; where the span goes on, the block they arrive in is longer and they are copied at the seal.
    """
    blocks: list[tuple[int, NDArray[np.int64], int]] = []
    tails: list[tuple[int, int, int]] = []
    states: list[tuple[int, int, int]] = []
    copies: set[tuple[int, int]] = set()
    spans = geometry.spans(extents)
    off_grid = sorted({p for p in points if p % block_tokens})
    for group, own in spans.items():
        size = geometry.group_bytes[group]
        if layout.groups[group].kind is GroupKind.RECURRENT:
            states += [(group, s.first, size) for s in own]
            continue
        whole = [np.arange(s.first // block_tokens, s.stop // block_tokens) for s in own]
        index = whole[0] if len(whole) == 1 else np.unique(np.concatenate([np.empty(0, np.int64), *whole]))
        if len(index):
            blocks.append((group, index, size * block_tokens))
        stops = {s.stop for s in own}
        for position in off_grid:
            tails.append((group, position, size * (position % block_tokens)))
            if position not in stops:
                copies.add((group, position))
    return PutPlan(tuple(blocks), tuple(tails), tuple(states), frozenset(copies))


def overlaps(theirs: Extent, ours: Extent) -> list[tuple[int, int, int]]:
    """Which bytes two extents of one slot share: (start, stop) in the byte space of ``theirs``, start in that of ``ours``."""
    found: list[tuple[int, int, int]] = []
    at = 0
    for span in ours.spans:
        base = 0
        for other in theirs.spans:
            if span.tokens == 0 and other.tokens == 0 and span.first == other.first:
                found.append((base, base + ours.unit, at))
            elif span.tokens and other.tokens:
                first, stop = max(span.first, other.first), min(span.stop, other.stop)
                if first < stop:
                    low = base + (first - other.first) * ours.unit
                    found.append((low, low + (stop - first) * ours.unit, at + (first - span.first) * ours.unit))
            base += ours.unit * (other.tokens or 1)
        at += ours.unit * (span.tokens or 1)
    return found


def before(spans: Iterable[Span], position: int) -> tuple[Span, ...]:
    """The token spans' parts before ``position``; states are left out."""
    return tuple(Span(s.first, min(s.stop, position) - s.first) for s in spans if s.tokens and s.first < position)
