"""One process on the network: its incarnation, its port, its links, what it expects."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from .address import parse_address
from .admission import Admission
from .compression import choose_codecs
from .connection import AnyConnection, Connection, Owner
from .dialling import Dialling, Handshake, closing
from .engine.base import Lanes
from .engine.native import Engine
from .engine.python import PythonLanes
from .errors import (
    AddressError,
    ConfigError,
    ConnectError,
    Fault,
    HandshakeError,
    KVError,
    LimitError,
    PeerLostError,
    ProtocolError,
)
from .flow.addresses import Addresses, Pair
from .flow.spilling import SpillPolicy
from .identity import Token, TokenStore
from .io.base import ByteStream, Listener, Network
from .io.tcp import TcpOptions, address_of
from .link import Link
from .pacing import TenantPacer
from .probing import AddressProbes
from .receiver import Expectation, Receiver
from .spill import SpillArea
from .tls import TlsConfig
from .wire import bodies
from .wire.frames import DEFAULT_LIMITS, FrameType, Header, Limits, encode_control
from .wire.state import ConnectionMachine, Role

log = logging.getLogger("kvtransport")
Handler = Callable[[Link, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Answers a verb: gets the calling link and the arguments, returns the result or raises a KVError."""

MAX_GIVEN_UP = 4_096
"""Transfers whose consumer gave up before they were opened."""


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """Settings of one endpoint. Seconds, bytes, entries.

    ``tls``: all connections, both ways, are TLS 1.3. ``token`` is what this side proves to know when it dials, ``tokens``
    are those it accepts; whoever dials in proves one, or shows a client certificate. ``insecure`` must be True to listen
    on, or dial to, an address beyond loopback without that. A link without a connection is dialled again, or
    waited for, for ``reconnect_s``; its transfers stay as they are meanwhile (0: a lost link has ended).
    ``chunk_bytes``: of a chunk, None: what suits the path. ``link_bytes_per_s`` caps what this side sends on a link
    (:meth:`.link.Link.cap`), ``tenant_bytes_per_s`` what a tenant's transfers send together (:meth:`Endpoint.cap_tenant`).
    ``whole_bytes``: a transfer of at most so many bytes that is handed over and sealed as soon as it is opened travels in its
    OPEN, which saves a round trip (None: what suits the path, 64 or 256 KiB; 0: none does; 4 MiB of a link at a time).
    ``io_threads`` move the bytes of TCP connections (None: half the cores; 0: the event loop does, in Python).
    ``coding``: lossless, of bfloat16 caches, chunk by chunk where it pays on the link now ("auto"), never ("off"), or whatever
    shrinks ("always", for tests); both sides must want it. ``codecs`` names them, first choice first; empty: those that are there.
    ``advertise``: "HOST:PORT" where others reach this process, or the one of ``advertise_incarnation``; whoever is dialled tries it
    and says when it cannot (:attr:`Endpoint.on_unreachable`, :meth:`.link.Link.reachable`). "": nobody dials this one.
    """

    name: str = ""
    insecure: bool = False
    tls: TlsConfig | None = None
    token: Token | None = None
    tokens: TokenStore | None = None
    keepalive_s: float = 5.0
    dead_after_s: float = 15.0
    handshake_timeout_s: float = 5.0
    reconnect_s: float = 10.0
    max_links: int = 1_024
    max_connections_per_link: int = 64
    max_handshakes: int = 256
    max_waiting_opens: int = 1_024
    max_waiting_bytes: int = 64 << 20
    max_expected: int = 65_536
    chunk_bytes: int | None = None
    link_bytes_per_s: float | None = None
    tenant_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    whole_bytes: int | None = None
    io_threads: int | None = None
    coding: Literal["auto", "off", "always"] = "auto"
    codecs: tuple[str, ...] = ()
    advertise: str = ""
    advertise_incarnation: bytes | None = None
    spill: SpillPolicy = field(default_factory=SpillPolicy)
    limits: Limits = DEFAULT_LIMITS
    tcp: TcpOptions = field(default_factory=TcpOptions)


