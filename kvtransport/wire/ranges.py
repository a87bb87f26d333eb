"""Sets of received bytes: sorted, disjoint, half-open ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from kvtransport.errors import Fault, LimitError


class RangeSet:
    """Which bytes of one extent have arrived.

    Ranges are kept sorted, disjoint and merged when they touch, so that n ranges describe n gaps at most.
    ``max_ranges`` bounds them: a peer that sends every other byte is refused with :class:`LimitError`, and
    the set stays as it was. Finding a place is O(log n); inserting moves at most ``max_ranges`` integers.
    """

    __slots__ = ("_covered", "_max_ranges", "_starts", "_stops")

    def __init__(self, *, max_ranges: int = 4096) -> None:
        if max_ranges < 1:
            raise LimitError(f"max_ranges must be at least 1, got {max_ranges}", fault=Fault.LOCAL)
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._covered = 0
        self._max_ranges = max_ranges

    def add(self, start: int, stop: int) -> int:
        """Add bytes ``start`` to ``stop`` (exclusive) and return how many of them are new.

        Raises :class:`LimitError` for an empty or negative range, or when there would be too many ranges.
        """
        if not 0 <= start < stop:
            raise LimitError(f"a range must have 0 <= start < stop, got {start}..{stop}")
        starts, stops = self._starts, self._stops
        # Bytes mostly arrive in order: appending to or extending the last range needs no search.
        if not stops or start > stops[-1]:
            self._room(len(starts) + 1)
            starts.append(start)
            stops.append(stop)
            self._covered += stop - start
            return stop - start
        first = bisect_left(stops, start)  # the first range that touches or follows start
        last = bisect_right(starts, stop)  # one past the last range that touches or precedes stop
        if first == last:
            self._room(len(starts) + 1)
            starts.insert(first, start)
            stops.insert(first, stop)
            self._covered += stop - start
            return stop - start
        low = min(start, starts[first])
        high = max(stop, stops[last - 1])
        held = sum(stops[first:last]) - sum(starts[first:last])
        starts[first:last] = [low]
        stops[first:last] = [high]
        new = (high - low) - held
        self._covered += new
        return new

    def contains(self, start: int, stop: int) -> bool:
        """Whether all bytes of ``start`` to ``stop`` are there; an empty range always is."""
        if start >= stop:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._stops[at] >= stop

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The gaps between ``start`` and ``stop``, in order: at most one more than there are ranges."""
        gaps: list[tuple[int, int]] = []
        at = start
        for i in range(bisect_right(self._stops, start), len(self._starts)):
            low = self._starts[i]
            if low >= stop:
                break
            if low > at:
                gaps.append((at, low))
            at = self._stops[i]
        if at < stop:
            gaps.append((at, stop))
        return gaps

    def complete(self, nbytes: int) -> bool:
        """Whether bytes 0 to ``nbytes`` are all there."""
        return self.contains(0, nbytes)

    @property
    def covered(self) -> int:
        """Bytes in the set."""
        return self._covered

    @property
    def total(self) -> int:
        """End of the last range: the smallest extent that holds them all, 0 when there is none."""
        return self._stops[-1] if self._stops else 0

    @property
    def max_ranges(self) -> int:
        """The bound on the number of ranges."""
        return self._max_ranges

    def clear(self) -> None:
        """Forget everything."""
        self._starts.clear()
        self._stops.clear()
        self._covered = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        """Number of ranges."""
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{a}..{b}" for a, b in list(self)[:8])
        return f"RangeSet({shown}{', …' if len(self) > 8 else ''})"

    def _room(self, wanted: int) -> None:
        if wanted > self._max_ranges:
            raise LimitError(
                f"received bytes would lie in {wanted} separate ranges, at most {self._max_ranges} are kept: "
                "the sender must use larger chunks or send in order"
            )
