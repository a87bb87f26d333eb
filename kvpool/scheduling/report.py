"""What ``kvpool plan`` says: the figures of each configuration, their labels, and published ones beside them.

A label is not written down anywhere: an output is *derived* when moving an input that was itself derived from
results moves it, and a *prediction* when only genuine inputs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from .config import Case
from .model import OperatingPoint, System
from .planner import Plan, Purchase, Sensitivity, perturbations, plan, plan_split
from .profiles import GBPS, Label

Figures = dict[str, float | int | None]

COLUMNS = ("prfaas_pd", "homogeneous_pd", "naive_heterogeneous")
TITLES = {
    "prfaas_pd": "PrfaaS-PD",
    "homogeneous_pd": "homogeneous PD",
    "naive_heterogeneous": "naive heterogeneous",
    "ratios": "ratios",
}
ROWS: dict[str, str] = {
    "threshold_tokens": "threshold t, tokens",
    "n_prfaas": "N_prfaas",
    "n_p": "N_p",
    "n_d": "N_d",
    "offload_share": "offloaded share p",
    "th_prfaas": "Th_prfaas, req/s",
    "th_pdp": "Th_pdp, req/s",
    "th_pdd": "Th_pdd, req/s",
    "lambda_max": "Lambda_max, req/s",
    "egress_gbps": "mean egress, Gbps",
    "ttft_mean_s": "TTFT mean, s (no queueing)",
    "ttft_p90_s": "TTFT P90, s (no queueing)",
    "prfaas_over_homogeneous": "Lambda against homogeneous",
    "prfaas_over_naive": "Lambda against naive",
    "naive_over_homogeneous": "Lambda of naive against homogeneous",
    "ttft_mean_change": "TTFT mean against homogeneous",
    "ttft_p90_change": "TTFT P90 against homogeneous",
    "equal_cost_gain": "throughput at equal cost",
}


def figures(point: OperatingPoint) -> Figures:
    """One configuration's figures by name; None where the configuration has none."""
    offloads = point.offload_share > 0
    return {
        "threshold_tokens": point.threshold,
        "n_prfaas": point.n_prfaas or None,
        "n_p": point.n_p or None,
        "n_d": point.n_d,
        "offload_share": point.offload_share if point.n_prfaas else None,
        "th_prfaas": point.th_prfaas,
        "th_pdp": point.th_pdp,
        "th_pdd": point.th_pdd,
        "lambda_max": point.lambda_max,
        "egress_gbps": point.egress / GBPS if offloads else None,
        "ttft_mean_s": point.ttft_mean,
        "ttft_p90_s": point.ttft_p90,
    }


@dataclass(frozen=True)
class Comparison:
    """The plan and the two clusters it is compared with; None where the case has no such cluster."""

    plan: Plan
    homogeneous: OperatingPoint | None
    naive: OperatingPoint | None
    figures: dict[str, Figures]
    """By configuration (COLUMNS) and under "ratios"."""


def compare(case: Case) -> Comparison:
    """Plan the case and its baselines."""
    planned = plan(case.system)
    homogeneous = plan(case.homogeneous).best if case.homogeneous is not None else None
    naive = plan_split(case.system, 0) if case.system.can_offload else None
    table: dict[str, Figures] = {"prfaas_pd": figures(planned.best)}
    if homogeneous is not None:
        table["homogeneous_pd"] = figures(homogeneous)
    if naive is not None:
        table["naive_heterogeneous"] = figures(naive)
    table["ratios"] = _ratios(case, planned.best, homogeneous, naive)
    return Comparison(planned, homogeneous, naive, table)


def _ratios(case: Case, best: OperatingPoint, alone: OperatingPoint | None, naive: OperatingPoint | None) -> Figures:
    out: Figures = dict.fromkeys((k for k in ROWS if k not in figures(best)), None)
    if naive is not None:
        out["prfaas_over_naive"] = best.lambda_max / naive.lambda_max
    if alone is None:
        return out
    out["prfaas_over_homogeneous"] = best.lambda_max / alone.lambda_max
    if naive is not None:
        out["naive_over_homogeneous"] = naive.lambda_max / alone.lambda_max
    out["ttft_mean_change"] = best.ttft_mean / alone.ttft_mean - 1
    out["ttft_p90_change"] = best.ttft_p90 / alone.ttft_p90 - 1
    prfaas_price, pd_price = case.prices
    if prfaas_price > 0 and pd_price > 0:
        cost = best.n_prfaas * prfaas_price + (best.n_p + best.n_d) * pd_price
        cost_alone = (alone.n_p + alone.n_d) * pd_price
        out["equal_cost_gain"] = (best.lambda_max / cost) / (alone.lambda_max / cost_alone) - 1
    return out


