"""The parent's side of a demo: starts processes, talks to them in JSON lines, ends them whatever happens.

A child of :class:`Crew` reads commands from its standard input and writes events to its standard output, one JSON
object a line (:mod:`kvpool.demo.worker` is that side). What it writes to standard error is kept, its end only, for the
message that is due when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from kvtransport.bench.environment import child_environment
from kvtransport.errors import DeadlineError, Fault, KVError, error_from_dict

T = TypeVar("T")

STOP_S = 3.0
"""Seconds from SIGTERM to SIGKILL."""
SETTLE_S = 0.3
"""When one process fails others fail in consequence, maybe sooner: this long is waited for the cause."""
TAIL_LINES = 30
MAX_LINE_BYTES = 1 << 20

# Runs before the child's own program: when this process dies without a chance to clean up, so does the child.
_GUARD = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ProcessDiedError(KVError):
    """A process of the demo ended although it was still needed."""

    code = "process_died"
    default_fault = Fault.REMOTE


class Child:
    """One process; made by :meth:`Crew.start`."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, on_event: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self.name = name
        self.process = process
        self.started_s = time.monotonic()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.reported: KVError | None = None
        self.over = False
        """All it wrote was read and it was reaped."""
        self.watcher: asyncio.Task[None] | None = None
        self._on_event = on_event
        self._inbox: dict[str, asyncio.Queue[dict[str, Any]]] = {}

    async def send(self, **command: Any) -> None:
        """Write one command; a child that is gone is reported by its watcher, not here."""
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(ConnectionError):
            pipe.write(json.dumps(command).encode() + b"\n")
            await pipe.drain()

    async def receive(self, event: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next event of that name. Raises DeadlineError when there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._queue(event).get()
        except TimeoutError:
            raise DeadlineError(
                f"{self.name} did not say {event!r} within {timeout_s:g} s", fault=Fault.REMOTE
            ) from None

    def deliver(self, event: dict[str, Any]) -> None:
        self._queue(str(event.get("event"))).put_nowait(event)
        if self._on_event is not None:
            self._on_event(event)

    def end_of_output(self) -> str:
        """What the process wrote to standard error last, for a person."""
        if not self.tail:
            return "it wrote nothing to standard error"
        return "the end of its standard error:\n" + "\n".join(f"    {line}" for line in self.tail)

    def _queue(self, event: str) -> asyncio.Queue[dict[str, Any]]:
        return self._inbox.setdefault(event, asyncio.Queue())


class Crew:
    """The processes of one demo; use as ``async with Crew() as crew``. None of them outlives it.

    Each child gets a session of its own, so that Ctrl-C on the terminal reaches this process only, and Linux kills it
    when this process dies.
    """

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._closing = False
        self._failures: list[tuple[bool, KVError]] = []
        self._settling: asyncio.TimerHandle | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failed.add_done_callback(lambda f: f.cancelled() or f.exception())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_line: Callable[[str], dict[str, Any] | None] | None = None,
    ) -> Child:
        """Start this Python with ``arguments`` (such as ``["-m", "kvpool.demo.prefill"]``).

        ``on_line`` turns a line of a program that does not speak JSON into an event.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _GUARD,
            str(os.getpid()),
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,
            env=child_environment(),
        )
        child = Child(name, process, on_event)
        self.children.append(child)
        child.watcher = asyncio.get_running_loop().create_task(self._watch(child, on_line), name=f"watch {name}")
        return child

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``; as soon as a child fails, cancel it and raise the cause instead."""
        task = asyncio.get_running_loop().create_task(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and self._settling is not None and not self._failed.done():
                await asyncio.wait({self._failed})
            if self._failed.done():
                await asyncio.shield(self._failed)
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """End all children: SIGTERM, after STOP_S (or when cancelled meanwhile) SIGKILL. Idempotent."""
        self._closing = True
        if self._settling is not None:
            self._settling.cancel()
        watchers = [c.watcher for c in self.children if c.watcher is not None]
        self._signal(signal.SIGTERM)
        try:
            if watchers:
                await asyncio.wait(watchers, timeout=STOP_S)
        finally:
            self._signal(signal.SIGKILL)
            if watchers:
                await asyncio.wait(watchers)

    def _signal(self, number: signal.Signals) -> None:
        for child in self.children:
            if child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(number)

    # -- watching --------------------------------------------------------------------------------

    async def _watch(self, child: Child, on_line: Callable[[str], dict[str, Any] | None] | None) -> None:
        errors = asyncio.get_running_loop().create_task(self._keep_tail(child))
        assert child.process.stdout is not None
        async for line in _lines(child.process.stdout):
            event = on_line(line) if on_line is not None else _event(line)
            if event is None:
                child.tail.append(line)
            elif event.get("event") == "error":
                child.reported = error_from_dict(event.get("error", {}), prefix=f"{child.name}: ")
                self._fail(child.reported, cause=False)
            else:
                child.deliver(event)
        status = await child.process.wait()
        # A grandchild may hold the pipe open.
        await asyncio.wait({errors}, timeout=0.5)
        errors.cancel()
        await asyncio.gather(errors, return_exceptions=True)
        child.over = True
        if child.reported is None and not self._closing:
            age = time.monotonic() - child.started_s
            self._fail(
                ProcessDiedError(
                    f"{child.name} (process {child.process.pid}) {_ending(status)} after {age:.1f} s, in the middle of its "
                    f"work; {child.end_of_output()}"
                ),
                cause=True,
            )

    @staticmethod
    async def _keep_tail(child: Child) -> None:
        assert child.process.stderr is not None
        async for line in _lines(child.process.stderr):
            child.tail.append(line)

    def _fail(self, error: KVError, *, cause: bool) -> None:
        """``cause``: the process died by itself; what others report meanwhile follows from that."""
        if self._closing:
            return
        self._failures.append((cause, error))
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self._settle)

    def _settle(self) -> None:
        if not self._failed.done():
            deaths = [error for cause, error in self._failures if cause]
            self._failed.set_exception(deaths[0] if deaths else self._failures[0][1])


def supervise(work: Callable[[Crew], Coroutine[Any, Any, T]]) -> T:
    """Run ``work`` with a crew of its own to its end, and the crew's with it; the way into this module for a command.

    SIGINT and SIGTERM end everything in order, a second one at once; then KeyboardInterrupt or SystemExit is raised.
    Raises what ``work`` raises, ProcessDiedError when a child ends early, and what a child reports as its error.
    """
    received: list[signal.Signals] = []

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupted(number: signal.Signals) -> None:
            received.append(number)
            task.cancel()

        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, interrupted, number)
        try:
            async with Crew() as crew:
                return await crew.run(work(crew))
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if signal.SIGINT in received:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + signal.SIGTERM) from None


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue  # longer than MAX_LINE_BYTES: dropped
        if not line:
            return
        yield line.decode(errors="replace").rstrip()


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
