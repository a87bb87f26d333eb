"""Restorable lengths against the rules written down naively."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.match import GroupRule, Tail, View, match, restorable
from kvtransport.layout import GroupKind

STEP = 16


@st.composite
def views(draw):
    rules = []
    for i in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(GroupKind))
        rules.append(GroupRule(f"g{i}", kind, draw(st.integers(2, 70)) if kind is GroupKind.SLIDING else None))
    blocks = draw(st.integers(0, 7))
    likely = st.integers(0, 5).map(bool)  # mostly there
    resident = [[draw(likely) for _ in range(blocks)] for _ in rules]
    tails = draw(
        st.lists(st.integers(1, 8 * STEP - 1).filter(lambda p: p % STEP), max_size=4, unique=True).flatmap(
            lambda ps: st.tuples(*(st.tuples(st.just(p), st.tuples(*(likely for _ in rules))) for p in ps))
        )
    )
    array = np.array(resident, dtype=np.bool_).reshape(len(rules), blocks)
    return View(STEP, tuple(rules), array, tuple(Tail(p, r) for p, r in tails))


def _allowed(view: View, group: int, b: int) -> bool:
    rule, row = view.rules[group], view.resident[group]
    blocks = len(row)
    tail = next((t for t in view.tails if t.position == b), None)
    if b % STEP and tail is None:
        return False

    def has(token: int) -> bool:
        block = token // STEP
        if b % STEP and block == b // STEP:
            return tail.resident[group]
        return block < blocks and bool(row[block])

    if b // STEP > blocks:
        return False
    if rule.kind is GroupKind.RECURRENT:
        return tail.resident[group] if b % STEP else bool(row[b // STEP - 1])
    first = 0 if rule.kind is GroupKind.FULL else max(0, b - (rule.window - 1))
    return all(has(t) for t in range(first, b))


@settings(max_examples=300, deadline=None)
@given(views(), st.integers(0, 130))
def test_restorable_lengths_are_those_of_the_rules(view, limit):
    every = range(1, 9 * STEP)
    groups = range(len(view.rules))
    expected = [b for b in every if all(_allowed(view, g, b) for g in groups)]
    assert restorable(view) == expected
    found = match(view, limit)
    assert list(found.restorable) == [b for b in expected if b <= limit]
    assert found.length == max(found.restorable, default=0)
    for g in groups:
        assert found.reach[view.rules[g].name] == max(
            (b for b in every if b <= limit and _allowed(view, g, b)), default=0
        )
