"""Pictures of plans (PNG and SVG). matplotlib is an extra and is imported only here, when a picture is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtransport.errors import ConfigError

from .model import Bound, System, operate
from .planner import Plan, plan
from .profiles import GBPS, KvThroughput, cluster_egress, published_kv_throughput

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9822b", "#2b8a57", "#b3362b", "#7a7a7a"


def load_pyplot() -> Any:
    """matplotlib's pyplot on a file backend. Raises ConfigError when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'kvtransport[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "svg.hashsalt": "kvpool",
            "figure.dpi": 110,
        }
    )
    return pyplot


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write one figure as PNG and SVG (without dates, so that the same data gives the same file)."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        path = folder / (name + suffix)
        figure.savefig(path, bbox_inches="tight", metadata=metadata)
        out.append(path)
    return out


def plan_pictures(system: System, planned: Plan, folder: Path, *, title: str = "") -> list[Path]:
    """All pictures of a plan; returns the files written."""
    plt = load_pyplot()
    drawings: list[tuple[str, Callable[[Any], Any]]] = [("capacity-over-split", lambda p: _over_split(p, planned))]
    if planned.best.threshold is not None:
        drawings.append(("capacity-over-threshold", lambda p: _over_threshold(p, system, planned)))
    if system.prfaas is not None:
        drawings.append(("capacity-over-bandwidth", lambda p: _over_bandwidth(p, system)))
    drawings.append(("hybrid-against-dense", lambda p: _hybrid_dense(p, published_kv_throughput())))
    out = []
    for name, draw in drawings:
        figure = draw(plt)
        if title:
            figure.suptitle(title, fontsize=9, color=GREY)
        out += save(figure, folder, name)
        plt.close(figure)
    return out


def _over_split(plt: Any, planned: Plan) -> Any:
    figure, ax = plt.subplots(figsize=(6.4, 4.0))
    x = np.arange(len(planned.splits))
    series: list[tuple[str, list[float], str]] = [
        ("prefill: Th_prfaas + Th_pdp", [(s.th_prfaas or 0) + (s.th_pdp or 0) for s in planned.splits], BLUE),
        ("decode: Th_pdd", [s.th_pdd for s in planned.splits], ORANGE),
    ]
    for label, values, colour in series:
        ax.plot(x, values, "--", color=colour, label=label)
    ax.plot(x, [s.lambda_max for s in planned.splits], "o-", color="black", label="Lambda_max")
    best = planned.splits.index(planned.best)
    ax.annotate(
        f"{planned.best.lambda_max:.2f} req/s",
        (best, planned.best.lambda_max),
        textcoords="offset points",
        xytext=(0, -18),
        ha="center",
    )
    ax.set_xticks(x, [f"{s.n_p}/{s.n_d}" for s in planned.splits])
    ax.set_xlabel("N_p / N_d")
    ax.set_ylabel("requests per second")
    ax.set_ylim(bottom=0)
    ax.set_title("Capacity over the split of the PD cluster, t optimal for each")
    ax.legend(frameon=False)
    return figure


def _over_threshold(plt: Any, system: System, planned: Plan) -> Any:
    figure, ax = plt.subplots(figsize=(6.4, 4.0))
    best = planned.best
    assert best.threshold is not None
    low, high = system.workload.lengths.support
    ts = np.geomspace(max(low, best.threshold / 20, 64), min(high * 0.999, best.threshold * 6), 200)
    points = [operate(system, float(t), best.n_p, best.n_d) for t in ts]
    paths = {
        "PrfaaS path: Th_prfaas / p": (
            [min(p.limits[Bound.PRFAAS_COMPUTE], p.limits[Bound.PRFAAS_LINK]) for p in points],
            BLUE,
        ),
        "local prefill: Th_pdp / (1 - p)": ([p.limits[Bound.PD_PREFILL] for p in points], GREEN),
        "decode: Th_pdd": ([p.th_pdd for p in points], ORANGE),
    }
    for label, (values, colour) in paths.items():
        ax.plot(ts, values, "--", color=colour, label=label)
    ax.plot(ts, [p.lambda_max for p in points], color="black", lw=2, label="Lambda")
    ax.axvline(best.threshold, color=GREY, lw=0.8)
    ax.annotate(f"t = {best.threshold:,.0f}", (best.threshold, 0), textcoords="offset points", xytext=(4, 6))
    ax.set_xscale("log")
    ax.set_ylim(0, max(best.lambda_max, best.th_pdd) * 1.8)
    ax.set_xlabel("threshold t, tokens")
    ax.set_ylabel("requests per second")
    ax.set_title(f"Capacity over the threshold at N_p/N_d = {best.n_p}/{best.n_d}")
    ax.legend(frameon=False, loc="upper left")
    return figure


