"""TLS end to end: who is let in, what is said to whom is not, certificates that change, peers that only take."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import shutil
import socket
import ssl

import pytest

from kvpool import certs
from kvtransport import _pure_tls
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import (
    CertificateError,
    ConfigError,
    ConnectError,
    HandshakeError,
    InsecureBindError,
    KVError,
    TlsError,
)
from kvtransport.identity import Identity, Token, TokenStore, load_tokens
from kvtransport.receiver import Expectation
from kvtransport.tls import TlsConfig, load_credentials
from kvtransport.wire.frames import FrameType, pack_header, seal_header
from tests.conftest import dial_into

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TOKEN = Token("bob", b"a secret of enough bytes")


def server_config(pki, *, tls=None, **more) -> EndpointConfig:
    return EndpointConfig(tls=TlsConfig(pki / "ca.pem", pki / "n1.pem", pki / "n1.key", **(tls or {})), **more)


def client_config(pki, name: str | None = "alice", *, tls=None, **more) -> EndpointConfig:
    own = (None, None) if name is None else (pki / f"{name}.pem", pki / f"{name}.key")
    more.setdefault("reconnect_s", 0)
    return EndpointConfig(tls=TlsConfig(pki / "ca.pem", *own, **(tls or {})), **more)


@contextlib.asynccontextmanager
async def ends(server: EndpointConfig, client: EndpointConfig):
    async with Endpoint(server) as there, Endpoint(client) as here:
        yield there, here, await there.listen("127.0.0.1")


async def transfer(sender, receiver, manifest, cache, blank) -> None:
    incoming = receiver.expect(manifest.transfer, Expectation(lambda _: blank.pages))
    outgoing = sender.open(manifest)
    for (layer, tensor), pages in cache.pages.items():
        outgoing.ready(layer, tensor, pages)
    await asyncio.gather(outgoing.seal(), incoming.sealed())
    assert blank.bytes() == cache.bytes()


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
async def test_a_transfer_over_tls_both_ways(pki, native, monkeypatch, make_manifest, make_cache):
    if not native:
        for module in ("kvtransport.tls", "kvtransport.io.tls"):
            monkeypatch.setattr(f"{module}.implementation", lambda: _pure_tls)
    async with ends(server_config(pki), client_config(pki)) as (there, here, address):
        link = await here.connect(*address, connections=3)
        back = there.links[0]
        assert back.identity == Identity("certificate", "alice", "acme")
        assert all(c.stream.session is not None for c in link.connections)
        for sender, receiver in ((link, there), (back, here)):
            manifest = make_manifest(3000)
            cache, blank = make_cache(manifest, page_bytes=2304), make_cache(manifest, page_bytes=2304, blank=True)
            await transfer(sender, receiver, manifest, cache, blank)
        assert link.telemetry().rtt_s > 0
        # Sealed by the kernel exactly where it can: elsewhere the fallback has just moved all of this.
        assert link.connections[0].stream.session.kernel == (native and kernel_has_tls())


def kernel_has_tls() -> bool:
    """Whether TCP_ULP "tls" may be set on a connected socket."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
        except OSError:
            return False
        return True


