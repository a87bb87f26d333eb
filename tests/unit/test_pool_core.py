"""The pool as a state machine: puts, gets, eviction, leases, tenants, requests."""

import numpy as np
import pytest

from kvpool.arena import BlockClass
from kvpool.errors import (
    DuplicateRequestError,
    KeyChainError,
    LeaseError,
    MissError,
    NamespaceError,
    PoolFullError,
    PrefixMissingError,
    QuotaError,
)
from kvpool.eviction import GhostList
from kvpool.flat import FlatGet
from kvpool.keys import KeyChain, Namespace
from kvpool.match import Reason
from kvpool.steps import run
from kvtransport.buffers import PageList
from kvtransport.errors import (
    ConfigError,
    DeadlineError,
    IntegrityError,
    KVBufferError,
    LayoutError,
    ManifestError,
    TransferCancelledError,
    TransferError,
)
from kvtransport.layout import GroupKind
from tests.poolkit import LAYOUTS, STEP, check_get, check_idle, check_sources, content, fill, make_core, scribble, store

TOKENS = np.random.default_rng(7).integers(0, 50_000, 400).tolist()
DENSE_PAGE = 448
"""A block of the dense layout is one page of this size."""
REQUEST = bytes(range(16))


@pytest.fixture
def core():
    return make_core()


@pytest.fixture
def ns(core):
    return core.open_namespace("t", LAYOUTS["everything"], STEP)


def lengths(core, ns, tokens=TOKENS):
    return list(core.match(ns, KeyChain(ns, tokens)).restorable)


def begin(core, ns, tokens=TOKENS, boundary=100, **options):
    options.setdefault("deadline", core.clock() + 60)
    chain = options.pop("chain", ...)
    return core.begin_put(ns, KeyChain(ns, tokens) if chain is ... else chain, boundary=boundary, **options)


def get(core, ns, tokens=TOKENS, boundary=100, **options):
    options.setdefault("deadline", core.clock() + 60)
    chain = options.pop("chain", ...)
    return core.plan_get(ns, KeyChain(ns, tokens) if chain is ... else chain, boundary=boundary, **options)


# -- storing and reading -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("boundary", "checkpoints"), [(96, ()), (100, ()), (7, ()), (200, (32, 64, 70, 71, 150, 160, 199))]
)
def test_what_was_put_comes_back(name, boundary, checkpoints):
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS[name], STEP)
    store(core, ns, TOKENS, boundary, checkpoints=checkpoints)
    found = lengths(core, ns)
    assert {*checkpoints, boundary} <= set(found)
    if ns.layout.has_states:
        assert set(found) == {*checkpoints, boundary}
    for length in found:
        check_get(core, ns, TOKENS, length)
        for start in (1, 16, 33, 64, length - 1):
            if 0 < start < length:
                check_get(core, ns, TOKENS, length, start=start)
    check_idle(core)


def test_manifests_match_destinations_and_sources(core, ns):
    put = begin(core, ns, boundary=100, checkpoints=(33, 64))
    manifest = put.manifest(REQUEST)
    manifest.check(ns.layout, block_tokens=STEP)
    assert manifest.boundary == 100
    assert {s: p.nbytes for s, p in put.destinations.items()} == {s: e.nbytes for s, e in manifest.by_slot.items()}
    fill(put, TOKENS)
    put.commit()
    reader = get(core, ns, boundary=64, start=20)
    manifest = reader.manifest(REQUEST)
    manifest.check(ns.layout, block_tokens=STEP)
    assert {s: p.nbytes for s, p in reader.sources.items()} == {s: e.nbytes for s, e in manifest.by_slot.items()}
    reader.close()


def test_destinations_never_overlap(core, ns):
    puts = [begin(core, ns, TOKENS[i:], boundary=90, checkpoints=(20, 40)) for i in range(3)]
    pieces = np.concatenate([p.pieces for put in puts for p in put.destinations.values()])
    pieces = pieces[np.argsort(pieces[:, 0])]
    assert (pieces[1:, 0] >= pieces[:-1, 0] + pieces[:-1, 1]).all()
    for put in puts:
        put.abort()
    check_idle(core)


def test_a_match_never_covers_the_last_token(core, ns):
    store(core, ns, TOKENS, 64, checkpoints=(32,))
    assert core.match(ns, KeyChain(ns, TOKENS[:64])).length == 32
    assert core.match(ns, KeyChain(ns, TOKENS[:65])).length == 64
    assert core.match(ns, KeyChain(ns, TOKENS), limit=63).length == 32
    assert core.match(ns, KeyChain(ns, TOKENS), limit=-5).limit == 0
    assert core.match(ns, KeyChain(ns)).length == 0


def test_branches_share_their_prefix(core, ns):
    other = TOKENS[:64] + [t + 1 for t in TOKENS[64:]]
    store(core, ns, TOKENS, 128, checkpoints=(64,))
    used = core.stat()["class_bytes"]["prefix"]
    store(core, ns, other, 128, start=64)
    assert core.stat()["class_bytes"]["prefix"] < 2 * used
    assert lengths(core, ns) == [64, 128]
    assert lengths(core, ns, other) == [64, 128]
    for tokens in (TOKENS, other):
        for length in (64, 128):
            check_get(core, ns, tokens, length)
    check_idle(core)


