"""Where states are worth taking: the branch point, the end, and what the engine insists on."""

import numpy as np
import pytest

from kvpool.admission import plan_checkpoints
from kvpool.errors import KeyChainError
from kvpool.keys import KeyChain
from kvpool.match import GroupRule
from kvtransport.layout import GroupKind
from tests.poolkit import LAYOUTS, STEP, check_get, check_idle, make_core, store

FULL = GroupRule("full", GroupKind.FULL)
STATE = GroupRule("state", GroupKind.RECURRENT)
WINDOW = GroupRule("window", GroupKind.SLIDING, 40)
TOKENS = np.random.default_rng(3).integers(0, 50_000, 400).tolist()


def plan(rules=(FULL, STATE), tokens=100, **facts):
    facts = {"known": 0, "branches": False, "restorable": (), "resident": 0, "off_grid": True, **facts}
    return plan_checkpoints(rules, STEP, tokens, **facts)


def test_nothing_known_leaves_the_end():
    assert plan().lengths == (100,)
    assert plan(off_grid=False).lengths == (96,)
    assert plan(tokens=10, off_grid=False).lengths == ()


def test_at_most_two_of_our_own():
    hints = plan(known=64, branches=True, resident=64)
    assert (hints.lengths, hints.branch, hints.last) == ((64, 100), 64, 100)
    assert hints.start == 48  # the state at 64 must lie behind the put's start


def test_a_continuation_is_no_branch():
    hints = plan(known=64, branches=False, restorable=(64,), resident=64)
    assert (hints.lengths, hints.restorable, hints.start) == ((100,), 64, 64)


def test_a_branch_that_can_be_restored_needs_no_state():
    assert plan(known=64, branches=True, restorable=(32, 64), resident=64).lengths == (100,)
    assert plan(known=64, branches=True, restorable=(32,), resident=64).lengths == (64, 100)
    # An off-grid checkpoint beyond the known blocks: the branch lies before where prefill starts.
    assert plan(known=64, branches=True, restorable=(70,), resident=64).lengths == (100,)


def test_what_is_there_already_is_not_taken_again():
    hints = plan(known=96, branches=True, restorable=(100,), resident=96)
    assert hints.branch == 96  # a match never covers the last token: the whole is computed once more
    assert hints.last is None


def test_the_engine_may_insist():
    hints = plan(insists=(16, 40, 100, 0, 101, -5))
    assert hints.lengths == (16, 40, 100)
    assert plan(insists=(16, 40), off_grid=False).lengths == (16, 96)
    assert plan(insists=(32,), restorable=(32,)).lengths == (100,)


def test_full_attention_needs_no_checkpoints():
    hints = plan((FULL,), known=64, branches=True, restorable=(16, 32, 48, 64), resident=64)
    assert (hints.lengths, hints.restorable, hints.start) == ((), 64, 64)
    assert plan((FULL,), tokens=64, known=64, restorable=(16, 32, 48, 64), resident=64).start == 48


def test_a_put_carries_the_window_of_its_first_checkpoint():
    hints = plan((FULL, WINDOW), tokens=200, known=160, branches=True, resident=160)
    assert (hints.lengths, hints.start) == ((160, 200), 112)  # 160 - 39, rounded down
    hints = plan((FULL, WINDOW), tokens=200, known=160, restorable=(144, 160), resident=160)
    assert (hints.lengths, hints.start) == ((200,), 160)


# -- with a pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_states_where_the_hints_say_serve_the_next_one(name):
    """Two sequences share a document; the third, with the same document, starts behind it."""
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS[name], STEP)
    for i in range(3):
        tokens = [*TOKENS[:100], *np.random.default_rng(i).integers(0, 50_000, 60).tolist()]
        chain = KeyChain(ns, tokens)
        hints = core.checkpoint_hints(ns, chain)
        assert hints.restorable == core.match(ns, chain).length
        assert len(hints.lengths) <= 2
        store(core, ns, tokens, start=hints.start, checkpoints=hints.lengths)
        for length in hints.lengths:
            check_get(core, ns, tokens, length)
    assert hints.restorable == 96
    check_idle(core)


def test_a_conversation_is_continued_off_the_grid():
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    for n in (70, 150, 333):
        hints = core.checkpoint_hints(ns, KeyChain(ns, TOKENS[:n]))
        assert hints.last == n
        store(core, ns, TOKENS, n, start=hints.start, checkpoints=hints.lengths)
    assert hints.restorable == 150
    assert core.match(ns, KeyChain(ns, TOKENS)).length == 333
    check_idle(core)


def test_engine_hashes_stay_on_the_grid():
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    chain = KeyChain.of_hashes(ns, [bytes([i]) * 8 for i in range(6)], 100)
    hints = core.checkpoint_hints(ns, chain, insists=(33, 48))
    assert hints.lengths == (48, 96)
    other = core.open_namespace("t", LAYOUTS["dense"], STEP)
    with pytest.raises(KeyChainError, match="another namespace"):
        core.checkpoint_hints(other, chain)


def test_asking_touches_nothing():
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    store(core, ns, TOKENS, 96, checkpoints=(32,))
    before = core.stat(), core._rooms[ns.id].tree._rank.copy()
    core.checkpoint_hints(ns, KeyChain(ns, [*TOKENS[:64], 1, 2, 3]))
    assert core.stat() == before[0]
    assert (core._rooms[ns.id].tree._rank == before[1]).all()
