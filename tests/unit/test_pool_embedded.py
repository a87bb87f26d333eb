"""The embedded pool: puts and gets of an engine in the same process."""

import asyncio

import numpy as np
import pytest

from kvpool import Pool, PoolProtocol
from kvpool.errors import KeyChainError, MissError, NamespaceError, PoolError, PoolFullError, PoolLimitError
from kvpool.keys import KeyChain
from kvtransport.buffers import PageList
from kvtransport.errors import (
    ArenaError,
    DeadlineError,
    DestinationError,
    KVBufferError,
    LayoutError,
    ManifestError,
    TransferCancelledError,
    TransferError,
)
from kvtransport.transfer import IncomingTransfer, OutgoingTransfer
from tests.conftest import no_tasks_left
from tests.poolkit import LAYOUTS, STEP, content

TOKENS = np.random.default_rng(11).integers(0, 50_000, 300).tolist()
LAYOUT = LAYOUTS["everything"]
REQUEST = bytes(range(16))


@pytest.fixture
async def pool():
    async with Pool.create(1 << 20, page_bytes=256) as pool:
        yield pool
    await no_tasks_left()


@pytest.fixture
async def ns(pool):
    return await pool.namespace(LAYOUT, STEP)


@pytest.fixture
def chain(ns):
    return KeyChain(ns, TOKENS)


def blank(boundary=100, start=0):
    extents = LAYOUT.extents(boundary, start=start, align=STEP)
    return {(e.layer, e.tensor): PageList.of(bytearray(e.nbytes)) for e in extents}


def hand_over(transfer, slots=None):
    return [
        transfer.ready(*slot, PageList.of(content(transfer.manifest.by_slot[slot], TOKENS)))
        for slot in (transfer.manifest.by_slot if slots is None else slots)
    ]


async def store(pool, ns, chain, boundary=100, **options):
    transfer = await pool.put(ns, chain, boundary=boundary, **options)
    hand_over(transfer)
    await transfer.seal()


def check(into, transfer):
    for slot, extent in transfer.manifest.by_slot.items():
        assert into[slot].tobytes() == content(extent, TOKENS), slot


async def test_faces(pool, ns, chain):
    assert isinstance(pool, PoolProtocol)
    put = await pool.put(ns, chain, boundary=100, request=REQUEST)
    get = await pool.get(ns, chain, boundary=100, into=blank(), request=REQUEST)
    assert isinstance(put, OutgoingTransfer)
    assert isinstance(get, IncomingTransfer)
    await get.cancel()
    await put.cancel()


async def test_put_and_get(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100, checkpoints=(33, 64))
    handovers = hand_over(put)
    assert all(h.done for h in handovers)
    await handovers[0].released()
    assert (await pool.match(ns, chain)).length == 0
    await put.seal()
    await put.seal()
    assert (await pool.match(ns, chain)).restorable == (33, 64, 100)
    assert put.stats.moved_bytes == put.stats.total_bytes == put.manifest.total_bytes
    assert put.stats.sealed_s is not None
    assert {k for k, t in put.stats.layers.items() if t.ready_s is not None} == set(put.manifest.layers)
    for boundary, start in [(100, 0), (64, 0), (33, 10), (100, 48)]:
        into = blank(boundary, start)
        get = await pool.get(ns, chain, boundary=boundary, start=start, into=into)
        order = [layer async for layer in get.layers()]
        assert sorted(order) == sorted(get.manifest.layers)
        await get.layer(order[0])
        await get.sealed()
        await get.sealed()
        check(into, get)
        assert get.stats.moved_bytes == get.manifest.total_bytes
        assert all(t.applied_s is not None for t in get.stats.layers.values())
    with pytest.raises(MissError, match="longest that can is 64"):
        await pool.get(ns, chain, boundary=96, into=blank(96))
    assert "all that was asked" not in str(await pool.explain(ns, chain))
    stat = await pool.stat()
    assert stat["active"] == 0
    assert await pool.clear() > 0
    assert (await pool.stat())["used_bytes"] == 0


