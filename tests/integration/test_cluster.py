"""Many nodes as one pool, over every kind of directory: embedded, Valkey or Redis, and a fixed list of nodes."""

from __future__ import annotations

import asyncio
import random
import time

import msgspec
import numpy as np
import pytest

from kvpool.cluster.directory import Directory, EmbeddedDirectory
from kvpool.cluster.links import NodeLinks
from kvpool.cluster.locate import Cut
from kvpool.cluster.members import State
from kvpool.cluster.peers import PeerDirectory
from kvpool.cluster.pool import ClusterPool, connect_cluster, open_placement
from kvpool.cluster.segments import SEGMENT_BLOCKS, units_of
from kvpool.cluster.valkey import open_directory
from kvpool.errors import DirectoryError, LeaseError, MissError, NoNodeError, PrefixMissingError
from kvpool.keys import KeyChain
from kvpool.protocol import PoolProtocol
from kvtransport.buffers import PageList
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, IncarnationError, KVError, TransferCancelledError
from tests.clusterkit import CUT, STEP, TTL_S, WINDOWS, Node, Server, check, get, manifest_of, put, running
from tests.conftest import no_tasks_left
from tests.poolkit import content

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
SEGMENT = SEGMENT_BLOCKS * STEP


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


class World:
    """Three nodes in two clusters, a directory of one kind, and clients."""

    def __init__(self, kind: str, server: Server | None) -> None:
        self.kind, self.server = kind, server
        self.embedded = EmbeddedDirectory(time.monotonic)
        self.nodes: dict[str, Node] = {}
        self.pools: list[ClusterPool] = []

    def directory(self) -> Directory | None:
        if self.kind == "embedded":
            return self.embedded
        if self.kind == "valkey":
            assert self.server is not None
            return open_directory(f"valkey://127.0.0.1:{self.server.port}?name=test", timeout_s=0.5)
        return None

    async def node(self, name: str, cluster: str = "a", **options) -> Node:
        port = options.pop("port", 0)
        self.nodes[name] = await Node(name, cluster=cluster, **options).start(self.directory(), port)
        return self.nodes[name]

    async def pool(self, placement: str = "segments", **options) -> ClusterPool:
        config = EndpointConfig(keepalive_s=0.2, dead_after_s=1.0, reconnect_s=0.3, tls=options.get("tls"))
        # A handshake of TLS takes a busy machine a while.
        links = NodeLinks(config, random=random.random, dial_s=5.0 if config.tls else 1.0)
        directory = self.directory() or PeerDirectory(links, [n.address for n in self.nodes.values()], timeout_s=0.5)
        policy, whole = open_placement(placement, options.get("cluster"), options.get("local"))
        tenant = options.get("tenant", "default")
        pool = ClusterPool(
            directory, links, placement=policy, whole_chains=whole, tenant=tenant, ttl_s=TTL_S, answer_s=0.5
        )
        await pool.start()
        self.pools.append(pool)
        return pool

    async def settled(self) -> None:
        if self.kind != "peers":
            for node in self.nodes.values():
                await node.announced()

    async def close(self) -> None:
        for pool in self.pools:
            await pool.close()
        for node in self.nodes.values():
            await node.stop()
        await no_tasks_left()


@pytest.fixture(params=["embedded", "valkey", "peers"])
async def world(request, server):
    if request.param == "valkey":
        server.command("FLUSHALL")
    world = World(request.param, server)
    for name, cluster in (("n1", "a"), ("n2", "a"), ("n3", "b")):
        await world.node(name, cluster)
    yield world
    await world.close()


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50_000, n).tolist()


async def test_a_cluster_has_the_pools_interface(world):
    assert isinstance(await world.pool(), PoolProtocol)


