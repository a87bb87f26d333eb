"""Drains, copies and pulls of everything a node holds: off-grid checkpoints, and every tenant's under that tenant alone."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from kvpool import certs
from kvpool.cluster.copying import Copier, Copyable
from kvpool.cluster.directory import EmbeddedDirectory
from kvpool.cluster.pacing import Pacer
from kvpool.cluster.replicas import ReplicaPolicy
from kvpool.errors import MissError
from kvpool.keys import KeyChain
from kvtransport.errors import RefusedError
from kvtransport.tls import TlsConfig
from tests.clusterkit import CUT, STEP, WINDOWS, Node, get, put
from tests.integration.test_cluster import SEGMENT, World, tokens
from tests.integration.test_cluster_replicas import kept, seen

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
BOUNDARY = SEGMENT + 96
TAIL = SEGMENT + 107


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A cluster's certificates: one for its nodes, two tenants'."""
    folder = tmp_path_factory.mktemp("pki")
    subjects = [
        certs.Subject.node("node=127.0.0.1"),
        certs.Subject.client("alice=acme"),
        certs.Subject.client("bob=bolt"),
    ]
    certs.make(folder, subjects)

    def config(name: str) -> TlsConfig:
        return TlsConfig(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")

    return config


@pytest.fixture
async def world():
    world = World("embedded", None)
    yield world
    await world.close()


async def drained(node: Node) -> None:
    await node.agent.drain(deadline_s=60)
    async with asyncio.timeout(30):
        while not node.agent._mover.progress.finished:
            await asyncio.sleep(0.02)


async def without(world: World, name: str, *pools) -> None:
    """The node is gone for good, and everybody knows."""
    await world.nodes.pop(name).stop()
    await world.settled()
    for pool in pools:
        await pool.refresh()


async def test_a_drain_takes_off_grid_checkpoints_along(world):
    await world.node("n1")
    pool = await world.pool()
    ns = await pool.namespace(WINDOWS, STEP)
    trunk = tokens(SEGMENT + 64)
    # Two prompts whose checkpoints lie at one place behind the same block, and one inside the first blocks of a third.
    one, two, three = [*trunk, *tokens(200, 1)], [*trunk, *tokens(200, 2)], tokens(300, 3)
    for prompt, boundary in ((one, SEGMENT + 75), (two, SEGMENT + 75), (three, 70)):
        await put(pool, ns, prompt, boundary)
    await put(pool, ns, one, TAIL, checkpoints=(SEGMENT + 75,))
    await world.node("n2")
    await seen(world)
    await pool.refresh()
    mover = world.nodes["n1"]
    await drained(mover)
    progress = mover.agent._mover.progress
    assert (progress.failed, progress.left, progress.note) == (0, 0, "")
    await without(world, "n1", pool)
    for prompt, lengths in ((one, (SEGMENT + 75, TAIL)), (two, (SEGMENT + 75,)), (three, (70,))):
        assert (await pool.match(ns, KeyChain(ns, prompt))).restorable == lengths
        for length in lengths:
            await get(pool, ns, prompt, length)


async def test_what_is_there_is_not_copied_again(world):
    """A path that shares its beginning with another costs what is behind it, and one that is there nothing."""
    source, target = await world.node("n1", rebalance=False), await world.node("n2", rebalance=False)
    await seen(world)
    pool = await world.pool("local", local="n1")
    ns = await pool.namespace(WINDOWS, STEP)
    trunk = tokens(SEGMENT)
    one, two = [*trunk, *tokens(200, 1)], [*trunk, *tokens(200, 2)]
    await put(pool, ns, one, SEGMENT + 75, checkpoints=(SEGMENT,))
    await put(pool, ns, two, SEGMENT + 75, checkpoints=(SEGMENT,))
    member = source.agent._roster.members["n2"]
    copier = Copier(source.core, source.agent._links, time.monotonic)
    pacer = source.agent.keeper._pacer
    mine = next(n for n in source.core.namespaces() if n.id == ns.id)
    paths = source.core.chains(mine)
    assert sorted(p.tail[0] for p in paths if p.tail) == [SEGMENT + 75] * 2
    moved = []
    for path in (*paths, *paths):
        what = Copyable(source.core, mine, path)
        held = await copier.held(member, what)
        if not held.issuperset(what.points):
            moved.append(await copier.copy(member, what, held, pacer, lambda: True))
    assert len(moved) == 2
    assert moved[1] < moved[0] / 4
    assert target.core.stat()["used_bytes"] == source.core.stat()["used_bytes"]


async def test_a_copy_keeps_its_blocks_until_nothing_reads_them_however_long_its_pace_and_deadline(world, monkeypatch):
    """The pace may make a copy wait for longer than a transfer may take; and blocks past a deadline are not free while they are sent."""
    source, target = await world.node("n1", rebalance=False), await world.node("n2", rebalance=False)
    await seen(world)
    pool = await world.pool("local", local="n1")
    ns = await pool.namespace(WINDOWS, STEP)
    prompt = tokens(SEGMENT + 100)
    await put(pool, ns, prompt, SEGMENT)
    member = source.agent._roster.members["n2"]
    copier = Copier(source.core, source.agent._links, time.monotonic)
    mine = next(n for n in source.core.namespaces() if n.id == ns.id)
    (path,) = source.core.chains(mine)
    what = Copyable(source.core, mine, path)
    used = source.core.stat()["used_bytes"]
    waits = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        source.core.expire(time.monotonic() + 1000)  # all that is open and has a deadline is past it

    client = await source.agent._links.client(member)
    opened = client.put

    async def put_slowly(*args, **options):
        sender = await opened(*args, **options)
        source.core.expire(time.monotonic() + 1000)
        source.core.clear()
        assert source.core.stat()["used_bytes"] == used
        return sender

    pacer = Pacer(1e6, time.monotonic())
    pacer.wait(time.monotonic(), 1_000_000_000)
    monkeypatch.setattr("kvpool.cluster.copying.asyncio", SimpleNamespace(sleep=wait))
    monkeypatch.setattr(client, "put", put_slowly)
    moved = await copier.copy(member, what, await copier.held(member, what), pacer, lambda: True)
    monkeypatch.undo()
    assert max(waits) > 900
    assert moved > 0
    await target.announced()
    await without(world, "n1", pool)
    await get(pool, ns, prompt, SEGMENT)


async def test_copies_of_off_grid_checkpoints(world):
    for name in ("n1", "n2"):
        await world.node(name, replicas=ReplicaPolicy(factor=2))
    await seen(world)
    pool = await world.pool()
    ns = await pool.namespace(WINDOWS, STEP)
    prompt = tokens(SEGMENT + 300)
    await put(pool, ns, prompt, TAIL, checkpoints=(SEGMENT, 70))
    await kept(world)
    assert sum(n.agent.keeper.progress.failed for n in world.nodes.values()) == 0
    await without(world, "n1", pool)
    assert (await pool.match(ns, KeyChain(ns, prompt))).restorable == (70, SEGMENT, TAIL)
    for length in (70, SEGMENT, TAIL):
        await get(pool, ns, prompt, length)


async def test_every_tenant_is_drained_and_copied_under_its_own_name(world, pki):
    for name in ("n1", "n2"):
        await world.node(name, tls=pki("node"), replicas=ReplicaPolicy(by_model={"bolt/no windows": 2}))
    await seen(world)
    acme = await world.pool(tenant="acme", tls=pki("alice"))
    bolt = await world.pool(tenant="bolt", tls=pki("bob"))
    prompt = tokens(SEGMENT * 2)
    spaces = {}
    for pool in (acme, bolt):
        spaces[pool] = {layout.model: await pool.namespace(layout, STEP) for layout in (CUT, WINDOWS)}
    await put(acme, spaces[acme]["no windows"], prompt, BOUNDARY)
    await put(acme, spaces[acme][WINDOWS.model], prompt, TAIL)
    await put(bolt, spaces[bolt]["no windows"], prompt, BOUNDARY - 32)
    await kept(world)
    # The factor is bolt's: acme's lies once.
    assert all(len(held) == 1 for held in holders(world, "acme"))
    assert all(len(held) == 2 for held in holders(world, "bolt"))
    assert all(n.agent.keeper.progress.failed == 0 for n in world.nodes.values())
    await drained(world.nodes["n1"])
    progress = world.nodes["n1"].agent._mover.progress
    assert (progress.failed, progress.left, progress.note) == (0, 0, "")
    await without(world, "n1", acme, bolt)
    await get(acme, spaces[acme]["no windows"], prompt, BOUNDARY)
    await get(acme, spaces[acme][WINDOWS.model], prompt, TAIL)
    await get(bolt, spaces[bolt]["no windows"], prompt, BOUNDARY - 32)
    # Nobody has got another's.
    chain = KeyChain(spaces[bolt][WINDOWS.model], prompt)
    assert (await bolt.match(spaces[bolt][WINDOWS.model], chain)).length == 0
    with pytest.raises(MissError):
        await get(bolt, spaces[bolt][WINDOWS.model], prompt, TAIL)
    stat = world.nodes["n2"].core.stat
    assert set(stat(tenant="acme")["entries"]) == set(stat(tenant="bolt")["entries"]) | {"flat"}
    assert stat(tenant="default")["entries"].get("blocks", 0) == 0


def holders(world: World, tenant: str) -> list[set[str]]:
    """For every path of a tenant's the nodes that hold it."""
    found: dict[bytes, set[str]] = {}
    for name, node in world.nodes.items():
        for ns in node.core.namespaces():
            if ns.tenant == tenant:
                for path in node.core.chains(ns):
                    found.setdefault(ns.id + path.keys[-1] + (path.tail[1] if path.tail else b""), set()).add(name)
    assert found
    return list(found.values())


async def test_a_pull_is_the_tenants_own(world, pki):
    for name, cluster in (("n1", "east"), ("n2", "west")):
        await world.node(name, cluster, tls=pki("node"))
    await seen(world)
    acme = await world.pool(tenant="acme", tls=pki("alice"), cluster="east")
    bolt = await world.pool(tenant="bolt", tls=pki("bob"))
    prompt = tokens(SEGMENT * 2)
    mine, other = await acme.namespace(CUT, STEP), await bolt.namespace(CUT, STEP)
    await put(acme, mine, prompt, BOUNDARY)
    await world.settled()
    assert (await bolt.pull(other, KeyChain(other, prompt), into="west")).wanted == 0
    pulled = await acme.pull(mine, KeyChain(mine, prompt), into="west")
    assert pulled.finished, pulled.note
    await without(world, "n1", acme, bolt)
    await get(acme, mine, prompt, BOUNDARY)
    assert (await bolt.match(other, KeyChain(other, prompt))).length == 0


async def test_only_a_node_speaks_for_others(world, pki):
    node = await world.node("n1", tls=pki("node"))
    acme = await world.pool(tenant="acme", tls=pki("alice"))
    ns = await acme.namespace(CUT, STEP)
    await put(acme, ns, tokens(SEGMENT), 64)
    await world.settled()
    # Bob says that he is acme.
    liar = await world.pool(tenant="acme", tls=pki("bob"))
    theirs = await liar.namespace(CUT, STEP)
    for work in (get, put):
        with pytest.raises(RefusedError, match="tenant 'bolt' and cannot speak for 'acme'"):
            await work(liar, theirs, tokens(SEGMENT), 64)
    plain = await world.pool(tls=pki("node"))
    client = await plain.links.client(plain.roster.members["n1"])
    assert (await client.namespace(CUT, STEP, tenant="acme")).tenant == "acme"
    assert node.core.stat(tenant="bolt")["used_bytes"] == 0


async def test_without_certificates_another_tenant_is_refused_and_told():
    """Whoever proves nothing is the default tenant, nodes too: what an embedded pool beside it keeps for others stays, and is told."""
    directory = EmbeddedDirectory(time.monotonic)
    nodes = [await Node(name).start(directory) for name in ("n1", "n2")]
    try:
        member = nodes[1].agent.member
        ns = nodes[0].core.open_namespace("acme", CUT, STEP)
        with pytest.raises(RefusedError, match="cannot speak for 'acme'"):
            await nodes[0].agent._links.open(member, ns)
        assert not any(n.tenant == "acme" for n in nodes[1].core.namespaces())
    finally:
        for node in nodes:
            await node.stop()
