"""RangeSet against the obvious model: a Python set of byte numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransport.errors import Fault, LimitError
from kvtransport.wire.ranges import RangeSet

SIZE = 64
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))


def runs(held: set[int], start: int = 0, stop: int = SIZE + 1) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for at in range(start, stop):
        if at not in held:
            continue
        if out and out[-1][1] == at:
            out[-1] = (out[-1][0], at + 1)
        else:
            out.append((at, at + 1))
    return out


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeSet(max_ranges=5)
        self.held: set[int] = set()

    @rule(span=spans)
    def add(self, span):
        start, stop = span
        before = list(self.ranges)
        if start >= stop:
            with pytest.raises(LimitError, match="start < stop"):
                self.ranges.add(start, stop)
        else:
            wanted = self.held | set(range(start, stop))
            if len(runs(wanted)) > 5:
                with pytest.raises(LimitError, match="6 separate ranges, at most 5"):
                    self.ranges.add(start, stop)
            else:
                assert self.ranges.add(start, stop) == len(wanted) - len(self.held)
                self.held = wanted
                return
        assert list(self.ranges) == before

    @rule(span=spans)
    def ask(self, span):
        start, stop = span
        wanted = set(range(start, stop))
        assert self.ranges.contains(start, stop) == (wanted <= self.held)
        assert self.ranges.missing(start, stop) == runs(wanted - self.held)
        assert self.ranges.complete(stop) == (set(range(stop)) <= self.held)

    @rule()
    def clear(self):
        self.ranges.clear()
        self.held = set()

    @invariant()
    def agrees(self):
        assert list(self.ranges) == runs(self.held)
        assert len(self.ranges) == len(runs(self.held))
        assert self.ranges.covered == len(self.held)
        assert self.ranges.total == (max(self.held) + 1 if self.held else 0)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(st.permutations(range(40)), st.lists(st.integers(1, 7), min_size=40, max_size=40))
def test_any_order_of_chunks_completes(order, sizes):
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    ranges = RangeSet(max_ranges=40)
    for done, chunk in enumerate(order):
        assert not ranges.complete(edges[-1])
        assert ranges.add(edges[chunk], edges[chunk + 1]) == sizes[chunk]
        assert ranges.add(edges[chunk], edges[chunk + 1]) == 0
        assert len(ranges) <= done + 1
    assert list(ranges) == [(0, edges[-1])]
    assert ranges.complete(edges[-1])
    assert ranges.missing(0, edges[-1]) == []


@given(st.integers(0, 2**63 - 2), st.integers(1, 2**40))
def test_offsets_as_large_as_the_wire_allows(start, size):
    stop = min(start + size, 2**63 - 1)
    ranges = RangeSet()
    assert ranges.add(start, stop) == stop - start
    assert ranges.missing(0, 2**63 - 1) == [gap for gap in ((0, start), (stop, 2**63 - 1)) if gap[0] < gap[1]]


def test_bounds_and_names():
    with pytest.raises(LimitError, match="max_ranges must be at least 1, got 0") as caught:
        RangeSet(max_ranges=0)
    assert caught.value.fault is Fault.LOCAL
    with pytest.raises(LimitError, match=r"got -1\.\.4"):
        RangeSet().add(-1, 4)
    ranges = RangeSet(max_ranges=10)
    for at in range(10):
        ranges.add(2 * at, 2 * at + 1)
    with pytest.raises(LimitError, match="larger chunks or send in order") as caught:
        ranges.add(100, 101)
    assert caught.value.fault is Fault.REMOTE
    with pytest.raises(LimitError):
        RangeSet(max_ranges=1).add(5, 5)
    assert ranges.add(1, 2) == 1  # filling a gap makes room
    assert ranges.max_ranges == 10
    assert repr(ranges) == "RangeSet(0..3, 4..5, 6..7, 8..9, 10..11, 12..13, 14..15, 16..17, …)"
    other = RangeSet()
    assert ranges != other
    assert other == RangeSet(max_ranges=1)
    assert (other == 5) is False
    with pytest.raises(TypeError, match="unhashable"):
        hash(other)
