"""Peers that are processes of their own: killed, frozen, stalled, or no peers at all."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtransport import sync
from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import DeadlineError, Fault, KVError, PeerFrozenError, PeerLostError
from kvtransport.flow.spilling import SpillPolicy, WhenFull
from kvtransport.link import Link
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation
from kvtransport.wire import bodies
from kvtransport.wire.frames import (
    _CHECKED,
    _TAIL,
    HEADER_BYTES,
    FrameType,
    _xxh3,
    decode_control,
    encode_control,
    pack_header,
    unpack_header,
)
from tests.conftest import Cache, no_tasks_left
from tests.integration.peer import digests

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

ROOT = Path(__file__).resolve().parents[2]
BOUNDARY = 4_000
SEED = 11
CONFIG = EndpointConfig(
    chunk_bytes=64 << 10, keepalive_s=0.2, dead_after_s=1.0, handshake_timeout_s=2.0, reconnect_s=0.3
)
SOON_S = 10.0
"""What would otherwise hang ends here: far beyond every deadline under test, so no machine is too slow for it."""


class Peer:
    """A peer process; killed at the latest when its test ends."""

    def __init__(self, hybrid, manifest: Manifest, role: str, **config: Any) -> None:
        body = {
            "role": role,
            "layout": hybrid.describe(),
            "transfer": manifest.transfer.hex(),
            "boundary": manifest.boundary,
            "seed": SEED,
            **config,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.peer", json.dumps(body)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        line = self.process.stdout.readline()
        assert line, f"the peer said nothing more and ended with {self.process.wait()}"
        return json.loads(line)

    async def heard(self) -> dict[str, Any]:
        return await asyncio.wait_for(asyncio.to_thread(self.hear), 20)

    async def stopped(self) -> None:
        """Wait until the process stands still."""
        await asyncio.to_thread(os.waitid, os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def peer(hybrid):
    peers: list[Peer] = []

    def start(manifest: Manifest, role: str, **config: Any) -> Peer:
        peers.append(Peer(hybrid, manifest, role, **config))
        return peers[-1]

    yield start
    for each in peers:
        each.close()


@pytest.fixture
async def endpoint():
    endpoint = Endpoint(CONFIG)
    yield endpoint
    await endpoint.close()
    await no_tasks_left()


def expect(endpoint: Endpoint, manifest: Manifest, target: Cache, layout, link: Link | None = None, **kwargs):
    kwargs.setdefault("deadline_s", 30.0)
    wanted = Expectation(grant=lambda m: target.pages, layout=layout, **kwargs)
    return endpoint.expect(manifest.transfer, wanted, link=link)


def sockets() -> int:
    """Connected or listening TCP sockets of this process."""
    gc.collect()
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


def assert_lost(error: BaseException) -> None:
    assert isinstance(error, PeerLostError)
    assert error.fault is Fault.NETWORK
    assert error.retryable


# -- killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["connect", "open", "data", "seal"])
async def test_the_consumer_is_killed(stage, peer, endpoint, make_manifest):
    """The producer gets an error with its fault, all its memory back, and keeps nothing of the link."""
    before = sockets()
    manifest = make_manifest(BOUNDARY)
    other = peer(manifest, "consumer", at=stage, signal="SIGKILL")
    link = await endpoint.connect("127.0.0.1", (await other.heard())["port"], connections=2)
    handovers = []
    if stage == "connect":
        with pytest.raises(PeerLostError) as caught:
            await asyncio.wait_for(link.call("wait", timeout_s=SOON_S), SOON_S)
    else:
        sender = link.open(manifest, deadline_s=SOON_S)
        handovers = [sender.ready(*slot, pages) for slot, pages in Cache(manifest, seed=SEED).pages.items()]
        with pytest.raises(PeerLostError) as caught:
            await asyncio.wait_for(sender.seal(), SOON_S)
        assert (sender.stats.moved_bytes > 0) is (stage in ("data", "seal"))
    assert_lost(caught.value)
    for handover in handovers:
        await asyncio.wait_for(handover.released(), SOON_S)
    assert_lost(await asyncio.wait_for(link.wait_closed(), SOON_S))
    with pytest.raises(PeerLostError):
        link.open(make_manifest(10))
    assert endpoint.links == ()
    assert endpoint.spill_area.used_bytes == 0
    await no_tasks_left()
    assert sockets() == before
    assert other.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("stage", ["connect", "open", "data", "seal"])
async def test_the_producer_is_killed(stage, peer, endpoint, hybrid, make_manifest):
    before = sockets()
    manifest = make_manifest(BOUNDARY)
    target = Cache(manifest, blank=True)
    _, port = await endpoint.listen()
    linked: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    endpoint.on_link = linked.set_result
    other = peer(manifest, "producer", port=port, at=stage, signal="SIGKILL")
    link = await asyncio.wait_for(linked, 20)
    if stage == "open":
        # Nobody expects it yet: the OPEN waits here, and goes with its link.
        assert_lost(await asyncio.wait_for(link.wait_closed(), SOON_S))
        with pytest.raises(PeerLostError):
            expect(endpoint, manifest, target, hybrid, link)
    else:
        receiver = expect(endpoint, manifest, target, hybrid, link)
        if stage == "seal":
            # Everything is verified and the seal was read: its producer's death changes nothing.
            await asyncio.wait_for(receiver.sealed(), SOON_S)
            assert digests(target) == digests(Cache(manifest, seed=SEED))
        else:
            with pytest.raises(PeerLostError) as caught:
                await asyncio.wait_for(receiver.sealed(), SOON_S)
            assert_lost(caught.value)
            frozen = target.bytes()
            with pytest.raises(PeerLostError):
                await asyncio.wait_for(receiver.layer(6), SOON_S)
            assert target.bytes() == frozen
        assert_lost(await asyncio.wait_for(link.wait_closed(), SOON_S))
    assert endpoint.links == ()
    await no_tasks_left()
    assert sockets() == before + 1  # the listener's
    assert other.process.wait() == -signal.SIGKILL


# -- frozen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["connect", "open", "data", "seal"])
async def test_a_frozen_consumer_is_named_within_the_deadline(stage, peer, endpoint, make_manifest):
    before = sockets()
    manifest = make_manifest(BOUNDARY)
    other = peer(manifest, "consumer", at=stage, signal="SIGSTOP")
    link = await endpoint.connect("127.0.0.1", (await other.heard())["port"], connections=2)
    sender = None
    if stage != "connect":
        sender = link.open(manifest, deadline_s=60)
        handovers = [sender.ready(*slot, pages) for slot, pages in Cache(manifest, seed=SEED).pages.items()]
    waiting = asyncio.ensure_future(link.call("wait", timeout_s=60) if sender is None else sender.seal())
    await other.stopped()
    with pytest.raises(PeerFrozenError, match="although the connection stands") as caught:
        # Far below the transfer's own deadline: it is the silence that ends it.
        await asyncio.wait_for(waiting, SOON_S)
    assert caught.value.fault is Fault.REMOTE
    assert caught.value.retryable
    if sender is not None:
        for handover in handovers:
            await asyncio.wait_for(handover.released(), SOON_S)
    await asyncio.wait_for(link.wait_closed(), SOON_S)
    assert endpoint.links == ()
    assert endpoint.spill_area.used_bytes == 0
    await no_tasks_left()
    assert sockets() == before


async def test_a_frozen_producer_is_named_within_the_deadline(peer, endpoint, hybrid, make_manifest):
    manifest = make_manifest(BOUNDARY)
    receiver = expect(endpoint, manifest, Cache(manifest, blank=True), hybrid)
    _, port = await endpoint.listen()
    other = peer(manifest, "producer", port=port, at="data", signal="SIGSTOP")
    await other.heard()
    await other.stopped()
    with pytest.raises(PeerFrozenError) as caught:
        await asyncio.wait_for(receiver.sealed(), SOON_S)
    assert caught.value.fault is Fault.REMOTE
    assert 0 < receiver.stats.moved_bytes < manifest.total_bytes
    assert endpoint.links == ()


@pytest.mark.parametrize("stage", ["open", "data", "seal"])
async def test_frozen_and_resumed_within_the_deadline_completes(stage, peer, hybrid, make_manifest):
    manifest = make_manifest(BOUNDARY)
    source = Cache(manifest, seed=SEED)
    other = peer(manifest, "consumer", at=stage, signal="SIGSTOP")
    async with Endpoint(EndpointConfig(chunk_bytes=64 << 10, keepalive_s=0.1, dead_after_s=60)) as endpoint:
        link = await endpoint.connect("127.0.0.1", (await other.heard())["port"], connections=2)
        sender = link.open(manifest, deadline_s=60)
        for slot, pages in source.pages.items():
            sender.ready(*slot, pages)
        sealing = asyncio.ensure_future(sender.seal())
        await other.stopped()
        await asyncio.sleep(0.5)  # several keepalives go unanswered
        assert not sealing.done()
        other.resume()
        await asyncio.wait_for(sealing, SOON_S)
        assert (await other.heard())["digests"] == digests(source)
    await no_tasks_left()


# -- stalled -----------------------------------------------------------------------------------------

STEP_S = 0.02
STEP_TOKENS = 128
RING = 24
"""Steps whose memory the producer has: far less than a stall's worth, so it cannot go on unless memory comes back."""


