"""Scenarios (TOML) and policies: what a simulation is run on, and with.

A scenario names a plan case and what happens to it: arrivals, prefix structure, caches, the link's bandwidth. Load
is relative to the capacity the planner gives full PrfaaS for the scenario's uncached lengths, found prefixes included.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np

from kvtransport.errors import ConfigError

from ..config import Case, load_case
from ..lengths import Empirical, Lengths
from ..model import Means, OperatingPoint, System
from ..planner import plan, plan_split
from ..profiles import GBPS
from ..rebalancer import RebalancerConfig
from ..router import RouterConfig, static_router_config
from ..traces import load_trace, uncached_lengths
from .arrivals import Bursts, Requests, Sessions, bursty, independent, poisson, replay, sessions
from .caches import NoCache, PrefixCache, SessionCache, TraceCache
from .engine import Progress, Setup, Simulation, World
from .metrics import Recorder

SCENARIOS = resources.files("kvpool.scheduling") / "data" / "scenarios"


class Policy(StrEnum):
    """What is compared."""

    HOMOGENEOUS = "homogeneous-pd"
    """No PrfaaS: the baseline cluster of the case, best split."""
    NAIVE = "naive-heterogeneous"
    """Every request is prefilled by PrfaaS, every PD instance decodes."""
    STATIC = "static-threshold"
    """The planned split and the planned t, never changed."""
    FULL = "full-prfaas"
    """The planned split; t follows the window and the link, queues are looked at, roles are rebalanced."""


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class PoissonSpec(_Struct, frozen=True, kw_only=True, tag="poisson", tag_field="kind"):
    pass


class BurstSpec(_Struct, frozen=True, kw_only=True, tag="bursts", tag_field="kind"):
    """See :class:`kvpool.scheduling.sim.arrivals.Bursts`."""

    factor: float
    on_s: float
    off_s: float


class ReplaySpec(_Struct, frozen=True, kw_only=True, tag="trace", tag_field="kind"):
    """``name``: a packaged trace or a path relative to the scenario file."""

    name: str


class SessionSpec(_Struct, frozen=True, kw_only=True):
    """See :class:`kvpool.scheduling.sim.arrivals.Sessions`."""

    turns: float = 4.0
    think_s: float = 60.0
    growth: float = 0.25


class CacheSpec(_Struct, frozen=True, kw_only=True):
    """Prefix cache capacities in tokens; ``block``: multiples of so many tokens have a recurrent state."""

    pd_tokens: float
    prfaas_tokens: float
    block: int = 512


class LossSpec(_Struct, frozen=True, kw_only=True):
    """From ``first_s`` on, every ``every_s``, the link has ``factor`` of its bandwidth for ``for_s`` seconds."""

    first_s: float
    every_s: float
    for_s: float
    factor: float


class FluctuationSpec(_Struct, frozen=True, kw_only=True):
    """Every ``every_s`` the link has between ``low`` and ``high`` of its bandwidth, uniformly drawn."""

    every_s: float
    low: float
    high: float


class ShiftSpec(_Struct, frozen=True, kw_only=True):
    """After ``at_fraction`` of the requests, outputs are ``output_factor`` times as long."""

    at_fraction: float
    output_factor: float


class ScenarioSpec(_Struct, frozen=True, kw_only=True):
    title: str
    case: str
    arrivals: PoissonSpec | BurstSpec | ReplaySpec
    egress_gbps: float | None = None
    sessions: SessionSpec | None = None
    caches: CacheSpec | None = None
    losses: LossSpec | None = None
    fluctuation: FluctuationSpec | None = None
    shift: ShiftSpec | None = None
    decode_floor: float = 0.7
    output_cv: float = 0.5
    slo_ttft_s: float = 30.0
    """Time to first token a request must get; every policy sheds what it predicts to be later."""
    rtt_s: float = 0.01


@dataclass(frozen=True)
class Scenario:
    """A checked scenario, with the system it plays on and that system's plan as the reference of load."""

    name: str
    spec: ScenarioSpec
    case: Case
    system: System
    homogeneous: System | None
    reference: OperatingPoint
    folder: Path | None


def packaged_scenarios() -> list[str]:
    return sorted(p.name[:-5] for p in SCENARIOS.iterdir() if p.name.endswith(".toml"))


