"""Small transfers that travel in their OPEN: one round trip, and the same rules as for any other."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import pytest

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import Fault, KVError, LimitError, ManifestError, RefusedError, TransferCancelledError
from kvtransport.flow.whole import (
    LOCAL_BYTES,
    MAX_MANIFEST,
    MOST_BYTES,
    TOGETHER_BYTES,
    most_whole,
    travels_whole,
)
from kvtransport.io.memory import MemoryNetwork
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from kvtransport.tls import TlsConfig
from kvtransport.wire import bodies
from kvtransport.wire.frames import FrameType, Limits, encode_control
from tests.conftest import no_tasks_left

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CONFIG = EndpointConfig(keepalive_s=30.0, dead_after_s=60.0)


class Ends:
    """Two endpoints, a link, and the transfers' frames that each side sent, by type."""

    def __init__(self, network, monkeypatch, producer=None, consumer=None) -> None:
        self.network, self.config = network, (producer or {}, consumer or {})
        self.said: list[str] = []
        send = Link.send

        def noted(link, frame, via=None):
            if any(frame[8:24]):
                self.said.append(FrameType(frame[5]).name)
            return send(link, frame, via)

        monkeypatch.setattr(Link, "send", noted)

    async def start(self, producer: EndpointConfig = CONFIG, consumer: EndpointConfig = CONFIG) -> Ends:
        self.producer, self.consumer = (
            Endpoint(dataclasses.replace(config, **more), network=self.network)
            for config, more in zip((producer, consumer), self.config, strict=True)
        )
        host, port = await self.consumer.listen("127.0.0.1", 0)
        self.link = await self.producer.connect(host, port, connections=2)
        return self

    def transfer(self, *sizes: int, expected: bool = True, **kwargs) -> Transfer:
        return Transfer(self, sizes, expected, kwargs)


class Transfer:
    """Random bytes at one end, blank memory in scattered pages at the other."""

    def __init__(self, ends: Ends, sizes, expected, kwargs) -> None:
        self.ends, self.kwargs = ends, kwargs
        self.manifest = Manifest.of_objects(sizes, transfer=new_transfer_id())
        self.source = {slot: os.urandom(e.nbytes) for slot, e in self.manifest.by_slot.items()}
        self.memory = bytearray(2 * sum(sizes) + 2 * len(sizes))
        self.target: dict[tuple[int, int], PageList] = {}
        at = 0
        for slot, data in self.source.items():
            half = len(data) // 2
            self.target[slot] = PageList(self.memory, [(at + half + 1, half), (at, len(data) - half)])
            at += 2 * len(data) + 2
        if expected:
            self.expect()

    def expect(self) -> None:
        self.receiver = self.ends.consumer.expect(
            self.manifest.transfer, Expectation(grant=lambda _: self.target, deadline_s=30.0, **self.kwargs)
        )

    def open(self, **kwargs) -> None:
        self.sender = self.ends.link.open(self.manifest, deadline_s=30.0, **kwargs)
        self.units = [self.sender.ready(*slot, PageList.of(data)) for slot, data in self.source.items()]

    async def arrives(self) -> None:
        await asyncio.gather(self.sender.seal(), self.receiver.sealed())
        assert {slot: pages.tobytes() for slot, pages in self.target.items()} == self.source
        for unit in self.units:
            await unit.released()
        for stats in (self.sender.stats, self.receiver.stats):
            assert stats.moved_bytes == stats.total_bytes == self.manifest.total_bytes
            assert stats.sealed_s is not None

    @property
    def blank(self) -> bool:
        return not any(self.memory)


@pytest.fixture(params=["tcp", "tls", "event loop", "memory"])
async def ends(request, monkeypatch, pki):
    network = MemoryNetwork() if request.param == "memory" else None
    config = [{}, {}]
    if request.param == "tls":
        config = [{"tls": TlsConfig(pki / "ca.pem", pki / f"{who}.pem", pki / f"{who}.key")} for who in ("alice", "n1")]
    if request.param == "event loop":
        config = [{"io_threads": 0}] * 2
    ends = Ends(network, monkeypatch, *config)
    yield ends
    await ends.producer.close()
    await ends.consumer.close()
    await no_tasks_left()


@pytest.mark.parametrize("sizes", [(1,), (LOCAL_BYTES,), (0, 7, 0, 3000), (10,) * 130])
async def test_a_small_transfer_is_two_frames(ends, sizes):
    await ends.start()
    transfer = ends.transfer(*sizes)
    transfer.open()
    await transfer.arrives()
    assert ends.said == ["OPEN", "ACK"]
    assert [layer async for layer in transfer.receiver.layers()] != []
    assert all(times.acked_s is not None for times in transfer.sender.stats.layers.values())
    assert all(times.applied_s is not None for times in transfer.receiver.stats.layers.values())
    assert not ends.link._outgoing
    assert not ends.consumer.links[0]._incoming


