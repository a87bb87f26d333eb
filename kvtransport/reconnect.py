"""What happens to a link that loses connections: its dialling side dials again, its accepting side waits.

Both have the same budget. As long as it lasts the transfers of the link stay as they are; when somebody joins again,
everything that is still true is said again and only what is missing travels (docs/design.md, "Losses").
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

from .errors import (
    ConfigError,
    Fault,
    HandshakeError,
    IncarnationError,
    KVError,
    PeerFrozenError,
    PeerLostError,
    ProtocolError,
)
from .flow.backoff import Backoff

if TYPE_CHECKING:
    from .link import Link

GONE_S = 1.0
"""Nobody listened for so long where the peer was dialled: its process is no more, another would be another incarnation."""
SETTLED_S = 1.0
"""A connection that lasted this long starts the back-off anew; one that broke sooner does not."""


def resumable(error: KVError) -> bool:
    """Whether another connection may do better: not when a side broke the protocol, it would do so again."""
    return (error.fault is Fault.NETWORK or error.retryable) and not isinstance(error, IncarnationError)


class _Ended:
    """In the place of a link that has ended."""

    connections = ()
    closed = True
    reconnecting = False
    most_connections = wanted = 0


ENDED = _Ended()


class Reconnect:
    """One link's way back. ``random()`` gives numbers from [0, 1); ``budget_s`` 0 means no way back."""

    def __init__(self, link: Link, budget_s: float, backoff: Backoff, random: Callable[[], float]) -> None:
        self._link = link
        self._budget_s = budget_s
        self._backoff = backoff
        self._random = random
        self._loop = asyncio.get_running_loop()
        self._dial: Callable[[int], Awaitable[None]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._attempt = 0
        self._joined_s = self._loop.time()
        self._abandoned: set[int] = set()
        self.task: asyncio.Task[None] | None = None
        """Dials, while something is missing."""

    def dial_with(self, dial: Callable[[int], Awaitable[None]]) -> None:
        """From now on this side dials: ``dial(index)`` makes one connection and lets it join, or raises KVError."""
        self._dial = dial
        self._start()

    def lost(self, index: int, error: KVError) -> bool:
        """The connection in place ``index`` is gone. False: the link has no connection left and no way back."""
        empty = not self._link.connections
        if not resumable(error) or self._budget_s <= 0 or (empty and self._link.dialled and self._dial is None):
            self._abandoned.add(index)
            return not empty
        if empty and self._timer is None:
            self._timer = self._loop.call_later(self._budget_s, self._expired, error)
        self._start()
        return True

    def release(self, index: int) -> None:
        """The connection in place ``index`` is closed on purpose, and not missed."""
        self._abandoned.add(index)

    def joined(self, index: int) -> None:
        self._abandoned.discard(index)
        self._joined_s = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    def let_go(self) -> None:
        """The link has ended, and this is closed: refer to it no more, unless it is being dialled still."""
        if self.task is None:
            self._link = cast("Link", ENDED)
            self._dial = None

    # -- inside --------------------------------------------------------------------------------

    def _expired(self, error: KVError) -> None:
        self._timer = None
        if not isinstance(error, PeerFrozenError):
            error = PeerLostError(f"{self._link.peer} did not come back within {self._budget_s:g} s: {error.message}")
        self._link.end(error)

    def _missing(self) -> int | None:
        there = {connection.index for connection in self._link.connections} | self._abandoned
        return next((i for i in range(self._link.wanted) if i not in there), None)

    def _start(self) -> None:
        if self._dial is not None and self.task is None and not self._link.closed and self._missing() is not None:
            if self._loop.time() - self._joined_s > SETTLED_S:
                self._attempt = 0
            self.task = self._loop.create_task(self._run(self._dial))

    async def _run(self, dial: Callable[[int], Awaitable[None]]) -> None:
        made: set[int] = set()
        wait = True
        refused_since: float | None = None
        try:
            while not self._link.closed and (index := self._missing()) is not None:
                if wait or index in made:  # made, and broken already
                    await asyncio.sleep(self._backoff.delay(self._attempt, self._random()))
                    self._attempt += 1
                wait = True
                try:
                    await dial(index)
                    made.add(index)
                    wait, refused_since = False, None
                except IncarnationError as error:
                    # Whatever is left of the link belongs to a process that is no more.
                    self._link.end(error)
                    return
                except (HandshakeError, ProtocolError, ConfigError) as error:
                    refused_since = None
                    if error.retryable or error.fault is Fault.NETWORK:
                        continue
                    if not self._link.connections:
                        self._link.end(PeerLostError(f"{self._link.peer} has given this link up: {error.message}"))
                    return
                except KVError as error:  # not there yet
                    if not isinstance(error.__cause__, ConnectionRefusedError):
                        refused_since = None
                    elif refused_since is None:
                        refused_since = self._loop.time()
                    elif self._loop.time() - refused_since >= GONE_S and not self._link.connections:
                        self._link.end(PeerLostError(f"{self._link.peer} is gone: {error.message}"))
                        return
        finally:
            self.task = None