async def test_reading_layer_by_layer_behind_a_put(pool, ns, chain):
    into = blank()
    reading = asyncio.create_task(pool.get(ns, chain, boundary=100, into=into, request=REQUEST))
    await asyncio.sleep(0)
    assert not reading.done()  # nobody puts that yet
    put = await pool.put(ns, chain, boundary=100, request=REQUEST)
    get = await reading
    for layer in put.manifest.layers:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(get.layer(layer), 0.001)
        for extent in put.manifest.by_layer[layer]:
            for span in extent.spans:  # token by token, the last first
                units = [(span.first, 0)] if not span.tokens else [(t, 1) for t in range(span.first, span.stop)]
                for first, tokens in reversed(units):
                    low, high = extent.byte_range(first, tokens)
                    data = content(extent, TOKENS)[low:high]
                    put.ready(layer, extent.tensor, PageList.of(data), first=first, tokens=tokens)
        await get.layer(layer)
        for extent in get.manifest.by_layer[layer]:
            assert into[layer, extent.tensor].tobytes() == content(extent, TOKENS)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(get.sealed(), 0.001)
    await put.seal()
    await get.sealed()
    check(into, get)


async def test_a_reader_whose_bytes_are_there_does_not_wait(pool, ns, chain):
    await store(pool, ns, chain)
    into = blank()
    get = await asyncio.wait_for(pool.get(ns, chain, boundary=100, into=into, request=REQUEST), 1)
    await get.sealed()
    check(into, get)


async def test_nobody_comes(pool, ns, chain):
    with pytest.raises(DeadlineError, match="no put of request"):
        await pool.get(ns, chain, boundary=100, into=blank(), request=REQUEST, deadline_s=0.01)
    assert not pool._home.waiting._futures


async def test_waiting_readers_are_bounded(pool, ns, chain, monkeypatch):
    monkeypatch.setattr("kvpool.waiting.MAX_WAITING_READERS", 1)
    first = asyncio.create_task(pool.get(ns, chain, boundary=100, into=blank(), request=REQUEST))
    await asyncio.sleep(0)
    with pytest.raises(PoolLimitError, match="1 readers wait"):
        await pool.get(ns, chain, boundary=100, into=blank(), request=bytes(16))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not pool._home.waiting._futures


async def test_a_request_without_a_chain(pool, ns):
    put = await pool.put(ns, None, boundary=77, request=REQUEST)
    hand_over(put)
    await put.seal()
    into = blank(77)
    get = await pool.get(ns, None, boundary=77, into=into, request=REQUEST)
    await get.sealed()
    check(into, get)
    assert (await pool.stat())["used_bytes"] == 0
    with pytest.raises(MissError, match="has been read"):
        await pool.get(ns, None, boundary=77, into=blank(77), request=REQUEST)


async def test_sealing_what_is_not_complete(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100)
    slots = list(put.manifest.by_slot)
    hand_over(put, slots[1:])
    layer, tensor = slots[0]
    with pytest.raises(ManifestError, match=f"never handed over, the first is layer {layer} tensor {tensor}"):
        await put.seal()
    assert (await pool.match(ns, chain)).length == 0
    hand_over(put, slots[:1])
    await put.seal()
    assert (await pool.match(ns, chain)).length == 100


async def test_units_that_do_not_fit(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100)
    slot = next(iter(put.manifest.by_slot))
    extent = put.manifest.by_slot[slot]
    with pytest.raises(DestinationError, match=f"the unit has {extent.nbytes} bytes, the pages 3"):
        put.ready(*slot, PageList.of(b"abc"))
    with pytest.raises(LayoutError):
        put.ready(77, 0, PageList.of(b"abc"))
    with pytest.raises(LayoutError):
        put.ready(*slot, PageList.of(b"abc"), first=1000, tokens=1)
    hand_over(put, [slot])
    with pytest.raises(TransferError, match="handed over already"):
        hand_over(put, [slot])
    await put.cancel()
    with pytest.raises(TransferCancelledError):
        hand_over(put, [slot])


async def test_ready_events(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100)
    slots = list(put.manifest.by_slot)
    late = bytearray(put.manifest.by_slot[slots[0]].nbytes)
    come = []
    handover = put.ready(*slots[0], PageList.of(late), event=lambda: bool(come))
    hand_over(put, slots[1:])
    sealing = asyncio.create_task(put.seal())
    await asyncio.sleep(0.003)
    assert not handover.done
    assert not sealing.done()
    late[:] = content(put.manifest.by_slot[slots[0]], TOKENS)
    come.append(1)
    await handover.released()
    await sealing
    into = blank()
    get = await pool.get(ns, chain, boundary=100, into=into)
    await get.sealed()
    check(into, get)


