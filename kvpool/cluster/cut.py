"""Cutting a transfer of a whole chain into one transfer per segment and unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvpool.errors import KeyChainError
from kvtransport.layout import GroupKind

from .segments import SEGMENT_BLOCKS, Segment, Unit, segments


@dataclass(frozen=True)
class Part:
    """One segment of one unit: tokens ``[start, boundary)`` from the segment's beginning, with states at ``points``.

    ``origin`` is the segment's first token in the whole chain.
    """

    unit: Unit
    segment: Segment
    start: int
    boundary: int
    points: tuple[int, ...]

    @property
    def origin(self) -> int:
        return self.segment.first * self.unit.ns.block_tokens

    @property
    def stop_block(self) -> int:
        """The block of the whole chain that this part ends before."""
        return self.segment.first + self.boundary // self.unit.ns.block_tokens


def check_aligned(block_tokens: int, positions: Iterable[int]) -> None:
    """Raise KeyChainError for a position inside a block."""
    for position in positions:
        if position % block_tokens:
            raise KeyChainError(
                f"position {position} is inside a block of {block_tokens} tokens: a chain stored in segments can only begin, end "
                'and have states between blocks; round it down, or connect with placement="chain"'
            )


def cut_put(
    units: Sequence[Unit], blocks: Sequence[bytes], *, start: int, boundary: int, points: Sequence[int]
) -> list[Part]:
    """The parts of a put of tokens ``[start, boundary)`` with states at ``points`` and the boundary."""
    step = units[0].ns.block_tokens
    check_aligned(step, (start, boundary, *points))
    length = SEGMENT_BLOCKS * step
    states = sorted({*points, boundary})
    out: list[Part] = []
    for unit in units:
        for segment in segments(unit.ns, blocks, start // step, boundary // step):
            origin = segment.first * step
            if unit.kind is GroupKind.FULL:
                low, high = max(start, origin), min(boundary, origin + length)
                out.append(Part(unit, segment, low - origin, high - origin, (high - origin,)))
            else:
                here = tuple(p - origin for p in states if origin < p <= origin + length)
                if here:
                    out.append(Part(unit, segment, 0, here[-1], here))
    return out


def cut_get(units: Sequence[Unit], blocks: Sequence[bytes], *, start: int, boundary: int) -> list[Part]:
    """The parts of a get of tokens ``[start, boundary)`` and the state at the boundary."""
    return cut_put(units, blocks, start=start, boundary=boundary, points=())


def pieces(part: Part, first: int, tokens: int) -> Iterator[tuple[int, int]]:
    """What of tokens ``[first, first + tokens)`` of the whole chain (0 tokens: the state at ``first``) is in ``part``.

    Yields (first token of the piece in the whole chain, tokens).
    """
    if tokens == 0:
        if part.unit.kind is GroupKind.RECURRENT and first - part.origin in part.points:
            yield first, 0
        return
    if part.unit.kind is not GroupKind.FULL:
        return
    low = max(first, part.origin + part.start)
    high = min(first + tokens, part.origin + part.boundary)
    if low < high:
        yield low, high - low