class Endpoint:
    """Use as ``async with Endpoint() as endpoint``; everything it made is closed with it.

    Belongs to the event loop it was made in. ``entropy(n)`` gives n random bytes for incarnation and link ids.
    """

    def __init__(
        self,
        config: EndpointConfig | None = None,
        *,
        network: Network | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.config = config or EndpointConfig()
        if self.config.advertise:
            parse_address(self.config.advertise)
        self._entropy = entropy
        self.incarnation = entropy(16)
        self.random = random.Random(entropy(8)).random
        """Numbers from [0, 1), for jitter."""
        self.handlers: dict[str, Handler] = {}
        self.spill_area = SpillArea(self.config.spill.budget_bytes)
        self._loop = asyncio.get_running_loop()
        self.refusals: Counter[str] = Counter()
        """Handshakes of peers that dialled in and were not let in, by the code of the error."""
        self.on_refused: Callable[[str, KVError], None] | None = None
        """Told of each (peer, why); whoever logs them bounds the lines."""
        self.on_unreachable: Callable[[Link, AddressError], None] | None = None
        """Told when the peer of a link cannot reach the advertised address; without it there is one warning in the log."""
        self._warned_unreachable = False
        self._probes = AddressProbes(self)
        self.admission = Admission(self.config, self._refuse)
        self.codecs = () if self.config.coding == "off" else choose_codecs(self.config.codecs)
        self.pacer = TenantPacer(self.config.tenant_bytes_per_s)
        self._is_real = network is None
        self._network: Network = network or self.admission.network()
        self._engine = Engine.make(self.config.io_threads) if self._is_real and self.admission.native else None
        self.io_threads = 1 if self._engine is None else self._engine.threads
        self._listeners: list[Listener] = []
        self._given_up: OrderedDict[bytes, bytes] = OrderedDict()
        """The answer to an OPEN that comes too late. (Not the error: its traceback would keep the caller's buffers.)"""
        self._links: dict[bytes, Link] = {}
        self._handshakes: set[Handshake] = set()
        self._expected: dict[bytes, tuple[Receiver, Link | None]] = {}
        self._waiting: dict[bytes, _WaitingOpen] = {}
        self._working: set[asyncio.Future[Any]] = set()
        self.on_link: Callable[[Link], None] | None = None
        self.closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def features(self) -> tuple[str, ...]:
        """What a HELLO of this side names."""
        whole = (bodies.WHOLE,) if self.config.limits.open >= 2 * bodies.MAX_WHOLE else ()
        return (*(codec.feature for codec in self.codecs), *whole)

    def work(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        """Run ``function`` in a thread: what would hold up every connection. :meth:`close` waits for it."""
        running = self._loop.run_in_executor(None, function, *args)
        self._working.add(running)
        running.add_done_callback(self._working.discard)
        return running

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(self._links.values())

    def cap_tenant(self, tenant: str, bytes_per_s: float | None) -> None:
        """All transfers that name ``tenant`` send at most so many payload bytes a second from here, on all links together;
        those that have something to send share it equally. None: no cap. Raises ConfigError for a rate that is not above 0.
        """
        self.pacer.cap(tenant, bytes_per_s)

    # -- reaching and being reached ------------------------------------------------------------

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Accept links on ``host:port`` (0: any free port); returns the bound address.

        Raises InsecureBindError beyond loopback without TLS and authentication, ConfigError when the port is taken.
        """
        if self._is_real:
            self.admission.check_listen(host)
        listener = await self._network.listen(host, port, self._accept)
        self._listeners.append(listener)
        return listener.host, listener.port

    async def connect(
        self,
        host: str | Sequence[str],
        port: int,
        *,
        connections: int | None = None,
        local: Sequence[str] = (),
    ) -> Link:
        """Dial a peer with ``connections`` TCP connections; None: as many as suit the path, and others when it changes.

        Several addresses of the peer (``host``) and of this machine (``local``): connections are spread over them, the
        first local with the first remote one and so on; those that do not answer are left out and tried again.

        Raises ConnectError (nobody answers), TlsError, HandshakeError or VersionError (the peer refuses, or is not whom
        its certificate should name), InsecureBindError.
        """
        hosts = (host,) if isinstance(host, str) else tuple(host)
        if not hosts:
            raise ConfigError("a link needs at least one address of its peer")
        for each in hosts:
            self.check_dial(each)
        if self.closed:
            raise closing()
        if connections is not None and not 1 <= connections <= self.config.max_connections_per_link:
            raise LimitError(
                f"a link has 1 to {self.config.max_connections_per_link} connections, asked for {connections}",
                fault=Fault.LOCAL,
            )
        dialling = Dialling(self, Addresses(hosts, local), port, connections)
        return await dialling.link()

    def check_dial(self, host: str) -> None:
        """Raises InsecureBindError beyond loopback without TLS."""
        if self._is_real:
            self.admission.check_dial(host)

    async def dial(self, pair: Pair, port: int, handshake: Callable[[ByteStream], Handshake]) -> None:
        """One connection: a stream over ``pair``, then what ``handshake`` makes of it. Raises KVError."""
        local, host = pair
        connecting = (
            self._network.connect(host, port) if local is None else self._network.connect(host, port, local=local)
        )
        stream = await connecting
        if self.closed:
            stream.abort()
            raise closing()
        try:
            begun = handshake(stream)
        except OSError as error:
            raise ConnectError(f"cannot use this connection to {stream.peer}: {error.strerror or error}") from error
        try:
            begun.start()
            begun.present()
            await begun.done
        except asyncio.CancelledError:
            begun.connection.fail(ConnectError("dialling was given up"))
            raise

    def new_link_id(self) -> bytes:
        return self._entropy(16)

    def add_link(self, link: Link) -> None:
        self._links[link.id] = link

    def _accept(self, stream: ByteStream) -> None:
        if self.closed or not self.admission.gate.enter(address_of(stream.peer)):
            stream.abort()
            self._refuse(stream.peer, LimitError("too many handshakes are in progress", retryable=True))
            return
        machine = ConnectionMachine(Role.ACCEPT, incarnation=self.incarnation)
        try:
            handshake = Handshake(self, stream, machine, self._welcome)
        except OSError as error:  # no memory, no descriptors for the I/O engine
            self.admission.gate.leave(address_of(stream.peer))
            self._refuse(stream.peer, ConnectError(f"cannot serve this connection: {error.strerror or error}"))
            return
        handshake.start()

    def _welcome(self, handshake: Handshake) -> None:
        """Let a dialling peer in. Raises KVError to refuse it."""
        hello = handshake.machine.peer
        assert hello is not None
        identity = self.admission.identify(handshake.connection.stream, hello)
        if hello.count > self.config.max_connections_per_link:
            raise LimitError(
                f"a link may have {self.config.max_connections_per_link} connections here, the peer wants {hello.count}"
            )
        link = self._links.get(hello.link)
        if link is None:
            if hello.index:
                raise HandshakeError(
                    f"connection {hello.index} joins a link that is not known here (it may have ended)"
                )
            if hello.peer_incarnation is not None:
                raise HandshakeError("the link that is dialled again is not known here: it has ended")
            if len(self._links) >= self.config.max_links:
                self._end_a_link_that_is_down()
            if len(self._links) >= self.config.max_links:
                raise LimitError(f"{self.config.max_links} links are open here already", retryable=True)
        else:
            if hello.incarnation != link.peer_incarnation or link.dialled:
                raise HandshakeError("the connection does not belong to the link it names")
            if identity != link.identity:
                raise HandshakeError("the connection is somebody else's than the link it names")
            link.make_room(hello.index)
            if link.closed:
                raise HandshakeError("the link that is dialled again has ended")
        handshake.connection.index = hello.index
        handshake.connection.limit(self.config.limits)
        handshake.say_hello(hello.link, hello.index, hello.count)
        if handshake.connection.closed:
            return  # it broke under the answer
        if link is not None:
            link.join(handshake.connection, handshake.machine)
            return
        link = Link(self, hello.link, hello, handshake.connection.stream, dialled=False)
        link.identity = identity
        self.add_link(link)
        link.join(handshake.connection, handshake.machine)
        if self.on_link is not None:
            self.on_link(link)
        self._probes.consider(link, hello)

    def unreachable(self, link: Link, error: AddressError) -> None:
        """The peer of ``link`` could not reach the address that is advertised."""
        if self.on_unreachable is not None:
            self.on_unreachable(link, error)
        elif not self._warned_unreachable:
            self._warned_unreachable = True
            log.warning("%s", error.message)

    def _end_a_link_that_is_down(self) -> None:
        """Whoever is there comes before who may come back."""
        for link in self.links:
            if link.down:
                link.end(PeerLostError(f"{link.peer} was away when its place was needed: too many links"))
                return

    # -- who moves the bytes -------------------------------------------------------------------

    def new_connection(self, stream: ByteStream, owner: Owner, limits: Limits) -> AnyConnection:
        if self._engine is not None and self._engine.carries(stream):
            return self._engine.connection(stream, owner, limits=limits)
        return Connection(stream, owner, limits=limits, now=self._loop.time())

    def new_lanes(self) -> Lanes:
        return PythonLanes() if self._engine is None else self._engine.lanes()

    # -- transfers -----------------------------------------------------------------------------

    def expect(self, transfer: bytes, wanted: Expectation, *, link: Link | None = None) -> Receiver:
        """Expect the producer of ``transfer`` (16 bytes) to open it; with ``link``, only over that link.

        Raises LimitError when too many are expected, ProtocolError when this one is expected already, the link's
        error when it has ended.
        """
        if len(transfer) != 16:
            raise ProtocolError(f"a transfer is named by 16 bytes, got {len(transfer)}", fault=Fault.LOCAL)
        if transfer in self._expected:
            raise ProtocolError(f"transfer {transfer.hex()} is expected already", fault=Fault.LOCAL)
        if link is not None and link.closed:
            raise link.error or PeerLostError("this link was closed by this side", fault=Fault.LOCAL)
        if len(self._expected) >= self.config.max_expected:
            raise LimitError(
                f"{self.config.max_expected} transfers are expected already", fault=Fault.LOCAL, retryable=True
            )
        self._given_up.pop(transfer, None)
        receiver = Receiver(self, transfer, wanted)
        self._expected[transfer] = (receiver, link)
        waiting = self._waiting.get(transfer)
        if waiting is not None and (link is None or link is waiting.link):
            del self._waiting[transfer]
            waiting.timer.cancel()
            if not waiting.link.closed:
                waiting.link.adopt(receiver)
                receiver.on_open(waiting.link, waiting.header, waiting.body)
        return receiver

    def on_open(self, link: Link, header: Header, body: bodies.Open) -> None:
        """A producer opened a transfer: to its receiver, or wait for one in a bounded table."""
        expected = self._expected.get(header.transfer)
        if expected is not None:
            receiver, only = expected
            if only is None or only is link:
                if receiver.waiting:
                    link.adopt(receiver)
                receiver.on_open(link, header, body)
                return
        if header.transfer in self._waiting:
            return
        given_up = self._given_up.get(header.transfer)
        if given_up is not None:
            link.send(given_up)
            link.finish(header.transfer, given_up)
            return
        waiting_bytes = sum(w.body.held_bytes for w in self._waiting.values()) + body.held_bytes
        if len(self._waiting) >= self.config.max_waiting_opens or waiting_bytes > self.config.max_waiting_bytes:
            error = LimitError(
                f"{len(self._waiting)} opened transfers wait for a consumer here already", retryable=True
            )
            link.send(encode_control(FrameType.ERROR, bodies.Error.of(error), transfer=header.transfer))
            link.finish(header.transfer)
            return
        timer = self._loop.call_later(min(body.deadline_s, 3600.0), self._waiting.pop, header.transfer, None)
        self._waiting[header.transfer] = _WaitingOpen(link, header, body, timer)

    def withdraw(self, link: Link, header: Header) -> bool:
        """The producer gives up a transfer that nobody expected yet; False when none of it waits here."""
        waiting = self._waiting.get(header.transfer)
        if waiting is None or waiting.link is not link:
            return False
        waiting.timer.cancel()
        del self._waiting[header.transfer]
        link.finish(header.transfer)
        return True

    def expected_over(self, link: Link, transfer: bytes) -> Receiver | None:
        """The receiver that nobody has opened yet and whose producer may be the peer of ``link``."""
        receiver, only = self._expected.get(transfer, (None, None))
        return receiver if receiver is not None and receiver.waiting and only in (None, link) else None

    def forget_receiver(self, receiver: Receiver) -> None:
        self._expected.pop(receiver.transfer, None)
        if receiver.error is not None and not receiver.was_opened:
            # Its producer may come later, and should not wait for somebody who has gone.
            self._given_up[receiver.transfer] = encode_control(
                FrameType.ERROR, bodies.Error.of(receiver.error), transfer=receiver.transfer
            )
            while len(self._given_up) > MAX_GIVEN_UP:
                self._given_up.popitem(last=False)

    def forget_link(self, link: Link) -> None:
        self._links.pop(link.id, None)
        for transfer, waiting in list(self._waiting.items()):
            if waiting.link is link:
                waiting.timer.cancel()
                del self._waiting[transfer]
        # What only this peer could have sent will not come any more.
        gone = link.error or PeerLostError(
            "the link this transfer was to come by was closed by this side", fault=Fault.LOCAL
        )
        for receiver, only in list(self._expected.values()):
            if only is link:
                receiver.on_link_lost(gone)

    def handshake_over(self, handshake: Handshake, error: KVError | None = None) -> None:
        if handshake not in self._handshakes:
            return
        self._handshakes.discard(handshake)
        if handshake.machine.role is Role.ACCEPT:
            peer = handshake.connection.stream.peer
            self.admission.gate.leave(address_of(peer))
            if error is not None:
                self._refuse(peer, error)

    def _refuse(self, peer: str, error: KVError) -> None:
        self.refusals[error.code] += 1
        if self.on_refused is not None:
            self.on_refused(peer, error)

    def handshake_begun(self, handshake: Handshake) -> None:
        self._handshakes.add(handshake)

    # -- ending --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close port, links and expectations; everything in progress fails. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for listener in self._listeners:
            listener.close()
        await self._probes.close()
        for handshake in list(self._handshakes):
            handshake.connection.fail(closing())
        links = self.links
        for link in links:
            link.end(None)  # all at once: each may have to wait for its peer
        for link in links:
            await link.close()
        for receiver, _ in list(self._expected.values()):
            await receiver.cancel("the endpoint was closed")
        if self._working:
            await asyncio.wait(self._working)
        self.pacer.close()
        self.spill_area.close()
        if self._engine is not None:
            self._engine.close()


@dataclass(slots=True)
class _WaitingOpen:
    link: Link
    header: Header
    body: bodies.Open
    timer: asyncio.TimerHandle
