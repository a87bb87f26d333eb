"""TLS 1.3 over TCP as a :class:`~kvtransport.io.base.ByteStream`: handshakes on the event loop, records in ``native``.

Strangers are bounded: so many handshakes at once, of one address a quarter of them, each for so many seconds, and all
together only a share of the loop's time (:mod:`kvtransport.flow.gate`), so that established links go on.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from typing import Protocol

from .. import _pure_tls
from .._pure_tls import ALERTS
from ..buffers import PageList
from ..errors import ConfigError, ConnectError, Fault, KVError, TlsError
from ..flow.gate import Gate, Pacer
from ..flow.telemetry import PathInfo
from ..reloading import Reloading
from ..tls import Credentials, implementation
from .base import LAST_WORD_S, BrokenStreamError, TlsSession
from .tcp import TcpListener, TcpNetwork, TcpStream, address_of

CLIENT_ALERTS = (42, 43, 44, 45, 46, 48, 49, 116)
"""What a peer says of our certificate."""


class Engine(Protocol):
    """``_native.Tls``, or its twin."""

    kept: int
    pending: bool
    kernel: bool
    alert: int | None
    peer_certificate: bytes | None
    channel_binding: bytes | None
    cipher: str | None

    def handshake(self) -> int: ...
    def send_pages(self, head: bytes, base: object, pieces: object, start: int, budget: int = ...) -> int: ...
    def recv_pages(
        self, base: object, pieces: object, start: int, tail: bytearray, tail_start: int, budget: int = ...
    ) -> int: ...
    def flush(self) -> int: ...
    def shutdown(self) -> int: ...


def native_records() -> bool:
    """Whether records are made by the extension."""
    return implementation() is not _pure_tls


class TlsStream:
    """A TCP stream with TLS on it, after the handshake."""

    def __init__(self, tcp: TcpStream, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._tcp = tcp
        self._engine = engine
        self._loop = loop
        self._readable: Callable[[], None] | None = None
        self._writable: Callable[[], None] | None = None
        self._closing: Callable[[], None] | None = None
        self._again: asyncio.Handle | None = None
        self._closed = False
        self.peer = tcp.peer
        self.local = tcp.local
        self.session: TlsSession | None = TlsSession(
            engine.peer_certificate, engine.channel_binding, engine.cipher or "", engine.kernel
        )

    def detach(self) -> tuple[int, Engine]:
        """The descriptor and the records, which are the caller's from now on."""
        self._forget()
        return self._tcp.detach(), self._engine

    # -- bytes ---------------------------------------------------------------------------------

    def send(self, head: bytes, pages: PageList | None, start: int) -> int:
        step = self._tcp.step_bytes
        if pages is None:
            n = self._engine.send_pages(head, None, None, start, step)
        else:
            n = self._engine.send_pages(head, pages.base, pages.pieces, start, step)
        if self._engine.kept and self._writable is None:
            self._tcp.on_writable(self._on_writable)
        return n

    def recv(self, pages: PageList | None, start: int, tail: bytearray, tail_start: int) -> int:
        base, pieces = (None, None) if pages is None else (pages.base, pages.pieces)
        try:
            return self._engine.recv_pages(base, pieces, start, tail, tail_start, self._tcp.step_bytes)
        except OSError as error:
            if self._engine.alert is not None:
                raise BrokenStreamError(alert_error(self.peer, self._engine.alert)) from error
            raise

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._readable = callback
        self._tcp.on_readable(None if callback is None else self._on_readable)
        self._look_again()

    def _on_readable(self) -> None:
        if self._readable is not None:
            self._readable()
            self._look_again()

    def _look_again(self) -> None:
        # The socket says nothing of bytes that were read from it and are waiting here.
        if self._again is None and not self._closed and self._readable is not None and self._engine.pending:
            self._again = self._loop.call_soon(self._repeat)

    def _repeat(self) -> None:
        self._again = None
        if not self._closed and self._engine.pending:
            self._on_readable()

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._writable = callback
        wanted = callback is not None or (not self._closed and self._engine.kept > 0)
        self._tcp.on_writable(self._on_writable if wanted else None)

    def _on_writable(self) -> None:
        try:
            kept = self._engine.flush()
        except OSError:
            kept = 0  # broken: whoever sends or receives next is told so
        if kept:
            return
        if self._closing is not None:
            self._closing()
        elif self._writable is not None:
            self._writable()
        else:
            self._tcp.on_writable(None)

    # -- ending --------------------------------------------------------------------------------

    def close(self) -> None:
        self._end(self._tcp.close)

    def finish(self) -> asyncio.Future[None]:
        def finish() -> None:
            self._tcp.finish()

        self._end(finish)
        return self._tcp.gone

    def abort(self) -> None:
        if not self._closed:
            self._forget()
        self._closing = None
        self._tcp.abort()

    def _end(self, close: Callable[[], None]) -> None:
        if self._closed:
            return
        self._forget()
        try:
            kept = self._engine.shutdown()
        except OSError:
            kept = 0
        if not kept:
            close()
            return

        # What was taken is delivered, by a peer that reads.
        def end() -> None:
            self._closing = None
            timer.cancel()
            close()

        timer = self._loop.call_later(LAST_WORD_S, self.abort)
        self._closing = end
        self._tcp.on_writable(self._on_writable)

    def _forget(self) -> None:
        self.on_readable(None)
        self._writable = None
        self._tcp.on_writable(None)
        self._closed = True
        if self._again is not None:
            self._again.cancel()
            self._again = None

    # -- what it knows -------------------------------------------------------------------------

    def info(self) -> PathInfo | None:
        return self._tcp.info()

    def congestion(self) -> str:
        """The congestion control of the socket."""
        return self._tcp.congestion()

    def unsent_bytes(self) -> int:
        return self._tcp.unsent_bytes() + self._engine.kept