def test_a_put_that_starts_later_uses_the_windows_before_it(core, ns):
    store(core, ns, TOKENS, 64)
    store(core, ns, TOKENS, 70, start=64, checkpoints=(66,))
    assert lengths(core, ns) == [64, 66, 70]
    check_get(core, ns, TOKENS, 66)
    check_get(core, ns, TOKENS, 70)


# -- visibility and atomicity -----------------------------------------------------------------------


def test_a_put_is_invisible_until_committed(core, ns):
    put = begin(core, ns)
    fill(put, TOKENS)
    assert lengths(core, ns) == []
    with pytest.raises(MissError):
        get(core, ns)
    put.commit()
    assert lengths(core, ns) == [100]


def test_an_incomplete_put_cannot_be_committed(core, ns):
    put = begin(core, ns)
    slots = list(put.extents)
    fill(put, TOKENS, slots[:-1])
    layer, tensor = slots[-1]
    assert put.missing() == [(layer, tensor, 0, put.extents[layer, tensor].nbytes)]
    with pytest.raises(ManifestError, match=f"the first is layer {layer} tensor {tensor} bytes 0.."):
        put.commit()
    assert lengths(core, ns) == []
    fill(put, TOKENS, slots[-1:])
    put.commit()
    with pytest.raises(TransferError, match="committed"):
        put.commit()
    with pytest.raises(TransferError, match="committed"):
        put.progress(layer, tensor, 0, 1)
    put.abort()
    assert lengths(core, ns) == [100]
    check_idle(core)


def test_progress_counts_new_bytes_and_stays_inside(core, ns):
    put = begin(core, ns)
    slot = next(iter(put.extents))
    size = put.extents[slot].nbytes
    assert put.progress(*slot, 0, 8) == 8
    assert put.progress(*slot, 4, 12) == 4
    assert put.progress(*slot, 4, 4) == 0
    for bad in [(-1, 4), (0, size + 1), (5, 3)]:
        with pytest.raises(ManifestError, match="bytes long"):
            put.progress(*slot, *bad)
    with pytest.raises(ManifestError, match="not in it"):
        put.progress(99, 0, 0, 1)
    put.abort()
    with pytest.raises(TransferCancelledError):
        put.progress(*slot, 0, 8)
    with pytest.raises(TransferCancelledError):
        put.commit()


@pytest.mark.parametrize("start", [0, 48])
def test_an_aborted_put_frees_everything(core, ns, start):
    if start:
        store(core, ns, TOKENS, start)
    before = core.stat()
    put = begin(core, ns, boundary=150, start=start, checkpoints=(64, 101))
    assert core.stat()["used_bytes"] > before["used_bytes"]
    fill(put, TOKENS)
    put.abort()
    put.abort()
    after = core.stat()
    for key in ("used_bytes", "free_bytes", "class_bytes", "group_bytes", "entries", "active", "evictable_bytes"):
        assert after[key] == before[key], key
    check_idle(core)


def test_duplicates_keep_the_old_block(core, ns):
    store(core, ns, TOKENS, 100, checkpoints=(48,))
    used = core.stat()["used_bytes"]
    pages = core._rooms[ns.id].tree.slab(0, 0).pages.copy()
    store(core, ns, TOKENS, 100, checkpoints=(48,))
    assert core.stat()["used_bytes"] == used
    assert (core._rooms[ns.id].tree.slab(0, 0).pages == pages).all()
    store(core, ns, TOKENS, 100, checkpoints=(80,))  # the blocks are there, a state is new
    assert lengths(core, ns) == [48, 80, 100]
    check_get(core, ns, TOKENS, 80)
    check_idle(core)


def test_two_puts_of_the_same_race(core, ns):
    first, second = begin(core, ns, boundary=100), begin(core, ns, boundary=120, checkpoints=(100,))
    fill(second, TOKENS)
    fill(first, TOKENS)
    second.commit()
    first.commit()
    assert lengths(core, ns) == [100, 120]
    for length in (100, 120):
        check_get(core, ns, TOKENS, length)
    check_idle(core)


# -- bad input ------------------------------------------------------------------------------------


def test_positions_that_make_no_sense(core, ns):
    for options in [{"boundary": 0}, {"start": 112}, {"checkpoints": (0,)}, {"checkpoints": (101,)}, {"start": -16}]:
        with pytest.raises(LayoutError):
            begin(core, ns, **options)
    with pytest.raises(KeyChainError, match="block boundary"):
        begin(core, ns, start=8)
    with pytest.raises(KeyChainError, match="chain has 400 tokens"):
        begin(core, ns, boundary=401)
    with pytest.raises(KeyChainError, match="chain has 400 tokens"):
        get(core, ns, boundary=401)
    with pytest.raises(KeyChainError, match="nobody could ever read it"):
        begin(core, ns, chain=None)
    with pytest.raises(KeyChainError, match="16 bytes"):
        begin(core, ns, request=b"short")
    check_idle(core)


