"""Coded chunks: over TCP by the native engine and by its twin, and over the in-memory network. The bytes that went in, or an error."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kvtransport import coding, compression
from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.engine.base import Odd, Placed
from kvtransport.errors import IntegrityError, LimitError, PeerLostError, ProtocolError, TransferCancelledError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.io.memory import MemoryNetwork
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from kvtransport.wire.frames import Flag, FrameType, Header
from tests.conftest import no_tasks_left

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CONFIG = EndpointConfig(chunk_bytes=64 << 10, keepalive_s=0.2, dead_after_s=1.0, coding="always", codecs=("lz4",))
SIZES = (700_000, 300_002, 4096, 7)


def bf16(nbytes: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(-(-nbytes // 2)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)[:nbytes].copy()


def scattered(data: np.ndarray, page: int = 2304) -> PageList:
    count = -(-len(data) // page)
    base = np.zeros(2 * count * page, np.uint8)
    pages = PageList.pages(base, np.random.default_rng(1).permutation(2 * count)[:count] * page, page, len(data))
    view = memoryview(data)
    at = 0
    for offset, n in pages.pieces:
        base[offset : offset + n] = view[at : at + n]
        at += n
    return pages


class Pair:
    def __init__(self, how: str) -> None:
        self.network = MemoryNetwork() if how == "memory" else None
        self.threads = 0 if how == "twin" else 2

    async def start(self, producer: EndpointConfig = CONFIG, consumer: EndpointConfig = CONFIG, connections: int = 3) -> Pair:
        self.producer = Endpoint(replace(producer, io_threads=self.threads), network=self.network)
        self.consumer = Endpoint(replace(consumer, io_threads=self.threads), network=self.network)
        host, port = await self.consumer.listen("127.0.0.1", 0)
        self.link = await self.producer.connect(host, port, connections=connections)
        while not self.consumer.links or len(self.consumer.links[0].connections) < connections:
            await asyncio.sleep(0.001)
        return self

    async def stop(self) -> None:
        await self.producer.close()
        await self.consumer.close()
        await no_tasks_left()

    def transfer(self, sources, **kwargs):
        manifest = Manifest.of_objects([s.nbytes for s in sources], transfer=new_transfer_id())
        into = [scattered(np.zeros(s.nbytes, np.uint8)) for s in sources]
        granted = {(e.layer, e.tensor): p for e, p in zip(manifest.extents, into, strict=True)}
        receiver = self.consumer.expect(manifest.transfer, Expectation(grant=lambda m: granted, deadline_s=20.0, **kwargs))
        sender = self.link.open(manifest, deadline_s=20.0)
        units = [sender.ready(e.layer, e.tensor, p) for e, p in zip(manifest.extents, sources, strict=True)]
        return SimpleNamespace(sender=sender, receiver=receiver, into=into, units=units, sources=sources)


async def sealed(t) -> None:
    await asyncio.gather(t.sender.seal(), t.receiver.sealed())
    for source, target in zip(t.sources, t.into, strict=True):
        assert target.tobytes() == source.tobytes()
    for unit in t.units:
        await unit.released()


@pytest.fixture(params=["native", "twin", "memory"])
async def pair(request):
    pair = Pair(request.param)
    yield pair
    await pair.stop()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
async def test_coded_chunks_arrive_as_what_they_were(pair, codec):
    config = replace(CONFIG, codecs=(codec,))
    await pair.start(config, config)
    t = pair.transfer([scattered(bf16(n, i)) for i, n in enumerate(SIZES)])
    await sealed(t)
    sent, got = t.sender.stats, t.receiver.stats
    assert sent.moved_bytes == got.moved_bytes == sum(SIZES)
    assert sent.coded_raw_bytes == got.coded_raw_bytes > 0.9 * sum(SIZES)
    assert sent.coded_bytes == got.coded_bytes < 0.9 * sent.coded_raw_bytes
    assert pair.link.telemetry().sent_bytes < 0.95 * sum(SIZES)


async def test_a_window_smaller_than_a_chunk(pair):
    await pair.start()
    t = pair.transfer([PageList.of(bf16(400_000, 1))], window_bytes=50_000)
    await sealed(t)
    assert t.sender.stats.coded_raw_bytes > 0


async def test_what_does_not_shrink_goes_as_it_is(pair):
    await pair.start()
    t = pair.transfer([PageList.of(np.random.default_rng(1).integers(0, 256, 400_000, np.uint8))])
    await sealed(t)
    assert t.sender.stats.coded_raw_bytes == 0


@pytest.mark.parametrize("off", ["producer", "consumer", "no codec in common"])
async def test_both_sides_must_want_it(pair, off):
    plain = replace(CONFIG, coding="off")
    if off == "no codec in common":
        await pair.start(CONFIG, replace(CONFIG, codecs=("zstd",)))
    else:
        await pair.start(**{off: plain})
    t = pair.transfer([PageList.of(bf16(400_000, 1))])
    await sealed(t)
    assert t.sender.stats.coded_raw_bytes == t.receiver.stats.coded_raw_bytes == 0


async def test_units_that_come_late_and_in_pieces(pair):
    await pair.start()
    manifest = Manifest.of_objects([600_000], transfer=new_transfer_id())
    source, target = bf16(600_000, 3), np.zeros(600_000, np.uint8)
    receiver = pair.consumer.expect(manifest.transfer, Expectation(grant=lambda m: {(0, 0): PageList.of(target)}))
    sender = pair.link.open(manifest)
    for start in range(0, 600_000, 100_000):
        sender.hand_over(0, 0, start, PageList.of(source[start : start + 100_000]))
        await asyncio.sleep(0.002)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert (source == target).all()


async def test_connections_lost_in_the_middle(pair):
    await pair.start(replace(CONFIG, reconnect_s=5), replace(CONFIG, reconnect_s=5))
    t = pair.transfer([PageList.of(bf16(3_000_000, i)) for i in range(3)], window_bytes=400_000)
    for _ in range(4):
        await asyncio.sleep(0.01)
        for connection in list(pair.link.connections)[:2]:
            connection.fail(PeerLostError("cut by the test"), abort=True)
    await sealed(t)
    assert t.sender.stats.coded_raw_bytes > 0


@pytest.mark.parametrize("who", ["producer", "consumer"])
async def test_cancelled_in_the_middle(pair, who):
    await pair.start()
    sources = [PageList.of(bf16(3_000_000, i)) for i in range(3)]
    t = pair.transfer(sources, window_bytes=300_000)
    await asyncio.sleep(0.02)
    await (t.sender if who == "producer" else t.receiver).cancel()
    if who == "consumer":  # nothing of it is written any more
        for target in t.into:
            np.frombuffer(target.base, np.uint8)[:] = 0xEE
    with pytest.raises(TransferCancelledError):
        await t.sender.seal()
    with pytest.raises(TransferCancelledError):
        await t.receiver.sealed()
    for unit in t.units:
        await asyncio.wait_for(unit.released(), 5)
    await asyncio.sleep(0.1)
    if who == "consumer":
        assert all((np.frombuffer(target.base, np.uint8) == 0xEE).all() for target in t.into)
    t = pair.transfer(sources)  # and the link goes on
    await sealed(t)


async def test_a_source_is_not_given_back_while_it_is_coded(pair, monkeypatch):
    await pair.start()
    begun, go_on = asyncio.Event(), asyncio.Event()
    held = asyncio.get_running_loop()

    def slow(pages, codec):
        held.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), held).result()
        return None, 1.0

    monkeypatch.setattr(coding, "_timed", slow)
    t = pair.transfer([PageList.of(bf16(100_000, 1))])
    await begun.wait()
    cancelling = asyncio.create_task(t.sender.cancel())
    await asyncio.sleep(0.05)
    assert not cancelling.done()
    assert not t.units[0].done
    go_on.set()
    await cancelling
    await t.units[0].released()


async def test_spilled_while_it_is_coded(pair):
    """A consumer that opens late: everything is copied aside, the sources are overwritten, and the right bytes arrive."""
    await pair.start(replace(CONFIG, spill=SpillPolicy(budget_bytes=8 << 20)))
    data = [bf16(500_000, i) for i in range(3)]
    sources = [PageList.of(d.copy()) for d in data]
    t = pair.transfer(sources, window_bytes=100_000)
    await t.sender.accepted()
    await t.sender.evacuate()
    for source, unit in zip(sources, t.units, strict=True):
        await unit.released()
        np.frombuffer(source.base, np.uint8)[:] = 0x55
    await asyncio.gather(t.sender.seal(), t.receiver.sealed())
    for d, target in zip(data, t.into, strict=True):
        assert target.tobytes() == d.tobytes()


# -- damage ----------------------------------------------------------------------------------------------


def damaged(monkeypatch, times: int, at: int) -> list[int]:
    """The next coded payloads have one bit wrong ``at``, and a frame that verifies around it."""
    left = [times]
    real = compression.encode

    def encode(pages, codec):
        payload = real(pages, codec)
        if payload is None or not left[0]:
            return payload
        left[0] -= 1
        bad = bytearray(payload)
        bad[at] ^= 1
        return bytes(bad)

    monkeypatch.setattr(coding, "encode", encode)
    return left


async def test_decoded_bytes_that_do_not_verify_are_asked_for_again_and_then_fail(pair, monkeypatch):
    """The copy is of the same payload, so it is as bad: never a byte of it in the destination."""
    await pair.start()
    damaged(monkeypatch, 1, -1)  # in the lower plane: it decodes, to something else
    t = pair.transfer([PageList.of(bf16(64 << 10, 1))])
    with pytest.raises(IntegrityError, match=r"layer 0 tensor 0, \d+ bytes at offset 0: checksum failed 2 times"):
        await t.receiver.sealed()
    with pytest.raises(IntegrityError):
        await t.sender.seal()
    assert not any(t.into[0].tobytes())
    assert t.receiver.stats.corrupt_chunks == 2


@pytest.mark.parametrize(("at", "says"), [(0, "is not known here"), (5, "decodes|cannot be decoded|has|says")])
async def test_a_payload_that_is_none_fails_the_transfer(pair, monkeypatch, at, says):
    await pair.start()
    damaged(monkeypatch, 1, at)
    t = pair.transfer([PageList.of(bf16(64 << 10, 1))])
    with pytest.raises(ProtocolError):
        await t.receiver.sealed()
    assert not any(t.into[0].tobytes())
    with pytest.raises(ProtocolError):
        await t.sender.seal()


async def test_a_bit_flipped_on_the_wire_costs_one_copy():
    pair = await Pair("memory").start(connections=1)
    left = [1]

    def tap(data: bytearray) -> bytearray:
        head = data.find(b"KVT1\x01\x04")
        if head >= 0 and left[0] and head + 400 < len(data):
            data[head + 400] ^= 4
            left[0] -= 1
        return data

    for mine, _ in pair.network.streams:
        mine.tap(tap)
    t = pair.transfer([PageList.of(bf16(200_000, 1))])
    await sealed(t)
    assert t.receiver.stats.corrupt_chunks == 1
    assert t.sender.stats.resent_bytes > 0
    await pair.stop()


async def test_place_keeps_the_rules_of_claims(pair):
    """Decoded bytes go where any chunk may: inside their extent, not over what is applied, once."""
    await pair.start()
    manifest = Manifest.of_objects([1000, 4], transfer=new_transfer_id())
    target = np.zeros(1000, np.uint8)
    granted = {(0, 0): PageList.of(target), (1, 0): PageList.of(bytearray(4))}
    extents = [(e.layer, e.tensor) for e in manifest.extents]
    granted = dict(zip(extents, granted.values(), strict=True))
    receiver = pair.consumer.expect(manifest.transfer, Expectation(grant=lambda m: granted))
    sender = pair.link.open(manifest)
    await receiver.opened()
    into = receiver._into

    def place(offset: int, data: bytes, slot=extents[0]) -> Placed | Odd:
        header = Header(FrameType.DATA, Flag.CODED, manifest.transfer, *slot, 9, offset, 0, 0, 0)
        return into.place(header, bytearray(data))

    assert place(0, b"a" * 100) is Placed.DONE
    assert place(0, b"b" * 100) is Placed.THERE
    assert place(50, b"c" * 100) is Odd.OVERLAP
    assert place(990, b"d" * 11) is Odd.BOUNDS
    assert place(2**63 - 1, b"d" * 11) is Odd.BOUNDS
    assert place(0, b"e", (9, 9)) is Odd.SLOT
    assert bytes(target[:100]) == b"a" * 100
    assert not target[100:].any()
    assert into.applied() == [(*extents[0], 0, 100)]
    await sender.cancel()
    with pytest.raises(TransferCancelledError):
        await receiver.sealed()
    assert place(200, b"f" * 100) is Placed.LOST
    assert not target[100:].any()


async def test_copies_of_coded_chunks_cost_no_credit_and_what_is_beyond_it_is_refused(pair, monkeypatch):
    await pair.start()
    data, n = PageList.of(bf16(160_000, 1)), 40_000
    manifest = Manifest.of_objects([data.nbytes], transfer=new_transfer_id())
    slot = (manifest.extents[0].layer, manifest.extents[0].tensor)
    target = PageList.of(np.zeros(data.nbytes, np.uint8))
    receiver = pair.consumer.expect(
        manifest.transfer, Expectation(grant=lambda m: {slot: target}, window_bytes=2 * n, deadline_s=20.0)
    )
    sender = pair.link.open(manifest)
    await receiver.opened()
    held: list[asyncio.Future] = []
    monkeypatch.setattr(
        pair.consumer, "work", lambda run, payload: held.append(asyncio.get_running_loop().create_future()) or held[-1]
    )
    asked: list = []
    monkeypatch.setattr(receiver, "_ask", asked.extend)

    def coded(i: int) -> None:
        payload = compression.encode(data.slice(i * n, i * n + n), compression.Codec.LZ4)
        head = Header(FrameType.DATA, Flag.CODED, manifest.transfer, *slot, i, i * n, len(payload), 0, 0)
        receiver.on_coded(head, payload)

    coded(0)
    coded(1)
    coded(0)
    assert len(held) == 2, "a copy of what is being decoded"
    whole = Header(FrameType.DATA, Flag.CODED, manifest.transfer, *slot, 9, 0, 0, 0, 0)
    assert receiver._into.place(whole, bytearray(data.slice(0, n).tobytes())) is Placed.DONE  # by another connection
    coded(0)
    assert len(held) == 2, "a copy of what is in its place"
    coded(2)
    assert asked == [(*slot, 2 * n, 3 * n)], "within the credit, but what is held is bounded too"
    held[0].set_result(bytearray(data.slice(0, n).tobytes()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    coded(2)
    assert len(held) == 3
    assert receiver.stats.duplicate_bytes == 2 * n
    coded(3)
    with pytest.raises(LimitError, match="more coded bytes than its credit of 80000"):
        await receiver.sealed()
    assert target.tobytes() == data.slice(0, n).tobytes() + bytes(3 * n)
    for future in held[1:]:
        future.cancel()
    await sender.first_of(asyncio.get_running_loop().create_future())
    assert isinstance(sender.error, LimitError)


async def test_a_fast_link_is_left_alone():
    """Nothing is known of a new link, and loopback is faster than any codec."""
    pair = Pair("native")
    auto = replace(CONFIG, coding="auto", chunk_bytes=1 << 20)
    await pair.start(auto, auto)
    for seed in range(4):
        t = pair.transfer([PageList.of(bf16(8 << 20, seed))])
        await sealed(t)
        assert t.sender.stats.coded_raw_bytes <= 2 << 20  # at most what finds out
    await pair.stop()
