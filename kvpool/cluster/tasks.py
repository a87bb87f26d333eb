"""Background tasks: kept running, and ended for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

AGAIN_S = 1.0


async def keep_running(work: Callable[[], Awaitable[None]], name: str) -> None:
    """``work()`` until cancelled. It begins again, after AGAIN_S, should it fail with what it was not written to expect.

    For loops whose state is soft: a node that stopped to beat, to announce or to copy without a word would be a riddle. The event
    loop's exception handler is told each time.
    """
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            message = f"{name} failed, and begins again in {AGAIN_S:g} s"
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
        else:
            return
        await asyncio.sleep(AGAIN_S)


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` and wait until they have ended.

    Asked again while they have not: client libraries have been seen to lose a cancellation that meets a reply.
    """
    left = {t for t in tasks if not t.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=0.2)