class Steps:
    """A prefill in steps of 128 tokens: compute (a sleep), wait for the memory of an earlier step, fill it, hand over."""

    def __init__(self, manifest: Manifest, outgoing: sync.SyncOutgoing, source: Cache) -> None:
        self.outgoing = outgoing
        self.source = source
        self.seconds: list[float] = []
        self._ring = [
            {slot: bytearray(STEP_TOKENS * manifest.extent(*slot).unit) for slot in self.slots} for _ in range(RING)
        ]
        self._given: list[list[sync.SyncHandover]] = [[] for _ in range(RING)]

    slots = ((5, 0), (5, 1), (6, 0), (6, 1))

    def step(self, timeout_s: float | None = 20.0) -> None:
        began = time.perf_counter()
        i = len(self.seconds)
        time.sleep(STEP_S)
        for handover in self._given[i % RING]:
            handover.wait(timeout_s)
        self._given[i % RING] = given = []
        for slot, memory in self._ring[i % RING].items():
            pages = PageList.of(memory)
            pages.copy_from(self.source.pages[slot].slice(i * len(memory), (i + 1) * len(memory)))
            given.append(self.outgoing.ready(*slot, pages, first=i * STEP_TOKENS, tokens=STEP_TOKENS))
        self.seconds.append(time.perf_counter() - began)

    def finish(self, manifest: Manifest, steps: int) -> None:
        while len(self.seconds) < steps:
            self.step()
        for slot, pages in self.source.pages.items():
            if slot not in self.slots:
                self.outgoing.ready(*slot, pages)
        self.outgoing.seal(30)