# -- labels -------------------------------------------------------------------------------------------

_INPUTS_OF = {
    "pd.profile": ("pd.prefill_seconds",),
    "prfaas.profile": ("prfaas.prefill_seconds", "prfaas.kv_bytes"),
}


def labels(case: Case, comparison: Comparison) -> dict[str, dict[str, Label]]:
    """The label of every figure of :func:`compare`."""
    out: dict[str, dict[str, Label]] = {
        column: dict.fromkeys((k for k, v in rows.items() if v is not None), Label.PREDICTION)
        for column, rows in comparison.figures.items()
    }
    for moved in _moved_cases(case):
        after = compare(moved).figures
        for column, rows in out.items():
            for key in rows:
                before_value, after_value = comparison.figures[column][key], after.get(column, {}).get(key)
                if (
                    after_value is None
                    or before_value is None
                    or abs(after_value - before_value) > 1e-6 * abs(before_value)
                ):
                    rows[key] = Label.DERIVED
    for rows in out.values():
        if "n_prfaas" in rows:
            rows["n_prfaas"] = Label.INPUT
    naive = out.get("naive_heterogeneous", {})
    if "n_d" in naive:
        naive["n_d"] = Label.INPUT
    if "offload_share" in naive:
        naive["offload_share"] = Label.INPUT
    return out


def _moved_cases(case: Case) -> Iterator[Case]:
    """The case with each derived input moved; far enough that whole instances move too."""
    for key, label in case.labels.items():
        if label is not Label.DERIVED:
            continue
        for factor in (0.5, 0.9, 1.1, 2.0):
            if key == "prices":
                yield replace(case, prices=(case.prices[0] * factor, case.prices[1]))
                continue
            for name in _INPUTS_OF.get(key, (key,)):
                yield move(case, name, factor)


def move(case: Case, name: str, factor: float) -> Case:
    """The case with one input of ``planner.perturbations`` multiplied by ``factor``, in the baselines as well."""

    def moved(system: System) -> System:
        changes = perturbations(system)
        return changes[name](system, factor) if name in changes else system

    alone = case.homogeneous
    if alone is not None and name != "pd.instances":
        alone = moved(alone)
    return replace(case, system=moved(case.system), homogeneous=alone)


# -- output -------------------------------------------------------------------------------------------


def deviation(value: float | None, published: float | None) -> float | None:
    """Relative difference from a published figure."""
    if value is None or published is None or published == 0:
        return None
    return value / published - 1


def as_json(
    case: Case,
    comparison: Comparison,
    sensitivities: tuple[Sensitivity, ...] = (),
    bought: tuple[Purchase, ...] = (),
) -> dict[str, Any]:
    """The object ``kvpool plan --json`` writes; seconds, tokens, requests per second, Gbps of 1e9 bits."""
    marks = labels(case, comparison)
    out: dict[str, Any] = {"title": case.title}
    for column in COLUMNS:
        out[column] = comparison.figures.get(column)
    out["ratios"] = comparison.figures["ratios"]
    out["labels"] = {c: {k: str(v) for k, v in rows.items()} for c, rows in marks.items()}
    out["published"] = case.published
    out["deviations"] = {
        c: {k: deviation(comparison.figures.get(c, {}).get(k), v) for k, v in rows.items()}
        for c, rows in case.published.items()
    }
    out["binds"] = [str(b) for b in comparison.plan.best.binds]
    out["notes"] = list(comparison.plan.notes)
    out["splits"] = [figures(s) for s in comparison.plan.splits]
    out["sensitivity"] = {
        s.name: {
            direction: None if point is None else figures(point)
            for direction, point in (("plus_10_percent", s.up), ("minus_10_percent", s.down))
        }
        for s in sensitivities
    }
    out["one_more"] = [{"what": p.what, "lambda_max": p.lambda_max, "gain": p.gain} for p in bought]
    return out


