"""The cluster's pure policy: members, placement, segments, entries, cutting."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest

import kvpool.cluster
from kvpool.cluster.announcing import ENTRY_TTL_S, LATE_S, Announcer
from kvpool.cluster.claims import MOST_S, Claims
from kvpool.cluster.cut import cut_get, cut_put, pieces
from kvpool.cluster.demand import Demand
from kvpool.cluster.entries import MAX_RECORDS, Draft, decode, resident, short, tails
from kvpool.cluster.hedging import LEAST, Hedges, Latencies
from kvpool.cluster.loads import Loads
from kvpool.cluster.locate import Cut, Whole
from kvpool.cluster.members import Member, Pulse, Roster, Snapshot, State
from kvpool.cluster.placement import LocalFirst, Rendezvous
from kvpool.cluster.replicas import ReplicaPolicy, missing
from kvpool.cluster.segments import SEGMENT_BLOCKS, can_be_cut, segment_key, segments, units_of
from kvpool.cluster.suspects import Suspects
from kvpool.errors import KeyChainError
from kvpool.keys import KeyChain, Namespace
from kvpool.match import match
from kvtransport.errors import ProtocolError
from kvtransport.layout import GroupKind
from tests.poolkit import LAYOUTS, make_core, store

STEP = 16
SEGMENT = SEGMENT_BLOCKS * STEP
HYBRID = LAYOUTS["hybrid"].__class__("no windows", tuple(g for g in LAYOUTS["everything"].groups if g.window is None))
POLICY = (
    "announcing",
    "claims",
    "cut",
    "demand",
    "directory",
    "entries",
    "hedging",
    "loads",
    "locate",
    "members",
    "pacing",
    "placement",
    "replicas",
    "segments",
    "suspects",
)


COMMANDS = ("cli", "pull_cli")
"""Run by a user, not by the simulation."""


def imports_of(path: Path) -> set[str]:
    """First parts of the names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_policy_has_no_clock_no_randomness_and_no_sockets():
    folder = Path(kvpool.cluster.__file__).parent
    for name in POLICY:
        assert not imports_of(folder / f"{name}.py") & {"time", "random", "socket", "asyncio", "redis", "os"}, name


def test_what_the_simulation_runs_has_its_clock_and_its_sockets_from_outside():
    """All of it; randomness is a default of two that are given another in the simulation (as os.urandom is)."""
    for path in Path(kvpool.cluster.__file__).parent.glob("*.py"):
        if path.stem not in COMMANDS:
            assert not imports_of(path) & {"time", "socket", "datetime", "threading"}, path.stem
            assert "random" not in imports_of(path) or path.stem in {"agent", "pool"}, path.stem


def member(name, *, cluster="a", capacity=100, incarnation=1, state=State.UP):
    return Member(
        id=name,
        incarnation=incarnation.to_bytes(16, "little"),
        cluster=cluster,
        addresses=("127.0.0.1:1",),
        capacity=capacity,
        state=state,
    )


# -- members -------------------------------------------------------------------------------------------


def test_a_member_round_trips_and_nonsense_is_refused():
    known = member("n1", state=State.DRAINING)
    assert Member.decode(known.encode()) == known
    for data in (b"", b"junk", b"\x80", known.encode()[:-3], b"x" * 20_000):
        with pytest.raises(ProtocolError):
            Member.decode(data)


def test_the_roster_follows_the_directory():
    roster = Roster(3.0)
    roster.update(0.0, Snapshot(b"e1", (member("a"), member("b"))))
    assert set(roster.members) == {"a", "b"}
    assert not roster.frozen(0.0)
    roster.update(1.0, Snapshot(b"e1", (member("b", incarnation=2), member("c", state=State.DRAINING))))
    assert set(roster.members) == {"b", "c"}
    assert roster.incarnations()["b"] == (2).to_bytes(16, "little")
    assert [m.id for m in roster.writable()] == ["b"]


def test_an_unreachable_directory_freezes_the_view():
    roster = Roster(3.0)
    roster.update(0.0, Snapshot(b"e1", (member("a"),)))
    roster.failed()
    assert roster.frozen(100.0)
    assert set(roster.members) == {"a"}
    roster.update(1.0, Snapshot(b"e1", (member("b"),)))
    assert not roster.frozen(1.0)
    assert set(roster.members) == {"b"}


