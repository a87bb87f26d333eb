"""Readers that came before their request's put began."""

from __future__ import annotations

import asyncio

from kvtransport.errors import DeadlineError, KVError

from .core import PoolCore
from .errors import PoolLimitError

MAX_WAITING_READERS = 4_096


class Waiting:
    """A bounded table of waiting readers over one core. Belongs to one event loop."""

    def __init__(self, core: PoolCore) -> None:
        self._futures: dict[tuple[str, bytes], list[asyncio.Future[None]]] = {}
        self._count = 0
        core.on_request = self._begun

    async def for_request(self, tenant: str, request: bytes, seconds: float) -> None:
        """Until a put with ``request`` begins; DeadlineError when none does, PoolLimitError when too many wait."""
        if self._count >= MAX_WAITING_READERS:
            raise PoolLimitError(f"{MAX_WAITING_READERS} readers wait for their puts to begin, the limit")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._futures.setdefault((tenant, request), [])
        waiting.append(future)
        self._count += 1
        try:
            async with asyncio.timeout(seconds):  # not wait_for, which in Python 3.11 may swallow a cancellation
                await future
        except TimeoutError:
            raise DeadlineError(f"no put of request {request.hex()} began within {seconds:.1f} s") from None
        finally:
            self._count -= 1
            waiting.remove(future)
            if not waiting:
                self._futures.pop((tenant, request), None)

    def fail(self, error: KVError) -> None:
        """End every wait."""
        for waiting in self._futures.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(error)

    def _begun(self, tenant: str, request: bytes) -> None:
        for future in self._futures.get((tenant, request), ()):
            if not future.done():
                future.set_result(None)
