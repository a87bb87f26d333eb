"""Eviction policies behind their interface: against textbook models, in cost, and under a pool whose memory is too small."""

import random
import types
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest

from kvpool.errors import PoolFullError
from kvpool.eviction import BLOCKED, GONE, POLICIES, Eviction, make_policy
from kvpool.eviction.flops import FlopsModel
from kvpool.keys import KeyChain
from kvpool.memory import Memory
from kvtransport import presets
from kvtransport.errors import ConfigError
from tests.poolkit import LAYOUTS, STEP, check_get, check_idle, make_core, store

NAMES = sorted(POLICIES)


class FakeShelf:
    """Entries without dependents, one page each: what a policy decides is all that counts."""

    def __init__(self, eviction: Eviction, tenant: str = "t") -> None:
        self.tenant = tenant
        self.unpinned_pages = 0
        self.eviction = eviction
        self.number = eviction.add(self)
        self.rank: dict[int, float] = {}
        self.count: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.value: dict[int, float] = {}
        self.names: dict[int, int] = {}
        self.evicted: list[int] = []
        self.checks = 0
        self._next = 0

    def _array(self, node):
        return np.array([self.value[node]], np.float32)

    def put(self, name: int, value: float = 1.0) -> None:
        node = self.names[name] = self._next
        self._next += 1
        self.value[node], self.count[node] = value, 0
        touch = np.array([self.eviction.tick()])
        ranks = self.eviction.policy.first_rank(touch, self._array(node), np.ones(1, np.int32), 1)
        self.rank[node] = float(ranks[0])
        self.eviction.push_all(self.tenant, [(self.number, 0, node, 0)], [self.rank[node]])

    def use(self, name: int) -> None:
        node = self.names[name]
        self.count[node] += 1
        uses = np.array([self.count[node]], np.int32)
        ranks = self.eviction.policy.rank(np.array([self.eviction.tick()]), uses, self._array(node), 1)
        if ranks is not None:
            self.rank[node] = float(ranks[0])

    def pin(self, name: int) -> None:
        self.pinned.add(self.names[name])

    def unpin(self, name: int) -> None:
        node = self.names[name]
        self.pinned.discard(node)
        self.eviction.push_all(self.tenant, [(self.number, 0, node, 0)], [self.rank[node]])

    def drop(self, name: int) -> None:
        del self.rank[self.names.pop(name)]
        self.eviction.forget(self.tenant, 1)

    def check(self, unit, node, generation):
        self.checks += 1
        if node not in self.rank:
            return GONE
        return BLOCKED if node in self.pinned else self.rank[node]

    def uses(self, unit, node):
        return self.count[node]

    def set_uses(self, unit, node, uses):
        self.count[node] = uses

    def pages_of(self, unit, node):
        return 1

    def key(self, unit, node):
        return b"%d" % next(k for k, v in self.names.items() if v == node)

    def evict(self, unit, node, why, *, below=0.0, pages=0):
        assert node in self.rank
        assert node not in self.pinned
        del self.rank[node]
        name = next(k for k, v in self.names.items() if v == node)
        del self.names[name]
        self.evicted.append(name)
        return 1


# -- textbook models: (name) -> hit?, evicting by the book -------------------------------------------


class LruModel:
    def __init__(self, size):
        self.size, self.held = size, OrderedDict()

    def access(self, name):
        if name in self.held:
            self.held.move_to_end(name)
            return []
        gone = [self.held.popitem(last=False)[0]] if len(self.held) >= self.size else []
        self.held[name] = None
        return gone