def test_namespaces_must_be_open_and_fit(core, ns):
    stranger = Namespace("t", LAYOUTS["dense"], STEP)
    with pytest.raises(NamespaceError, match="open it first"):
        core.match(stranger, KeyChain(stranger, TOKENS))
    with pytest.raises(KeyChainError, match="another namespace"):
        core.match(ns, KeyChain(stranger, TOKENS))
    assert core.open_namespace("t", LAYOUTS["everything"], STEP) is ns


def test_namespaces_are_bounded(core, monkeypatch):
    monkeypatch.setattr("kvpool.rooms.MAX_NAMESPACES", 2)
    monkeypatch.setattr("kvpool.rooms.MAX_TENANTS", 2)
    core.open_namespace("a", LAYOUTS["dense"], 16)
    core.open_namespace("a", LAYOUTS["dense"], 32)
    core.open_namespace("a", LAYOUTS["dense"], 16)
    with pytest.raises(NamespaceError, match="2 namespaces"):
        core.open_namespace("a", LAYOUTS["dense"], 64)
    core.exists("b", [])
    with pytest.raises(NamespaceError, match="2 tenants"):
        core.exists("c", [])


def test_a_put_needs_its_prefix(core, ns):
    with pytest.raises(PrefixMissingError, match="only 0 before it") as caught:
        begin(core, ns, start=32)
    assert caught.value.retryable
    store(core, ns, TOKENS, 40)
    with pytest.raises(PrefixMissingError, match="only 32 before it") as caught:
        begin(core, ns, start=48)
    assert caught.value.resident == 32
    begin(core, ns, start=32).abort()
    check_idle(core)


def test_layouts_without_full_attention_start_anywhere(core):
    ns = core.open_namespace("t", LAYOUTS["recurrent"], STEP)
    store(core, ns, TOKENS, 100, start=64)
    assert lengths(core, ns) == [100]
    check_get(core, ns, TOKENS, 100, start=64)
    check_idle(core)


def test_opaque_chains(core, ns):
    chain = KeyChain.of_hashes(ns, [bytes([i]) * 8 for i in range(6)], 100)
    put = core.begin_put(ns, chain, boundary=96, checkpoints=(32,), deadline=core.clock() + 1)
    fill(put, TOKENS)
    put.commit()
    assert core.match(ns, chain).restorable == (32, 96)
    reader = core.plan_get(ns, chain, boundary=96, deadline=core.clock() + 1)
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    reader.close()
    with pytest.raises(KeyChainError, match="only end at multiples of 16"):
        core.begin_put(ns, chain, boundary=100, deadline=core.clock() + 1)
    # The same hash after other blocks: an engine that does not chain its hashes.
    wrong = KeyChain.of_hashes(ns, [b"x", bytes([1]) * 8], 32)
    assert core.match(ns, wrong).length == 0
    with pytest.raises(KeyChainError, match="already known after other blocks"):
        core.begin_put(ns, wrong, boundary=32, deadline=core.clock() + 1)
    # Two conflicting puts race: the second to commit finds out then.
    a = KeyChain.of_hashes(ns, [b"a", b"same"], 32)
    b = KeyChain.of_hashes(ns, [b"b", b"same"], 32)
    puts = [core.begin_put(ns, c, boundary=32, deadline=core.clock() + 1) for c in (a, b)]
    for put in puts:
        fill(put, TOKENS)
    puts[0].commit()
    with pytest.raises(KeyChainError, match="already known"):
        puts[1].commit()
    puts[1].abort()
    assert core.match(ns, KeyChain.of_hashes(ns, [b"a", b"same", b"c"], 48)).length == 32
    check_idle(core)


# -- tenants --------------------------------------------------------------------------------------


def test_tenants_never_meet(core):
    mine = core.open_namespace("mine", LAYOUTS["hybrid"], STEP)
    theirs = core.open_namespace("theirs", LAYOUTS["hybrid"], STEP)
    store(core, mine, TOKENS, 64)
    assert lengths(core, theirs) == []
    told = core.explain(theirs, KeyChain(theirs, TOKENS))
    assert {g.ended_by for g in told.groups} == {Reason.NEVER_STORED}
    told = core.explain(theirs, KeyChain(theirs, TOKENS), operator=True)
    assert {g.ended_by for g in told.groups} == {Reason.OTHER_TENANT}
    core.begin_put_flat("mine", {b"k": 3}, deadline=core.clock() + 1).commit()
    assert core.exists("mine", [b"k"]) == [True]
    assert core.exists("theirs", [b"k"]) == [False]
    put = begin(core, mine, request=REQUEST)
    with pytest.raises(MissError):
        get(core, theirs, request=REQUEST)
    other = begin(core, theirs, request=REQUEST)  # request ids are the tenant's own
    put.abort()
    other.abort()
    assert core.stat("theirs")["used_bytes"] == 0
    assert core.stat("theirs")["entries"]["nodes"] == 0
    assert core.clear(tenant="theirs") == 0
    assert lengths(core, mine) == [64]
    check_idle(core)


