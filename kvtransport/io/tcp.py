"""TCP over the event loop's readiness callbacks, with the vectored loops of ``native``.

Neither asyncio's streams (they copy; measured five times slower) nor transports (a Python call per buffer) are
used: the loop only says when a descriptor is ready, the bytes move between the socket and their final place
in one C call.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..buffers import PageList, recv_pages, send_pages
from ..errors import ConfigError, ConnectError
from ..flow.gate import Pacer
from ..flow.telemetry import PathInfo
from ..flow.tuning import LONG_PATH, congestion_for
from . import tcp_info
from .base import LAST_WORD_S, TlsSession

TCP_INFO = getattr(socket, "TCP_INFO", 11)
SO_MAX_PACING_RATE = 47
_SIOCOUTQ = 0x5411
log = logging.getLogger("kvtransport")


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """Per-socket settings. None leaves the system's default, and its own sizing of buffers, which goes further.

    ``congestion`` is a name such as "cubic" or "bbr"; a kernel that does not allow it keeps its default. None: what suits the
    path (:mod:`kvtransport.flow.tuning`), from the handshake's round trip on.
    ``step_bytes`` bounds the bytes moved per readiness callback and connection, so that no connection starves another.
    """

    congestion: str | None = None
    send_buffer: int | None = None
    recv_buffer: int | None = None
    connect_timeout_s: float = 5.0
    backlog: int = 256
    step_bytes: int = 1 << 20


class TcpStream:
    """A connected TCP socket as a :class:`kvtransport.io.base.ByteStream`."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, options: TcpOptions) -> None:
        sock.setblocking(False)
        tune(sock, options)
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self.step_bytes = options.step_bytes
        self._reading = False
        self._writing = False
        self.session: TlsSession | None = None
        self.gone: asyncio.Future[None] = loop.create_future()
        self._last_word: asyncio.TimerHandle | None = None
        self.peer = _address(sock.getpeername())
        self.local = _address(sock.getsockname())

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._fd

    def send(self, head: bytes, pages: PageList | None, start: int) -> int:
        if pages is None:
            return send_pages(self._fd, head, None, None, start, self.step_bytes)
        return send_pages(self._fd, head, pages.base, pages.pieces, start, self.step_bytes)

    def recv(self, pages: PageList | None, start: int, tail: bytearray, tail_start: int) -> int:
        if pages is None:
            return recv_pages(self._fd, None, None, start, tail, tail_start, self.step_bytes)
        return recv_pages(self._fd, pages.base, pages.pieces, start, tail, tail_start, self.step_bytes)

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        self.on_readable(None)
        self.on_writable(None)
        self._fd = -1
        return self._sock.detach()

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        if callback is not None:
            self._loop.add_reader(self._fd, callback)
        elif self._reading:
            self._loop.remove_reader(self._fd)
        self._reading = callback is not None

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        if callback is not None:
            self._loop.add_writer(self._fd, callback)
        elif self._writing:
            self._loop.remove_writer(self._fd)
        self._writing = callback is not None

    def close(self) -> None:
        if self._fd < 0:
            return
        self.on_readable(None)
        self.on_writable(None)
        self._fd = -1
        self._sock.close()
        if self._last_word is not None:
            self._last_word.cancel()
        if not self.gone.done():
            self.gone.set_result(None)

    def finish(self) -> asyncio.Future[None]:
        if self._fd >= 0 and self._last_word is None:
            self.on_writable(None)
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()
            else:
                self.on_readable(self._discard)
                self._last_word = self._loop.call_later(LAST_WORD_S, self.close)
        return self.gone

    def _discard(self) -> None:
        try:
            if self._fd < 0 or self._sock.recv(1 << 16):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self.close()

    def abort(self) -> None:
        if self._fd < 0:
            return
        # Linger 0: a reset instead of a lingering FIN, so that half a frame cannot pass for a clean end.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def info(self) -> PathInfo | None:
        if self._fd < 0 or sys.platform != "linux":
            return None
        return tcp_info.parse(self._sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, tcp_info.BYTES))

    def congestion(self) -> str:
        """The congestion control this socket runs: what was asked for may not be allowed."""
        return "unknown" if self._fd < 0 else congestion_of(self._sock)

    def set_congestion(self, names: Sequence[str]) -> str | None:
        """Run the first of ``names`` that the system allows; returns it, None when it allows none."""
        return None if self._fd < 0 else set_congestion(self._sock.setsockopt, names)

    def pace(self, bytes_per_s: float | None) -> None:
        """Send at most so fast (None: no limit)."""
        if self._fd >= 0 and sys.platform == "linux":
            self._sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pacing_option(bytes_per_s))

    def keep_unsent(self, nbytes: int | None) -> None:
        """Take no more when so many bytes were not sent for the first time yet (None: as the system has it)."""
        if self._fd >= 0 and sys.platform == "linux":
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_option(nbytes))

    def unsent_bytes(self) -> int:
        if self._fd < 0 or sys.platform != "linux":
            return 0
        import fcntl

        return int(struct.unpack("i", fcntl.ioctl(self._fd, _SIOCOUTQ, b"\0\0\0\0"))[0])


