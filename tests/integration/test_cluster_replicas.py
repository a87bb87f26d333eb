"""Copies: a factor, more for what is read most, repair, and what a node that joins gets."""

from __future__ import annotations

import asyncio

import pytest

from kvpool.cluster.entries import decode
from kvpool.cluster.locate import Cut, Whole
from kvpool.cluster.replicas import ReplicaPolicy
from kvpool.cluster.segments import units_of
from kvpool.keys import KeyChain
from tests.clusterkit import CUT, STEP, TTL_S, WINDOWS, get, put
from tests.integration.test_cluster import SEGMENT, World, server, tokens  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
BOUNDARY = SEGMENT * 2 + 96


@pytest.fixture(params=["embedded", "valkey"])
async def world(request, server):  # noqa: F811
    server.command("FLUSHALL")
    world = World(request.param, server)
    yield world
    await world.close()


async def kept(world: World) -> None:
    """Wait until no node has anything to copy, and all is announced."""
    async with asyncio.timeout(20):
        quiet = 0
        while quiet < 4:
            await asyncio.sleep(0.2)
            idle = all(n.agent.keeper.idle and not n.agent.keeper.progress.waiting for n in world.nodes.values())
            quiet = quiet + 1 if idle else 0
    await world.settled()


async def seen(world: World) -> None:
    """Wait until every node knows all others: what is stored earlier goes by an older view."""
    async with asyncio.timeout(10):
        while any(set(n.agent._roster.members) != set(world.nodes) for n in world.nodes.values()):
            await asyncio.sleep(0.05)


async def copies(world: World, pool, ns, prompt) -> list[int]:
    """How many nodes that are there say they hold something of each segment that has something: blocks all, states some."""
    known = Cut(ns, units_of(ns), KeyChain(ns, prompt[:BOUNDARY]).blocks)
    there = {n.endpoint.incarnation[:8] for n in world.nodes.values()}
    found = await pool.directory.look(known.keys)
    counts = [sum(decode(entry).incarnation in there for entry in nodes.values()) for nodes in found]
    return [n for n, (unit, _) in zip(counts, known.parts, strict=True) if n or unit == 0]


async def test_a_factor_of_two_survives_a_node_and_is_repaired(world):
    for name in ("n1", "n2", "n3"):
        await world.node(name, replicas=ReplicaPolicy(by_model={"default/no windows": 2}))
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    whole = await pool.namespace(WINDOWS, STEP)
    prompts = [tokens(SEGMENT * 3, seed) for seed in range(4)]
    for prompt in prompts:
        await put(pool, ns, prompt, BOUNDARY, checkpoints=(48, SEGMENT))
        await put(pool, whole, prompt, BOUNDARY)
    await kept(world)
    for prompt in prompts:
        assert set(await copies(world, pool, ns, prompt)) == {2}
    # The other model has no factor: each of its chains lies on one node.
    for prompt in prompts:
        found = await pool.directory.look(Whole(whole, KeyChain(whole, prompt[:BOUNDARY])).keys)
        assert [len(nodes) for nodes in found] == [1, 1, 1]
    await world.nodes.pop("n1").stop(leave=False)
    for prompt in prompts:
        for length in (48, SEGMENT, BOUNDARY):
            await get(pool, ns, prompt, length, deadline_s=10)
    async with asyncio.timeout(10 * TTL_S):
        while "n1" in pool.roster.members:
            await asyncio.sleep(0.05)
    await asyncio.sleep(2.5 * TTL_S)  # it gets a moment to come back
    await kept(world)
    for prompt in prompts:
        assert set(await copies(world, pool, ns, prompt)) == {2}
    assert sum(n.agent.keeper.progress.failed for n in world.nodes.values()) == 0
    # Now either of the two has everything.
    await world.nodes.pop("n2").stop(leave=False)
    for prompt in prompts:
        await get(pool, ns, prompt, BOUNDARY, deadline_s=10)


