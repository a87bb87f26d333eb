"""An address that others shall dial: said in the HELLO, tried by the peer, and a clear word when it does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from dataclasses import replace

import pytest

from kvtransport import probing
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import AddressError, ConfigError, HandshakeError, PeerLostError
from kvtransport.flow.probing import AT_ONCE, Answer
from kvtransport.identity import Token, TokenStore
from kvtransport.io.memory import MemoryNetwork
from kvtransport.link import Link
from kvtransport.tls import TlsConfig
from kvtransport.wire.bodies import Hello
from tests.conftest import no_tasks_left

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SOON_S = 30.0
"""Far more than it takes."""
PLAIN = EndpointConfig(reconnect_s=0)


def shown(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


@contextlib.contextmanager
def nobody_listens():
    """A port that is taken and refuses."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield shown(held.getsockname())


@contextlib.asynccontextmanager
async def somebody(says: bytes):
    """A port of another protocol: answers every connection with ``says`` and waits."""
    open_ones: list[asyncio.StreamWriter] = []

    async def serve(reader, writer):
        open_ones.append(writer)
        writer.write(says)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield shown(server.sockets[0].getsockname())
    finally:
        server.close()
        for writer in open_ones:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in open_ones), return_exceptions=True)
        await server.wait_closed()


@contextlib.asynccontextmanager
async def dialled(advertise: str, config: EndpointConfig = PLAIN, peer: EndpointConfig = PLAIN):
    """A link to another endpoint that was told ``advertise``; the other endpoint, this one, the link."""
    async with Endpoint(peer) as there, Endpoint(replace(config, advertise=advertise)) as here:
        address = await there.listen()
        yield there, here, await here.connect(*address, connections=2)
    await no_tasks_left()


async def told(link: Link) -> str:
    with pytest.raises(AddressError) as caught:
        await link.reachable(SOON_S)
    assert caught.value is link.advertised.error
    assert link.advertised.address in caught.value.message
    assert "advertise an address" in caught.value.message
    return caught.value.message


async def test_an_address_that_answers():
    async with Endpoint(PLAIN) as here:
        mine = shown(await here.listen())
        async with Endpoint(PLAIN) as there, Endpoint(replace(PLAIN, advertise=mine, advertise_incarnation=here.incarnation)) as also:
            address = await there.listen()
            assert await (await also.connect(*address)).reachable(SOON_S)
            assert not here.links  # whoever tried it has hung up
    await no_tasks_left()


async def test_the_process_that_dials_may_be_the_one_that_listens():
    for _ in range(50):  # until nobody else takes the port between the two lines
        with nobody_listens() as free:
            pass
        async with Endpoint(PLAIN) as there, Endpoint(replace(PLAIN, advertise=free)) as here:
            try:
                await here.listen("127.0.0.1", int(free.rpartition(":")[2]))
            except ConfigError:
                continue
            link = await here.connect(*await there.listen())
            assert await link.reachable(SOON_S)
            assert await link.reachable(SOON_S)  # it is known
            return
    raise AssertionError("no port in fifty attempts")


async def test_nobody_listens_there(caplog):
    caplog.set_level(logging.WARNING, "kvtransport")
    with nobody_listens() as address:
        async with dialled(address) as (there, here, link):
            assert "Connection refused" in await told(link)
            again = await here.connect(*there_address(there), connections=1)
            await told(again)
    said = [r.getMessage() for r in caplog.records if r.name == "kvtransport" and address in r.getMessage()]
    assert said == [link.advertised.error.message]  # once


def there_address(there: Endpoint) -> tuple[str, int]:
    listener = there._listeners[0]
    return listener.host, listener.port


async def test_who_wants_to_know_is_called_instead_of_the_log(caplog):
    with nobody_listens() as address:
        async with Endpoint(PLAIN) as there, Endpoint(replace(PLAIN, advertise=address)) as here:
            calls: asyncio.Queue[tuple[Link, AddressError]] = asyncio.Queue()
            here.on_unreachable = lambda link, error: calls.put_nowait((link, error))
            link = await here.connect(*await there.listen())
            of, error = await asyncio.wait_for(calls.get(), SOON_S)
            assert of is link
            assert address in error.message
            assert (error.fault, error.retryable) == ("local", False)
    assert address not in caplog.text


