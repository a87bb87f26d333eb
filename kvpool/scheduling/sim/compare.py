"""Several policies, loads and seeds beside each other, and whether a difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtransport.errors import ConfigError

from .metrics import Recorder
from .scenarios import Policy, Scenario, simulate
from .theory import student_t

METRICS: dict[str, tuple[str, ...]] = {
    "throughput_per_s": ("throughput_per_s",),
    "goodput_per_s": ("goodput_per_s",),
    "shed_share": ("shed_share",),
    "ttft_mean_s": ("ttft_s", "mean"),
    "ttft_p90_s": ("ttft_s", "p90"),
    "ttft_p99_s": ("ttft_s", "p99"),
    "tpot_p99_s": ("tpot_s", "p99"),
    "offload_share": ("offload_share",),
    "hit_rate": ("hit_rate",),
    "link_utilisation": ("utilisation", "link"),
}
"""Name -> where it stands in a run's summary."""

BETTER = {"goodput_per_s": 1.0, "ttft_mean_s": -1.0, "ttft_p90_s": -1.0}
"""What policies are judged by, and which direction is better."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over seeds and half the width of its 95% confidence interval (None with one seed)."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        n = len(values)
        average = math.fsum(values) / n
        if n < 2:
            return cls(average, None)
        spread = math.sqrt(math.fsum((v - average) ** 2 for v in values) / (n - 1) / n)
        return cls(average, student_t(n - 1) * spread)


@dataclass(frozen=True)
class Row:
    """One policy at one load: estimates by metric, and the single runs' summaries."""

    policy: Policy
    load: float
    estimates: dict[str, Estimate]
    runs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Loss:
    """A metric in which the judged policy is worse than another by more than the paired noise."""

    load: float
    other: Policy
    metric: str
    difference: Estimate


def compare_policies(
    scenario: Scenario,
    policies: Sequence[Policy],
    loads: Sequence[float],
    seeds: Sequence[int],
    *,
    requests: int,
    progress: Callable[[float], None] | None = None,
    keep: Callable[[Policy, float, int, Recorder], None] | None = None,
    rebalance: bool = True,
) -> tuple[Row, ...]:
    """Run every combination; the same seed means the same requests for every policy.

    ``progress`` gets the part done, 0 to 1; ``keep`` sees every finished run.
    """
    if not policies or not loads or not seeds:
        raise ConfigError("a comparison needs at least one policy, one load and one seed")
    rows = []
    total = len(policies) * len(loads) * len(seeds)
    count = 0
    for load in loads:
        for policy in policies:
            summaries = []
            for seed in seeds:
                report = None
                if progress is not None:
                    base, update = count, progress

                    def report(i: int, n: int, base: int = base, update: Callable[[float], None] = update) -> None:
                        update((base + i / n) / total)

                recorder, _ = simulate(
                    scenario, policy, load=load, requests=requests, seed=seed, rebalance=rebalance, progress=report
                )
                count += 1
                if keep is not None:
                    keep(policy, load, seed, recorder)
                summaries.append(summarise(scenario, recorder))
            estimates = {name: _estimate(summaries, path) for name, path in METRICS.items()}
            rows.append(Row(policy, load, {k: v for k, v in estimates.items() if v is not None}, tuple(summaries)))
    return tuple(rows)


def summarise(scenario: Scenario, recorder: Recorder) -> dict[str, Any]:
    """A run's summary under the scenario's limits."""
    # One percent over the step: a batch that is full all the time takes exactly one step a token.
    return recorder.summary(slo_tpot=scenario.system.pd.step * 1.01, slo_ttft=scenario.spec.slo_ttft_s)


def _value(summary: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = summary
    for key in path:
        value = None if value is None else value[key]
    return None if value is None else float(value)


def _estimate(summaries: Sequence[dict[str, Any]], path: tuple[str, ...]) -> Estimate | None:
    values = [_value(s, path) for s in summaries]
    known = [v for v in values if v is not None]
    return Estimate.of(known) if len(known) == len(values) else None


def losses(rows: Sequence[Row], judged: Policy, *, tolerance: float = 0.02) -> tuple[Loss, ...]:
    """Where ``judged`` is worse than another policy by more than ``tolerance`` of the value and more than the noise.

    Differences are paired by seed. With one seed the tolerance alone decides.
    """
    out = []
    for row in rows:
        if row.policy is judged:
            continue
        mine = next((r for r in rows if r.policy is judged and r.load == row.load), None)
        if mine is None:
            continue
        for metric, sign in BETTER.items():
            pairs = [
                (_value(a, METRICS[metric]), _value(b, METRICS[metric]))
                for a, b in zip(mine.runs, row.runs, strict=True)
            ]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if not known:
                continue
            difference = Estimate.of([sign * (a - b) for a, b in known])
            scale = abs(math.fsum(b for _, b in known) / len(known))
            if difference.mean < -tolerance * scale and difference.mean + (difference.half or 0.0) < 0:
                out.append(Loss(row.load, row.policy, metric, difference))
    return tuple(out)