class TlsNetwork:
    """See :class:`kvtransport.io.base.Network`. Streams are handed out once their handshake is over.

    ``server_name``: what dialled peers' certificates must be made out to, None: the host that is dialled.
    ``refused`` is told of each peer whose handshake failed (address, error).
    """

    def __init__(
        self,
        tcp: TcpNetwork,
        credentials: Reloading[Credentials],
        *,
        server_name: str | None = None,
        timeout_s: float = 5.0,
        gate: Gate,
        pacer: Pacer,
        refused: Callable[[str, KVError], None] = lambda peer, error: None,
    ) -> None:
        self._tcp = tcp
        self._credentials = credentials
        self._server_name = server_name
        self._timeout = timeout_s
        self._gate = gate
        self._pacer = pacer
        self._refused = refused
        self._accepting: set[_Accepting] = set()

    async def connect(self, host: str, port: int, *, local: str | None = None) -> TlsStream:
        name = (self._server_name or host).strip("[]")
        context = self._credentials.get().client
        tcp = await self._tcp.connect(host, port, local=local)
        try:
            loop = asyncio.get_running_loop()
            engine: Engine = implementation().Tls(context, tcp.fileno(), name, _is_address(name))
            async with asyncio.timeout(self._timeout):
                while (wanted := engine.handshake()) != 0:
                    future: asyncio.Future[None] = loop.create_future()

                    def ready(future: asyncio.Future[None] = future) -> None:
                        if not future.done():
                            future.set_result(None)

                    watch = tcp.on_readable if wanted == 1 else tcp.on_writable
                    watch(ready)
                    try:
                        await future
                    finally:
                        watch(None)
            return TlsStream(tcp, engine, loop)
        except TimeoutError:
            tcp.abort()
            raise ConnectError(
                f"{tcp.peer} did not complete the TLS handshake within {self._timeout:g} s; does it speak TLS on this port?"
            ) from None
        except EOFError:
            tcp.close()
            raise TlsError(
                f"{tcp.peer} closed the connection during the TLS handshake; is it configured for TLS, or is it overloaded?",
                retryable=True,
            ) from None
        except OSError as error:
            tcp.close()
            raise _handshake_error(tcp.peer, name, error) from error
        except BaseException:
            tcp.abort()
            raise

    async def listen(self, host: str, port: int, accept: Callable[[TlsStream], None]) -> TlsListener:
        if self._credentials.get().server is None:
            raise ConfigError(
                "to listen with TLS this process needs a certificate and key of its own: 'kvpool certs' makes them"
            )
        listener = await self._tcp.listen(host, port, lambda tcp: self._accept(tcp, accept))
        return TlsListener(listener, self)

    def _accept(self, tcp: TcpStream, accept: Callable[[TlsStream], None]) -> None:
        address = address_of(tcp.peer)
        if not self._gate.enter(address):
            tcp.abort()
            self._refused(tcp.peer, ConnectError("too many handshakes are in progress"))
            return
        context = self._credentials.get().server
        assert context is not None

        def over(accepting: _Accepting, error: KVError | None) -> None:
            self._gate.leave(address)
            self._accepting.discard(accepting)
            if error is not None:
                self._refused(tcp.peer, error)

        engine: Engine = implementation().Tls(context, tcp.fileno())
        accepting = _Accepting(tcp, engine, accept, over, self._pacer, self._timeout)
        self._accepting.add(accepting)
        accepting.step()

    def stop(self) -> None:
        """End handshakes of peers that dialled in."""
        for accepting in list(self._accepting):
            accepting.stop()