def load_scenario(name: str) -> Scenario:
    """A packaged scenario by name, or a TOML file. Raises ConfigError naming what is wrong."""
    folder = None
    if name in packaged_scenarios():
        text = (SCENARIOS / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"no scenario {name!r}: packaged are {', '.join(packaged_scenarios())}, and no file could be read ({error})"
            ) from error
        folder = Path(name).parent
    try:
        spec = msgspec.convert(tomllib.loads(text), ScenarioSpec)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"scenario {name}: {error}") from error
    return build_scenario(name, spec, folder)


def build_scenario(name: str, spec: ScenarioSpec, folder: Path | None = None) -> Scenario:
    """Plan the scenario's system, with expected times: those are what a queue sees."""
    if spec.sessions is not None and isinstance(spec.arrivals, ReplaySpec):
        raise ConfigError(f"scenario {name}: a trace brings its own prefixes; leave out sessions")
    if spec.caches is not None and spec.sessions is None and not isinstance(spec.arrivals, ReplaySpec):
        raise ConfigError(f"scenario {name}: caches need sessions or a trace, nothing else shares prefixes")
    case = load_case(spec.case)
    system = replace(case.system, means=Means.EXPECTED)
    if system.prfaas is None:
        raise ConfigError(f"scenario {name}: case {spec.case} has no PrfaaS cluster")
    if spec.egress_gbps is not None:
        system = replace(system, prfaas=replace(system.prfaas, egress=spec.egress_gbps * GBPS))
    lengths, output = _uncached(spec, system, folder)
    workload = replace(system.workload, lengths=lengths, output_tokens=output)
    system = replace(system, workload=workload)
    alone = None
    if case.homogeneous is not None:
        alone = replace(case.homogeneous, workload=workload, means=Means.EXPECTED)
    return Scenario(name, spec, case, system, alone, plan(system).best, folder)


def _uncached(spec: ScenarioSpec, system: System, folder: Path | None) -> tuple[Lengths, float]:
    """The lengths that remain when every prefix is found, and the mean output."""
    if isinstance(spec.arrivals, ReplaySpec):
        trace = load_trace(spec.arrivals.name, relative_to=folder)
        blocks = 10**12 if spec.caches is not None else 0
        return Empirical(uncached_lengths(trace, blocks)), float(trace.output_tokens.mean())
    if spec.sessions is None:
        return system.workload.lengths, system.workload.output_tokens
    rng = np.random.default_rng(0)
    drawn = _sessions(rng, spec, system, 1.0, 40_000)
    assert drawn.shared is not None
    found = drawn.shared if spec.caches is not None else 0.0
    return Empirical((drawn.tokens - found)[4_000:]), system.workload.output_tokens


def _sessions(rng: np.random.Generator, spec: ScenarioSpec, system: System, rate: float, n: int) -> Requests:
    assert spec.sessions is not None
    structure = Sessions(
        spec.sessions.turns, spec.sessions.think_s, spec.sessions.growth, system.workload.lengths.support[1]
    )
    workload = system.workload
    return sessions(rng, rate, n, workload.lengths, workload.output_tokens, structure, output_cv=spec.output_cv)


def draw(scenario: Scenario, rng: np.random.Generator, rate: float, n: int) -> Requests:
    """All requests of a run at ``rate`` per second."""
    spec = scenario.spec
    workload = scenario.case.system.workload
    if isinstance(spec.arrivals, ReplaySpec):
        drawn = replay(load_trace(spec.arrivals.name, relative_to=scenario.folder), rate, n)
    elif spec.sessions is not None:
        drawn = _sessions(rng, spec, scenario.case.system, rate, n)
        if isinstance(spec.arrivals, BurstSpec):
            raise ConfigError(f"scenario {scenario.name}: bursts and sessions cannot be combined yet")
    else:
        if isinstance(spec.arrivals, BurstSpec):
            bursts = Bursts(spec.arrivals.factor, spec.arrivals.on_s, spec.arrivals.off_s)
            at = bursty(rng, rate, n, bursts)
        else:
            at = poisson(rng, rate, n)
        drawn = independent(rng, at, workload.lengths, workload.output_tokens, output_cv=spec.output_cv)
    if spec.shift is not None:
        output = drawn.output.copy()
        output[int(n * spec.shift.at_fraction) :] *= spec.shift.output_factor
        drawn = replace(drawn, output=output)
    return drawn


