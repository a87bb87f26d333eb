"""Reads of what lies on several nodes: the least loaded, a second one when it takes long, another try; and one computation per miss."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvpool.cluster.hedging import LEAST
from kvpool.cluster.replicas import ReplicaPolicy
from kvpool.errors import KeyChainError, MissError, NoNodeError
from kvpool.keys import KeyChain
from kvtransport.buffers import PageList
from kvtransport.errors import LinkError
from tests.clusterkit import CUT, STEP, check, get, manifest_of, put
from tests.integration.test_cluster import SEGMENT, World, server, tokens  # noqa: F401
from tests.integration.test_cluster_replicas import kept, seen

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
LENGTH = SEGMENT


@pytest.fixture
async def world(server):  # noqa: F811
    world = World("embedded", server)
    for name in ("n1", "n2"):
        await world.node(name, replicas=ReplicaPolicy(factor=2))
    await seen(world)
    yield world
    await world.close()


async def stored(world: World, n: int = 1):
    """A client, its namespace, and prompts that lie on both nodes."""
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompts = [tokens(SEGMENT + 64, seed) for seed in range(n)]
    for prompt in prompts:
        await put(pool, ns, prompt, LENGTH)
    await kept(world)
    return pool, ns, prompts


def slow(pool, node: str, seconds: float) -> None:
    """From now on what is asked of ``node`` takes so much longer."""
    open_at = pool._reader._links.open

    async def later(member, ns):
        if member.id == node:
            await asyncio.sleep(seconds)
        return await open_at(member, ns)

    pool._reader._links.open = later


async def test_the_least_loaded_replica_is_read(world):
    pool, ns, (prompt,) = await stored(world)
    counters = {name: node.core.stat()["counters"].get("gets", 0) for name, node in world.nodes.items()}
    pool._reader.loads.begin("n1", 1 << 30)
    for _ in range(5):
        await get(pool, ns, prompt, LENGTH)
    got = {name: node.core.stat()["counters"].get("gets", 0) - counters[name] for name, node in world.nodes.items()}
    assert got == {"n1": 0, "n2": 10}
    pool._reader.loads.end("n1", 1 << 30)
    assert pool._reader.loads._own == {}


async def test_a_read_that_takes_long_is_asked_of_a_second_node(world):
    pool, ns, (prompt,) = await stored(world)
    for _ in range(LEAST):
        await get(pool, ns, prompt, LENGTH)
    slow(pool, "n1", 2.0)
    pool._reader.loads.begin("n2", 1 << 30)  # so that n1 is asked first
    begin = time.monotonic()
    await get(pool, ns, prompt, LENGTH, deadline_s=20)
    reads = (await pool.stat())["reads"]
    assert reads["hedged"] >= 1
    assert reads["hedges_won"] >= 1
    assert time.monotonic() - begin < 2.0
    # Only so many: without budget the slow node is waited for.
    pool._reader.hedges._tokens = -1.0
    begin = time.monotonic()
    await get(pool, ns, prompt, LENGTH, deadline_s=20)
    assert time.monotonic() - begin >= 2.0
    after = (await pool.stat())["reads"]
    assert after["hedged"] == reads["hedged"] <= 0.03 * reads["parts"] + 1
    assert pool._reader.hedges._scratch == 256 << 20


async def test_a_cancelled_get_with_two_reads_leaves_its_memory_alone(world):
    pool, ns, (prompt,) = await stored(world)
    for _ in range(LEAST):
        await get(pool, ns, prompt, LENGTH)
    slow(pool, "n1", 5.0)
    slow(pool, "n2", 1.0)
    pool._reader.loads.begin("n2", 1 << 30)
    manifest = manifest_of(ns, LENGTH)
    into = {slot: PageList.of(bytearray(e.nbytes)) for slot, e in manifest.by_slot.items()}
    incoming = await pool.get(ns, KeyChain(ns, prompt), boundary=LENGTH, into=into)
    async with asyncio.timeout(5):
        while not pool._reader.hedges.asked:
            await asyncio.sleep(0.01)
    await incoming.cancel("enough")
    before = {slot: pages.tobytes() for slot, pages in into.items()}
    await asyncio.sleep(1.2)
    assert {slot: pages.tobytes() for slot, pages in into.items()} == before
    assert pool._reader.hedges._scratch == 256 << 20
    assert all(n.core.stat()["active"] == 0 for n in world.nodes.values())


async def test_what_may_be_tried_again_is(world):
    pool, ns, (prompt,) = await stored(world)
    open_at, failures = pool._reader._links.open, iter([LinkError("lost"), NoNodeError("not now")] * 2)

    async def fails(member, ns):
        if (error := next(failures, None)) is not None:
            raise error
        return await open_at(member, ns)

    pool._reader._links.open = fails
    manifest = manifest_of(ns, LENGTH)
    into = {slot: PageList.of(bytearray(e.nbytes)) for slot, e in manifest.by_slot.items()}
    incoming = await pool.get(ns, KeyChain(ns, prompt), boundary=LENGTH, into=into)
    await incoming.sealed()
    check(into, manifest.extents, prompt)

    async def evicted(member, ns):
        raise MissError("gone")

    pool._reader._links.open = evicted
    begin = time.monotonic()
    with pytest.raises(MissError):  # a miss is an answer
        await get(pool, ns, prompt, LENGTH)
    assert time.monotonic() - begin < 5


async def test_of_those_who_miss_at_once_one_computes(world):
    pools = [await world.pool() for _ in range(2)]
    prompt = tokens(SEGMENT + 64, 7)
    computed = []

    async def ask(pool) -> int:
        ns = await pool.namespace(CUT, STEP)
        async with await pool.turn(ns, KeyChain(ns, prompt), LENGTH, wait_s=20) as turn:
            if turn.computes:
                computed.append(turn.length)
                await asyncio.sleep(0.3)
                await put(pool, ns, prompt, LENGTH)
                await world.settled()
            else:
                assert turn.length == LENGTH
        await get(pool, ns, prompt, LENGTH)
        return turn.computes

    answers = await asyncio.gather(*(ask(pool) for pool in pools * 4))
    assert computed == [0]
    assert sum(answers) == 1
    assert sum(len(n.agent._claims) for n in world.nodes.values()) == 0
    ns = await pools[0].namespace(CUT, STEP)
    with pytest.raises(KeyChainError, match="last"):
        await pools[0].turn(ns, KeyChain(ns, prompt), len(prompt))


async def test_who_waited_long_enough_computes_itself(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    chain = KeyChain(ns, tokens(SEGMENT + 64, 8))
    first = await pool.turn(ns, chain, LENGTH, seconds=60)
    assert first.computes  # and never ends
    second = await pool.turn(ns, chain, LENGTH, wait_s=0.3)
    assert second.computes
    assert 0.3 <= second.waited_s < 5
    async with first:
        pass
    third = await pool.turn(ns, chain, LENGTH, seconds=0.2)
    assert (third.computes, third.waited_s < 0.3) == (True, True)
    fourth = await pool.turn(ns, chain, LENGTH, wait_s=30)  # the third's time is up
    assert fourth.computes
    assert fourth.waited_s < 10


async def test_nobody_waits_for_a_claim_that_nobody_can_keep(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    for name in ("n1", "n2"):
        await world.nodes.pop(name).stop(leave=False)
    begin = time.monotonic()
    turn = await pool.turn(ns, KeyChain(ns, tokens(SEGMENT + 64, 9)), LENGTH, wait_s=60)
    assert turn.computes
    assert time.monotonic() - begin < 15