async def test_a_token_lets_in_and_names_the_tenant(pki, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("# who may come\nbob:a secret of enough bytes:acme\n")
    tokens.chmod(0o600)
    async with ends(server_config(pki, tokens=TokenStore(tokens)), client_config(pki, None, token=TOKEN)) as (
        there,
        here,
        address,
    ):
        await here.connect(*address, connections=2)
        assert there.links[0].identity == Identity("token", "bob", "acme")


@pytest.mark.parametrize(
    "token", [None, Token("bob", b"another secret, also long"), Token("eve", b"a secret of enough bytes")]
)
async def test_strangers_are_told_the_same(pki, token):
    server = server_config(pki, tokens=TokenStore([TOKEN]), tls={"client_certificates": "off"})
    async with ends(server, client_config(pki, None, token=token)) as (there, here, address):
        wanted = "has to show who it is: a token is wanted" if token is None else "the token is not known here"
        with pytest.raises(HandshakeError, match=wanted):
            await here.connect(*address)
        assert there.links == ()
        assert there.refusals["handshake"] >= 1


async def test_a_proof_is_worth_nothing_on_another_connection(pki, monkeypatch):
    """A server that a client dials cannot pass its token on, and nobody can say it twice."""
    from kvtransport.engine.native import EngineConnection as Connection

    said: list[bytes] = []
    real = Connection.send_control

    def listening(self, frame):
        said.append(bytes(frame))
        real(self, frame)

    monkeypatch.setattr(Connection, "send_control", listening)
    server = server_config(pki, tokens=TokenStore([TOKEN]), tls={"client_certificates": "off"})
    async with ends(server, client_config(pki, None, token=TOKEN)) as (there, here, address):
        link = await here.connect(*address, connections=1)
        hello = said[0]
        assert b"a secret" not in b"".join(said)
        assert hello.startswith(b"KVT1")
        await link.close()
        before = there.refusals["handshake"]
        reader, writer = await asyncio.open_connection(
            *address, ssl=ssl.create_default_context(cafile=pki / "ca.pem"), server_hostname="localhost"
        )
        writer.write(hello)
        answer = await asyncio.wait_for(reader.read(65_536), 5)
        assert b"the token is not known here" in answer
        assert there.refusals["handshake"] == before + 1
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()


async def test_a_connection_cannot_join_somebody_elses_link(pki):
    """The id of a link is no secret: whoever joins it must be who made it."""
    server = server_config(pki, tokens=TokenStore([TOKEN]))
    async with ends(server, client_config(pki, None, token=TOKEN)) as (there, here, address):
        link = await here.connect(*address, connections=2)
        async with Endpoint(client_config(pki, "alice"), entropy=lambda n: here.incarnation[:n]) as eve:
            assert eve.incarnation == here.incarnation
            with pytest.raises(HandshakeError, match="somebody else's"):
                await dial_into(eve, address, link.id, index=1, peer=there.incarnation)
        assert len(there.links[0].connections) == 2


# -- errors that say what to do ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "tls", "error", "match"),
    [
        (None, {}, TlsError, "wants a client certificate: configure certificate and key"),
        ("alice", {"server_name": "n2.example"}, TlsError, "made out to another name.*server_name"),
        ("alice", {"server_name": "192.0.2.7"}, TlsError, "made out to other addresses"),
    ],
)
async def test_who_is_not_who_it_should_be(pki, client, tls, error, match):
    server = server_config(pki, tls={"client_certificates": "require"})
    async with ends(server, client_config(pki, client, tls=tls)) as (_, here, address):
        with pytest.raises(error, match=match) as caught:
            await here.connect(*address, connections=1)
        assert not caught.value.retryable


async def test_another_authority_on_either_side(pki):
    strange = pki / "other"
    async with ends(server_config(pki), client_config(strange)) as (there, here, address):
        with pytest.raises(
            TlsError, match=r"another authority than the one configured here|not signed by the authority"
        ):
            await here.connect(*address)
        await asyncio.sleep(0.05)
        assert there.refusals["tls"] >= 1
    mixed = EndpointConfig(tls=TlsConfig(pki / "ca.pem", strange / "alice.pem", strange / "alice.key"), reconnect_s=0)
    with pytest.raises(CertificateError, match="another authority than the one in"):
        Endpoint(mixed)


async def test_an_expired_certificate_is_refused_on_either_side(pki, tmp_path):
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    certs.make(tmp_path, [certs.Subject.node("n1=localhost"), certs.Subject.client("alice")], now=old)
    with pytest.raises(CertificateError, match=r"n1\.pem expired on .*kvpool certs --renew"):
        Endpoint(server_config(tmp_path))
    certs.make(tmp_path, [], renew=True)
    async with Endpoint(server_config(tmp_path)):
        pass