def test_a_directory_that_lost_everything_is_not_believed_for_two_ttls():
    roster = Roster(3.0)
    roster.update(0.0, Snapshot(b"e1", (member("a"), member("b"))))
    roster.update(1.0, Snapshot(None, ()))  # FLUSHALL
    assert roster.frozen(1.0)
    assert set(roster.members) == {"a", "b"}
    roster.update(2.0, Snapshot(b"e2", (member("b", incarnation=2), member("c"))))  # newcomers and restarts enter
    assert set(roster.members) == {"a", "b", "c"}
    assert roster.incarnations()["b"] == (2).to_bytes(16, "little")
    assert roster.frozen(7.9)
    roster.update(8.1, Snapshot(b"e2", (member("b", incarnation=2),)))
    assert not roster.frozen(8.1)
    assert set(roster.members) == {"b"}


def test_a_node_announces_again_when_it_may_have_been_forgotten():
    pulse = Pulse(3.0)
    assert pulse.interval_s == 1.0
    assert pulse.beaten(0.0, b"e1")
    assert not pulse.beaten(1.0, b"e1")
    assert pulse.beaten(2.0, b"e2")  # the directory lost everything
    assert not pulse.beaten(4.9, b"e2")
    assert pulse.beaten(8.0, b"e2")  # frozen for longer than the TTL