async def test_a_prompt_is_spread_found_and_read_back(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 6 + 200)
    chain = KeyChain(ns, prompt)
    assert (await pool.match(ns, chain)).length == 0
    boundary = SEGMENT * 6 + 112
    await put(pool, ns, prompt, boundary, checkpoints=(SEGMENT, SEGMENT * 3 + 32))
    await world.settled()
    found = await pool.match(ns, chain)
    assert found.restorable == (SEGMENT, SEGMENT * 3 + 32, boundary)
    assert found.length == boundary
    used = [n.core.stat()["used_bytes"] for n in world.nodes.values()]
    assert sum(u > 0 for u in used) >= 2
    for length in found.restorable:
        await get(pool, ns, prompt, length)
    await get(pool, ns, prompt, boundary, start=SEGMENT + 48)
    # Another client, who has only the directory, finds the same.
    other = await world.pool()
    ns2 = await other.namespace(CUT, STEP)
    assert (await other.match(ns2, KeyChain(ns2, prompt))).length == boundary
    await get(other, ns2, prompt, boundary)
    with pytest.raises(MissError) as miss:
        await get(other, ns2, prompt, SEGMENT * 2)
    assert miss.value.restorable == SEGMENT
    assert "6256" in str(await other.explain(ns2, KeyChain(ns2, prompt))) or boundary == 6256
    hints = await other.checkpoint_hints(ns2, KeyChain(ns2, [*prompt[: SEGMENT * 2], *tokens(100, 9)]))
    assert (hints.restorable, hints.branch, hints.last) == (SEGMENT, SEGMENT * 2, SEGMENT * 2 + 96)


async def test_a_put_goes_on_behind_what_is_there_and_only_there(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 3)
    start = SEGMENT + 5 * STEP
    with pytest.raises(PrefixMissingError) as missing:
        await put(pool, ns, prompt, SEGMENT * 2, start=start)
    assert missing.value.resident == 0
    await put(pool, ns, prompt, start)
    await world.settled()
    await put(pool, ns, prompt, SEGMENT * 2 + 80, start=start)
    await world.settled()
    assert (await pool.match(ns, KeyChain(ns, prompt))).restorable == (start, SEGMENT * 2 + 80)
    await get(pool, ns, prompt, SEGMENT * 2 + 80)