def _over_bandwidth(plt: Any, system: System) -> Any:
    assert system.prfaas is not None
    figure, ax = plt.subplots(figsize=(6.4, 4.0))
    gbps = np.geomspace(0.5, 1000, 45)
    dense = next(r for r in published_kv_throughput() if r.preset == "minimax-m2.5").profile().sizes
    prfaas = system.prfaas
    variants = [
        (system, "this system's KVCache", BLUE),
        (
            replace(system, prfaas=replace(prfaas, profile=prfaas.profile.with_kv(dense))),
            "the same, with a dense KVCache (sizes of MiniMax-M2.5)",
            RED,
        ),
    ]
    for variant, label, colour in variants:
        assert variant.prfaas is not None
        y = [plan(replace(variant, prfaas=replace(variant.prfaas, egress=b * GBPS))).best.lambda_max for b in gbps]
        ax.plot(gbps, y, color=colour, label=label, lw=2)
    ax.axvline(prfaas.egress / GBPS, color=GREY, lw=0.8)
    ax.annotate(
        f"{prfaas.egress / GBPS:g} Gbps",
        (prfaas.egress / GBPS, 0.35),
        textcoords="offset points",
        xytext=(4, 6),
        color=GREY,
    )
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("egress bandwidth of the PrfaaS cluster, Gbps")
    ax.set_ylabel("Lambda_max, requests per second")
    ax.set_title("Capacity against link bandwidth, re-planned at every point")
    ax.legend(frameon=False, loc="lower right")
    return figure


def _hybrid_dense(plt: Any, rows: tuple[KvThroughput, ...]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), gridspec_kw={"wspace": 0.35})
    shades = {"hybrid": plt.get_cmap("Blues"), "dense": plt.get_cmap("Reds")}
    seen = {"hybrid": 0, "dense": 0}
    for row in rows:
        colour = shades[row.kind](0.45 + 0.12 * seen[row.kind] if row.kind == "hybrid" else 0.55 + 0.25 * seen["dense"])
        seen[row.kind] += 1
        style = "o-" if row.kind == "hybrid" else "s-"
        left.plot(
            [n / 1024 for n in row.lengths], [b / GBPS for b in row.bytes_per_s], style, color=colour, label=row.model
        )
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks([1, 8, 32, 128], ["1K", "8K", "32K", "128K"])
    left.set_xlabel("prompt length, tokens")
    left.set_ylabel("KV throughput of one 8xH200 instance, Gbps")
    left.set_title("Phi_kv: hybrid (blue), dense (red)")
    left.set_ylim(top=400)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    needs = sorted(((cluster_egress(r.at(32 * 1024), 512, 8) / GBPS, r) for r in rows), key=lambda item: item[0])
    y = np.arange(len(needs))
    right.barh(y, [v for v, _ in needs], color=[BLUE if r.kind == "hybrid" else RED for _, r in needs])
    for i, (value, _) in enumerate(needs):
        text = f"{value:,.0f} Gbps" if value < 1000 else f"{value / 1000:.1f} Tbps"
        right.annotate(text, (value, i), textcoords="offset points", xytext=(4, -3), fontsize=8)
    right.set_yticks(y, [r.model for _, r in needs])
    right.set_xscale("log")
    right.set_xlim(10, 10 ** math.ceil(math.log10(needs[-1][0] * 2)))
    right.set_xlabel("egress of 512 H200 at 32K tokens, Gbps")
    right.set_title("B = N/P x Phi_kv")
    return figure
