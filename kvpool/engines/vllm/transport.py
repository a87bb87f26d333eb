"""All transfers of one worker, on the event loop of kvtransport's background thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtransport.endpoint import Endpoint
from kvtransport.errors import Fault, KVError, ProtocolError
from kvtransport.link import Link
from kvtransport.manifest import Manifest

from .config import ConnectorConfig
from .debug import DebugLog, RunningHashes, transfer_record
from .incoming import Incoming, Memory, refuse
from .metrics import Recorder
from .outgoing import Outgoing, ReadyUnit
from .peers import ATTACH, MAX_WAIT_S, Attached, Dialled
from .steps import Address, EndSend, ReceiveJob, Refusal, SendStep

logger = logging.getLogger("vllm.kvtransport")


class Results:
    """What the engine has to be told, each thing once. Written on the loop, taken by the engine's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: set[str] = set()
        self._finished: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()

    def freed(self, request: str) -> None:
        """Nothing of this sending request's blocks is read any more."""
        with self._lock:
            self._free.add(request)

    def received(self, request: str, *, failed: bool) -> None:
        """Nothing writes to this request's blocks any more."""
        with self._lock:
            self._received.add(request)
            if failed:
                self._failed.add(request)

    def take(self, finished: set[str], sending: set[str]) -> tuple[set[str], set[str], set[str]]:
        """(sent, received, failed) since the last call. vLLM may only be told of sent requests that it said are ``finished``;
        of those, ``sending`` are ours."""
        with self._lock:
            self._finished |= finished & sending
            sent = self._free & self._finished
            self._free -= sent
            self._finished -= sent
            received, self._received = self._received, set()
            failed, self._failed = self._failed, set()
        return sent, received, failed


