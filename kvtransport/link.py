"""A link: all connections between two processes.

The link routes frames to transfers and calls, hands chunks to whichever connection can send, and watches
that the peer is alive. It does not know TCP: its connections run over any :class:`~kvtransport.io.base.ByteStream`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from .coding import LinkCoding
from .connection import AnyConnection
from .errors import (
    ConfigError,
    DeadlineError,
    Fault,
    KVError,
    LimitError,
    PeerFrozenError,
    PeerLostError,
    ProtocolError,
    RemoteError,
)
from .flow.addresses import Addresses
from .flow.backoff import Backoff
from .flow.keepalive import Keepalive, Verdict
from .flow.spilling import NO_SPILL
from .flow.stalls import Stalls
from .flow.tuning import MOST, Tuning, window_for
from .flow.whole import most_whole
from .identity import Identity
from .io.base import ByteStream
from .manifest import Manifest
from .probing import VERB as ADDRESS
from .probing import Advertised
from .receiver import Receiver
from .reconnect import Reconnect
from .sender import Sender
from .telemetry import LinkMeter, LinkTelemetry
from .tuner import RETIRE, WANT, Tuner
from .wire import bodies
from .wire.frames import Flag, FrameType, Header, decode_control, encode_control
from .wire.state import ConnectionMachine, ConnectionState

if TYPE_CHECKING:
    from .endpoint import Endpoint

_FAREWELL = encode_control(
    FrameType.ERROR, bodies.Error.of(PeerLostError("the link was closed by its peer", fault=Fault.NETWORK))
)
_WITHDRAWN = b""
"""In the place of a last word: given up by the producer before it was opened here."""
MAX_CALLS = 256
"""Calls of a peer that run at once; more are refused."""
MAX_REPEATED = 256
"""Transfers that ended last and whose last word is repeated when a connection is lost."""
MAX_FINISHED = 4_096
"""Transfers that ended here and may still have frames on their way."""


class Link:
    """Made by :meth:`kvtransport.endpoint.Endpoint.connect`, or by a peer that dials in."""

    def __init__(
        self,
        endpoint: Endpoint,
        link_id: bytes,
        hello: bodies.Hello,
        stream: ByteStream,
        *,
        dialled: bool,
        connections: int | None = None,
    ) -> None:
        """``connections``: how many were asked for; None: what suits the path, as its first connection ``stream`` has it."""
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self.id = link_id
        self.peer = stream.peer
        self.peer_name = hello.name
        self.peer_incarnation = hello.incarnation
        self.identity: Identity | None = None
        """Who dialled in, as it proved; None: it did not have to, or this side dialled."""
        self.dialled = dialled
        self.wanted = hello.count
        self.connections: list[AnyConnection] = []
        self.error: KVError | None = None
        self._machines: dict[AnyConnection, ConnectionMachine] = {}
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._outgoing: dict[bytes, Sender] = {}
        self._incoming: dict[bytes, Receiver] = {}
        self._finished: OrderedDict[bytes, bytes | None] = OrderedDict()
        self.lanes = endpoint.new_lanes()
        """What moves the chunks of its transfers."""
        codecs = tuple(c for c in endpoint.codecs if c.feature in hello.features)
        always = endpoint.config.coding == "always"
        self._coding = LinkCoding(self, codecs, self._loop.time, always=always) if codecs else None
        self.work = endpoint.work
        """Runs a function that takes its time beside the event loop."""
        self._calls: dict[int, tuple[asyncio.Future[dict[str, Any]], AnyConnection | None]] = {}
        self._next_call = 0
        self._serving: set[asyncio.Task[None]] = set()
        self._sent_before = 0
        self._received_before = 0
        self._arrived = 0
        self._arriving = 0.0
        self._stalls: Stalls[AnyConnection] = Stalls()
        self._meter = LinkMeter(self._loop.time())
        config = endpoint.config
        self.most_connections = config.max_connections_per_link
        first = stream.info()
        self._whole_bytes = 0
        self.in_open_bytes = 0
        """Of transfers that are on their way in their OPEN."""
        if bodies.WHOLE in hello.features and bodies.WHOLE in endpoint.features:
            self._whole_bytes = most_whole(config.whole_bytes, None if first is None else first.min_rtt_s)
        self.tuner = Tuner(
            self,
            Tuning(
                None if first is None else first.min_rtt_s,
                io_threads=endpoint.io_threads,
                most=min(MOST, self.most_connections),
                fixed_connections=connections,
            ),
            fixed=connections is not None,
            fixed_congestion=config.tcp.congestion is not None,
        )
        if config.link_bytes_per_s is not None:
            self.cap(config.link_bytes_per_s)
        self._keepalive = Keepalive(config.keepalive_s, config.dead_after_s)
        self._watch = self._loop.call_later(self._keepalive.poll_s, self._judge)
        self._reconnect = Reconnect(self, config.reconnect_s, Backoff(), endpoint.random)
        self._joined: set[int] = set()
        """Places in which there has been a connection."""
        self._leaving: list[asyncio.Future[None]] = []
        self._verbs = {
            WANT: lambda link, args: self.tuner.on_want(args),
            RETIRE: lambda link, args: self.tuner.on_retire(args),
            ADDRESS: lambda link, args: self.advertised.on_verdict(link, args),
        }
        self.advertised: Advertised = Advertised(endpoint, self)
        self._rejoined: asyncio.Future[None] | None = None
        """Somebody waits for a connection."""

    # -- public --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed.done()

    async def wait_closed(self) -> KVError | None:
        """Wait until the link has ended; returns why (None: closed by this side)."""
        await asyncio.shield(self._closed)
        return self.error

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back once when the link has ended."""
        self._closed.add_done_callback(lambda _: callback())

    def open(
        self,
        manifest: Manifest,
        *,
        deadline_s: float = 60.0,
        priority: int = 0,
        chunk_bytes: int | None = None,
        checksum: bool = True,
        tenant: str = "",
        held: bool = False,
    ) -> Sender:
        """Open a transfer to the peer; returns at once, units may be handed over before it is accepted.

        A small one that is handed over and sealed without waiting in between takes one round trip (``whole_bytes``).

        ``deadline_s``: the transfer fails with DeadlineError when it is not sealed by then. ``tenant``: whose cap
        (:meth:`.endpoint.Endpoint.cap_tenant`) it counts in. ``held``: the memory stays as it is
        until the seal anyway, and nothing is copied aside (spilled) to give it back earlier. Raises the link's
        error when the link has ended, ProtocolError when the transfer is open already.
        """
        self._check()
        if manifest.transfer in self._outgoing:
            raise ProtocolError(f"transfer {manifest.transfer.hex()} is open on this link already", fault=Fault.LOCAL)
        config = self._endpoint.config
        sender = Sender(
            self,
            manifest,
            deadline_s=deadline_s,
            priority=priority,
            chunk_bytes=chunk_bytes or config.chunk_bytes or self.tuner.choice.chunk_bytes,
            checksum=checksum,
            spill=NO_SPILL if held else config.spill,
            area=self._endpoint.spill_area,
            coding=self._coding,
            whole_bytes=self._whole_bytes,
        )
        self._finished.pop(manifest.transfer, None)
        self._outgoing[manifest.transfer] = sender
        self._endpoint.pacer.join(sender, tenant)
        self.tuner.busy()
        return sender

    async def call(
        self, verb: str, args: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> dict[str, Any]:
        """Call a verb of the peer. Raises the peer's error, DeadlineError, or the link's error.

        A link that is being dialled again is waited for; a call whose connection is lost fails.
        """
        self._check()
        self._next_call += 1
        number = self._next_call
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        frame = encode_control(FrameType.CALL, bodies.Call(verb=verb, args=dict(args or {})), offset=number)
        try:
            async with asyncio.timeout(timeout_s):
                while not self.connections:
                    if self._rejoined is None:
                        self._rejoined = self._loop.create_future()
                    await asyncio.shield(self._rejoined)
                    self._check()
                self._calls[number] = (future, self.send(frame))
                return await future
        except TimeoutError:
            raise DeadlineError(f"{self.peer} did not answer {verb!r} within {timeout_s:g} s") from None
        finally:
            self._calls.pop(number, None)
            del future  # holds the error, whose traceback holds this frame

    def telemetry(self) -> LinkTelemetry:
        """What the link does now and why; cheap enough to ask for several times a second."""
        return self._meter.read(self, self._loop.time())

    def cap(self, bytes_per_s: float | None) -> None:
        """From now on this side sends at most so many bytes a second on the link, headers and resent bytes included.

        The kernel paces each connection at its share, which is divided again as connections come and go. None: no cap.
        """
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ConfigError(f"a link is capped at more than 0 bytes a second, got {bytes_per_s:g}")
        self.tuner.cap(bytes_per_s)

    async def reachable(self, timeout_s: float = 5.0) -> bool:
        """Whether the peer reached this process at the address it advertises (:attr:`.endpoint.EndpointConfig.advertise`).

        False: not known, because this side advertises none or did not dial, or the peer did not try or say so within
        ``timeout_s``. Raises AddressError, which says why it is not reached and what to do.
        """
        return await self.advertised.reachable(timeout_s)

    async def close(self) -> None:
        """Close all connections; transfers and calls in progress fail. Idempotent."""
        self.end(None)
        waited = {*self._serving, *self.tuner.tasks, *filter(None, [self._reconnect.task])} - {asyncio.current_task()}
        if waited or self._leaving:
            await asyncio.wait({*waited, *self._leaving})

    # -- connections ---------------------------------------------------------------------------

    def join(self, connection: AnyConnection, machine: ConnectionMachine) -> None:
        """A connection whose handshake is done becomes part of the link."""
        connection.owner = self
        connection.established = True
        connection.last_heard = self._loop.time()
        self.connections.append(connection)
        self._machines[connection] = machine
        self.lanes.join(connection)
        self._reconnect.joined(connection.index)
        self.tuner.joined(connection)
        if connection.index in self._joined:
            # On this very connection: what else there seems to be may be as dead as the one it replaces.
            self._say_again(connection)
        self._joined.add(connection.index)
        self._wake()
        self.lanes.schedule()

    def redial(self, dial: Callable[[int], Awaitable[None]], addresses: Addresses) -> None:
        """This side dialled, and dials again what is lost: ``dial(index)`` makes the connection in that place."""
        self.tuner.dial_with(dial, addresses)
        self._reconnect.dial_with(dial)

    def release(self, index: int) -> None:
        """The connection in place ``index`` is going to be closed on purpose: nobody dials it again."""
        self._reconnect.release(index)

    # -- what the tuner asks -------------------------------------------------------------------

    @property
    def reconnecting(self) -> bool:
        """Lost connections are being dialled again."""
        return self._reconnect.task is not None

    @property
    def outgoing(self) -> int:
        """Transfers on their way out."""
        return len(self._outgoing)

    @property
    def incoming(self) -> int:
        return len(self._incoming)

    @property
    def spilled_bytes(self) -> int:
        """In transfer-cache blocks of this process now."""
        return self._endpoint.spill_area.used_bytes

    def sent_bytes(self) -> int:
        """Since the link was made, headers and resent bytes included."""
        return self._sent_before + sum(c.sent_bytes for c in self.connections if not c.closed)

    def received_bytes(self) -> int:
        return self._received_before + sum(c.received_bytes for c in self.connections if not c.closed)

    def delivered_bytes(self) -> int:
        """Sent, and acknowledged by the peer's system."""
        return self.sent_bytes() - sum(c.stream.unsent_bytes() for c in self.connections if not c.closed)

    def calls_on(self, connection: AnyConnection) -> int:
        """Calls of this side whose answer comes by ``connection``."""
        return sum(on is connection for _, on in self._calls.values())

    def window_bytes(self) -> int:
        """Credit for a transfer that begins now, from what has been arriving lately."""
        rtts = [info.rtt_s for c in self.connections if (info := c.stream.info()) is not None]
        return window_for(self._arriving, min(rtts, default=None))

    # -- losing them ---------------------------------------------------------------------------

    @property
    def down(self) -> bool:
        """Whether no connection is left of it, and it waits for one."""
        return not self.connections and not self.closed

    def make_room(self, index: int) -> None:
        """The peer dials the place ``index`` again: it knows that the connection there is dead, this side does not yet."""
        for connection in [c for c in self.connections if c.index == index]:
            connection.fail(PeerLostError(f"{self.peer} replaced this connection by a new one"), abort=True)

    def lost(self, connection: AnyConnection, error: KVError) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
            self.lanes.leave(connection)
        self._machines.pop(connection, None)
        self._sent_before += connection.sent_bytes
        self._received_before += connection.received_bytes
        self.tuner.left(connection)
        for receiver in list(self._incoming.values()):
            receiver.on_connection_lost(connection)
        for sender in list(self._outgoing.values()):
            sender.on_connection_lost(connection)
        # A call is not idempotent: whoever made it decides whether to make it again.
        for future, on in self._calls.values():
            if on is connection and not future.done():
                future.set_exception(error)
        if self.closed:
            return
        if not self._reconnect.lost(connection.index, error):
            self.end(error)
        elif self.connections:
            self._say_again()

    def _say_again(self, via: AnyConnection | None = None) -> None:
        """Control frames may have been lost with a connection: what is still true is said again, all of it idempotent."""
        for receiver in list(self._incoming.values()):
            receiver.say_again(via)
        for sender in list(self._outgoing.values()):
            sender.say_again(via)
        for frame in list(self._finished.values())[-MAX_REPEATED:]:
            if frame:
                self.send(frame, via)

    def _wake(self) -> None:
        if self._rejoined is not None:
            self._rejoined.set_result(None)
            self._rejoined = None

    def _judge(self) -> None:
        now = self._loop.time()
        self._meter.sample(self, now)  # so that what is asked for later covers the time since
        received = self.received_bytes()
        self._arriving = max((received - self._arrived) / self._keepalive.poll_s, self._arriving / 2)
        self._arrived = received
        for connection in list(self.connections):
            connection.heard(now)
            verdict = self._keepalive.judge(now, connection.last_heard, connection.last_ping)
            if verdict is Verdict.PING:
                connection.last_ping = now
                connection.send_control(encode_control(FrameType.PING, offset=int(now * 1e6)))
                self.lanes.schedule()
            elif verdict is Verdict.DEAD:
                silent = now - connection.last_heard
                error = PeerFrozenError(
                    f"{self.peer} has been silent for {silent:.1f} s although the connection stands: frozen, overloaded or cut off"
                )
                connection.fail(error, abort=True)
        waiting = [(c, c.stream.unsent_bytes()) for c in self.connections if not c.closed]
        for stalled in self._stalls.judge((c, c.sent_bytes - unsent, unsent) for c, unsent in waiting):
            for sender in list(self._outgoing.values()):
                sender.on_connection_stalled(stalled)
            self._say_again(self._least_busy())
        if not self.closed:
            self._watch = self._loop.call_later(self._keepalive.poll_s, self._judge)

    # -- sending -------------------------------------------------------------------------------

    def send(self, frame: bytes, via: AnyConnection | None = None) -> AnyConnection | None:
        """Queue a control frame on ``via``, or on the connection that is least busy; returns it, None when there is none."""
        if not self.connections:
            return None
        connection = via or self._least_busy()
        connection.send_control(frame)
        self.lanes.schedule()
        return connection

    def _least_busy(self) -> AnyConnection:
        for connection in self.connections:
            if not connection.load and not connection.parked and connection not in self._stalls.stalled:
                return connection  # none can be less busy: no need to ask them all
        return min(self.connections, key=lambda c: (c.parked, c in self._stalls.stalled, c.load))

    # -- receiving -----------------------------------------------------------------------------

    def stray(self, connection: AnyConnection, header: Header) -> None:
        receiver = self._incoming.get(header.transfer)
        if receiver is not None:
            receiver.missed(header)
        elif header.transfer not in self._finished:
            raise ProtocolError(f"data for transfer {header.transfer.hex()}, which was never accepted")

    def control(self, connection: AnyConnection, header: Header, payload: bytes) -> None:
        machine = self._machines[connection]
        machine.receive(header)
        if machine.state is not ConnectionState.READY and header.type is not FrameType.ERROR:
            return
        kind = header.type
        if kind is FrameType.PING:
            if not header.flags & Flag.REPLY:
                connection.send_control(encode_control(FrameType.PING, offset=header.offset, flags=Flag.REPLY))
                self.lanes.schedule()
        elif kind is FrameType.CALL:
            self._serve(connection, header, payload)
        elif kind is FrameType.REPLY:
            self._on_reply(header, payload)
        elif kind is FrameType.OPEN:
            if header.transfer in self._finished and self._endpoint.expected_over(self, header.transfer) is None:
                if last := self._finished[header.transfer]:
                    self.send(last)  # said again, since it was not heard
                return
            body = decode_control(header, payload, verified=True)
            assert isinstance(body, bodies.Open)
            self._endpoint.on_open(self, header, body)
        elif kind is FrameType.ERROR and not any(header.transfer):
            body = decode_control(header, payload, verified=True)
            assert isinstance(body, bodies.Error)
            error = body.to_error(prefix=f"{self.peer} says: ")
            if isinstance(error, PeerLostError):
                self.end(error)  # a farewell: it will not come back
            else:
                connection.fail(error)
        elif kind is FrameType.DATA:
            self._on_coded(header, payload)
        elif (sender := self._outgoing.get(header.transfer)) is not None:
            sender.on_frame(header, payload)
        elif (receiver := self._incoming.get(header.transfer)) is not None:
            receiver.on_frame(header, payload)
        elif kind is FrameType.SEAL and (last := self._finished.get(header.transfer)):
            self.send(last)
        elif header.transfer in self._finished or self._endpoint.withdraw(self, header):
            return
        elif kind in (FrameType.CANCEL, FrameType.ERROR):
            # It may overtake its OPEN, which means nothing then, or follow one that waited here until its deadline.
            self.finish(header.transfer, _WITHDRAWN)
            expected = self._endpoint.expected_over(self, header.transfer)
            if expected is not None:
                expected.on_frame(header, payload)
        else:
            raise ProtocolError(f"{kind.name} for transfer {header.transfer.hex()}, which was never opened")

    def _on_coded(self, header: Header, payload: bytes) -> None:
        if self._coding is None:
            raise ProtocolError("a coded chunk came, and this side named no codec in its HELLO")
        receiver = self._incoming.get(header.transfer)
        if receiver is not None:
            receiver.on_coded(header, payload)
        elif header.transfer not in self._finished:
            raise ProtocolError(f"data for transfer {header.transfer.hex()}, which was never accepted")

    # -- transfers -----------------------------------------------------------------------------

    def adopt(self, receiver: Receiver) -> None:
        """Route this transfer's frames to ``receiver``."""
        self._finished.pop(receiver.transfer, None)
        self._incoming[receiver.transfer] = receiver

    def forget_sender(self, sender: Sender, last: bytes | None) -> None:
        """``last``: the last word said to the consumer, if this side had it."""
        self._endpoint.pacer.leave(sender)
        if self._outgoing.pop(sender.transfer, None) is not None:
            self.finish(sender.transfer, last)

    def forget_receiver(self, receiver: Receiver, last: bytes | None) -> None:
        """``last``: the last word said to the producer, if this side had it."""
        if self._incoming.pop(receiver.transfer, None) is not None:
            self.finish(receiver.transfer, last)

    def finish(self, transfer: bytes, last: bytes | None = None) -> None:
        """Frames of this transfer that are still on their way have no meaning any more."""
        self._finished[transfer] = last
        while len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)

    # -- calls ---------------------------------------------------------------------------------

    def _serve(self, connection: AnyConnection, header: Header, payload: bytes) -> None:
        call = decode_control(header, payload, verified=True)
        assert isinstance(call, bodies.Call)
        if len(self._serving) >= MAX_CALLS:
            self._reply(
                connection,
                header.offset,
                LimitError(f"{MAX_CALLS} calls of this link are running; wait for answers", retryable=True),
            )
            return
        task = self._loop.create_task(self._answer(connection, header.offset, call))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _answer(self, connection: AnyConnection, number: int, call: bodies.Call) -> None:
        handler = self._verbs.get(call.verb) or self._endpoint.handlers.get(call.verb)
        try:
            if handler is None:
                raise ProtocolError(f"this peer has no verb {call.verb!r}")
            result = await handler(self, call.args)
            self._send_reply(connection, number, bodies.Reply(ok=True, result=result))
        except KVError as error:
            self._reply(connection, number, error)
        except Exception as error:  # noqa: BLE001  a bug in a handler must reach the caller, not hang it
            self._reply(
                connection,
                number,
                RemoteError(f"{call.verb!r} failed: {type(error).__name__}: {error}", fault=Fault.LOCAL),
            )
            self._loop.call_exception_handler({"message": f"handler of {call.verb!r} failed", "exception": error})

    def _reply(self, connection: AnyConnection, number: int, error: KVError) -> None:
        self._send_reply(connection, number, bodies.Reply(ok=False, error=bodies.Error.of(error)))

    def _send_reply(self, connection: AnyConnection, number: int, reply: bodies.Reply) -> None:
        # On the connection the call came by: when that is lost, the caller knows that the answer is.
        connection.send_control(encode_control(FrameType.REPLY, reply, offset=number))
        self.lanes.schedule()

    def _on_reply(self, header: Header, payload: bytes) -> None:
        future, _ = self._calls.get(header.offset, (None, None))
        if future is None or future.done():
            return  # the caller gave up
        reply = decode_control(header, payload, verified=True)
        assert isinstance(reply, bodies.Reply)
        if reply.error is not None:
            future.set_exception(reply.error.to_error(prefix=f"{self.peer}: "))
        else:
            future.set_result(reply.result or {})

    # -- ending --------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.closed:
            raise self.error or PeerLostError("this link was closed by this side", fault=Fault.LOCAL)

    def end(self, error: KVError | None) -> None:
        """End with ``error``; None: this side wants it, and tells the peer not to wait for it. Idempotent."""
        if self.closed:
            return
        self.error = error
        self._closed.set_result(None)
        self._watch.cancel()
        self._reconnect.close()
        self.tuner.close()
        self._wake()
        why = error or PeerLostError("this link was closed by this side", fault=Fault.LOCAL)
        for connection in list(self.connections):
            if error is not None:
                connection.flush()
                connection.fail(why)
            elif (left := connection.leave(_FAREWELL, why)) is not None:
                self._leaving.append(left)
        for sender in list(self._outgoing.values()):
            sender.on_link_lost(why)
        for receiver in list(self._incoming.values()):
            receiver.on_link_lost(why)
        for future, _ in self._calls.values():
            if not future.done():
                future.set_exception(why)
        for task in self._serving:
            task.cancel()
        self._endpoint.forget_link(self)
        # What refers to the link would keep it, and its last words of thousands of transfers, until a garbage collector comes by.
        self._finished.clear()
        self._verbs = {}
        self._coding = None
        self.tuner.let_go()
        self._reconnect.let_go()