def test_suspects_are_left_alone_for_longer_every_time_and_not_all_equally_long():
    draws = iter([0.0, 0.99, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    suspects = Suspects(lambda: next(draws))
    suspects.failed(0.0, "a")
    suspects.failed(0.0, "b")
    assert suspects.suspect(0.1, "a")
    assert not suspects.suspect(0.2, "a")
    assert suspects.suspect(0.2, "b")
    assert suspects.sorted(0.2, ["b", "a"]) == ["a", "b"]
    for _ in range(6):
        suspects.failed(1.0, "a")
    assert suspects.suspect(1.0 + 9.0, "a")
    assert not suspects.suspect(1.0 + 15.0, "a")
    suspects.well("a")
    assert not suspects.suspect(1.0, "a")


# -- placement -----------------------------------------------------------------------------------------


def names(n):
    return [i.to_bytes(16, "little") for i in range(n)]


def test_shares_follow_capacity():
    members = [member("a", capacity=100), member("b", capacity=200), member("c", capacity=100), member("d", capacity=0)]
    first = [Rendezvous().order(s, members)[0].id for s in names(8000)]
    assert first.count("b") / 8000 == pytest.approx(0.5, abs=0.02)
    assert first.count("a") / 8000 == pytest.approx(0.25, abs=0.02)
    assert "d" not in first


def test_a_node_that_comes_or_goes_moves_only_its_own_segments():
    members = [member(f"n{i}") for i in range(8)]
    before = {s: Rendezvous().order(s, members)[0].id for s in names(2000)}
    without = {s: Rendezvous().order(s, members[:-1])[0].id for s in names(2000)}
    assert all(without[s] == n for s, n in before.items() if n != "n7")
    more = {s: Rendezvous().order(s, [*members, member("new")])[0].id for s in names(2000)}
    moved = [s for s in before if more[s] != before[s]]
    assert {more[s] for s in moved} == {"new"}
    assert len(moved) / 2000 == pytest.approx(1 / 9, abs=0.03)


def test_load_is_even_over_many_nodes():
    members = [member(f"n{i}") for i in range(50)]
    counts = dict.fromkeys((m.id for m in members), 0)
    for s in names(20_000):
        counts[Rendezvous().order(s, members)[0].id] += 1
    assert max(counts.values()) / (20_000 / 50) < 1.25  # sqrt(400) is 5%; the largest of fifty


def test_clusters_and_local_first():
    members = [member("a1"), member("a2"), member("b1", cluster="b")]
    assert {m.id for m in Rendezvous("a").order(b"s", members)} == {"a1", "a2"}
    assert next(m.id for m in LocalFirst("b1").order(b"s", members)) == "b1"
    assert len(LocalFirst("b1").order(b"s", members)) == 3
    assert LocalFirst("gone").order(b"s", members) == Rendezvous().order(b"s", members)


# -- segments and cutting ------------------------------------------------------------------------------


def test_segments_of_a_chain():
    ns = Namespace("t", HYBRID, STEP)
    chain = KeyChain(ns, np.arange(SEGMENT * 2 + 3 * STEP + 5))
    found = list(segments(ns, chain.blocks))
    assert [(s.first, s.stop) for s in found] == [(0, 64), (64, 128), (128, 131)]
    other = KeyChain(ns, np.r_[np.arange(SEGMENT), np.arange(7, 7 + SEGMENT)])
    theirs = list(segments(ns, other.blocks))
    assert found[0].key == theirs[0].key
    assert found[1].key != theirs[1].key
    assert found[0].key != segment_key(Namespace("u", HYBRID, STEP), chain.blocks[0])


def test_units_lead_back_to_the_whole_layout():
    ns = Namespace("t", HYBRID, STEP)
    units = units_of(ns)
    assert [u.kind for u in units] == [GroupKind.FULL, GroupKind.RECURRENT]
    whole = {(s.layer, s.tensor): s.spec for s in HYBRID.slots()}
    seen = set()
    for unit in units:
        for slot in unit.ns.layout.slots():
            place = unit.whole[slot.layer, slot.tensor]
            assert whole[place] == slot.spec
            assert unit.part[place] == (slot.layer, slot.tensor)
            seen.add(place)
    assert seen == set(whole)
    # The same groups inside another whole layout do not meet these.
    dense = units_of(Namespace("t", HYBRID.__class__("no windows", tuple(HYBRID.groups[:2])), STEP))
    assert dense[0].ns.id != units[0].ns.id
    assert not can_be_cut(LAYOUTS["windows"], STEP)
    assert can_be_cut(HYBRID, STEP)


def test_a_put_is_cut_at_segments_and_states_go_where_they_end():
    ns = Namespace("t", HYBRID, STEP)
    chain = KeyChain(ns, np.arange(SEGMENT * 3))
    units = units_of(ns)
    parts = cut_put(units, chain.blocks, start=32, boundary=SEGMENT * 2 + 48, points=(64, SEGMENT, SEGMENT * 2 + 16))
    full = [(p.origin, p.start, p.boundary) for p in parts if p.unit.kind is GroupKind.FULL]
    assert full == [(0, 32, SEGMENT), (SEGMENT, 0, SEGMENT), (SEGMENT * 2, 0, 48)]
    states = [(p.origin, p.points) for p in parts if p.unit.kind is GroupKind.RECURRENT]
    assert states == [(0, (64, SEGMENT)), (SEGMENT * 2, (16, 48))]
    parts = cut_get(units, chain.blocks, start=0, boundary=SEGMENT)
    assert [(p.unit.kind, p.origin, p.boundary) for p in parts] == [
        (GroupKind.FULL, 0, SEGMENT),
        (GroupKind.RECURRENT, 0, SEGMENT),
    ]
    with pytest.raises(KeyChainError, match="inside a block"):
        cut_put(units, chain.blocks, start=0, boundary=40, points=())


def test_units_handed_over_are_split_without_gap_or_overlap():
    ns = Namespace("t", HYBRID, STEP)
    chain = KeyChain(ns, np.arange(SEGMENT * 3))
    parts = cut_put(units_of(ns), chain.blocks, start=16, boundary=SEGMENT * 3, points=(SEGMENT,))
    for first, tokens in ((16, SEGMENT * 3 - 16), (SEGMENT - 8, 16), (SEGMENT, 1)):
        found = sorted(x for p in parts for x in pieces(p, first, tokens))
        assert found[0][0] == first
        assert sum(n for _, n in found) == tokens
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(found))
    assert [x for p in parts for x in pieces(p, SEGMENT, 0)] == [(SEGMENT, 0)]


# -- entries -------------------------------------------------------------------------------------------


def test_entries_round_trip_and_branches_are_told_apart():
    draft = Draft()
    keys = [bytes([i]) * 32 for i in range(64)]
    for i, key in enumerate(keys):
        draft.set(i, 0, key, 0, True)
    draft.set(3, 0, b"other branch" * 3, 0, True)
    draft.set(63, 0, keys[63], 1, True)
    draft.set(5, 7, b"tail" * 8, 1, True)
    entry = decode(draft.encode(b"I" * 16))
    assert entry.incarnation == b"I" * 8
    assert entry.generation == 67
    there = resident(entry, short(keys), 2)
    assert there[0].all()
    assert there[1].tolist() == [False] * 63 + [True]
    branch = [*keys[:3], b"other branch" * 3, *keys[4:]]
    assert resident(entry, short(branch), 2)[0].all()
    assert not resident(entry, short([b"x" * 32] * 64), 2).any()
    (tail,) = tails(entry, 2)
    assert (tail.block, tail.offset, tail.units) == (5, 7, (False, True))
    for i, key in enumerate(keys):
        draft.set(i, 0, key, 0, False)
    draft.set(63, 0, keys[63], 1, False)
    draft.set(5, 7, b"tail" * 8, 1, False)
    draft.set(3, 0, b"other branch" * 3, 0, False)
    assert not draft


def test_what_is_no_entry_is_ignored():
    good = Draft()
    good.set(0, 0, b"k" * 32, 0, True)
    data = good.encode(b"I" * 16)
    for bad in (b"", b"x", data[:-1], data + b"y", data + bytes(8 * (MAX_RECORDS + 1))):
        assert decode(bad) is None
    wild = decode(data[:12] + bytes([255, 255, 0, 0, 1, 2, 3, 4]))
    assert not resident(wild, short([b"k" * 32]), 2).any()


@pytest.mark.parametrize("name", ["everything", "dense", "recurrent", "windows", "full+window"])
def test_what_is_announced_is_what_is_restorable(name):
    """Whole chains with branches, evictions and off-grid checkpoints: the directory's answer is the pool's."""
    core = make_core(pages=20_000)
    announcer = core.watcher = Announcer(b"N" * 16)
    layout = LAYOUTS[name]
    ns = core.open_namespace("t", layout, STEP)
    rng = np.random.default_rng(5)
    trunk = rng.integers(0, 1000, 40 * STEP + SEGMENT).tolist()
    chains = [trunk, [*trunk[: SEGMENT + 48], *rng.integers(0, 1000, 100).tolist()], rng.integers(0, 9, 90).tolist()]
    directory: dict[bytes, bytes] = {}

    def check():
        while changes := announcer.take(0.0, 3):
            for key, entry in changes.items():
                if entry is None:
                    directory.pop(key, None)
                else:
                    directory[key] = entry
        for tokens in chains:
            chain = KeyChain(ns, tokens)
            whole = Whole(ns, chain)
            whole.fill([{"n": directory[k]} if k in directory else {} for k in whole.keys], {"n": b"N" * 16})
            expected = core.match(ns, chain)
            if "n" in whole.views:
                found = match(whole.views["n"], chain.tokens - 1)
                assert list(found.restorable) == [n for n in expected.restorable if n >= STEP]
            else:
                assert all(n < STEP for n in expected.restorable)

    store(core, ns, trunk, SEGMENT + 64, checkpoints=(100, SEGMENT))
    check()
    store(core, ns, chains[1], len(chains[1]), checkpoints=(SEGMENT + 50,))
    check()
    store(core, ns, chains[2], 90, checkpoints=(33,))
    check()
    core.clear()
    check()
    assert not directory
    assert len(announcer) == 0


def test_entries_of_another_incarnation_or_an_unknown_node_are_void():
    core = make_core(pages=20_000)
    announcer = core.watcher = Announcer(b"1" * 16)
    ns = Namespace("t", HYBRID, STEP)
    units = units_of(ns)
    tokens = np.arange(SEGMENT + 64).tolist()
    chain = KeyChain(ns, tokens)
    for unit in units:
        core.open_namespace("t", unit.ns.layout, STEP, unit.ns.salt)
    for part in cut_put(units, chain.blocks, start=0, boundary=SEGMENT + 64, points=(SEGMENT,)):
        keys = part.unit.chain(chain.blocks, part.segment, part.stop_block)
        put = core.begin_put(
            part.unit.ns, keys, boundary=part.boundary, start=part.start, checkpoints=part.points, deadline=2000.0
        )
        for slot, extent in put.extents.items():
            put.progress(*slot, 0, extent.nbytes)
        put.commit()
    cut = Cut(ns, units, chain.blocks)
    answers = [{"n": e} if e else {} for e in announcer.entries(cut.keys)]
    assert cut.fill(answers, {"n": b"1" * 16}) == []
    assert match(cut.view(), chain.tokens).restorable == (SEGMENT, SEGMENT + 64)
    assert match(cut.view(frozenset({"other"})), chain.tokens).length == 0
    for known in ({"n": b"2" * 16}, {}):
        cut = Cut(ns, units, chain.blocks)
        assert len(cut.fill(answers, known)) == 4
        assert match(cut.view(), chain.tokens).length == 0


def test_entries_are_said_again_before_they_are_forgotten():
    core = make_core(pages=20_000)
    announcer = core.watcher = Announcer(b"N" * 16)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, np.arange(SEGMENT * 3).tolist())
    assert announcer.pending == 3
    assert len(announcer.take(0.0, 2)) == 2
    assert len(announcer.take(1.0, 2)) == 1
    assert not announcer.take(1.0, 2)
    announcer.refresh(0.5 + ENTRY_TTL_S / 2, 10)
    changes = announcer.take(1000.0, 10)
    assert len(changes) == 2
    announcer.failed(1000.0, changes)
    assert announcer.pending == 2
    announcer.again()
    assert len(announcer.take(1001.0, 10)) == 3
    # What got no answer is said once more when it cannot arrive late any more.
    announcer.refresh(1000.0 + LATE_S - 0.1, 10)
    assert not announcer.pending
    announcer.refresh(1000.0 + LATE_S, 10)
    assert set(announcer.take(1010.0, 10)) == set(changes)
    assert len(announcer) == 3


