"""Links to other engines: dialled once, shared by all transfers, dialled again when they were lost."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from kvtransport.endpoint import Endpoint
from kvtransport.errors import ConnectError, DeadlineError, Fault, LimitError, TransferError
from kvtransport.link import Link

from .steps import Address

RETRY_S = 0.25
"""Pause between two attempts to reach a peer that does not answer: it may be starting."""
ATTACH = "vllm.attach"
"""The verb by which a consumer that dials asks for a transfer."""
MAX_ATTACHED = 65_536
MAX_WAIT_S = 86_400.0


class Dialled:
    """Links this side dials. Belongs to the endpoint's event loop."""

    def __init__(self, endpoint: Endpoint, *, connections: int, deadline_s: float) -> None:
        self._endpoint = endpoint
        self._connections = connections
        self._deadline_s = deadline_s
        self._links: dict[Address, asyncio.Task[Link]] = {}

    async def link(self, address: Address) -> Link:
        """The link to ``address``. Raises ConnectError when nobody answered for the deadline, or why the peer refused."""
        task = self._links.get(address)
        if task is None or (task.done() and (task.cancelled() or task.exception() or task.result().closed)):
            task = self._links[address] = asyncio.create_task(self._dial(*address))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
        # Shielded: one transfer that is given up must not take the link from the others.
        return await asyncio.shield(task)

    async def _dial(self, host: str, port: int) -> Link:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadline_s
        while True:
            try:
                return await self._endpoint.connect(host, port, connections=self._connections)
            except ConnectError:
                if loop.time() + RETRY_S >= deadline:
                    raise
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        tasks = [task for task in self._links.values() if not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class Attached:
    """Links over which consumers that dial in asked for a transfer, until the producer has use for it.

    Bounded in number and time: a consumer says how long it will wait.
    """

    def __init__(self) -> None:
        self._links: OrderedDict[bytes, tuple[Link, float]] = OrderedDict()
        self._waiting: dict[bytes, asyncio.Future[Link]] = {}

    def __len__(self) -> int:
        return len(self._links)

    def attach(self, transfer: bytes, link: Link, wait_s: float) -> None:
        """``link`` is where ``transfer`` goes, for ``wait_s``. Raises LimitError where too many wait for their producer."""
        waiting = self._waiting.pop(transfer, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(link)
            return
        now = asyncio.get_running_loop().time()
        while self._links and self._over(next(iter(self._links.values())), now):
            self._links.popitem(last=False)
        if len(self._links) >= MAX_ATTACHED:
            raise LimitError(
                f"{MAX_ATTACHED} transfers were asked for whose prefill has not begun",
                fault=Fault.LOCAL,
                retryable=True,
            )
        self._links[transfer] = (link, now + wait_s)

    @staticmethod
    def _over(entry: tuple[Link, float], now: float) -> bool:
        link, until = entry
        return link.closed or now >= until

    async def link(self, transfer: bytes, deadline_s: float) -> Link:
        """Where ``transfer`` goes; waits for its consumer. Raises DeadlineError."""
        entry = self._links.pop(transfer, None)
        if entry is not None and not self._over(entry, asyncio.get_running_loop().time()):
            return entry[0]
        if transfer in self._waiting:
            raise TransferError(
                f"transfer {transfer.hex()} is sent by two requests; every request needs its own transfer_id"
            )
        future: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._waiting[transfer] = future
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            raise DeadlineError(f"no consumer asked for transfer {transfer.hex()} within {deadline_s:g} s") from None
        finally:
            if self._waiting.get(transfer) is future:
                del self._waiting[transfer]