async def test_branches_share_their_beginning(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    trunk = tokens(SEGMENT + 64)
    one, two = [*trunk, *tokens(400, 1)], [*trunk, *tokens(400, 2)]
    await put(pool, ns, one, SEGMENT + 320, checkpoints=(SEGMENT + 64,))
    await world.settled()
    assert (await pool.match(ns, KeyChain(ns, two))).restorable == (SEGMENT + 64,)
    three = [*trunk[: SEGMENT + 32], *tokens(300, 3)]
    hints = await pool.checkpoint_hints(ns, KeyChain(ns, three))
    assert (hints.branch, hints.restorable) == (SEGMENT + 32, 0)
    await put(pool, ns, two, SEGMENT + 320)
    await world.settled()
    for prompt in (one, two):
        assert (await pool.match(ns, KeyChain(ns, prompt))).length == SEGMENT + 320
        await get(pool, ns, prompt, SEGMENT + 320)


@pytest.mark.parametrize("placement", ["segments", "chain", "local"])
async def test_windows_and_off_grid_checkpoints_stay_whole(world, placement):
    """Layouts with windows are never cut; a chain is then on one node, tails and all."""
    pool = await world.pool(placement, local="n2" if placement == "local" else None)
    ns = await pool.namespace(WINDOWS, STEP)
    prompt = tokens(SEGMENT + 300)
    boundary = SEGMENT + 203
    await put(pool, ns, prompt, boundary, checkpoints=(SEGMENT, 70))
    await world.settled()
    found = await pool.match(ns, KeyChain(ns, prompt))
    assert found.restorable == (70, SEGMENT, boundary)
    for length in found.restorable:
        await get(pool, ns, prompt, length)
    holders = [n for n, node in world.nodes.items() if node.core.stat()["used_bytes"]]
    assert len(holders) == 1
    if placement == "local":
        assert holders == ["n2"]


async def test_a_reader_follows_a_request_before_it_is_sealed(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 2)
    request = b"r" * 16
    boundary = SEGMENT + 64
    manifest = manifest_of(ns, boundary)
    into = {slot: PageList.of(bytearray(e.nbytes)) for slot, e in manifest.by_slot.items()}
    outgoing = await pool.put(ns, KeyChain(ns, prompt), boundary=boundary, request=request)
    incoming = await pool.get(ns, KeyChain(ns, prompt), boundary=boundary, into=into, request=request)
    first = outgoing.manifest.layers[0]
    for extent in outgoing.manifest.by_layer[first]:
        outgoing.ready(extent.layer, extent.tensor, PageList.of(content(extent, prompt)))
    async with asyncio.timeout(10):
        await incoming.layer(first)
    assert (await pool.match(ns, KeyChain(ns, prompt))).length == 0
    for extent in outgoing.manifest.extents:
        if extent.layer != first:
            outgoing.ready(extent.layer, extent.tensor, PageList.of(content(extent, prompt)))
    await outgoing.seal()
    await incoming.sealed()
    check(into, manifest.extents, prompt)
    assert incoming.stats.moved_bytes == manifest.total_bytes
    assert outgoing.stats.moved_bytes == manifest.total_bytes


async def test_a_cancelled_get_and_put_leave_nothing(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 2 + 64)
    outgoing = await pool.put(ns, KeyChain(ns, prompt), boundary=SEGMENT * 2)
    await outgoing.cancel("changed my mind")
    with pytest.raises(KVError):
        await outgoing.seal()
    await put(pool, ns, prompt, SEGMENT * 2 + 64)
    await world.settled()
    manifest = manifest_of(ns, SEGMENT * 2 + 64)
    into = {slot: PageList.of(bytearray(e.nbytes)) for slot, e in manifest.by_slot.items()}
    incoming = await pool.get(ns, KeyChain(ns, prompt), boundary=SEGMENT * 2 + 64, into=into)
    await incoming.cancel("not needed")
    with pytest.raises(TransferCancelledError):
        await incoming.sealed()
    await asyncio.sleep(0.1)
    assert all(n.core.stat()["active"] == 0 for n in world.nodes.values())


async def test_leases_pin_on_every_node(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 3)
    await put(pool, ns, prompt, SEGMENT * 2 + 64)
    await world.settled()
    lease = await pool.lease(ns, KeyChain(ns, prompt), SEGMENT * 2 + 64, 30)
    assert sum(n.core.stat()["leases"] for n in world.nodes.values()) == 4
    await pool.clear()
    await world.settled()
    await get(pool, ns, prompt, SEGMENT * 2 + 64)
    await pool.release(lease.id)
    with pytest.raises(LeaseError):
        await pool.release(lease.id)
    assert sum(n.core.stat()["leases"] for n in world.nodes.values()) == 0
    with pytest.raises(MissError):
        await pool.lease(ns, KeyChain(ns, prompt), SEGMENT, 30)
    await pool.clear()
    await world.settled()
    assert (await pool.match(ns, KeyChain(ns, prompt))).length == 0


async def test_flat_objects_lie_on_all_nodes(world):
    pool = await world.pool()
    objects = {f"key {i}".encode(): bytes([i]) * (100 + i) for i in range(60)}
    await pool.put_objects(objects)
    keys = [*objects, b"never stored"]
    assert await pool.exists(keys) == [True] * 60 + [False]
    assert await pool.get_objects(keys) == [*objects.values(), None]
    into = [bytearray(200) for _ in keys]
    assert await pool.get_objects_into(keys, into) == [len(v) for v in objects.values()] + [None]
    assert [bytes(b[: len(v)]) for b, v in zip(into, objects.values(), strict=False)] == list(objects.values())
    assert all(n.core.stat()["used_bytes"] for n in world.nodes.values())
    stat = await pool.stat()
    assert stat["used_bytes"] == sum(n.core.stat()["used_bytes"] for n in world.nodes.values())
    assert set(stat["nodes"]) == {"n1", "n2", "n3"}


async def test_what_every_cluster_can_restore_by_itself(world):
    ours, theirs = await world.pool(cluster="a"), await world.pool(cluster="b")
    ns = await ours.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 2)
    await put(ours, ns, prompt, SEGMENT)
    ns_b = await theirs.namespace(CUT, STEP)
    await put(theirs, ns_b, prompt, SEGMENT + 160, checkpoints=(48,))
    await world.settled()
    found = await ours.match_across_clusters(ns, KeyChain(ns, prompt))
    assert found == {"a": (SEGMENT,), "b": (48, SEGMENT + 160)}
    # Together they can restore what one has and the other.
    assert (await ours.match(ns, KeyChain(ns, prompt))).restorable == (48, SEGMENT, SEGMENT + 160)