def test_an_owner_says_again_what_was_seen_in_another_generation():
    core = make_core(pages=20_000)
    announcer = core.watcher = Announcer(b"N" * 16)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, np.arange(SEGMENT).tolist())
    ((name, data),) = announcer.take(0.0, 10).items()
    seen = decode(data).generation
    assert announcer.validate({name: seen}) == [True]
    assert announcer.pending == 0
    core.clear()
    assert announcer.take(1.0, 10) == {name: None}
    assert announcer.validate({name: seen}) == [False]
    assert announcer.take(2.0, 10) == {name: None}


def test_what_nobody_heard_of_is_not_remembered_when_it_is_gone():
    """A node without a directory has nobody to tell: what it keeps is what it holds, however much has come and gone."""
    core = make_core(pages=64)
    announcer = core.watcher = Announcer(b"N" * 16)
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    for i in range(200):
        store(core, ns, [i, *range(90)], 91, checkpoints=(33,))  # evicts what came before, sooner or later
    assert sum(core.memory.evictions.values()) > 500
    assert len(announcer) == announcer.pending == len({path.keys[0] for path in core.chains(ns)}) < 20
    core.clear()
    assert len(announcer) == announcer.pending == 0


def test_what_somebody_may_have_heard_of_is_said_to_be_gone():
    core = make_core(pages=20_000)
    announcer = core.watcher = Announcer(b"N" * 16)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    tokens = np.arange(SEGMENT).tolist()
    store(core, ns, tokens)
    (name,) = announcer.names
    assert announcer.entries([name]) != [b""]  # a peer asked
    core.clear()
    assert announcer.take(0.0, 10) == {name: None}
    # Nobody answered; meanwhile it came and went once more.
    announcer.failed(0.0, [name])
    store(core, ns, tokens)
    core.clear()
    assert announcer.take(1.0, 10) == {name: None}
    store(core, ns, tokens)  # the first word of it may arrive late still
    core.clear()
    assert announcer.take(2.0, 10) == {name: None}
    announcer.refresh(LATE_S, 10)
    assert announcer.take(LATE_S, 10) == {name: None}
    store(core, ns, tokens)
    core.clear()
    assert announcer.take(LATE_S + 1, 10) == {}
    assert len(announcer) == announcer.pending == 0


