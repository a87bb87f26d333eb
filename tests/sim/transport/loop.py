"""An asyncio event loop on a virtual clock: no socket, no thread; time jumps to the next timer.

What would run in an executor runs on the loop, after a delay that the simulation chooses: between submission and
end the bytes it reads must stay readable, which is what a thread would need too.
"""

from __future__ import annotations

import asyncio
from asyncio import base_events
from collections.abc import Callable
from typing import Any


class Stuck(Exception):
    """Nothing is ready and no timer is set: whoever still waits would wait for ever."""


class _Selector:
    """Stands where the selector of a real loop stands: waiting is what moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("no callback is ready and no timer is set")
        self._loop.advance(timeout)
        return []


class VirtualLoop(base_events.BaseEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = _Selector(self)
        self.submit: Callable[[Callable[[], None], tuple[Any, ...]], None] = lambda run, args: None
        """Called with each executor job and its arguments; calls it when it is to run. Set by the simulation."""
        self.turns = 0
        self.events = 0
        """Callbacks scheduled."""
        self.limit_turns = 400_000

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += max(0.0, seconds)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001  (as an executor would)
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.submit(run, args)
        return future

    def live_timers(self) -> list[asyncio.TimerHandle]:
        return [t for t in self._scheduled if not t.cancelled()]

    # -- asyncio.base_events.BaseEventLoop -----------------------------------------------------

    def _run_once(self) -> None:
        self.turns += 1
        if self.turns > self.limit_turns:
            raise Stuck(f"{self.turns} turns of the loop at {self._now:.6f} s: something spins")
        super()._run_once()

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        self.events += 1
        return super().call_soon(callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        self.events += 1
        return super().call_at(when, callback, *args, context=context)

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