async def test_a_task_that_seals_in_its_first_turn_is_early_enough(ends):
    await ends.start()
    transfer = ends.transfer(500, 500)
    transfer.sender = ends.link.open(transfer.manifest)

    async def produce() -> None:
        transfer.units = [transfer.sender.ready(*slot, PageList.of(data)) for slot, data in transfer.source.items()]
        await transfer.sender.seal()

    task = asyncio.create_task(produce())
    await task
    await transfer.arrives()
    assert ends.said == ["OPEN", "ACK"]


@pytest.mark.parametrize("why", ["large", "late unit", "late seal", "event", "switched off", "peer has small limits", "own small limits", "capped"])
async def test_any_other_goes_the_long_way(ends, why):
    producer, consumer = CONFIG, CONFIG
    if why == "switched off":
        producer = EndpointConfig(whole_bytes=0)
    if why == "peer has small limits":
        consumer = EndpointConfig(limits=Limits(open=64 << 10))
    if why == "own small limits":
        producer = EndpointConfig(limits=Limits(open=64 << 10))
    if why == "capped":
        producer = EndpointConfig(tenant_bytes_per_s={"t": 1e9})
    await ends.start(producer, consumer)
    transfer = ends.transfer(LOCAL_BYTES + 1 if why == "large" else 1000, 10)
    slots = list(transfer.source)
    sender = transfer.sender = ends.link.open(transfer.manifest, tenant="t")
    ready = asyncio.Event()

    def hand_over(slot, **kwargs):
        return sender.ready(*slot, PageList.of(transfer.source[slot]), **kwargs)

    transfer.units = [hand_over(slots[0], event=ready.is_set if why == "event" else None)]
    if why == "late unit":
        await sender.accepted()
    transfer.units.append(hand_over(slots[1]))
    if why == "late seal":
        await sender.accepted()
    sealing = asyncio.ensure_future(sender.seal())
    await sender.accepted()
    ready.set()
    await transfer.arrives()
    await sealing
    assert "ACCEPT" in ends.said
    assert "SEAL" in ends.said


async def test_one_that_nobody_expects_yet_waits(ends):
    await ends.start()
    transfer = ends.transfer(2000, expected=False)
    transfer.open()
    sealing = asyncio.ensure_future(transfer.sender.seal())
    while not ends.consumer._waiting:
        await asyncio.sleep(0.001)
    assert not sealing.done()
    assert transfer.blank
    transfer.expect()
    await transfer.arrives()
    await sealing
    assert not ends.consumer._waiting


async def test_what_waits_is_bounded_in_bytes(ends):
    await ends.start(consumer=EndpointConfig(max_waiting_bytes=5000))
    transfers = [ends.transfer(2000, expected=False) for _ in range(3)]
    for transfer in transfers:
        transfer.open()
    sealing = [asyncio.ensure_future(transfer.sender.seal()) for transfer in transfers]
    done, _ = await asyncio.wait(sealing, return_when=asyncio.FIRST_COMPLETED)
    [refused] = done
    with pytest.raises(LimitError, match="2 opened transfers wait"):
        refused.result()
    for transfer in transfers:
        await transfer.sender.cancel()
    await asyncio.gather(*sealing, return_exceptions=True)


async def test_of_many_at_once_some_go_the_long_way(ends):
    """What is copied, and needs no credit, is bounded; and what it was counted as is given back, however it ends."""
    await ends.start(consumer=EndpointConfig(max_waiting_opens=10_000))
    n = TOGETHER_BYTES // LOCAL_BYTES + 3
    transfers = [ends.transfer(LOCAL_BYTES, expected=False) for _ in range(n)]
    for transfer in transfers:
        transfer.open()
    sealing = [asyncio.ensure_future(transfer.sender.seal()) for transfer in transfers]
    while len(ends.consumer._waiting) < n:
        await asyncio.sleep(0.001)
    assert ends.link.in_open_bytes == TOGETHER_BYTES
    await transfers[0].sender.cancel()
    for transfer in transfers[1:]:
        transfer.expect()
    await asyncio.gather(*(transfer.arrives() for transfer in transfers[1:]))
    await asyncio.gather(*sealing, return_exceptions=True)
    assert ends.said.count("ACCEPT") == ends.said.count("SEAL") == 3
    assert ends.link.in_open_bytes == 0
    assert all(transfer.sender._in_open in (None, []) for transfer in transfers)