# -- copies --------------------------------------------------------------------------------------------


def test_hits_fade_and_the_table_is_bounded():
    demand = Demand(half_life_s=10.0, most=3)
    assert [demand.hit(0.0, b"a") for _ in range(3)] == [1.0, 2.0, 3.0]
    assert demand.heat(10.0, b"a") == pytest.approx(1.5)
    assert demand.hit(20.0, b"a") == pytest.approx(1.75)
    assert demand.heat(5.0, b"never") == 0.0
    for name in (b"b", b"c", b"d"):
        demand.hit(21.0, name)
    assert len(demand) == 3
    assert demand.heat(21.0, b"a") == 0.0  # not read for longest
    assert demand.heat(21.0, b"d") == 1.0


def test_how_many_copies():
    ns = Namespace("default", HYBRID, STEP)
    policy = ReplicaPolicy(factor=1, by_model={HYBRID.model: 2, f"other/{HYBRID.model}": 3}, most=4, hits_per_copy=10)
    assert policy.base(ns) == 2
    assert policy.base(Namespace("other", HYBRID, STEP)) == 3
    assert policy.base(Namespace("default", LAYOUTS["hybrid"], STEP)) == 1
    assert [policy.wanted(ns, heat, 2) for heat in (0, 4, 10, 14, 15, 1000)] == [2, 2, 3, 3, 4, 4]
    assert ReplicaPolicy(factor=6, most=2).wanted(ns, 1e9, 1) == 6  # the factor is never undercut