def show(key: str, value: float | int | None) -> str:
    """One figure as a reader wants it."""
    if value is None:
        return "-"
    if key == "threshold_tokens":
        return f"{value:,.0f}"
    if key.startswith("n_"):
        return f"{value:.0f}"
    if key.endswith("_change") or key == "equal_cost_gain":
        return f"{value:+.1%}"
    if key == "offload_share":
        return f"{value:.3f}"
    return f"{value:.2f}" + ("x" if "_over_" in key else "")


def print_comparison(console: Console, case: Case, comparison: Comparison) -> None:
    """The three-column table as sections, published figures beside planned ones."""
    marks = labels(case, comparison)
    table = Table(title=case.title or "plan", title_justify="left")
    names = ["figure", "published", "plan", "deviation", "label"]
    shown = [i for i, name in enumerate(names) if case.published or name not in ("published", "deviation")]
    for name in (names[i] for i in shown):
        table.add_column(name, justify="left" if name in ("figure", "label") else "right")
    for column in (*COLUMNS, "ratios"):
        rows = comparison.figures.get(column)
        if rows is None or all(v is None for v in rows.values()):
            continue
        table.add_section()
        table.add_row(f"[bold]{TITLES[column]}")
        printed: Mapping[str, float] = case.published.get(column, {})
        for key, value in rows.items():
            known = printed.get(key)
            off = deviation(value, known)
            if key.endswith("_change") or key == "equal_cost_gain":
                gap = "-" if value is None or known is None else f"{100 * (value - known):+.1f} points"
            else:
                gap = "-" if off is None else f"{off:+.1%}"
            cells = [ROWS[key], show(key, known), show(key, value), gap, str(marks[column].get(key, "-"))]
            table.add_row(*(cells[i] for i in shown))
    console.print(table)
    console.print("limits: " + ", ".join(f"{b}" for b in comparison.plan.best.binds))
    for note in comparison.plan.notes:
        console.print(f"note: {note}")
    for key, label in case.labels.items():
        if label is Label.DERIVED:
            console.print(f"note: {key} is itself derived from results: what rests on it is a consistency check")


def print_splits(console: Console, planned: Plan) -> None:
    """Every split of the PD cluster, the best one marked."""
    table = Table(title="splits of the PD cluster", title_justify="left")
    for name in ("N_p/N_d", "t", "p", "Th_prfaas", "Th_pdp", "Th_pdd", "Lambda_max", "limited by"):
        table.add_column(name, justify="right" if name != "limited by" else "left")
    for point in planned.splits:
        mark = "[bold]" if point is planned.best else ""
        f = figures(point)
        cells = [
            show(k, f[k]) for k in ("threshold_tokens", "offload_share", "th_prfaas", "th_pdp", "th_pdd", "lambda_max")
        ]
        table.add_row(*(mark + c for c in (f"{point.n_p}/{point.n_d}", *cells, ", ".join(point.binds))))
    console.print(table)


def print_sensitivity(
    console: Console, planned: Plan, rows: tuple[Sensitivity, ...], bought: tuple[Purchase, ...]
) -> None:
    """What moves the capacity, and what one more of each resource would buy."""
    base = planned.best.lambda_max
    table = Table(title="capacity when an input moves (re-planned)", title_justify="left")
    for name in ("input", "+10%", "-10%", "t at +10%", "N_p/N_d at +10%"):
        table.add_column(name, justify="right" if name != "input" else "left")
    for row in rows:
        cells = [
            "infeasible" if p is None else f"{p.lambda_max:.2f} ({p.lambda_max / base - 1:+.1%})"
            for p in (row.up, row.down)
        ]
        up = row.up
        table.add_row(
            row.name,
            *cells,
            "-" if up is None else show("threshold_tokens", up.threshold),
            "-" if up is None else f"{up.n_p}/{up.n_d}",
        )
    console.print(table)
    for purchase in bought:
        gain = (
            f"+{purchase.gain:.2f} req/s ({purchase.gain / base:+.1%})"
            if purchase.gain > 1e-9
            else "nothing: it does not bind"
        )
        console.print(f"{purchase.what} buys {gain}")
