"""What every worker process of kvbench does alike: follow commands, one JSON object a line, and end with its input.

So nothing is left when whoever started it dies, however it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol

from ..errors import KVError

Reply = dict[str, Any]
Say = Callable[[Reply], None]


class End(Protocol):
    """One end of a benchmark, made from its configuration inside a running event loop."""

    async def start(self, say: Say) -> None: ...
    async def round(self, command: Reply, say: Say) -> None: ...
    async def close(self) -> None: ...


def cpu_seconds() -> float:
    """User and system time of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _lines() -> AsyncGenerator[Reply, None]:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    try:
        while line := await reader.readline():
            yield json.loads(line)
    finally:
        transport.close()


async def serve(make: Callable[[Reply], End], say: Say) -> None:
    """Follow the commands of standard input to its end; the first one is the configuration.

    An error of ours is said and ends the process.
    """
    async with contextlib.aclosing(_lines()) as lines:
        config = await anext(lines, None)
        if config is None:
            return
        end: End | None = None
        # Watched from the start: whoever started this process may die while it works.
        commands: asyncio.Queue[Reply | None] = asyncio.Queue()

        async def read() -> None:
            async for command in lines:
                commands.put_nowait(command)
            commands.put_nowait(None)

        async def work() -> None:
            nonlocal end
            end = make(config)
            await end.start(say)
            while (command := await commands.get()) is not None:
                await end.round(command, say)

        reading, working = asyncio.ensure_future(read()), asyncio.ensure_future(work())
        try:
            await asyncio.wait((reading, working), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        except KVError as error:
            say({"event": "error", "error": error.as_dict()})
        finally:
            for task in (reading, working):
                task.cancel()
            await asyncio.wait((reading, working))
            if end is not None:
                await end.close()


def main(make: Callable[[Reply], End]) -> None:
    """Entry point of a worker module."""
    # Ctrl-C reaches the whole process group; the one who started us decides, and its end of our input tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing else may write between our lines.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(reply: Reply) -> None:
        # A broken pipe: nobody is there to hear it, and the end of our input ends us.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(reply) + "\n")

    _run(serve(make, say))


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)
