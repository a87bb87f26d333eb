"""Plan files: a user's clusters, link, model and workload as TOML, checked and turned into a model.System.

Every key is documented here and in ``docs/scheduling.md``; unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from kvtransport import presets
from kvtransport.errors import ConfigError

from .lengths import Empirical, Lengths, Scaled, TruncatedLogNormal
from .model import InfeasiblePlanError, Means, PdCluster, PrfaasCluster, System, Workload
from .profiles import GBPS, Curve, Label, Profile, load_profile
from .traces import load_trace, uncached_lengths

CASES = resources.files(__package__) / "data" / "cases"


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class LogNormalSpec(_Struct, frozen=True, kw_only=True, tag="lognormal", tag_field="kind"):
    """``mu`` and ``sigma`` of the logarithm, cut to [``low``, ``high``] tokens."""

    mu: float
    sigma: float
    low: float
    high: float


class TraceSpec(_Struct, frozen=True, kw_only=True, tag="trace", tag_field="kind"):
    """Lengths of a request trace (JSON lines; ``path`` relative to the plan file, or a packaged trace's name).

    With ``cache_blocks`` the trace is replayed through a prefix cache of so many blocks first, and what the
    planner sees is the uncached part; 0 (the default) plans without a cache.
    """

    path: str
    cache_blocks: int = 0


class ValuesSpec(_Struct, frozen=True, kw_only=True, tag="values", tag_field="kind"):
    """Lengths in tokens, each equally likely."""

    values: list[float]


class WorkloadSpec(_Struct, frozen=True, kw_only=True):
    lengths: LogNormalSpec | TraceSpec | ValuesSpec
    output_tokens: float | None = None
    """Mean output tokens; a trace brings its own."""
    cached_fraction: float = 0.0
    """Part of every prompt found in the cache of the cluster that prefills it, 0 up to (not) 1."""


class PrfaasSpec(_Struct, frozen=True, kw_only=True):
    instances: int
    profile: str
    """A packaged profile's name or a CSV file."""
    egress_gbps: float
    model: str | None = None
    """A preset of kvtransport whose geometry gives the KVCache sizes, instead of the profile's own."""
    price: float = 0.0
    """Price of one instance, in any currency; 0 leaves costs out."""


class PdSpec(_Struct, frozen=True, kw_only=True):
    instances: int
    profile: str
    slo_tokens_per_s: float
    """Decode speed every request must get: a step takes 1 / this at most."""
    batch_max: float | None = None
    """Requests one decode instance holds while it meets the SLO ..."""
    decode_steps_ms: list[tuple[float, float]] | None = None
    """... or measured (batch, milliseconds a step), from which it is taken."""
    price: float = 0.0


class BaselineSpec(_Struct, frozen=True, kw_only=True):
    homogeneous_instances: int
    """PD instances of the cluster without PrfaaS that the plan is compared with."""


class PlanSpec(_Struct, frozen=True, kw_only=True):
    pd: PdSpec
    workload: WorkloadSpec
    prfaas: PrfaasSpec | None = None
    title: str = ""
    means: Literal["at-mean-length", "expected"] = "at-mean-length"
    baseline: BaselineSpec | None = None
    labels: dict[str, Literal["input", "derived", "measured"]] = {}
    published: dict[str, dict[str, float]] = {}
    """Figures to print beside the plan; never read by it."""


@dataclass(frozen=True)
class Case:
    """A checked plan file. ``derived`` names the inputs (of planner.perturbations) that were derived from results."""

    title: str
    system: System
    homogeneous: System | None
    prices: tuple[float, float]
    """(PrfaaS instance, PD instance)."""
    labels: dict[str, Label]
    published: dict[str, dict[str, float]]
    spec: PlanSpec


def load_case(name: str) -> Case:
    """A packaged case by name. Raises ConfigError for an unknown one."""
    known = sorted(p.name[:-5] for p in CASES.iterdir() if p.name.endswith(".toml"))
    if name not in known:
        raise ConfigError(f"no case {name!r}; packaged are: {', '.join(known)}. A file of your own goes to --config")
    return parse_case((CASES / f"{name}.toml").read_text(encoding="utf-8"), where=name, folder=None)


def load_case_file(path: Path) -> Case:
    """A user's plan file. Raises ConfigError for anything wrong in it, naming the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read plan file {path}: {error}") from error
    return parse_case(text, where=str(path), folder=path.parent)


def parse_case(text: str, *, where: str, folder: Path | None) -> Case:
    """Check and build a plan file's text; ``folder`` is what relative paths in it start from."""
    try:
        spec = msgspec.convert(tomllib.loads(text), PlanSpec)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        return _build(spec, folder)
    except InfeasiblePlanError:
        raise
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _build(spec: PlanSpec, folder: Path | None) -> Case:
    labels = {key: Label(value) for key, value in spec.labels.items()}
    pd_profile = load_profile(spec.pd.profile, relative_to=folder)
    labels.setdefault("pd.profile", pd_profile.label)
    workload = _workload(spec.workload, folder)
    pd = _pd_cluster(spec.pd, pd_profile)
    means = Means(spec.means)
    prfaas = None
    if spec.prfaas is not None:
        profile = load_profile(spec.prfaas.profile, relative_to=folder)
        labels.setdefault("prfaas.profile", profile.label)
        profile = _with_sizes(profile, spec.prfaas.model, pd_profile)
        prfaas = PrfaasCluster(spec.prfaas.instances, profile, spec.prfaas.egress_gbps * GBPS)
    system = System(pd, workload, prfaas, means)
    homogeneous = None
    if spec.baseline is not None:
        alone = PdCluster(spec.baseline.homogeneous_instances, pd.profile, pd.batch_max, pd.step)
        homogeneous = System(alone, workload, None, means)
    prices = (spec.prfaas.price if spec.prfaas else 0.0, spec.pd.price)
    return Case(spec.title, system, homogeneous, prices, labels, spec.published, spec)


def _with_sizes(profile: Profile, model: str | None, other: Profile) -> Profile:
    if model is not None:
        layout = presets.load(model)
        points = tuple(float(x) for x in sorted({1024.0, *profile.prefill.x}))
        return profile.with_kv(Curve(points, tuple(float(layout.bytes_at(int(x))) for x in points)))
    if profile.kv is not None:
        return profile
    if other.kv is not None:
        return profile.with_kv(other.kv)
    raise ConfigError(
        "prfaas.profile has no KVCache sizes: add a kv_bytes column to it, or set prfaas.model to a preset"
    )


def _workload(spec: WorkloadSpec, folder: Path | None) -> Workload:
    lengths: Lengths
    output = spec.output_tokens
    if isinstance(spec.lengths, LogNormalSpec):
        lengths = TruncatedLogNormal(spec.lengths.mu, spec.lengths.sigma, spec.lengths.low, spec.lengths.high)
    elif isinstance(spec.lengths, ValuesSpec):
        lengths = Empirical(spec.lengths.values)
    else:
        trace = load_trace(spec.lengths.path, relative_to=folder)
        lengths = Empirical(uncached_lengths(trace, spec.lengths.cache_blocks))
        if output is None:
            output = float(trace.output_tokens.mean())
    if output is None:
        raise ConfigError("workload.output_tokens is missing; only a trace brings its own")
    if not 0.0 <= spec.cached_fraction < 1.0:
        raise ConfigError(f"workload.cached_fraction must be from 0 to below 1, got {spec.cached_fraction}")
    if spec.cached_fraction:
        lengths = Scaled(lengths, 1.0 - spec.cached_fraction)
    return Workload(lengths, output)


def _pd_cluster(spec: PdSpec, profile: Profile) -> PdCluster:
    if not spec.slo_tokens_per_s > 0:
        raise ConfigError(f"pd.slo_tokens_per_s must be positive, got {spec.slo_tokens_per_s}")
    step = 1.0 / spec.slo_tokens_per_s
    if (spec.batch_max is None) == (spec.decode_steps_ms is None):
        raise ConfigError("pd needs exactly one of batch_max and decode_steps_ms")
    if spec.batch_max is not None:
        return PdCluster(spec.instances, profile, spec.batch_max, step)
    assert spec.decode_steps_ms is not None
    return PdCluster(spec.instances, profile, largest_batch(spec.decode_steps_ms, step), step)


def largest_batch(steps_ms: list[tuple[float, float]], step: float) -> float:
    """The largest whole batch whose decode step takes ``step`` seconds at most, between measured points.

    Never beyond the largest measured batch. Raises InfeasiblePlanError when the smallest one is too slow.
    """
    points = sorted(steps_ms)
    if len(points) < 2:
        raise ConfigError("pd.decode_steps_ms needs at least two (batch, milliseconds) points")
    curve = Curve(tuple(float(b) for b, _ in points), tuple(ms / 1e3 for _, ms in points))
    batch = min(curve.inverse(step * (1 + 1e-9)), points[-1][0])
    if batch < points[0][0]:
        raise InfeasiblePlanError(
            f"infeasible: a decode step takes {points[0][1]:g} ms even at batch {points[0][0]:g}, but the SLO of "
            f"{1 / step:g} tokens/s leaves {step * 1e3:.3g} ms; relax pd.slo_tokens_per_s or use faster instances"
        )
    return float(int(batch + 1e-9))
