"""Following the events of an engine, or of another pool: a SUB socket, and a replay where something was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

from ..cluster.tasks import end
from .messages import MAX_MESSAGE_BYTES, EventBatch
from .publisher import END, HIGH_WATER
from .sequence import Sequence, Standing
from .sockets import zeromq

REPLAY_S = 10.0
"""Of silence within a replay, after which it counts as refused."""


class EventSubscriber:
    """Calls ``apply`` with every batch, in order and none twice (a snapshot begins with AllBlocksCleared), and ``reset`` when what it
    was told before is void. Use as an async context manager; raises ConfigError without pyzmq.

    ``endpoint`` and ``replay`` are ZeroMQ addresses to connect to; without ``replay`` a gap means to know nothing.
    """

    def __init__(
        self,
        endpoint: str,
        replay: str = "",
        *,
        apply: Callable[[EventBatch], None],
        reset: Callable[[], None],
        topic: str = "",
        replay_s: float = REPLAY_S,
    ) -> None:
        self._endpoint, self._replay, self._topic, self._replay_s = endpoint, replay, topic.encode(), replay_s
        self.sequence = Sequence(apply, reset, can_ask=bool(replay))
        self._context: Any = None
        self._sub: Any = None
        self._task: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def following(self) -> bool:
        """Whether what was told is complete up to the last batch that came."""
        return self.sequence.standing is Standing.FOLLOWING

    async def __aenter__(self) -> Self:
        zmq, zmq_asyncio = zeromq()
        self._context = zmq_asyncio.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.setsockopt(zmq.LINGER, 0)
        self._sub.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._sub.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._sub.setsockopt(zmq.SUBSCRIBE, self._topic)
        self._sub.connect(self._endpoint)
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._follow(), name="events follow")
        if self._replay:
            # Whoever joins late need not wait for the next change.
            self.sequence.standing = Standing.ASKING
            self._ask(0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end([t for t in (self._task, self._asking) if t is not None])
        self._sub.close(linger=0)
        self._context.term()

    async def _follow(self) -> None:
        while True:
            frames = await self._sub.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                self.sequence.malformed += 1
                continue
            ask = self.sequence.came(int.from_bytes(frames[1], "big"), frames[2])
            if ask is not None:
                self._ask(ask)

    def _ask(self, number: int) -> None:
        self._asking = asyncio.get_running_loop().create_task(self._replay_from(number), name="events ask")

    async def _replay_from(self, number: int) -> None:
        zmq, _ = zeromq()
        ask: int | None = number
        while ask is not None:
            # One socket a question: late answers to the one before it end with that.
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            try:
                socket.connect(self._replay)
                await socket.send_multipart((b"", ask.to_bytes(8, "big")))
                while True:
                    async with asyncio.timeout(self._replay_s):
                        frames = await socket.recv_multipart()
                    if frames[-2] == END:
                        break
                    self.sequence.replayed(int.from_bytes(frames[-2], "big"), frames[-1])
                ask = self.sequence.replay_ended()
            except TimeoutError:
                self.sequence.lost()
                ask = 0
                self.sequence.standing = Standing.ASKING
            finally:
                socket.close(linger=0)
