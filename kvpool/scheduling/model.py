"""The throughput model of PrfaaS: equations 3 to 8 of arXiv 2604.15039.

Everything is one sum per path: the *load* a request of the workload puts on it on average (instance-seconds,
or bytes of egress). A path's capacity in requests per second is its resources over that load, and the
system's is the smallest of them (equation 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from kvtransport.errors import ConfigError

from .lengths import Lengths, mean, partial_expectation
from .profiles import Profile


class InfeasiblePlanError(ConfigError):
    """No split of the given resources serves the workload; the message says which part is missing."""

    code = "infeasible_plan"


class Means(StrEnum):
    """How the time of a class of requests is taken from the profile."""

    AT_MEAN_LENGTH = "at-mean-length"
    """T(E[L]): the paper's equations."""
    EXPECTED = "expected"
    """E[T(L)]: what queues really see; lower capacity where T is convex."""


class Bound(StrEnum):
    """What can limit the throughput."""

    PRFAAS_COMPUTE = "prfaas_compute"
    PRFAAS_LINK = "prfaas_link"
    PD_PREFILL = "pd_prefill"
    PD_DECODE = "pd_decode"


@dataclass(frozen=True, slots=True)
class PrfaasCluster:
    """``instances`` that only prefill, behind ``egress`` bytes per second."""

    instances: int
    profile: Profile
    egress: float

    def __post_init__(self) -> None:
        if self.instances < 0 or not self.egress >= 0:
            raise ConfigError(
                f"PrfaaS cluster: instances and egress must be >= 0, got {self.instances} and {self.egress}"
            )


@dataclass(frozen=True, slots=True)
class PdCluster:
    """``instances`` that prefill or decode; one decodes ``batch_max`` requests at ``step`` seconds a token."""

    instances: int
    profile: Profile
    batch_max: float
    step: float

    def __post_init__(self) -> None:
        if self.instances < 0:
            raise ConfigError(f"PD cluster: instances must be >= 0, got {self.instances}")
        if not self.step > 0 or not self.batch_max >= 0:
            raise ConfigError(
                "PD cluster: a decode step must take > 0 s and a batch hold >= 0 requests, "
                f"got {self.step} and {self.batch_max}"
            )


@dataclass(frozen=True, slots=True)
class Workload:
    """``lengths`` of the uncached prompt part (tokens) and the mean number of output tokens."""

    lengths: Lengths
    output_tokens: float

    def __post_init__(self) -> None:
        if not self.output_tokens > 0:
            raise ConfigError(f"workload: output_tokens must be positive, got {self.output_tokens}")


@dataclass(frozen=True, slots=True)
class System:
    """All inputs of the model. Without ``prfaas`` it is a homogeneous PD cluster."""

    pd: PdCluster
    workload: Workload
    prfaas: PrfaasCluster | None = None
    means: Means = Means.AT_MEAN_LENGTH

    @property
    def can_offload(self) -> bool:
        return self.prfaas is not None and self.prfaas.instances > 0 and self.prfaas.egress > 0