def stall(peer, make_manifest, *, stall_s: float) -> None:
    """Steps are not slower while the consumer stands still. Three looks: what else the machine does slows some, a wait of ours all."""
    looks = []
    for _ in range(3):
        undisturbed, stalled = stalled_steps(peer, make_manifest, stall_s)
        if stalled < 1.05 * undisturbed:
            return
        looks.append(f"{stalled * 1e3:.2f} ms while stalled, {undisturbed * 1e3:.2f} before")
    pytest.fail(f"median steps: {'; '.join(looks)}")


def stalled_steps(peer, make_manifest, stall_s: float) -> tuple[float, float]:
    """Seconds of the median step before the stall and during it; everything else about it is checked here."""
    before, during, after = 50, round(stall_s / STEP_S), 25
    steps = before + during + after
    manifest = make_manifest(steps * STEP_TOKENS)
    source = Cache(manifest, seed=SEED)
    other = peer(manifest, "consumer", window_bytes=4 << 20)
    config = EndpointConfig(keepalive_s=1, dead_after_s=60, spill=SpillPolicy(budget_bytes=512 << 20))
    with sync.SyncEndpoint(config) as endpoint:
        link = endpoint.connect("127.0.0.1", other.hear()["port"], connections=2)
        run = Steps(manifest, link.open(manifest, deadline_s=120), source)
        for _ in range(before):
            run.step()
        assert run.outgoing.stats.spilled_bytes == 0
        other.process.send_signal(signal.SIGSTOP)
        for _ in range(during):
            run.step()
        spilled = run.outgoing.stats.spilled_bytes
        other.resume()
        run.finish(manifest, steps)
        assert other.hear()["digests"] == digests(source)
        assert link.telemetry().spilled_bytes == 0
    undisturbed, stalled = statistics.median(run.seconds[:before]), statistics.median(run.seconds[before:][:during])
    # The stall produced more than the ring holds: without spilling the median step would have stood still.
    unit = STEP_TOKENS * sum(manifest.extent(*slot).unit for slot in Steps.slots)
    assert during > 1.5 * RING
    assert spilled > (during - RING) * unit // 2
    return undisturbed, stalled


