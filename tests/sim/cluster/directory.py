"""The directory as a process far away: it takes time, can be unreachable from some, lose everything, and apply late what was given up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

from kvpool.cluster.directory import EmbeddedDirectory
from kvpool.cluster.members import Member, Snapshot
from kvpool.errors import DirectoryError

PATIENCE_S = 0.4


class Store(EmbeddedDirectory):
    """The one that all share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        super().__init__(loop.time, rng.randbytes(8))
        self.loop, self.rng = loop, rng
        self.down = False
        self.cut_off: set[str] = set()
        """Processes that cannot reach it."""
        self.late = 0.0
        """Part of the announcements that arrive after their sender has given them up."""
        self.lost_at = float("-inf")
        self.stopped: dict[str, asyncio.Event] = {}
        """Processes that are stopped (SIGSTOP): they take no answer until the event."""
        self.confirmed: dict[str, float] = {}
        """When the members were asked for that a process goes by."""

    def lose_everything(self) -> None:
        self.lost_at = self.loop.time()
        self.flush(self.rng.randbytes(8))


class SimDirectory:
    """One process's way to the store; see :class:`kvpool.cluster.directory.Directory`."""

    def __init__(self, store: Store, process: str) -> None:
        self._store, self._process = store, process

    async def _awake(self) -> None:
        event = self._store.stopped.get(self._process)
        if event is not None:
            await event.wait()

    async def _travel(self) -> None:
        store = self._store
        await self._awake()
        if store.down or self._process in store.cut_off:
            await asyncio.sleep(PATIENCE_S)
            raise DirectoryError("nobody answers")
        await asyncio.sleep(store.rng.choice((0.0005, 0.002, 0.01)))

    async def beat(self, member: Member, ttl_s: float) -> bytes:
        await self._travel()
        return await self._store.beat(member, ttl_s)

    async def leave(self, member: Member) -> None:
        await self._travel()
        await self._store.leave(member)

    async def snapshot(self) -> Snapshot:
        asked = self._store.loop.time()
        await self._travel()
        found = await self._store.snapshot()
        await self._awake()  # the answer has lain in the socket meanwhile
        self._store.confirmed[self._process] = asked
        return found

    async def announce(self, node: str, changes: Mapping[bytes, bytes | None], ttl_s: float) -> None:
        await self._travel()
        store = self._store
        if store.rng.random() < store.late:
            copy: dict[bytes, Any] = dict(changes)

            async def apply() -> None:
                await asyncio.sleep(PATIENCE_S + 3 * store.rng.random())
                await store.announce(node, copy, ttl_s)

            task = store.loop.create_task(apply())
            task.set_name("late announcement")
            await asyncio.sleep(PATIENCE_S)
            raise DirectoryError("no answer in time")
        await store.announce(node, changes, ttl_s)

    async def look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        await self._travel()
        return await self._store.look(keys)

    async def close(self) -> None:
        return None