def test_a_quota_evicts_the_tenants_own(core):
    core = make_core(pages=200, page_bytes=256, tenant_quota_bytes={"small": 40 * 256})
    small = core.open_namespace("small", LAYOUTS["dense"], STEP)
    large = core.open_namespace("large", LAYOUTS["dense"], STEP)
    store(core, large, TOKENS, 160)
    for i in range(8):
        store(core, small, TOKENS[i:], 160)
        assert core.stat("small")["used_bytes"] <= 40 * 256
    assert core.stat()["evictions"] == {"quota": core.stat()["evictions"]["quota"]}
    assert lengths(core, large)[-1] == 160
    assert lengths(core, small, TOKENS[7:])[-1] == 160
    lease = core.lease(small, KeyChain(small, TOKENS[7:]), 160, 10)
    with pytest.raises(QuotaError, match=r"tenant .small. holds \d+ of its quota of 10240 bytes") as caught:
        begin(core, small, TOKENS, boundary=400)
    assert caught.value.retryable
    core.release(lease.id)
    with pytest.raises(QuotaError):
        begin(core, small, TOKENS * 3, boundary=1200)
    check_idle(core)


# -- eviction and pins ------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first():
    core = make_core(pages=64, page_bytes=DENSE_PAGE)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    sequences = [[i, *TOKENS] for i in range(3)]
    for tokens in sequences:
        store(core, ns, tokens, 320)  # 20 blocks of one page each
    assert core.stat()["used_bytes"] == 60 * DENSE_PAGE
    assert core.match(ns, KeyChain(ns, sequences[0])).length == 320  # touched
    store(core, ns, [9, *TOKENS], 16 * (4 + 10))
    assert core.match(ns, KeyChain(ns, sequences[0])).length == 320
    assert core.match(ns, KeyChain(ns, sequences[2])).length == 320
    assert core.match(ns, KeyChain(ns, sequences[1])).length < 320


def test_leaves_go_before_their_parents():
    core = make_core(pages=60)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, TOKENS, 320)
    blocks = core.stat()["entries"]["nodes"]
    for need in range(1, 20):
        put = begin(core, ns, [need, *TOKENS], boundary=16 * (need + 3))
        put.abort()
        found = core.match(ns, KeyChain(ns, TOKENS))
        # What is left is a prefix, however much went.
        assert found.length == core.stat()["entries"]["nodes"] * STEP
    assert core.stat()["entries"]["nodes"] <= blocks
    check_idle(core)


def test_a_reader_that_comes_before_its_request_is_not_a_miss_yet(core, ns):
    with pytest.raises(MissError):
        get(core, ns, boundary=96, request=REQUEST)
    assert core.stat()["misses"] == {}
    begin(core, ns, boundary=96, request=REQUEST).abort()
    with pytest.raises(TransferCancelledError):
        get(core, ns, boundary=96, request=REQUEST)
    assert core.stat()["misses"] == {}
    with pytest.raises(MissError):
        get(core, ns, boundary=96)
    assert core.stat()["misses"] == {"never_stored": 1}
    check_idle(core)


def test_leaves_go_first_even_when_they_are_newer():
    core = make_core(pages=64, page_bytes=DENSE_PAGE)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, TOKENS, 320)
    tree = core._rooms[ns.id].tree
    path = tree.find(KeyChain(ns, TOKENS).blocks)
    tree.touch([(tree.full, path[10:])])
    for _ in range(4):
        assert core._eviction.evict(None, "test")
    assert core.match(ns, KeyChain(ns, TOKENS)).length == 320 - 4 * STEP
    check_idle(core)


def test_a_checkpoint_off_the_grid_goes_as_a_whole():
    for unit in range(3):
        core = make_core()
        ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
        store(core, ns, TOKENS, 40)
        tree = core._rooms[ns.id].tree
        chain = KeyChain(ns, TOKENS)
        node = tree.find_tail(chain, 40, tree.find(chain.blocks))
        tree.evict(unit, node, "test")
        core._eviction.forget("t", 1)
        assert core.stat()["entries"]["tails"] == 0
        assert core.stat()["entries"]["nodes"] == 2
        check_idle(core)


def test_the_prefix_of_a_put_stays_while_it_arrives(core, ns):
    store(core, ns, TOKENS, 64)
    put = begin(core, ns, boundary=120, start=64)
    core.clear()
    scribble(core)
    fill(put, TOKENS)
    put.commit()
    assert lengths(core, ns)[-1] == 120
    check_get(core, ns, TOKENS, 120)
    check_idle(core)


def test_states_and_windows_age_on_their_own():
    core = make_core(pages=40)
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    store(core, ns, TOKENS, 128, checkpoints=(16, 32, 48))
    assert core.match(ns, KeyChain(ns, TOKENS)).length == 128  # touches what 128 needs, not the other states
    free = core.stat()["free_bytes"] // 256
    flat = core.begin_put_flat("t", {b"x": (free + 3) * 256}, deadline=core.clock() + 1)
    found = core.match(ns, KeyChain(ns, TOKENS))
    assert found.length == 128
    assert len(found.restorable) < 4
    told = core.explain(ns, KeyChain(ns, TOKENS[:49]))
    assert Reason.EVICTED in {g.ended_by for g in told.groups}
    assert "capacity" in str(told)
    check_get(core, ns, TOKENS, 128)
    flat.abort()
    check_idle(core)