class SieveModel:
    """Zhang et al., NSDI 2024, algorithm 1: a list from old to new, a visited bit, a hand."""

    def __init__(self, size):
        self.size, self.queue, self.visited, self.hand = size, [], {}, None

    def access(self, name):
        if name in self.visited:
            self.visited[name] = True
            return []
        gone = []
        if len(self.queue) >= self.size:
            at = self.queue.index(self.hand) if self.hand is not None else 0
            while self.visited[self.queue[at]]:
                self.visited[self.queue[at]] = False
                at = (at + 1) % len(self.queue)
            victim = self.queue[at]
            # The hand rests on the next newer one; behind the newest it starts anew with whoever is oldest then.
            self.hand = self.queue[at + 1] if at + 1 < len(self.queue) else None
            gone.append(victim)
            self.queue.remove(victim)
            del self.visited[victim]
        self.queue.append(name)
        self.visited[name] = False
        return gone


class S3FifoModel:
    """Yang et al., SOSP 2023, algorithm 1: small and main queues, a ghost queue, frequencies up to three."""

    def __init__(self, size):
        self.size, self.small, self.main, self.ghost = size, OrderedDict(), OrderedDict(), OrderedDict()
        self.small_size = max(1, int(size * 0.1))

    def access(self, name):
        for queue in (self.small, self.main):
            if name in queue:
                queue[name] = min(3, queue[name] + 1)
                return []
        gone = []
        if len(self.small) + len(self.main) >= self.size:
            while not gone:
                if not self.small or (len(self.small) <= self.small_size and self.main):
                    old, uses = self.main.popitem(last=False)
                    if uses:
                        self.main[old] = uses - 1
                    else:
                        gone.append(old)
                else:
                    old, uses = self.small.popitem(last=False)
                    if uses > 1:
                        self.main[old] = 0
                    else:
                        gone.append(old)
                        self.ghost[old] = None
                        while len(self.ghost) > self.size:
                            self.ghost.popitem(last=False)
        known = self.ghost.pop(name, 0) is None
        (self.main if known else self.small)[name] = 0
        return gone


class GdsfModel:
    """Cherkasova 1998: the smallest inflation + frequency x cost / size goes, and becomes the inflation."""

    def __init__(self, size, values):
        self.size, self.values, self.held, self.inflation = size, values, {}, 0.0

    def access(self, name):
        gone = []
        if name in self.held:
            self.held[name] = (self.held[name][0] + 1, 0.0)
        else:
            if len(self.held) >= self.size:
                victim = min(self.held, key=lambda k: self.held[k][1])
                self.inflation = max(self.inflation, self.held.pop(victim)[1])
                gone.append(victim)
            self.held[name] = (1, 0.0)
        uses, _ = self.held[name]
        self.held[name] = (uses, self.inflation + uses * self.values[name])
        return gone


def play(policy, model, accesses, size, values=None):
    eviction = Eviction(policy, size)
    shelf = FakeShelf(eviction)
    for name in accesses:
        before = len(shelf.evicted)
        if name in shelf.names:
            shelf.use(name)
        else:
            if len(shelf.names) >= size:
                assert eviction.evict(None, "test")
            shelf.put(name, 1.0 if values is None else values[name])
        assert shelf.evicted[before:] == model.access(name)
    assert shelf.evicted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["lru", "sieve", "s3fifo"])
def test_policies_are_those_of_their_papers(name, seed):
    rng = np.random.default_rng(seed)
    accesses = (rng.zipf(1.3, 3_000) % 200).tolist()
    model = {"lru": LruModel, "sieve": SieveModel, "s3fifo": S3FifoModel}[name](40)
    play(make_policy(name), model, accesses, 40)


def test_gdsf_weighs_cost_and_frequency():
    rng = random.Random(5)
    values = [rng.uniform(0.5, 4.0) for _ in range(200)]
    policy = make_policy("gdsf")
    policy._sum, policy._count = 1e9, 10**9  # the mean that values are divided by: one, whatever comes
    play(policy, GdsfModel(40, values), [min(199, int(rng.paretovariate(0.7))) for _ in range(3_000)], 40, values)


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match="choose one of lru, s3fifo, sieve, gdsf, marconi"):
        make_policy("fifo")
    with pytest.raises(ConfigError, match="no eviction policy 'x'"):
        make_core(policy="x")


