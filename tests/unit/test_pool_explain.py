"""Why a match is as long as it is: every reason, brought about in a pool, as text and as JSON."""

import json

import numpy as np
import pytest

from kvpool.keys import KeyChain
from kvpool.match import Reason
from kvtransport.layout import GroupKind
from tests.poolkit import LAYOUTS, STEP, check_idle, make_core, store

TOKENS = np.random.default_rng(7).integers(0, 50_000, 400).tolist()


@pytest.fixture
def core():
    return make_core()


@pytest.fixture
def ns(core):
    return core.open_namespace("t", LAYOUTS["everything"], STEP)


def evict(core, unit, block, why):
    """One entry of the only chain."""
    (room,) = core._rooms.values()
    node = int(room.tree.find(KeyChain(room.tree.ns, TOKENS).blocks)[block])
    room.tree.evict(unit(room.tree), node, why)
    core._eviction.forget("t", 1)


def full(core, ns):
    store(core, ns, TOKENS, 128)


def never(core, ns):
    store(core, ns, TOKENS, 64)


def cleared(core, ns):
    store(core, ns, TOKENS, 128)
    core.clear()
    core.clock.now += 7.25


def state_evicted(core, ns):
    store(core, ns, TOKENS, 128, checkpoints=(64,))
    evict(core, lambda tree: tree.state, 7, "capacity")
    core.clock.now += 2


def state_elsewhere(core, ns):
    store(core, ns, [*TOKENS[:64], *TOKENS[200:264]], 128)  # its only state is behind the branch


def salted(core, ns):
    store(core, core.open_namespace("t", LAYOUTS["everything"], STEP, b"salt"), TOKENS, 128)


def of_another_tenant(core, ns):
    store(core, core.open_namespace("u", LAYOUTS["everything"], STEP), TOKENS, 128)


@pytest.mark.parametrize(
    ("given", "length", "reason", "says"),
    [
        (full, 128, Reason.COMPLETE, "match: 128 of at most 128 tokens (all that was asked for)"),
        (never, 64, Reason.NEVER_STORED, "reaches 64; never stored: nothing that goes on as this does after 64 tokens"),
        (cleared, 0, Reason.EVICTED, "evicted: what ended at 16 was evicted 7.2 s ago (cleared)"),
        (state_evicted, 64, Reason.EVICTED, "evicted: what ended at 128 was evicted 2.0 s ago (capacity)"),
        (state_elsewhere, 0, Reason.NO_CHECKPOINT, "no checkpoint: blocks are there up to 64, but no state beyond 0"),
        (salted, 0, Reason.OTHER_FINGERPRINT, "other fingerprint: the same tokens are stored under another layout"),
        (of_another_tenant, 0, Reason.OTHER_TENANT, "other tenant: the same tokens are stored by another tenant"),
    ],
)
def test_every_reason_as_text_and_as_json(core, ns, given, length, reason, says):
    given(core, ns)
    before = core.stat()
    told = core.explain(ns, KeyChain(ns, TOKENS), 128, operator=True)
    assert core.stat() == before  # it touches nothing
    assert told.match.length == length
    assert says in str(told)
    body = json.loads(json.dumps(told.as_dict()))
    assert (body["length"], body["limit"]) == (length, 128)
    assert [g["group"] for g in body["groups"]] == [g.name for g in ns.layout.groups]
    ended = {g["ended_by"]: g for g in body["groups"]}
    assert str(reason) in ended
    for group, line in zip(body["groups"], str(told).splitlines()[1:], strict=True):
        assert line.startswith(f"  {group['group']} ({group['kind']}): reaches {group['reach']}; ")
        assert group["ended_by"].replace("_", " ") in line
        assert group["detail"] in line


def test_a_quota_is_named():
    core = make_core(tenant_quota_bytes={"t": 40 * 256})
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, TOKENS, 192)
    store(core, ns, TOKENS[::-1], 192)
    (group,) = core.explain(ns, KeyChain(ns, TOKENS)).as_dict()["groups"]
    assert group["ended_by"] == "evicted"
    assert group["detail"].endswith("(quota)")


def test_other_fingerprints_of_the_same_tenant_are_explained(core, ns):
    store(core, ns, TOKENS, 64)
    salted = core.open_namespace("t", LAYOUTS["everything"], STEP, b"salt")
    told = core.explain(salted, KeyChain(salted, TOKENS))
    assert told.groups[0].ended_by is Reason.OTHER_FINGERPRINT
    bigger = core.open_namespace("t", LAYOUTS["everything"], 32)
    assert core.explain(bigger, KeyChain(bigger, TOKENS)).groups[0].ended_by is Reason.OTHER_FINGERPRINT
    assert core.explain(bigger, KeyChain(bigger, TOKENS[1:])).groups[0].ended_by is Reason.NEVER_STORED


def test_an_evicted_checkpoint_off_the_grid_is_explained():
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    store(core, ns, TOKENS, 70)
    chain = KeyChain(ns, TOKENS[:90])
    assert core.explain(ns, chain).match.length == 70
    while core._eviction.evict(None, "capacity"):
        told = core.explain(ns, chain)
        assert told.match.length == 0
        states = [g for g in told.groups if g.kind is GroupKind.RECURRENT]
        assert {(g.ended_by, g.at) for g in states} == {(Reason.EVICTED, 70)}
    assert "what ended at 70 was evicted 0.0 s ago (capacity)" in str(told)
    assert {g.ended_by for g in told.groups} == {Reason.EVICTED}
    check_idle(core)
