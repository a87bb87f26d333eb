"""All connections of a link lost, and found again: what was received stays, what is missing travels."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import (
    ConnectError,
    DeadlineError,
    Fault,
    IncarnationError,
    KVError,
    LimitError,
    PeerLostError,
    TransferCancelledError,
)
from kvtransport.flow.backoff import Backoff
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.io.memory import MemoryNetwork, MemoryStream
from kvtransport.io.tcp import TcpNetwork
from kvtransport.receiver import Expectation, Receiver
from tests.conftest import Cache, dial_into, no_tasks_left

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CHUNK = 64 << 10
CONFIG = EndpointConfig(
    chunk_bytes=CHUNK, keepalive_s=1, dead_after_s=5, reconnect_s=5, spill=SpillPolicy(budget_bytes=0)
)
SOON_S = 10.0
missed = Receiver.missed


def cut(*endpoints: Endpoint) -> None:
    """Every connection breaks, both sides notice, and what is under way is lost."""
    for endpoint in endpoints:
        for link in endpoint.links:
            for connection in list(link.connections):
                connection.fail(PeerLostError("the test pulled the plug"), abort=True)


class Watched(MemoryNetwork):
    """Notes when it was dialled, and leads nowhere while the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.dialled: list[float] = []
        self.unreachable = False

    async def connect(self, host: str, port: int) -> MemoryStream:
        self.dialled.append(time.monotonic())
        if self.unreachable:
            raise ConnectError(f"no way to {host}:{port}")
        return await super().connect(host, port)


class Pair:
    def __init__(self, network, config: EndpointConfig = CONFIG, acceptor: EndpointConfig | None = None) -> None:
        self.network = network
        self.dialler = Endpoint(config, network=network)
        self.acceptor = Endpoint(acceptor or config, network=network)

    async def start(self, connections: int = 2) -> Pair:
        self.address = await self.acceptor.listen("127.0.0.1", 0)
        self.link = await self.dialler.connect(*self.address, connections=connections)
        await self.whole(connections)
        return self

    async def whole(self, connections: int = 2) -> None:
        """Wait until both sides have all connections of the link."""
        async with asyncio.timeout(SOON_S):
            while [len(link.connections) for e in (self.dialler, self.acceptor) for link in e.links] != [
                connections
            ] * 2:
                await asyncio.sleep(0.002)

    async def stop(self) -> None:
        await self.dialler.close()
        await self.acceptor.close()
        await no_tasks_left()


@pytest.fixture(params=["tcp", "memory"])
async def pair(request):
    pair = await Pair(TcpNetwork() if request.param == "tcp" else MemoryNetwork()).start()
    yield pair
    await pair.stop()


@pytest.fixture
async def watched():
    pair = await Pair(Watched()).start()
    yield pair
    await pair.stop()


def begin(pair: Pair, manifest, layout, *, from_dialler: bool = True, **kwargs):
    source, target = Cache(manifest, seed=1), Cache(manifest, blank=True)
    consumer, link = (pair.acceptor, pair.link) if from_dialler else (pair.dialler, pair.acceptor.links[0])
    wanted = Expectation(grant=lambda m: target.pages, layout=layout, window_bytes=512 << 10, **kwargs)
    receiver = consumer.expect(manifest.transfer, wanted)
    sender = link.open(manifest)
    handovers = [sender.ready(*slot, pages) for slot, pages in source.pages.items()]
    return source, target, sender, receiver, handovers


async def moved(receiver, n: int) -> None:
    async with asyncio.timeout(SOON_S):
        while receiver.stats.moved_bytes < n:
            await asyncio.sleep(0)


@pytest.mark.parametrize("from_dialler", [True, False])
async def test_only_what_is_missing_travels(pair, from_dialler, hybrid, make_manifest):
    manifest = make_manifest(8000)
    source, target, sender, receiver, handovers = begin(pair, manifest, hybrid, from_dialler=from_dialler)
    cuts = 3
    for i in range(1, cuts + 1):
        await moved(receiver, manifest.total_bytes * i // (cuts + 2))
        cut(pair.dialler, pair.acceptor)
        assert sender.error is None
        assert receiver.error is None
        assert receiver.stats.moved_bytes < manifest.total_bytes
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), SOON_S)
    assert target.bytes() == source.bytes()
    for handover in handovers:
        assert handover.done
    # What had arrived whole is not sent again, not even because its acknowledgement was lost.
    assert receiver.stats.duplicate_bytes == 0
    assert receiver.stats.moved_bytes == manifest.total_bytes
    # What else went again was on its way: at most a window at each cut.
    assert sender.stats.resent_bytes <= cuts * (512 << 10)
    await pair.whole()