class TcpListener:
    """A listening socket; see :class:`kvtransport.io.base.Listener`."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        options: TcpOptions,
        accept: Callable[[TcpStream], None],
        pacer: Pacer | None = None,
    ) -> None:
        self._sock: socket.socket | None = sock
        self._loop = loop
        self._options = options
        self._accept = accept
        self._pacer = pacer
        self._paused = False
        self.host, self.port = sock.getsockname()[:2]
        loop.add_reader(sock.fileno(), self._on_ready)

    def _on_ready(self) -> None:
        if self._pacer is None:
            self._take()
            return
        wait = self._pacer.wait(self._loop.time())
        if wait <= 0:
            started = time.perf_counter()
            self._take()
            self._pacer.spend(self._loop.time(), time.perf_counter() - started)
            wait = self._pacer.wait(self._loop.time())
        if wait > 0:
            # Strangers have had their share of this loop for now: they wait in the kernel's queue, which is bounded.
            self._pause(wait)

    def _take(self) -> None:
        # A burst of connections is taken in one go, but bounded so that established links keep running.
        for _ in range(16):
            if self._sock is None:
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Out of descriptors: readiness would spin. Pause, existing links go on.
                    self._pause(0.2)
                    return
                raise
            try:
                stream = TcpStream(sock, self._loop, self._options)
            except OSError:
                sock.close()
                continue
            self._accept(stream)

    def _pause(self, seconds: float) -> None:
        if self._sock is not None and not self._paused:
            self._paused = True
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._paused = False
        if self._sock is not None:
            self._loop.add_reader(self._sock.fileno(), self._on_ready)

    def close(self) -> None:
        if self._sock is None:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._sock = None


class TcpNetwork:
    """See :class:`kvtransport.io.base.Network`."""

    def __init__(self, options: TcpOptions | None = None, *, pacer: Pacer | None = None) -> None:
        """``pacer``: the share of the loop's time that accepting may take."""
        self.options = options or TcpOptions()
        self._pacer = pacer

    async def connect(self, host: str, port: int, *, local: str | None = None) -> TcpStream:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.options.connect_timeout_s):
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                last: OSError | None = None
                for family, kind, proto, _, address in infos:
                    sock = socket.socket(family, kind, proto)
                    try:
                        sock.setblocking(False)
                        _size_buffers(sock, self.options)
                        if local is not None:
                            sock.bind((local, 0))
                        await loop.sock_connect(sock, address)
                        return TcpStream(sock, loop, self.options)
                    except OSError as error:
                        sock.close()
                        last = error
                    except BaseException:
                        sock.close()
                        raise
                raise last or OSError(f"{host} has no address")
        except TimeoutError:
            raise ConnectError(
                f"no answer from {host}:{port} within {self.options.connect_timeout_s:g} s; is the address right and the port open in the firewall?"
            ) from None
        except OSError as error:
            # The event loops have words of their own for a refusal; a failed look-up has a negative number.
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
            raise ConnectError(f"cannot connect to {host}:{port}: {why}; is the peer running?") from error

    async def listen(self, host: str, port: int, accept: Callable[[TcpStream], None]) -> TcpListener:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = infos[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _size_buffers(sock, self.options)
            sock.bind(address)
            sock.listen(self.options.backlog)
            return TcpListener(sock, loop, self.options, accept, self._pacer)
        except OSError as error:
            sock.close()
            hint = ""
            if error.errno == errno.EADDRINUSE:
                hint = "; another process has this port: choose another, or 0 for any free one"
            elif error.errno == errno.EACCES:
                hint = "; ports below 1024 need a privilege"
            raise ConfigError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}{hint}") from error


def _size_buffers(sock: socket.socket, options: TcpOptions) -> None:
    # Before connect and listen: the window scale is agreed on in the handshake.
    if options.send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer)
    if options.recv_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.recv_buffer)


def tune(sock: socket.socket, options: TcpOptions) -> None:
    """Apply ``options`` to a connected TCP socket; a congestion control the system does not allow is left as it is."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if options.congestion is not None:
        set_congestion(sock.setsockopt, (options.congestion,))
    elif sys.platform == "linux":
        info = tcp_info.parse(sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, tcp_info.BYTES))
        set_congestion(sock.setsockopt, congestion_for(None if info is None else info.min_rtt_s))


_refused: set[str] = set()
"""Congestion controls this system does not let this process have."""


def set_congestion(setsockopt: Callable[[int, int, bytes], None], names: Sequence[str]) -> str | None:
    """Choose the first of ``names`` that the system allows; returns it, None when it allows none of them.

    Says once per process, as a warning, that BBR is not to be had.
    """
    if not hasattr(socket, "TCP_CONGESTION"):
        return None
    for name in names:
        if name in _refused:
            continue
        try:
            setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            return name
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EPERM):
                raise
            _refused.add(name)
            if name in LONG_PATH:
                log.warning(
                    "%s congestion control is not allowed here: long and lossy paths will carry less. As root: "
                    "modprobe tcp_%s; sysctl -w net.ipv4.tcp_allowed_congestion_control='reno cubic %s'",
                    *(name,) * 3,
                )
    return None


def refused_congestion() -> frozenset[str]:
    """Congestion controls that were asked for and that this system did not allow."""
    return frozenset(_refused)


def pacing_option(bytes_per_s: float | None) -> bytes:
    """The value of SO_MAX_PACING_RATE: 64 bits, all ones for no limit."""
    rate = (1 << 64) - 1 if bytes_per_s is None else max(1, int(bytes_per_s))
    return struct.pack("=Q", rate)


def unsent_option(nbytes: int | None) -> bytes:
    """The value of TCP_NOTSENT_LOWAT; 0 is the system's own."""
    return struct.pack("i", nbytes or 0)


def congestion_of(sock_or_fd: socket.socket) -> str:
    """The congestion control a TCP socket runs, "unknown" where the system does not say."""
    if not hasattr(socket, "TCP_CONGESTION"):
        return "unknown"
    return sock_or_fd.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def address_of(peer: str) -> str:
    """The address of a stream's ``peer``, without the port."""
    return peer.rpartition(":")[0]


def _address(name: object) -> str:
    if isinstance(name, tuple):
        host, port = name[0], name[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(name) or "unnamed"