async def test_another_process_answers_there():
    async with Endpoint(PLAIN) as other, dialled(shown(await other.listen())) as (_, _, link):
        assert "another process answers there" in await told(link)


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 64, b"SSH-2.0-OpenSSH_9.2\r\n"])
async def test_another_protocol_answers_there(says):
    async with somebody(says) as address, dialled(address) as (_, _, link):
        assert "no kvtransport port" in await told(link)


async def test_a_port_that_never_says_a_word(monkeypatch):
    monkeypatch.setattr(probing, "PROBE_S", 0.2)
    async with somebody(b"") as address, dialled(address) as (_, _, link):
        assert "nobody answered within 0.2 s" in await told(link)


async def test_packets_that_vanish(monkeypatch):
    """A full queue: the kernel drops what arrives, and nobody is told."""
    monkeypatch.setattr(probing, "PROBE_S", 0.2)
    with contextlib.ExitStack() as held:
        full = held.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        async with dialled(shown(full.getsockname())) as (_, _, link):
            assert "nobody answered within 0.2 s" in await told(link)


async def test_closing_while_an_address_is_tried_leaves_nothing():
    async with somebody(b"") as address, dialled(address) as (there, _, _):
        while not there._probes._running:
            await asyncio.sleep(0.01)
    assert not there._probes._running
    assert there._probes._policy.active == 0


# -- whom it is done for -------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch):
    """Addresses that were tried."""
    addresses = []
    honest = probing.who_answers

    async def who_answers(endpoint, address, **more):
        addresses.append(address)
        return await honest(endpoint, address, **more)

    monkeypatch.setattr(probing, "who_answers", who_answers)
    return addresses


async def considered(there: Endpoint) -> None:
    """Wait until nothing of an address is going on at ``there``."""
    while there._probes._telling or there._probes._running:
        await asyncio.sleep(0.01)


async def test_a_strangers_word_is_taken_for_its_own_address_only(tried):
    async with dialled("192.0.2.1:7777") as (there, _, link):
        await considered(there)
        assert not await link.reachable(0.01)
    async with dialled("node1.example:7777") as (there, _, link):
        await considered(there)
        assert not await link.reachable(0.01)
    assert not tried


async def test_a_node_of_the_cluster_is_believed(pki, monkeypatch):
    """A node's certificate: any address; a tenant's: the one it comes from."""
    tried = []

    async def not_there(endpoint, address, **more):
        tried.append(address)
        return Answer("not there")

    monkeypatch.setattr(probing, "who_answers", not_there)
    async with dialled("192.0.2.1:7777", node(pki), node(pki)) as (_, _, link):
        assert "not there" in await told(link)
    assert tried == ["192.0.2.1:7777"]
    async with dialled("192.0.2.2:7777", node(pki, "alice"), node(pki)) as (there, _, link):
        assert there.links[0].identity.tenant == "acme"
        await considered(there)
        assert not await link.reachable(0.01)
    assert tried == ["192.0.2.1:7777"]


