"""Connections that die with acknowledgements, not data, on them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvtransport import spill
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import ArenaError, PeerLostError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.io.memory import MemoryNetwork
from kvtransport.receiver import Expectation
from tests.conftest import Cache, no_tasks_left

CONFIG = EndpointConfig(chunk_bytes=64 << 10, keepalive_s=5, dead_after_s=60, spill=SpillPolicy(budget_bytes=0))


@pytest.fixture
async def ends():
    network = MemoryNetwork()
    async with Endpoint(CONFIG, network=network) as producer, Endpoint(CONFIG, network=network) as consumer:
        link = await producer.connect(*await consumer.listen(), connections=2)
        while not consumer.links or len(consumer.links[0].connections) < 2:
            await asyncio.sleep(0)
        yield network, consumer, link
    await no_tasks_left()


async def released(handovers) -> None:
    for handover in handovers:
        await asyncio.wait_for(handover.released(), 5)


def lose(network: MemoryNetwork, endpoint: Endpoint, index: int) -> None:
    """The accepting end of a connection resets it; what it had sent and nobody has read is gone."""
    stream = network.streams[index][1]
    for link in endpoint.links:
        for connection in list(link.connections):
            if connection.stream is stream:
                connection.fail(PeerLostError("the test pulled the plug"), abort=True)


async def test_acknowledgements_lost_with_a_connection_are_said_again(ends, hybrid, make_manifest):
    """All data crosses, the later acknowledgements are held up on one connection, which then dies.

    What is said again comes joined: ranges of which the producer knows the first part.
    """
    network, consumer, link = ends
    manifest = make_manifest(4000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    receiver = consumer.expect(
        manifest.transfer, Expectation(grant=lambda m: target.pages, layout=hybrid, window_bytes=64 << 20)
    )
    sender = link.open(manifest)
    await sender.accepted()
    handovers = [sender.ready(*slot, pages) for slot, pages in source.pages.items()]
    while receiver.stats.moved_bytes < manifest.extent(5, 0).nbytes // 2:
        await asyncio.sleep(0)
    network.streams[0][1].hold(True)  # an idle link says everything on its first connection
    while receiver.stats.moved_bytes < manifest.total_bytes:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert not all(h.done for h in handovers)  # or nothing was held up, and this test shows nothing
    lose(network, consumer, 0)
    # Not sealed yet: a prefill that waits for its memory would stand still here for ever.
    await released(handovers)
    assert all(times.acked_s is not None for times in sender.stats.layers.values())
    assert set(sender._unacked_by_layer.values()) == {0}  # nothing was counted twice
    assert sender.stats.resent_bytes < manifest.total_bytes
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == source.bytes()


async def test_a_unit_is_not_released_by_acknowledging_half_of_it_twice(ends, hybrid, make_manifest):
    _, consumer, link = ends
    manifest = make_manifest(4000)
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    applied: list[tuple[int, int]] = []
    receiver = consumer.expect(
        manifest.transfer,
        Expectation(
            grant=lambda m: target.pages,
            layout=hybrid,
            window_bytes=256 << 10,
            on_range=lambda layer, tensor, start, stop: applied.append((start, stop)),
        ),
    )
    sender = link.open(manifest)
    await sender.accepted()
    unit = sender.ready(5, 0, source.pages[5, 0])
    while not applied:
        await asyncio.sleep(0)
    for _ in range(50):  # the same news over and over
        receiver.acknowledge([(5, 0, *applied[0])])
        receiver._flush_acks()
    while not sender.stats.moved_bytes > 0:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not unit.done or receiver.stats.moved_bytes == unit.pages.nbytes
    await released([unit])
    assert receiver.stats.moved_bytes == manifest.extent(5, 0).nbytes
    await sender.cancel()


async def test_a_transfer_expected_over_a_link_ends_with_it(hybrid, make_manifest):
    network = MemoryNetwork()
    config = EndpointConfig(reconnect_s=0)
    async with Endpoint(config, network=network) as producer, Endpoint(config, network=network) as consumer:
        await producer.connect(*await consumer.listen(), connections=2)
        while len(consumer.links[0].connections) < 2:
            await asyncio.sleep(0)
        theirs = consumer.links[0]
        receiver = consumer.expect(
            make_manifest(100).transfer, Expectation(grant=lambda m: {}, layout=hybrid, deadline_s=60), link=theirs
        )
        lose(network, consumer, 0)
        lose(network, consumer, 1)
        with pytest.raises(PeerLostError):
            await asyncio.wait_for(receiver.sealed(), 5)
        with pytest.raises(PeerLostError):
            consumer.expect(make_manifest(10).transfer, Expectation(grant=lambda m: {}), link=theirs)


async def test_no_memory_to_spill_into_costs_the_spilling_and_nothing_else(monkeypatch, hybrid, make_manifest):
    def refuse(*args, **kwargs):
        raise ArenaError("no arena: asked for 1 EiB")

    monkeypatch.setattr(spill, "Arena", refuse)
    network = MemoryNetwork()
    config = EndpointConfig(spill=SpillPolicy(budget_bytes=1 << 20, stalled_s=0.02))
    async with Endpoint(config, network=network) as producer, Endpoint(network=network) as consumer:
        link = await producer.connect(*await consumer.listen(), connections=2)
        manifest = make_manifest(1000)
        source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
        sender = link.open(manifest)
        handovers = [sender.ready(*slot, pages) for slot, pages in source.pages.items()]
        with pytest.warns(RuntimeWarning, match="nothing will be spilled: no arena: asked for 1 EiB"):
            await asyncio.sleep(0.1)
        assert not any(h.done for h in handovers)
        receiver = consumer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=hybrid))
        await asyncio.gather(sender.seal(), receiver.sealed())
        assert target.bytes() == source.bytes()
        assert sender.stats.spilled_bytes == 0


async def test_a_source_is_not_read_for_an_old_copy_once_a_new_one_is_acknowledged(hybrid, make_manifest):
    """A chunk stands half sent on one connection, is asked for again, and arrives over another: its memory is given back."""
    network = MemoryNetwork()
    config = EndpointConfig(chunk_bytes=1 << 20, spill=SpillPolicy(budget_bytes=0))
    async with Endpoint(config, network=network) as producer, Endpoint(config, network=network) as consumer:
        link = await producer.connect(*await consumer.listen(), connections=2)
        manifest = make_manifest(4000)
        source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
        receiver = consumer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=hybrid))
        sender = link.open(manifest)
        await sender.accepted()
        for stream, _ in network.streams:
            stream.hold(True)
        size = manifest.extent(5, 0).nbytes
        unit = sender.ready(5, 0, source.pages[5, 0])
        while not all(c.sending for c in link.connections):
            await asyncio.sleep(0)
        first, second = link.connections
        network.streams[1][0].hold(False)
        receiver._ask([(5, 0, 0, size)])
        await asyncio.wait_for(unit.released(), 5)
        assert receiver.stats.moved_bytes == size
        base = source.pages[5, 0].base
        np.asarray(base)[:] = 0xEE  # the caller's again
        assert first.sending is not None
        assert first.sending.pages.base is not base
        network.streams[0][0].hold(False)
        for slot, pages in source.pages.items():
            if slot != (5, 0):
                sender.ready(*slot, pages)
        await asyncio.gather(sender.seal(), receiver.sealed())
        assert target.bytes()[5, 0] == Cache(manifest, seed=1).bytes()[5, 0]
        assert second in link.connections


async def test_chunks_on_a_stalled_connection_go_over_the_others(hybrid, make_manifest):
    """It is not dead: a path that delivers nothing for a while. Without takeover the transfer would wait for it."""
    network = MemoryNetwork()
    config = EndpointConfig(chunk_bytes=64 << 10, keepalive_s=0.2, dead_after_s=60, spill=SpillPolicy(budget_bytes=0))
    async with Endpoint(config, network=network) as producer, Endpoint(config, network=network) as consumer:
        link = await producer.connect(*await consumer.listen(), connections=2)
        while not consumer.links or len(consumer.links[0].connections) < 2:
            await asyncio.sleep(0)
        manifest = make_manifest(8000)
        source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
        receiver = consumer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=hybrid))
        sender = link.open(manifest)
        await sender.accepted()
        network.streams[0][0].hold(True)
        for slot, pages in source.pages.items():
            sender.ready(*slot, pages)
        await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), 10)
        assert target.bytes() == source.bytes()
        assert len(link.connections) == 2
        assert 0 < sender.stats.resent_bytes < manifest.total_bytes // 2
        frozen = target.bytes()
        network.streams[0][0].hold(False)  # the old copies come at last
        await asyncio.sleep(0.05)
        assert target.bytes() == frozen
        assert len(link.connections) == 2
