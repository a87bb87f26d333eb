"""The child's side of a demo: commands in, events out, one JSON object a line; and an end when the parent is gone."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from kvtransport.errors import KVError, ProtocolError

MAX_LINE_BYTES = 1 << 20


def clock() -> float:
    """Seconds on CLOCK_MONOTONIC, which on Linux is one clock for all processes; event loops use it too."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class Channel:
    """Standard input and output as a stream of JSON objects."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event."""
        sys.stdout.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        sys.stdout.flush()

    async def command(self, op: str) -> dict[str, Any]:
        """The next command, which must be ``op``. Raises ProtocolError when it is another, or there is none."""
        async for command in self.commands():
            if command.get("op") == op:
                return command
            raise ProtocolError(f"expected the command {op!r}, got {command.get('op')!r}")
        raise ProtocolError(f"expected the command {op!r}, got the end of input")

    async def commands(self) -> AsyncIterator[dict[str, Any]]:
        """Commands until the parent closes the pipe (or dies)."""
        while line := await self._reader.readline():
            yield json.loads(line)


async def _run(role: Callable[[Channel], Awaitable[None]]) -> int:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    channel = Channel(reader)
    try:
        await role(channel)
    except KVError as error:
        channel.emit("error", error=error.as_dict())
        return 1
    finally:
        transport.close()
    return 0


def serve(role: Callable[[Channel], Awaitable[None]]) -> None:
    """Run a role as this process: over uvloop where it is installed; an error of ours becomes an event and status 1."""
    try:
        import uvloop
    except ImportError:
        run: Callable[..., int] = asyncio.run
    else:
        run = uvloop.run
    sys.exit(run(_run(role)))
