"""Processes that work for one benchmark: they answer in lines of JSON, are watched together, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Self

from ..errors import DeadlineError, RemoteError, error_from_dict

STOP_S = 5.0
Reply = dict[str, Any]


class Process:
    """One worker: its pipes, its last words, and its end."""

    def __init__(self, role: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.role = role
        self._stderr: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop()
        try:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=env
            )
        except OSError as error:
            self._stderr.close()
            raise RemoteError(f"cannot start the {role} process: {error.strerror or error}: {argv[0]}") from error
        self._buffer = b""
        self.inbox: list[Reply] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> BinaryIO:
        pipe = self.process.stdout
        assert pipe is not None
        return pipe  # type: ignore[return-value]  # typeshed says IO[bytes]

    def say(self, command: Mapping[str, Any] | str) -> None:
        """One line: JSON, or the text as it is. Raises RemoteError when the process has ended."""
        pipe = self.process.stdin
        assert pipe is not None
        text = command if isinstance(command, str) else json.dumps(command)
        try:
            pipe.write(text.encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise self.died() from None

    def read(self) -> list[Reply]:
        """Whole lines that are there now. Raises RemoteError when the process has ended."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            raise self.died()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def take(self, event: str) -> list[Reply]:
        """Every ``event`` that has come and was not waited for, in order."""
        found = [reply for reply in self.inbox if reply["event"] == event]
        self.inbox = [reply for reply in self.inbox if reply["event"] != event]
        return found

    def died(self) -> RemoteError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        code = self.process.returncode
        how = "closed its output" if code is None else f"exited with status {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        words = self.last_words()
        last = f"; its last words: {words[-500:]}" if words else ""
        return RemoteError(f"the {self.role} process of this benchmark {how} before it was done{last}")

    def last_words(self) -> str:
        """What it has written to standard error so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()

    def end_input(self) -> None:
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def stop(self) -> None:
        """The end of its input is the polite way; what does not follow is killed."""
        self.end_input()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stdout.close()
        self._stderr.close()


class Crew:
    """Some processes that belong together; a context manager that ends them all.

    ``progress`` is called with the bytes of every ``progress`` event. An ``error`` event of any of them is raised.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self._progress = progress
        self._workers: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self._workers)

    def start(self, role: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        """Raises RemoteError when there is no such program."""
        worker = Process(role, argv, env)
        self._workers.append(worker)
        return worker

    def stop(self, worker: Process) -> None:
        """End one of them before the others."""
        self._workers.remove(worker)
        worker.stop()

    def wait(self, worker: Process, event: str, timeout_s: float) -> Reply:
        """The next ``event`` of ``worker``; the others are watched too.

        Raises the error a worker says, RemoteError when one dies, DeadlineError when there is no answer.
        """
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for each in self._workers:
                selector.register(each.stdout, selectors.EVENT_READ, each)
            while True:
                for reply in worker.inbox:
                    if reply["event"] == event:
                        worker.inbox.remove(reply)
                        return reply
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    raise DeadlineError(f"the {worker.role} process did not answer within {timeout_s:g} s")
                for key, _ in ready:
                    for reply in key.data.read():
                        self._take(key.data, reply)

    def _take(self, worker: Process, reply: Reply) -> None:
        if reply["event"] == "error":
            raise error_from_dict(reply["error"], prefix=f"{worker.role}: ")
        if reply["event"] == "progress":
            if self._progress is not None:
                self._progress(reply["bytes"])
            return
        worker.inbox.append(reply)

    def close(self) -> None:
        """End all of them and wait. Idempotent."""
        workers, self._workers = self._workers, []
        # All inputs end before any end is waited for.
        for worker in workers:
            worker.end_input()
        for worker in workers:
            worker.stop()
