"""Whole transfers between two endpoints: over TCP on loopback and over the in-memory network."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import (
    DeadlineError,
    DestinationError,
    Fault,
    FingerprintError,
    IntegrityError,
    KVError,
    LimitError,
    ManifestError,
    ParallelismError,
    PeerLostError,
    ProtocolError,
    RefusedError,
    TransferCancelledError,
)
from kvtransport.flow.spilling import SpillPolicy, WhenFull
from kvtransport.io.memory import MemoryNetwork
from kvtransport.io.tcp import TcpNetwork
from kvtransport.layout import CacheLayout
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from tests.conftest import Cache, no_tasks_left

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CONFIG = EndpointConfig(chunk_bytes=64 << 10, keepalive_s=0.2, dead_after_s=1.0)


class Pair:
    """Two endpoints and a link between them."""

    def __init__(self, network) -> None:
        self.network = network

    async def start(
        self, connections: int = 3, producer: EndpointConfig = CONFIG, consumer: EndpointConfig = CONFIG
    ) -> Pair:
        self.producer = Endpoint(producer, network=self.network)
        self.consumer = Endpoint(consumer, network=self.network)
        host, port = await self.consumer.listen("127.0.0.1", 0)
        self.link = await self.producer.connect(host, port, connections=connections)
        while not self.consumer.links or len(self.consumer.links[0].connections) < connections:
            await asyncio.sleep(0.001)
        return self

    async def stop(self) -> None:
        await self.producer.close()
        await self.consumer.close()
        await no_tasks_left()


@pytest.fixture(params=["tcp", "memory"])
async def pair(request):
    pair = Pair(TcpNetwork() if request.param == "tcp" else MemoryNetwork())
    yield pair
    await pair.stop()


def expect(pair: Pair, manifest: Manifest, target: Cache, layout: CacheLayout | None, **kwargs):
    kwargs.setdefault("deadline_s", 10.0)
    return pair.consumer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=layout, **kwargs))


def hand_over_all(sender, source: Cache, order=None):
    slots = list(source.pages)
    if order is not None:
        order.shuffle(slots)
    return [sender.ready(*slot, source.pages[slot]) for slot in slots]


@pytest.mark.parametrize("page_bytes", [0, 1152 * 16, 777])
async def test_every_byte_arrives_whatever_the_order(pair, hybrid, make_manifest, page_bytes):
    await pair.start()
    manifest = make_manifest(4000, checkpoints=[1024])
    source, target = Cache(manifest, seed=1, page_bytes=page_bytes), Cache(manifest, page_bytes=page_bytes, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    sender = pair.link.open(manifest)
    handovers = hand_over_all(sender, source, random.Random(3))
    completed = [layer async for layer in receiver.layers()]
    await sender.seal()
    await receiver.sealed()
    assert sorted(completed) == sorted(manifest.layers)
    assert target.bytes() == source.bytes()
    for handover in handovers:
        await handover.released()
    assert receiver.stats.moved_bytes == sender.stats.moved_bytes == manifest.total_bytes
    assert receiver.stats.checksums_verified == receiver.stats.chunks
    assert sender.stats.resent_bytes == 0


async def test_either_side_may_dial_and_direction_is_per_transfer(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest()
    source, target = Cache(manifest, seed=5), Cache(manifest, blank=True)
    receiver = pair.producer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=hybrid))
    sender = pair.consumer.links[0].open(manifest)
    hand_over_all(sender, source)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_a_layer_can_be_read_while_later_layers_are_not_even_computed(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(600)
    source, target = Cache(manifest, seed=2), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    sender = pair.link.open(manifest)
    for layer, extents in manifest.by_layer.items():
        waiting = asyncio.ensure_future(receiver.layer(layer))
        await asyncio.sleep(0)
        assert not waiting.done()
        for extent in extents:
            sender.ready(extent.layer, extent.tensor, source.pages[extent.layer, extent.tensor])
        await waiting
        for extent in extents:
            slot = (extent.layer, extent.tensor)
            assert target.pages[slot].tobytes() == source.pages[slot].tobytes()
    await sender.seal()
    await receiver.sealed()


async def test_chunked_prefill_hands_over_token_ranges(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(1000, block_tokens=16)
    source, target = Cache(manifest, seed=8), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid, block_tokens=16)
    sender = pair.link.open(manifest)
    for extent in manifest.extents:
        pages = source.pages[extent.layer, extent.tensor]
        for span in extent.spans:
            pieces = range(span.first, span.stop, 100) if span.tokens else [span.first]
            for first in pieces:
                tokens = min(100, span.stop - first)
                start, stop = extent.byte_range(first, tokens)
                sender.ready(extent.layer, extent.tensor, pages.slice(start, stop), first=first, tokens=tokens)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_an_open_nobody_expects_yet_waits_without_credit(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest()
    source, target = Cache(manifest, seed=2), Cache(manifest, blank=True)
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    await asyncio.sleep(0.05)
    assert sender.stats.moved_bytes == 0
    receiver = expect(pair, manifest, target, hybrid)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_an_open_nobody_ever_expects_ends_at_its_deadline_and_leaves_nothing(pair, make_manifest):
    await pair.start()
    sender = pair.link.open(make_manifest(), deadline_s=0.1)
    with pytest.raises(DeadlineError, match=r"not sealed within 0\.1 s"):
        await sender.accepted()
    await asyncio.sleep(0.05)
    assert not pair.consumer._waiting
    assert not pair.link._outgoing


async def test_waiting_opens_are_bounded(pair, make_manifest):
    await pair.start(consumer=EndpointConfig(max_waiting_opens=2))
    senders = [pair.link.open(make_manifest()) for _ in range(3)]
    errors = []
    for sender in senders:
        try:
            await asyncio.wait_for(sender.accepted(), 0.3)
        except (KVError, TimeoutError) as error:
            errors.append(error)
    refused = [e for e in errors if isinstance(e, KVError)]
    assert len(refused) == 1
    assert "2 opened transfers wait" in str(refused[0])
    assert refused[0].retryable


@pytest.mark.parametrize("chunk_bytes", [64 << 10, 1 << 20])
async def test_small_window_still_moves_everything(pair, hybrid, make_manifest, chunk_bytes):
    await pair.start(producer=EndpointConfig(chunk_bytes=chunk_bytes))
    manifest = make_manifest(3000)
    source, target = Cache(manifest, seed=4), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid, window_bytes=100_000)
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_data_beyond_the_credit_is_refused_and_written_nowhere(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(2000)
    source, target = Cache(manifest, seed=6), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid, window_bytes=32 << 10)
    sender = pair.link.open(manifest)
    await sender.accepted()
    sender._out.accept(64 << 10, 1 << 40)  # a sender that does not count
    blank = target.bytes()
    slot = max(source.pages, key=lambda slot: source.pages[slot].nbytes)
    sender.ready(*slot, source.pages[slot])
    with pytest.raises(LimitError, match="goes beyond the credit of 32768 bytes"):
        await receiver.sealed()
    await sender.first_of(asyncio.get_running_loop().create_future())
    assert "goes beyond the credit" in sender.error.message
    assert target.bytes() == blank


async def test_without_credit_ready_units_spill_and_their_memory_is_free(pair, hybrid, make_manifest):
    await pair.start(producer=EndpointConfig(spill=SpillPolicy(budget_bytes=64 << 20)))
    manifest = make_manifest(2000)
    source, target = Cache(manifest, seed=4, page_bytes=5000), Cache(manifest, blank=True)
    expected = source.bytes()
    sender = pair.link.open(manifest)  # nobody grants credit yet
    handovers = hand_over_all(sender, source)
    for handover in handovers:
        await asyncio.wait_for(handover.released(), 5)
    for pages in source.pages.values():  # the engine reuses its blocks
        np.frombuffer(pages.base, np.uint8)[:] = 0xEE
    assert pair.producer.spill_area.used_bytes >= manifest.total_bytes
    receiver = expect(pair, manifest, target, hybrid)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == expected
    assert sender.stats.spilled_bytes == manifest.total_bytes
    assert pair.producer.spill_area.used_bytes == 0


async def test_what_is_held_until_the_seal_is_not_copied_aside(pair, hybrid, make_manifest):
    await pair.start(producer=EndpointConfig(spill=SpillPolicy(budget_bytes=64 << 20)))
    manifest, other = make_manifest(2000), make_manifest(1000)
    source, target = Cache(manifest, seed=4, page_bytes=5000), Cache(manifest, blank=True)
    held, free = pair.link.open(manifest, held=True), pair.link.open(other)
    kept = hand_over_all(held, source)
    for handover in hand_over_all(free, Cache(other)):  # later, and aside already
        await asyncio.wait_for(handover.released(), 60)
    assert not any(h.done for h in kept)
    receiver = expect(pair, manifest, target, hybrid)
    await asyncio.gather(held.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()
    assert held.stats.spilled_bytes == 0
    assert free.stats.spilled_bytes == other.total_bytes
    await free.cancel()


async def test_a_full_spill_budget_waits_or_fails_as_configured(pair, hybrid, make_manifest):
    await pair.start(producer=EndpointConfig(spill=SpillPolicy(budget_bytes=1 << 20, when_full=WhenFull.FAIL)))
    manifest = make_manifest(4000)
    sender = pair.link.open(manifest)
    with pytest.raises(KVError, match="spill budget of 1048576 bytes is full"):
        hand_over_all(sender, Cache(manifest))  # said here when the stall is long enough already, else below
        await sender.accepted()
    await sender.cancel()  # waits for copies in progress, also when the transfer has failed already
    assert pair.producer.spill_area.used_bytes == 0


async def test_waiting_producer_goes_on_when_credit_comes(pair, hybrid, make_manifest):
    await pair.start(producer=EndpointConfig(spill=SpillPolicy(budget_bytes=1 << 20, when_full=WhenFull.WAIT)))
    manifest = make_manifest(4000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    sender = pair.link.open(manifest)
    handovers = hand_over_all(sender, source)
    await asyncio.sleep(0.1)
    assert not all(h.done for h in handovers)
    receiver = expect(pair, manifest, target, hybrid)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()
    assert all(h.done for h in handovers)


@pytest.mark.parametrize("side", ["producer", "consumer"])
async def test_no_byte_after_cancel(pair, hybrid, make_manifest, side):
    await pair.start()
    manifest = make_manifest(8000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid, window_bytes=400_000)
    sender = pair.link.open(manifest)
    handovers = hand_over_all(sender, source)
    while receiver.stats.moved_bytes < 500_000:
        await asyncio.sleep(0.0005)
    if side == "producer":
        await sender.cancel("the client went away")
    else:
        await receiver.cancel("the client went away")
    frozen = target.bytes()
    other = receiver.sealed() if side == "producer" else sender.seal()
    with pytest.raises(TransferCancelledError, match="the client went away") as caught:
        await asyncio.wait_for(other, 5)
    assert caught.value.fault is Fault.REMOTE
    await asyncio.sleep(0.05)
    if side == "consumer":
        assert target.bytes() == frozen
    for handover in handovers:  # at once, or when a copy in progress is done
        await asyncio.wait_for(handover.released(), 5)
    # the link is as good as new
    again = make_manifest(500)
    source, target = Cache(again, seed=9), Cache(again, blank=True)
    receiver = expect(pair, again, target, hybrid)
    sender = pair.link.open(again)
    hand_over_all(sender, source)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_cancelled_source_memory_is_not_read_again(pair, hybrid, make_manifest):
    """A frame half sent when its transfer is cancelled is finished from scratch: it must not verify at the other end."""
    await pair.start(connections=1)
    manifest = make_manifest(8000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    while receiver.stats.moved_bytes < 200_000:
        await asyncio.sleep(0)
    await sender.cancel()
    for pages in source.pages.values():
        np.frombuffer(pages.base, np.uint8)[:] = 0xEE
    with pytest.raises(TransferCancelledError):
        await asyncio.wait_for(receiver.sealed(), 5)
    for slot, pages in target.pages.items():
        assert b"\xee" * 64 not in pages.tobytes(), f"bytes written after cancel reached {slot}"


async def test_losing_a_connection_sends_only_its_chunks_again(hybrid, make_manifest):
    network = MemoryNetwork()
    pair = await Pair(network).start(connections=3)
    manifest = make_manifest(8000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    while receiver.stats.moved_bytes < 1_000_000:
        await asyncio.sleep(0)
    network.streams[1][0].abort()
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()
    assert 0 < sender.stats.resent_bytes < manifest.total_bytes // 4
    assert len(pair.link.connections) == 2
    await pair.stop()


async def test_a_dead_peer_is_an_error_with_its_fault(pair, hybrid, make_manifest):
    for_good = EndpointConfig(chunk_bytes=64 << 10, reconnect_s=0)
    await pair.start(producer=for_good, consumer=for_good)
    manifest = make_manifest(8000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    while receiver.stats.moved_bytes < 100_000:
        await asyncio.sleep(0)
    for connection in list(pair.link.connections):
        connection.stream.abort()
        connection.fail(PeerLostError("the test pulled the plug"))
    with pytest.raises(PeerLostError):
        await asyncio.wait_for(sender.seal(), 5)
    with pytest.raises(PeerLostError) as caught:
        await asyncio.wait_for(receiver.sealed(), 5)
    assert caught.value.fault is Fault.NETWORK
    assert caught.value.retryable
    assert not pair.consumer.links


async def test_a_frozen_peer_is_noticed_within_the_deadline(make_manifest):
    network = MemoryNetwork()
    pair = await Pair(network).start(connections=2)
    for mine, theirs in network.streams:
        theirs.hold(True)  # the peer's answers stay away, the connection stands
    with pytest.raises(KVError) as caught:
        await asyncio.wait_for(pair.link.call("anything", timeout_s=30), 5)
    assert caught.value.code == "peer_frozen"
    assert caught.value.fault is Fault.REMOTE
    await pair.stop()


def flip(network: MemoryNetwork, *, at: int, times: int, dialled: bool = True):
    """Flip one bit of the byte ``at`` bytes into what is sent, in ``times`` data frames."""
    left = [times]
    for mine, theirs in network.streams:

        def tap(data: bytearray, left=left) -> bytearray:
            head = data.find(b"KVT1\x01\x04")
            while head >= 0 and left[0]:
                if head + at < len(data):
                    data[head + at] ^= 0x10
                    left[0] -= 1
                head = data.find(b"KVT1\x01\x04", head + 64)
            return data

        (mine if dialled else theirs).tap(tap)


async def test_a_flipped_payload_bit_is_caught_and_sent_again_once(hybrid, make_manifest):
    network = MemoryNetwork()
    pair = await Pair(network).start(connections=2)
    manifest = make_manifest(2000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    flip(network, at=64 + 1000, times=1)
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()
    assert receiver.stats.corrupt_chunks == 1
    await pair.stop()


async def test_a_path_that_keeps_flipping_bits_fails_the_transfer_by_name(hybrid, make_manifest):
    network = MemoryNetwork()
    pair = await Pair(network).start(connections=2)
    manifest = make_manifest(2000)
    target = Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    flip(network, at=64 + 1000, times=10_000)
    sender = pair.link.open(manifest)
    hand_over_all(sender, Cache(manifest, seed=1))
    with pytest.raises(IntegrityError, match=r"layer \d+ tensor \d+, \d+ bytes at offset \d+: checksum failed 2 times"):
        await receiver.sealed()
    with pytest.raises(IntegrityError, match="the consumer says"):
        await sender.seal()
    await pair.stop()


async def test_a_flipped_header_bit_resets_the_connection_and_nothing_is_lost(hybrid, make_manifest):
    network = MemoryNetwork()
    stays_lost = replace(CONFIG, reconnect_s=0)
    pair = await Pair(network).start(connections=3, producer=stays_lost, consumer=stays_lost)
    manifest = make_manifest(2000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    flip(network, at=33, times=1)  # in the offset: the right bytes for the wrong place
    sender = pair.link.open(manifest)
    hand_over_all(sender, source)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()
    assert len(pair.link.connections) == 2
    await pair.stop()


async def test_a_smaller_destination_is_refused_before_a_byte_moves(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(1000)
    small = Cache(make_manifest(999), blank=True)
    receiver = expect(pair, manifest, small, hybrid)
    sender = pair.link.open(manifest)
    with pytest.raises(
        DestinationError, match=r"the destination of layer 5 tensor 0 holds 1022976 bytes, the transfer has 1024000"
    ):
        await receiver.sealed()
    with pytest.raises(DestinationError, match="the consumer says"):
        await sender.accepted()


async def test_another_model_is_refused_by_name(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(1000)
    other = CacheLayout("another-model", hybrid.groups)
    receiver = expect(pair, manifest, Cache(manifest, blank=True), other)
    sender = pair.link.open(manifest)
    with pytest.raises(FingerprintError, match="'another-model'"):
        await receiver.sealed()
    with pytest.raises(FingerprintError) as caught:
        await sender.accepted()
    assert caught.value.fault is Fault.LOCAL  # the consumer sees a remote fault, the producer its own


async def test_other_tensor_parallelism_is_refused_by_name(pair, hybrid, make_manifest):
    await pair.start()
    sharded = CacheLayout(hybrid.model, hybrid.groups, tp_size=2, tp_rank=1)
    manifest = make_manifest(1000, layout=sharded)
    receiver = expect(pair, manifest, Cache(manifest, blank=True), hybrid)
    pair.link.open(manifest)
    with pytest.raises(ParallelismError, match="tensor parallelism 2, this side 1"):
        await receiver.sealed()


async def test_a_manifest_that_contradicts_its_layout_is_refused(pair, hybrid, make_manifest):
    await pair.start()
    good = make_manifest(1000)
    bad = Manifest(good.transfer, good.fingerprint, 1000, good.extents[:-1])
    receiver = expect(pair, good, Cache(good, blank=True), hybrid)
    pair.link.open(bad)
    with pytest.raises(ManifestError, match="1 tensors of the layout are missing, the first is layer 6 tensor 1"):
        await receiver.sealed()


async def test_unchecked_transfers_only_where_both_sides_want_them(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(1000)
    receiver = expect(pair, manifest, Cache(manifest, blank=True), hybrid)
    pair.link.open(manifest, checksum=False)
    with pytest.raises(RefusedError, match="without checksums"):
        await receiver.sealed()
    manifest = make_manifest(1000)
    source, target = Cache(manifest, seed=3), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid, allow_unchecked=True)
    sender = pair.link.open(manifest, checksum=False)
    hand_over_all(sender, source)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()
    assert receiver.stats.checksums_verified == 0


async def test_a_refused_seal_is_the_producers_error(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(300)

    def refuse() -> None:
        raise RefusedError("the pool changed its mind", fault=Fault.LOCAL)

    receiver = expect(pair, manifest, Cache(manifest, blank=True), hybrid, on_seal=refuse)
    sender = pair.link.open(manifest)
    hand_over_all(sender, Cache(manifest))
    with pytest.raises(RefusedError, match="changed its mind"):
        await sender.seal()
    with pytest.raises(RefusedError):
        await receiver.sealed()


async def test_seal_names_what_was_never_handed_over(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(300)
    sender = pair.link.open(manifest)
    source = Cache(manifest)
    for slot in list(source.pages)[:-1]:
        sender.ready(*slot, source.pages[slot])
    with pytest.raises(ManifestError, match="bytes of 1 layers were never handed over, the first is layer 6"):
        await sender.seal()


async def test_wrong_units_are_refused_at_once(pair, make_manifest):
    await pair.start()
    manifest = make_manifest(300)
    sender = pair.link.open(manifest)
    good = Cache(manifest).pages[5, 0]
    with pytest.raises(DestinationError, match="the ready unit has 307200 bytes, the pages hold 10"):
        sender.ready(5, 0, PageList.of(bytearray(10)))
    with pytest.raises(KVError, match="layer 99 tensor 0 is not in the manifest"):
        sender.ready(99, 0, good)
    sender.ready(5, 0, good)
    with pytest.raises(KVError, match="handed over before"):
        sender.ready(5, 0, good)


async def test_units_wait_for_their_ready_event(pair, hybrid, make_manifest):
    await pair.start()
    manifest = make_manifest(500)
    source, target = Cache(manifest, seed=6), Cache(manifest, blank=True)
    receiver = expect(pair, manifest, target, hybrid)
    sender = pair.link.open(manifest)
    copied: set[tuple[int, int]] = set()
    for slot in source.pages:
        sender.ready(*slot, source.pages[slot], event=lambda slot=slot: slot in copied)
    await asyncio.sleep(0.05)
    assert sender.stats.moved_bytes == 0
    copied.update(source.pages)
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_many_transfers_share_a_link(pair, hybrid, make_manifest):
    await pair.start()

    async def one(i: int) -> None:
        manifest = make_manifest(200 + 37 * i)
        source, target = Cache(manifest, seed=i), Cache(manifest, blank=True)
        receiver = expect(pair, manifest, target, hybrid)
        sender = pair.link.open(manifest, priority=i % 3)
        hand_over_all(sender, source, random.Random(i))
        await asyncio.gather(sender.seal(), receiver.sealed())
        assert target.bytes() == source.bytes()

    await asyncio.gather(*(one(i) for i in range(24)))


@pytest.mark.parametrize("how", ["sealed", "cancelled", "failed"])
async def test_what_is_over_is_not_kept_alive_for_a_garbage_collector(pair, hybrid, make_manifest, how):
    await pair.start()
    manifest = make_manifest()
    source, target = Cache(manifest, seed=2), Cache(manifest, blank=True)
    ended = []

    def expected():
        # What is called at the end refers to the transfer, as a server's does.
        made = expect(pair, manifest, target, hybrid, on_end=lambda error: ended.append((error, made.stats)))
        return made

    gc.collect()
    gc.disable()
    try:
        receiver = expected()
        sender = pair.link.open(manifest)
        if how == "sealed":
            hand_over_all(sender, source)
            await asyncio.gather(sender.seal(), receiver.sealed())
        elif how == "cancelled":
            await sender.accepted()
            await sender.cancel("no more")
        else:
            await sender.accepted()
            receiver.fail(RefusedError("not this one"))
        while sender.error is None and not sender.stats.sealed_s:
            await asyncio.sleep(0.001)
        while not ended:
            await asyncio.sleep(0.001)
        left = [weakref.ref(sender), weakref.ref(receiver)]
        ended.clear()
        del sender, receiver
        for _ in range(200):
            if not any(ref() for ref in left):
                break
            await asyncio.sleep(0.01)
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


async def test_calls(pair):
    await pair.start()

    async def echo(link, args):
        return {"echo": args["x"]}

    async def broken(link, args):
        raise ZeroDivisionError("oops")

    async def refuse(link, args):
        raise RefusedError("not today", fault=Fault.LOCAL)

    async def slow(link, args):
        await asyncio.sleep(30)

    pair.consumer.handlers.update(echo=echo, broken=broken, refuse=refuse, slow=slow)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    assert await pair.link.call("echo", {"x": [1, b"2", "three"]}) == {"echo": [1, b"2", "three"]}
    with pytest.raises(KVError, match="'broken' failed: ZeroDivisionError: oops"):
        await pair.link.call("broken")
    with pytest.raises(RefusedError, match="not today") as caught:
        await pair.link.call("refuse")
    assert caught.value.fault is Fault.REMOTE
    with pytest.raises(ProtocolError, match="no verb 'nonsense'"):
        await pair.link.call("nonsense")
    with pytest.raises(DeadlineError, match=r"did not answer 'slow' within 0\.05 s"):
        await pair.link.call("slow", timeout_s=0.05)


async def test_data_for_a_transfer_that_was_never_accepted_ends_the_connection(pair, make_manifest):
    from kvtransport.connection import data_head

    await pair.start(connections=1)
    pages = PageList.of(bytearray(b"x" * 100))
    head = data_head(new_transfer_id(), 0, 0, 0, 0, pages, checksum=True)
    pair.link.connections[0].send_control(head + pages.tobytes())
    pair.link.lanes.schedule()
    error = await asyncio.wait_for(pair.link.wait_closed(), 5)
    assert "never accepted" in str(error)