async def test_one_connection_of_a_link_is_replaced(pair, hybrid, make_manifest):
    manifest = make_manifest(8000)
    source, target, sender, receiver, _ = begin(pair, manifest, hybrid)
    await moved(receiver, manifest.total_bytes // 4)
    pair.link.connections[0].fail(PeerLostError("the test pulled the plug"), abort=True)
    await pair.whole()
    assert sorted(c.index for c in pair.link.connections) == [0, 1]
    assert sorted(c.index for c in pair.acceptor.links[0].connections) == [0, 1]
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), SOON_S)
    assert target.bytes() == source.bytes()


async def test_one_side_knows_of_the_loss_and_the_other_does_not(watched, hybrid, make_manifest):
    """The dialler's end breaks without a word to the acceptor: the new connection takes the place of the old."""
    manifest = make_manifest(4000)
    source, target, sender, receiver, _ = begin(watched, manifest, hybrid)
    await moved(receiver, manifest.total_bytes // 4)
    for mine, theirs in watched.network.streams:
        mine.other = theirs.other = None  # neither reset nor end reaches the other side
    cut(watched.dialler)
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), 3)  # far below dead_after_s
    assert target.bytes() == source.bytes()
    await watched.whole()


async def test_what_was_said_while_nobody_heard_is_said_again(watched, hybrid, make_manifest):
    """OPEN, credit, acknowledgements, cancel: each spoken into a link that is down."""
    network = watched.network
    network.unreachable = True
    cut(watched.dialler, watched.acceptor)
    opened = make_manifest(1000)
    source, target, sender, receiver, _ = begin(watched, opened, hybrid)
    sealing = asyncio.gather(sender.seal(), receiver.sealed())
    other = make_manifest(500)
    dropped = watched.link.open(other)
    await dropped.cancel("changed its mind")
    waiting = watched.acceptor.expect(other.transfer, Expectation(grant=lambda m: {}))
    await asyncio.sleep(0.1)
    assert not sealing.done()
    network.unreachable = False
    await asyncio.wait_for(sealing, SOON_S)
    assert target.bytes() == source.bytes()
    # Nothing of a transfer that was given up before its OPEN could leave is left over there.
    assert not watched.acceptor._waiting
    await waiting.cancel()


async def test_a_cancel_that_is_lost_is_repeated(watched, hybrid, make_manifest):
    _, _, sender, receiver, _ = begin(watched, make_manifest(8000), hybrid)
    await moved(receiver, CHUNK)
    watched.network.unreachable = True
    cut(watched.dialler, watched.acceptor)
    await sender.cancel("changed its mind")
    await asyncio.sleep(0.05)
    assert receiver.error is None
    watched.network.unreachable = False
    with pytest.raises(TransferCancelledError, match="changed its mind"):
        await asyncio.wait_for(receiver.sealed(), SOON_S)


async def test_a_call_waits_for_the_way_back_and_one_in_progress_fails(watched):
    calls = 0

    async def slow(link, args):
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(60)
        return {"calls": calls}

    watched.acceptor.handlers["slow"] = slow
    lost = asyncio.ensure_future(watched.link.call("slow"))
    while not calls:
        await asyncio.sleep(0)
    watched.network.unreachable = True
    cut(watched.dialler, watched.acceptor)
    with pytest.raises(PeerLostError) as caught:
        await lost
    assert caught.value.retryable
    later = asyncio.ensure_future(watched.link.call("slow"))
    with pytest.raises(DeadlineError):
        await watched.link.call("slow", timeout_s=0.05)
    assert not later.done()
    watched.network.unreachable = False
    assert await asyncio.wait_for(later, SOON_S) == {"calls": 2}


# -- no way back --------------------------------------------------------------------------------------------


async def test_no_way_back_in_time(hybrid, make_manifest):
    """Both sides give up by themselves after ``reconnect_s``; dialling backs off, with jitter."""
    config = EndpointConfig(chunk_bytes=CHUNK, reconnect_s=1.0)
    pair = await Pair(Watched(), config).start(connections=1)
    _, _, sender, receiver, handovers = begin(pair, make_manifest(8000), hybrid)
    await moved(receiver, CHUNK)
    pair.network.unreachable = True
    pair.network.dialled.clear()
    cut(pair.dialler, pair.acceptor)
    start = time.monotonic()
    for outcome in (sender.seal(), receiver.sealed()):
        with pytest.raises(PeerLostError, match="did not come back within 1 s: the test pulled the plug") as caught:
            await asyncio.wait_for(outcome, SOON_S)
        assert caught.value.fault is Fault.NETWORK
        assert caught.value.retryable
    assert 0.9 < time.monotonic() - start < 5
    assert all(h.done for h in handovers)
    assert pair.link.closed
    # 0.05 s doubling, each between half and all of it: 4 to 6 dials in a second.
    assert 3 <= len(pair.network.dialled) <= 6
    assert pair.network.dialled[0] - start > 0.02
    count = len(pair.network.dialled)
    await asyncio.sleep(0.3)
    assert len(pair.network.dialled) == count
    await pair.stop()


