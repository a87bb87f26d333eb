"""Prefill instances and decode batches."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Any


class PrefillPool:
    """``instances`` that take one request at a time, first come first served."""

    __slots__ = ("_since", "busy", "busy_time", "instances", "leaving", "offered_time", "queue")

    def __init__(self, instances: int) -> None:
        self.instances = instances
        self.busy = 0
        self.leaving = 0
        """Instances that go when they finish what they are doing."""
        self.queue: deque[Any] = deque()
        self.busy_time = 0.0
        self.offered_time = 0.0
        self._since = 0.0

    def account(self, now: float) -> None:
        """Add the time since the last call to ``busy_time`` and ``offered_time`` (instance-seconds)."""
        self.busy_time += self.busy * (now - self._since)
        self.offered_time += self.instances * (now - self._since)
        self._since = now


class DecodeInstance:
    """One continuous batch of up to ``places`` requests; all advance one token a step.

    A step takes ``step`` seconds when the batch is full and ``floor`` of that when it is almost empty. Progress is kept as
    one counter of steps, so that a request's end is a value of it, whatever the batch does in between.
    """

    __slots__ = (
        "_at",
        "_steps",
        "batch",
        "draining",
        "floor",
        "offered_time",
        "places",
        "step",
        "taken_time",
        "version",
    )

    def __init__(self, places: int, step: float, floor: float, now: float = 0.0) -> None:
        self.places = places
        self.step = step
        self.floor = floor
        self.batch: list[tuple[float, int, Any]] = []
        self.draining = False
        self.version = 0
        self.taken_time = 0.0
        self.offered_time = 0.0
        self._steps = 0.0
        self._at = now

    def _pace(self) -> float:
        return self.step * (self.floor + (1.0 - self.floor) * len(self.batch) / self.places)

    def advance(self, now: float) -> None:
        n, dt = len(self.batch), now - self._at
        self.offered_time += self.places * dt
        if n:
            self.taken_time += n * dt
            self._steps += dt / self._pace()
        self._at = now

    def join(self, number: int, tokens: float, request: Any) -> None:
        """Add a request that needs ``tokens`` steps; call :meth:`advance` first and :meth:`next_end` after."""
        heapq.heappush(self.batch, (self._steps + tokens, number, request))

    def next_end(self) -> float | None:
        """When the first request of the batch ends, if nothing changes before; starts a new version."""
        self.version += 1
        if not self.batch:
            return None
        return self._at + max(self.batch[0][0] - self._steps, 0.0) * self._pace()

    def pop_due(self) -> list[Any]:
        """The requests that end now, at least one: call it at the time :meth:`next_end` gave."""
        done = []
        # The counter is a sum of floats and may be a hair short of the end it was scheduled for.
        self._steps = max(self._steps, self.batch[0][0])
        limit = self._steps + 5e-7
        while self.batch and self.batch[0][0] <= limit:
            done.append(heapq.heappop(self.batch)[2])
        return done
