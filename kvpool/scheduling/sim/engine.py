"""The event loop: arrivals, prefill, layer-wise transfer, decode, telemetry, conversions.

Decisions come from the very :class:`kvpool.scheduling.router.Router` that serves live; the loop only plays the world
around it. Arrivals are read from arrays; everything else is a heap of (time, number, kind, a, b).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvtransport.errors import ConfigError

from ..profiles import Profile
from ..rebalancer import Phase, Rebalancer, RebalancerConfig, Role, StageSample
from ..router import Path, Request, Router, RouterConfig
from ..telemetry import LinkSampler, SamplerConfig
from ..window import Resources
from .arrivals import Requests
from .caches import NoCache, PrefixCache
from .link import Flow, FluidLink
from .metrics import Recorder, Snapshot
from .pools import DecodeInstance, PrefillPool

PREFILL_END, LINK, DECODE, TICK, BANDWIDTH, PULLED, CONVERTED = range(7)


@dataclass(frozen=True, slots=True)
class World:
    """Everything around the policy. Bytes per second, seconds, tokens.

    ``bandwidth``: (time, bytes per second) changes of the link; ``credit_bytes``: what the transport holds before it
    counts as spilled. ``decode_floor``: part of a full batch's step that a nearly empty batch takes.
    """

    pd: Profile
    prfaas: Profile
    n_prfaas: int
    egress: float
    batch_max: int
    step: float
    output_tokens: float
    decode_floor: float = 1.0
    layers: int = 61
    rtt_s: float = 0.01
    credit_bytes: float = 1e9
    bandwidth: tuple[tuple[float, float], ...] = ()
    tick_s: float = 1.0
    convert_s: float = 30.0

    def __post_init__(self) -> None:
        if self.batch_max < 1 or self.layers < 1 or not (self.step > 0 and self.tick_s > 0):
            raise ConfigError("simulation: batch_max and layers must be >= 1, step and tick_s > 0")
        if self.egress < 0 or self.rtt_s < 0 or self.convert_s < 0 or not 0 < self.decode_floor <= 1:
            raise ConfigError("simulation: egress, rtt_s and convert_s must be >= 0, decode_floor in (0, 1]")


@dataclass(frozen=True, slots=True)
class Setup:
    """A policy's share of a run: the router's settings, its start, and the split it begins with."""

    router: RouterConfig
    n_p: int
    n_d: int
    threshold: float
    rebalancer: RebalancerConfig | None = None
    n_prfaas: int | None = None


class _Job:
    __slots__ = ("at", "flow", "i", "output", "path", "ready", "service", "tokens", "transfer")

    def __init__(self, i: int, at: float, tokens: float, output: float) -> None:
        self.i = i
        self.at = at
        self.tokens = tokens
        self.output = output
        self.path = Path.LOCAL
        self.service = 0.0
        self.transfer = 0.0
        self.ready = 0.0
        self.flow: Flow | None = None


@dataclass(slots=True)
class _Counters:
    """What the link's telemetry would say."""

    sent_bytes: int
    unsent_bytes: int
    spilled_bytes: int
    rtt_s: float | None


Progress = Callable[[int, int], None]
"""(requests arrived, requests in all)."""