async def test_a_deadline_ends_the_waiting(watched, hybrid, make_manifest):
    manifest = make_manifest(1000)
    watched.network.unreachable = True
    cut(watched.dialler, watched.acceptor)
    receiver = watched.acceptor.expect(manifest.transfer, Expectation(grant=lambda m: {}, deadline_s=0.1))
    sender = watched.link.open(manifest, deadline_s=0.1)
    for outcome in (sender.accepted(), receiver.sealed()):
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(outcome, 2)
    assert not watched.link.closed


async def test_a_peer_that_is_gone_is_not_waited_for_long(hybrid, make_manifest):
    """Nobody listens there any more: far below ``reconnect_s`` that is an error."""
    pair = await Pair(TcpNetwork(), EndpointConfig(chunk_bytes=CHUNK, reconnect_s=60)).start()
    _, _, sender, receiver, _ = begin(pair, make_manifest(8000), hybrid)
    await moved(receiver, CHUNK)
    for listener in pair.acceptor._listeners:
        listener.close()
    cut(pair.acceptor)
    with pytest.raises(PeerLostError, match=r"is gone: cannot connect to 127.0.0.1:\d+: Connection refused"):
        await asyncio.wait_for(sender.seal(), SOON_S)
    await pair.stop()


async def test_a_peer_that_leaves_says_so(pair, hybrid, make_manifest):
    """In either direction, with data under way: nobody waits for a peer that closed on purpose."""
    for leaver in ("acceptor", "dialler"):
        manifest = make_manifest(8000)
        _, _, sender, receiver, _ = begin(pair, manifest, hybrid, from_dialler=leaver == "acceptor")
        await moved(receiver, CHUNK)
        start = time.monotonic()
        await (pair.acceptor.links[0] if leaver == "acceptor" else pair.link).close()  # the consumer
        with pytest.raises(PeerLostError, match="closed by its peer"):
            await asyncio.wait_for(sender.seal(), SOON_S)
        with pytest.raises(PeerLostError, match="closed by this side"):
            await receiver.sealed()
        assert time.monotonic() - start < 2  # far below reconnect_s
        assert pair.dialler.links == pair.acceptor.links == ()
        pair.link = await pair.dialler.connect(*pair.address, connections=2)
        await pair.whole()


# -- another incarnation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "memory"])
async def test_a_restarted_peer_is_a_clean_error_and_rejoins(kind, hybrid, make_manifest):
    """Only links with the one that restarted end; whoever dials it anew goes on, nobody else restarts."""
    pair = await Pair(TcpNetwork() if kind == "tcp" else MemoryNetwork()).start()
    bystander = Endpoint(CONFIG, network=pair.network)
    third = await bystander.connect(*await pair.dialler.listen("127.0.0.1", 0), connections=1)
    _, _, sender, receiver, handovers = begin(pair, make_manifest(8000), hybrid)
    await moved(receiver, CHUNK)
    for listener in pair.acceptor._listeners:
        listener.close()
    cut(pair.acceptor)  # it dies without a word
    pair.acceptor.closed = True
    reborn = Endpoint(CONFIG, network=pair.network)
    await reborn.listen(*pair.address)
    with pytest.raises(IncarnationError, match="restarted") as caught:
        await asyncio.wait_for(sender.seal(), SOON_S)
    assert caught.value.retryable
    assert all(h.done for h in handovers)
    assert pair.link.closed
    assert reborn.links == ()
    # Rejoined: a new link to the same address, in the same process.
    dead, pair.acceptor = pair.acceptor, reborn
    pair.link = await pair.dialler.connect(*pair.address, connections=2)
    source, target, sender, receiver, _ = begin(pair, make_manifest(1000), hybrid)
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), SOON_S)
    assert target.bytes() == source.bytes()
    assert not third.closed
    assert third.connections
    dead.closed = False
    for endpoint in (dead, bystander):
        await endpoint.close()
    await pair.stop()


async def test_a_link_that_has_ended_there_is_not_found_again(watched):
    """The acceptor gave the link up: who dials it again is told, and does not make half a link."""
    watched.network.unreachable = True
    cut(watched.dialler, watched.acceptor)
    watched.acceptor.links[0].end(PeerLostError("given up"))
    watched.network.unreachable = False
    error = await asyncio.wait_for(watched.link.wait_closed(), SOON_S)
    assert isinstance(error, PeerLostError)
    assert "has given this link up" in error.message
    assert watched.acceptor.links == ()


