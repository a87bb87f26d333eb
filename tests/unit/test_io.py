"""io: TCP and its in-memory twin behave alike; options, busy ports and unprotected binds."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
from pathlib import Path

import pytest

from kvtransport import _pure_tls
from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import ConfigError, ConnectError, Fault, InsecureBindError
from kvtransport.flow.gate import Gate, Pacer
from kvtransport.io.memory import CAPACITY, MemoryNetwork, stream_pair
from kvtransport.io.tcp import TcpNetwork, TcpOptions, TcpStream, congestion_of, tune
from kvtransport.io.tls import TlsNetwork, TlsStream
from kvtransport.tls import TlsConfig, reloading_credentials

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Pair:
    """Two connected streams over one network."""

    def __init__(self, network) -> None:
        self.network = network

    async def start(self) -> Pair:
        accepted = asyncio.get_running_loop().create_future()
        self.listener = await self.network.listen("127.0.0.1", 0, accepted.set_result)
        self.left = await self.network.connect(self.listener.host, self.listener.port)
        self.right = await asyncio.wait_for(accepted, 5)
        return self

    def stop(self) -> None:
        for each in (self.left, self.right, self.listener):
            each.close()

    async def stopped(self) -> None:
        """TLS delivers what it took, to a peer that reads, before it closes."""
        for each in (self.left, self.right):
            if isinstance(each, TlsStream) and each._tcp.fileno() >= 0:
                each.abort()


def tls_network(pki, **tcp) -> TlsNetwork:
    config = TlsConfig(pki / "ca.pem", pki / "n1.pem", pki / "n1.key")
    network = TcpNetwork(TcpOptions(**tcp))
    return TlsNetwork(network, reloading_credentials(config), gate=Gate(64, 64), pacer=Pacer(0.5, 10.0))


@pytest.fixture(params=["tcp", "memory", "tls", "tls-python"])
async def pair(request, pki, monkeypatch):
    if request.param == "tls-python":
        for module in ("kvtransport.tls", "kvtransport.io.tls"):
            monkeypatch.setattr(f"{module}.implementation", lambda: _pure_tls)
    if request.param == "tcp":
        network = TcpNetwork()
    elif request.param == "memory":
        network = MemoryNetwork()
    else:
        network = tls_network(pki)
    pair = await Pair(network).start()
    yield pair
    pair.stop()
    await pair.stopped()


async def when(register) -> None:
    """Wait for one callback of ``register`` (a stream's on_readable or on_writable)."""
    future = asyncio.get_running_loop().create_future()
    register(lambda: future.done() or future.set_result(None))
    await asyncio.wait_for(future, 5)
    register(None)


async def send_all(stream, head: bytes, pages: PageList | None) -> None:
    at, total = 0, len(head) + (0 if pages is None else pages.nbytes)
    while at < total:
        n = stream.send(head, pages, at)
        at += n
        if not n:
            await when(stream.on_writable)


async def recv_all(stream, pages: PageList | None, tail: bytearray) -> None:
    at, total = 0, (0 if pages is None else pages.nbytes) + len(tail)
    body = total - len(tail)
    while at < total:
        n = stream.recv(pages, min(at, body), tail, max(0, at - body))
        at += n
        if not n:
            await when(stream.on_readable)


@pytest.mark.parametrize("seed", range(4))
async def test_pages_and_the_next_header_cross_as_they_are(pair, seed):
    rng = random.Random(seed)
    nbytes = rng.choice([1, 1000, 70_000, 3 * CAPACITY + 17])
    page = rng.choice([nbytes, 64, 4096])
    count = -(-nbytes // page)
    order = rng.sample(range(2 * count), count)
    source, target = bytearray(rng.randbytes(2 * count * page)), bytearray(2 * count * page)
    sent = PageList.pages(source, [i * page for i in order], page, nbytes)
    got = PageList.pages(target, [(2 * count - 1 - i) * page for i in order], page, nbytes)
    head, following = rng.randbytes(64), rng.randbytes(64)
    first, tail = bytearray(64), bytearray(64)

    async def send() -> None:
        await send_all(pair.left, head, sent)
        await send_all(pair.left, following, None)

    async def receive() -> None:
        await recv_all(pair.right, None, first)
        await recv_all(pair.right, got, tail)

    await asyncio.gather(send(), receive())
    assert first == head
    assert got.tobytes() == sent.tobytes()
    assert tail == following


async def test_a_stream_that_is_full_takes_nothing_and_says_when_it_can(pair):
    block = PageList.of(bytes(1 << 20))
    taken = 0
    while n := pair.left.send(b"", block, taken % block.nbytes):
        taken += n
        assert taken < 1 << 30, "a bounded stream took a gigabyte"
    called = []
    pair.left.on_writable(lambda: called.append(1))
    await asyncio.sleep(0.02)
    assert not called
    target = PageList.of(bytearray(1 << 20))
    while not called:
        if not pair.right.recv(target, 0, bytearray(), 0):
            await when(pair.right.on_readable)
        await asyncio.sleep(0)
    pair.left.on_writable(None)
    assert pair.left.send(b"", block, 0) > 0


async def test_the_end_comes_after_the_last_byte(pair):
    await send_all(pair.left, b"last words", None)
    pair.left.close()
    tail = bytearray(10)
    await recv_all(pair.right, None, tail)
    assert tail == b"last words"
    await when(pair.right.on_readable)
    with pytest.raises(EOFError):
        pair.right.recv(None, 0, bytearray(1), 0)
    pair.left.close()  # idempotent


async def test_an_abort_is_no_clean_end(pair):
    await send_all(pair.left, b"half a fra", None)
    pair.left.abort()
    await when(pair.right.on_readable)
    with pytest.raises(OSError):  # TCP may deliver what came before the reset
        while True:
            pair.right.recv(None, 0, bytearray(64), 0)
    pair.left.abort()  # idempotent


async def test_the_last_word_arrives_though_the_peer_keeps_sending(pair):
    for _ in range(20):
        pair.right.send(b"z" * 4096, None, 0)
    await asyncio.sleep(0.01)
    await send_all(pair.left, b"go away", None)
    pair.left.finish()  # closing with unread bytes would reset the connection and lose the word
    with contextlib.suppress(OSError):
        pair.right.send(b"z" * 4096, None, 0)
    tail = bytearray(7)
    await recv_all(pair.right, None, tail)
    assert tail == b"go away"
    await when(pair.right.on_readable)
    with pytest.raises(EOFError):
        pair.right.recv(None, 0, bytearray(1), 0)
    pair.right.close()
    await asyncio.sleep(0.05)  # the half that was kept for the last word sees the end and goes


async def test_no_callback_after_close(pair):
    called = []
    pair.right.on_readable(lambda: called.append(1))
    pair.right.close()
    with contextlib.suppress(OSError):
        pair.left.send(b"anyone?", None, 0)
    await asyncio.sleep(0.02)
    assert not called


async def test_streams_name_their_ends_and_measure(pair):
    assert pair.left.peer == pair.right.local
    assert pair.left.local.startswith("127.0.0.1:")
    info = pair.left.info()
    assert info is None or 0 <= info.rtt_s < 5
    while pair.left.send(b"x" * 65_536, None, 0):
        pass
    assert pair.left.unsent_bytes() > 0


# -- reaching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TcpNetwork, MemoryNetwork])
async def test_a_taken_port_and_a_free_one(kind):
    network = kind()
    listener = await network.listen("127.0.0.1", 0, lambda stream: None)
    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{listener.port}: .*"):
        await network.listen("127.0.0.1", listener.port, lambda stream: None)
    listener.close()
    listener.close()  # idempotent
    again = await network.listen("127.0.0.1", listener.port, lambda stream: None)
    again.close()
    with pytest.raises(ConnectError) as caught:
        await network.connect("127.0.0.1", listener.port)
    assert caught.value.retryable
    assert f"127.0.0.1:{listener.port}" in str(caught.value)


async def test_an_endpoint_says_that_its_port_is_taken_and_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with Endpoint() as endpoint:
            with pytest.raises(ConfigError, match="another process has this port: choose another, or 0") as caught:
                await endpoint.listen("127.0.0.1", port)
            assert caught.value.fault is Fault.LOCAL


async def test_a_name_that_does_not_resolve():
    with pytest.raises(ConnectError, match=r"cannot connect to no-such-host\.invalid:1"):
        await TcpNetwork().connect("no-such-host.invalid", 1)


async def test_a_host_that_never_answers_is_given_up():
    # A listener whose queue is full does not answer: the next connection hangs in its handshake.
    with socket.socket() as silent, contextlib.ExitStack() as clients:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(8):
                client = clients.enter_context(socket.socket())
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect(silent.getsockname())
        network = TcpNetwork(TcpOptions(connect_timeout_s=0.1))
        with pytest.raises(ConnectError, match=r"no answer from 127\.0\.0\.1:\d+ within 0\.1 s"):
            await network.connect(*silent.getsockname())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org", "127.0.0.1.example.org"])
async def test_beyond_loopback_only_where_insecure_was_said(host):
    async with Endpoint() as endpoint:
        with pytest.raises(InsecureBindError, match=r"refusing to listen on .* insecure = true"):
            await endpoint.listen(host)
        with pytest.raises(InsecureBindError, match="refusing to connect to"):
            await endpoint.connect(host, 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
async def test_loopback_needs_no_permission(host):
    async with Endpoint() as endpoint:
        _, port = await endpoint.listen(host)
        assert port > 0


async def test_insecure_binds_where_it_was_told():
    async with Endpoint(EndpointConfig(insecure=True)) as endpoint:
        host, port = await endpoint.listen("0.0.0.0")
        assert (host, port > 0) == ("0.0.0.0", True)


# -- options ------------------------------------------------------------------------------------------


def allowed() -> list[str]:
    return Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()


@pytest.mark.parametrize("name", allowed())
async def test_congestion_control_is_per_socket(name):
    pair = await Pair(TcpNetwork(TcpOptions(congestion=name))).start()
    assert isinstance(pair.left, TcpStream)
    assert pair.left.congestion() == pair.right.congestion() == name
    pair.stop()
    assert pair.left.congestion() == "unknown"


async def test_a_congestion_control_that_is_not_there_leaves_the_default():
    with socket.socket() as default:
        expected = congestion_of(default)
    pair = await Pair(TcpNetwork(TcpOptions(congestion="no-such-thing"))).start()
    assert pair.left.congestion() == expected
    pair.stop()


async def test_buffers_are_sized_before_the_handshake():
    pair = await Pair(TcpNetwork(TcpOptions(send_buffer=65_536, recv_buffer=131_072))).start()
    for stream in (pair.left, pair.right):
        # Linux doubles what is asked for, to account for its own overhead (socket(7)).
        assert stream._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 65_536
        assert stream._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 131_072
        assert stream._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    pair.stop()


async def test_a_step_bounds_what_one_call_moves():
    pair = await Pair(TcpNetwork(TcpOptions(step_bytes=5000))).start()
    assert pair.left.send(b"h" * 64, PageList.of(bytes(20_000)), 0) == 5000
    assert pair.left.send(b"h" * 64, PageList.of(bytes(20_000)), 0) == 5000
    await when(pair.right.on_readable)
    assert pair.right.recv(PageList.of(bytearray(20_000)), 0, bytearray(64), 0) == 5000
    pair.stop()


def test_tuning_leaves_other_sockets_alone():
    left, right = socket.socketpair()
    with left, right:
        tune(left, TcpOptions(congestion="reno"))


async def test_a_listener_out_of_descriptors_pauses_and_goes_on(monkeypatch):
    network = TcpNetwork()
    accepted = []
    listener = await network.listen("127.0.0.1", 0, accepted.append)
    real, failures = listener._sock, [2]

    class Failing:
        def __getattr__(self, name: str):
            return getattr(real, name)

        def accept(self):
            if failures[0]:
                failures[0] -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

    monkeypatch.setattr(listener, "_sock", Failing())
    stream = await network.connect(listener.host, listener.port)
    for _ in range(500):
        if accepted:
            break
        await asyncio.sleep(0.01)
    assert len(accepted) == 1
    assert failures == [0]
    for each in (stream, *accepted, listener):
        each.close()


# -- the twin's own hooks ------------------------------------------------------------------------------


async def test_a_tap_sees_changes_and_swallows():
    left, right = stream_pair(asyncio.get_running_loop())
    seen = []

    def tap(data: bytearray) -> bytearray | None:
        seen.append(bytes(data))
        return None if data.startswith(b"no") else bytearray(data.upper())

    left.tap(tap)
    left.send(b"yes", None, 0)
    left.send(b"no way", None, 0)
    left.send(b"!", None, 0)
    tail = bytearray(4)
    await recv_all(right, None, tail)
    assert (tail, seen) == (b"YES!", [b"yes", b"no way", b"!"])


async def test_held_bytes_come_later_and_whole():
    left, right = stream_pair(asyncio.get_running_loop())
    left.hold(True)
    left.send(b"hello", None, 0)
    called = []
    right.on_readable(lambda: called.append(1))
    await asyncio.sleep(0.01)
    assert not called
    assert right.recv(None, 0, bytearray(5), 0) == 0
    left.hold(False)
    tail = bytearray(5)
    await recv_all(right, None, tail)
    assert tail == b"hello"
