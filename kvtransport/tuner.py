"""Applies :mod:`.flow.tuning` to one link: dials, parks and retires its connections, sets their congestion control and pace.

Works only while the link has something to send, four times a second. Each side decides for what it sends. Connections are the
dialling side's to make: the other one asks for more with the verb :data:`WANT`. Too many are *parked* (no chunk goes to them, so
that they are warm when they are wanted again) and, after a while, *retired*: both sides see to it that nothing is on its way on
them and that no call waits for them, and only then one is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from .connection import AnyConnection
from .errors import Fault, KVError, LimitError, PeerLostError
from .flow.addresses import Addresses
from .flow.tuning import MOST, Choice, Readings, Tuning
from .io.base import is_tunable
from .reconnect import ENDED
from .wire.frames import Flag, FrameType, encode_control

if TYPE_CHECKING:
    from .link import Link

EVERY_S = 0.25
IDLE_S = 1.0
"""Judged for so long after the last transfer has ended."""
PARKED_S = 30.0
"""A connection that was not wanted for so long is retired."""
AGAIN_S = 5.0
"""More connections are tried again so long after some could not be made."""
DRAIN_S = 5.0
"""Both sides have so long to let go of a connection that is retired; otherwise it stays."""
WANT = "link.connections"
RETIRE = "link.retire"
_LAST = encode_control(FrameType.PING, offset=0, flags=Flag.REPLY)
"""The last frame of a connection that is retired: it means nothing."""


class Tuner:
    """One link's. ``fixed``: the number of connections was asked for, and so was ``fixed_congestion``."""

    def __init__(self, link: Link, policy: Tuning, *, fixed: bool, fixed_congestion: bool) -> None:
        self._link = link
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._fixed = fixed
        self._fixed_congestion = fixed_congestion
        self._readings = Readings(self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._dial: Callable[[int], Awaitable[None]] | None = None
        self._addresses: Addresses | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._parked_s: dict[AnyConnection, float] = {}
        self._letting_go: set[AnyConnection] = set()
        """The peer retires them."""
        self._again_s = 0.0
        """When to dial again after that failed."""
        self._peer_wants = 0
        self._asked = 0
        self._idle_s = 0.0
        self.capped_at: float | None = None
        self._paced = False
        self._congestion: tuple[str, ...] = ()
        self.choice: Choice = policy.choice()
        self._unsent = self.choice.unsent_bytes

    # -- told by the link ----------------------------------------------------------------------

    async def start(self, dial: Callable[[int], Awaitable[None]]) -> None:
        """The link has its first connection, of this side's making: make the others. One that cannot be made is no error."""
        self._dial = dial
        count = self.choice.connections - len(self._link.connections)
        if count > 0:
            await self._grow(count, ())

    def dial_with(self, dial: Callable[[int], Awaitable[None]], addresses: Addresses) -> None:
        self._dial = dial
        self._addresses = addresses

    def busy(self) -> None:
        """There is something to send."""
        self._idle_s = 0.0
        if self._timer is None and not self._link.closed:
            self._readings = Readings(self._loop.time())
            self._step()

    def joined(self, connection: AnyConnection) -> None:
        self._pace()
        if self._unsent is not None and is_tunable(connection.stream):
            connection.stream.keep_unsent(self._unsent)

    def left(self, connection: AnyConnection) -> None:
        self._parked_s.pop(connection, None)
        self._letting_go.discard(connection)
        if self._addresses is not None:
            self._addresses.left(connection.index)
        if all(c.parked for c in self._link.connections):  # what is left was not wanted: better that than nothing
            for other in self._link.connections[: max(1, self.choice.connections)]:
                self._unpark(other)
        self._pace()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def let_go(self) -> None:
        """The link has ended, and this is closed: refer to it no more, unless something is still under way."""
        if not self.tasks:
            self._link = cast("Link", ENDED)
            self._dial = None

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What it has under way."""
        return {task for task in (self._dialling, self._retiring, self._asking) if task is not None}

    def cap(self, bytes_per_s: float | None) -> None:
        """The link sends at most so fast, all its connections together; each gets an equal share. None: no limit."""
        self.capped_at = bytes_per_s
        self._pace()

    # -- verbs of the peer ---------------------------------------------------------------------

    async def on_want(self, args: dict[str, Any]) -> dict[str, Any]:
        """The peer, which did not dial, would like so many connections for what it sends."""
        wanted = args.get("connections")
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= 1024:
            raise LimitError(f"a link has 1 to 1024 connections, asked for {wanted!r}")
        self._peer_wants = 0 if self._fixed else min(wanted, MOST)
        self._have(self.choice, fresh=False)
        return {"connections": max(len(self._link.connections), self._peer_wants)}

    async def on_retire(self, args: dict[str, Any]) -> dict[str, Any]:
        """The peer wants to close a connection: nothing more is sent on it once this has answered."""
        connection = next((c for c in self._link.connections if c.index == args.get("index")), None)
        if connection is None:
            return {}
        if len(self._link.connections) < 2:
            raise LimitError("the last connection of a link is not retired")
        self._letting_go.add(connection)
        connection.park(True)
        if not await self._drained(connection):
            self._letting_go.discard(connection)
            self._unpark(connection)
            raise LimitError(f"connection {connection.index} is in use", retryable=True)
        return {}

    # -- the step ------------------------------------------------------------------------------

    def _step(self) -> None:
        link = self._link
        self._timer = None
        if link.closed:
            return
        now = self._loop.time()
        active = [c for c in link.connections if not c.closed and not c.parked]
        infos = [(c, info) for c in active if (info := c.stream.info()) is not None]
        reading = self._readings.take(now, link.delivered_bytes(), infos)
        if reading is not None:
            choice = self._policy.judge(reading)
            self._choose(choice.congestion)
            self._bound(choice.unsent_bytes)
            self._have(choice, fresh=choice.fresh)
        self._spread(now)
        self._retire(now)
        self._idle_s = 0.0 if link.outgoing else self._idle_s + EVERY_S
        if self._idle_s < IDLE_S or self._parked_s:
            self._timer = self._loop.call_later(EVERY_S, self._step)

    def _choose(self, congestion: tuple[str, ...]) -> None:
        if self._fixed_congestion or congestion == self._congestion:
            return
        self._congestion = congestion
        for connection in self._link.connections:
            stream = connection.stream
            if is_tunable(stream) and not connection.closed and stream.congestion() not in congestion:
                stream.set_congestion(congestion)

    def _bound(self, unsent_bytes: int | None) -> None:
        if unsent_bytes == self._unsent:
            return
        self._unsent = unsent_bytes
        for connection in self._link.connections:
            if is_tunable(connection.stream) and not connection.closed:
                connection.stream.keep_unsent(unsent_bytes)

    def _have(self, choice: Choice, *, fresh: bool) -> None:
        """Bring the link to what is chosen; ``fresh``: with connections that do not remember an earlier path."""
        self.choice = choice
        if self._fixed:
            return
        wanted = min(max(choice.connections, self._peer_wants), self._link.most_connections)
        live = [c for c in self._link.connections if not c.closed and c not in self._letting_go]
        live.sort(key=lambda c: (c.parked, c.index))
        if self._dial is None:
            self._ask(wanted, live)
            return
        if fresh:
            if self._dialling is None and not self._link.reconnecting:
                room = self._link.most_connections - len(live)
                self._dialling = self._loop.create_task(self._grow(min(wanted, room), tuple(live)))
            return
        if self._dialling is None and not self._link.reconnecting:
            self._use(live, wanted)
            if len(live) < wanted and live and self._loop.time() >= self._again_s:
                self._dialling = self._loop.create_task(self._grow(wanted - len(live), ()))

    def _use(self, live: list[AnyConnection], wanted: int) -> None:
        for connection in live[:wanted]:
            self._unpark(connection)
        for connection in live[wanted:]:
            self._park(connection)

    def _spread(self, now: float) -> None:
        """An address that has no connection, because it did not answer, is tried again in the place of one that has many."""
        if self._addresses is None or self._dialling is not None or self._link.reconnecting:
            return
        if not self._addresses.idle(now):
            return
        fullest = set(self._addresses.fullest())
        replaced = [c for c in self._link.connections if c.index in fullest and not c.parked][-1:]
        self._dialling = self._loop.create_task(self._grow(1, tuple(replaced)))

    def _ask(self, wanted: int, live: list[AnyConnection]) -> None:
        self._use(live, wanted)
        if wanted <= len(live):
            self._asked = 0
        elif wanted != self._asked and self._asking is None:
            self._asked = wanted
            self._asking = self._loop.create_task(self._tell(wanted))

    async def _tell(self, wanted: int) -> None:
        try:
            await self._link.call(WANT, {"connections": wanted})
        except KVError:
            pass  # a peer without this verb, or without room: the link goes on as it is
        finally:
            self._asking = None

    async def _grow(self, count: int, replaced: tuple[AnyConnection, ...]) -> None:
        """Dial ``count`` more; then those they replace, if any, are parked."""
        assert self._dial is not None
        link = self._link
        taken = {c.index for c in link.connections}
        free = [i for i in range(link.most_connections) if i not in taken][:count]
        try:
            before = len(link.connections)
            results = await asyncio.gather(*map(self._dial, free), return_exceptions=True)
            if any(isinstance(result, BaseException) for result in results):
                self._again_s = self._loop.time() + AGAIN_S
            for result in results:
                if isinstance(result, LimitError):
                    self._policy.limit(max(1, before))
                elif isinstance(result, BaseException) and not isinstance(result, KVError):
                    raise result
            if any(not isinstance(result, BaseException) for result in results):
                for connection in replaced:
                    self._park(connection)
            # Afterwards only: until here nobody else shall dial these places (see Reconnect).
            places = 1 + max((c.index for c in link.connections), default=0)
            link.wanted = max(places, link.wanted) if self._fixed else places
        finally:
            self._dialling = None

    # -- parking and retiring ------------------------------------------------------------------

    def _park(self, connection: AnyConnection) -> None:
        if not connection.parked:
            connection.park(True)
            self._parked_s[connection] = self._loop.time()
            self._pace()

    def _unpark(self, connection: AnyConnection) -> None:
        self._parked_s.pop(connection, None)
        if connection.parked:
            connection.park(False)
            self._link.lanes.schedule()
            self._pace()

    def _retire(self, now: float) -> None:
        if self._retiring is not None or self._dial is None:
            return
        for connection, since in list(self._parked_s.items()):
            if now - since >= PARKED_S and len(self._link.connections) > 1:
                self._parked_s[connection] = now  # should this not succeed, it is tried again as late
                self._retiring = self._loop.create_task(self._part(connection))
                return

    async def _part(self, connection: AnyConnection) -> None:
        try:
            if not await self._drained(connection):
                return
            await self._link.call(RETIRE, {"index": connection.index}, timeout_s=2 * DRAIN_S)
            if connection.parked and not connection.closed and await self._drained(connection):
                self._link.release(connection.index)
                connection.leave(_LAST, PeerLostError("retired: the link has more connections than it needs", fault=Fault.LOCAL))
        except KVError:
            pass  # in use, or the link has other worries
        finally:
            self._retiring = None

    async def _drained(self, connection: AnyConnection) -> bool:
        """Whether, within :data:`DRAIN_S`, nothing is on its way on ``connection`` and no call waits for it."""
        deadline = self._loop.time() + DRAIN_S
        while not connection.closed:
            if not connection.stream.unsent_bytes() and not connection.load and not self._link.calls_on(connection):
                return True
            if self._loop.time() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    # -- pace ----------------------------------------------------------------------------------

    def _pace(self) -> None:
        if self.capped_at is None and not self._paced:
            return
        active = [c for c in self._link.connections if not c.closed and not c.parked]
        for connection in active:
            if is_tunable(connection.stream):
                connection.stream.pace(None if self.capped_at is None else self.capped_at / len(active))
        self._paced = self.capped_at is not None