def test_a_state_without_blocks_and_blocks_without_state():
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    store(core, ns, TOKENS, 128, checkpoints=(64,))
    tree = core._rooms[ns.id].tree
    path = tree.find(KeyChain(ns, TOKENS).blocks)
    tree.evict(tree.state, int(path[7]), "test")  # blocks without their state
    core._eviction.forget("t", 1)
    assert lengths(core, ns) == [64]
    with pytest.raises(MissError, match="the longest that can is 64") as caught:
        get(core, ns, boundary=128)
    assert caught.value.restorable == 64
    told = core.explain(ns, KeyChain(ns, TOKENS))
    assert {g.group: g.ended_by for g in told.groups}["linear"] is Reason.EVICTED
    window = tree.unit_of[2]
    tree.evict(window, int(path[2]), "test")  # a state without the window before it
    core._eviction.forget("t", 1)
    assert lengths(core, ns) == []
    told = core.explain(ns, KeyChain(ns, TOKENS[:65]))
    assert {g.group: g.ended_by for g in told.groups}["window"] is Reason.EVICTED
    store(core, ns, TOKENS, 128, checkpoints=(64,))
    assert lengths(core, ns) == [64, 128]
    for length in (64, 128):
        check_get(core, ns, TOKENS, length)
    check_idle(core)


def test_everything_pinned_and_full_is_refused():
    core = make_core(pages=64, page_bytes=DENSE_PAGE)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, TOKENS, 384)
    lease = core.lease(ns, KeyChain(ns, TOKENS), 384, 10)
    rest = begin(core, ns, [1, *TOKENS], boundary=400)
    core.begin_put_flat("t", {b"rest": 15 * DENSE_PAGE}, deadline=1e9)
    before = core.stat()
    with pytest.raises(PoolFullError, match="0 could be evicted, the rest is leased") as caught:
        begin(core, ns, [2, *TOKENS], boundary=32)
    assert caught.value.retryable
    with pytest.raises(PoolFullError):
        core.begin_put_flat("t", {b"k": 1}, deadline=1e9)
    assert core.stat() == before  # a refused put changes nothing
    core.release(lease.id)
    put = begin(core, ns, [2, *TOKENS], boundary=32)
    put.abort()
    rest.abort()
    core.expire(1e9)
    check_idle(core)


def test_a_refused_put_evicts_nothing(core):
    core = make_core(pages=64)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, TOKENS, 320)
    with pytest.raises(PoolFullError):
        begin(core, ns, TOKENS * 4, boundary=1600)
    assert core.match(ns, KeyChain(ns, TOKENS)).length == 320


def test_leases_keep_and_end(core):
    core = make_core(pages=64)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    store(core, ns, TOKENS, 160)
    lease = core.lease(ns, KeyChain(ns, TOKENS), 160, 5.0)
    assert lease.deadline == core.clock() + 5.0
    for i in range(10):
        store(core, ns, [i, *TOKENS], 320)
    assert core.match(ns, KeyChain(ns, TOKENS)).length == 160
    assert core.clear() > 0
    check_get(core, ns, TOKENS, 160)
    core.clock.now += 4.9
    assert core.expire() == 0
    core.clock.now += 0.1
    assert core.next_deadline == lease.deadline
    assert core.expire() == 1
    assert core.next_deadline is None
    with pytest.raises(LeaseError, match=f"no lease {lease.id}"):
        core.release(lease.id)
    with pytest.raises(MissError):
        core.lease(ns, KeyChain(ns, TOKENS), 330, 1.0)
    check_idle(core)


def test_open_things_are_bounded(core, ns, monkeypatch):
    monkeypatch.setattr("kvpool.rooms.MAX_ACTIVE", 2)
    store(core, ns, TOKENS, 64)
    one, two = get(core, ns, boundary=64), core.lease(ns, KeyChain(ns, TOKENS), 64, 1.0)
    for call in (
        lambda: get(core, ns, boundary=64),
        lambda: begin(core, ns),
        lambda: core.lease(ns, KeyChain(ns, TOKENS), 64, 1.0),
        lambda: core.begin_put_flat("t", {b"k": 1}, deadline=1e9),
        lambda: core.plan_get_flat("t", [b"k"], deadline=1e9),
    ):
        with pytest.raises(Exception, match="2 puts, gets and leases are open"):
            call()
    one.close()
    core.release(two.id)
    check_idle(core)


def test_deadlines_of_finished_things_are_forgotten(core, ns):
    for _ in range(500):
        begin(core, ns, boundary=20).abort()
    assert len(core._deadlines) < 200


def test_many_evictions_leave_the_order_small():
    core = make_core(pages=64)
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    for i in range(300):
        store(core, ns, [i, *TOKENS], 96, checkpoints=(32, 50))
    assert core._eviction.queued < 2_000
    assert len(core._rooms[ns.id].tree) < 200
    check_idle(core)


def test_ghosts_are_bounded():
    core = make_core(pages=32)
    core._ghosts = GhostList(limit=10)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    for i in range(20):
        store(core, ns, [i, *TOKENS], 96)
    assert len(core._ghosts) == 10
    told = core.explain(ns, KeyChain(ns, [0, *TOKENS]))
    assert told.groups[0].ended_by is Reason.NEVER_STORED  # forgotten by now


# -- readers ----------------------------------------------------------------------------------------