async def test_plain_and_tls_do_not_understand_each_other_and_say_so(pki):
    async with ends(EndpointConfig(), client_config(pki)) as (_, here, address):
        with pytest.raises((TlsError, ConnectError), match="TLS"):
            await here.connect(*address, connections=1)
    async with ends(server_config(pki), EndpointConfig(reconnect_s=0)) as (there, here, address):
        with pytest.raises(KVError):
            await here.connect(*address, connections=1)
        assert there.refusals["tls"] == 1


FILES = [
    ({"authority": "none.pem"}, ConfigError, "TLS authority: cannot read .*none.pem: No such file"),
    ({"certificate": "none.pem"}, ConfigError, "TLS certificate: cannot read"),
    ({"certificate": None}, ConfigError, "a key but no certificate"),
    ({"key": None}, ConfigError, "a certificate but no key"),
    ({"key": "alice.key"}, CertificateError, "alice.key is not the key of .*n1.pem"),
    ({"key": "n1.pem"}, CertificateError, "holds no private key.*name the key file"),
    ({"certificate": "n1.key"}, CertificateError, "it holds a private key: name the certificate file"),
    ({"authority": "n1.pem"}, CertificateError, "no certificate authority"),
    ({"key": "locked.key"}, CertificateError, "encrypted with a passphrase"),
    ({"key": "open.key"}, ConfigError, "everybody on this machine may read .*chmod 600"),
    ({"authority": "empty"}, CertificateError, "no certificate in PEM form"),
    ({"suites": "TLS_NONSENSE"}, CertificateError, "OpenSSL refuses.*cipher suites"),
    ({"client_certificates": "maybe"}, ConfigError, 'is "require", "accept" or "off", not \'maybe\''),
]


@pytest.mark.parametrize(("change", "error", "match"), FILES)
async def test_files_that_cannot_be_used(pki, tmp_path, change, error, match):
    from cryptography.hazmat.primitives import serialization as s

    for path in pki.glob("*.*"):
        shutil.copy(path, tmp_path)
    key = s.load_pem_private_key((pki / "n1.key").read_bytes(), None)
    locked = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x"))
    for name, data, mode in (("locked.key", locked, 0o600), ("open.key", (pki / "n1.key").read_bytes(), 0o644)):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(mode)
    (tmp_path / "empty").touch()
    settings = {"authority": "ca.pem", "certificate": "n1.pem", "key": "n1.key", **change}
    names = ("authority", "certificate", "key")
    files = {n: None if settings[n] is None else tmp_path / settings.pop(n) for n in names if settings[n] is not None}
    rest = {n: v for n, v in settings.items() if n not in names}
    with pytest.raises(error, match=match):
        Endpoint(EndpointConfig(tls=TlsConfig(**files, **rest)))


def test_a_certificate_that_is_not_valid_yet_or_not_for_long(pki, tmp_path):
    config = TlsConfig(pki / "ca.pem", pki / "n1.pem", pki / "n1.key")
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    with pytest.raises(CertificateError, match="clock"):
        load_credentials(config, lambda: past)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=360)
    (note,) = load_credentials(config, lambda: soon).notes
    assert "expires on" in note


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bob", "line 1: a token is written name:secret"),
        ("\nbob:short", "line 2: the secret of token 'bob' has 5 bytes"),
        ("b b:0123456789abcdef", "line 1: 'b b' is no name"),
        ("a:0123456789abcdef\na:0123456789abcdef", "line 2: a second token named 'a'"),
        ("a:0123456789abcdef:not/ok", "is no tenant"),
    ],
)
def test_tokens_that_are_none(tmp_path, text, match):
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=match) as caught:
        load_tokens(path)
    assert "0123456789abcdef" not in str(caught.value)


