"""Whole transfers over simulated paths of known bandwidth, on a virtual clock: what is copied aside, and when it is over."""

from __future__ import annotations

import random

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation
from kvtransport.sender import Sender
from tests.sim.transport.loop import VirtualLoop
from tests.sim.transport.network import Path, SimNetwork

CHUNK = 64 << 10


def transfer(rates: list[float], nbytes: int, spill: SpillPolicy | None = None) -> tuple[float, Sender]:
    """Send ``nbytes`` over one connection per rate (bytes a second); returns the seconds from OPEN to sealed."""
    loop = VirtualLoop()
    loop.submit = lambda run, args: loop.call_soon(run)
    network = SimNetwork(loop, random.Random(1), Path(capacity=2 * CHUNK, packet=CHUNK // 4))
    config = EndpointConfig(
        chunk_bytes=CHUNK, keepalive_s=1e3, dead_after_s=1e4, spill=spill or SpillPolicy(budget_bytes=0)
    )
    source, target = random.Random(2).randbytes(nbytes), bytearray(nbytes)

    async def main() -> tuple[float, Sender]:
        producer = Endpoint(config, network=network.of("producer"), entropy=random.Random(3).randbytes)
        consumer = Endpoint(config, network=network.of("consumer"), entropy=random.Random(4).randbytes)
        host, port = await consumer.listen("consumer", 0)
        link = await producer.connect(host, port, connections=len(rates))
        for (mine, _), rate in zip(network.streams, rates, strict=True):
            mine.path = Path(capacity=2 * CHUNK, packet=CHUNK // 4, bytes_per_s=rate)
        manifest = Manifest.of_objects([nbytes], transfer=bytes(range(16)))
        consumer.expect(
            manifest.transfer,
            Expectation(grant=lambda _: {(0, 0): PageList.of(target)}, deadline_s=1e3, window_bytes=1 << 30),
        )
        started = loop.time()
        sender = link.open(manifest, deadline_s=1e3)
        sender.ready(0, 0, PageList.of(source))
        await sender.seal()
        seconds = loop.time() - started
        await producer.close()
        await consumer.close()
        return seconds, sender

    try:
        seconds, sender = loop.run_until_complete(main())
    finally:
        network.silence()
        loop.close()
    assert target == source
    return seconds, sender


def test_a_slow_transfer_that_flows_is_not_copied_aside():
    seconds, sender = transfer([1e6], 2 << 20, SpillPolicy(budget_bytes=64 << 20))
    assert seconds > 2  # eight times the age at which a unit that stands still is copied aside
    assert sender.stats.spilled_bytes == 0


def test_a_transfer_that_stands_still_is_copied_aside():
    # A chunk takes 0.66 s: as long as that nothing is acknowledged.
    _, sender = transfer([1e5], 4 * CHUNK, SpillPolicy(budget_bytes=64 << 20))
    assert sender.stats.spilled_bytes == 4 * CHUNK