def node(pki, name: str = "n1") -> EndpointConfig:
    return replace(PLAIN, tls=TlsConfig(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}.key"))


async def test_a_certificate_for_another_name_is_a_problem_for_whoever_dials(pki):
    async with Endpoint(node(pki)) as mine:
        address = shown(await mine.listen("127.0.0.2"))
        config = replace(node(pki), advertise_incarnation=mine.incarnation)
        async with dialled(address, config, node(pki)) as (_, _, link):
            assert "made out to other addresses" in await told(link)


async def test_over_tls(pki):
    async with Endpoint(node(pki)) as mine:
        address = shown(await mine.listen())
        config = replace(node(pki), advertise_incarnation=mine.incarnation)
        async with dialled(address, config, node(pki)) as (_, _, link):
            assert await link.reachable(SOON_S)


async def test_nothing_is_tried_for_who_is_not_let_in(tried):
    secret = TokenStore([Token("bob", b"a secret of enough bytes")])
    wrong = replace(PLAIN, advertise="127.0.0.1:9", token=Token("bob", b"another secret, also long"))
    async with Endpoint(replace(PLAIN, tokens=secret)) as there, Endpoint(wrong) as here:
        address = await there.listen()
        with pytest.raises(HandshakeError):
            await here.connect(*address)
        assert not there._probes._telling
    assert not tried


async def test_a_peer_that_wants_a_token_is_there():
    """Whoever tries the address has none, and is refused by somebody who speaks the protocol."""
    secret = Token("bob", b"a secret of enough bytes")
    async with Endpoint(replace(PLAIN, tokens=TokenStore([secret]))) as mine:
        address = shown(await mine.listen())
        async with dialled(address, replace(PLAIN, advertise_incarnation=mine.incarnation)) as (_, _, link):
            assert await link.reachable(SOON_S)


async def test_one_address_is_tried_once_however_many_ask(tried):
    with nobody_listens() as address:
        async with dialled(address) as (there, here, link):
            links = [await here.connect(*there_address(there), connections=1) for _ in range(20)]
            for each in (link, *links):
                await told(each)
        assert tried == [address]


async def test_of_many_addresses_few_are_tried_at_once(tried):
    """Those beyond the bound are not tried; their links go on without a verdict."""
    async with contextlib.AsyncExitStack() as stack, Endpoint(PLAIN) as there:
        address = await there.listen()
        silent = [await stack.enter_async_context(somebody(b"")) for _ in range(12)]
        for each in silent:
            here = await stack.enter_async_context(Endpoint(replace(PLAIN, advertise=each)))
            await here.connect(*address, connections=1)
        async with asyncio.timeout(SOON_S):
            while len(tried) < AT_ONCE or len(there._probes._telling) > AT_ONCE:
                await asyncio.sleep(0.01)
        assert there._probes._policy.active == AT_ONCE
        await there.close()
        assert tried == silent[:AT_ONCE]


async def test_a_peer_that_knows_nothing_of_it(monkeypatch):
    """An older one ignores the key; this side never hears, and does not mind."""
    monkeypatch.setattr(probing.AddressProbes, "consider", lambda self, link, hello: None)
    with nobody_listens() as address:
        async with dialled(address) as (_, _, link):
            assert not await link.reachable(0.01)
            assert link.advertised.error is None


async def test_a_verdict_that_nobody_asked_for_means_nothing():
    async with dialled("") as (there, _, link):
        back = there.links[0]
        assert await back.call(probing.VERB, {"address": "10.0.0.1:1", "problem": "no"}) == {}
        assert link.advertised.error is None
        for args in ({}, {"address": 1, "problem": ""}, {"address": "10.0.0.1:1", "problem": None}):
            with pytest.raises(Exception, match="strings"):
                await back.call(probing.VERB, args)
        assert not await link.reachable()


def test_an_address_is_checked_before_it_travels():
    fields = {"versions": (1,), "incarnation": b"i" * 16, "link": b"l" * 16, "index": 0, "count": 1, "role": "dial"}
    with pytest.raises(ValueError, match="address: 'nowhere' is not an address"):
        Hello(**fields, address="nowhere")


async def test_an_endpoint_does_not_start_with_what_is_no_address():
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Endpoint(replace(PLAIN, advertise="nowhere"))


async def test_it_is_said_once_a_link(monkeypatch):
    """Not by the other connections, nor when one is dialled again."""
    said = []
    consider = probing.AddressProbes.consider
    monkeypatch.setattr(
        probing.AddressProbes, "consider", lambda self, link, hello: (said.append(hello.advertised), consider(self, link, hello))
    )
    config = replace(PLAIN, reconnect_s=5)
    network = MemoryNetwork()
    async with Endpoint(config, network=network) as there:
        address = await there.listen("there", 1)
        async with Endpoint(replace(config, advertise="there:1", advertise_incarnation=there.incarnation), network=network) as here:
            link = await here.connect(*address, connections=3)
            assert await link.reachable(SOON_S)
            assert list(filter(None, said)) == [("there:1", there.incarnation)]
            link.connections[0].fail(PeerLostError("the test pulled the plug"), abort=True)
            async with asyncio.timeout(SOON_S):
                while len(link.connections) < 3:
                    await asyncio.sleep(0.01)
            assert list(filter(None, said)) == [("there:1", there.incarnation)]
    await no_tasks_left()