async def test_a_dead_node_costs_misses_and_no_hang(world):
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompts = [tokens(SEGMENT * 2 + 32, seed) for seed in range(6)]
    for prompt in prompts:
        await put(pool, ns, prompt, SEGMENT * 2 + 32)
    await world.settled()
    await world.nodes.pop("n1").stop(leave=False)
    begin = time.monotonic()
    outcomes = []
    for prompt in prompts:
        try:
            await get(pool, ns, prompt, SEGMENT * 2 + 32, deadline_s=5)
            outcomes.append("hit")
        except KVError as error:
            outcomes.append("miss" if isinstance(error, MissError) or error.retryable else str(error))
    assert time.monotonic() - begin < 15
    assert "miss" in outcomes
    assert set(outcomes) <= {"miss", "hit"}
    # Seen as gone within the TTL and a round of asking; then new puts go elsewhere and everything is a hit again.
    async with asyncio.timeout(5 * TTL_S + 2):
        while "n1" in pool.roster.members:
            await asyncio.sleep(0.02)
    for prompt in prompts:
        await put(pool, ns, prompt, SEGMENT * 2 + 32)
    await world.settled()
    for prompt in prompts:
        await get(pool, ns, prompt, SEGMENT * 2 + 32)


async def test_a_restarted_node_is_a_new_one(world):
    """Same name, same address, empty memory: nothing of the earlier incarnation is believed."""
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 4)
    await put(pool, ns, prompt, SEGMENT * 4 - STEP)
    await world.settled()
    for name in ("n1", "n2", "n3"):
        old = world.nodes[name]
        await old.stop(leave=False)
        await world.node(name, old.cluster, port=old.port)
    async with asyncio.timeout(10):
        while {m.incarnation for m in pool.roster.members.values()} != {
            n.endpoint.incarnation for n in world.nodes.values()
        }:
            await asyncio.sleep(0.02)
    assert (await pool.match(ns, KeyChain(ns, prompt))).length == 0
    async with asyncio.timeout(10):
        while True:
            try:
                await put(pool, ns, prompt, SEGMENT * 4 - STEP)
                break
            except KVError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.1)
    await world.settled()
    await get(pool, ns, prompt, SEGMENT * 4 - STEP)


async def test_a_draining_node_takes_nothing_new(world):
    world.nodes["n1"].agent.state = State.DRAINING
    pool = await world.pool()
    async with asyncio.timeout(5):
        while pool.roster.members["n1"].state is not State.DRAINING:
            await asyncio.sleep(0.02)
    ns = await pool.namespace(CUT, STEP)
    for seed in range(4):
        await put(pool, ns, tokens(SEGMENT * 2, seed), SEGMENT * 2 - STEP)
    assert world.nodes["n1"].core.stat()["used_bytes"] == 0