@pytest.mark.parametrize("what", ["grant", "seal"])
async def test_refusing_it_writes_nothing_or_is_the_producers_error(ends, what):
    await ends.start()

    def refuse(*_):
        raise RefusedError("no room today", fault=Fault.LOCAL)

    transfer = ends.transfer(300, **({"on_seal": refuse} if what == "seal" else {}), expected=what == "seal")
    if what == "grant":
        transfer.receiver = ends.consumer.expect(transfer.manifest.transfer, Expectation(grant=refuse))
    transfer.open()
    with pytest.raises(RefusedError, match="no room today"):
        await transfer.sender.seal()
    with pytest.raises(RefusedError, match="no room today"):
        await transfer.receiver.sealed()
    assert transfer.blank or what == "seal"
    for unit in transfer.units:
        await unit.released()


@pytest.mark.parametrize("off", [-1, 1])
async def test_a_wrong_length_is_refused_and_written_nowhere(ends, off):
    await ends.start()
    transfer = ends.transfer(300)
    body = bodies.Open.of(transfer.manifest.encode(), deadline_s=5.0, chunk_bytes=1 << 20, whole=bytes([1]) * (300 + off))
    ends.link.send(encode_control(FrameType.OPEN, body, transfer=transfer.manifest.transfer))
    with pytest.raises(ManifestError, match=f"the OPEN carries {300 + off} bytes, the transfer that it names has 300"):
        await transfer.receiver.sealed()
    assert transfer.blank


async def test_data_for_it_has_no_place(ends):
    """The engine knows nothing of it: what comes as DATA beside it ends the connection, and touches no memory."""
    await ends.start()
    transfer = ends.transfer(300)
    transfer.open()
    await transfer.arrives()
    before = bytes(transfer.memory)
    ends.said.clear()
    again = ends.transfer(300)
    out = ends.link.lanes.outgoing(again, again.manifest.transfer, [(0, 0)], priority=0, checksum=True)
    out.accept(1 << 20, 1 << 20)
    out.add(0, 0, 0, PageList.of(again.source[0, 0]))
    ends.link.lanes.schedule()
    while len(ends.consumer.links[0].connections) == 2:
        await asyncio.sleep(0.001)
    out.close()
    assert again.blank
    assert bytes(transfer.memory) == before
    await again.receiver.cancel()


async def test_cancelled_before_its_open_has_left(ends):
    await ends.start()
    transfer = ends.transfer(300)
    transfer.open()
    sealing = asyncio.ensure_future(transfer.sender.seal())
    await transfer.sender.cancel("changed my mind")
    with pytest.raises(TransferCancelledError):
        await sealing
    with pytest.raises(KVError):
        await transfer.receiver.sealed()
    assert "OPEN" not in ends.said
    assert transfer.blank
    assert all(unit.done for unit in transfer.units)


async def test_a_consumer_that_would_rather_have_it_the_long_way(ends, monkeypatch):
    """It may answer ACCEPT, as to any OPEN."""
    await ends.start()
    transfer = ends.transfer(3000, 20)
    on_open = type(transfer.receiver).on_open

    def forgetful(receiver, link, header, body):
        on_open(receiver, link, header, bodies.Open.of(body.manifest, deadline_s=5.0, chunk_bytes=body.chunk_bytes))

    monkeypatch.setattr(type(transfer.receiver), "on_open", forgetful)
    transfer.open()
    await transfer.arrives()
    assert {"OPEN", "ACCEPT", "SEAL"} <= set(ends.said)
    assert ends.link.in_open_bytes == 0


async def test_repeated_it_is_answered_again(ends):
    """Its answer may be lost with a connection."""
    await ends.start()
    transfer = ends.transfer(3000)
    transfer.open()
    await transfer.arrives()
    sender = ends.link.open(Manifest.of_objects([3000], transfer=transfer.manifest.transfer))
    sender.ready(0, 0, PageList.of(bytes(3000)))
    await sender.seal()
    assert {slot: pages.tobytes() for slot, pages in transfer.target.items()} == transfer.source


def test_how_much_travels_whole():
    assert most_whole(None, None) == most_whole(None, 0.0001) == LOCAL_BYTES
    assert most_whole(None, 0.02) == MOST_BYTES == bodies.MAX_WHOLE
    assert [most_whole(n, 0.02) for n in (0, 5, 1 << 30)] == [0, 5, MOST_BYTES]
    fits = {"most": 100, "capped": False}
    assert travels_whole(100, MAX_MANIFEST, **fits)
    assert not travels_whole(101, 10, **fits)
    assert not travels_whole(0, 10, **fits)
    assert not travels_whole(100, MAX_MANIFEST + 1, **fits)
    assert not travels_whole(100, 10, most=100, capped=True)
    assert travels_whole(100, 10, others=TOGETHER_BYTES - 100, **fits)
    assert not travels_whole(100, 10, others=TOGETHER_BYTES - 99, **fits)
