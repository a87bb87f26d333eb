"""Publishing an :class:`~kvpool.events.log.EventLog`: a PUB socket for all, a ROUTER socket for who missed something.

A message is [topic, number (8 bytes, big-endian), batch]. Who asks the ROUTER with [empty, number] gets [empty, number, batch] for every
batch from there on, and [empty, 0xff * 8, empty] at the end: vLLM's protocol. If those are not kept any more it is a snapshot instead.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from kvtransport.errors import ConfigError

from ..cluster.tasks import end, keep_running
from .log import EventLog
from .sockets import check_bind, zeromq

END = b"\xff" * 8
HIGH_WATER = 256
"""Batches that may wait for one slow subscriber; it misses what comes then, and sees by the numbers that it did."""
MAX_REPLAYS = 16
TICK_S = (0.5, 30.0)
"""In a silence an empty batch is published after the first, then after twice as long, up to the second: a loss at its beginning shows."""
REPLAY_S = 30.0
"""For one replay; who takes it more slowly asks again."""


class EventPublisher:
    """Never waits for a subscriber. ``endpoint`` and ``replay`` are ZeroMQ addresses to bind; ``insecure`` allows other machines.

    :meth:`start` raises ConfigError (no pyzmq, an address that cannot be bound) and InsecureBindError.
    """

    def __init__(
        self, log: EventLog, endpoint: str, replay: str = "", *, topic: str = "", insecure: bool = False
    ) -> None:
        self._log, self._topic = log, topic.encode()
        self._wanted, self._insecure = (endpoint, replay), insecure
        self.endpoint = self.replay = ""
        """Where it listens, once started."""
        self._context: Any = None
        self._pub: Any = None
        self._router: Any = None
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._replays: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        zmq, zmq_asyncio = zeromq()
        for endpoint in filter(None, self._wanted):
            check_bind(endpoint, self._insecure)
        self._context = zmq_asyncio.Context()
        loop = asyncio.get_running_loop()
        try:
            self._pub = self._bind(zmq, self._context.shadow(self._context.underlying), zmq.PUB, self._wanted[0])
            self.endpoint = self._pub.last_endpoint.decode()
            if self._wanted[1]:
                self._router = self._bind(zmq, self._context, zmq.ROUTER, self._wanted[1])
                self.replay = self._router.last_endpoint.decode()
        except ConfigError:
            await self.close()
            raise
        self._log.changed = self._wake.set
        self._wake.set()
        self._tasks = [loop.create_task(keep_running(self._publish, "events publish"), name="events publish")]
        if self._router is not None:
            self._tasks.append(loop.create_task(keep_running(self._serve, "events replay"), name="events replay"))

    @staticmethod
    def _bind(zmq: Any, context: Any, kind: int, endpoint: str) -> Any:
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        if kind == zmq.ROUTER:
            # Else what does not fit is dropped without a word.
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.MAXMSGSIZE, 1024)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"cannot publish events on {endpoint}: {error}") from error
        return socket

    async def close(self) -> None:
        self._log.changed = lambda: None
        await end([*self._tasks, *self._replays])
        for socket in (self._pub, self._router):
            if socket is not None:
                socket.close(linger=0)
        if self._context is not None:
            self._context.term()
            self._context = None

    async def _publish(self) -> None:
        quiet_s = TICK_S[0]
        while True:
            try:
                async with asyncio.timeout(quiet_s):
                    await self._wake.wait()
            except TimeoutError:
                self._send_all(self._log.tick())
                quiet_s = min(quiet_s * 2, TICK_S[1])
                continue
            self._wake.clear()
            quiet_s = TICK_S[0]
            while (batch := self._log.take()) is not None:
                self._send_all(batch)
                await asyncio.sleep(0)

    def _send_all(self, batch: tuple[int, bytes]) -> None:
        number, payload = batch
        self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))

    async def _serve(self) -> None:
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8 or len(self._replays) >= MAX_REPLAYS:
                continue
            work = self._replay(frames[0], int.from_bytes(frames[2], "big"))
            task = asyncio.get_running_loop().create_task(work, name="one replay")
            self._replays.add(task)
            task.add_done_callback(self._replays.discard)

    async def _replay(self, who: bytes, number: int) -> None:
        import zmq

        kept = self._log.since(number)
        # The asker may go away, or take too long.
        with suppress(TimeoutError, zmq.ZMQError):
            async with asyncio.timeout(REPLAY_S):
                for at, payload in self._log.snapshot() if kept is None else kept:
                    await self._send(who, at.to_bytes(8, "big"), payload)
                await self._send(who, END, b"")

    async def _send(self, who: bytes, number: bytes, payload: bytes) -> None:
        import zmq

        while True:
            try:
                await self._router.send_multipart((who, b"", number, payload), flags=zmq.NOBLOCK)
            except zmq.Again:
                await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(0)
                return