@pytest.mark.parametrize(
    ("holders", "wanted", "me", "expected"),
    [
        ("a", 1, "a", ""),
        ("a", 2, "a", "b"),
        ("a", 3, "a", "bc"),
        ("ab", 2, "a", ""),
        ("d", 2, "d", "ab"),  # both homes lack it
        ("bd", 2, "b", "a"),
        ("bd", 2, "d", ""),  # the first holder's task
        ("bd", 1, "b", "a"),  # a joined
        ("", 2, "a", ""),
        ("x", 2, "x", ""),  # x takes no data any more: draining
        ("a", 9, "a", "bcd"),
    ],
)
def test_who_copies_what_to_whom(holders, wanted, me, expected):
    assert missing("abcd", set(holders), wanted, me) == list(expected)


def test_nothing_moves_by_an_old_view():
    """A process that was stopped wakes with a view that nothing has marked as frozen."""
    roster = Roster(3.0)
    assert not roster.steady(0.0)
    roster.update(0.0, Snapshot(b"e1", (member("a"),)))
    roster.update(6.0, Snapshot(b"e1", (member("a"),)))
    assert roster.steady(9.0)
    assert not roster.steady(9.1)
    assert not roster.frozen(9.1)
    roster.update(100.0, Snapshot(b"e1", (member("a"),)))
    assert roster.steady(100.0)
    roster.failed()
    assert not roster.steady(100.0)


def test_who_has_just_joined_moves_nothing():
    """It cannot tell a directory that lost everything moments ago from a small cluster."""
    roster = Roster(3.0)
    for now in (0.0, 2.0, 4.0, 5.9):
        roster.update(now, Snapshot(b"e1", (member("a"),)))
        assert not roster.steady(now)
        assert not roster.frozen(now)
    assert roster.steady(6.0)


def test_a_loss_is_as_young_as_the_answer_that_tells_of_it():
    """A process asks, is stopped, and wakes with an answer that was given long after."""
    roster = Roster(1.0)
    roster.update(0.0, Snapshot(b"e1", (member("a"), member("b"))))
    roster.update(2.5, Snapshot(b"e2", (member("a"),)), heard=4.0)
    assert set(roster.members) == {"a", "b"}
    roster.update(5.9, Snapshot(b"e2", (member("a"),)))
    assert roster.frozen(5.9)
    roster.update(6.1, Snapshot(b"e2", (member("a"),)))
    assert not roster.frozen(6.1)
    # The view itself is as old as the question.
    roster.update(6.2, Snapshot(b"e2", (member("a"),)), heard=7.5)
    assert not roster.steady(7.5)


def test_a_directory_that_is_back_may_have_forgotten_everybody():
    """It was out of everybody's reach for longer than the TTL: records have expired, its epoch is the same."""
    roster = Roster(3.0)
    roster.update(0.0, Snapshot(b"e1", (member("a"), member("b"))))
    roster.failed()
    roster.update(5.0, Snapshot(b"e1", ()))
    assert set(roster.members) == {"a", "b"}
    assert roster.frozen(5.0)
    roster.update(7.0, Snapshot(b"e1", (member("b"),)))
    assert set(roster.members) == {"a", "b"}
    roster.update(11.0, Snapshot(b"e1", (member("b"),)))
    assert set(roster.members) == {"b"}
    assert not roster.frozen(11.0)
    # One answer that did not come is no reason: nobody's record expires in between.
    roster.failed()
    roster.update(12.0, Snapshot(b"e1", (member("b"),)))
    assert not roster.frozen(12.0)


