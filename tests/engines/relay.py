"""A wire between two engines that can be slow, damaged or cut: a TCP relay in a thread of its own.

It follows the frames of kvtransport in both directions (either side may dial), so that it counts payload bytes and damages
payload alone. Headers pass as they are.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Self

from kvpool.demo.real_flipper import Flipper
from kvtransport.wire.frames import Header

READ_BYTES = 1 << 16


class Relay:
    """Relays a loopback port of its own (:attr:`port`) to ``host:port``; use as a context manager.

    ``flips``: how many DATA frames are damaged, from the first on. ``bytes_per_s``: the rate of all connections and both
    directions together; None is as fast as it goes.
    """

    def __init__(self, host: str, port: int, *, flips: int = 0, bytes_per_s: float | None = None) -> None:
        self.port = 0
        self.payload_bytes = 0
        self.flipped = 0
        self.flips = flips
        self._target = host, port
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._changed = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def wait_payload(self, at_least: int, timeout_s: float = 120.0) -> int:
        """Until so many payload bytes have passed; returns how many have."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self.payload_bytes < at_least:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{self.payload_bytes} payload bytes in {timeout_s:g} s, waited for {at_least}")
                self._changed.wait(left)
            return self.payload_bytes

    def cut(self) -> None:
        """Close every connection; new ones are relayed again."""

        async def work() -> None:
            await self._end(list(self._tasks))

        asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    async def _close(self) -> None:
        self._server.close()
        await self._end(list(self._tasks))

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _passed(self, n: int) -> None:
        with self._changed:
            self.payload_bytes += n
            self._changed.notify_all()

    def _damage(self, header: Header) -> bool:
        if self.flipped >= self.flips:
            return False
        self.flipped += 1
        return True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        writers = [near_out]
        try:
            far_in, far_out = await asyncio.open_connection(*self._target)
            writers.append(far_out)
            pumps = [
                asyncio.ensure_future(self._pump(near_in, far_out)),
                asyncio.ensure_future(self._pump(far_in, near_out)),
            ]
            try:
                # Either end closing ends both directions, as it would without a relay.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the target is gone: closing says so
        finally:
            for writer in writers:
                writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        follower = Flipper(self._damage, lambda _: None, self._passed)
        while data := await source.read(READ_BYTES):
            if self._bytes_per_s is not None:
                now = self._loop.time()
                self._free_at = max(self._free_at, now) + len(data) / self._bytes_per_s
                await asyncio.sleep(self._free_at - now)
            sink.write(follower.feed(data))
            await sink.drain()