@pytest.mark.parametrize("name", NAMES)
def test_pinned_entries_stay_and_all_others_can_go(name):
    eviction = Eviction(make_policy(name), 64)
    shelf, other = FakeShelf(eviction), FakeShelf(eviction, "u")
    rng = random.Random(name)
    next_name, pinned = 0, set()
    for _ in range(4_000):
        act, own = rng.random(), rng.choice((shelf, other))
        free = [n for n in own.names if (own, n) not in pinned]
        if act < 0.4:
            own.put(next_name, rng.uniform(0.1, 9.0))
            next_name += 1
        elif act < 0.6 and own.names:
            own.use(rng.choice(list(own.names)))
        elif act < 0.7 and free:
            pinned.add((own, n := rng.choice(free)))
            own.pin(n)
        elif act < 0.8 and pinned:
            pinned.discard(item := rng.choice(sorted(pinned, key=lambda p: p[1])))
            item[0].unpin(item[1])
        elif act < 0.85 and free:
            own.drop(rng.choice(free))
        else:
            could = any((s, n) not in pinned for s in (shelf, other) for n in s.names)
            assert bool(eviction.evict(None, "test")) is could
            if rng.random() < 0.3:
                could = any((own, n) not in pinned for n in own.names)
                assert bool(eviction.evict(own.tenant, "test")) is could
    while eviction.evict(None, "test"):
        pass
    assert {(s, n) for s in (shelf, other) for n in s.names} == pinned
    assert not eviction.evict("t", "test")
    assert not eviction.evict("nobody", "test")
    for own, n in list(pinned):
        own.unpin(n)
    while eviction.evict(None, "test"):
        pass
    assert not shelf.names
    assert not other.names
    assert eviction.queued < 600


def _quick_key(unit, node):
    return b"%d" % node


def _quick_evict(shelf, unit, node, why, *, below=0.0, pages=0):
    del shelf.rank[node]
    return 1


@pytest.mark.parametrize("name", NAMES)
def test_an_eviction_does_not_look_at_all_entries(name):
    """Entries looked at per eviction do not grow with the entries there are."""
    looked = []
    for size in (500, 4_000):
        eviction = Eviction(make_policy(name), size)
        shelf = FakeShelf(eviction)
        rng = random.Random(1)
        for i in range(size):
            shelf.put(i, rng.uniform(0.5, 2.0))
        shelf.key, shelf.evict = _quick_key, partial(_quick_evict, shelf)
        shelf.checks = 0
        for i in range(size, 2 * size):
            node = rng.choice(range(shelf._next))
            if node in shelf.rank:
                shelf.names[-1] = node
                shelf.use(-1)
            assert eviction.evict(None, "test")
            shelf.put(i, rng.uniform(0.5, 2.0))
        looked.append(shelf.checks / size)
    assert looked[1] < 8
    assert looked[1] < 2 * looked[0]


# -- under a pool ----------------------------------------------------------------------------------