async def test_a_broken_ready_event_fails_the_put(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100)
    answers = iter([False, False])
    slots = list(put.manifest.by_slot)
    pages = PageList.of(content(put.manifest.by_slot[slots[0]], TOKENS))
    handover = put.ready(*slots[0], pages, event=lambda: next(answers))
    hand_over(put, slots[1:])
    await handover.released()
    with pytest.raises(TransferError, match="ready event failed: StopIteration"):
        await put.seal()
    assert (await pool.stat())["used_bytes"] == 0


async def test_cancelled_by_the_producer(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100, request=REQUEST)
    into = blank()
    get = await pool.get(ns, chain, boundary=100, into=into, request=REQUEST)
    slots = list(put.manifest.by_slot)
    pending = put.ready(*slots[0], PageList.of(content(put.manifest.by_slot[slots[0]], TOKENS)), event=lambda: False)
    layer = put.manifest.layers[-1]
    waiters = [
        asyncio.create_task(get.layer(layer)),
        asyncio.create_task(get.sealed()),
        asyncio.create_task(anext(get.layers())),
    ]
    await asyncio.sleep(0)
    await put.cancel("changed my mind")
    await put.cancel()
    await pending.released()
    for result in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(result, TransferCancelledError)
        assert "changed my mind" in str(result)
    with pytest.raises(TransferCancelledError):
        await put.seal()
    stat = await pool.stat()
    assert (stat["used_bytes"], stat["active"]) == (0, 0)


async def test_no_byte_after_a_cancel_by_the_consumer(pool, ns, chain):
    put = await pool.put(ns, chain, boundary=100, request=REQUEST)
    into = blank()
    get = await pool.get(ns, chain, boundary=100, into=into, request=REQUEST)
    slots = list(put.manifest.by_slot)
    hand_over(put, slots[:1])
    waiting = asyncio.create_task(get.sealed())
    await asyncio.sleep(0)
    await get.cancel()
    await get.cancel()
    before = {slot: pages.tobytes() for slot, pages in into.items()}
    hand_over(put, slots[1:])
    await put.seal()
    await asyncio.sleep(0.002)
    assert {slot: pages.tobytes() for slot, pages in into.items()} == before
    with pytest.raises(TransferCancelledError):
        await waiting
    with pytest.raises(TransferCancelledError):
        await get.layer(put.manifest.layers[-1])
    assert (await pool.match(ns, chain)).length == 100  # the put is not disturbed
    with pytest.raises(ManifestError, match="layer 99"):
        await get.layer(99)


async def test_deadlines_are_enforced(pool, ns, chain):
    await store(pool, ns, chain, boundary=64)
    put = await pool.put(ns, chain, boundary=100, request=REQUEST, deadline_s=0.02)
    get = await pool.get(ns, chain, boundary=100, into=blank(), request=REQUEST)
    lease = await pool.lease(ns, chain, 64, 0.02)
    with pytest.raises(DeadlineError, match="not sealed before its deadline"):
        await asyncio.wait_for(get.sealed(), 5)
    with pytest.raises(DeadlineError):
        await put.seal()
    with pytest.raises(DeadlineError):
        hand_over(put)
    while (await pool.stat())["active"]:
        await asyncio.sleep(0.005)
    with pytest.raises(PoolError, match="no lease"):
        await pool.release(lease.id)
    put = await pool.put(ns, chain, boundary=100, request=bytes(16))
    get = await pool.get(ns, chain, boundary=100, into=blank(), request=bytes(16), deadline_s=0.01)
    with pytest.raises(DeadlineError, match="not finished before its deadline"):
        await asyncio.wait_for(get.sealed(), 5)
    hand_over(put)
    await put.seal()
    assert (await pool.match(ns, chain)).length == 100


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda into: into.popitem(), "no destination was given"),
        (lambda into: into.update({(0, 0): PageList.of(bytearray(3))}), "the destination has 3 bytes"),
        (lambda into: into.update({(0, 0): PageList.of(bytes(into[0, 0].nbytes))}), "read-only"),
    ],
)
async def test_destinations_that_do_not_fit(pool, ns, chain, spoil, message):
    await store(pool, ns, chain)
    into = blank()
    spoil(into)
    with pytest.raises(DestinationError, match=message):
        await pool.get(ns, chain, boundary=100, into=into)
    assert (await pool.stat())["active"] == 0