@dataclass(frozen=True, slots=True)
class Loads:
    """What one average request costs when prompts longer than a threshold are offloaded.

    ``prfaas`` and ``pd`` are prefill instance-seconds, ``egress`` bytes on the link, all per request of the
    *whole* workload. ``l_long`` and ``l_short`` are conditional means (None where the class is empty).
    """

    p: float
    l_long: float | None
    l_short: float | None
    prfaas: float
    egress: float
    pd: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One configuration and what it does. Rates are requests per second, None where the part does not exist.

    ``threshold`` is None when there is nothing to choose (no PrfaaS, or no local prefill). TTFT figures are
    prefill latencies without queueing, as the paper's are.
    """

    threshold: float | None
    n_prfaas: int
    n_p: int
    n_d: int
    offload_share: float
    l_long: float | None
    l_short: float | None
    th_prfaas: float | None
    th_pdp: float | None
    th_pdd: float
    lambda_max: float
    egress: float
    ttft_mean: float
    ttft_p90: float
    limits: dict[Bound, float]

    @property
    def binds(self) -> tuple[Bound, ...]:
        """What limits the throughput: every resource exhausted within 1% of it."""
        return tuple(b for b, v in self.limits.items() if v <= self.lambda_max * 1.01)


def loads_at(system: System, threshold: float) -> Loads:
    """Per-request loads when uncached lengths above ``threshold`` tokens go to PrfaaS."""
    lengths = system.workload.lengths
    top = lengths.support[1]
    short_p = lengths.cdf(threshold)
    short_m = lengths.partial_mean(threshold)
    p, long_m = max(1.0 - short_p, 0.0), max(mean(lengths) - short_m, 0.0)
    if p < 1e-12:
        p, long_m, short_p, short_m = 0.0, 0.0, 1.0, mean(lengths)
    l_long = long_m / p if p else None
    l_short = short_m / short_p if short_p else None
    prfaas = egress = 0.0
    if p and system.prfaas is not None:
        remote = system.prfaas.profile
        if system.means is Means.EXPECTED:
            prfaas = partial_expectation(remote.prefill, lengths, top) - partial_expectation(
                remote.prefill, lengths, threshold
            )
            egress = partial_expectation(remote.sizes, lengths, top) - partial_expectation(
                remote.sizes, lengths, threshold
            )
        elif l_long is not None:
            prfaas, egress = p * remote.seconds(l_long), p * remote.kv_bytes(l_long)
    local = system.pd.profile
    if system.means is Means.EXPECTED:
        pd = partial_expectation(local.prefill, lengths, threshold) if short_p else 0.0
    else:
        pd = short_p * local.seconds(l_short) if l_short is not None else 0.0
    return Loads(p, l_long, l_short, prfaas, egress, pd)


def limits(system: System, loads: Loads, n_p: int, n_d: int) -> dict[Bound, float]:
    """The largest arrival rate each resource allows (inf where a request does not use it)."""

    def rate(resource: float, load: float) -> float:
        return resource / load if load > 0 else math.inf

    prfaas = system.prfaas
    return {
        Bound.PRFAAS_COMPUTE: rate(prfaas.instances if prfaas else 0, loads.prfaas) if loads.p else math.inf,
        Bound.PRFAAS_LINK: rate(prfaas.egress if prfaas else 0.0, loads.egress) if loads.p else math.inf,
        Bound.PD_PREFILL: rate(n_p, loads.pd),
        Bound.PD_DECODE: decode_rate(system, n_d),
    }


def decode_rate(system: System, n_d: int) -> float:
    """Th_pdd (equation 5), requests per second."""
    return n_d * system.pd.batch_max / (system.pd.step * system.workload.output_tokens)


def operate(system: System, threshold: float, n_p: int, n_d: int) -> OperatingPoint:
    """The operating point of a given threshold (tokens; 0 offloads all, inf nothing) and split."""
    loads = loads_at(system, threshold)
    bounds = limits(system, loads, n_p, n_d)
    lambda_max = min(bounds.values())
    both = 0.0 < loads.p < 1.0
    mean_s, p90 = prefill_latency(system, threshold)
    return OperatingPoint(
        threshold=threshold if both else None,
        n_prfaas=system.prfaas.instances if system.prfaas else 0,
        n_p=n_p,
        n_d=n_d,
        offload_share=loads.p,
        l_long=loads.l_long,
        l_short=loads.l_short,
        th_prfaas=min(bounds[Bound.PRFAAS_COMPUTE], bounds[Bound.PRFAAS_LINK]) * loads.p if loads.p else None,
        th_pdp=bounds[Bound.PD_PREFILL] * (1.0 - loads.p) if loads.p < 1.0 else None,
        th_pdd=bounds[Bound.PD_DECODE],
        lambda_max=lambda_max,
        egress=lambda_max * loads.egress,
        ttft_mean=mean_s,
        ttft_p90=p90,
        limits=bounds,
    )


def prefill_latency(system: System, threshold: float, quantile: float = 0.9) -> tuple[float, float]:
    """Mean and quantile of the prefill time over both paths, seconds, without queueing."""
    lengths = system.workload.lengths
    top = lengths.support[1]
    local, remote = system.pd.profile.prefill, (system.prfaas.profile.prefill if system.prfaas else None)
    average = partial_expectation(local, lengths, min(threshold, top)) if lengths.cdf(threshold) > 0 else 0.0
    highest = local.at(min(threshold, top))
    if remote is not None and lengths.cdf(threshold) < 1.0:
        average += partial_expectation(remote, lengths, top) - partial_expectation(remote, lengths, threshold)
        highest = max(highest, remote.at(top))

    def below(seconds: float) -> float:
        share = lengths.cdf(min(local.inverse(seconds), threshold))
        if remote is not None:
            share += max(lengths.cdf(remote.inverse(seconds)) - lengths.cdf(threshold), 0.0)
        return share

    low, high = 0.0, highest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if below(middle) >= quantile else (middle, high)
    return average, high
