"""flow: credit, keepalive, chunking, spilling, turns. Pure policy: no loop, no clock, no socket."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.flow.chunking import MIN_CHUNK, next_cut
from kvtransport.flow.credit import ReceiverCredit, SenderCredit
from kvtransport.flow.keepalive import Keepalive, Verdict
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.flow.stalls import PATIENCE, Stalls
from kvtransport.flow.turns import Turns

MIB = 1 << 20


# -- chunking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "cut"),
    [
        (1, 1),
        (MIB - 1, MIB - 1),
        (MIB, MIB),
        (MIB + 1, MIB // 2 + 1),  # two halves instead of a chunk and a byte
        (MIB + MIB // 2 - 1, (MIB + MIB // 2) // 2),
        (MIB + MIB // 2, MIB),
        (10 * MIB, MIB),
    ],
)
def test_a_cut_is_a_chunk_or_half_of_what_is_left(left, cut):
    assert next_cut(0, left, MIB) == cut
    assert next_cut(12_345, 12_345 + left, MIB) == cut  # the position does not matter


@given(st.integers(1, 5000), st.integers(2, 2000))  # it is the same at any scale
def test_cuts_cover_a_unit_without_runts(nbytes, chunk_bytes):
    start, cuts = 0, []
    while start < nbytes:
        cuts.append(next_cut(start, nbytes, chunk_bytes))
        start += cuts[-1]
        assert len(cuts) <= nbytes // chunk_bytes + 2
    assert start == nbytes
    assert max(cuts) <= chunk_bytes
    if len(cuts) > 1:
        assert min(cuts) >= chunk_bytes // 2


# -- credit ------------------------------------------------------------------------------------------


def test_without_a_grant_nothing_may_be_sent():
    assert SenderCredit().take(1, 1) == 0


def test_a_lower_limit_is_an_old_frame():
    credit = SenderCredit()
    assert credit.grant(1000)
    assert not credit.grant(1000)
    assert not credit.grant(999)
    assert credit.left == 1000


def test_credit_is_taken_whole_or_in_a_part_worth_a_frame():
    credit = SenderCredit()
    credit.grant(MIB)
    assert credit.take(MIB - MIN_CHUNK + 1, MIN_CHUNK) == MIB - MIN_CHUNK + 1
    assert credit.left == MIN_CHUNK - 1
    assert credit.take(MIB, MIN_CHUNK) == 0  # a runt: wait for more
    assert credit.take(1000, MIN_CHUNK) == 1000  # but a small unit goes whole
    assert credit.take(MIB, 1) == MIN_CHUNK - 1 - 1000
    assert credit.left == 0


def test_the_window_opens_by_quarters():
    credit = ReceiverCredit(total=1000, window=100)
    assert credit.granted == 100
    assert credit.applied(24) is None
    assert credit.applied(1) == 125
    assert credit.applied(60) == 185
    assert credit.granted == 185


def test_a_transfer_smaller_than_the_window_is_granted_at_once():
    credit = ReceiverCredit(total=70, window=100)
    assert credit.granted == 70
    assert credit.applied(70) is None


def test_the_last_credit_is_told_however_small():
    credit = ReceiverCredit(total=110, window=100)
    assert credit.applied(9) is None
    assert credit.applied(1) == 110
    assert credit.applied(100) is None


@given(
    total=st.integers(0, 5000),
    window=st.integers(1, 2000),
    chunk=st.integers(1, 700),
    least=st.integers(1, 700),
    lose=st.randoms(use_true_random=False),
)
def test_both_accounts_together_never_exceed_the_window_and_never_deadlock(total, window, chunk, least, lose):
    """A sender that waits for ``least`` only while something is on its way gets everything across."""
    sender, receiver = SenderCredit(), ReceiverCredit(total, window)
    sender.grant(receiver.granted)
    sent = applied = 0
    while applied < total:
        wanted = min(chunk, total - sent)
        n = sender.take(wanted, least if sent > applied else 1) if wanted else 0
        sent += n
        assert sent <= sender.limit <= total
        assert sent - applied <= window
        if not n or lose.random() < 0.5:
            arrived = min(chunk, sent - applied)
            assert arrived, "nothing on its way and nothing may be sent: stuck"
            applied += arrived
            limit = receiver.applied(arrived)
            if limit is not None:
                for said in lose.choice([[limit], [limit, limit], [limit, max(0, limit - 7), limit]]):
                    sender.grant(said)  # repeated and reordered: harmless


# -- keepalive ---------------------------------------------------------------------------------------

KEEPALIVE = Keepalive(interval_s=5.0, deadline_s=15.0)


@pytest.mark.parametrize(
    ("now", "last_heard", "last_ping", "verdict"),
    [
        (100.0, 100.0, 0.0, Verdict.FINE),
        (104.9, 100.0, 0.0, Verdict.FINE),
        (105.0, 100.0, 0.0, Verdict.PING),
        (107.0, 100.0, 105.0, Verdict.FINE),  # asked a moment ago
        (110.0, 100.0, 105.0, Verdict.PING),  # and again
        (114.9, 100.0, 110.0, Verdict.FINE),
        (115.0, 100.0, 114.0, Verdict.DEAD),
        (500.0, 100.0, 0.0, Verdict.DEAD),
        (99.0, 100.0, 0.0, Verdict.FINE),  # heard after the clock was read
    ],
)
def test_keepalive(now, last_heard, last_ping, verdict):
    assert KEEPALIVE.judge(now, last_heard, last_ping) is verdict


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_silent_peer_is_pinged_first_and_dead_in_time(interval_s, deadline_s):
    keepalive = Keepalive(interval_s, deadline_s)
    now = last_ping = 0.0
    pings = 0
    while (verdict := keepalive.judge(now, 0.0, last_ping)) is not Verdict.DEAD:
        if verdict is Verdict.PING:
            pings += 1
            last_ping = now
        now += keepalive.poll_s
        assert now < deadline_s + 2 * keepalive.poll_s
    assert now - deadline_s <= keepalive.poll_s
    assert pings >= (deadline_s > interval_s + 2 * keepalive.poll_s)
    assert pings <= deadline_s / interval_s + 1


# -- spilling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waited_s", "stalled_s", "still_s", "wants"),
    [
        (0.0, 0.0, 0.0, False),
        (0.0, 0.019, 0.0, False),  # a moment without credit is no stall
        (0.0, 0.02, 0.0, True),
        (60.0, 0.0, 0.249, False),  # slow, but it flows
        (0.249, 0.0, 60.0, False),  # it has just come
        (0.25, 0.0, 0.25, True),
    ],
)
def test_spilling_after_a_stall_or_where_nothing_moves(waited_s, stalled_s, still_s, wants):
    policy = SpillPolicy(budget_bytes=1, after_s=0.25, stalled_s=0.02)
    assert policy.wants(waited_s=waited_s, stalled_s=stalled_s, still_s=still_s) is wants


def test_without_a_budget_nothing_spills():
    assert not SpillPolicy(budget_bytes=0).wants(waited_s=1e9, stalled_s=1e9, still_s=1e9)


# -- turns -------------------------------------------------------------------------------------------


def take(turns: Turns[str], n: int) -> str:
    return "".join(turns.next() or "-" for _ in range(n))


def test_nobody_has_a_turn_in_an_empty_table():
    assert Turns[str]().next() is None


def test_turns_go_round():
    turns: Turns[str] = Turns()
    for item in "abc":
        turns.add(item, 0)
    assert take(turns, 7) == "abcabca"


def test_a_higher_priority_goes_first_and_alone():
    turns: Turns[str] = Turns()
    turns.add("a", 0)
    turns.add("b", 5)
    turns.add("c", 5)
    turns.add("z", -1)
    assert take(turns, 4) == "bcbc"
    turns.discard("b")
    turns.discard("c")
    assert take(turns, 2) == "aa"
    turns.discard("a")
    assert take(turns, 2) == "zz"


def test_adding_again_changes_nothing_and_discarding_twice_is_harmless():
    turns: Turns[str] = Turns()
    turns.add("a", 0)
    turns.add("b", 0)
    turns.add("a", 9)
    assert len(turns) == 2
    assert take(turns, 4) == "abab"
    turns.discard("a")
    turns.discard("a")
    turns.discard("never there")
    assert take(turns, 3) == "bbb"
    turns.discard("b")
    assert turns.next() is None
    assert len(turns) == 0


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(-2, 2), st.booleans()), max_size=60))
def test_turns_are_fair_whatever_came_and_went(steps):
    turns: Turns[str] = Turns()
    model: dict[str, int] = {}
    for item, priority, add in steps:
        if add:
            turns.add(item, priority)
            model.setdefault(item, priority)
        else:
            turns.discard(item)
            model.pop(item, None)
        turns.next()
    assert len(turns) == len(model)
    if not model:
        assert turns.next() is None
        return
    top = [item for item, priority in model.items() if priority == max(model.values())]
    counts = Counter(turns.next() for _ in range(3 * len(top)))
    assert counts == dict.fromkeys(top, 3)


def test_a_stalled_connection_is_told_once_and_only_where_another_does_better():
    stalls = Stalls()
    assert stalls.judge([("a", 10, 5), ("b", 10, 0)]) == []  # nothing to compare with
    assert stalls.judge([("a", 20, 5), ("b", 20, 0)]) == []  # slow, not stalled
    for _ in range(PATIENCE - 1):
        assert stalls.judge([("a", 20, 9), ("b", 20, 0)]) == []  # its turn may yet come
    assert stalls.judge([("a", 20, 9), ("b", 20, 0)]) == ["a"]
    assert stalls.judge([("a", 20, 9), ("b", 40, 7)]) == []  # told already
    assert stalls.judge([("a", 21, 8), ("b", 50, 7)]) == []
    for reading in range(1, PATIENCE):
        assert stalls.judge([("a", 21, 8), ("b", 50 + 10 * reading, 7)]) == []
    assert stalls.judge([("a", 21, 8), ("b", 90, 7)]) == ["a"]
    for _ in range(PATIENCE):
        assert stalls.judge([("a", 21, 8), ("b", 90, 7)]) == []  # nobody reads
    assert stalls.stalled == set()
    assert stalls.judge([("b", 60, 0)]) == []
    assert stalls.judge([("b", 60, 0)]) == []  # nothing waits