# -- reads ---------------------------------------------------------------------------------------------


def test_the_p99_is_of_reads_of_that_size():
    known = Latencies()
    for i in range(LEAST - 1):
        known.add(1 << 20, 0.010)
    assert known.p99(1 << 20) is None
    for i in range(1000):
        known.add(1 << 20, 0.5 if i % 200 == 0 else 0.010)  # one in 200 is slow
    assert known.p99(1 << 20) == pytest.approx(0.0105, rel=0.1)
    for _ in range(20):
        known.add(1 << 20, 0.5)
    assert known.p99(1 << 20) == pytest.approx(0.52, rel=0.1)
    assert known.p99(1 << 10) is None
    for _ in range(20_000):
        known.add(1 << 20, 0.001)
    assert known.p99(1 << 20) == pytest.approx(0.00105, rel=0.1)  # what was long ago has faded


def test_second_reads_are_few_and_take_bounded_memory():
    hedges = Hedges(part=0.1, burst=2.0, scratch_bytes=1000)
    for _ in range(LEAST):
        hedges.latencies.add(600, 0.01)
    assert hedges.delay(600) is None  # none earned yet
    for _ in range(1000):
        hedges.read()
    assert hedges.delay(600) is not None
    assert hedges.delay(2000) is None
    assert hedges.take(600)
    assert not hedges.take(600)  # memory
    hedges.give_back(600)
    assert hedges.take(600)
    hedges.give_back(600)
    assert not hedges.take(600)  # the burst is used up
    taken = 0
    for _ in range(1000):
        hedges.read()
        if hedges.take(600):
            hedges.give_back(600)
            taken += 1
    assert taken in (99, 100)


def test_the_replica_with_the_least_load_is_read():
    draws = itertools.cycle((0.1, 0.9))
    suspects = Suspects(lambda: 0.5)
    loads = Loads(suspects, lambda: next(draws))
    members = {m.id: m for m in (member("a"), member("b"), member("c"))}
    assert loads.order(0.0, ["a", "b"], members) == ["a", "b"]
    next(draws)
    assert loads.order(0.0, ["a", "b"], members) == ["b", "a"]  # alike: by chance
    loads.begin("a", 100)
    assert loads.order(0.0, ["a", "b", "c"], members)[-1] == "a"
    members["b"] = msgspec.structs.replace(members["b"], load=1000)
    assert loads.order(0.0, ["a", "b", "c"], members) == ["c", "a", "b"]
    suspects.failed(0.0, "c")
    assert loads.order(0.0, ["a", "b", "c"], members) == ["a", "b", "c"]
    loads.end("a", 100)
    assert loads.order(0.0, ["a", "gone"], members)[0] in ("a", "gone")


def test_one_tries_a_node_that_had_failed():
    suspects = Suspects(lambda: 0.5)
    suspects.probing(0.0, "n", 3.0)
    assert not suspects.suspect(0.0, "n")  # it never failed: everybody may
    suspects.failed(0.0, "n")
    assert suspects.suspect(0.1, "n")
    assert not suspects.suspect(0.3, "n")
    suspects.probing(0.3, "n", 3.0)
    assert suspects.suspect(0.4, "n")
    suspects.well("n")
    assert not suspects.suspect(0.4, "n")


def test_the_first_who_misses_computes():
    claims = Claims()
    name, one, two = b"name", b"1" * 16, b"2" * 16
    assert claims.ask(0.0, name, one, 10.0) == 0.0
    assert claims.ask(1.0, name, two, 10.0) == 9.0
    assert claims.ask(2.0, name, one, 10.0) == 0.0  # it asks again: it has longer
    assert claims.ask(3.0, name, two, 10.0) == 9.0
    claims.end(name, two)  # not its
    assert claims.ask(3.0, name, two, 10.0) == 9.0
    claims.end(name, one)
    assert claims.ask(3.0, name, two, 1e9) == 0.0
    assert claims.ask(3.0 + MOST_S, name, one, 1.0) == 0.0
    assert len(claims) == 1