async def test_one_copy_is_the_default_and_nothing_moves(world):
    for name in ("n1", "n2"):
        await world.node(name)
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 3)
    await put(pool, ns, prompt, BOUNDARY)
    await kept(world)
    assert set(await copies(world, pool, ns, prompt)) == {1}
    assert all(n.agent.keeper.progress.moved_bytes == 0 for n in world.nodes.values())


async def test_what_is_read_most_gets_more_copies(world):
    for name in ("n1", "n2", "n3"):
        await world.node(name, replicas=ReplicaPolicy(most=2, hits_per_copy=10))
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    hot, cold = tokens(SEGMENT * 3), tokens(SEGMENT * 3, 1)
    for prompt in (hot, cold):
        await put(pool, ns, prompt, BOUNDARY)
    await world.settled()
    await get(pool, ns, cold, BOUNDARY)
    for _ in range(15):
        await get(pool, ns, hot, BOUNDARY)
    await kept(world)
    assert await copies(world, pool, ns, hot) == [2, 2, 2, 2]
    assert set(await copies(world, pool, ns, cold)) == {1}
    await get(pool, ns, hot, BOUNDARY)


async def test_a_node_that_joins_gets_its_share_and_no_more(world):
    for name in ("n1", "n2"):
        await world.node(name)
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    whole = await pool.namespace(WINDOWS, STEP)
    prompts = [tokens(SEGMENT * 3, seed) for seed in range(6)]
    for prompt in prompts:
        await put(pool, ns, prompt, BOUNDARY, checkpoints=(48, SEGMENT))
        await put(pool, whole, prompt, BOUNDARY)
    await kept(world)
    before = sum(n.core.stat()["used_bytes"] for n in world.nodes.values())
    joined = await world.node("n3")
    async with asyncio.timeout(10):
        while not any(n.agent.keeper.progress.scanned for n in world.nodes.values()):
            await asyncio.sleep(0.05)
    await kept(world)
    moved = sum(n.agent.keeper.progress.moved_bytes for n in world.nodes.values())
    assert moved > 0
    assert 0.1 * before < joined.core.stat()["used_bytes"] < 0.7 * before
    assert joined.agent.keeper.progress.moved_bytes == 0
    for prompt in prompts:
        await get(pool, ns, prompt, BOUNDARY)
        await get(pool, whole, prompt, BOUNDARY)


async def test_without_rebalancing_a_node_that_joins_gets_nothing(world):
    await world.node("n1", rebalance=False)
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    await put(pool, ns, tokens(SEGMENT * 3), BOUNDARY)
    await kept(world)
    joined = await world.node("n2", rebalance=False)
    await asyncio.sleep(2 * TTL_S)
    await kept(world)
    assert joined.core.stat()["used_bytes"] == 0


async def test_copies_are_no_faster_than_allowed_and_go_on_after_an_interruption(world, monkeypatch):
    """The view grows old in the middle of a copy: nothing moves until it is good again, and then all that is missing does."""
    await world.node("n1", replicas=ReplicaPolicy(factor=2), copy_bytes_per_s=60_000)
    await world.node("n2", replicas=ReplicaPolicy(factor=2))
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompts = [tokens(SEGMENT * 3, seed) for seed in range(4)]
    for prompt in prompts:
        await put(pool, ns, prompt, BOUNDARY)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    agent = world.nodes["n1"].agent
    progress = agent.keeper.progress
    async with asyncio.timeout(10):
        while not progress.moved_bytes:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    assert progress.moved_bytes < 60_000 * (loop.time() - begin) + 60_000
    assert progress.waiting > 0
    with monkeypatch.context() as patch:
        patch.setattr(agent._roster, "steady", lambda now: False)
        async with asyncio.timeout(10):
            while not progress.held_up:
                await asyncio.sleep(0.05)
        before = progress.moved_bytes
        await asyncio.sleep(0.5)
        assert progress.moved_bytes == before
        assert min([min(await copies(world, pool, ns, prompt)) for prompt in prompts]) == 1
    await kept(world)
    for prompt in prompts:
        assert set(await copies(world, pool, ns, prompt)) == {2}
