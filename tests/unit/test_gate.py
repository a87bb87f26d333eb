"""What strangers may cost: places by address, and a share of the processor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.flow.gate import Gate, Pacer


def test_places_are_bounded_and_given_back():
    gate = Gate(3, 2)
    assert [gate.enter("a"), gate.enter("a"), gate.enter("a")] == [True, True, False]
    assert [gate.enter("b"), gate.enter("c")] == [True, False]
    gate.leave("a")
    assert gate.enter("c")
    for address in ("a", "b", "c"):
        gate.leave(address)
    assert gate.active == 0
    assert not gate._by_address  # a stranger leaves nothing behind, not even its address


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")), max_size=200))
def test_counts_never_exceed_their_bounds(steps):
    gate, inside = Gate(5, 2), []
    for enters, address in steps:
        if enters:
            if gate.enter(address):
                inside.append(address)
            else:
                assert len(inside) == 5 or inside.count(address) == 2
        elif address in inside:
            inside.remove(address)
            gate.leave(address)
        assert gate.active == len(inside) <= 5
        assert all(inside.count(a) <= 2 for a in "abcd")


def test_a_burst_is_free_and_then_a_share():
    pacer = Pacer(0.1, 0.2)
    assert pacer.wait(0.0) == 0
    pacer.spend(0.0, 0.2)
    assert pacer.wait(0.0) == 0
    pacer.spend(0.0, 0.05)
    assert pacer.wait(0.0) == pytest.approx(0.5)
    assert pacer.wait(0.5) == pytest.approx(0)
    pacer.spend(100.0, 0.2)  # no more than the burst is saved up
    pacer.spend(100.0, 0.1)
    assert pacer.wait(100.0) == pytest.approx(1.0)


def test_over_time_no_more_than_the_share():
    pacer, now, spent = Pacer(0.1, 0.1), 0.0, 0.0
    while now < 60:
        wait = pacer.wait(now)
        now += wait
        pacer.spend(now, 0.003)
        spent += 0.003
        now += 0.003
    assert spent <= 0.1 * now + 0.1 + 0.003
    assert spent >= 0.09 * 60


def test_a_clock_that_stands_still_or_goes_back_gives_nothing():
    pacer = Pacer(0.5, 1.0)
    pacer.spend(10.0, 2.0)
    assert pacer.wait(9.0) == pytest.approx(2.0)
