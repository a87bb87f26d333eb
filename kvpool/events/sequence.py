"""Which batches of events may be applied, and what to ask for: pure, so that every order of arrivals can be played."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import StrEnum

from kvtransport.errors import ProtocolError

from .messages import AllBlocksCleared, EventBatch, decode

MAX_WAITING = 4096
"""Batches that may wait for a replay; with more it begins again."""


class Standing(StrEnum):
    """Where a follower stands."""

    NEW = "new"
    FOLLOWING = "following"
    ASKING = "asking"
    """Batches are missing; what comes meanwhile waits."""


class Sequence:
    """Puts batches in order for ``apply``; ``reset`` is called when what was known is void.

    ``can_ask``: the publisher answers replays. Without, and for what it does not have any more, a gap means to know nothing.
    """

    def __init__(self, apply: Callable[[EventBatch], None], reset: Callable[[], None], *, can_ask: bool) -> None:
        self._apply, self._reset, self._can_ask = apply, reset, can_ask
        self.standing = Standing.NEW
        self.expected = 0
        """The number of the next batch."""
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._fresh = True
        """Whether nothing of the present replay has come."""
        self.gaps = self.resets = self.malformed = 0

    def came(self, number: int, payload: bytes) -> int | None:
        """A published batch; returns the number to ask a replay from, None when there is nothing to ask."""
        if self.standing is Standing.ASKING:
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()  # makes a gap of it, after the replay
            self._waiting.append((number, payload))
            return None
        if number == self.expected and self.standing is Standing.FOLLOWING:
            return self._take(number, payload)
        if number < self.expected:
            self.lost()  # the publisher has begun anew
        elif self.standing is Standing.FOLLOWING:
            self.gaps += 1
        if not self._can_ask or (number == 0 and self.standing is Standing.NEW):
            if self.standing is Standing.FOLLOWING:
                self.lost()
            self.standing = Standing.FOLLOWING
            return self._take(number, payload)
        self.standing, self._fresh = Standing.ASKING, True
        self._waiting.append((number, payload))
        return self.expected

    def replayed(self, number: int, payload: bytes) -> None:
        """A batch of the replay that was asked for."""
        if self.standing is not Standing.ASKING:
            return
        try:
            batch = decode(payload)
        except ProtocolError:
            self.malformed += 1
            self.lost()
            return
        clears = bool(batch.events) and isinstance(batch.events[0], AllBlocksCleared)
        if self._fresh and number > self.expected and not clears:
            # The publisher does not have all of it any more: what went meanwhile is not known.
            self._void()
        self._fresh = False
        self._apply(batch)
        # A snapshot may be of a later life of the publisher, whose numbers begin anew.
        self.expected = number + 1 if clears else max(self.expected, number + 1)

    def replay_ended(self) -> int | None:
        """The replay is over; returns the number to ask from when there is a gap again."""
        if self.standing is not Standing.ASKING:
            return None
        waiting, self._waiting = self._waiting, deque()
        if self._fresh and waiting and waiting[0][0] > self.expected:
            self._void()  # nothing of what is missing is to be had
            self.expected = waiting[0][0]
        elif waiting and waiting[0][0] > self.expected:
            # The answer was newer than this batch and does not lead to it: it is of an earlier life. Never ask for the same twice.
            waiting.popleft()
        self.standing = Standing.FOLLOWING
        for at, (number, payload) in enumerate(waiting):
            if number < self.expected:
                continue  # the replay had it
            ask = self.came(number, payload)
            if ask is not None:
                self._waiting.extend(list(waiting)[at + 1 :])
                return ask
        return None

    def lost(self) -> None:
        """Nothing that is known holds any more (the publisher is another one, or does not answer)."""
        self._void()
        self.standing, self.expected = Standing.NEW, 0
        self._waiting.clear()

    def _void(self) -> None:
        self.resets += 1
        self._reset()

    def _take(self, number: int, payload: bytes) -> int | None:
        try:
            batch = decode(payload)
        except ProtocolError:
            self.malformed += 1
            self._void()
        else:
            self._apply(batch)
        self.expected = number + 1
        return None
