"""A prefix from one cluster into another: what comes, what it costs, and what is in its way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kvpool.client import connect
from kvpool.cluster.pulling import Pulled
from kvpool.errors import MissError
from kvpool.keys import KeyChain
from kvpool.scheduling.prefixes import Prefixes
from kvpool.scheduling.router import Path
from kvtransport.buffers import PageList
from kvtransport.errors import ConfigError
from tests.clusterkit import CUT, STEP, WINDOWS, get, manifest_of, put
from tests.integration.test_cluster import SEGMENT, World, server, tokens  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
BOUNDARY = SEGMENT * 3 + 96


@pytest.fixture(params=["embedded", "valkey"])
async def world(request, server):  # noqa: F811
    server.command("FLUSHALL")
    world = World(request.param, server)
    yield world
    await world.close()


async def two_clusters(world: World, west: dict | None = None, **options) -> None:
    """Two nodes each in east and west, which know each other."""
    for name, cluster, more in (
        ("e1", "east", {}),
        ("e2", "east", {}),
        ("w1", "west", west or {}),
        ("w2", "west", west or {}),
    ):
        await world.node(name, cluster, **{**options, **more})
    await known(world)


async def known(world: World) -> None:
    async with asyncio.timeout(10):
        while any(set(n.agent._roster.members) != set(world.nodes) for n in world.nodes.values()):
            await asyncio.sleep(0.05)


async def idle(world: World) -> None:
    """Wait until no node has a put or a get open any more: a sender ends a moment after its receiver."""
    async with asyncio.timeout(10):
        while any(n.core.stat()["active"] for n in world.nodes.values()):
            await asyncio.sleep(0.02)


async def only_in_east(world: World, layout, prompt, boundary, **options):
    """A pool that writes to east, with the prompt there."""
    pool = await world.pool(cluster="east", placement=options.pop("placement", "segments"))
    ns = await pool.namespace(layout, STEP)
    await put(pool, ns, prompt, boundary, **options)
    await world.settled()
    return pool, ns


async def test_a_prefix_is_pulled_and_stays_without_its_source(world):
    await two_clusters(world)
    prompt = tokens(SEGMENT * 4)
    pool, ns = await only_in_east(world, CUT, prompt, BOUNDARY, checkpoints=(SEGMENT + 32,))
    chain = KeyChain(ns, prompt)
    assert (await pool.match_across_clusters(ns, chain)) == {"east": (SEGMENT + 32, BOUNDARY), "west": ()}
    seen = []
    pulled = await pool.pull(
        ns, chain, into="west", on_progress=lambda p: seen.append((p.done, p.parts, p.moved_bytes))
    )
    whole = manifest_of(ns, BOUNDARY).total_bytes
    assert pulled == Pulled("west", ["east"], 0, BOUNDARY, BOUNDARY, 5, 5, whole, 0, True, "")
    assert seen[0] == (0, 5, 0)
    assert seen[-1] == (5, 5, whole)
    await world.settled()
    # Blocks once, and the state at the end, not those on the way.
    assert (await pool.match_across_clusters(ns, chain))["west"] == (BOUNDARY,)
    again = await pool.pull(ns, chain, into="west")
    assert (again.parts, again.moved_bytes, again.finished) == (0, 0, True)
    shorter = await pool.pull(ns, chain, into="west", length=BOUNDARY - 1)
    assert (shorter.before, shorter.wanted, shorter.parts) == (0, SEGMENT + 32, 1)
    for name in ("e1", "e2"):
        await world.nodes.pop(name).stop()
    await pool.refresh()
    assert set(pool.roster.members) == {"w1", "w2"}
    await get(pool, ns, prompt, BOUNDARY)
    assert sum(n.agent._fetcher.fetched.parts for n in world.nodes.values()) == 6
    await idle(world)


async def test_what_was_interrupted_goes_on_with_what_is_missing(world):
    await two_clusters(world)
    prompt = tokens(SEGMENT * 4)
    pool, ns = await only_in_east(world, CUT, prompt, BOUNDARY)
    chain = KeyChain(ns, prompt)
    whole = manifest_of(ns, BOUNDARY).total_bytes
    task: asyncio.Task[Pulled] = asyncio.ensure_future(
        pool.pull(ns, chain, into="west", on_progress=lambda p: p.done == 2 and task.cancel())
    )
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):  # parts under way may end
        while any(n.agent._fetcher.fetched.running for n in world.nodes.values()):
            await asyncio.sleep(0.01)
    await world.settled()
    moved = sum(n.agent._fetcher.fetched.moved_bytes for n in world.nodes.values())
    assert 0 < moved < whole
    with pytest.raises(MissError):
        await pool_of(world, pool, "west", ns, prompt)
    pulled = await pool.pull(ns, chain, into="west")
    assert pulled.finished
    assert pulled.moved_bytes == whole - moved


async def pool_of(world: World, pool, cluster: str, ns, prompt) -> None:
    """What a cluster can restore by itself is enough, or MissError."""
    lengths = (await pool.match_across_clusters(ns, KeyChain(ns, prompt)))[cluster]
    if BOUNDARY not in lengths:
        raise MissError("not there")


async def test_a_segments_beginning_is_not_copied_twice(world):
    await two_clusters(world)
    prompt = tokens(SEGMENT * 2)
    west = await world.pool(cluster="west")
    mine = await west.namespace(CUT, STEP)
    await put(west, mine, prompt, 160)
    pool, ns = await only_in_east(world, CUT, prompt, SEGMENT - 32)
    pulled = await pool.pull(ns, KeyChain(ns, prompt), into="west")
    assert (pulled.before, pulled.wanted, pulled.finished) == (160, SEGMENT - 32, True)
    assert pulled.moved_bytes == manifest_of(ns, SEGMENT - 32, start=160).total_bytes
    await world.settled()
    assert (await pool.match_across_clusters(ns, KeyChain(ns, prompt)))["west"] == (160, SEGMENT - 32)


async def test_chains_that_stay_whole_come_with_their_off_grid_end(world):
    await two_clusters(world)
    prompt = tokens(SEGMENT * 3)
    boundary = SEGMENT * 2 + 203
    pool, ns = await only_in_east(world, WINDOWS, prompt, boundary, checkpoints=(48, SEGMENT, SEGMENT + 512))
    chain = KeyChain(ns, prompt)
    pulled = await pool.pull(ns, chain, into="west")
    assert (pulled.wanted, pulled.finished, pulled.note) == (boundary, True, "")
    assert pulled.parts == pulled.done == 2  # up to SEGMENT, and the rest
    await world.settled()
    assert (await pool.match_across_clusters(ns, chain))["west"] == (SEGMENT, boundary)
    for name in ("e1", "e2"):
        await world.nodes.pop(name).stop()
    await pool.refresh()
    await get(pool, ns, prompt, boundary)


async def test_a_full_node_refuses_and_that_is_all(world):
    await two_clusters(world, west={"pages": 64})
    prompt = tokens(SEGMENT * 4)
    pool, ns = await only_in_east(world, CUT, prompt, BOUNDARY)
    pulled = await pool.pull(ns, KeyChain(ns, prompt), into="west")
    assert not pulled.finished
    assert pulled.reached == 0
    # Each of two lanes asks both nodes, once.
    assert 2 <= pulled.refused <= 4
    assert "memory" in pulled.note
    await idle(world)
    await get(pool, ns, prompt, BOUNDARY)


async def test_a_pull_keeps_its_deadline_and_its_bandwidth(world):
    await two_clusters(world)
    prompt = tokens(SEGMENT * 4)
    pool, ns = await only_in_east(world, CUT, prompt, BOUNDARY)
    chain = KeyChain(ns, prompt)
    whole = manifest_of(ns, BOUNDARY).total_bytes
    loop = asyncio.get_running_loop()
    begin = loop.time()
    pulled = await pool.pull(ns, chain, into="west", deadline_s=0.7, bytes_per_s=whole / 60)
    took = loop.time() - begin
    assert not pulled.finished
    assert "deadline" in pulled.note
    assert took < 7
    assert pulled.moved_bytes < whole / 3
    await idle(world)
    # The same pace, allowed to end: no faster than it may.
    begin = loop.time()
    pulled = await pool.pull(ns, chain, into="west", bytes_per_s=whole / 0.8)
    assert pulled.finished
    assert loop.time() - begin > 0.3


async def test_a_lost_source_is_told_and_the_other_replica_is_read(world):
    await two_clusters(world)
    prompt = tokens(SEGMENT * 4)
    pool, ns = await only_in_east(world, CUT, prompt, BOUNDARY)
    chain = KeyChain(ns, prompt)
    await pool.pull(ns, chain, into="west")
    await world.node("n1", "north")
    await known(world)
    await pool.refresh()
    await world.settled()
    for name in ("e1", "e2"):
        await world.nodes.pop(name).stop(leave=False)  # a crash: the directory still names them
    pulled = await pool.pull(ns, chain, into="north")
    assert pulled.finished, pulled.note
    await world.nodes.pop("w1").stop(leave=False)
    await world.nodes.pop("w2").stop(leave=False)
    await get(pool, ns, prompt, BOUNDARY, deadline_s=20)


async def test_wrong_clusters_are_named(world):
    await world.node("e1", "east")
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    with pytest.raises(ConfigError, match="no cluster 'south'; there are east"):
        await pool.pull(ns, KeyChain(ns, tokens(100)), into="south")
    pulled = await pool.pull(ns, KeyChain(ns, tokens(100)), into="east")
    assert (pulled.wanted, pulled.finished, pulled.sources) == (0, True, [])


async def slow_get(client, ns, prompt, boundary, **options):
    """A get whose destinations are there; sealed when the caller waits for it."""
    manifest = manifest_of(ns, boundary)
    into = {slot: PageList.of(bytearray(e.nbytes)) for slot, e in manifest.by_slot.items()}
    return await client.get(ns, KeyChain(ns, prompt), boundary=boundary, into=into, deadline_s=30, **options)


async def test_a_live_get_goes_before_one_below_it(world, monkeypatch):
    """On its own link by priority; across links because what is below waits for what is not, piece by piece."""
    monkeypatch.setattr("kvpool.below.PIECE_BYTES", 16 << 10)
    monkeypatch.setattr("kvpool.below.AHEAD_BYTES", 32 << 10)
    monkeypatch.setattr("kvpool.below.YIELD_S", 60.0)
    node = await world.node("e1", "east", pages=8192)
    prompt = tokens(SEGMENT * 8)
    long, short = SEGMENT * 7, 64
    clients = [await connect("127.0.0.1", node.port, connections=1) for _ in range(2)]
    below, live = clients
    try:
        ns = await below.namespace(CUT, STEP)
        await live.namespace(CUT, STEP)
        await put(below, ns, prompt, long, checkpoints=(short,))
        # A get of a request whose put does not go on: it is under way, and nothing of it comes.
        request = b"q" * 16
        other = tokens(SEGMENT, 5)
        waiting = await live.put(ns, KeyChain(ns, other), boundary=64, request=request)
        held = await slow_get(live, ns, other, 64, request=request)
        first = await slow_get(below, ns, prompt, long, priority=-1)
        async with asyncio.timeout(10):
            while not node.server.stat()["wire"]["yielded_pieces"]:
                await asyncio.sleep(0.01)
        # Others are served while it waits, on either link.
        for client in clients:
            await (await slow_get(client, ns, prompt, short)).sealed()
        assert first.stats.moved_bytes == 0
        await waiting.cancel("enough")
        with pytest.raises(Exception, match="enough"):
            await held.sealed()
        await first.sealed()
        assert first.stats.moved_bytes == manifest_of(ns, long).total_bytes
        assert node.server.stat()["wire"]["yielded_pieces"] == 1
    finally:
        for client in clients:
            await client.close()


async def test_below_others_it_still_goes_on(world, monkeypatch):
    """Behind gets without end a piece waits its time and goes."""
    monkeypatch.setattr("kvpool.below.PIECE_BYTES", 256 << 10)
    monkeypatch.setattr("kvpool.below.YIELD_S", 0.01)
    node = await world.node("e1", "east")
    prompt = tokens(SEGMENT * 8)
    client = await connect("127.0.0.1", node.port, connections=1)
    try:
        ns = await client.namespace(CUT, STEP)
        await put(client, ns, prompt, SEGMENT)
        request = b"q" * 16
        waiting = await client.put(ns, KeyChain(ns, tokens(SEGMENT, 5)), boundary=64, request=request)
        await slow_get(client, ns, tokens(SEGMENT, 5), 64, request=request)
        first = await slow_get(client, ns, prompt, SEGMENT, priority=-1)
        await first.sealed()
        assert node.server.stat()["wire"]["yielded_pieces"] >= 1
        await waiting.cancel("enough")
    finally:
        await client.close()


async def test_the_router_sees_both_clusters_and_has_a_prefix_pulled(world):
    """The seam between the router's decision and the pool, over real nodes."""
    await two_clusters(world)
    prompt = tokens(SEGMENT * 4)
    pool, ns = await only_in_east(world, CUT, prompt, BOUNDARY)
    prefixes = Prefixes(pool, pd="west", prfaas="east")
    chain = KeyChain(ns, prompt)
    request = await prefixes.request(ns, chain)
    assert (request.tokens, request.match_pd, request.match_prfaas) == (len(prompt), 0, BOUNDARY)
    pulled = await prefixes.carry_out(SimpleNamespace(path=Path.LOCAL, pull_bytes=1.0), ns, chain)
    assert pulled is not None
    assert (pulled.cluster, pulled.reached) == ("west", BOUNDARY)
    await world.settled()
    assert (await prefixes.request(ns, chain)).match_pd == BOUNDARY
