"""A link that is closed on purpose says so, also where every connection of it has a frame half sent."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest

from kvtransport import last_words
from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.engine import native
from kvtransport.errors import PeerLostError
from kvtransport.io import tcp
from kvtransport.io.tcp import TcpOptions, TcpStream
from kvtransport.last_words import LastWords
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from tests.conftest import no_tasks_left

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SOON_S = 30.0
CHUNK = 256 << 10


def patience(monkeypatch, seconds: float) -> None:
    for module in (last_words, native, tcp):
        monkeypatch.setattr(module, "LAST_WORD_S", seconds)


@pytest.mark.parametrize("threads", [1, 0], ids=["native", "python"])
@pytest.mark.parametrize("dialler_leaves", [True, False], ids=["dialler", "acceptor"])
async def test_a_farewell_comes_behind_what_is_half_sent(threads, dialler_leaves, monkeypatch):
    """Otherwise the peer would take the end for a fault of the network, and wait for the link to come back."""
    patience(monkeypatch, SOON_S)
    config = EndpointConfig(
        io_threads=threads,
        reconnect_s=2 * SOON_S,
        chunk_bytes=CHUNK,
        tcp=TcpOptions(send_buffer=32 << 10, recv_buffer=32 << 10),
    )
    async with Endpoint(config) as here, Endpoint(config) as there:
        link = await here.connect(*await there.listen(), connections=2)
        back = there.links[0]
        leaver, consumer = (link, there) if dialler_leaves else (back, here)
        leaver.cap(4e6)  # slower than the chunks are wanted: each connection has one half sent, all the time
        source, target = np.ones(64 * CHUNK, np.uint8), np.zeros(64 * CHUNK, np.uint8)
        manifest = Manifest.of_objects([len(source)], transfer=new_transfer_id())
        receiver = consumer.expect(manifest.transfer, Expectation(grant=lambda _: {(0, 0): PageList.of(target)}))
        sender = leaver.open(manifest)
        sender.hand_over(0, 0, 0, PageList.of(source))
        async with asyncio.timeout(SOON_S):
            while receiver.waiting or not receiver.stats.moved_bytes:
                await asyncio.sleep(0.01)
            await leaver.close()
            with pytest.raises(PeerLostError, match="closed by its peer"):
                await receiver.sealed()
        assert (target[target != 0] == 1).all()
        arrived = receiver.stats.moved_bytes
        assert arrived < len(source)
    await no_tasks_left()


def streams() -> tuple[TcpStream, socket.socket]:
    """A stream, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        mine, _ = listener.accept()
    return TcpStream(mine, asyncio.get_running_loop(), TcpOptions()), peer


async def test_last_words_arrive_in_order_though_the_peer_sends_all_the_time(monkeypatch):
    patience(monkeypatch, SOON_S)
    stream, peer = streams()
    peer.setblocking(False)
    half = PageList.of(np.arange(1 << 22, dtype=np.uint32).view(np.uint8))
    words = LastWords(stream, [(b"head", half), (b"farewell", None)], 3)
    loop = asyncio.get_running_loop()
    chatter = loop.create_task(loop.sock_sendall(peer, bytes(8 << 20)))
    got = bytearray()
    async with asyncio.timeout(SOON_S):
        while part := await loop.sock_recv(peer, 1 << 20):
            got += part
        await chatter
        peer.close()
        await words.gone
    assert got == b"d" + half.tobytes() + b"farewell"


async def test_a_peer_that_does_not_listen_is_left_after_a_moment(monkeypatch):
    patience(monkeypatch, 0.05)
    stream, peer = streams()
    with peer:
        words = LastWords(stream, [(b"", PageList.zeros(64 << 20)), (b"farewell", None)], 0)
        await asyncio.wait_for(words.gone, SOON_S)
        assert stream.fileno() == -1


async def test_a_peer_that_has_gone_is_not_waited_for(monkeypatch):
    patience(monkeypatch, 2 * SOON_S)
    stream, peer = streams()
    peer.close()
    words = LastWords(stream, [(b"", PageList.zeros(64 << 20))], 0)
    await asyncio.wait_for(words.gone, SOON_S)
