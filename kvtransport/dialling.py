"""How connections begin: the handshake of one, and the dialling side of a link, which makes them at first and later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from .connection import AnyConnection
from .errors import ConnectError, Fault, HandshakeError, KVError, ProtocolError
from .flow.addresses import Addresses, Pair
from .io.base import ByteStream
from .link import Link
from .wire import bodies
from .wire.frames import STRANGER_LIMITS, Header, decode_control
from .wire.state import ConnectionMachine, Role

if TYPE_CHECKING:
    from .endpoint import Endpoint


class Handshake:
    """Owns a connection until both HELLOs have crossed."""

    def __init__(
        self, endpoint: Endpoint, stream: ByteStream, machine: ConnectionMachine, join: Callable[[Handshake], None]
    ) -> None:
        self._endpoint = endpoint
        self._join = join
        loop = asyncio.get_running_loop()
        self.machine = machine
        stranger = machine.role is Role.ACCEPT
        self.connection = endpoint.new_connection(stream, self, STRANGER_LIMITS if stranger else endpoint.config.limits)
        self.joins: tuple[bytes, int, int] = (bytes(16), 0, 1)
        """Link, place, places: what the dialling side says."""
        self.advertises = False
        """Whether it says, too, where others reach it: once a link."""
        self.done: asyncio.Future[None] = loop.create_future()
        self.done.add_done_callback(lambda f: f.cancelled() or f.exception())
        self._timer = loop.call_later(endpoint.config.handshake_timeout_s, self._expired)
        endpoint.handshake_begun(self)

    def start(self) -> None:
        self.connection.start()

    def present(self) -> None:
        """The dialling side's HELLO."""
        link, index, count = self.joins
        said = self._endpoint.admission.present(self.connection.stream, link, index)
        config = self._endpoint.config
        if self.advertises and config.advertise:
            said |= {"address": config.advertise, "address_incarnation": config.advertise_incarnation or msgspec.UNSET}
        self.say_hello(link, index, count, **said)

    def say_hello(self, link: bytes, index: int, count: int, **more: Any) -> None:
        config = self._endpoint.config
        frame = self.machine.hello_to_send(
            link=link,
            index=index,
            count=count,
            name=config.name,
            features=self._endpoint.features,
            keepalive_s=config.keepalive_s,
            **more,
        )
        self.connection.send_control(frame)
        self.connection.flush()

    def _settle(self) -> None:
        self._timer.cancel()
        self._endpoint.handshake_over(self)
        if not self.done.done():
            self.done.set_result(None)

    def _expired(self) -> None:
        # Said to the peer too, which may be wondering: it may have sent a part of a frame and wait for the answer.
        self.connection.refuse(
            HandshakeError(
                f"{self.connection.stream.peer} did not complete the handshake within "
                f"{self._endpoint.config.handshake_timeout_s:g} s; is it a kvtransport port?",
                fault=Fault.REMOTE,
                retryable=True,
            )
        )

    # -- kvtransport.connection.Owner ----------------------------------------------------------

    def control(self, connection: AnyConnection, header: Header, payload: bytes) -> None:
        self.machine.receive(header)
        body = decode_control(header, payload, verified=True)
        if isinstance(body, bodies.Error):
            connection.fail(body.to_error(prefix=f"{connection.stream.peer} refused: "))
            return
        assert isinstance(body, bodies.Hello)
        self.machine.receive_hello(body)
        self._join(self)
        self._settle()

    def stray(self, connection: AnyConnection, header: Header) -> None:
        self.machine.receive(header)
        raise ProtocolError("got DATA before the handshake was over")

    def lost(self, connection: AnyConnection, error: KVError) -> None:
        self._timer.cancel()
        self._endpoint.handshake_over(self, error)
        if not self.done.done():
            self.done.set_exception(error)


class Dialling:
    """The dialling side of one link: makes its connections, at first and later."""

    def __init__(
        self, endpoint: Endpoint, addresses: Addresses, port: int, count: int | None, *, advertise: bool = True
    ) -> None:
        self._endpoint = endpoint
        self._advertise = advertise
        self._addresses = addresses
        self._port = port
        self._count = count
        self._id = endpoint.new_link_id()
        self._peer: bytes | None = None
        """Its incarnation, once it is known."""
        self._link: Link | None = None
        self._loop = asyncio.get_running_loop()

    async def link(self) -> Link:
        try:
            await self.dial(0)
            assert self._link is not None
            await self._others(self._link)
        except BaseException as error:
            if self._link is not None:
                await self._link.close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        self._link.redial(self.dial, self._addresses)
        return self._link

    async def _others(self, link: Link) -> None:
        if self._count is None:
            await link.tuner.start(self.dial)
            return
        link.wanted = self._count
        async with asyncio.TaskGroup() as group:
            for index in range(1, self._count):
                group.create_task(self.dial(index))

    async def dial(self, index: int) -> None:
        """Make the connection in place ``index`` over whichever addresses answer. Raises KVError."""
        tried: list[Pair] = []
        last: KVError | None = None
        while (pair := self._addresses.pick(self._loop.time(), tried)) is not None:
            tried.append(pair)
            self._addresses.use(index, pair)
            try:
                await self._endpoint.dial(pair, self._port, lambda stream: self._handshake(stream, index))
            except ConnectError as error:
                self._addresses.left(index)
                self._addresses.failed(pair, self._loop.time())
                last = error
            except BaseException:
                self._addresses.left(index)
                raise
            else:
                self._addresses.works(pair)
                return
        assert last is not None
        raise last

    def _handshake(self, stream: ByteStream, index: int) -> Handshake:
        link = self._link
        machine = ConnectionMachine(Role.DIAL, incarnation=self._endpoint.incarnation, peer_incarnation=self._peer)
        handshake = Handshake(self._endpoint, stream, machine, self._join)
        handshake.connection.index = index
        handshake.advertises = self._advertise and link is None
        handshake.joins = self._id, index, max(self._count or 0, index + 1, 0 if link is None else link.wanted)
        return handshake

    def _join(self, handshake: Handshake) -> None:
        # Called as soon as the peer's HELLO is there: its next frame may follow in the same read.
        hello = handshake.machine.peer
        assert hello is not None
        if self._link is None:
            stream = handshake.connection.stream
            self._link = Link(self._endpoint, self._id, hello, stream, dialled=True, connections=self._count)
            self._peer = hello.incarnation
            self._endpoint.add_link(self._link)
        if self._link.closed:
            raise ConnectError("the link has ended, or was given up while it was dialled")
        self._link.join(handshake.connection, handshake.machine)


def closing() -> KVError:
    return HandshakeError("this endpoint is closing", fault=Fault.LOCAL)
