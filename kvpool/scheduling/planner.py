"""The planner: the best threshold and the best split of prefill and decode instances.

A grid search over (t, N_p), as the paper does, with the crossing of equation 7 then bisected. The same
:func:`best_threshold` is what the router's window solver is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .lengths import Scaled
from .model import (
    Bound,
    InfeasiblePlanError,
    OperatingPoint,
    System,
    limits,
    loads_at,
    operate,
)
from .profiles import GBPS

GRID = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """The optimum, every split considered (by N_p ascending), and remarks on what to trust."""

    best: OperatingPoint
    splits: tuple[OperatingPoint, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Purchase:
    """What one more of something buys: the capacity then, and the gain over now (requests per second)."""

    what: str
    lambda_max: float
    gain: float


def prefill_capacity(system: System, threshold: float, n_p: int) -> tuple[float, float]:
    """(arrival rate the PrfaaS path allows, arrival rate the local prefill allows) at ``threshold``."""
    bounds = limits(system, loads_at(system, threshold), n_p, 0)
    return min(bounds[Bound.PRFAAS_COMPUTE], bounds[Bound.PRFAAS_LINK]), bounds[Bound.PD_PREFILL]


def best_threshold(system: System, n_p: int) -> float:
    """The threshold (tokens) with the largest prefill capacity: equation 7.

    0 when nothing is prefilled locally (``n_p`` is 0), inf when nothing can be offloaded.
    """
    if not system.can_offload:
        return math.inf
    if n_p == 0:
        return 0.0
    lengths = system.workload.lengths
    low, high = lengths.support
    grid = sorted({lengths.quantile(i / GRID) for i in range(GRID + 1)} | {low * (1 - 1e-12), high})

    def gap(t: float) -> float:
        remote, local = prefill_capacity(system, t, n_p)
        if math.isinf(remote) and math.isinf(local):
            return 0.0
        return remote - local

    # Where T is strongly convex the paths need not cross exactly once, so every crossing is a candidate.
    candidates = [0.0, *grid]
    gaps = [gap(t) for t in candidates]
    for i in range(len(candidates) - 1):
        if gaps[i] < 0 < gaps[i + 1] or gaps[i] > 0 > gaps[i + 1]:
            candidates.extend(_bisect(gap, candidates[i], candidates[i + 1], gaps[i]))
    return max(candidates, key=lambda t: (min(prefill_capacity(system, t, n_p)), -t))


def _bisect(f: Callable[[float], float], a: float, b: float, fa: float) -> tuple[float, float]:
    for _ in range(60):
        middle = (a + b) / 2
        if (f(middle) > 0) == (fa > 0):
            a = middle
        else:
            b = middle
        if b - a < 1e-6:
            break
    return a, b


def plan_split(system: System, n_p: int) -> OperatingPoint:
    """The best operating point with exactly ``n_p`` local prefill instances."""
    return operate(system, best_threshold(system, n_p), n_p, system.pd.instances - n_p)


def plan(system: System) -> Plan:
    """The best (t, N_p, N_d). Raises InfeasiblePlanError where nothing can be served, saying why."""
    _refuse_infeasible(system)
    first = 0 if system.can_offload else 1
    splits = tuple(plan_split(system, n_p) for n_p in range(first, system.pd.instances))
    # Between equals (decode binds) the one with more prefill capacity absorbs more variation.
    best = max(
        splits, key=lambda s: (round(s.lambda_max, 9), min(v for b, v in s.limits.items() if b is not Bound.PD_DECODE))
    )
    return Plan(best, splits, _notes(system, best))


def _refuse_infeasible(system: System) -> None:
    pd = system.pd
    if pd.instances == 0:
        raise InfeasiblePlanError(
            "infeasible: the PD cluster has no instance, so nothing can decode; set pd.instances >= 1"
        )
    if pd.batch_max < 1:
        raise InfeasiblePlanError(
            f"infeasible: a decode instance holds {pd.batch_max:g} requests within the SLO ({pd.step * 1e3:.3g} ms a step); "
            "even one request is too slow: relax pd.slo_tokens_per_s or use faster instances"
        )
    if not system.can_offload and pd.instances == 1:
        why = "there is no PrfaaS cluster"
        if system.prfaas is not None:
            why = (
                "the PrfaaS cluster has no instance"
                if not system.prfaas.instances
                else "the PrfaaS link has no bandwidth"
            )
        raise InfeasiblePlanError(
            f"infeasible: one PD instance cannot both prefill and decode, and {why}; add a PD instance or a PrfaaS path"
        )


def _notes(system: System, best: OperatingPoint) -> tuple[str, ...]:
    notes = []
    lengths = system.workload.lengths
    t = math.inf if best.offload_share == 0 else (best.threshold or 0.0)
    uses = [("PD", system.pd.profile, lengths.support[0], min(t, lengths.support[1]))]
    if system.prfaas is not None and best.offload_share > 0:
        uses.append(("PrfaaS", system.prfaas.profile, max(t, lengths.support[0]), lengths.support[1]))
    for cluster, profile, low, high in uses:
        if low >= high:
            continue
        first, last = profile.measured
        mass = lengths.cdf(high) - lengths.cdf(low)
        outside = max(lengths.cdf(min(first, high)) - lengths.cdf(low), 0.0) + max(
            lengths.cdf(high) - lengths.cdf(max(last, low)), 0.0
        )
        if mass > 0 and outside / mass > 0.001:
            notes.append(
                f"{outside / mass:.1%} of the requests prefilled by {cluster} lie outside the lengths its profile was "
                f"measured at ({first:g} to {last:g} tokens) and are extrapolated"
            )
    if not system.can_offload:
        notes.append("nothing can be offloaded: every request is prefilled in the PD cluster")
    elif best.offload_share == 0:
        notes.append("offloading does not pay: the best threshold is beyond the longest request")
    elif best.n_p == 0:
        notes.append("every request is prefilled by PrfaaS: all PD instances decode better than they prefill")
    return tuple(notes)


# -- what would help ----------------------------------------------------------------------------------


def purchases(system: System, *, gbps: float = 10.0) -> tuple[Purchase, ...]:
    """What one more PrfaaS instance, one more PD instance or ``gbps`` more egress would buy."""
    base = plan(system).best.lambda_max
    options: list[tuple[str, System]] = [
        ("one more PD instance", replace(system, pd=replace(system.pd, instances=system.pd.instances + 1)))
    ]
    if system.prfaas is not None:
        prfaas = system.prfaas
        options.append(
            ("one more PrfaaS instance", replace(system, prfaas=replace(prfaas, instances=prfaas.instances + 1)))
        )
        options.append(
            (f"{gbps:g} Gbps more egress", replace(system, prfaas=replace(prfaas, egress=prfaas.egress + gbps * GBPS)))
        )
    out = []
    for what, changed in options:
        capacity = plan(changed).best.lambda_max
        out.append(Purchase(what, capacity, capacity - base))
    return tuple(out)


Perturb = Callable[[System, float], System]


def perturbations(system: System) -> dict[str, Perturb]:
    """Every input of the model by name, each with a function that multiplies it by a factor.

    Instance counts move by whole instances, at least one.
    """

    def count(n: int, factor: float) -> int:
        moved = round(n * factor)
        return max(moved if moved != n or factor == 1.0 else n + (1 if factor > 1 else -1), 0)

    inputs: dict[str, Perturb] = {
        "pd.instances": lambda s, f: replace(s, pd=replace(s.pd, instances=count(s.pd.instances, f))),
        "pd.prefill_seconds": lambda s, f: replace(s, pd=replace(s.pd, profile=s.pd.profile.scaled(seconds=f))),
        "pd.batch_max": lambda s, f: replace(s, pd=replace(s.pd, batch_max=s.pd.batch_max * f)),
        "pd.decode_step": lambda s, f: replace(s, pd=replace(s.pd, step=s.pd.step * f)),
        "workload.lengths": lambda s, f: replace(
            s, workload=replace(s.workload, lengths=Scaled(s.workload.lengths, f))
        ),
        "workload.output_tokens": lambda s, f: replace(
            s, workload=replace(s.workload, output_tokens=s.workload.output_tokens * f)
        ),
    }
    if system.prfaas is not None:

        def prfaas(change: Callable[[float], dict[str, object]]) -> Perturb:
            def apply(s: System, f: float) -> System:
                assert s.prfaas is not None
                return replace(s, prfaas=replace(s.prfaas, **change(f)))  # type: ignore[arg-type]

            return apply

        base = system.prfaas
        inputs |= {
            "prfaas.instances": prfaas(lambda f: {"instances": count(base.instances, f)}),
            "prfaas.prefill_seconds": prfaas(lambda f: {"profile": base.profile.scaled(seconds=f)}),
            "prfaas.kv_bytes": prfaas(lambda f: {"profile": base.profile.scaled(kv=f)}),
            "prfaas.egress": prfaas(lambda f: {"egress": base.egress * f}),
        }
    return inputs


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The optimum after one input moved by +10% and by -10% (None: infeasible then)."""

    name: str
    up: OperatingPoint | None
    down: OperatingPoint | None


def sensitivity(system: System, *, step: float = 0.1) -> tuple[Sensitivity, ...]:
    """Re-plan with each input moved up and down by ``step`` (a fraction)."""

    def attempt(change: Perturb, factor: float) -> OperatingPoint | None:
        try:
            return plan(change(system, factor)).best
        except InfeasiblePlanError:
            return None

    return tuple(
        Sensitivity(name, attempt(change, 1 + step), attempt(change, 1 - step))
        for name, change in perturbations(system).items()
    )