def bandwidth(
    spec: ScenarioSpec, rng: np.random.Generator, nominal: float, until: float
) -> tuple[tuple[float, float], ...]:
    """The changes of the link's bandwidth up to ``until`` seconds."""
    out: list[tuple[float, float]] = []
    if spec.losses is not None:
        at = spec.losses.first_s
        while at < until:
            out += [(at, nominal * spec.losses.factor), (at + spec.losses.for_s, nominal)]
            at += spec.losses.every_s
    if spec.fluctuation is not None:
        f = spec.fluctuation
        times = np.arange(0.0, until, f.every_s)
        out += [
            (float(t), nominal * float(x)) for t, x in zip(times, rng.uniform(f.low, f.high, len(times)), strict=True)
        ]
    return tuple(sorted(out))


def caches(spec: ScenarioSpec, drawn: Requests) -> tuple[PrefixCache, PrefixCache]:
    """(PD cluster's, PrfaaS cluster's) prefix caches, empty."""
    sizes = spec.caches
    if sizes is None:
        return NoCache(), NoCache()
    if drawn.blocks is not None:
        return tuple(  # type: ignore[return-value]
            TraceCache(size, drawn.block_tokens, drawn.blocks) for size in (sizes.pd_tokens, sizes.prfaas_tokens)
        )
    assert drawn.session is not None
    assert drawn.shared is not None
    session, shared = drawn.session.tolist(), drawn.shared.tolist()
    return (
        SessionCache(sizes.pd_tokens, sizes.block, session, shared),
        SessionCache(sizes.prfaas_tokens, sizes.block, session, shared),
    )


def setup(scenario: Scenario, policy: Policy, base: RouterConfig | None = None, *, rebalance: bool = True) -> Setup:
    """How ``policy`` starts in this scenario; without ``rebalance`` full PrfaaS keeps its roles."""
    # Admission aims below the limit: predictions are off by seconds when decode is full.
    config = base or RouterConfig(max_ttft_s=0.8 * scenario.spec.slo_ttft_s)
    if policy is Policy.HOMOGENEOUS:
        if scenario.homogeneous is None:
            raise ConfigError(f"scenario {scenario.name}: its case has no [baseline] for {policy}")
        best = plan(scenario.homogeneous).best
        return Setup(
            replace(static_router_config(config), local_only=True), best.n_p, best.n_d, float("inf"), n_prfaas=0
        )
    if policy is Policy.NAIVE:
        best = plan_split(scenario.system, 0)
        return Setup(replace(static_router_config(config), prfaas_only=True), 0, best.n_d, 0.0)
    best = scenario.reference
    threshold = best.threshold if best.threshold is not None else (0.0 if best.offload_share else float("inf"))
    if policy is Policy.STATIC:
        return Setup(static_router_config(config), best.n_p, best.n_d, threshold)
    return Setup(config, best.n_p, best.n_d, threshold, RebalancerConfig() if rebalance else None)


def simulate(
    scenario: Scenario,
    policy: Policy,
    *,
    load: float,
    requests: int,
    seed: int,
    router: RouterConfig | None = None,
    rebalance: bool = True,
    progress: Progress | None = None,
) -> tuple[Recorder, Setup]:
    """One run at ``load`` times the reference capacity. The same seed gives every policy the same requests."""
    if not load > 0:
        raise ConfigError(f"load is relative to the planned capacity and must be > 0, got {load}")
    arrivals_rng, link_rng = (np.random.default_rng([seed, k]) for k in (1, 2))
    rate = load * scenario.reference.lambda_max
    drawn = draw(scenario, arrivals_rng, rate, requests)
    system, spec = scenario.system, scenario.spec
    assert system.prfaas is not None
    world = World(
        pd=system.pd.profile,
        prfaas=system.prfaas.profile,
        n_prfaas=system.prfaas.instances,
        egress=system.prfaas.egress,
        batch_max=int(system.pd.batch_max),
        step=system.pd.step,
        output_tokens=system.workload.output_tokens,
        decode_floor=spec.decode_floor,
        rtt_s=spec.rtt_s,
        bandwidth=bandwidth(spec, link_rng, system.prfaas.egress, float(drawn.at[-1])),
    )
    chosen = setup(scenario, policy, router, rebalance=rebalance)
    pd_cache, prfaas_cache = caches(spec, drawn)
    run = Simulation(world, chosen, drawn, pd_cache, prfaas_cache, progress=progress)
    return run.run(), chosen