@dataclass
class Simulation:
    """One run. ``pd_cache`` and ``prfaas_cache`` belong to the run; ``progress`` is called about a hundred times."""

    world: World
    setup: Setup
    requests: Requests
    pd_cache: PrefixCache = field(default_factory=NoCache)
    prfaas_cache: PrefixCache = field(default_factory=NoCache)
    warmup: float = 0.1
    progress: Progress | None = None

    def __post_init__(self) -> None:
        world, setup = self.world, self.setup
        if len(self.requests) < 2:
            raise ConfigError(f"a simulation needs at least two requests, got {len(self.requests)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is the part of the requests to leave out, 0 up to 1, got {self.warmup}")
        if setup.n_d < 1:
            raise ConfigError("a simulation needs at least one decode instance")
        n_prfaas = world.n_prfaas if setup.n_prfaas is None else setup.n_prfaas
        self.router = Router(
            setup.router,
            pd=world.pd,
            prfaas=world.prfaas,
            n_p=setup.n_p,
            n_prfaas=n_prfaas,
            egress=world.egress,
            threshold=setup.threshold,
            decode_s=world.step * world.output_tokens,
        )
        self.rebalancer = Rebalancer(setup.rebalancer) if setup.rebalancer else None
        self.local, self.remote = PrefillPool(setup.n_p), PrefillPool(n_prfaas)
        self.decoders = [DecodeInstance(world.batch_max, world.step, world.decode_floor) for _ in range(setup.n_d)]
        self.decode_queue: deque[_Job] = deque()
        self.out, self.back = FluidLink(world.egress, world.rtt_s), FluidLink(world.egress, world.rtt_s)
        self.sampler = LinkSampler(SamplerConfig(nominal=max(world.egress, 1.0)))
        self.recorder = Recorder(len(self.requests))
        self._heap: list[tuple[float, int, int, Any, Any]] = []
        self._number = 0
        self._in_system = 0
        self._stage_before: tuple[float, float, float, float] | None = None
        self._capacity_time = 0.0
        self._capacity_since = 0.0
        self._constant = world.decode_floor >= 1.0

    # -- loop ------------------------------------------------------------------------------------------

    def run(self) -> Recorder:
        """Play all requests to their end."""
        heap, world = self._heap, self.world
        at = self.requests.at.tolist()
        tokens, output = self.requests.tokens.tolist(), self.requests.output.tolist()
        n = len(at)
        first = int(n * self.warmup)
        report = max(n // 100, 1)
        for when, capacity in world.bandwidth:
            self._push(when, BANDWIDTH, capacity, None)
        self._push(world.tick_s, TICK, None, None)
        handlers = (
            self._prefill_end,
            self._link_event,
            self._decode_event,
            self._tick,
            self._bandwidth,
            self._pulled,
            self._converted,
        )
        i = 0
        now = 0.0
        pop = heapq.heappop
        while i < n or self._in_system:
            if i < n and (not heap or at[i] <= heap[0][0]):
                now = at[i]
                if i == first:
                    self.recorder.begin = self._snapshot(now)
                self._arrive(now, i, tokens[i], output[i])
                i += 1
                if i == n:
                    self.recorder.end = self._snapshot(now)
                if self.progress is not None and (i % report == 0 or i == n):
                    self.progress(i, n)
                continue
            now, _, kind, a, b = pop(heap)
            handlers[kind](now, a, b)
        self.recorder.close(self.requests, first, self.router.threshold)
        return self.recorder

    def _push(self, when: float, kind: int, a: Any, b: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, kind, a, b))

    # -- prefill ---------------------------------------------------------------------------------------

    def _arrive(self, now: float, i: int, tokens: float, output: float) -> None:
        tokens = max(tokens, 1.0)
        on_pd, on_prfaas = self.pd_cache.match(i, tokens), self.prfaas_cache.match(i, tokens)
        decision = self.router.route(now, Request(tokens, on_pd, on_prfaas))
        recorder = self.recorder
        if decision.path is Path.SHED:
            recorder.shed(i)
            return
        self._in_system += 1
        job = _Job(i, now, tokens, output)
        job.path, job.service, job.transfer = decision.path, decision.prefill_s, decision.transfer_bytes
        recorder.routed(i, decision.path is Path.PRFAAS, decision.uncached)
        if decision.pull_bytes:
            link = self.out if decision.path is Path.LOCAL else self.back
            self._finish_flows(now, link)
            link.start(decision.pull_bytes, 0.0, 1, job)
            self._schedule_link(link)
            return
        self._enqueue(now, job)

    def _pulled(self, now: float, job: _Job, _: None) -> None:
        self._enqueue(now, job)

    def _enqueue(self, now: float, job: _Job) -> None:
        pool = self.local if job.path is Path.LOCAL else self.remote
        if pool.busy < pool.instances:
            pool.account(now)
            pool.busy += 1
            self._begin(now, job)
        else:
            pool.queue.append(job)

    def _begin(self, now: float, job: _Job) -> None:
        self.recorder.wait[job.i] = now - job.at
        if job.transfer:
            link = self.out
            self._finish_flows(now, link)
            job.flow = link.start(job.transfer, job.service, self.world.layers, job)
            self._schedule_link(link)
        self._push(now + job.service, PREFILL_END, job, None)

    def _prefill_end(self, now: float, job: _Job, _: None) -> None:
        local = job.path is Path.LOCAL
        pool = self.local if local else self.remote
        pool.account(now)
        if pool.leaving and local:
            pool.leaving -= 1
            pool.busy -= 1
            pool.instances -= 1
            self._leave_prefill(now)
        elif pool.queue:
            self._begin(now, pool.queue.popleft())
        else:
            pool.busy -= 1
        if local:
            self.pd_cache.insert(job.i, job.tokens)
            self._ready(now, now, job)
            return
        self.prfaas_cache.insert(job.i, job.tokens)
        if job.flow is not None:
            self._finish_flows(now, self.out)
            self.out.end_production(job.flow)
            self._schedule_link(self.out)
        else:
            self._ready(now, now, job)

    # -- link ------------------------------------------------------------------------------------------

    def _finish_flows(self, now: float, link: FluidLink) -> None:
        for job in link.advance(now):
            if job.flow is None:  # a pull: its prefill can begin
                self._push(now + link.rtt_s, PULLED, job, None)
            else:
                self._ready(now, now + link.rtt_s / 2, job)

    def _schedule_link(self, link: FluidLink) -> None:
        when = link.schedule()
        if when is not None:
            self._push(when, LINK, link, link.version)

    def _link_event(self, now: float, link: FluidLink, version: int) -> None:
        if version == link.version:
            self._finish_flows(now, link)
            self._schedule_link(link)

    def _bandwidth(self, now: float, capacity: float, _: None) -> None:
        self._capacity_time += self.out.capacity * (now - self._capacity_since)
        self._capacity_since = now
        for link in (self.out, self.back):
            self._finish_flows(now, link)
            link.capacity = capacity
            self._schedule_link(link)

    # -- decode ----------------------------------------------------------------------------------------

    def _ready(self, now: float, ready: float, job: _Job) -> None:
        job.ready = ready
        self.recorder.arrived(job.i, ready - job.at)
        self._decode(now, job)

    def _decode(self, now: float, job: _Job) -> None:
        best: DecodeInstance | None = None
        fewest = self.world.batch_max
        for instance in self.decoders:
            taken = len(instance.batch)
            if taken < fewest and not instance.draining:
                best, fewest = instance, taken
        if best is None:
            self.decode_queue.append(job)
            return
        self._join(now, best, job)

    def _join(self, now: float, instance: DecodeInstance, job: _Job) -> None:
        instance.advance(now)
        self._first_token(now, job)
        instance.join(job.i, job.output, job)
        # With a constant step, joining does not move anybody's end: only a new first end needs an event.
        if not self._constant or instance.batch[0][1] == job.i:
            end = instance.next_end()
            self._push(end if end is not None else now, DECODE, instance, instance.version)

    def _first_token(self, now: float, job: _Job) -> None:
        if now > job.ready:
            job.ready = now
        self.recorder.ttft[job.i] = job.ready - job.at

    def _decode_event(self, now: float, instance: DecodeInstance, version: int) -> None:
        if version != instance.version:
            return
        instance.advance(now)
        recorder = self.recorder
        for job in instance.pop_due():
            recorder.finished(job.i, now, (now - job.ready) / job.output)
            recorder.observed_output(job.output)
            self._in_system -= 1
        if not instance.draining:
            while self.decode_queue and len(instance.batch) < instance.places:
                job = self.decode_queue.popleft()
                self._first_token(now, job)
                instance.join(job.i, job.output, job)
        elif not instance.batch:
            self._leave_decode(now, instance)
            return
        end = instance.next_end()
        if end is not None:
            self._push(end, DECODE, instance, instance.version)

    # -- telemetry -------------------------------------------------------------------------------------

    def _tick(self, now: float, a: None, b: None) -> None:
        world, router, out = self.world, self.router, self.out
        self._finish_flows(now, out)
        self._schedule_link(out)
        waiting = out.waiting
        held = min(waiting, world.credit_bytes)
        rtt = world.rtt_s + (min(waiting / out.capacity, 0.1) if out.capacity > 0 else 0.1)
        counters = _Counters(int(out.sent), int(held), int(waiting - held), rtt)
        sample = self.sampler.sample(now, counters)
        if sample is not None:
            router.on_link(sample)
        for path, pool in ((Path.LOCAL, self.local), (Path.PRFAAS, self.remote)):
            if pool.busy < pool.instances:
                router.on_pool(path, now, 0.0)
        serving = sum(1 for d in self.decoders if not d.draining)
        output = self.recorder.mean_output(world.output_tokens)
        per_place = world.step * output / (world.batch_max * max(serving, 1))
        decode_wait = len(self.decode_queue) * per_place
        router.on_decode(
            now,
            present=len(self.decode_queue) + sum(len(d.batch) for d in self.decoders if not d.draining),
            places=world.batch_max * serving,
            finished=self.recorder.finished_count,
        )
        self.recorder.tick(
            now,
            router.threshold,
            len(self.local.queue),
            len(self.remote.queue),
            len(self.decode_queue),
            0.0 if sample is None else sample.goodput,
            out.capacity,
            self.local.instances,
        )
        if self.rebalancer is not None:
            self._rebalance(now, decode_wait, serving)
        self._push(now + world.tick_s, TICK, None, None)

    def _rebalance(self, now: float, decode_wait: float, serving: int) -> None:
        assert self.rebalancer is not None
        for pool in (self.local, self.remote):
            pool.account(now)
        for decoder in self.decoders:
            decoder.advance(now)
        taken = sum(d.taken_time for d in self.decoders)
        before, self._stage_before = self._stage_before, (now, self.local.busy_time, self.remote.busy_time, taken)
        if before is None or now <= before[0]:
            return
        dt = now - before[0]

        def part(used: float, instances: int) -> float:
            return used / (dt * instances) if instances else 0.0

        sample = StageSample(
            at=now,
            n_p=self.local.instances,
            n_d=serving,
            prefill_utilisation=min(
                (
                    part(pool.busy_time - was, pool.instances)
                    for pool, was in ((self.local, before[1]), (self.remote, before[2]))
                    if pool.instances
                ),
                default=1.0,
            ),
            prefill_wait_s=min(self.router.local.wait(now), self.router.prfaas.wait(now)),
            decode_utilisation=part(taken - before[3], serving * self.world.batch_max),
            decode_wait_s=decode_wait,
        )
        conversion = self.rebalancer.observe(sample, self._split_capacity)
        if conversion is None:
            return
        self.recorder.conversions.append((now, conversion.reason))
        if conversion.source is Role.PREFILL:
            self.router.on_resize(now, n_p=self.local.instances - 1)
            if self.local.busy < self.local.instances:
                self.local.account(now)
                self.local.instances -= 1
                self._leave_prefill(now)
            else:
                self.local.leaving += 1
        else:
            instance = min((d for d in self.decoders if not d.draining), key=lambda d: len(d.batch))
            instance.draining = True
            if not instance.batch:
                self._leave_decode(now, instance)

    def _split_capacity(self, n_p: int, n_d: int) -> tuple[float, float]:
        """What another split can prefill and decode, over the requests the router has seen lately."""
        world, router = self.world, self.router
        decode = n_d * world.batch_max / (world.step * self.recorder.mean_output(world.output_tokens))
        window = router.controller.window
        if window.count < window.size:
            return 0.0, 0.0
        # The link as it is over minutes: a conversion takes longer than a dip.
        egress = router.controller.usable_egress(router.monitor.lasting_capacity or world.egress, 0.0)
        return window.balance(Resources(self.remote.instances, n_p, egress)).capacity, decode

    def _leave_prefill(self, now: float) -> None:
        assert self.rebalancer is not None
        self.rebalancer.drained()
        self._push(now + self.world.convert_s, CONVERTED, Role.DECODE, None)

    def _leave_decode(self, now: float, instance: DecodeInstance) -> None:
        assert self.rebalancer is not None
        self.decoders.remove(instance)
        self.recorder.retired_taken += instance.taken_time
        self.recorder.retired_offered += instance.offered_time
        self.rebalancer.drained()
        self._push(now + self.world.convert_s, CONVERTED, Role.PREFILL, None)

    def _converted(self, now: float, role: Role, _: None) -> None:
        assert self.rebalancer is not None
        assert self.rebalancer.phase is Phase.CONVERTING
        self.rebalancer.converted(now)
        self._stage_before = None
        if role is Role.DECODE:
            instance = DecodeInstance(self.world.batch_max, self.world.step, self.world.decode_floor, now)
            self.decoders.append(instance)
            while self.decode_queue and len(instance.batch) < instance.places:
                self._join(now, instance, self.decode_queue.popleft())
            return
        self.local.account(now)
        self.local.instances += 1
        if self.local.queue:
            self.local.busy += 1
            self._begin(now, self.local.queue.popleft())
        self.router.on_resize(now, n_p=self.local.instances)

    # -- accounting ------------------------------------------------------------------------------------

    def _snapshot(self, now: float) -> Snapshot:
        self.local.account(now)
        self.remote.account(now)
        self._finish_flows(now, self.out)
        self._schedule_link(self.out)
        for decoder in self.decoders:
            decoder.advance(now)
        capacity = self._capacity_time + self.out.capacity * (now - self._capacity_since)
        return Snapshot(
            at=now,
            local_busy=self.local.busy_time,
            remote_busy=self.remote.busy_time,
            decode_taken=sum(d.taken_time for d in self.decoders) + self.recorder.retired_taken,
            sent=self.out.sent,
            capacity=capacity if math.isfinite(capacity) else 0.0,
            local_offered=self.local.offered_time,
            remote_offered=self.remote.offered_time,
            decode_offered=sum(d.offered_time for d in self.decoders) + self.recorder.retired_offered,
            n_p=self.local.instances,
        )
