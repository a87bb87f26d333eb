"""A producer that must give its memory back in the middle of a transfer and goes on later."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import SpillFullError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.io.memory import MemoryNetwork
from kvtransport.receiver import Expectation
from tests.conftest import Cache, no_tasks_left


class Pair:
    async def start(self, spill: SpillPolicy) -> None:
        network = MemoryNetwork()
        self.producer = Endpoint(EndpointConfig(spill=spill), network=network)
        self.consumer = Endpoint(network=network)
        self.link = await self.producer.connect(*await self.consumer.listen(), connections=2)

    async def stop(self) -> None:
        await self.producer.close()
        await self.consumer.close()
        await no_tasks_left()


@pytest.fixture
async def pair():
    pair = Pair()
    yield pair
    await pair.stop()


NEVER = 1e9


async def test_after_evacuating_the_source_may_be_overwritten_and_the_transfer_goes_on(pair, hybrid, make_manifest):
    await pair.start(SpillPolicy(budget_bytes=64 << 20, after_s=NEVER, stalled_s=NEVER))
    manifest = make_manifest(1000)
    source, target = Cache(manifest, seed=3, page_bytes=5000), Cache(manifest, blank=True)
    expected = source.bytes()
    sender = pair.link.open(manifest)
    slots = list(source.pages)
    half = len(slots) // 2
    handovers = [sender.ready(*slot, source.pages[slot]) for slot in slots[:half]]
    await sender.evacuate()
    assert all(handover.done for handover in handovers)
    for slot in slots[:half]:  # another request's tokens are computed into the same blocks
        np.frombuffer(source.pages[slot].base, np.uint8)[:] = 0xEE
    assert sender.stats.spilled_bytes == sum(source.pages[slot].nbytes for slot in slots[:half])
    receiver = pair.consumer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=hybrid))
    for slot in slots[half:]:
        sender.ready(*slot, source.pages[slot])
    await asyncio.gather(sender.seal(), receiver.sealed())
    assert target.bytes() == expected
    assert pair.producer.spill_area.used_bytes == 0


async def test_without_room_to_evacuate_to_the_transfer_fails_and_the_source_is_free(pair, make_manifest):
    await pair.start(SpillPolicy(budget_bytes=256 << 10, after_s=NEVER, stalled_s=NEVER))
    manifest = make_manifest(4000)
    source = Cache(manifest)
    sender = pair.link.open(manifest)
    handovers = [sender.ready(*slot, source.pages[slot]) for slot in source.pages]
    await sender.evacuate()
    assert all(handover.done for handover in handovers)
    assert isinstance(sender.error, SpillFullError)
    assert "raise spill_bytes" in sender.error.message
    assert pair.producer.spill_area.used_bytes == 0


async def test_copies_in_flight_are_left_alone(pair, make_manifest):
    await pair.start(SpillPolicy(budget_bytes=64 << 20, after_s=NEVER, stalled_s=NEVER))
    manifest = make_manifest(1000)
    source = Cache(manifest)
    sender = pair.link.open(manifest)
    slot = next(iter(source.pages))
    handover = sender.ready(*slot, source.pages[slot], event=lambda: False)
    await sender.evacuate()
    assert not handover.done
    assert sender.stats.spilled_bytes == 0
    await sender.cancel("enough")
    assert handover.done


async def test_evacuating_an_ended_transfer_does_nothing(pair, make_manifest):
    await pair.start(SpillPolicy())
    sender = pair.link.open(make_manifest(100))
    await sender.cancel()
    await sender.evacuate()
