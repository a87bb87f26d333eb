"""The table ``kvpool simulate`` prints, and its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .compare import Estimate, Row, losses
from .scenarios import Policy, Scenario

COLUMNS = {
    "throughput_per_s": "served/s",
    "goodput_per_s": "in SLO/s",
    "shed_share": "shed",
    "ttft_mean_s": "TTFT mean",
    "ttft_p90_s": "P90",
    "ttft_p99_s": "P99",
    "offload_share": "offloaded",
    "hit_rate": "hits",
    "link_utilisation": "link",
}
SHARES = {"shed_share", "offload_share", "hit_rate", "link_utilisation"}


def cell(metric: str, estimate: Estimate | None) -> str:
    """A mean with its noise, as a reader wants it."""
    if estimate is None:
        return "-"
    if metric in SHARES:
        return f"{estimate.mean:.0%}"
    digits = 2 if estimate.mean < 100 else 0
    noise = f" ±{estimate.half:.{digits}f}" if estimate.half is not None else ""
    return f"{estimate.mean:.{digits}f}{noise}"


def print_rows(console: Console, scenario: Scenario, rows: Sequence[Row], *, requests: int, seeds: int) -> None:
    reference = scenario.reference
    rate = "" if len(rows) > 1 else f", {rows[0].load * reference.lambda_max:.2f} req/s"
    table = Table(
        title=f"{scenario.name}: {scenario.spec.title} (planned capacity {reference.lambda_max:.2f} req/s{rate}; "
        f"{requests:,} requests, {seeds} seed{'s' if seeds > 1 else ''})",
        title_justify="left",
    )
    for name in ("load", "policy"):
        table.add_column(name, justify="right" if name == "load" else "left", no_wrap=True)
    for name in COLUMNS.values():
        table.add_column(name, justify="right")
    load = None
    for row in rows:
        if load is not None and row.load != load:
            table.add_section()
        load = row.load
        cells = [cell(metric, row.estimates.get(metric)) for metric in COLUMNS]
        table.add_row(f"{row.load:.2f}", row.policy.value, *cells)
    console.print(table)
    for row in rows:
        for run in row.runs[:1]:
            for change in run["conversions"]:
                console.print(f"load {row.load:.2f}, {row.policy.value}, at {change['at_s']:.0f} s: {change['reason']}")
    if len({r.policy for r in rows}) > 1 and any(r.policy is Policy.FULL for r in rows):
        found = losses(rows, Policy.FULL)
        for loss in found:
            console.print(
                f"full-prfaas is worse than {loss.other.value} at load {loss.load:.2f} in {loss.metric}: "
                f"{loss.difference.mean:+.3f} (±{loss.difference.half or 0:.3f})"
            )
        if not found:
            console.print("full-prfaas is nowhere worse than another policy beyond noise and 2%")


def as_json(scenario: Scenario, rows: Sequence[Row], *, requests: int, first_seed: int, seeds: int) -> dict[str, Any]:
    """The object ``kvpool simulate --json`` writes; times in seconds, rates per second."""
    best = scenario.reference
    return {
        "scenario": scenario.name,
        "title": scenario.spec.title,
        "requests": requests,
        "seeds": list(range(first_seed, first_seed + seeds)),
        "reference": {
            "capacity_per_s": best.lambda_max,
            "threshold_tokens": best.threshold,
            "n_prfaas": best.n_prfaas,
            "n_p": best.n_p,
            "n_d": best.n_d,
        },
        "slo": {"ttft_s": scenario.spec.slo_ttft_s, "tpot_s": scenario.system.pd.step},
        "results": [
            {
                "policy": row.policy.value,
                "load": row.load,
                "rate_per_s": row.load * best.lambda_max,
                "estimates": {k: {"mean": e.mean, "half_width_95": e.half} for k, e in row.estimates.items()},
                "runs": list(row.runs),
            }
            for row in rows
        ],
        "full_prfaas_worse_than": [
            {
                "policy": loss.other.value,
                "load": loss.load,
                "metric": loss.metric,
                "difference": loss.difference.mean,
                "half_width_95": loss.difference.half,
            }
            for loss in losses(rows, Policy.FULL)
        ],
    }
