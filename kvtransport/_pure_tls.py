"""The twin of the TLS types of ``kvtransport._native``, over Python's ``ssl``: same names, same results, slower.

Every byte is copied through memory BIOs and the GIL is taken and given for each record. What it lacks: the channel
binding (``ssl`` has no exporter), so that tokens cannot be used, and the choice of TLS 1.3 cipher suites.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import tempfile
from typing import TYPE_CHECKING

from ._pure import _check_position, _flat, _head_runs, _Pages
from ._pure_arena import _size

if TYPE_CHECKING:
    from ._native import Memory, Pieces

_RECORD = 1 << 14
_KEEP = 128 << 10
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


def tls_version() -> str:
    """The version of OpenSSL; raises ImportError where it is not there."""
    return ssl.OPENSSL_VERSION


class TlsContext:
    """What many handshakes share: TLS 1.3 only, no session is resumed.

    ``certificate`` (with its chain), ``key`` and ``authority`` are PEM texts or None. ``verify`` of the peer's
    certificate: 0 not, 1 where it shows one, 2 required. ``suites``: names of cipher suites, the best first.
    Raises OSError(EPROTO, reason) for what OpenSSL does not take, ImportError where it is not there.
    """

    def __init__(
        self,
        server: bool,
        certificate: bytes | None,
        key: bytes | None,
        authority: bytes | None,
        verify: int,
        suites: str,
    ) -> None:
        if verify not in (0, 1, 2):
            raise ValueError("verify is 0, 1 or 2")
        self.server = server
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_TICKET
        if server:
            context.num_tickets = 0
        context.check_hostname = False
        context.verify_mode = (ssl.CERT_NONE, ssl.CERT_OPTIONAL, ssl.CERT_REQUIRED)[verify]
        try:
            if certificate is not None and key is not None:
                _load_chain(context, certificate, key)
            if authority is not None:
                context.load_verify_locations(cadata=authority.decode("ascii", "replace"))
        except ssl.SSLError as error:
            raise OSError(errno.EPROTO, f"certificate or key: {_reason(error)}") from error
        self.context = context


def _load_chain(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    # ssl reads files only.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "chain.pem")
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
            file.write(certificate + b"\n" + key)
        context.load_cert_chain(path, password=lambda: b"")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


class Tls:
    """TLS 1.3 on a connected, non-blocking socket, whose descriptor stays the caller's.

    ``name``: what the peer's certificate must be made out to, a host name or with ``address`` an IP address; None: any.
    One thread may send while another receives.
    """

    update_records = 1 << 23
    """Records after which sending gets a new key; ``ssl`` leaves that to the peer."""
    kernel = False
    """Whether the kernel seals what is sent."""

    def __init__(self, context: TlsContext, fd: int, name: str | None = None, address: bool = False) -> None:
        self._fd = fd
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if name is not None:
            context.context.check_hostname = True
        self._ssl = context.context.wrap_bio(self._in, self._out, context.server, name)
        self._kept = bytearray()
        self._ended = False
        self._shut = False
        self._done = False
        self.alert: int | None = None
        """The peer's fatal alert (RFC 8446, 6)."""
        self.peer_certificate: bytes | None = None
        """DER, after the handshake; None: the peer showed none."""
        self.channel_binding: bytes | None = None
        """32 bytes that only the two ends of this session know (RFC 9266), after the handshake."""
        self.cipher: str | None = None

    @property
    def kept(self) -> int:
        """Bytes taken and not sent: call :meth:`flush` when the socket is writable."""
        return len(self._kept)

    @property
    def pending(self) -> bool:
        """Whether :meth:`recv_pages` has something to say without the socket being readable."""
        return self._done and (self._ended or self._ssl.pending() > 0 or self._in.pending > 0)

    def handshake(self) -> int:
        """0: done, 1: go on when the socket is readable, 2: when it is writable.

        Raises OSError(EPROTO, reason), OSError as the socket does, EOFError when the peer ends the stream.
        """
        while not self._done:
            try:
                self._ssl.do_handshake()
                self._done = True
                self.peer_certificate = self._ssl.getpeercert(binary_form=True)
                self.cipher = (self._ssl.cipher() or ("",))[0]
            except ssl.SSLWantReadError:
                if self._push():
                    return 2
                if not self._pull():
                    return 1
                if self._ended:
                    raise EOFError("the peer ended the stream during the handshake") from None
            except ssl.SSLCertVerificationError as error:
                self._push()
                raise OSError(
                    errno.EPROTO, f"TLS handshake: certificate verify failed ({error.verify_message})"
                ) from error
            except ssl.SSLError as error:
                self._push()
                raise OSError(errno.EPROTO, f"TLS handshake: {_reason(error)}") from error
        return 2 if self._push() else 0

    def send_pages(
        self, head: Memory, base: Memory | None, pieces: Pieces | None, start: int, budget: int = 1 << 20
    ) -> int:
        """As :func:`kvtransport._pure.send_pages`; what is taken may be kept for :meth:`flush`."""
        self._check()
        if _size(budget) == 0:
            raise ValueError("budget must be at least 1 byte")
        if self._shut:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        flat, pages = _flat(head), _Pages(base, pieces)
        runs = _head_runs(flat, pages, _check_position("start", start, len(flat) + pages.nbytes), budget)
        taken = 0
        for run in runs:
            for at in range(0, len(run), _RECORD):
                if len(self._kept) >= _KEEP and self._push():
                    return taken
                taken += self._ssl.write(run[at : at + _RECORD])
                self._kept += self._out.read()
        self._push()
        return taken

    def recv_pages(
        self,
        base: Memory | None,
        pieces: Pieces | None,
        start: int,
        tail: Memory | None = None,
        tail_start: int = 0,
        budget: int = 1 << 20,
    ) -> int:
        """As :func:`kvtransport._pure.recv_pages`. Raises OSError(EBADMSG) for a record that does not verify."""
        self._check()
        if _size(budget) == 0:
            raise ValueError("budget must be at least 1 byte")
        rest = memoryview(bytearray()) if tail is None else _flat(tail, writable=True)
        pages = _Pages(base, pieces, writable=base is not None)
        _check_position("start", start, pages.nbytes)
        _check_position("tail_start", tail_start, len(rest))
        stop = min(start + budget, pages.nbytes)
        runs = [*pages.runs(start, stop), rest[tail_start : tail_start + budget - (stop - start)]]
        moved = 0
        for run in runs:
            at = 0
            while at < len(run):
                n = self._read(run[at:])
                if n < 0:
                    if moved == 0 and self._ended and n == -1:
                        raise EOFError("the peer has ended the stream")
                    return moved
                at += n
                moved += n
        return moved

    def _read(self, view: memoryview) -> int:
        """Bytes read; -1: the end, -2: nothing is there."""
        while True:
            try:
                n = int(self._ssl.read(len(view), view))
                if n:
                    return n
                self._ended = True  # close_notify
                return -1
            except ssl.SSLWantReadError:
                if self._ended:
                    return -1
                if not self._pull():
                    return -2
            except ssl.SSLZeroReturnError:
                self._ended = True
                return -1
            except ssl.SSLEOFError:
                self._ended = True
                return -1
            except ssl.SSLError as error:
                reason = _reason(error)
                self.alert = next((number for number, text in ALERTS.items() if f"alert {text}" in reason), None)
                bad = "bad record mac" in reason or "decryption failed" in reason
                raise OSError(errno.EBADMSG if bad else errno.EPROTO, reason) from error

    def flush(self) -> int:
        """Send on what was taken; returns the bytes still kept. Raises OSError as the socket does."""
        self._push()
        return len(self._kept)

    def shutdown(self) -> int:
        """Say that nothing more comes (close_notify), behind what is kept; returns the bytes still kept."""
        self._check()
        if not self._shut:
            self._shut = True
            with contextlib.suppress(ssl.SSLError):
                self._ssl.unwrap()
            with contextlib.suppress(OSError):
                self._push()
        return len(self._kept)

    def _check(self) -> None:
        if not self._done:
            raise ValueError("the handshake is not over")

    def _socket(self) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=self._fd)

    def _push(self) -> bool:
        """Send what is kept; whether some of it still is."""
        self._kept += self._out.read()
        sock = self._socket()
        try:
            while self._kept:
                del self._kept[: sock.send(self._kept, socket.MSG_DONTWAIT | _NO_SIGNAL)]
            if self._shut:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
        except (BlockingIOError, InterruptedError):
            return True
        finally:
            sock.detach()
        return False

    def _pull(self) -> bool:
        """Bytes from the socket; whether there was anything, be it the end."""
        sock = self._socket()
        try:
            data = sock.recv(256 << 10, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        finally:
            sock.detach()
        if data:
            self._in.write(data)
        else:
            self._ended = True
            self._in.write_eof()
        return True


ALERTS = {
    40: "handshake failure",
    42: "bad certificate",
    43: "unsupported certificate",
    44: "certificate revoked",
    45: "certificate expired",
    46: "certificate unknown",
    48: "unknown ca",
    49: "access denied",
    51: "decrypt error",
    70: "protocol version",
    71: "insufficient security",
    80: "internal error",
    109: "missing extension",
    112: "unrecognized name",
    116: "certificate required",
}
"""Alerts that end a connection, by number (RFC 8446, 6.2)."""