def tokens_of(seed: int, length: int = 400) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50_000, length).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", NAMES)
def test_a_small_pool_stays_whole(policy, layout):
    """Branches, returning sequences, leases and flat objects over memory that holds a few of them: every hit verifies."""
    core = make_core(pages=4_000)
    store(core, core.open_namespace("t", LAYOUTS[layout], STEP), tokens_of(0, 130), checkpoints=(16, 48))
    core = make_core(pages=3 * core.stat()["used_bytes"] // 256, policy=policy)
    ns = core.open_namespace("t", LAYOUTS[layout], STEP)
    rng = random.Random(layout)
    hits = 0
    leases = []
    for i in range(60):
        seed = rng.randrange(8)
        tokens = tokens_of(seed)[: rng.choice((40, 96, 100, 130))]
        if rng.random() < 0.3:
            tokens = tokens[:48] + tokens_of(1000 + rng.randrange(4))[:60]
        found = core.match(ns, KeyChain(ns, [*tokens, 1]))
        if found.length:
            hits += 1
            check_get(core, ns, tokens, found.length)
            if len(leases) < 2:
                leases.append(core.lease(ns, KeyChain(ns, tokens), found.length, 60))
        try:
            store(core, ns, tokens, checkpoints=[p for p in (16, 48) if p < len(tokens)])
        except PoolFullError:
            assert leases
        if i % 7 == 6:
            core.begin_put_flat("t", {b"k%d" % (i % 3): 90}, deadline=core.clock() + 9).commit()
        if i % 10 == 9 and leases:
            core.release(leases.pop(0).id)
    assert hits > 5
    assert core.stat()["evictions"]["capacity"] > 50
    for lease in leases:
        core.release(lease.id)
    check_idle(core)


@pytest.mark.parametrize("policy", NAMES)
def test_with_everything_pinned_a_put_is_refused_and_nothing_hangs(policy):
    core = make_core(pages=200, policy=policy)
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    leases = []
    for seed in range(40):
        tokens = tokens_of(seed, 97)
        try:
            store(core, ns, tokens, 96)
        except PoolFullError as refused:
            error = refused
            break
        leases.append((tokens, core.lease(ns, KeyChain(ns, tokens), 96, 60)))
    assert len(leases) > 3
    assert error.retryable
    assert "be evicted, the rest is leased, being read or being written" in error.message
    assert "try again later" in error.message
    assert "capacity" not in core.stat()["evictions"]
    for tokens, _ in leases:
        check_get(core, ns, tokens, 96)
    tokens, lease = leases.pop(1)
    core.release(lease.id)
    store(core, ns, tokens_of(99, 97), 96)
    assert core.match(ns, KeyChain(ns, tokens)).length == 0
    for tokens, lease in leases:
        check_get(core, ns, tokens, 96)
        core.release(lease.id)
    check_idle(core)


@pytest.mark.parametrize("policy", NAMES)
def test_interior_nodes_give_up_only_their_state(policy):
    core = make_core(pages=400, policy=policy)
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    tokens = tokens_of(3, 97)
    store(core, ns, tokens, 96, checkpoints=(32, 64))
    tree = core._rooms[ns.id].tree
    gone = set()
    while core.stat()["entries"]["states"]:
        states = {int(p) for p in tree._position[np.flatnonzero(tree._resident[tree.state])]}
        blocks = int(tree._resident[tree.full].sum())
        assert core._eviction.evict(None, "test")
        left = {int(p) for p in tree._position[np.flatnonzero(tree._resident[tree.state])]}
        for position in states - left:
            gone.add(position)
            if position < blocks * STEP:
                assert int(tree._resident[tree.full].sum()) == blocks
    assert gone == {32, 64, 96}
    check_idle(core)


def test_the_default_gives_up_what_nothing_can_restore_first():
    """A checkpoint that its sequence has gone past, then blocks behind the last checkpoint; never a branch point before them."""
    core = make_core(pages=4_000, policy="marconi")
    ns = core.open_namespace("t", LAYOUTS["hybrid"], STEP)
    first = tokens_of(1, 96)
    store(core, ns, first, 48)
    store(core, ns, first, 96, start=48)
    assert core._eviction.evict(None, "test")
    assert core.match(ns, KeyChain(ns, [*first, 1])).restorable == (96,)
    store(core, ns, first[:48], 48)
    other = [*first[:48], *tokens_of(2, 48)]
    store(core, ns, other, 96, start=48)
    tree = core._rooms[ns.id].tree
    ranks = tree._rank[tree.state, np.flatnonzero(tree._resident[tree.state])]
    assert len(ranks) == 3
    assert (ranks > -1e6).all()  # none of them is superseded
    check_idle(core)


# -- what a hit saves ----------------------------------------------------------------------------------


def test_flops_are_those_of_the_paper():
    """Marconi's formulas for one attention and one state-space layer, both with an MLP."""
    layout = LAYOUTS["hybrid"]
    model = FlopsModel(layout)
    d = model.width
    full, window, linear = 2, 1, 2
    n = 7  # the key dimension of the state
    for tokens in (1, 40, 1_000):
        expected = (full + window + linear) * 16 * tokens * d * d
        expected += linear * (12 * tokens * d * d + 16 * tokens * d * n + 10 * tokens * d)
        expected += full * (8 * tokens * d * d + 4 * tokens * tokens * d)
        expected += window * (8 * tokens * d * d + 4 * tokens * min(tokens, 40) * d)
        assert model.upto(tokens) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["kimi-linear-48b", "qwen3.5-397b", "mimo-v2-flash", "qwen3-235b"])