@pytest.mark.parametrize("kind", ["embedded", "valkey"])
async def test_drain_under_load_loses_nothing(kind, server):
    """While a node is drained, clients go on; when it has left, everything it held is found elsewhere."""
    server.command("FLUSHALL")
    world = World(kind, server)
    for name in ("n1", "n2", "n3"):
        await world.node(name)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    whole = await pool.namespace(WINDOWS, STEP)
    prompts = [tokens(SEGMENT * 3, seed) for seed in range(5)]
    windows = [tokens(SEGMENT + 100, seed) for seed in range(50, 54)]
    boundary = SEGMENT * 2 + 96
    for prompt in prompts:
        await put(pool, ns, prompt, boundary, checkpoints=(48, SEGMENT))
    for prompt in windows:
        await put(pool, whole, prompt, SEGMENT + 64, checkpoints=(160,))
    await world.settled()
    held = world.nodes["n1"].core.stat()["used_bytes"]
    assert held
    await world.nodes["n1"].agent.drain(deadline_s=30)
    draining = world.nodes["n1"].agent._draining
    later = []
    async with asyncio.timeout(30):
        while not draining.done():
            for prompt in prompts:
                await get(pool, ns, prompt, boundary)
            if len(later) < 20:  # the nodes have room for some forty
                later.append(tokens(SEGMENT * 2, 1000 + len(later)))
                await put(pool, ns, later[-1], SEGMENT + 64)
    progress = world.nodes["n1"].agent._mover.progress
    assert progress.finished
    assert (progress.failed, progress.left) == (0, 0)
    assert progress.moved_bytes > 0
    async with asyncio.timeout(5):
        while "n1" in pool.roster.members:
            await asyncio.sleep(0.02)
    await world.settled()
    await world.nodes.pop("n1").stop()
    for prompt in prompts:
        assert (await pool.match(ns, KeyChain(ns, prompt))).restorable == (48, SEGMENT, boundary)
        for length in (48, SEGMENT, boundary):
            await get(pool, ns, prompt, length)
    for prompt in windows:
        assert (await pool.match(whole, KeyChain(whole, prompt))).restorable == (160, SEGMENT + 64)
        await get(pool, whole, prompt, SEGMENT + 64)
    for prompt in later:
        await get(pool, ns, prompt, SEGMENT + 64)
    await world.close()


@pytest.mark.parametrize("world", ["embedded", "valkey"], indirect=True)
async def test_a_drain_keeps_its_deadline_and_bandwidth_and_can_be_taken_back(world):
    pool = await world.pool(cluster="a")
    ns = await pool.namespace(CUT, STEP)
    prompts = [tokens(SEGMENT * 2, seed) for seed in range(6)]
    for prompt in prompts:
        await put(pool, ns, prompt, SEGMENT + 64)
    await world.settled()
    agent = world.nodes["n1"].agent
    await agent.drain(deadline_s=1.0, bytes_per_s=20_000)
    async with asyncio.timeout(5):
        while "n1" in pool.roster.members and pool.roster.members["n1"].state is State.UP:
            await asyncio.sleep(0.02)
    await agent.stop_drain()
    async with asyncio.timeout(5):
        while pool.roster.members["n1"].state is not State.UP:
            await asyncio.sleep(0.02)
    for prompt in prompts:
        await get(pool, ns, prompt, SEGMENT + 64)
    begin = time.monotonic()
    await agent.drain(deadline_s=1.0, bytes_per_s=20_000)
    async with asyncio.timeout(10):
        await asyncio.wait([agent._draining])
    assert 0.8 < time.monotonic() - begin < 6
    assert agent._mover.progress.left > 0
    assert "deadline" in agent._mover.progress.note
    async with asyncio.timeout(5):
        while "n1" in pool.roster.members:
            await asyncio.sleep(0.02)
    lonely = world.nodes["n3"].agent  # alone in its cluster
    with pytest.raises(ConfigError, match="no cluster"):
        await agent.drain(deadline_s=1.0)
    with pytest.raises(ConfigError, match="has no other node"):
        await lonely.drain(deadline_s=1.0)


async def test_an_empty_cluster_says_so(server):
    server.command("FLUSHALL")
    with pytest.raises(NoNodeError, match="no node"):
        await connect_cluster(f"valkey://127.0.0.1:{server.port}?name=empty")
    with pytest.raises(NoNodeError, match="no node"):
        await connect_cluster(["127.0.0.1:1"])
    await no_tasks_left()


# -- the directory is lost -----------------------------------------------------------------------------