def test_what_is_being_read_stays():
    core = make_core(pages=48)
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    store(core, ns, TOKENS, 100)
    reader = get(core, ns, boundary=100)
    for i in range(6):
        store(core, ns, [i, *TOKENS], 100)
    core.clear()
    scribble(core)
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    reader.close()
    reader.close()
    check_idle(core)


def test_a_get_past_its_deadline(core, ns):
    store(core, ns, TOKENS, 100)
    errors = []
    polite, silent = get(core, ns, deadline=core.clock() + 1), get(core, ns, deadline=core.clock() + 1)
    polite.on_failed = errors.append
    core.clock.now += 1
    core.expire()
    assert silent.closed
    assert isinstance(errors[0], DeadlineError)
    assert not polite.closed  # its pages stay until it says that it has stopped
    core.clear()
    check_sources(polite.sources, polite.extents.values(), TOKENS)
    polite.close()
    check_idle(core)


def test_a_put_past_its_deadline(core, ns):
    errors = []
    polite, silent = begin(core, ns, deadline=core.clock() + 1), begin(core, ns, deadline=core.clock() + 1)
    polite.on_failed = errors.append
    core.clock.now += 1
    core.expire()
    assert isinstance(errors[0], DeadlineError)
    assert core.stat()["used_bytes"] > 0  # the writer may still be receiving into its pages
    with pytest.raises(DeadlineError):
        polite.commit()
    with pytest.raises(DeadlineError):
        silent.progress(0, 0, 0, 1)
    polite.abort()
    assert core.stat()["used_bytes"] == 0
    check_idle(core)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("put_start", "get_start", "boundary"), [(0, 0, 100), (0, 37, 96), (48, 0, 100), (48, 10, 130), (48, 60, 100)]
)
def test_reading_behind_a_put(name, put_start, get_start, boundary):
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS[name], STEP)
    if put_start:
        store(core, ns, TOKENS, put_start)
    put = begin(core, ns, boundary=boundary, start=put_start, checkpoints=(64, 70), request=REQUEST)
    slots = list(put.extents)
    fill(put, TOKENS, slots[:1])
    try:
        reader = get(core, ns, boundary=boundary, start=get_start, request=REQUEST)
    except MissError:
        # Nothing of an earlier window was kept by a layout without full attention.
        assert name in ("windows",)
        put.abort()
        return
    assert not reader.sealed
    seen = {slot: set() for slot in reader.extents}

    def arrived(layer, tensor, start, stop):
        extent = reader.extents[layer, tensor]
        got = reader.sources[layer, tensor].slice(start, stop).tobytes()
        assert got == content(extent, TOKENS)[start:stop]
        seen[layer, tensor] |= set(range(start, stop))

    for unit in reader.ready_ranges():
        arrived(*unit)
    sealed = []
    reader.on_sealed = lambda: sealed.append(1)
    reader.subscribe(arrived)
    for layer, tensor in slots[1:]:
        extent = put.extents[layer, tensor]
        data = content(extent, TOKENS)
        for at in reversed(range(0, extent.nbytes, 37)):  # in any order
            stop = min(at + 37, extent.nbytes)
            put.destinations[layer, tensor].slice(at, stop).copy_from(PageList.of(data[at:stop]))
            put.progress(layer, tensor, at, stop)
    assert {slot: len(s) for slot, s in seen.items()} == {slot: e.nbytes for slot, e in reader.extents.items()}
    assert not sealed
    put.commit()
    assert sealed
    assert reader.sealed
    core.clear()  # everything the reader needs is kept
    scribble(core)
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    reader.close()
    check_idle(core)


def test_a_follower_of_a_duplicate_reads_the_new_copy(core, ns):
    put = begin(core, ns, request=REQUEST)
    store(core, ns, TOKENS, 100)
    reader = get(core, ns, request=REQUEST)
    fill(put, TOKENS)
    put.commit()
    core.clear()
    scribble(core)
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    reader.close()
    check_idle(core)


def test_followers_of_a_failed_put(core, ns):
    put = begin(core, ns, request=REQUEST)
    polite, silent = get(core, ns, request=REQUEST), get(core, ns, request=REQUEST)
    errors = []
    polite.on_failed = errors.append
    fill(put, TOKENS, list(put.extents)[:2])
    put.abort()
    assert isinstance(errors[0], TransferCancelledError)
    assert silent.closed
    assert core.stat()["used_bytes"] > 0  # the polite reader has not closed yet
    polite.close()
    assert core.stat()["used_bytes"] == 0
    with pytest.raises(TransferCancelledError):  # who comes later learns of it at once
        get(core, ns, request=REQUEST)
    check_idle(core)


def test_requests_are_unique_and_must_fit(core, ns):
    put = begin(core, ns, request=REQUEST)
    with pytest.raises(DuplicateRequestError, match=REQUEST.hex()):
        begin(core, ns, request=REQUEST)
    with pytest.raises(KeyChainError, match="a put of 100 tokens"):
        get(core, ns, boundary=96, request=REQUEST)
    with pytest.raises(KeyChainError, match="other tokens"):
        get(core, ns, TOKENS[1:], request=REQUEST)
    with pytest.raises(MissError):
        get(core, ns, chain=None, request=bytes(16))
    fill(put, TOKENS)
    put.commit()
    reader = get(core, ns, request=REQUEST)  # late: the index answers
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    reader.close()
    begin(core, ns, request=REQUEST).abort()  # the id may be used again
    check_idle(core)


