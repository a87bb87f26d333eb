"""Kernel TLS without a kernel that has it: a preloaded library takes the keys, and this test seals records with them as a kernel would."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from kvtransport import _native
from kvtransport.buffers import PageList
from tests.tlskit import contexts

SHIM = Path(__file__).with_name("kernel_tls_shim.c")
# linux/tls.h: cipher, bytes of IV, key and salt.
CIPHERS = {
    "TLS_AES_128_GCM_SHA256": (51, 8, 16, 4),
    "TLS_AES_256_GCM_SHA384": (52, 8, 32, 4),
    "TLS_CHACHA20_POLY1305_SHA256": (54, 12, 32, 0),
}
ALERT, DATA = 21, 23
PLAIN = 16_384


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", str(SHIM), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


@pytest.mark.skipif(sys.platform != "linux", reason="kTLS is Linux's")
def test_what_the_kernel_is_told_seals_what_the_peer_opens(shim, pki):
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_kernel_tls", str(shim), str(pki)],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ways = ("sealed by the kernel", "refused by the kernel")
    assert done.stdout.splitlines() == [f"{suite}: {way}" for suite in CIPHERS for way in ways]


class Kernel:
    """Seals what was sent in plain, by what ``setsockopt`` was given."""

    def __init__(self, suite: str, info: bytes) -> None:
        cipher, iv_bytes, key_bytes, salt_bytes = CIPHERS[suite]
        assert struct.unpack_from("=HH", info) == (0x0304, cipher)
        assert len(info) == 4 + iv_bytes + key_bytes + salt_bytes + 8
        parts, at = [], 4
        for n in (iv_bytes, key_bytes, salt_bytes, 8):
            parts.append(info[at : at + n])
            at += n
        iv, key, salt, sequence = parts
        self._aead = ChaCha20Poly1305(key) if salt_bytes == 0 else AESGCM(key)
        self._iv, self._sequence = int.from_bytes(salt + iv, "big"), int.from_bytes(sequence, "big")

    def seal(self, data: bytes, kind: int = DATA) -> bytes:
        records = b""
        for at in range(0, len(data), PLAIN):
            part = data[at : at + PLAIN] + bytes([kind])
            head = struct.pack("!BHH", DATA, 0x0303, len(part) + 16)
            nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
            records += head + self._aead.encrypt(nonce, part, head)
            self._sequence += 1
        return records


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 20):
            sink.sendall(data)
    except BlockingIOError:
        pass


def receive(end: _native.Tls, nbytes: int) -> bytes:
    got, at = PageList.of(bytearray(nbytes)), 0
    while at < nbytes:
        n = end.recv_pages(got.base, got.pieces, at, bytearray(64), 0)
        assert n > 0
        at += n
    return bytes(got.tobytes())


def play(library: Path, pki: Path, suite: str, refuses: bool) -> None:
    """One connection, from handshake to close."""
    told = ctypes.CDLL(str(library))
    ctypes.c_int.in_dll(told, "record_type").value = 0
    # sender - near, far - peer: the test stands between near and far.
    (sender_sock, near), (far, peer_sock) = socket.socketpair(), socket.socketpair()
    for sock in (sender_sock, near, far, peer_sock):
        sock.setblocking(False)
    ctypes.c_int.in_dll(told, "kernel_fd").value = sender_sock.fileno()
    ctypes.c_int.in_dll(told, "refuses").value = refuses
    client, server = contexts(pki, suites=suite)
    sender, peer = _native.Tls(client, sender_sock.fileno(), "localhost"), _native.Tls(server, peer_sock.fileno())
    for _ in range(50):
        left = sender.handshake()
        pump(near, far)
        right = peer.handshake()
        pump(far, near)
        if left == right == 0:
            break
    assert (sender.cipher, sender.kernel, peer.kernel) == (suite, not refuses, False)
    pages = PageList.of(bytearray(os.urandom(50_000)))
    sent = 0
    while sent < 64 + pages.nbytes:
        sent += sender.send_pages(b"h" * 64, pages.base, pages.pieces, sent)
    if refuses:
        pump(near, far)
        assert receive(peer, 64 + pages.nbytes) == b"h" * 64 + pages.tobytes()
        print(f"{suite}: refused by the kernel")
        return
    size = ctypes.c_int.in_dll(told, "info_bytes").value
    kernel = Kernel(suite, bytes((ctypes.c_ubyte * size).in_dll(told, "info")))
    plain = near.recv(1 << 20)
    assert plain == b"h" * 64 + pages.tobytes()
    far.sendall(kernel.seal(plain))
    assert receive(peer, len(plain)) == plain
    # The end is an alert, of its own record type.
    sender.shutdown()
    assert ctypes.c_int.in_dll(told, "record_type").value == ALERT
    far.sendall(kernel.seal(near.recv(64), ALERT))
    try:
        peer.recv_pages(None, None, 0, bytearray(64), 0)
    except EOFError:
        print(f"{suite}: sealed by the kernel")


if __name__ == "__main__":
    for named in CIPHERS:
        for refuses in (False, True):
            play(Path(sys.argv[1]), Path(sys.argv[2]), named, refuses)