async def test_nodes_that_are_called_by_their_addresses_keep_their_links():
    """As kvpoold without --node is: asking a list of nodes who is there must not break what goes on with them."""
    node = await Node("by its address").start(None)
    node.agent.node = node.address
    links = NodeLinks(EndpointConfig(), random=random.random)
    policy, whole = open_placement("segments", None, None)
    directory = PeerDirectory(links, [node.address], timeout_s=0.5)
    pool = ClusterPool(directory, links, placement=policy, whole_chains=whole, ttl_s=TTL_S, answer_s=0.5)
    await pool.start()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT)
    outgoing = await pool.put(ns, KeyChain(ns, prompt), boundary=64)
    client = await links.client(pool.roster.members[node.address])
    for _ in range(3):
        await pool.refresh()
        assert await links.client(pool.roster.members[node.address]) is client
    for extent in outgoing.manifest.extents:
        outgoing.ready(extent.layer, extent.tensor, PageList.of(content(extent, prompt)))
    await outgoing.seal()
    # Another process at the same address is another node, whoever was dialled first.
    other = msgspec.structs.replace(pool.roster.members[node.address], incarnation=b"x" * 16)
    with pytest.raises(IncarnationError):
        await links.client(other)
    await pool.refresh()
    await pool.close()
    await node.stop()


async def test_flushall_costs_nothing_for_long(server):
    """While the directory is young its silence is not believed: nodes are asked, and they announce everything again."""
    server.command("FLUSHALL")
    world = World("valkey", server)
    for name in ("n1", "n2"):
        await world.node(name)
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 3)
    await put(pool, ns, prompt, SEGMENT * 2 + 64)
    await world.settled()
    keys = _keys(ns, prompt, SEGMENT * 2 + 64)
    known = [set(found) for found in await pool.directory.look(keys)]
    server.command("FLUSHALL")
    async with asyncio.timeout(5):
        while not pool.roster.frozen(pool._now()):
            await asyncio.sleep(0.02)
    assert set(pool.roster.members) == {"n1", "n2"}
    await get(pool, ns, prompt, SEGMENT * 2 + 64)
    async with asyncio.timeout(10):
        while pool.roster.frozen(pool._now()):
            await asyncio.sleep(0.02)
    await world.settled()
    assert [set(found) for found in await pool.directory.look(keys)] == known
    assert sum(map(len, known)) == 4
    await get(pool, ns, prompt, SEGMENT * 2 + 64)
    await world.close()


def _keys(ns, prompt, boundary):
    chain = KeyChain(ns, prompt[:boundary])
    return Cut(ns, units_of(ns), chain.blocks).keys


async def test_a_dead_directory_is_done_without():
    with running() as server:
        world = World("valkey", server)
        for name in ("n1", "n2"):
            await world.node(name)
        pool = await world.pool()
        ns = await pool.namespace(CUT, STEP)
        prompt, later = tokens(SEGMENT * 3), tokens(SEGMENT * 3, 1)
        await put(pool, ns, prompt, SEGMENT * 2 + 64)
        await world.settled()
        server.kill()
        begin = time.monotonic()
        await get(pool, ns, prompt, SEGMENT * 2 + 64)
        await put(pool, ns, later, SEGMENT * 2 + 64)
        await get(pool, ns, later, SEGMENT * 2 + 64)
        assert time.monotonic() - begin < 8
        assert pool.roster.frozen(pool._now())
        with pytest.raises(DirectoryError):
            await pool.directory.look([b"k" * 16])
        server.start()
        async with asyncio.timeout(15):
            while pool.roster.frozen(pool._now()):
                await asyncio.sleep(0.05)
        await world.settled()
        assert set(pool.roster.members) == {"n1", "n2"}
        await get(pool, ns, later, SEGMENT * 2 + 64)
        await world.close()


async def test_what_others_write_into_the_directory_is_no_data(server):
    server.command("FLUSHALL")
    world = World("valkey", server)
    await world.node("n1")
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 2)
    await put(pool, ns, prompt, SEGMENT + 64)
    await world.settled()
    client = pool.directory._client
    for key in _keys(ns, prompt, SEGMENT + 64):
        await client.hset(b"kvp:test:" + key[:16], "stranger", b"garbage")
        await client.hset(b"kvp:test:" + key[:16], key[16:] + b"stranger", b"garbage")
        await client.hset(b"kvp:test:" + key[:16], key[16:] + b"n9", bytes(12 + 8 * 64))
    await client.set(b"kvp:{test}:node:junk", b"\xff\x00 no record")
    await client.sadd(b"kvp:{test}:nodes", "junk")
    await pool.refresh()
    assert set(pool.roster.members) == {"n1"}
    assert (await pool.match(ns, KeyChain(ns, prompt))).length == SEGMENT + 64
    await get(pool, ns, prompt, SEGMENT + 64)
    await world.close()


