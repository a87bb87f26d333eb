"""Long work in steps: what runs in between, what is left when it is given up, and what the garbage collector is spared."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
import weakref

import numpy as np
import pytest

from kvpool import memory
from kvpool.collecting import AT_LAST_S, EVERYTHING_S, MOST_YOUNG, OLD, Collector
from kvpool.errors import DuplicateRequestError, PoolFullError
from kvpool.eviction import GhostList
from kvpool.eviction.base import Stored
from kvpool.eviction.marconi import MAX_WAITING, Marconi
from kvpool.keys import KeyChain
from kvpool.messages import HASHES, chain_steps, chain_to_wire
from kvpool.steps import Background, run, run_in_turns
from tests.poolkit import LAYOUTS, STEP, make_core, store

REQUEST = bytes(range(16))


@pytest.fixture
def core(monkeypatch):
    """A pool that is full of other sequences, whose evictions take many steps."""
    monkeypatch.setattr(memory, "SLICE_ENTRIES", 2)
    core = make_core(pages=600)
    core.ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    fill_up(core)
    return core


def fill_up(core):
    evicted, number = sum(core.memory.evictions.values()), 0
    while sum(core.memory.evictions.values()) == evicted:
        number += 1
        store(core, core.ns, range(number * 1_000, number * 1_000 + 4 * STEP))


def opening(core, tokens=range(500_000, 500_000 + 20 * STEP), request=None):
    chain = KeyChain(core.ns, np.array(tokens))
    return core.put_steps(
        core.ns, chain, boundary=len(chain.blocks) * STEP, request=request, deadline=core.clock() + 10
    )


def test_a_put_that_is_given_up_between_steps_leaves_nothing(core):
    active, used = core.stat()["active"], core.arena.used_bytes
    steps = opening(core)
    for _ in range(3):
        next(steps)
    evicted = used - core.arena.used_bytes
    assert evicted > 0
    steps.close()
    stat = core.stat()
    assert (stat["active"], stat["requests"]) == (active, 0)
    assert core.memory.evictable_bytes() == core.arena.used_bytes == used - evicted
    core.clear()
    assert core.arena.used_bytes == 0


def test_the_prefix_of_a_put_in_steps_stays(core):
    tokens = np.arange(700_000, 700_000 + 20 * STEP)
    chain = KeyChain(core.ns, tokens)
    store(core, core.ns, tokens[: 4 * STEP].tolist())
    steps = core.put_steps(core.ns, chain, boundary=20 * STEP, start=4 * STEP, deadline=core.clock() + 10)
    next(steps)
    core.clear()
    assert core.view(core.ns, chain).resident[0].sum() == 4
    run(steps).abort()
    core.clear()
    assert core.arena.used_bytes == 0


def test_others_may_take_the_room_between_steps(core):
    steps = opening(core)
    next(steps)
    other = run(opening(core, range(900_000, 900_000 + 6 * STEP)))
    put = run(steps)
    assert put.destinations.keys() == other.destinations.keys()
    put.abort()
    other.abort()
    fill_up(core)
    # With everything pinned by others meanwhile it is refused with the numbers, and holds nothing.
    steps = opening(core)
    next(steps)
    size = core.arena.free_bytes + core.memory.evictable_bytes()
    blocker = run(core.put_flat_steps("t", {b"all": size}, deadline=core.clock() + 10))
    with pytest.raises(PoolFullError, match="0 could be evicted"):
        run(steps)
    blocker.abort()
    core.clear()
    assert core.arena.used_bytes == 0


def test_of_two_puts_of_one_request_the_first_to_finish_has_it(core):
    first, second = opening(core, request=REQUEST), opening(core, range(20 * STEP), request=REQUEST)
    next(first)
    next(second)
    put = run(second)
    with pytest.raises(DuplicateRequestError):
        run(first)
    put.abort()
    core.clear()
    assert core.arena.used_bytes == 0


async def test_steps_take_turns_with_others_and_are_closed_when_cancelled():
    seen = []

    def work():
        try:
            for i in range(3):
                seen.append(i)
                yield
            return "done"
        finally:
            seen.append("closed")

    async def beside():
        for _ in range(3):
            await asyncio.sleep(0)
            seen.append("beside")

    assert (await asyncio.gather(run_in_turns(work()), beside()))[0] == "done"
    assert seen.index("beside") < seen.index(2)
    seen.clear()
    task = asyncio.get_running_loop().create_task(run_in_turns(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert seen[-1] == "closed"
    assert 2 not in seen


async def test_background_work_goes_on_until_nothing_is_left():
    left = [5]

    def step():
        left[0] -= 1
        return left[0] > 0

    work = Background(step)
    work.start()
    work.start()
    assert left == [5]
    for _ in range(10):
        await asyncio.sleep(0)
    assert left == [0]
    left[0] = 5
    work.start()
    work.stop()
    for _ in range(10):
        await asyncio.sleep(0)
    assert left == [5]


def test_a_chain_from_the_wire_is_hashed_in_steps():
    core = make_core()
    ns = core.open_namespace("t", LAYOUTS["dense"], STEP)
    chain = KeyChain(ns, np.arange(3 * HASHES * STEP + 7), b"extra")
    steps = chain_steps(ns, chain_to_wire(chain), stores=True)
    count = 0
    while True:
        try:
            next(steps)
            count += 1
        except StopIteration as done:
            again = done.value
            break
    assert count == 3
    assert (again.blocks, again.tokens, again.extra) == (chain.blocks, chain.tokens, chain.extra)
    assert run(chain_steps(ns, chain_to_wire(KeyChain(ns)))).tokens == 0


def sequences(count):
    rng = np.random.default_rng(3)
    for _ in range(count):
        n = int(rng.integers(1, 9))
        start = int(rng.integers(40))
        keys = [(0, b"%d" % (start * 100 + i)) for i in range(n)]
        yield Stored(keys, [1] * n, [1.0] * n, [512] * n, [], False, int(rng.integers(n)), 1 + start % 3)


def test_learning_later_is_learning_the_same():
    """As long as it is not put off for long: weights and scores of what was replayed in steps, and of what was at once."""
    described = []
    for steps_each in (None, 8, 0):
        policy = Marconi()
        policy.bind([], 64)
        waiting = 0
        for sequence in sequences(400):
            policy.first_rank(np.array([policy._now + 10]), np.ones(1, np.float32), np.ones(1, np.int32), 1)
            policy.learn(sequence)
            for _ in range(steps_each if steps_each is not None else 10_000):
                if not policy.work():
                    break
            waiting = max(waiting, len(policy._waiting))
        while policy.work():
            pass
        described.append(policy.describe())
        assert waiting <= MAX_WAITING * len(policy._candidates)
        if steps_each == 0:
            assert waiting == MAX_WAITING * len(policy._candidates)
    assert described[0] == described[1]
    assert described[0]["candidates"] == described[2]["candidates"]


def turns(*values):
    return np.array(values, np.int32)


def test_ghosts_in_runs():
    ghosts = GhostList(limit=10)
    ghosts.add(0, 1, [b"a", b"b", b"c", b"d"], 1.0, "capacity", turns(1, 1, 2, 2))
    assert [ghosts.get(0, 1, key).turn for key in (b"a", b"b", b"c", b"d")] == [1, 1, 2, 2]
    assert ghosts.turns(0, 1, [b"b", b"d", b"x", b"a"]).tolist() == [1, 2]
    assert ghosts.get(0, 0, b"a") is None
    assert ghosts.turns(0, 0, [b"a"]).tolist() == []
    ghosts.drop(0, 1, [b"b", b"x"])
    ghosts.drop(7, 7, [b"b"])
    assert (ghosts.get(0, 1, b"b"), len(ghosts)) == (None, 3)
    # One of them was never said to be there again: it went anew all the same.
    ghosts.add(0, 1, [b"b", b"c"], 2.0, "quota", turns(3, 3))
    assert (ghosts.get(0, 1, b"c").why, ghosts.get(0, 1, b"c").turn, len(ghosts)) == ("quota", 3, 4)
    # Three runs' keys are eleven: of the oldest run the first is forgotten, and what went again later stays.
    ghosts.add(1, 0, [b"%d" % i for i in range(5)], 3.0, "capacity", turns(1, 1, 1, 1, 1))
    assert ghosts.get(0, 1, b"a") is None
    assert ghosts.get(0, 1, b"d").at == 1.0
    ghosts.add(1, 0, [b"7", b"8", b"9"], 4.0, "capacity", turns(1, 1, 1))
    assert ghosts.get(0, 1, b"c").at == 2.0
    assert ghosts.get(0, 1, b"d") is None
    ghosts.add(1, 0, [b"x%d" % i for i in range(20)], 5.0, "capacity", turns(*[1] * 20))
    assert ghosts.get(1, 0, b"9") is None
    assert ghosts.get(1, 0, b"x9") is None
    assert ghosts.get(1, 0, b"x10").why == "capacity"
    assert len(ghosts) == 10
    assert list(ghosts._places) == [(1, 0)]  # of what was forgotten wholly nothing is left


def test_ghosts_like_a_list():
    """At random, against the plainest thing that does the same."""
    rng = random.Random(3)
    ghosts, plain = GhostList(limit=50), []  # (place, key, run) in the order of going; a key that came back has no run
    for number in range(2_000):
        place = (rng.randrange(2), rng.randrange(2))
        keys = [b"%d" % k for k in rng.sample(range(120), rng.randrange(1, 12))]
        if rng.random() < 0.4:
            ghosts.drop(*place, keys)
            plain = [(p, k, None if p == place and k in keys else r) for p, k, r in plain]
            continue
        ghosts.add(*place, keys, float(number), "capacity", turns(*[number] * len(keys)))
        plain = [(p, k, None if p == place and k in keys else r) for p, k, r in plain]
        plain = (plain + [(place, k, number) for k in keys])[-50:]
        known = {(p, k): r for p, k, r in plain if r is not None}
        assert len(ghosts) == len(known)
        for k in rng.sample(range(120), 10):
            found = ghosts.get(*place, b"%d" % k)
            assert (found and found.at) == known.get((place, b"%d" % k))


@pytest.mark.parametrize("together", [1, 100])
def test_ghosts_take_no_more_with_time(together):
    """Neither bytes nor objects for the garbage collector, though every key is new and each run is forgotten in its turn."""
    limit, number = 2_000, 0
    ghosts = GhostList(limit)

    def evict(count):
        nonlocal number
        for _ in range(count // together):
            keys = [b"%032d" % (number + i) for i in range(together)]
            ghosts.add(0, number % 2, keys, float(number), "capacity", turns(*[1] * together))
            if number % 3 == 0:
                ghosts.drop(0, number % 2, keys)  # came back: its place in the order is taken nevertheless
            number += together

    evict(3 * limit)
    tracemalloc.start()
    try:
        gc.collect()
        objects, before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
        evict(5 * limit)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
        assert len(gc.get_objects()) - objects < 50
    finally:
        tracemalloc.stop()
    columns = (ghosts._shelf, ghosts._unit, ghosts._number, ghosts._at, ghosts._why)
    assert sum(c.nbytes for c in columns) == 22 * limit


class Cycle:
    def __init__(self):
        self.me = self


def test_the_collector_spares_what_is_old_and_finds_its_cycles_when_it_is_quiet():
    now = [0.0]
    before = gc.get_threshold()
    collector = Collector(lambda: now[0])
    collector.start()
    try:
        assert gc.get_threshold()[2] > 1_000_000
        kept = Cycle()
        lost = weakref.ref(Cycle())
        for _ in range(OLD):
            gc.collect(1)
        frozen = gc.get_freeze_count()
        assert not collector.tick(quiet=True)
        assert lost() is None
        assert gc.get_freeze_count() > frozen
        old = weakref.ref(kept)
        del kept
        gc.collect()
        assert old() is not None  # frozen: out of sight
        assert not collector.tick(quiet=True)
        now[0] += EVERYTHING_S
        assert not collector.tick(quiet=False)
        assert old() is not None
        assert collector.tick(quiet=True)
        assert old() is None
        now[0] += AT_LAST_S
        assert collector.tick(quiet=False)
    finally:
        collector.stop()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_the_collector_looks_at_the_young_between_calls():
    looked = []

    def note(phase, info):
        if phase == "stop":
            looked.append(info["generation"])

    collector = Collector(lambda: 0.0)
    collector.start()
    gc.callbacks.append(note)
    try:
        lost = weakref.ref(Cycle())
        kept = [[] for _ in range(3_500)]  # Python would have looked five times
        assert not looked
        assert lost() is not None
        collector.tick(quiet=False)
        assert looked == [0]
        assert lost() is None
        before = gc.get_freeze_count()
        for _ in range(200):
            kept += [[]]
            collector.tick(quiet=False)
        assert looked.count(2) == 1
        assert looked.count(1) >= OLD
        assert gc.get_freeze_count() > before + 3_500
        looked.clear()
        kept += [[] for _ in range(2 * MOST_YOUNG)]  # so many do not wait
        assert looked
    finally:
        gc.callbacks.remove(note)
        collector.stop()
