"""One seed: two processes, a link, a few transfers, faults, and what must hold whatever happens.

The protocol, link, sender, receiver and endpoint that run here are the real ones; only loop and network are not.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.engine.incoming import PythonIncoming
from kvtransport.engine.python import PythonLanes
from kvtransport.errors import Fault, KVError, ProtocolError, RefusedError
from kvtransport.flow.spilling import SpillPolicy, WhenFull
from kvtransport.link import Link
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation, Receiver
from kvtransport.sender import Sender
from kvtransport.spill import PAGE_BYTES
from kvtransport.units import Unit
from kvtransport.wire.frames import HEADER_BYTES, FrameType, unpack_header

from .faults import inject
from .loop import Stuck, VirtualLoop
from .network import SimNetwork, SimStream
from .plan import JobPlan, Plan, make_plan

_COPY = PageList.copy_from

POISON = 0xEE
ADVERTISED = {"right": "d:7001", "nobody": "d:7002", "hole": "d:7003"}
RECONNECT_S = 6.0
CALL_S = 3.0
SLACK_S = 1.0
"""Past its deadline a call may take this long: copies in progress are waited for."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(eq=False)
class Process:
    """One incarnation of one process."""

    name: str
    endpoint: Endpoint
    dead: bool = False
    links: list[Link] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where its connections come from, for whoever accepts them."""
        return f"{self.name.lower()}:1"

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Job:
    """One transfer, and what is known to be true of its memory."""

    number: int
    plan: JobPlan
    manifest: Manifest
    truth: dict[tuple[int, int], bytes]
    source: dict[tuple[int, int], PageList]
    target: dict[tuple[int, int], PageList]
    producer: Process
    consumer: Process
    sender: Sender | None = None
    receiver: Receiver | None = None
    units: list[tuple[tuple[int, int], Unit]] = field(default_factory=list)
    source_over: bool = False
    target_over: bool = False
    left: dict[tuple[int, int], bytes] | None = None
    """What the destination held when the transfer ended there."""
    sent: KVError | str | None = None
    got: KVError | str | None = None

    @property
    def settled(self) -> bool:
        return self.sent is not None and self.got is not None


class World:
    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.plan: Plan = make_plan(seed, self.rng)
        self.trace = trace
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.loop = VirtualLoop()
        self.network = SimNetwork(self.loop, self.rng, self.plan.path)
        self.network.log = self.log
        self.network.on_source_read = self._source_read
        self.network.on_target_write = self._target_write
        if trace:
            self.network.on_send = self._trace_send
        self.loop.submit = self._submit
        self.loop.set_exception_handler(self._unhandled)
        self.jobs: list[Job] = []
        self.processes: list[Process] = []
        self.dialler: Process
        self.acceptor: Process
        self.cancels: list[asyncio.Task[None]] = []
        self.injected: list[str] = []
        """The faults that were put in, in order."""
        self.calls = {"answered": 0, "failed": 0}
        self.addresses = Counter[str]()
        """What was said of the address that is advertised, link by link."""
        self._sources: dict[int, tuple[Job, tuple[int, int]]] = {}
        self._targets: dict[int, tuple[Job, tuple[int, int]]] = {}

    # -- saying ----------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        if self.trace:
            self.lines.append(f"{self.loop.time():10.6f}  {text}")

    def violate(self, text: str) -> None:
        self.log(f"VIOLATION {text}")
        self.violations.append(f"{text} (at {self.loop.time():.6f} s)")

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.violate(f"unhandled: {context.get('message')}: {context.get('exception')!r}")

    def _trace_send(self, stream: SimStream, head: bytes, start: int, n: int) -> None:
        if start:
            return
        at = 0
        while at + HEADER_BYTES <= len(head):
            header = unpack_header(head[at : at + HEADER_BYTES])
            what = f"{header.layer}/{header.tensor}@{header.offset}+{header.length} #{header.sequence}"
            detail = what if header.type is FrameType.DATA else str(header.offset or "")
            self.log(f"{stream.name}: {header.type.name} {header.transfer.hex()[:4]} {detail}")
            at += HEADER_BYTES + (header.length if header.type is not FrameType.DATA else 0)

    # -- guards ------------------------------------------------------------------------------------

    def _source_read(self, stream: SimStream, part: PageList) -> None:
        found = self._sources.get(id(part.base))
        if found is not None:
            for offset, n in part.pieces.tolist():
                self._check_source(*found, offset, offset + n, f"sent on {stream.name}")

    def _check_source(self, job: Job, slot: tuple[int, int], start: int, stop: int, how: str) -> None:
        freed = job.source_over or any(
            u.done for s, u in job.units if s == slot and u.start < stop and start < u.stop and u.done
        )
        if freed:
            self.violate(f"job {job.number}: source {slot} {start}..{stop} was {how} after it was given back")

    def _target_write(self, stream: SimStream, part: PageList) -> None:
        found = self._targets.get(id(part.base))
        if found is None:
            return
        job, slot = found
        receiver = job.receiver
        for offset, n in part.pieces.tolist():
            if job.target_over or receiver is None:
                self.violate(f"job {job.number}: {slot} {offset}..{offset + n} was written after the end")
                return
            assert isinstance(receiver._into, PythonIncoming)
            if not any(
                connection.stream is stream
                and (claim.layer, claim.tensor) == slot
                and claim.start <= offset
                and offset + n <= claim.stop
                for connection, claim in receiver._into._claims.items()
            ):
                self.violate(f"job {job.number}: {slot} {offset}..{offset + n} was written outside a live claim")

    def _copied(self, target: PageList, source: PageList) -> None:
        """A transfer that travels in its OPEN: out of the producer's memory, into the consumer's."""
        if (read := self._sources.get(id(source.base))) is not None:
            for offset, n in source.pieces.tolist():
                self._check_source(*read, offset, offset + n, "copied into an OPEN")
        if (found := self._targets.get(id(target.base))) is not None:
            job, slot = found
            into = job.receiver  # None: what waited is taken while it is being expected
            if job.target_over or (into is not None and (into.error is not None or into._into is not None)):
                self.violate(f"job {job.number}: {slot} was written out of an OPEN after the end, or beside what is received")
        _COPY(target, source)

    def _submit(self, run: Any, args: tuple[Any, ...]) -> None:
        def execute() -> None:
            read = None
            if len(args) == 4:
                read, how = (args[2], args[3]), "copied aside"
            elif args and isinstance(args[0], PageList):
                read, how = (args[0].base, args[0].pieces), "coded"
            found = None if read is None else self._sources.get(id(read[0]))
            if read is not None and found is not None:
                for offset, n in read[1].tolist():
                    self._check_source(*found, offset, offset + n, how)
            run()

        self.loop.call_later(self.rng.random() * self.plan.executor_s, execute)

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation naming everything that did not hold."""
        asyncio.set_event_loop(None)
        try:
            try:
                with mock.patch.object(PageList, "copy_from", lambda to, source: self._copied(to, source)):
                    self.loop.run_until_complete(self._main())
            except Stuck as stuck:
                self.violate(f"stuck: {stuck}")
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.close()
        if self.violations:
            raise Violation(f"seed {self.seed} ({self.plan.profile}): " + "; ".join(self.violations[:5]))

    def start_process(self, name: str) -> Process:
        plan = self.plan
        config = EndpointConfig(
            name=name,
            keepalive_s=0.5,
            dead_after_s=2.0,
            handshake_timeout_s=1.0,
            reconnect_s=RECONNECT_S,
            coding="always" if plan.codec else "auto",
            codecs=(plan.codec,) if plan.codec else (),
            advertise=ADVERTISED[plan.advertise] if plan.advertise and name == "D" else "",
            whole_bytes=plan.whole_bytes,
            spill=SpillPolicy(
                budget_bytes=plan.spill_pages * PAGE_BYTES,
                when_full=WhenFull.FAIL if plan.spill_fails else WhenFull.WAIT,
            ),
        )
        process = Process(name, None)  # type: ignore[arg-type]
        process.endpoint = Endpoint(config, network=self.network.of(process), entropy=self.rng.randbytes)
        if name == "A":  # to the other one come only those that try its address
            process.endpoint.on_link = process.links.append
        process.endpoint.on_unreachable = lambda link, error: self.log(f"{name} is told: {error}")
        process.endpoint.handlers["echo"] = self._echo
        self.processes.append(process)
        return process

    async def _echo(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(self.rng.random() * 0.01)
        return args

    async def _main(self) -> None:
        self.acceptor = self.start_process("A")
        self.dialler = self.start_process("D")
        await self.acceptor.endpoint.listen("a", 7000)
        await self.listen_too(self.dialler)
        early = not self.plan.must_seal and self.rng.random() < 0.2
        faults = self.loop.create_task(inject(self)) if early else None
        link = await self.connect(self.dialler)
        if link is None and not early:
            self.violate("the first dial failed without a fault")
        faults = faults or self.loop.create_task(inject(self))
        work = []
        for number, plan in enumerate(self.plan.jobs):
            job = self.make_job(number, plan)
            work += [self.loop.create_task(self._produce(job)), self.loop.create_task(self._consume(job))]
        work.append(self.loop.create_task(self._call(self.plan.calls)))
        await asyncio.wait([*work, faults])
        if self.cancels:
            await asyncio.wait(self.cancels)
        for task in [*work, faults, *self.cancels]:
            if task.exception() is not None:
                self.violate(f"the scenario failed: {task.exception()!r}")
        self._judge_jobs()
        await self._judge_address(link)
        await self._as_good_as_new()
        await self._end()

    async def listen_too(self, process: Process) -> None:
        """Where the address that is advertised says, or somewhere else."""
        if self.plan.advertise:
            self.network.holes = {("d", 7003)}
            await process.endpoint.listen("d", 7001)

    async def _judge_address(self, first: Link | None) -> None:
        """Never a false word: what is not there is never reached, what is there always unless a fault came between."""
        word = self.plan.advertise
        if not word:
            return
        if first is not None and not self.plan.faults:
            try:
                if not await first.reachable(5.0):
                    self.violate(f"nothing was said of an address ({word})")
            except KVError as error:
                self.log(f"address: {error}")
        for process in self.processes:
            for link in process.links:
                error = link.advertised.error
                self.addresses["unreached" if error is not None else "reached" if link.advertised.known else "not said"] += 1
                if error is not None and (ADVERTISED[word] not in str(error) or (word == "right" and not self.plan.faults)):
                    self.violate(f"an address ({word}) is said not to be reached: {error}")
                if error is None and link.advertised.known and word != "right":
                    self.violate(f"an address ({word}) is said to be reached")

    async def connect(self, process: Process) -> Link | None:
        try:
            link = await process.endpoint.connect("a", 7000, connections=self.plan.connections)
        except KVError as error:
            self.log(f"dial failed: {error}")
            return None
        process.links.append(link)
        return link

    def _content(self, nbytes: int) -> bytes:
        """What nobody can guess; with a codec, as caches have it: the upper byte of most elements is alike."""
        data = bytearray(self.rng.randbytes(nbytes))
        if self.plan.codec:
            for at in range(1, nbytes, 2):
                data[at] = 0x3F if data[at] < 224 else 0x3E
        return bytes(data)

    def make_job(self, number: int, plan: JobPlan) -> Job:
        manifest = Manifest.of_objects(plan.sizes, transfer=self.rng.randbytes(16))
        truth = {slot: self._content(e.nbytes) for slot, e in manifest.by_slot.items()}
        source = {slot: PageList.of(np.frombuffer(bytearray(b), np.uint8)) for slot, b in truth.items()}
        target = {slot: PageList.of(np.zeros(len(b), np.uint8)) for slot, b in truth.items()}
        producer, consumer = (self.dialler, self.acceptor) if plan.from_dialler else (self.acceptor, self.dialler)
        job = Job(number, plan, manifest, truth, source, target, producer, consumer)
        self.jobs.append(job)
        for slot in truth:
            self._sources[id(source[slot].base)] = (job, slot)
            self._targets[id(target[slot].base)] = (job, slot)
        return job

    # -- the producer --------------------------------------------------------------------------------

    async def _produce(self, job: Job) -> None:
        plan = job.plan
        try:
            await asyncio.sleep(plan.open_after_s)
            links = job.producer.links
            if not links:
                job.sent = "no link"
                return
            job.sender = links[-1].open(
                job.manifest, deadline_s=plan.deadline_s, chunk_bytes=plan.chunk_bytes, checksum=plan.checksum
            )
            if plan.cancel_after_s is not None and plan.cancel_by == "producer":
                self.cancels.append(self.loop.create_task(self._cancel_sender(job)))
            sealing = self.loop.create_task(self._hand_over_and_seal(job))
            try:
                await asyncio.wait_for(sealing, plan.deadline_s + SLACK_S)
            except TimeoutError:
                self.violate(f"job {job.number}: the producer hangs past its deadline")
                job.sent = "hang"
                return
            job.sent = "sealed"
        except KVError as error:
            job.sent = error
            self.log(f"job {job.number}: producer: {error.code}: {error}")
        finally:
            await self._sources_come_back(job)

    async def _hand_over_and_seal(self, job: Job) -> None:
        assert job.sender is not None
        pieces: list[tuple[tuple[int, int], int, int]] = []
        for slot, data in job.truth.items():
            cuts = sorted({0, len(data), *(self.rng.randint(0, len(data)) for _ in range(self.rng.choice((0, 0, 2))))})
            pieces += [(slot, a, b) for a, b in itertools.pairwise(cuts)]
        self.rng.shuffle(pieces)
        for slot, start, stop in pieces:
            if job.plan.hand_over_pause_s:
                await asyncio.sleep(self.rng.random() * job.plan.hand_over_pause_s)
            unit = job.sender.hand_over(*slot, start, job.source[slot].slice(start, stop))
            job.units.append((slot, unit))
            self.loop.create_task(self._poison_when_released(job, slot, unit))
        await job.sender.seal()

    async def _poison_when_released(self, job: Job, slot: tuple[int, int], unit: Unit) -> None:
        await unit.released()
        np.asarray(job.source[slot].base)[unit.start : unit.stop] = POISON

    async def _cancel_sender(self, job: Job) -> None:
        await asyncio.sleep(job.plan.cancel_after_s or 0.0)
        assert job.sender is not None
        await job.sender.cancel("changed its mind")
        self.log(f"job {job.number}: cancelled by the producer")
        job.source_over = True

    async def _sources_come_back(self, job: Job) -> None:
        """Sealed or failed: every source is the caller's again, at once or when a copy in progress is done."""
        for slot, unit in job.units:
            try:
                await asyncio.wait_for(unit.released(), SLACK_S)
            except TimeoutError:
                self.violate(f"job {job.number}: source {slot} {unit.start}..{unit.stop} is never given back")
        job.source_over = True

    # -- the consumer --------------------------------------------------------------------------------

    async def _consume(self, job: Job) -> None:
        plan = job.plan
        if plan.expect_after_s is None:
            job.got = "never expected"
            return
        await asyncio.sleep(plan.expect_after_s)

        def grant(manifest: Manifest) -> dict[tuple[int, int], PageList]:
            if plan.refuse == "grant":
                raise RefusedError("no memory for this one", fault=Fault.LOCAL)
            return job.target

        def on_range(layer: int, tensor: int, start: int, stop: int) -> None:
            slot = (layer, tensor)
            if job.target[slot].slice(start, stop).tobytes() != job.truth[slot][start:stop]:
                self.violate(f"job {job.number}: {slot} {start}..{stop} was verified and is not what was sent")

        def on_seal() -> None:
            if plan.refuse == "seal":
                raise RefusedError("changed its mind", fault=Fault.LOCAL)

        def on_end(error: KVError | None) -> None:
            job.target_over = True
            job.left = {slot: pages.tobytes() for slot, pages in job.target.items()}

        try:
            job.receiver = job.consumer.endpoint.expect(
                job.manifest.transfer,
                Expectation(
                    grant=grant,
                    deadline_s=plan.receiver_deadline_s,
                    window_bytes=plan.window_bytes,
                    allow_unchecked=not plan.checksum,
                    on_range=on_range,
                    on_seal=on_seal,
                    on_end=on_end,
                ),
                link=job.consumer.links[-1] if job.consumer.links and self.rng.random() < 0.5 else None,
            )
            if plan.cancel_after_s is not None and plan.cancel_by == "consumer":
                self.cancels.append(self.loop.create_task(self._cancel_receiver(job)))
            try:
                await asyncio.wait_for(job.receiver.sealed(), plan.receiver_deadline_s + SLACK_S)
            except TimeoutError:
                self.violate(f"job {job.number}: the consumer hangs past its deadline")
                job.got = "hang"
                return
            job.got = "sealed"
            if any(pages.tobytes() != job.truth[slot] for slot, pages in job.target.items()):
                self.violate(f"job {job.number}: sealed with wrong bytes")
        except KVError as error:
            job.got = error
            self.log(f"job {job.number}: consumer: {error.code}: {error}")

    async def _cancel_receiver(self, job: Job) -> None:
        await asyncio.sleep(job.plan.cancel_after_s or 0.0)
        assert job.receiver is not None
        await job.receiver.cancel("changed its mind")
        self.log(f"job {job.number}: cancelled by the consumer")
        job.target_over = True

    # -- calls -----------------------------------------------------------------------------------------

    async def _call(self, count: int) -> None:
        """Each call is answered with what was asked, or fails, in time; never with another's answer."""
        for number in range(count):
            await asyncio.sleep(self.rng.random() * 0.2)
            links = self.dialler.links
            if not links:
                continue
            begun = self.loop.time()
            try:
                reply = await links[-1].call("echo", {"number": number}, timeout_s=CALL_S)
            except KVError as error:
                self.calls["failed"] += 1
                self.log(f"call {number}: {error.code}: {error}")
            else:
                self.calls["answered"] += 1
                if reply != {"number": number}:
                    self.violate(f"call {number} was answered with {reply!r}")
            if self.loop.time() > begun + CALL_S + 0.1:
                self.violate(f"call {number} took {self.loop.time() - begun:.3f} s")

    # -- judging -------------------------------------------------------------------------------------

    def _judge_jobs(self) -> None:
        for job in self.jobs:
            if not job.settled:
                self.violate(f"job {job.number}: no outcome ({job.sent!r}, {job.got!r})")
            for said in (job.sent, job.got):
                if isinstance(said, ProtocolError) and "flip" not in {name for _, name in self.plan.faults}:
                    self.violate(f"job {job.number}: a side that kept the protocol is blamed: {said!r}")
                if isinstance(said, KVError) and not isinstance(said.fault, Fault):
                    self.violate(f"job {job.number}: an error without a fault: {said!r}")
            if job.sent == "sealed" and job.got != "sealed" and not job.consumer.dead:
                self.violate(f"job {job.number}: sealed for the producer, {job.got!r} for the consumer")
            if self.plan.must_seal and (job.sent, job.got) != ("sealed", "sealed"):
                self.violate(f"job {job.number}: faults to survive, but {job.sent!r} and {job.got!r}")
        self.check_incarnations()

    def check_incarnations(self) -> None:
        for process in self.processes:
            for link in process.endpoint.links:
                for connection in link.connections:
                    stream = connection.stream
                    assert isinstance(stream, SimStream)
                    assert stream.other is not None
                    peer = stream.other.process
                    assert isinstance(peer, Process)
                    if peer.endpoint.incarnation != link.peer_incarnation:
                        self.violate(f"a link of {process} spans two incarnations of {peer}")

    async def _as_good_as_new(self) -> None:
        """Whatever happened: one more transfer, over the link that is left or a new one, must succeed."""
        self.network.unreachable = False
        link = self.dialler.links[-1] if self.dialler.links else None
        if link is None or link.closed or not link.connections:
            link = await self.connect(self.dialler)
        if link is None:
            self.violate("after the faults nobody can be dialled")
            return
        if self.plan.spill_fails:
            return
        plan = JobPlan([5000, 100], 2000, 1 << 20, 30.0, 30.0, True, 0.0, 0.0)
        job = self.make_job(len(self.jobs), plan)
        await asyncio.wait([self.loop.create_task(self._produce(job)), self.loop.create_task(self._consume(job))])
        if (job.sent, job.got) != ("sealed", "sealed") and not link.closed:
            self.violate(f"after the faults a transfer ends with {job.sent!r} and {job.got!r}")

    async def _end(self) -> None:
        for process in self.processes:
            await process.endpoint.close()
        for _ in range(6):
            await asyncio.sleep(0)
        self.network.silence()
        gc_needed = any(isinstance(j.sent, KVError) or isinstance(j.got, KVError) for j in self.jobs)
        if gc_needed and self.seed % 16 == 0:
            gc.collect()  # a failed future that nobody looked at says so when it is collected
        me = asyncio.current_task()
        tasks = [t for t in asyncio.all_tasks() if t is not me]
        if tasks:
            self.violate(f"tasks left: {tasks}")
        timers = self.loop.live_timers()
        if timers:
            self.violate(f"timers left: {timers}")
        for process in self.processes:
            self._check_empty(process)
        for job in self.jobs:
            now = {slot: pages.tobytes() for slot, pages in job.target.items()}
            if job.left is not None and now != job.left:
                self.violate(f"job {job.number}: its destination changed after the end")

    def _check_empty(self, process: Process) -> None:
        endpoint = process.endpoint
        left = {
            "links": endpoint._links,
            "handshakes": endpoint._handshakes,
            "expected": endpoint._expected,
            "waiting": endpoint._waiting,
            "probes": endpoint._probes._running,
            "verdicts": endpoint._probes._telling,
            "decoding": [j.number for j in self.jobs if j.receiver is not None and j.receiver._decoding],
            "spilled": endpoint.spill_area.used_bytes,
        }
        for link in process.links:
            left |= {
                "connections": link.connections,
                "machines": link._machines,
                "outgoing": link._outgoing,
                "incoming": link._incoming,
                "calls": link._calls,
                "serving": link._serving,
            }
            assert isinstance(link.lanes, PythonLanes)
            left |= {"lanes": link.lanes.connections, "turns": len(link.lanes._turns), "into": link.lanes._incoming}
        for job in self.jobs:
            if job.sender is not None:
                left |= {"live": job.sender._live, "held": job.sender._held, "copies": job.sender._copies}
                left |= {"units": job.sender._units, "pending": job.sender._pending}
            into = None if job.receiver is None else job.receiver._into
            if into is not None:
                assert isinstance(into, PythonIncoming)
                left |= {"claims": into._claims, "granted": into._granted}
            for name, value in left.items():
                if value:
                    self.violate(f"{process}: {name} left: {value}")


def run_seed(seed: int, *, trace: bool = False) -> World:
    """Run one seed; raises Violation. Returns the world, whose ``lines`` are the trace."""
    world = World(seed, trace=trace)
    try:
        world.run()
    except Violation:
        if trace:
            print("\n".join(world.lines))
        raise
    return world
