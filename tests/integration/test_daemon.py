"""The pool behind an endpoint: a server and clients in one process, and kvpoold as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from kvpool.arena import PageArena
from kvpool.client import PoolClient, connect
from kvpool.core import PoolCore
from kvpool.errors import MissError
from kvpool.keys import KeyChain
from kvpool.match import Reason
from kvpool.messages import keys_to_wire
from kvpool.protocol import PoolProtocol
from kvpool.server import PoolServer
from kvtransport import presets
from kvtransport.buffers import Arena, PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import DeadlineError, KVBufferError, KVError, RefusedError, TransferCancelledError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.manifest import Manifest, new_transfer_id
from tests.conftest import Cache, no_tasks_left


def objects(keys: list[bytes], sizes: list[int], checksums: list[int] | None = None) -> dict[str, bytes]:
    """The arguments of put_objects."""
    args = {**keys_to_wire(keys), "sizes": np.array(sizes, "<i8").tobytes()}
    return args if checksums is None else {**args, "checksums": np.array(checksums, "<u8").tobytes()}


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Served:
    """A pool server and a way to make clients."""

    async def start(self, memory: int = 64 << 20) -> Served:
        self.arena = PageArena(Arena(memory, lock="off", cuda="off"))
        self.core = PoolCore(self.arena, clock=time.monotonic)
        self.endpoint = Endpoint(EndpointConfig(spill=SpillPolicy(budget_bytes=0), keepalive_s=0.2, dead_after_s=2.0))
        self.server = PoolServer(self.endpoint, self.core)
        self.address = await self.endpoint.listen()
        self.clients: list[PoolClient] = []
        return self

    async def client(self) -> PoolClient:
        client = await connect(*self.address, connections=2)
        self.clients.append(client)
        return client

    async def stop(self) -> None:
        for client in self.clients:
            await client.close()
        await self.server.close()
        await self.endpoint.close()
        self.arena.close()
        await no_tasks_left()


@pytest.fixture
async def served():
    served = await Served().start()
    yield served
    await served.stop()


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, n)


def source_of(ns, boundary: int, *, start: int = 0, checkpoints=(), seed: int = 0) -> Cache:
    """Bytes that depend on the seed only through each extent, so that prefixes of two caches can be compared."""
    manifest = Manifest.of_layout(
        ns.layout,
        boundary,
        transfer=new_transfer_id(),
        start=start,
        checkpoints=checkpoints,
        block_tokens=ns.block_tokens,
    )
    return Cache(manifest, seed=seed)


async def put(pool, ns, chain, source: Cache, **kwargs) -> None:
    outgoing = await pool.put(ns, chain, **kwargs)
    for slot, pages in source.pages.items():
        outgoing.ready(*slot, pages)
    await outgoing.seal()


def source_bytes(source: Cache) -> int:
    return sum(pages.nbytes for pages in source.pages.values())


def blank(ns, boundary: int, start: int = 0) -> Cache:
    manifest = Manifest.of_layout(
        ns.layout, boundary, transfer=new_transfer_id(), start=start, block_tokens=ns.block_tokens
    )
    return Cache(manifest, blank=True)


def expected(ns, source: Cache, boundary: int) -> dict:
    """What a get at ``boundary`` returns of a cache that was put with checkpoints at other places too."""
    full = Manifest.of_layout(ns.layout, boundary, transfer=new_transfer_id(), block_tokens=ns.block_tokens)
    out = {}
    for slot, extent in full.by_slot.items():
        data = source.pages[slot].tobytes()
        out[slot] = data[len(data) - extent.nbytes :]  # states and windows at the boundary come last
        if extent.spans[0].tokens and extent.spans[0].first == 0:
            out[slot] = data[: extent.nbytes]
    return out


async def test_what_is_over_leaves_no_cycles(served, hybrid):
    """A collector that spares what is old (kvpool.collecting) would keep them for hours."""
    client = await served.client()
    ns = await client.namespace(hybrid, 16)

    async def everything(seed: int) -> None:
        chain = KeyChain(ns, tokens(161, seed))
        sender = await client.put(ns, chain, boundary=160)
        for extent in sender.manifest.extents:
            sender.ready(extent.layer, extent.tensor, PageList.of(bytes(extent.nbytes)))
        await sender.seal()
        lease = await client.lease(ns, chain, 160, 60.0)
        into = {(e.layer, e.tensor): PageList.of(bytearray(e.nbytes)) for e in sender.manifest.extents}
        receiver = await client.get(ns, chain, boundary=160, into=into)
        await receiver.sealed()
        await client.release(lease.id)
        with pytest.raises(MissError):
            await client.get(ns, KeyChain(ns, tokens(161, seed + 1_000)), boundary=160, into={})
        given_up = await client.put(ns, KeyChain(ns, tokens(161, seed + 2_000)), boundary=160)
        await given_up.cancel("given up")
        for size in (100, 300_000):
            await client.put_objects({b"a": bytes(size), b"b": b"x"})
            assert [len(o) for o in await client.get_objects([b"a", b"b", b"c"]) if o is not None] == [size, 1]
        async with await connect(*served.address, connections=2) as other:
            await other.exists([b"a"])
        while len(served.endpoint.links) > 1:
            await asyncio.sleep(0.001)

    await everything(1)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for seed in range(2, 6):
            await everything(seed)
        while served.server.active:
            await asyncio.sleep(0.01)
        gc.collect()
        kinds = Counter(type(o).__name__ for o in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    ours = (
        "Link",
        "Session",
        "Sender",
        "Receiver",
        "Put",
        "Get",
        "FlatPut",
        "FlatGet",
        "KeyChain",
        "Manifest",
        "PageList",
        "MissError",
    )
    assert not {name: kinds[name] for name in ours if kinds[name]}, kinds


async def test_client_has_the_pools_interface(served):
    client = await served.client()
    assert isinstance(client, PoolProtocol)


@pytest.mark.parametrize("boundary", [640, 999])
async def test_put_match_get(served, hybrid, boundary):
    one, two = await served.client(), await served.client()
    ns = await one.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(1200))
    assert (await one.match(ns, chain)).length == 0
    source = source_of(ns, boundary, checkpoints=[320])
    await put(one, ns, chain, source, boundary=boundary, checkpoints=[320])
    other_ns = await two.namespace(hybrid, 64)
    found = await two.match(other_ns, KeyChain(other_ns, tokens(1200)))
    assert found.length == boundary
    assert found.restorable == (320, boundary)
    target = blank(ns, boundary)
    incoming = await two.get(other_ns, chain, boundary=boundary, into=target.pages)
    layers = [layer async for layer in incoming.layers()]
    await incoming.sealed()
    assert sorted(layers) == list(hybrid.layers)
    assert target.bytes() == expected(ns, source, boundary)
    wire = (await one.stat())["wire"]
    assert wire["received_moved_bytes"] == source_bytes(source)
    assert wire["received_checksums_verified"] > 0
    assert wire["received_corrupt_chunks"] == 0


async def test_a_put_is_invisible_until_sealed_and_gone_when_cancelled(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    source = source_of(ns, 640)
    outgoing = await client.put(ns, chain, boundary=640)
    for slot, pages in source.pages.items():
        outgoing.ready(*slot, pages)
    await asyncio.sleep(0.1)
    assert (await client.match(ns, chain)).length == 0
    assert (await client.stat())["used_bytes"] > 0
    await outgoing.cancel("changed my mind")
    await asyncio.sleep(0.05)
    assert (await client.stat())["used_bytes"] == 0


async def test_decode_reads_layer_k_while_k_plus_1_has_not_arrived(served, hybrid):
    prefill, decode = await served.client(), await served.client()
    ns = await prefill.namespace(hybrid, 64)
    await decode.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    request = os.urandom(16)
    source, target = source_of(ns, 640), blank(ns, 640)
    # decode comes first: it waits until the put begins
    getting = asyncio.ensure_future(decode.get(ns, chain, boundary=640, into=target.pages, request=request))
    await asyncio.sleep(0.05)
    outgoing = await prefill.put(ns, chain, boundary=640, request=request)
    incoming = await getting
    for layer, extents in outgoing.manifest.by_layer.items():
        reading = asyncio.ensure_future(incoming.layer(layer))
        await asyncio.sleep(0.01)
        assert not reading.done()
        for extent in extents:
            outgoing.ready(extent.layer, extent.tensor, source.pages[extent.layer, extent.tensor])
        await asyncio.wait_for(reading, 5)
        for extent in extents:
            slot = extent.layer, extent.tensor
            assert target.pages[slot].tobytes() == source.pages[slot].tobytes()
    sealing = asyncio.ensure_future(incoming.sealed())
    await asyncio.sleep(0.02)
    assert not sealing.done()  # the put is not sealed, so the get is not
    await outgoing.seal()
    await asyncio.wait_for(sealing, 5)


async def test_second_request_sends_only_the_rest_and_decode_gets_all_of_it(served, hybrid):
    prefill, decode = await served.client(), await served.client()
    ns = await prefill.namespace(hybrid, 64)
    await decode.namespace(hybrid, 64)
    first = KeyChain(ns, tokens(1000))
    cache = source_of(ns, 960, checkpoints=[512])
    await put(prefill, ns, first, cache, boundary=960, checkpoints=[512])
    ids = np.concatenate([tokens(1000)[:512], tokens(488, seed=9)])
    second = KeyChain(ns, ids)
    assert (await prefill.match(ns, second)).length == 512
    prefix = blank(ns, 512)
    incoming = await prefill.get(ns, second, boundary=512, into=prefix.pages)
    await incoming.sealed()
    request = os.urandom(16)
    rest, whole = source_of(ns, 960, start=512, seed=4), blank(ns, 960)
    outgoing = await prefill.put(ns, second, boundary=960, start=512, request=request)
    incoming = await decode.get(ns, second, boundary=960, into=whole.pages, request=request)
    for slot, pages in rest.pages.items():
        outgoing.ready(*slot, pages)
    await asyncio.gather(outgoing.seal(), incoming.sealed())
    for slot, extent in incoming.manifest.by_slot.items():
        got = whole.pages[slot].tobytes()
        if extent.spans[0].tokens == 0:
            assert got == rest.pages[slot].tobytes()
        elif extent.spans[0].first == 0:
            assert got == prefix.pages[slot].tobytes() + rest.pages[slot].tobytes()
        else:
            assert got == rest.pages[slot].tobytes()[-len(got) :]
    assert outgoing.stats.total_bytes < incoming.stats.total_bytes


async def test_when_prefill_dies_the_follower_hears_and_nothing_is_left(served, hybrid):
    prefill, decode = await served.client(), await served.client()
    ns = await prefill.namespace(hybrid, 64)
    await decode.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    request = os.urandom(16)
    outgoing = await prefill.put(ns, chain, boundary=640, request=request)
    target = blank(ns, 640)
    incoming = await decode.get(ns, chain, boundary=640, into=target.pages, request=request)
    source = source_of(ns, 640)
    for slot in list(source.pages)[:3]:
        outgoing.ready(*slot, source.pages[slot])
    await incoming.layer(outgoing.manifest.layers[0])
    await prefill.close()
    with pytest.raises(KVError) as caught:
        await asyncio.wait_for(incoming.sealed(), 5)
    assert caught.value.retryable
    await asyncio.sleep(0.05)
    stat = await decode.stat()
    assert stat["used_bytes"] == 0
    assert stat["transfers"] == 0


async def test_a_reader_that_dies_leaves_no_pins(served, hybrid):
    one, two = await served.client(), await served.client()
    ns = await one.namespace(hybrid, 64)
    await two.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(6000))
    await put(one, ns, chain, source_of(ns, 5952), boundary=5952)
    target = blank(ns, 5952)
    # So slow that it is under way when the reader dies.
    incoming = await two.get(ns, chain, boundary=5952, into=target.pages, bytes_per_s=1000)
    lease = await two.lease(ns, chain, 5952, 60.0)
    assert lease.length == 5952
    await two.close()
    with pytest.raises(KVError):
        await incoming.sealed()
    for _ in range(100):
        stat = await one.stat()
        if stat["evictable_bytes"] == stat["used_bytes"] and stat["transfers"] == 0:
            break
        await asyncio.sleep(0.02)
    assert stat["evictable_bytes"] == stat["used_bytes"] > 0
    assert stat["leases"] == 0


async def test_deadlines(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    with pytest.raises(DeadlineError, match="no put of request"):
        await client.get(ns, chain, boundary=640, into={}, request=os.urandom(16), deadline_s=0.2)
    outgoing = await client.put(ns, chain, boundary=640, deadline_s=0.3)
    with pytest.raises(DeadlineError):
        await outgoing.accepted()
        await outgoing.first_of(asyncio.get_running_loop().create_future())
        raise outgoing.error
    await asyncio.sleep(0.3)
    assert (await client.stat())["used_bytes"] == 0


async def test_errors_travel_with_their_kind(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    with pytest.raises(KVError, match="640 tokens cannot be restored; the longest that can is 0") as caught:
        await client.get(ns, chain, boundary=640, into=blank(ns, 640).pages)
    assert caught.value.code == "miss"
    with pytest.raises(KVError, match="only 0 before it are in the pool") as caught:
        await client.put(ns, chain, boundary=640, start=64)
    assert caught.value.code == "prefix_missing"
    big = KeyChain(ns, tokens(400_000))
    with pytest.raises(KVError) as caught:
        await client.put(ns, big, boundary=399_936)
    assert caught.value.code == "pool_full"
    assert (await client.stat())["used_bytes"] == 0


async def test_a_manifest_of_another_put_is_refused(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    reply = await client.link.call("put", client._about(ns, chain, boundary=640, deadline_s=5.0))
    manifest = Manifest.of_layout(hybrid, 576, transfer=reply["transfer"], block_tokens=64)
    with pytest.raises(KVError, match="not of the put that was asked for"):
        await client.link.open(manifest).accepted()
    assert (await client.stat())["used_bytes"] == 0


async def test_a_get_that_is_refused_holds_nothing_and_lifts_no_cap(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(640))
    await put(client, ns, chain, source_of(ns, 640), boundary=640)

    def args(**more):
        return client._about(ns, chain, boundary=640, deadline_s=30.0, **{"transfer": new_transfer_id(), **more})

    for wrong, says in (
        ({"priority": 1 << 40}, "argument 'priority' must be within"),
        ({"priority": "high"}, "argument 'priority' must not be a str"),
        ({"bytes_per_s": 0}, "bytes a second"),
        ({"bytes_per_s": float("inf")}, "bytes a second"),
    ):
        with pytest.raises(KVError, match=says):
            await client.link.call("get", args(**wrong))
        assert served.core.stat()["active"] == 0

    served.endpoint.cap_tenant("default", 1 << 20)
    named = {"transfer": new_transfer_id()}
    await client.link.call("get", args(**named))
    for pace in ({}, {"bytes_per_s": 1e6}):
        with pytest.raises(KVError, match="open on this link already"):
            await client.link.call("get", args(**named, **pace))
    assert served.core.stat()["active"] == 1
    assert set(served.endpoint.pacer._tenants) == {"default"}


@pytest.mark.parametrize(
    ("verb", "args", "says"),
    [
        ("match", {}, "'ns' is missing"),
        ("match", {"ns": b"nonsense"}, "has not opened that namespace"),
        ("put", {"ns": b"x"}, "has not opened"),
        ("namespace", {"layout": {}, "block_tokens": 64}, "not a layout description"),
        ("exists", {"keys": ["text"], "lengths": b""}, "must not be a list"),
        ("exists", {"keys": b"abc", "lengths": b"\3"}, "lengths are 2 bytes each"),
        ("exists", {"keys": b"abc", "lengths": b"\4\0"}, "no flat keys"),
        ("exists", {"keys": b"abc", "lengths": b"\2\0"}, "add up to 2 bytes"),
        ("exists", {"keys": b"", "lengths": b"\0\0"}, "a key has 1 to 256"),
        ("exists", {"keys": b"k" * 257, "lengths": b"\1\1"}, "a key has 1 to 256"),
        ("exists", {"keys": b"k" * 65_537, "lengths": b"\1\0" * 65_537}, "at most 65536"),
        ("put_objects", objects([b"a", b"a"], [1, 1], [0, 0]), "no key twice"),
        ("put_objects", objects([b"a", b"b"], [1], [0]), "one size per key"),
        ("put_objects", objects([b"a"], [-1], [0]), "none negative"),
        ("put_objects", objects([b"a"], [1], [0, 0]), "2 checksums of 1 objects"),
        ("put_objects", {**objects([b"a"], [1], [0]), "data": b"ab"}, "2 bytes of objects of 1 bytes"),
        ("put_objects", {**objects([b"a"], [1]), "sizes": b"\1"}, "8 bytes each"),
        ("put_objects", {**objects([b"a"], [1]), "lengths": b"\2\0"}, "how 'keys' are cut"),
        ("checksums", {"transfer": bytes(16), "checksums": bytes(8)}, "no put of objects with this transfer"),
        ("get_objects", {**keys_to_wire([b"a"]), "transfer": b"short"}, "must be 16 bytes"),
    ],
)
async def test_bad_calls_are_named(served, verb, args, says):
    client = await served.client()
    with pytest.raises(KVError, match=re.escape(says)):
        await client.link.call(verb, args)
    assert (await client.stat())["links"] == 1


async def test_flat_objects(served):
    client = await served.client()
    objects = {b"a" * 32: os.urandom(100_000), b"b": b"x", b"empty": b""}
    await client.put_objects(objects)
    assert await client.exists([b"b", b"nope", b"a" * 32]) == [True, False, True]
    keys = [b"nope", *objects]
    assert await client.get_objects(keys) == [None, *objects.values()]
    assert await client.get_objects([b"nope"]) == [None]
    await client.put_objects({b"b": b"newer"})
    assert await client.get_objects([b"b"]) == [b"newer"]
    assert await client.clear() == 3
    assert await client.exists(list(objects)) == [False] * 3


async def test_checksums_follow_objects_that_are_under_way(served):
    """Of more than a MiB: they are right, wrong ones are found at the get, and without them nothing is stored."""
    client = await served.client()
    body = np.random.default_rng(1).bytes(3 << 20)
    await client.put_objects({b"%d" % i: body[i << 18 : (i + 1) << 18] for i in range(12)})
    assert await client.get_objects([b"%d" % i for i in range(12)]) == [
        body[i << 18 : (i + 1) << 18] for i in range(12)
    ]
    used = served.core.arena.used_bytes

    async def put(key: bytes, checksums: list[int] | None) -> None:
        reply = await client.link.call("put_objects", objects([key], [len(body)]))
        sender = client.link.open(Manifest.of_objects([len(body)], transfer=reply["transfer"]), deadline_s=5)
        sender.hand_over(0, 0, 0, PageList.of(body))
        if checksums is not None:
            sums = np.array(checksums, "<u8").tobytes()
            await client.link.call("checksums", {"transfer": reply["transfer"], "checksums": sums})
        await sender.seal()

    with pytest.raises(KVError, match="2 checksums of 1 objects"):
        await put(b"two", [1, 2])
    with pytest.raises(KVError, match="before their checksums"):
        await put(b"none", None)
    await put(b"right", [PageList.of(body).hash(0)])
    await put(b"wrong", [7])
    assert await client.exists([b"two", b"none", b"right", b"wrong"]) == [False, False, True, True]
    assert await client.get_objects([b"right", b"wrong"]) == [body, None]
    assert await client.exists([b"right", b"wrong"]) == [True, False]
    assert served.core.stat()["counters"]["flat_corrupt"] == 1
    await client.clear()
    await client.close()
    while served.server.active:
        await asyncio.sleep(0.01)
    assert used > 0 == served.core.arena.used_bytes


async def test_many_keys_in_one_lookup(served):
    client = await served.client()
    await client.put_objects({b"k%d" % i: b"x" for i in range(0, 2_000, 3)})
    asked = [b"k%d" % i for i in range(2_000)]
    assert await client.exists(asked) == [i % 3 == 0 for i in range(2_000)]
    assert await client.exists([]) == []
    with pytest.raises(KVError, match="1 to 256 bytes"):
        await client.exists([b"k" * 70_000])


async def test_objects_into_the_callers_memory(served):
    client = await served.client()
    objects = {b"%d" % i: np.random.default_rng(i).bytes(i * 70_001) for i in range(12)}
    await client.put_objects(objects)
    keys = [b"none", *objects]
    for scattered in (False, True):
        memory = PageList.of(bytearray(900_000 * 13))
        into = [
            bytearray(900_000) if scattered else memory.slice(i * 900_000, (i + 1) * 900_000) for i in range(len(keys))
        ]
        assert await client.get_objects_into(keys, into) == [None, *(len(v) for v in objects.values())]
        got = [bytes(b) if scattered else b.tobytes() for b in into]
        assert [g[: len(v)] for g, v in zip(got[1:], objects.values(), strict=True)] == list(objects.values())
    with pytest.raises(KVBufferError, match="there is memory for 1"):
        await client.get_objects_into(keys, [bytearray(5)])
    with pytest.raises(KVBufferError):
        await client.get_objects_into([b"5"], [bytearray(5)])
    assert await client.get_objects([b"5"]) == [objects[b"5"]]


async def test_bytes_that_change_while_they_rest_are_a_miss(served):
    client = await served.client()
    await client.put_objects({b"k": b"y" * 10_000})
    get = served.core.plan_get_flat("default", [b"k"], deadline=time.monotonic() + 5)
    pages = next(iter(get.sources.values()))
    np.frombuffer(pages.base, np.uint8)[int(pages.pieces[0, 0]) + 5] ^= 1
    get.close()
    assert await client.get_objects([b"k"]) == [None]
    assert await client.exists([b"k"]) == [False]


async def test_explain_through_the_wire(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    await put(client, ns, chain, source_of(ns, 512), boundary=512)
    explanation = await client.explain(ns, chain)
    assert explanation.match.length == 512
    assert "512" in str(explanation)
    assert {g.group for g in explanation.groups} == {g.name for g in hybrid.groups}
    assert explanation == served.core.explain(ns, chain)
    state = next(g for g in explanation.as_dict()["groups"] if g["kind"] == "recurrent")
    assert (state["reach"], state["ended_by"]) == (512, "never_stored")
    await client.clear()
    told = await client.explain(ns, chain)
    assert "evicted: what ended at 64 was evicted" in str(told)
    assert "(cleared)" in str(told)


async def test_an_operators_pool_tells_of_other_tenants(served, hybrid):
    theirs = served.core.open_namespace("someone", hybrid, 64)
    put = served.core.begin_put(theirs, KeyChain(theirs, tokens(700)), boundary=512, deadline=time.monotonic() + 9)
    put.complete_without_bytes()
    put.commit()
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    assert {g.ended_by for g in (await client.explain(ns, chain)).groups} == {Reason.NEVER_STORED}
    served.server.lookups.explain_tenants = True
    assert {g.ended_by for g in (await client.explain(ns, chain)).groups} == {Reason.OTHER_TENANT}


async def test_checkpoint_hints_through_the_wire(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    document = tokens(640)
    for i in range(3):
        chain = KeyChain(ns, [*document, *tokens(70, seed=i + 1)])
        hints = await client.checkpoint_hints(ns, chain, insists=[128])
        assert hints == served.core.checkpoint_hints(ns, chain, [128])
        source = source_of(ns, hints.last, start=hints.start, checkpoints=hints.lengths)
        await put(client, ns, chain, source, boundary=hints.last, start=hints.start, checkpoints=hints.lengths)
    assert (hints.restorable, hints.lengths, hints.branch) == (640, (710,), None)
    with pytest.raises(KVError, match="insists"):
        await client.link.call(
            "checkpoint_hints", {"ns": client._names[ns.id], "chain": {"tokens": b""}, "insists": [-1]}
        )


async def test_draining_refuses_new_work_and_lets_the_rest_finish(served, hybrid):
    client = await served.client()
    ns = await client.namespace(hybrid, 64)
    chain = KeyChain(ns, tokens(700))
    outgoing = await client.put(ns, chain, boundary=640)
    draining = asyncio.ensure_future(served.server.drain(5.0))
    await asyncio.sleep(0.05)
    with pytest.raises(RefusedError, match="shutting down") as caught:
        await client.put(ns, chain, boundary=640)
    assert caught.value.retryable
    for slot, pages in source_of(ns, 640).pages.items():
        outgoing.ready(*slot, pages)
    await outgoing.seal()
    assert await draining


# -- kvpoold as a process ------------------------------------------------------------------------


@contextlib.contextmanager
def daemon(*args: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", "64MiB", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def port_of(process) -> int:
    line = process.stdout.readline()
    assert "listening on 127.0.0.1:" in line, line + process.stderr.read()
    return int(re.search(r":(\d+),", line)[1])


async def test_sigterm_lets_transfers_finish(hybrid):
    with daemon() as process:
        async with await connect("127.0.0.1", port_of(process)) as client:
            ns = await client.namespace(hybrid, 64)
            outgoing = await client.put(ns, KeyChain(ns, tokens(700)), boundary=640)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            for slot, pages in source_of(ns, 640).pages.items():
                outgoing.ready(*slot, pages)
            await outgoing.seal()
            assert await asyncio.to_thread(process.wait, 10) == 0


async def test_a_second_sigterm_stops_at_once(hybrid):
    with daemon("--grace-s", "60") as process:
        async with await connect("127.0.0.1", port_of(process)) as client:
            ns = await client.namespace(hybrid, 64)
            outgoing = await client.put(ns, KeyChain(ns, tokens(700)), boundary=640)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 10) == 1
            with pytest.raises((KVError, TransferCancelledError)):
                await asyncio.wait_for(outgoing.accepted(), 5)
                await asyncio.wait_for(outgoing.seal(), 5)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--memory", "100TiB"], "memory = 100TiB"),
        (["--memory", "lots"], "'lots' is not a size"),
        (["--policy", "fifo"], "no eviction policy 'fifo': choose one of lru, s3fifo, sieve, gdsf, marconi"),
        (["--host", "0.0.0.0"], "insecure = true"),
        (["--config", "/nonexistent.toml"], "cannot read /nonexistent.toml"),
    ],
)
def test_bad_settings_are_one_clear_line(args, says):
    with daemon(*args) as process:
        assert process.wait(20) == 2
        error = process.stderr.read()
        assert says in error
        assert "Traceback" not in error


async def test_kvpool_explain_asks_a_daemon(tmp_path):
    """Text and JSON, of a prompt whose state is there and of one whose state was pushed out."""
    layout = presets.load("kimi-linear-48b")
    prompts = [tokens(200, seed=i).tolist() for i in range(2)]

    def explain(prompt, *more):
        path = tmp_path / "prompt.json"
        path.write_text(json.dumps(prompt))
        command = [
            sys.executable,
            "-m",
            "kvpool.cli",
            "explain",
            "--model",
            "kimi-linear-48b",
            "-a",
            f"127.0.0.1:{port}",
        ]
        return subprocess.run(
            [*command, "--tokens", str(path), *more], capture_output=True, text=True, check=True
        ).stdout

    with daemon("--policy", "lru") as process:
        port = port_of(process)
        async with await connect("127.0.0.1", port) as client:
            ns = await client.namespace(layout, 64)
            for prompt in prompts:
                await put(client, ns, KeyChain(ns, prompt), source_of(ns, 128), boundary=128)
            first, second = [await asyncio.to_thread(explain, p) for p in prompts]
            assert "match: 0 of at most 199 tokens (kda: evicted)" in first
            assert re.search(
                r"kda \(recurrent\): reaches 0; evicted: what ended at 128 was evicted .* s ago \(capacity\)", first
            )
            assert "match: 128 of at most 199 tokens" in second
            body = json.loads(await asyncio.to_thread(explain, prompts[1], "--json", "-"))
            assert (body["length"], body["restorable"]) == (128, [128])
            assert {g["group"]: g["ended_by"] for g in body["groups"]} == {"mla": "never_stored", "kda": "never_stored"}
            assert "other fingerprint" in await asyncio.to_thread(explain, prompts[1], "--block-tokens", "32")


def test_the_port_is_taken():
    with daemon() as first:
        port = port_of(first)
        with daemon("--port", str(port)) as second:
            assert second.wait(20) == 2
            assert "another process has this port" in second.stderr.read()


def test_config_file(tmp_path):
    path = tmp_path / "kvpoold.toml"
    path.write_text('memory = "32MiB"\nport = 0\nmemroy = 1\n')
    with daemon("--config", str(path)) as process:
        assert process.wait(20) == 2
        assert "memroy" in process.stderr.read()