def test_a_follower_needs_the_window_before_the_put(core):
    ns = core.open_namespace("t", LAYOUTS["windows"], STEP)
    put = begin(core, ns, boundary=100, start=80, request=REQUEST)
    with pytest.raises(MissError, match="get from start 80 on"):
        get(core, ns, boundary=100, request=REQUEST)
    reader = get(core, ns, boundary=100, start=80, request=REQUEST)
    fill(put, TOKENS)
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    put.commit()
    reader.close()
    check_idle(core)


# -- transfer-cache bytes ----------------------------------------------------------------------------


def test_a_request_without_a_chain_goes_when_it_is_read(core, ns):
    put = begin(core, ns, chain=None, boundary=77, request=REQUEST)
    assert core.arena.bytes_of(BlockClass.TRANSFER) > 0
    fill(put, TOKENS)
    put.commit()
    assert lengths(core, ns) == []
    readers = [get(core, ns, chain=None, boundary=77, request=REQUEST) for _ in range(2)]
    for reader in readers:
        assert reader.sealed
        check_sources(reader.sources, reader.extents.values(), TOKENS)
    readers[0].close()
    check_sources(readers[1].sources, readers[1].extents.values(), TOKENS)
    readers[1].close()
    assert core.arena.bytes_of(BlockClass.TRANSFER) == 0
    with pytest.raises(MissError, match="has been read"):
        get(core, ns, chain=None, boundary=77, request=REQUEST)
    check_idle(core)


def test_a_request_nobody_reads_goes_at_its_deadline(core, ns):
    put = begin(core, ns, chain=None, boundary=77, request=REQUEST, deadline=core.clock() + 1)
    fill(put, TOKENS)
    put.commit()
    core.clock.now += 1
    core.expire()
    assert core.stat()["used_bytes"] == 0
    check_idle(core)


def test_a_request_being_read_outlives_its_deadline(core, ns):
    put = begin(core, ns, chain=None, boundary=77, request=REQUEST, deadline=core.clock() + 1)
    reader = get(core, ns, chain=None, boundary=77, request=REQUEST)
    fill(put, TOKENS)
    put.commit()
    core.clock.now += 1
    core.expire()
    check_sources(reader.sources, reader.extents.values(), TOKENS)
    reader.close()
    assert core.stat()["used_bytes"] == 0
    check_idle(core)


def test_transfer_bytes_respect_the_floor():
    core = make_core(pages=64, page_bytes=DENSE_PAGE, prefix_floor_bytes=32 * DENSE_PAGE)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    for i in range(3):
        store(core, ns, [i, *TOKENS], 320)
    full = core.stat()["class_bytes"]["prefix"]
    assert full == 60 * DENSE_PAGE
    put = begin(core, ns, chain=None, boundary=320, request=REQUEST)
    kept = core.stat()["class_bytes"]["prefix"]
    assert kept == (64 - 20) * DENSE_PAGE
    with pytest.raises(PoolFullError, match="under the floor of 14336 bytes kept for the prefix cache"):
        begin(core, ns, chain=None, boundary=320, request=bytes(16))
    assert core.stat()["class_bytes"]["prefix"] == kept
    put.abort()
    check_idle(core)
    with pytest.raises(ConfigError, match="within the arena"):
        make_core(pages=4, prefix_floor_bytes=1 << 40)


# -- flat objects ------------------------------------------------------------------------------------


def flat_put(core, objects, tenant="t"):
    put = core.begin_put_flat(tenant, {k: len(v) for k, v in objects.items()}, deadline=core.clock() + 1)

    (whole,) = put.destinations.values()
    whole.copy_from(PageList.of(b"".join(objects.values())))
    assert [pages.tobytes() for pages in put.objects] == list(objects.values())
    put.commit()


def flat_get(core, keys, tenant="t"):
    reader = core.plan_get_flat(tenant, keys, deadline=core.clock() + 1)
    pages = iter(reader.objects)
    out = [next(pages).tobytes() if found else None for found in reader.found]
    (whole,) = reader.sources.values()
    assert whole.tobytes() == b"".join(data for data in out if data)
    there = [data for data in out if data is not None]
    assert reader.sizes.tolist() == list(map(len, there))
    assert reader.checksums.tolist() == [PageList.of(data).hash(0) for data in there]
    assert [e.nbytes for e in reader.manifest(REQUEST).extents] == [sum(map(len, there))]
    reader.close()
    return out


def store_flat(core, objects, checksums=None):
    sums = checksums or [PageList.of(v).hash() for v in objects.values()]
    sizes = [len(v) for v in objects.values()]
    run(core.store_flat_steps("t", list(objects), sizes, sums, b"".join(objects.values())))