def test_a_stalled_consumer_does_not_slow_the_producers_steps(peer, make_manifest):
    stall(peer, make_manifest, stall_s=1.0)


@pytest.mark.slow
def test_a_consumer_stalled_for_five_seconds_does_not_slow_the_producers_steps(peer, make_manifest):
    stall(peer, make_manifest, stall_s=5.0)


def test_a_full_spill_budget_makes_the_producer_wait_and_nothing_fails(peer, make_manifest):
    steps, budget = 100, 8 << 20
    manifest = make_manifest(steps * STEP_TOKENS)
    source = Cache(manifest, seed=SEED)
    other = peer(manifest, "consumer", window_bytes=1 << 20)
    spill = SpillPolicy(budget_bytes=budget, when_full=WhenFull.WAIT)
    with sync.SyncEndpoint(EndpointConfig(keepalive_s=1, dead_after_s=60, spill=spill)) as endpoint:
        link = endpoint.connect("127.0.0.1", other.hear()["port"], connections=2)
        run = Steps(manifest, link.open(manifest, deadline_s=120), source)
        for _ in range(20):
            run.step()
        other.process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlineError):
            while len(run.seconds) < steps:
                run.step(timeout_s=1.0)
        assert len(run.seconds) > RING
        assert 0 < link.telemetry().spilled_bytes <= budget
        other.resume()
        run.finish(manifest, steps)
        assert other.hear()["digests"] == digests(source)


# -- no peers at all -----------------------------------------------------------------------------------


def frame(version: int = 1, kind: int = FrameType.HELLO, length: int = 0) -> bytes:
    """A header that is right but for what a test wants wrong."""
    covered = _CHECKED.pack(b"KVT1", version, kind, 0, bytes(16), 0, 0, length, 0, 0)
    return covered + _TAIL.pack(0, _xxh3(covered))


def hello(index: int = 0) -> bytes:
    body = bodies.Hello(
        versions=(1,),
        incarnation=os.urandom(16),
        link=os.urandom(16),
        index=index,
        count=1,
        role="dial",
        keepalive_s=1.0,
    )
    return encode_control(FrameType.HELLO, body)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(197)
STRANGERS = {
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 64, "protocol", "these bytes are HTTP"),
    "a short http": (b"GET / HTTP/1.0\r\n\r\n", "protocol", "these bytes are HTTP"),
    "tls": (TLS_HELLO, "protocol", "start a TLS handshake"),
    "wrong magic": (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "protocol", "expected magic KVT1, got b'SSH-'"),
    "wrong version": (frame(version=2), "version", "expected protocol version 1, got 2"),
    "unknown type": (frame(kind=99), "version", "expected a frame type of 1..13"),
    "oversized hello": (frame(length=4097), "limit", "a HELLO payload is at most 4096 bytes, got 4097"),
    "four gigabytes": (frame(length=2**32 - 1), "limit", "at most 4096 bytes, got 4294967295"),
    "flipped header bit": (flipped(hello(), 20), "header", "its check does not match"),
    "flipped body bit": (flipped(hello(), 70), "protocol", "failed its checksum"),
    "truncated header": (hello()[:40], "handshake", "did not complete the handshake within 2 s"),
    "truncated body": (hello()[:80], "handshake", "did not complete the handshake within 2 s"),
    "silence": (b"", "handshake", "did not complete the handshake within 2 s"),
    "data first": (
        pack_header(FrameType.DATA, transfer=b"t" * 16, length=10),
        "protocol",
        "got DATA in HELLO_WAIT; expected HELLO",
    ),
}
INSIDERS = {
    "hello again": (hello(), "protocol", "got HELLO in READY; expected any frame but HELLO"),
    "oversized data": (
        pack_header(FrameType.DATA, transfer=b"t" * 16, length=(16 << 20) + 1),
        "limit",
        "a DATA payload is at most 16777216 bytes, got 16777217",
    ),
    "data of no transfer": (
        pack_header(FrameType.DATA, transfer=b"t" * 16, length=10),
        "protocol",
        "was never accepted",
    ),
    "an ack of no transfer": (
        encode_control(FrameType.ACK, bodies.Ack(ranges=()), transfer=b"t" * 16),
        "protocol",
        "which was never opened",
    ),
    "http after hello": (b"GET / HTTP/1.1\r\n", "protocol", "these bytes are HTTP"),
    "wrong version after hello": (frame(version=7, kind=FrameType.PING), "version", "got 7"),
}


