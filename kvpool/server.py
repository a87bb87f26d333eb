"""The pool behind an endpoint: verbs in, transfers in and out (``serving/``).

A put is a transfer the daemon *receives* straight into the blocks it allocated, a get is one it *sends* straight from
them; a get of a request whose put is still arriving relays every range as soon as it is verified.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from kvtransport.endpoint import Endpoint
from kvtransport.errors import KVError
from kvtransport.link import Link

from .core import PoolCore
from .keys import KeyChain, Namespace
from .messages import Args
from .metrics import Metrics
from .serving.lookups import Lookups
from .serving.moving import Moving
from .serving.objects import Objects
from .serving.prefixes import Prefixes
from .serving.sessions import Session, Sessions, Verb
from .steps import Background

TICK_S = 0.1
"""How often deadlines are looked at."""


class PoolServer:
    """Serves ``core`` on ``endpoint``. Belongs to the endpoint's event loop.

    ``explain_tenants``: explanations may say that another tenant has the same tokens.
    """

    def __init__(
        self, endpoint: Endpoint, core: PoolCore, *, window_bytes: int = 64 << 20, explain_tenants: bool = False
    ) -> None:
        self.core = core
        self.metrics: Metrics | None = None
        """Told of calls and transfers when set."""
        self.on_read: Callable[[Namespace, KeyChain, int], None] | None = None
        """Told of (namespace, chain, boundary) of every get when set."""
        self.on_tick: Callable[[], object] | None = None
        """Called every TICK_S seconds when set."""
        self._endpoint = endpoint
        self._sessions = Sessions(core)
        self._moving = Moving(endpoint, window_bytes=window_bytes, moved=self._moved)
        self.lookups = Lookups(core, explain_tenants=explain_tenants)
        verbs: dict[str, Verb] = {
            **self.lookups.verbs,
            **Prefixes(core, self._moving, self._sessions, self._read).verbs,
            **Objects(core, self._moving, self._sessions).verbs,
            "stat": self._stat,
        }
        for name, verb in verbs.items():
            endpoint.handlers[name] = self._handler(name, verb)
        self._learning = Background(core.policy.work)
        core.on_work = self._learning.start
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    # -- life ----------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Puts and gets in progress."""
        return self._moving.active

    @property
    def sending_bytes(self) -> int:
        """Of gets in progress."""
        return self._moving.sending_bytes

    @property
    def only_tenant(self) -> str | None:
        """Whom alone it serves, when set: one whose clients may map the memory."""
        return self._sessions.only_tenant

    @only_tenant.setter
    def only_tenant(self, tenant: str | None) -> None:
        self._sessions.only_tenant = tenant

    async def drain(self, grace_s: float) -> bool:
        """Take no new puts and gets and wait for those in progress; whether all finished within ``grace_s``."""
        return await self._moving.drain(grace_s)

    async def close(self) -> None:
        """Stop at once; what is in progress fails."""
        self._learning.stop()
        self.core.on_work = None
        self._ticker.cancel()
        await self._moving.close()
        await asyncio.wait([self._ticker])

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.core.expire()
            if self.on_tick is not None:
                self.on_tick()

    # -- calls ---------------------------------------------------------------------------------

    def _handler(self, name: str, verb: Verb) -> Callable[[Link, dict[str, Any]], Awaitable[dict[str, Any]]]:
        async def handle(link: Link, args: dict[str, Any]) -> dict[str, Any]:
            if self.metrics is None:
                return await verb(self._sessions.of(link), Args(name, args))
            start, outcome = time.perf_counter(), "cancelled"
            try:
                answer = await verb(self._sessions.of(link), Args(name, args))
                outcome = "ok"
                return answer
            except KVError as error:
                outcome = type(error).__name__
                raise
            finally:
                self.metrics.called(name, time.perf_counter() - start, outcome)

        return handle

    def _moved(self, kind: str, seconds: float, error: KVError | None) -> None:
        if self.metrics is not None:
            self.metrics.moved(kind, seconds, "ok" if error is None else type(error).__name__)

    def _read(self, ns: Namespace, chain: KeyChain, boundary: int) -> None:
        if self.on_read is not None:
            self.on_read(ns, chain, boundary)

    # -- the whole -----------------------------------------------------------------------------

    async def _stat(self, session: Session, args: Args) -> dict[str, Any]:
        return self.stat()

    def stat(self) -> dict[str, Any]:
        """:meth:`kvpool.core.PoolCore.stat`, and what is on the wire."""
        return {
            **self.core.stat(),
            "links": len(self._endpoint.links),
            "transfers": self.active,
            "wire": {**self._moving.wire, "yielded_pieces": self._moving.yielded},
        }