async def test_an_owner_that_has_forgotten_is_a_miss_not_wrong_bytes(server):
    """The directory still says what was evicted meanwhile: the owner decides."""
    server.command("FLUSHALL")
    world = World("valkey", server)
    node = await world.node("n1")
    pool = await world.pool()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 2)
    await put(pool, ns, prompt, SEGMENT + 64)
    await world.settled()
    node.agent.announcer.take = lambda now, most: {}  # it no longer announces anything
    node.core.clear()
    assert (await pool.match(ns, KeyChain(ns, prompt))).length == SEGMENT + 64
    with pytest.raises(MissError):
        await get(pool, ns, prompt, SEGMENT + 64)
    await world.close()


# -- joining -------------------------------------------------------------------------------------------


async def test_the_advertised_address_is_probed():
    directory = EmbeddedDirectory(time.monotonic)
    one, two = await Node("one").start(directory), await Node("two").start(None)
    with pytest.raises(ConfigError, match="another process"):
        await two.agent.join(directory, one.address, ttl_s=1.0)
    with pytest.raises(ConfigError, match="does not reach this node"):
        await two.agent.join(directory, "127.0.0.1:1", ttl_s=1.0)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        await two.agent.join(directory, "nonsense", ttl_s=1.0)
    assert [m.id for m in (await directory.snapshot()).members] == ["one"]
    await one.stop()
    await two.stop()
    assert (await directory.snapshot()).members == ()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1", "is no directory"),
        ("valkey://", "is no directory"),
        ("valkey://user:secret@127.0.0.1:x", r"user:\*\*\*@"),
        ("valkey+sentinel://127.0.0.1:26379", "name of the service"),
    ],
)
async def test_unusable_urls_are_refused_without_their_passwords(url, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_directory(url)
    assert "secret" not in str(error.value)


async def test_acls_by_url():
    with running("--requirepass", "hunter2") as server:
        bad = open_directory(f"valkey://:wrong@127.0.0.1:{server.port}", timeout_s=1.0)
        with pytest.raises(DirectoryError) as error:
            await bad.snapshot()
        assert "wrong" not in str(error.value)
        await bad.close()
        good = open_directory(f"valkey://:hunter2@127.0.0.1:{server.port}", timeout_s=1.0)
        assert (await good.snapshot()).members == ()
        await good.close()


# -- the other ways to run a Valkey ----------------------------------------------------------------------


async def use(directory: Directory) -> None:
    """Join, write, find and read through a directory."""
    node = await Node("n1").start(directory)
    links = NodeLinks(EndpointConfig(), random=random.random)
    policy, whole = open_placement("segments", None, None)
    pool = ClusterPool(directory, links, placement=policy, whole_chains=whole, ttl_s=TTL_S, answer_s=2.0)
    await pool.start()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT * 3)
    await put(pool, ns, prompt, SEGMENT * 2 + 64)
    await node.announced()
    assert (await pool.match(ns, KeyChain(ns, prompt))).length == SEGMENT * 2 + 64
    await get(pool, ns, prompt, SEGMENT * 2 + 64)
    assert not pool.roster.frozen(pool._now())
    await node.stop()
    await pool.close()


async def test_valkey_cluster():
    with running("--cluster-enabled", "yes") as server:
        assert "OK" in server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        async with asyncio.timeout(10):
            while "cluster_state:ok" not in server.command("CLUSTER", "INFO"):
                await asyncio.sleep(0.05)
        await use(open_directory(f"valkey+cluster://127.0.0.1:{server.port}", timeout_s=2.0))


async def test_sentinel(tmp_path):
    with running() as master:
        config = tmp_path / "sentinel.conf"
        config.write_text(f"sentinel monitor pool 127.0.0.1 {master.port} 1\n")
        with running(sentinel=str(config)) as sentinel:
            await use(open_directory(f"valkey+sentinel://127.0.0.1:{sentinel.port}/pool", timeout_s=2.0))