async def converse(port: int, data: bytes) -> list[tuple[FrameType, Any]]:
    """Send ``data`` to the port and read frames until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = []
    try:
        writer.write(data)
        while True:
            header = unpack_header(await reader.readexactly(HEADER_BYTES))
            said.append((header.type, decode_control(header, await reader.readexactly(header.length))))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return said
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def assert_serving(endpoint: Endpoint, link: Link, hybrid, manifest: Manifest) -> None:
    source, target = Cache(manifest, seed=SEED), Cache(manifest, blank=True)
    receiver = expect(endpoint, manifest, target, hybrid)
    sender = link.open(manifest)
    for slot, pages in source.pages.items():
        sender.ready(*slot, pages)
    await asyncio.wait_for(asyncio.gather(sender.seal(), receiver.sealed()), SOON_S)
    assert target.bytes() == source.bytes()


@pytest.fixture
async def served(endpoint):
    """An endpoint with a peer that behaves: (endpoint, port, the peer's link)."""
    _, port = await endpoint.listen()
    async with Endpoint(CONFIG) as friend:
        yield endpoint, port, await friend.connect("127.0.0.1", port, connections=2)


async def test_strangers_are_told_what_is_wrong_and_others_are_served(served, hybrid, make_manifest):
    endpoint, port, link = served
    serving = [assert_serving(endpoint, link, hybrid, make_manifest(300 + i)) for i in range(8)]
    conversations = {name: asyncio.ensure_future(converse(port, data)) for name, (data, _, _) in STRANGERS.items()}
    await asyncio.gather(*serving)  # while the strangers talk
    for name, (_, code, words) in STRANGERS.items():
        said = await asyncio.wait_for(conversations[name], SOON_S)
        assert [kind for kind, _ in said] == [FrameType.ERROR], name
        error = said[0][1].to_error()
        assert error.code == code, name
        assert words in error.message, (name, error.message)
    assert len(endpoint.links) == 1
    await assert_serving(endpoint, link, hybrid, make_manifest(500))


async def test_peers_that_break_the_protocol_later_are_told_too(served, hybrid, make_manifest):
    endpoint, port, link = served
    for name, (data, code, words) in INSIDERS.items():
        said = await asyncio.wait_for(converse(port, hello() + data), SOON_S)
        assert [kind for kind, _ in said] == [FrameType.HELLO, FrameType.ERROR], name
        error = said[1][1].to_error()
        assert error.code == code, name
        assert words in error.message, (name, error.message)
    async with asyncio.timeout(SOON_S):
        while len(endpoint.links) > 1:  # those whom the network may have hit could have come back
            await asyncio.sleep(0.05)
    await assert_serving(endpoint, link, hybrid, make_manifest(500))


async def test_a_frame_cut_off_by_the_end_of_the_connection(endpoint):
    _, port = await endpoint.listen()
    linked: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    endpoint.on_link = linked.set_result
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(hello() + encode_control(FrameType.PING)[:30])
    link = await asyncio.wait_for(linked, SOON_S)
    writer.close()
    error = await asyncio.wait_for(link.wait_closed(), SOON_S)
    await writer.wait_closed()
    assert_lost(error)
    assert "closed the connection in the middle of a frame" in str(error)


async def test_a_listener_that_is_no_peer_is_an_error_for_who_dials(endpoint):
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(web, "127.0.0.1", 0)
    try:
        with pytest.raises(KVError, match="these bytes are HTTP") as caught:
            await endpoint.connect(*server.sockets[0].getsockname(), connections=1)
        assert caught.value.fault is Fault.REMOTE
    finally:
        server.close()
        await server.wait_closed()


def test_digests_tell_caches_apart(make_manifest):
    manifest = make_manifest(300)
    one, other = Cache(manifest, seed=1), Cache(manifest, seed=1)
    assert digests(one) == digests(other)
    np.frombuffer(other.pages[5, 0].base, np.uint8)[1000] ^= 1
    assert {slot for slot in digests(one) if digests(one)[slot] != digests(other)[slot]} == {"5/0"}