class Transport:
    """Belongs to its event loop; ``start`` and everything else except ``results`` and ``recorder`` run there."""

    def __init__(self, config: ConnectorConfig, memory: Memory, *, name: str, rank: int, listen_offset: int) -> None:
        """``rank``: tensor parallel; ``listen_offset``: from ``listen_port`` to the port of this worker."""
        self._config = config
        self._memory = memory
        self._name = name
        self._rank = rank
        self._listen_offset = listen_offset
        self.results = Results()
        self.recorder = Recorder()
        self._outgoing: dict[str, Outgoing] = {}
        self._incoming: dict[str, Incoming] = {}
        self._telling: set[Outgoing] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._attached = Attached()
        self._debug = (
            None if config.debug_dir is None else DebugLog(Path(config.debug_dir), rank, hashes=config.debug_hashes)
        )
        self._traces: dict[str, _Trace] = {}
        self.listening: Address | None = None

    async def start(self, *, listen: bool) -> None:
        """Listen, where this side is the one that listens. Raises ConfigError, InsecureBindError."""
        self._endpoint = Endpoint(self._config.endpoint(self._name))
        self._endpoint.handlers[ATTACH] = self._on_attach
        self._dialled = Dialled(
            self._endpoint, connections=self._config.connections, deadline_s=self._config.connect_deadline_s
        )
        try:
            if listen:
                port = self._config.require_port() + self._listen_offset
                self.listening = await self._endpoint.listen(self._config.listen_host, port)
        except BaseException:
            await self._endpoint.close()
            raise

    async def close(self) -> None:
        """End everything; when this returns no engine memory is touched again."""
        for incoming in list(self._incoming.values()):
            incoming.abort("the engine is shutting down")
        outgoing = [*self._outgoing.values(), *self._telling]
        for out in outgoing:
            out.cancel_task()
        for task in self._background:
            task.cancel()
        waits = [*(i.settled() for i in self._incoming.values()), *(o.settled() for o in outgoing)]
        await asyncio.gather(*waits)
        if self._background:
            await asyncio.wait(self._background)
        await self._dialled.close()
        await self._endpoint.close()

    # -- sending -------------------------------------------------------------------------------

    def open(self, send: SendStep) -> None:
        """The first step of a request that is sent."""
        request = send.request
        if request in self._outgoing:
            return
        trace = None if self._debug is None else _Trace()
        out = self._make_outgoing(send.transfer, send.address, send.boundary, request, trace)
        if out is None:
            self.results.freed(request)
            return
        self._outgoing[request] = out
        if trace is not None:
            self._traces[request] = trace

    def hand_over(self, units: Mapping[str, list[ReadyUnit]], computed_s: float) -> None:
        """Layers that were just computed, by request."""
        for request, ready in units.items():
            out = self._outgoing.get(request)
            if out is None:
                for unit in ready:
                    if unit.drop is not None:
                        unit.drop()
                continue
            if (trace := self._traces.get(request)) is not None:
                trace.computed.update((unit.layer, computed_s) for unit in ready)
            out.hand_over(ready)

    def step_done(self, requests: Mapping[str, bool], begin_s: float, end_s: float) -> None:
        """The end of a step; ``requests`` that took part, and whether everything of theirs was handed over."""
        for request, final in requests.items():
            if (trace := self._traces.get(request)) is not None:
                trace.steps.append({"begin_s": begin_s, "end_s": end_s})
            if final and (out := self._outgoing.get(request)) is not None:
                out.complete()

    def end_send(self, end: EndSend) -> None:
        """A request that ends before it was computed completely: tell its consumer."""
        if end.request is not None:
            if (out := self._outgoing.get(end.request)) is not None:
                out.abort(end.reason)
            return
        told = self._make_outgoing(end.transfer, end.address, end.boundary, "", None)
        if told is not None:
            self._telling.add(told)
            told.abort(end.reason)

    def give_up(self, request: str, reason: str) -> None:
        """This side cannot go on with it."""
        logger.warning("the cache of request %s is not sent: %s", request, reason)
        if (out := self._outgoing.get(request)) is not None:
            out.abort(reason)

    async def evacuate(self, requests: list[str]) -> None:
        """When this returns, no block of these requests is read any more."""
        outgoing = [out for request in requests if (out := self._outgoing.get(request)) is not None]
        await asyncio.gather(*(out.evacuate() for out in outgoing))

    def _make_outgoing(
        self, transfer: bytes, address: Address | None, boundary: int, request: str, trace: _Trace | None
    ) -> Outgoing | None:
        deadline_s = self._config.send_deadline_s

        async def reach() -> Link:
            if address is None:
                return await self._attached.link(transfer, deadline_s)
            return await self._dialled.link((address[0], address[1] + self._rank))

        def free() -> None:
            if request:
                self.results.freed(request)

        def end(out: Outgoing) -> None:
            self._sent(request, out)

        try:
            manifest = Manifest.of_layout(
                self._memory.geometry.layout,
                boundary,
                transfer=transfer,
                meta={"engine": dict(self._memory.geometry.identity)},
            )
            return Outgoing(
                manifest,
                reach,
                deadline_s,
                free,
                end,
                None if trace is None or self._debug is None or not self._debug.hashes else trace.hash,
            )
        except KVError as error:
            logger.error("transfer %s cannot be sent: %s", transfer.hex(), error)
            return None

    def _sent(self, request: str, out: Outgoing) -> None:
        self._telling.discard(out)
        trace = self._traces.pop(request, None)
        if not request:
            return
        self._outgoing.pop(request, None)
        self.recorder.sent(out.stats, failed=out.error is not None, cancelled=out.cancelled)
        if out.error is not None and not out.cancelled:
            logger.warning("the cache of request %s was not sent: %s: %s", request, out.error.code, out.error)
        if self._debug is not None and trace is not None:
            transfer = out.manifest.transfer
            if out.error is None and self._debug.hashes:
                self._debug.hash("producer", request, transfer, self._memory.geometry, trace.hashes.digests())
            record = transfer_record(
                request,
                transfer,
                out.manifest.boundary,
                out.stats,
                out.error,
                self._memory.geometry,
                cancelled=out.cancelled,
                ended_s=asyncio.get_running_loop().time(),
                computed_s=trace.computed,
                steps=trace.steps,
            )
            self._debug.write("transfers", "producer", record)

    async def _on_attach(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        transfer = args.get("transfer")
        if not isinstance(transfer, bytes) or len(transfer) != 16:
            raise ProtocolError(f"{ATTACH} needs transfer: 16 bytes")
        wait_s = args.get("wait_s")
        if not isinstance(wait_s, int | float) or not 0 < wait_s <= MAX_WAIT_S:
            raise ProtocolError(f"{ATTACH} needs wait_s: seconds, above 0 and at most {MAX_WAIT_S:g}")
        self._attached.attach(transfer, link, wait_s)
        return {}

    # -- receiving -----------------------------------------------------------------------------

    def receive(self, job: ReceiveJob) -> None:
        """Expect a request's cache from now on."""
        started_s = asyncio.get_running_loop().time()
        self._incoming[job.request] = Incoming(
            job,
            self._memory,
            self._endpoint,
            self._config.window_bytes,
            self._config.receive_deadline_s,
            lambda incoming: self._received(incoming, started_s),
            None if job.address is None else lambda: self._ask(job.transfer, job.address),
            self._config.debug_drop_state,
        )

    def cancel(self, request: str) -> None:
        """The engine does not need it any more; it is told once nothing writes to its blocks."""
        if (incoming := self._incoming.get(request)) is not None:
            incoming.abort("the request was aborted on decode")

    def refuse(self, refusal: Refusal) -> None:
        """Turn a transfer down when its producer opens it, so that it does not wait for its deadline."""
        try:
            refuse(self._endpoint, refusal.transfer, refusal.reason, self._config.receive_deadline_s)
        except KVError as error:
            logger.warning("transfer %s could not be refused: %s", refusal.transfer.hex(), error)
            return
        if refusal.address is not None:
            # The producer waits for this side to dial.
            task = asyncio.get_running_loop().create_task(self._tell(refusal))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _tell(self, refusal: Refusal) -> None:
        try:
            await self._ask(refusal.transfer, refusal.address)
        except KVError as error:
            logger.info("the producer of transfer %s was not told: %s", refusal.transfer.hex(), error)

    async def _ask(self, transfer: bytes, address: Address | None) -> Link:
        if address is None:
            raise ProtocolError("this side does not know where the producer listens", fault=Fault.LOCAL)
        link = await self._dialled.link((address[0], address[1] + self._rank))
        wait_s = self._config.receive_deadline_s
        await link.call(ATTACH, {"transfer": transfer, "wait_s": wait_s}, timeout_s=wait_s)
        return link

    def _received(self, incoming: Incoming, started_s: float) -> None:
        job, error, now = incoming.job, incoming.error, asyncio.get_running_loop().time()
        self._incoming.pop(job.request, None)
        self.recorder.received(
            incoming.stats,
            failed=error is not None,
            cancelled=incoming.cancelled,
            waited_s=now - started_s,
            resident_bytes=incoming.resident_bytes,
        )
        if error is not None and not incoming.cancelled:
            logger.warning("the cache of request %s did not come: %s: %s", job.request, error.code, error)
        if self._debug is not None:
            geometry = self._memory.geometry
            if error is None and self._debug.hashes:
                digests = {slot: (pages.hash(), pages.nbytes) for slot, pages in incoming.pages.items()}
                self._debug.hash("consumer", job.request, job.transfer, geometry, digests)
            record = transfer_record(
                job.request,
                job.transfer,
                job.boundary,
                incoming.stats,
                error,
                geometry,
                cancelled=incoming.cancelled,
                ended_s=now,
            )
            self._debug.write("transfers", "consumer", record)
        if incoming.never_came:
            # Its producer may still be computing: it should not keep blocks for what nobody waits for any more.
            address = None if incoming.attached else job.address
            self.refuse(Refusal(job.transfer, address, "the request does not wait for it any more on decode"))
        self.results.received(job.request, failed=error is not None)


class _Trace:
    """What debugging remembers of one sending request."""

    def __init__(self) -> None:
        self.computed: dict[int, float] = {}
        self.steps: list[dict[str, float]] = []
        self.hashes = RunningHashes()

    def hash(self, unit: ReadyUnit) -> None:
        self.hashes.add(unit.layer, unit.tensor, unit.pages)