def test_a_token_does_not_show_its_secret():
    assert "enough" not in repr(TOKEN)


# -- closed by default ---------------------------------------------------------------------------------


async def test_beyond_loopback_tls_and_somebody(pki):
    async with Endpoint(server_config(pki)) as endpoint:
        assert (await endpoint.listen("0.0.0.0"))[1] > 0
    async with Endpoint(server_config(pki, tls={"client_certificates": "off"})) as endpoint:
        with pytest.raises(InsecureBindError, match="anybody could come in"):
            await endpoint.listen("0.0.0.0")
    tokens = server_config(pki, tls={"client_certificates": "off"}, tokens=TokenStore([TOKEN]))
    async with Endpoint(tokens) as endpoint:
        await endpoint.listen("0.0.0.0")
    # tokens alone do not encrypt
    async with Endpoint(EndpointConfig(tokens=TokenStore([TOKEN]), token=TOKEN)) as endpoint:
        with pytest.raises(InsecureBindError, match="configure TLS"):
            await endpoint.listen("0.0.0.0")
        with pytest.raises(InsecureBindError, match="configure TLS"):
            await endpoint.connect("192.0.2.1", 1)


async def test_listening_needs_a_certificate(pki):
    async with Endpoint(client_config(pki, None)) as endpoint:
        with pytest.raises(ConfigError, match="a certificate and key of its own"):
            await endpoint.listen("127.0.0.1")


# -- files that change while the process runs ----------------------------------------------------------


async def test_certificates_are_read_again(pki, tmp_path, monkeypatch):
    monkeypatch.setattr("kvtransport.reloading.CHECK_S", 0.0)
    for path in pki.glob("*.*"):
        shutil.copy(path, tmp_path)
    async with ends(server_config(tmp_path), client_config(tmp_path)) as (there, here, address):
        said: list[str] = []
        there.admission.credentials.on_change = said.append
        first = await here.connect(*address, connections=1)

        def serial(link) -> bytes:
            return link.connections[0].stream.session.peer_certificate

        # half of it: the key alone
        good = (tmp_path / "n1.key").read_bytes()
        (tmp_path / "n1.key").write_text("-----BEGIN")
        second = await here.connect(*address, connections=1)
        assert serial(first) == serial(second)
        assert "earlier ones stay" in said[-1]
        assert there.admission.credentials.error is not None
        (tmp_path / "n1.key").write_bytes(good)
        certs.make(tmp_path, [certs.Subject.node("n1=127.0.0.1")], renew=True)
        third = await here.connect(*address, connections=1)
        assert serial(third) != serial(first)
        assert said[-1] == "certificates read again"
        assert not first.closed


async def test_a_token_that_is_struck_off_is_worth_nothing(pki, tmp_path, monkeypatch):
    monkeypatch.setattr("kvtransport.reloading.CHECK_S", 0.0)
    tokens = tmp_path / "tokens"
    tokens.write_text("bob:a secret of enough bytes\n")
    tokens.chmod(0o600)
    server = server_config(pki, tokens=TokenStore(tokens))
    async with ends(server, client_config(pki, None, token=TOKEN)) as (_, here, address):
        await here.connect(*address, connections=1)
        tokens.write_text("# nobody\n")
        with pytest.raises(HandshakeError, match="not known here"):
            await here.connect(*address, connections=1)


# -- strangers -----------------------------------------------------------------------------------------


