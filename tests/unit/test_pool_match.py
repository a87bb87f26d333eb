"""The three hit rules, on views made by hand."""

import json

import numpy as np
import pytest

from kvpool.match import Ghost, GroupRule, Reason, Tail, View, explain, match, restorable
from kvtransport.layout import GroupKind

FULL = GroupRule("full", GroupKind.FULL)
LINEAR = GroupRule("linear", GroupKind.RECURRENT)


def window(tokens):
    return GroupRule("window", GroupKind.SLIDING, tokens)


def view(rules, rows, tails=()):
    resident = np.array([[c == "x" for c in row] for row in rows], dtype=np.bool_).reshape(len(rules), -1)
    return View(16, tuple(rules), resident, tuple(tails))


def no_ghost(group, position):
    return None


def test_full_attention_needs_every_block():
    assert restorable(view([FULL], ["xx.xx"])) == [16, 32]
    assert restorable(view([FULL], [".xxxx"])) == []
    assert restorable(view([FULL], [""])) == []


def test_recurrent_needs_the_exact_state():
    assert restorable(view([LINEAR], [".x..x"])) == [32, 80]
    assert restorable(view([FULL, LINEAR], ["xxxx.", ".x..x"])) == [32]


@pytest.mark.parametrize(
    ("tokens", "row", "lengths"),
    [
        (2, "..x.x", [48, 80]),  # one token before the endpoint: its block
        (17, "..x.xx", [48, 80, 96]),  # 16 tokens: exactly the last block
        (18, "..x.xx", [96]),  # 17 tokens: two blocks
        (33, ".xxx", [48, 64]),
        (34, "xx.xxx", [16, 32, 96]),  # near the start the window is cut at 0
        (10_000, "xxx.x", [16, 32, 48]),
    ],
)
def test_sliding_needs_its_window(tokens, row, lengths):
    assert restorable(view([window(tokens)], [row])) == lengths


def test_every_recurrent_group_needs_its_state():
    other = GroupRule("mamba", GroupKind.RECURRENT)
    assert restorable(view([LINEAR, other], ["xx.x", ".xx."])) == [32]


def test_the_match_is_no_minimum_of_reaches():
    # Full reaches 64 and the states 80, but at 64 there is no state: the minimum, 64, would be wrong.
    found = match(view([FULL, LINEAR], ["xxxx.", ".x..x"]), 1000)
    assert found.reach == {"full": 64, "linear": 80}
    assert found.length == 32
    assert found.restorable == (32,)


def test_a_match_stays_below_its_limit():
    rows = view([FULL], ["xxxx"])
    assert match(rows, 64).length == 64
    assert match(rows, 63).length == 48
    assert match(rows, 15).length == 0
    assert match(rows, 0).reach == {"full": 0}


def test_off_grid_checkpoints():
    rules = [FULL, window(18), LINEAR]
    rows = ["xxx", ".xx", "..."]
    good = Tail(40, (True, True, True))
    assert restorable(view(rules, rows, [good])) == [40]
    # 40 - 17 = 23 lies in block 1, which is there; 34 - 17 = 17 too; 20 - 17 = 3 lies in block 0, which is not.
    assert restorable(view(rules, rows, [Tail(34, (True,) * 3), Tail(20, (True,) * 3)])) == [34]
    for missing in range(3):
        assert restorable(view(rules, rows, [Tail(40, tuple(i != missing for i in range(3)))])) == []
    # Beyond the path's blocks, or with a hole before it.
    assert restorable(view(rules, rows, [Tail(70, (True,) * 3)])) == []
    assert restorable(view([FULL], ["x.x"], [Tail(50, (True,))])) == [16]
    # Inside the very first block nothing but the tail is needed.
    assert restorable(view(rules, ["", "", ""], [Tail(7, (True,) * 3)])) == [7]


def test_explaining_full_attention():
    rows = view([FULL], ["xx.."])
    text = explain(rows, 64, 100.0, no_ghost)
    assert text.groups[0].ended_by is Reason.NEVER_STORED
    assert text.groups[0].at == 32

    def gone(group, position):
        return Ghost(90.0, "capacity") if position == 48 else None

    told = explain(rows, 64, 100.0, gone)
    assert told.groups[0].ended_by is Reason.EVICTED
    assert "10.0 s ago (capacity)" in told.groups[0].detail
    assert "full: evicted" in told.verdict


def test_explaining_states():
    rows = view([FULL, LINEAR], ["xxxx", ".x.."])
    told = explain(rows, 64, 100.0, no_ghost)
    full, linear = told.groups
    assert full.ended_by is Reason.COMPLETE
    assert linear.ended_by is Reason.NO_CHECKPOINT
    assert linear.reach == 32
    assert "blocks are there up to 64" in linear.detail
    told = explain(rows, 64, 100.0, lambda g, p: Ghost(99.0, "quota") if (g, p) == (1, 64) else None)
    assert told.groups[1].ended_by is Reason.EVICTED
    assert told.groups[1].at == 64


def test_explaining_windows():
    rows = view([FULL, window(34)], ["xxxx", "x.xx"])  # three blocks needed
    told = explain(rows, 64, 5.0, lambda g, p: Ghost(1.0, "capacity") if (g, p) == (1, 32) else None)
    assert told.match.length == 16
    assert told.groups[1].ended_by is Reason.EVICTED
    assert told.groups[1].at == 16


def test_explaining_other_fingerprints():
    nothing = view([FULL, LINEAR], ["", ""])
    assert {g.ended_by for g in explain(nothing, 64, 0.0, no_ghost).groups} == {Reason.NEVER_STORED}
    told = explain(nothing, 64, 0.0, no_ghost, elsewhere=Reason.OTHER_FINGERPRINT)
    assert {g.ended_by for g in told.groups} == {Reason.OTHER_FINGERPRINT}
    told = explain(nothing, 64, 0.0, no_ghost, elsewhere=Reason.OTHER_TENANT)
    assert "other tenant: the same tokens are stored by another tenant" in str(told)


def test_an_explanation_is_text_and_json():
    told = explain(view([FULL, LINEAR], ["xxxx", ".x.."]), 64, 100.0, no_ghost)
    body = json.loads(json.dumps(told.as_dict()))
    assert body["length"] == 32
    assert [g["ended_by"] for g in body["groups"]] == ["complete", "no_checkpoint"]
    assert str(told).splitlines()[0] == "match: 32 of at most 64 tokens (linear: no checkpoint)"
    complete = explain(view([FULL], ["xx"]), 40, 0.0, no_ghost)
    assert complete.verdict == "all that was asked for"


def test_explaining_when_no_group_alone_is_to_blame():
    told = explain(view([FULL, LINEAR], ["xxx.", ".x.x"]), 64, 0.0, no_ghost)
    assert told.match.length == 32
    assert told.verdict.startswith("no longer length suits all groups; full")