async def test_leases(pool, ns, chain):
    await store(pool, ns, chain, checkpoints=(64,))
    lease = await pool.lease(ns, chain, 64, 60.0)
    assert (lease.length, lease.seconds) == (64, 60.0)
    await pool.clear()
    assert (await pool.match(ns, chain)).length == 64
    await pool.release(lease.id)
    await pool.clear()
    assert (await pool.match(ns, chain)).length == 0


async def test_objects(pool):
    objects = {b"a": b"x" * 1000, b"b": np.arange(100, dtype=np.float32), b"c": b""}
    await pool.put_objects(objects)
    assert await pool.exists([b"a", b"b", b"c", b"d"]) == [True, True, True, False]
    got = await pool.get_objects([b"c", b"d", b"a", b"b"])
    assert got == [b"", None, b"x" * 1000, objects[b"b"].tobytes()]
    await pool.put_objects({b"a": b"y"})
    assert await pool.get_objects([b"a", b"a"]) == [b"y", b"y"]


async def test_objects_into_the_callers_memory(pool):
    await pool.put_objects({b"a": b"x" * 1000, b"b": b"", b"c": b"z"})
    into = [bytearray(1200) for _ in range(4)]
    assert await pool.get_objects_into([b"a", b"none", b"b", b"c"], into) == [1000, None, 0, 1]
    assert bytes(into[0]) == b"x" * 1000 + bytes(200)
    assert (bytes(into[1]), bytes(into[2]), bytes(into[3])[:2]) == (bytes(1200), bytes(1200), b"z\0")
    with pytest.raises(KVBufferError):
        await pool.get_objects_into([b"a"], [bytearray(999)])
    with pytest.raises(KVBufferError, match="there is memory for 0"):
        await pool.get_objects_into([b"a"], [])
    assert (await pool.stat())["active"] == 0


async def test_an_object_that_rotted_is_a_miss(pool):
    await pool.put_objects({b"a": b"x" * 1000, b"b": b"y" * 1000})
    get = pool.core.plan_get_flat("default", [b"a"], deadline=1e18)
    get.sources[0, 0].slice(500, 501).copy_from(PageList.of(b"z"))
    get.close()
    assert await pool.get_objects([b"a", b"b"]) == [None, b"y" * 1000]
    assert await pool.exists([b"a"]) == [False]
    stat = await pool.stat()
    assert stat["counters"]["flat_corrupt"] == 1
    assert stat["active"] == 0


async def test_objects_too_big(pool):
    await pool.put_objects({b"a": b"x"})
    with pytest.raises(PoolFullError, match="give the pool more memory"):
        await pool.put_objects({b"b": b"y", b"c": bytes(2 << 20)})
    assert await pool.exists([b"a", b"b"]) == [True, False]
    with pytest.raises(KeyChainError):
        await pool.put_objects({b"": b"y"})


async def test_tenants(pool, ns, chain):
    other = pool.as_tenant("other")
    await store(pool, ns, chain)
    await pool.put_objects({b"k": b"v"})
    theirs = await other.namespace(LAYOUT, STEP)
    assert (await other.match(theirs, KeyChain(theirs, TOKENS))).length == 0
    assert await other.get_objects([b"k"]) == [None]
    with pytest.raises(NamespaceError, match="belongs to tenant 'default'"):
        await other.match(ns, chain)
    assert await other.clear() == 0
    assert (await other.stat())["used_bytes"] == 0
    assert (await pool.match(ns, chain)).length == 100


async def test_closing_ends_everything():
    pool = Pool.create(1 << 20, page_bytes=256)
    ns = await pool.namespace(LAYOUT, STEP)
    chain = KeyChain(ns, TOKENS)
    put = await pool.put(ns, chain, boundary=100, request=REQUEST)
    get = await pool.get(ns, chain, boundary=100, into=blank(), request=REQUEST)
    waiting = asyncio.create_task(pool.get(ns, chain, boundary=100, into=blank(), request=bytes(16)))
    await asyncio.sleep(0)
    await pool.close()
    await pool.close()
    for call in (get.sealed(), put.seal(), waiting):
        with pytest.raises(TransferCancelledError):
            await call
    with pytest.raises(PoolError, match="closed"):
        await pool.stat()
    assert pool.core.arena.arena.closed
    await no_tasks_left()


async def test_a_pool_that_cannot_be():
    with pytest.raises(ArenaError):
        Pool.create(1 << 50)
    with pytest.raises(Exception, match="page"):
        Pool.create(4096, page_bytes=65_536)
