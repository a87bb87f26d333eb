"""kvtransport.sync: the operations of the asyncio classes from threads, with timeouts, and across a fork."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from kvtransport import sync
from kvtransport.buffers import PageList
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import (
    ConnectError,
    DeadlineError,
    DestinationError,
    Fault,
    FingerprintError,
    InsecureBindError,
    KVError,
    ManifestError,
    PeerLostError,
    ProtocolError,
    TransferCancelledError,
    TransferError,
)
from kvtransport.layout import CacheLayout
from kvtransport.receiver import Expectation
from kvtransport.sync import LoopThread, SyncEndpoint, SyncIncoming, SyncOutgoing, loop_thread
from tests.conftest import Cache

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CONFIG = EndpointConfig(chunk_bytes=64 << 10, keepalive_s=0.2, dead_after_s=2.0)


class Ends:
    """A producer's and a consumer's endpoint, and the link between them."""

    def __init__(self) -> None:
        self.producer, self.consumer = SyncEndpoint(CONFIG), SyncEndpoint(CONFIG)
        self.host, self.port = self.consumer.listen()
        self.link = self.producer.connect(self.host, self.port, connections=2, timeout_s=5)

    def close(self) -> None:
        self.producer.close()
        self.consumer.close()


@pytest.fixture
def ends():
    ends = Ends()
    yield ends
    ends.close()
    _settle(lambda: not _tasks())
    assert not _tasks()


def _tasks() -> list[Any]:
    async def others() -> list[Any]:
        return [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]

    return loop_thread().run(others(), 5)


def _settle(done: Callable[[], bool]) -> None:
    for _ in range(200):
        if done():
            return
        time.sleep(0.01)


def expect(ends: Ends, manifest, target: Cache, layout: CacheLayout | None, **kwargs) -> SyncIncoming:
    kwargs.setdefault("deadline_s", 10.0)
    return ends.consumer.expect(manifest.transfer, Expectation(grant=lambda m: target.pages, layout=layout, **kwargs))


def hand_over_all(outgoing: SyncOutgoing, source: Cache) -> list[sync.SyncHandover]:
    return [outgoing.ready(*slot, pages) for slot, pages in source.pages.items()]


def test_a_transfer_layer_by_layer_from_two_threads(ends, hybrid, make_manifest):
    manifest = make_manifest(2000)
    source, target = Cache(manifest, seed=1, page_bytes=4096), Cache(manifest, page_bytes=4096, blank=True)
    incoming = expect(ends, manifest, target, hybrid)
    consumed = threading.Semaphore(0)

    def produce() -> None:
        outgoing = ends.link.open(manifest)
        for extents in manifest.by_layer.values():
            handovers = [outgoing.ready(e.layer, e.tensor, source.pages[e.layer, e.tensor]) for e in extents]
            # The next layer is not even computed before this one was read at the other end.
            assert consumed.acquire(timeout=10)
            for handover in handovers:
                handover.wait(10)
                assert handover.done
        outgoing.seal(10)
        assert outgoing.stats.moved_bytes == manifest.total_bytes

    with ThreadPoolExecutor(1) as pool:
        producing = pool.submit(produce)
        seen = []
        for layer in incoming.layers(timeout_s=10):
            for extent in manifest.by_layer[layer]:
                slot = (extent.layer, extent.tensor)
                assert target.pages[slot].tobytes() == source.pages[slot].tobytes()
            seen.append(layer)
            consumed.release()
        incoming.sealed(10)
        producing.result(10)
    assert seen == list(manifest.layers)
    assert incoming.manifest == manifest
    assert incoming.stats.checksums_verified == incoming.stats.chunks > 0
    telemetry = ends.link.telemetry()
    assert telemetry.connections == 2
    assert telemetry.sent_bytes > manifest.total_bytes
    assert telemetry.outgoing == telemetry.incoming == 0


def test_a_timeout_is_a_deadline_error_and_the_transfer_goes_on(ends, hybrid, make_manifest):
    manifest = make_manifest(500)
    source, target = Cache(manifest, seed=2), Cache(manifest, blank=True)
    incoming = expect(ends, manifest, target, hybrid)
    outgoing = ends.link.open(manifest)
    slots = list(source.pages)
    for slot in slots[:-1]:
        outgoing.ready(*slot, source.pages[slot])
    incoming.layer(slots[0][0], 10)
    for wait in (lambda: incoming.layer(slots[-1][0], 0.05), lambda: incoming.sealed(0.05)):
        with pytest.raises(DeadlineError, match=r"not done within 0\.05 s") as caught:
            wait()
        assert caught.value.fault is Fault.LOCAL
    with pytest.raises(DeadlineError):
        next(SyncIncoming.layers(ends.consumer.expect(os.urandom(16), Expectation(grant=lambda m: {})), 0.05))
    outgoing.ready(*slots[-1], source.pages[slots[-1]])
    outgoing.seal(10)
    incoming.sealed(10)
    incoming.layer(slots[-1][0], 10)
    assert target.bytes() == source.bytes()


def test_a_seal_without_its_consumer_times_out_and_can_be_cancelled(ends, make_manifest):
    manifest = make_manifest(300)
    outgoing = ends.link.open(manifest, deadline_s=30)
    handovers = hand_over_all(outgoing, Cache(manifest))
    with pytest.raises(DeadlineError):
        outgoing.seal(0.05)
    outgoing.cancel("nobody wants it")
    for handover in handovers:
        handover.wait(5)
    with pytest.raises(TransferCancelledError, match="nobody wants it"):
        outgoing.seal(5)
    assert ends.link.telemetry().outgoing == 0


def test_dialling_a_port_that_never_answers_times_out_and_leaves_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent, SyncEndpoint(CONFIG) as endpoint:
        with pytest.raises(DeadlineError):
            endpoint.connect(*silent.getsockname(), connections=1, timeout_s=0.1)
        other, _ = silent.accept()
        with other:
            other.settimeout(5)
            while other.recv(4096):  # its HELLO, then the end: the dialling socket was closed
                pass


def test_errors_are_those_of_asyncio_with_their_fault(ends, hybrid, make_manifest):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()
    with pytest.raises(ConnectError, match="is the peer running"):
        ends.producer.connect(*free, timeout_s=5)
    with pytest.raises(InsecureBindError, match="beyond loopback"):
        ends.consumer.listen("0.0.0.0")
    with pytest.raises(ProtocolError, match="no verb 'nonsense'") as refused:
        ends.link.call("nonsense")
    assert refused.value.fault is Fault.LOCAL
    manifest = make_manifest(300)
    other = CacheLayout("another-model", hybrid.groups)
    incoming = expect(ends, manifest, Cache(manifest, blank=True), other)
    outgoing = ends.link.open(manifest)
    with pytest.raises(FingerprintError, match="another-model") as theirs:
        incoming.sealed(5)
    assert theirs.value.fault is Fault.REMOTE
    hand_over_all(outgoing, Cache(manifest))
    with pytest.raises(FingerprintError, match="the consumer says") as ours:
        outgoing.seal(5)
    assert ours.value.fault is Fault.LOCAL


def test_a_wrong_unit_is_said_by_its_handover_and_by_the_seal(ends, make_manifest):
    manifest = make_manifest(300)
    outgoing = ends.link.open(manifest)
    handover = outgoing.ready(5, 0, PageList.of(bytearray(10)))
    with pytest.raises(DestinationError, match="the ready unit has 307200 bytes, the pages hold 10"):
        handover.wait(5)
    assert handover.done
    with pytest.raises(ManifestError, match="never handed over"):
        outgoing.seal(5)
    outgoing.cancel()


def test_cancel_from_the_consumer_reaches_the_producer(ends, hybrid, make_manifest):
    manifest = make_manifest(300)
    incoming = expect(ends, manifest, Cache(manifest, blank=True), hybrid)
    outgoing = ends.link.open(manifest)
    incoming_open = ends.link.telemetry().outgoing
    assert incoming_open == 1
    _settle(lambda: incoming.stats.total_bytes > 0)
    incoming.cancel("the client went away")
    hand_over_all(outgoing, Cache(manifest))
    with pytest.raises(TransferCancelledError, match="the client went away") as caught:
        outgoing.seal(5)
    assert caught.value.fault is Fault.REMOTE


def test_many_threads_share_a_link(ends, hybrid, make_manifest):
    def one(i: int) -> None:
        for j in range(3):
            manifest = make_manifest(100 + 31 * i + j)
            source, target = Cache(manifest, seed=10 * i + j), Cache(manifest, blank=True)
            incoming = expect(ends, manifest, target, hybrid)
            outgoing = ends.link.open(manifest, priority=i % 3)
            hand_over_all(outgoing, source)
            outgoing.seal(20)
            incoming.sealed(20)
            assert target.bytes() == source.bytes()

    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(one, i) for i in range(12)]:
            done.result(60)


def test_units_of_one_layer_from_several_threads(ends, hybrid, make_manifest):
    manifest = make_manifest(1600)
    source, target = Cache(manifest, seed=7), Cache(manifest, blank=True)
    incoming = expect(ends, manifest, target, hybrid)
    outgoing = ends.link.open(manifest)
    whole = [slot for slot in source.pages if slot[0] not in (5, 6)]
    for slot in whole:
        outgoing.ready(*slot, source.pages[slot])

    def part(first: int) -> None:
        for layer in (5, 6):
            for tensor in (0, 1):
                start, stop = manifest.extent(layer, tensor).byte_range(first, 200)
                unit = source.pages[layer, tensor].slice(start, stop)
                outgoing.ready(layer, tensor, unit, first=first, tokens=200).wait(10)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(part, first) for first in range(0, 1600, 200)]:
            done.result(20)
    outgoing.seal(10)
    incoming.sealed(10)
    assert target.bytes() == source.bytes()


def test_calls_from_the_loops_own_thread_raise_instead_of_hanging(ends, hybrid, make_manifest):
    manifest = make_manifest(300)
    raised: list[BaseException] = []

    def grant(m):
        try:
            ends.link.telemetry()
        except KVError as error:
            raised.append(error)
            raise

    incoming = ends.consumer.expect(manifest.transfer, Expectation(grant=grant, layout=hybrid))
    ends.link.open(manifest)
    with pytest.raises(TransferError, match="use the asyncio classes there"):
        incoming.sealed(5)
    assert len(raised) == 1


def test_closing_an_endpoint_wakes_every_waiting_thread(ends, hybrid, make_manifest):
    manifest = make_manifest(300)
    incoming = expect(ends, manifest, Cache(manifest, blank=True), hybrid)
    outgoing = ends.link.open(manifest)
    handover = outgoing.ready(0, 0, Cache(manifest).pages[0, 0])
    with ThreadPoolExecutor(2) as pool:
        sealed = pool.submit(incoming.sealed, 20)
        layer = pool.submit(incoming.layer, 6, 20)
        _settle(lambda: incoming.stats.total_bytes > 0)
        ends.producer.close()
        for waiting in (sealed, layer):
            with pytest.raises(PeerLostError):
                waiting.result(10)
    handover.wait(5)
    assert ends.link.closed
    with pytest.raises(PeerLostError, match="closed by this side"):
        ends.link.open(make_manifest(10))


def test_a_stopped_loop_is_an_error():
    thread = LoopThread()
    thread.stop()

    async def work() -> None: ...

    with pytest.raises(TransferError, match="the event loop was stopped"):
        thread.run(work(), 1)


# -- fork ------------------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The JSON of what ``work`` returns in a forked child; fails when the child does not end in time."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            signal.alarm(int(timeout_s))  # a hang ends here, with a signal the parent sees
            result = json.dumps(work()).encode()
            os.write(write, result)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child hung or failed"
    return json.loads(said)


def test_after_a_fork_the_parents_objects_raise_and_new_ones_work(ends, hybrid, make_manifest):
    waiting = make_manifest(50)
    incoming = expect(ends, waiting, Cache(waiting, blank=True), hybrid)
    outgoing = ends.link.open(waiting)
    handover = outgoing.ready(0, 0, Cache(waiting).pages[0, 0])
    handover.wait(5)
    manifest = make_manifest(400)
    source, target = Cache(manifest, seed=3), Cache(manifest, blank=True)
    from_child = expect(ends, manifest, target, hybrid)
    parents_loop = loop_thread()

    def child() -> list[str]:
        said = []
        for touch in (
            ends.link.telemetry,
            lambda: ends.link.open(make_manifest(10)),
            lambda: ends.link.call("anything"),
            lambda: outgoing.ready(0, 1, source.pages[0, 1]),
            outgoing.seal,
            outgoing.cancel,
            handover.wait,
            sync.SyncHandover(parents_loop, Future()).wait,  # one the parent's loop had not taken yet: nobody will
            lambda: incoming.layer(0),
            lambda: next(incoming.layers()),
            incoming.sealed,
            ends.consumer.listen,
            ends.producer.close,
        ):
            try:
                touch()
                said.append("nothing")
            except TransferError as error:
                said.append(str(error))
        assert loop_thread() is not parents_loop
        with SyncEndpoint(CONFIG) as endpoint:  # a loop and sockets of its own
            again = endpoint.connect(ends.host, ends.port, connections=2, timeout_s=10).open(manifest)
            hand_over_all(again, source)
            again.seal(10)
        return said

    said = in_a_fork(child)
    assert len(said) == 13
    assert all("made before a fork" in words for words in said), said
    from_child.sealed(10)
    assert target.bytes() == source.bytes()
    # The parent's own link did not notice.
    assert loop_thread() is parents_loop
    rest = Cache(waiting)
    for slot in list(rest.pages)[1:]:
        outgoing.ready(*slot, rest.pages[slot])
    outgoing.seal(10)
    incoming.sealed(10)


def test_a_fork_while_another_thread_holds_the_lock_does_not_hang():
    loop_thread()
    with sync._lock:  # as a thread of the parent might at the moment of the fork

        def child() -> bool:
            with SyncEndpoint(CONFIG) as endpoint:
                return endpoint.listen()[1] > 0

        assert in_a_fork(child) is True
    gc.collect()
