"""Records of TLS 1.3 in C: keys renewed, damage noticed, padding taken off, and the same as Python's ssl makes them."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import random
import select
import socket
import ssl

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvtransport import _native, _pure_tls
from kvtransport.buffers import PageList
from kvtransport.tls import SUITES
from tests.tlskit import contexts, shake

AES128 = "TLS_AES_128_GCM_SHA256"


class Pair:
    """Client and server over a socket pair; ``wire``: raw sockets that a test may sit between."""

    def __init__(self, pki, types=(_native, _native), suites=SUITES) -> None:
        self.sockets = socket.socketpair()
        for sock in self.sockets:
            sock.setblocking(False)
        client, server = contexts(pki, types, suites)
        self.left = types[0].Tls(client, self.sockets[0].fileno(), "localhost")
        self.right = types[1].Tls(server, self.sockets[1].fileno())
        shake(self.left, self.right)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def pair(pki):
    made = Pair(pki)
    yield made
    made.close()


def move(sender, receiver, head: bytes, pages: PageList, into: PageList) -> bytes:
    """Send head ++ pages and receive them into a head and ``into``; the head."""
    got = bytearray(len(head))
    sent = at = 0
    total = len(head) + pages.nbytes
    for _ in range(100_000):
        if sent < total:
            sent += sender.send_pages(head, pages.base, pages.pieces, sent)
        elif sender.kept:
            sender.flush()
        if at < len(head):
            at += receiver.recv_pages(None, None, 0, got, at)
        else:
            at += receiver.recv_pages(into.base, into.pieces, at - len(head), None, 0)
        if at == total:
            return bytes(got)
    raise AssertionError(f"{at} of {total} bytes after 100,000 steps")


def scattered(nbytes: int, page: int, seed: int, *, blank: bool) -> PageList:
    rng = random.Random(seed)
    count = -(-nbytes // page)
    base = bytearray(2 * count * page) if blank else bytearray(rng.randbytes(2 * count * page))
    return PageList.pages(base, [i * page for i in rng.sample(range(2 * count), count)], page, nbytes)


IMPLEMENTATIONS = [(_native, _native), (_native, _pure_tls), (_pure_tls, _native), (_pure_tls, _pure_tls)]


@pytest.mark.parametrize("types", IMPLEMENTATIONS, ids=["native", "native-python", "python-native", "python"])
@pytest.mark.parametrize("page", [48, 1000, 2304, 18_432, 1 << 20])
def test_pages_cross_as_they_are(pki, types, page):
    pair = Pair(pki, types)
    for seed, nbytes in enumerate((1, 15, 4096, 70_000, 300_001)):
        sent, got = scattered(nbytes, page, seed, blank=False), scattered(nbytes, page, seed + 9, blank=True)
        for sender, receiver in ((pair.left, pair.right), (pair.right, pair.left)):
            assert move(sender, receiver, b"h" * 64, sent, got) == b"h" * 64
            assert got.tobytes() == sent.tobytes()
    pair.close()


@pytest.mark.parametrize("suite", SUITES.split(":"))
def test_every_suite_and_both_ends_share_a_binding_that_no_other_session_has(pki, suite):
    first, second = Pair(pki, suites=suite), Pair(pki, suites=suite)
    assert first.left.cipher == first.right.cipher == suite
    assert first.left.channel_binding == first.right.channel_binding
    assert len({p.left.channel_binding for p in (first, second)}) == 2
    assert first.right.peer_certificate is None
    assert first.left.peer_certificate == ssl.PEM_cert_to_DER_cert((pki / "n1.pem").read_text())
    sent, got = scattered(100_000, 4096, 1, blank=False), scattered(100_000, 4096, 2, blank=True)
    move(first.left, first.right, b"x", sent, got)
    assert got.tobytes() == sent.tobytes()
    first.close()
    second.close()


@pytest.mark.parametrize("types", [(_native, _native), (_native, _pure_tls)], ids=["native", "python"])
def test_keys_are_renewed_and_the_other_side_follows(pki, types):
    pair = Pair(pki, types)
    pair.left.update_records = 3
    sent, got = scattered(1 << 20, 4096, 1, blank=False), scattered(1 << 20, 4096, 2, blank=True)
    for _ in range(3):
        assert move(pair.left, pair.right, b"h", sent, got) == b"h"
        assert got.tobytes() == sent.tobytes()
        assert move(pair.right, pair.left, b"h", sent, got) == b"h"
    pair.close()


def test_update_records_is_at_least_one(pair):
    with pytest.raises(ValueError, match="at least 1"):
        pair.left.update_records = 0


@pytest.mark.parametrize("where", [0, 3, 5, 300, -1])
def test_a_flipped_byte_is_an_error_and_stays_one(pair, where):
    pair.left.send_pages(b"x" * 1000, None, None, 0)
    data = bytearray(pair.sockets[1].recv(4096))
    data[where] ^= 1
    injected, far = socket.socketpair()
    # The receiving end reads its descriptor: put the damaged bytes into a fresh pair under the same number.
    os.dup2(far.fileno(), pair.sockets[1].fileno())
    injected.sendall(data + (bytes(1 << 12) if where == 3 else b""))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            pair.right.recv_pages(None, None, 0, bytearray(2000), 0)
        assert caught.value.errno in (errno.EBADMSG, errno.EPROTO)
    assert pair.right.pending
    injected.close()
    far.close()


def test_the_end_with_and_without_a_word(pki):
    polite, cut = Pair(pki), Pair(pki)
    polite.left.send_pages(b"last", None, None, 0)
    assert polite.left.shutdown() == 0
    got = bytearray(10)
    assert polite.right.recv_pages(None, None, 0, got, 0) == 4
    for _ in range(2):
        with pytest.raises(EOFError):
            polite.right.recv_pages(None, None, 0, got, 0)
    with pytest.raises(BrokenPipeError):
        polite.left.send_pages(b"more", None, None, 0)
    # the other direction is open still
    assert polite.right.send_pages(b"answer", None, None, 0) == 6
    assert polite.left.recv_pages(None, None, 0, got, 0) == 6

    cut.left.send_pages(b"x" * 100, None, None, 0)
    record = cut.sockets[1].recv(4096)
    injected, far = socket.socketpair()
    os.dup2(far.fileno(), cut.sockets[1].fileno())
    injected.sendall(record[:50])
    injected.close()
    with pytest.raises(OSError, match="middle of a record"):
        cut.right.recv_pages(None, None, 0, got, 0)
    for pair in (polite, cut):
        pair.close()
    far.close()


def test_what_the_socket_does_not_take_is_kept_and_bounded(pair):
    page = PageList.of(bytes(8 << 20))
    taken = 0
    while n := pair.left.send_pages(b"", page.base, page.pieces, taken):
        taken += n
    assert 0 < pair.left.kept <= 128 << 10
    assert taken < 8 << 20
    got = 0
    sink = bytearray(1 << 20)
    while got < taken:
        got += pair.right.recv_pages(sink, None, 0, None, 0)
        pair.left.flush()
    assert pair.left.kept == 0
    assert got == taken


def test_only_after_the_handshake_and_only_within_memory(pki):
    left, right = socket.socketpair()
    client, _ = contexts(pki)
    with left, right:
        tls = _native.Tls(client, left.fileno(), "localhost")
        with pytest.raises(ValueError, match="handshake is not over"):
            tls.recv_pages(None, None, 0, bytearray(4), 0)
        with pytest.raises(ValueError, match="handshake is not over"):
            tls.send_pages(b"x", None, None, 0)
        right.close()
        with pytest.raises((EOFError, OSError)):
            while tls.handshake():
                select.select([left], [], [], 1)
        with pytest.raises(ValueError, match="has failed"):
            tls.handshake()
    pair = Pair(pki)
    with pytest.raises(BufferError):
        pair.left.recv_pages(bytes(4), None, 0)
    with pytest.raises(ValueError, match="there are only"):
        pair.left.send_pages(b"abc", None, None, 4)
    pair.close()


# -- records made by hand: what OpenSSL never sends --------------------------------------------------


def expand_label(secret: bytes, label: bytes, nbytes: int) -> bytes:
    info = nbytes.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
    return hmac.new(secret, info + b"\1", hashlib.sha256).digest()[:nbytes]


class Forger:
    """A client made of Python's ssl, whose keys are known, so that it can seal any record."""

    def __init__(self, pki, tmp_path) -> None:
        self.sockets = socket.socketpair()
        for sock in self.sockets:
            sock.setblocking(False)
        _, server = contexts(pki, suites=AES128)
        client = _pure_tls.TlsContext(False, None, None, (pki / "ca.pem").read_bytes(), 2, "")
        client.context.keylog_filename = str(tmp_path / "keys")
        self.tls = _native.Tls(server, self.sockets[1].fileno())
        self._client = _pure_tls.Tls(client, self.sockets[0].fileno(), "localhost")
        shake(self._client, self.tls)
        lines = [line.split() for line in (tmp_path / "keys").read_text().splitlines()]
        self._secret = next(bytes.fromhex(words[2]) for words in lines if words[0] == "CLIENT_TRAFFIC_SECRET_0")
        self._sequence = 0

    def seal(self, content: bytes, type: int, padding: int = 0) -> bytes:
        key, iv = expand_label(self._secret, b"key", 16), expand_label(self._secret, b"iv", 12)
        nonce = (int.from_bytes(iv, "big") ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        plain = content + bytes([type]) + bytes(padding)
        header = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2, "big")
        return header + AESGCM(key).encrypt(nonce, plain, header)

    def receive(self, *records: bytes, room: int = 1 << 15) -> bytes:
        self.sockets[0].sendall(b"".join(records))
        got = bytearray(room)
        return bytes(got[: self.tls.recv_pages(None, None, 0, got, 0)])

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def forger(pki, tmp_path):
    made = Forger(pki, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", [0, 1, 5000, 16_384])
@pytest.mark.parametrize("padding", [0, 1, 200])
def test_padding_is_taken_off(forger, nbytes, padding):
    data = random.Random(nbytes).randbytes(nbytes)
    assert forger.receive(forger.seal(data, 23, padding), forger.seal(b"behind", 23)) == data + b"behind"


def test_zeros_at_the_end_of_data_are_data(forger):
    data = b"a" * 3000 + bytes(5000)
    assert forger.receive(forger.seal(data, 23, 7)) == data


def test_tickets_are_ignored(forger):
    ticket = b"\x04\x00\x0b\xb8" + bytes(3000)
    assert forger.receive(forger.seal(ticket, 22), forger.seal(b"data", 23)) == b"data"


@pytest.mark.parametrize(
    ("content", "type", "why"),
    [
        (b"", 22, "unknown type"),
        (b"\x18\x00\x00\x01\x02", 22, "unexpected handshake"),
        (b"\x18\x00\x00\x02\x00\x00", 22, "unexpected handshake"),
        (b"\x18\x00\x00\x01\x00\x04\x00\x00\x00", 22, "unexpected handshake"),
        (b"\x0d\x00\x00\x00", 22, "unexpected handshake"),
        (b"\x04\xff\xff\xff", 22, "in pieces"),
        (b"\x04\x00", 22, "in pieces"),
        (b"x", 20, "unknown type"),
        (b"x" * 4000, 99, "unknown type"),
        (b"\x02", 21, "wrong length"),
        (b"\x02\x28", 21, "alert"),
    ],
)
def test_what_does_not_belong_is_refused(forger, content, type, why):
    with pytest.raises(OSError, match=why):
        forger.receive(forger.seal(content, type))
    assert forger.tls.alert == (0x28 if content == b"\x02\x28" else None)


def test_a_stream_of_nothing_ends(forger):
    empty = [forger.seal(b"", 23) for _ in range(32)]
    assert forger.receive(*empty, forger.seal(b"x", 23)) == b"x"
    with pytest.raises(OSError, match="too many records without data"):
        forger.receive(*(forger.seal(b"", 23) for _ in range(40)))


@pytest.mark.parametrize("length", [0, 16, 16_384 + 257, 65_535])
def test_lengths_are_checked_before_they_are_believed(forger, length):
    with pytest.raises(OSError, match="wrong length"):
        forger.receive(b"\x17\x03\x03" + length.to_bytes(2, "big") + bytes(100))


@pytest.mark.parametrize("first", [20, 21, 22, 0x47])
def test_nothing_unencrypted(forger, first):
    with pytest.raises(OSError, match="not encrypted"):
        forger.receive(bytes([first]) + b"\x03\x03\x00\x02\x01\x00")


def test_content_over_the_limit(forger):
    with pytest.raises(OSError, match="wrong length"):
        forger.receive(forger.seal(bytes([7]) * 16_385, 23))


def test_nothing_is_written_outside_the_room(forger):
    got = bytearray(b"\xaa" * 9000)
    view = memoryview(got)[1000:8000]
    data = random.Random(1).randbytes(7000)
    # A record of another type, sealed as large as the room: what it holds must not stay there.
    forger.sockets[0].sendall(forger.seal(b"\x04\x00\x1b\x54" + bytes(6996), 22) + forger.seal(data, 23))
    assert forger.tls.recv_pages(view, None, 0) == 7000
    assert got[1000:8000] == data
    assert set(got[:1000] + got[8000:]) == {0xAA}