class TlsListener:
    """See :class:`kvtransport.io.base.Listener`."""

    def __init__(self, listener: TcpListener, network: TlsNetwork) -> None:
        self._listener = listener
        self._network = network
        self.host, self.port = listener.host, listener.port

    def close(self) -> None:
        self._listener.close()
        self._network.stop()


class _Accepting:
    """One handshake that a peer began."""

    def __init__(
        self,
        tcp: TcpStream,
        engine: Engine,
        accept: Callable[[TlsStream], None],
        over: Callable[[_Accepting, KVError | None], None],
        pacer: Pacer,
        timeout_s: float,
    ) -> None:
        self._tcp = tcp
        self._engine = engine
        self._accept = accept
        self._over = over
        self._pacer = pacer
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout_s, self._expired, timeout_s)
        self._pause: asyncio.TimerHandle | None = None
        self._done = False

    def step(self) -> None:
        self._pause = None
        if self._done:
            return
        wait = self._pacer.wait(self._loop.time())
        if wait > 0:
            self._watch(0)
            self._pause = self._loop.call_later(wait, self.step)
            return
        started = time.perf_counter()
        try:
            wanted = self._engine.handshake()
        except EOFError:
            self._end(TlsError("the peer went away during the TLS handshake"))
            return
        except OSError as error:
            # The alert that tells the peer why is on its way: closing at once could destroy it.
            self._end(TlsError(f"TLS handshake with {self._tcp.peer}: {error.strerror or error}"), last_word=True)
            return
        finally:
            self._pacer.spend(self._loop.time(), time.perf_counter() - started)
        if wanted:
            self._watch(wanted)
            return
        self._watch(0)
        self._release(None)
        self._accept(TlsStream(self._tcp, self._engine, self._loop))

    def _watch(self, wanted: int) -> None:
        self._tcp.on_readable(self.step if wanted == 1 else None)
        self._tcp.on_writable(self.step if wanted == 2 else None)

    def _expired(self, timeout_s: float) -> None:
        self._end(TlsError(f"{self._tcp.peer} did not complete the TLS handshake within {timeout_s:g} s"))

    def stop(self) -> None:
        self._end(None)

    def _end(self, error: KVError | None, *, last_word: bool = False) -> None:
        if self._done:
            return
        self._watch(0)
        if last_word:
            self._tcp.finish()
        else:
            self._tcp.abort()
        self._release(error)

    def _release(self, error: KVError | None) -> None:
        self._done = True
        self._timer.cancel()
        if self._pause is not None:
            self._pause.cancel()
        self._over(self, error)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


_ADVICE = (
    ("hostname mismatch", "its certificate is made out to another name: dial a name that is in it, set server_name, or make it again with this one"),
    ("IP address mismatch", "its certificate is made out to other addresses: dial a name or address that is in it, set server_name, or make it again with this one"),
    ("certificate has expired", "its certificate has expired: renew it there ('kvpool certs --renew')"),
    ("certificate is not yet valid", "its certificate is not valid yet: are both clocks right?"),
    ("unable to get local issuer certificate", "its certificate comes from another authority than the one configured here"),
    ("self-signed certificate", "its certificate is not signed by the authority configured here"),
    ("unsuitable certificate purpose", "its certificate may not be used by a server"),
    ("wrong version number", "it does not speak TLS on this port: is TLS configured there?"),
    ("unsupported protocol", "it does not speak TLS 1.3"),
    ("packet length too long", "it does not speak TLS on this port: is TLS configured there?"),
    ("record layer failure", "it does not speak TLS on this port: is TLS configured there?"),
)  # fmt: skip


def _handshake_error(peer: str, name: str, error: OSError) -> KVError:
    said = error.strerror or str(error)
    for text, advice in _ADVICE:
        if text.lower() in said.lower():
            return TlsError(f"TLS with {peer} (as {name!r}) failed: {advice} [{said}]")
    for number, text in ALERTS.items():
        if f"alert {text}" in said:
            return alert_error(peer, number)
    if isinstance(error, ConnectionError):
        return TlsError(f"{peer} broke the connection during the TLS handshake: {said}", retryable=True)
    return TlsError(f"TLS with {peer} (as {name!r}) failed: {said}")


def alert_error(peer: str, alert: int) -> KVError:
    said = ALERTS.get(alert, f"alert {alert}")
    advice = ""
    if alert == 116:
        advice = "; it wants a client certificate: configure certificate and key"
    elif alert == 45:
        advice = "; this side's certificate has expired there: renew it ('kvpool certs --renew')"
    elif alert == 48:
        advice = "; this side's certificate comes from another authority than the one it trusts"
    elif alert in CLIENT_ALERTS:
        advice = "; it does not accept this side's certificate"
    return TlsError(f"{peer} refused the TLS connection: {said}{advice}", fault=Fault.REMOTE)