async def test_whoever_is_there_comes_before_who_may_come_back(hybrid):
    pair = await Pair(Watched(), CONFIG, EndpointConfig(max_links=1, reconnect_s=60)).start()
    late = Endpoint(CONFIG, network=pair.network)
    with pytest.raises(LimitError, match="1 links are open here already"):
        await late.connect(*pair.address, connections=1)
    pair.network.unreachable = True
    cut(pair.dialler, pair.acceptor)
    pair.network.unreachable = False
    pair.link.end(None)
    link = await late.connect(*pair.address, connections=1)
    assert [known.peer_incarnation for known in pair.acceptor.links] == [late.incarnation]
    await link.close()
    await late.close()
    await pair.stop()


async def test_nobody_takes_a_place_in_the_link_of_another(watched):
    """The id of a link alone does not let anybody in: it belongs to an incarnation."""
    stranger = Endpoint(CONFIG, network=watched.network)
    with pytest.raises(KVError, match="does not belong to the link it names"):
        await dial_into(stranger, watched.address, watched.link.id, index=0)
    await watched.whole()
    await stranger.close()


def test_back_off() -> None:
    policy = Backoff(first_s=0.05, factor=2.0, most_s=2.0)
    assert [policy.delay(n, 1.0) for n in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert policy.delay(0, 0.0) == 0.025
    assert policy.delay(10_000, 0.5) == 1.5


# -- given up before it began -----------------------------------------------------------------------------------


async def test_a_producer_is_told_that_its_consumer_gave_up_before_it_opened(pair, make_manifest):
    manifest = make_manifest(500)
    receiver = pair.acceptor.expect(manifest.transfer, Expectation(grant=lambda m: {}))
    await receiver.cancel("somebody else had it")
    sender = pair.link.open(manifest, deadline_s=60)
    with pytest.raises(TransferCancelledError, match="the consumer says: cancelled by this side: somebody else had it"):
        await asyncio.wait_for(sender.accepted(), SOON_S)
    assert not pair.acceptor._waiting


async def test_what_was_given_up_may_be_expected_again(pair, hybrid, make_manifest):
    manifest = make_manifest(500)
    await pair.acceptor.expect(manifest.transfer, Expectation(grant=lambda m: {})).cancel()
    source, target, sender, receiver, _ = begin(pair, manifest, hybrid)
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), SOON_S)
    assert target.bytes() == source.bytes()


async def test_a_consumer_is_told_that_its_producer_gave_up_before_the_open_arrived(watched, make_manifest):
    """Link down: the OPEN is never heard, the cancel is the first word about this transfer."""
    manifest = make_manifest(500)
    bound = watched.acceptor.expect(manifest.transfer, Expectation(grant=lambda m: {}), link=watched.acceptor.links[0])
    other = make_manifest(400)
    elsewhere = Endpoint(CONFIG, network=watched.network)
    third = await elsewhere.connect(*watched.address, connections=1)
    unrelated = watched.acceptor.expect(
        other.transfer,
        Expectation(grant=lambda m: {}),
        link=next(e for e in watched.acceptor.links if e.peer_incarnation == elsewhere.incarnation),
    )
    watched.network.unreachable = True
    cut(watched.dialler)
    for gone in (manifest, other):
        await watched.link.open(gone).cancel("changed its mind")
    watched.network.unreachable = False
    with pytest.raises(TransferCancelledError, match="changed its mind"):
        await asyncio.wait_for(bound.sealed(), SOON_S)
    # What is expected from somebody else is none of its business.
    assert unrelated.error is None
    await unrelated.cancel()
    await third.close()
    await elsewhere.close()


async def test_data_right_behind_the_handshake_of_a_replaced_connection_is_not_lost(monkeypatch, hybrid, make_manifest):
    """The link never goes down, so its producer sends on a new connection at once: here before the other side has it."""
    pair = await Pair(TcpNetwork()).start()
    strays = []
    monkeypatch.setattr(Receiver, "missed", lambda self, header: strays.append(header) or missed(self, header))
    join = pair.link.lanes.join
    monkeypatch.setattr(
        pair.link.lanes, "join", lambda connection: asyncio.get_running_loop().call_later(0.1, join, connection)
    )
    manifest = make_manifest(64_000)  # long enough to be under way still when the connection is back
    source, target, sender, receiver, _ = begin(pair, manifest, hybrid, from_dialler=False)
    await moved(receiver, CHUNK)
    pair.link.connections[0].fail(PeerLostError("the test pulled the plug"), abort=True)
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), SOON_S)
    assert target.bytes() == source.bytes()
    assert strays
    await pair.stop()