def test_flops_of_presets_grow_with_length(name):
    model = FlopsModel(presets.load(name))
    at = model.upto(np.array([0, 1_000, 2_000, 100_000]))
    assert at[0] == 0
    assert (np.diff(at) > 0).all()
    assert at[3] / 100_000 > at[1] / 1_000


def test_a_window_shares_what_its_checkpoint_saves():
    model = FlopsModel(LAYOUTS["dense"])
    stops = np.array([48, 64, 160, 176])
    saved = model.between_checkpoints(stops, np.array([64]), 16)
    assert saved[0] == saved[1] == pytest.approx(model.upto(64) / 2)
    assert saved[2] == saved[3] == pytest.approx((model.upto(176) - model.upto(64)) / 2)


@pytest.mark.parametrize("policy", ["lru", "marconi"])  # gdsf has equal ranks, of which either may go first
@pytest.mark.parametrize("layout", ["dense", "hybrid", "everything", "full+window", "recurrent"])
def test_evicting_in_runs_is_evicting_one_by_one(policy, layout):
    """A core that evicts runs of blocks at once ends every step with the same entries as one that never does."""
    rng = random.Random(7)
    pages = {"dense": 220, "full+window": 300, "recurrent": 90}.get(layout, 500)
    cores = [make_core(pages, 256, policy=policy) for _ in range(2)]
    cores[1].memory._evict = types.MethodType(
        lambda memory, tenant, why, pages: Memory._evict(memory, tenant, why, 0), cores[1].memory
    )
    spaces = [core.open_namespace("t", LAYOUTS[layout], STEP) for core in cores]
    known, leases = [], []
    for step in range(90):
        tokens = [rng.randrange(99) for _ in range(rng.randint(1, 8) * STEP)]
        if known and rng.random() < 0.5:
            old = rng.choice(known[-6:])
            tokens = old[: rng.randint(0, len(old))] + tokens
        tokens = tokens[: 20 * STEP]
        known.append(tokens)
        points = [p for p in (STEP, 3 * STEP + 5) if p < len(tokens) and rng.random() < 0.4]
        lengths = []
        for core, ns in zip(cores, spaces, strict=True):
            store(core, ns, tokens, checkpoints=points)
            lengths.append([core.match(ns, KeyChain(ns, [*t, 1])).restorable for t in known])
        assert lengths[0] == lengths[1], step
        if lengths[0][-1] and rng.random() < 0.2:
            length = lengths[0][-1][-1]
            leases.append([c.lease(n, KeyChain(n, tokens), length, 60) for c, n in zip(cores, spaces, strict=True)])
        if len(leases) > 3:
            for core, lease in zip(cores, leases.pop(0), strict=True):
                core.release(lease.id)
        stats = [core.stat() for core in cores]
        for what in ("used_bytes", "evictable_bytes", "group_bytes", "entries", "ghosts"):
            assert stats[0][what] == stats[1][what], (step, what)
    assert stats[0]["evictions"]["capacity"] > 50
    for core, pair in zip(cores, zip(*leases, strict=True), strict=False):
        for lease in pair:
            core.release(lease.id)
    for core in cores:
        check_idle(core)