def test_small_flat_objects_are_stored_and_read_at_once(core):
    objects = {b"%d" % i: bytes([i]) * (i * 10) for i in range(40)}
    store_flat(core, objects)
    assert flat_get(core, list(objects)) == list(objects.values())
    got = core.read_flat("t", [b"5", b"none", b"39", b"0"], most=10_000, deadline=core.clock() + 1)
    assert (got.found, got.sizes, got.data) == ([True, False, True, True], [50, 390, 0], objects[b"5"] + objects[b"39"])
    assert got.checksums == [PageList.of(objects[k]).hash() for k in (b"5", b"39", b"0")]
    assert core.stat()["active"] == 0
    assert core.stat()["counters"]["flat_puts"] == 40
    pinned = core.read_flat("t", [b"5", b"39"], most=439, deadline=core.clock() + 1)
    assert isinstance(pinned, FlatGet)
    assert core.stat()["active"] == 1
    pinned.close()
    assert core.read_flat("t", [b"5", b"39"], most=440, deadline=core.clock() + 1).data == objects[b"5"] + objects[b"39"]
    store_flat(core, {b"5": b"new", b"n": b"x"})
    assert flat_get(core, [b"5", b"n", b"6"]) == [b"new", b"x", objects[b"6"]]


def test_small_flat_objects_that_are_damaged_leave_nothing_and_replace_nothing(core):
    store_flat(core, {b"a": b"old"})
    before = core.stat()
    right = PageList.of(b"first").hash()
    with pytest.raises(IntegrityError, match="put it again") as caught:
        store_flat(core, {b"b": b"first", b"a": b"second"}, [right, right])
    assert caught.value.retryable
    assert core.stat() == before
    assert flat_get(core, [b"a", b"b"]) == [b"old", None]
    with pytest.raises(KeyChainError):
        store_flat(core, {b"": b"x"})
    assert core.stat()["used_bytes"] == before["used_bytes"]


def test_flat_objects(core):
    objects = {b"%d" % i: bytes([i]) * (i * 100) for i in range(130)}
    flat_put(core, objects)
    assert flat_get(core, [b"5", b"none", b"129", b"0"]) == [objects[b"5"], None, objects[b"129"], b""]
    put = core.begin_put_flat("t", {b"a": 5, b"b": 7}, deadline=core.clock() + 1)
    assert [e.nbytes for e in put.manifest(REQUEST).extents] == [12]
    assert core.exists("t", [b"a"]) == [False]
    put.abort()
    put.abort()
    with pytest.raises(TransferCancelledError):
        put.commit()
    assert core.stat()["counters"]["flat_misses"] == 1
    check_idle(core)


def test_a_flat_object_is_replaced_while_it_is_read(core):
    flat_put(core, {b"k": b"old" * 200})
    reader = core.plan_get_flat("t", [b"k"], deadline=core.clock() + 1)
    flat_put(core, {b"k": b"new" * 100})
    assert reader.sources[0, 0].tobytes() == b"old" * 200
    assert flat_get(core, [b"k"]) == [b"new" * 100]
    reader.close()
    assert core.stat()["used_bytes"] == 2 * 256
    check_idle(core)


def test_flat_objects_and_blocks_share_one_order():
    core = make_core(pages=64, page_bytes=DENSE_PAGE)
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    for i in range(10):
        flat_put(core, {b"%d" % i: bytes(DENSE_PAGE)})
    assert flat_get(core, [b"0"]) == [bytes(DENSE_PAGE)]
    store(core, ns, TOKENS, 320)
    flat_put(core, {b"big": bytes((34 + 4) * DENSE_PAGE)})
    assert core.exists("t", [b"%d" % i for i in range(10)]) == [True] + [False] * 4 + [True] * 5
    assert core.match(ns, KeyChain(ns, TOKENS)).length == 320
    check_idle(core)


def test_flat_deadlines(core):
    flat_put(core, {b"k": bytes(300)})
    errors = []
    put = core.begin_put_flat("t", {b"a": 5}, deadline=core.clock() + 1)
    polite = core.begin_put_flat("t", {b"b": 5}, deadline=core.clock() + 1)
    polite.on_failed = errors.append
    reader = core.plan_get_flat("t", [b"k"], deadline=core.clock() + 1)
    core.clock.now += 1
    assert core.expire() == 3
    assert put.closed
    assert reader.closed
    assert isinstance(errors[0], DeadlineError)
    with pytest.raises(DeadlineError):
        polite.commit()
    polite.abort()
    check_idle(core)


def test_bad_flat_keys(core):
    for bad in (b"", bytes(257), "text"):
        with pytest.raises(KeyChainError, match="flat key"):
            core.exists("t", [bad])
        with pytest.raises(KeyChainError, match="flat key"):
            core.begin_put_flat("t", {bad: 1}, deadline=1e9)
    with pytest.raises(KeyChainError, match="70000 flat keys"):
        core.exists("t", [b"k"] * 70_000)
    check_idle(core)


def test_a_window_survives_only_as_far_as_it_is_stored(core):
    ns = core.open_namespace("t", LAYOUTS["full+window"], STEP)
    assert ns.layout.groups[1].kind is GroupKind.SLIDING
    store(core, ns, TOKENS, 96)
    # The window of 9 tokens before 96 lies in the last block: earlier boundaries have no window.
    assert lengths(core, ns) == [96]
    with pytest.raises(KVBufferError):
        get(core, ns, boundary=96).sources[0, 0].slice(0, 1 << 30)