async def test_slow_peers_are_closed_at_every_stage(pki):
    """Nothing, half a hello, and a TLS session that says nothing more: each gone after the handshake's time."""
    server = server_config(pki, handshake_timeout_s=0.3)
    async with Endpoint(server) as there:
        address = await there.listen("127.0.0.1")
        silent = await asyncio.open_connection(*address)
        half = await asyncio.open_connection(*address)
        half[1].write(b"\x16\x03\x01\x02\x00\x01\x00")
        context = ssl.create_default_context(cafile=pki / "ca.pem")
        idle = await asyncio.open_connection(*address, ssl=context, server_hostname="localhost")
        drip = await asyncio.open_connection(*address, ssl=context, server_hostname="localhost")

        async def dribble() -> None:
            for byte in b"KVT1" + bytes(60):
                drip[1].write(bytes([byte]))
                await asyncio.sleep(0.05)

        dribbling = asyncio.ensure_future(dribble())
        started = asyncio.get_running_loop().time()
        for reader, _ in (silent, half, idle, drip):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await asyncio.wait_for(reader.read(), 3)
        assert asyncio.get_running_loop().time() - started < 2
        dribbling.cancel()
        assert sum(there.refusals.values()) == 4
        assert there.admission.gate.active == 0
        for _, writer in (silent, half, idle, drip):
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


async def test_one_address_has_a_quarter_of_the_places(pki):
    server = server_config(pki, max_handshakes=16, handshake_timeout_s=5)
    async with Endpoint(server) as there:
        address = await there.listen("127.0.0.1")
        peers, gone = [], 0
        for _ in range(10):
            try:
                peers.append(await asyncio.open_connection(*address))
            except ConnectionError:
                gone += 1
        for reader, _ in peers:
            with contextlib.suppress(TimeoutError):
                try:
                    gone += await asyncio.wait_for(reader.read(1), 0.05) == b""
                except ConnectionError:
                    gone += 1
        assert gone == 6
        assert there.refusals["connect"] == 6
        for _, writer in peers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize("tls", [True, False])
async def test_strangers_get_little_for_what_they_send(pki, tls):
    """Garbage is answered with an error of bounded size, whatever its own size; a first TLS flight costs its asker."""
    async with Endpoint(server_config(pki) if tls else EndpointConfig()) as there:
        address = await there.listen("127.0.0.1")
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"KVT1" + os.urandom(60), os.urandom(4096), b"\x16\x03\x01"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(garbage)
            writer.write_eof()
            try:
                answer = await asyncio.wait_for(reader.read(), 3)
            except ConnectionError:
                answer = b""
            assert len(answer) <= 1024
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert there.links == ()


async def test_a_transfer_goes_on_under_a_flood(pki, make_manifest, make_cache):
    """Handshakes that never end, and some that do not begin, from a peer that opens new ones all the time."""
    server = server_config(pki, max_handshakes=32)
    async with ends(server, client_config(pki)) as (there, here, address):
        link = await here.connect(*address, connections=2)
        stop = asyncio.Event()

        async def flood() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(*address)
                    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(32))
                    await asyncio.sleep(0.01)
                    writer.transport.abort()

        floods = [asyncio.ensure_future(flood()) for _ in range(20)]
        for _ in range(3):
            manifest = make_manifest(3000)
            await transfer(link, there, manifest, make_cache(manifest), make_cache(manifest, blank=True))
        stop.set()
        await asyncio.gather(*floods)
        assert link.telemetry().connections == 2


@pytest.mark.parametrize("threads", [0, 1], ids=["loop", "engine"])
@pytest.mark.parametrize("kind", [FrameType.CALL, FrameType.OPEN, FrameType.DATA])
async def test_a_stranger_cannot_make_this_side_store_large_frames(threads, kind):
    """A MiB that is announced before the HELLO is refused at its header; nothing waits for it."""
    async with Endpoint(EndpointConfig(io_threads=threads)) as there:
        reader, writer = await asyncio.open_connection(*await there.listen("127.0.0.1"))
        transfer = bytes(16) if kind is FrameType.CALL else os.urandom(16)
        writer.write(seal_header(pack_header(kind, transfer=transfer, length=1 << 20), 1))
        answer = await asyncio.wait_for(reader.read(65_536), 2)
        assert b"limit" in answer
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert there.refusals["limit"] == 1
