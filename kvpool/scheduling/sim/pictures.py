"""Pictures of simulations (PNG and SVG)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import BLUE, GREEN, GREY, ORANGE, RED, load_pyplot, save
from ..profiles import GBPS
from .compare import Row
from .metrics import Recorder
from .scenarios import Policy

COLOURS = {Policy.HOMOGENEOUS: GREY, Policy.NAIVE: RED, Policy.STATIC: ORANGE, Policy.FULL: BLUE}


def run_pictures(runs: dict[Policy, Recorder], folder: Path, *, title: str) -> list[Path]:
    """Distributions of TTFT and TPOT over the policies, and each policy's run over time."""
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), gridspec_kw={"wspace": 0.25})
    panels = (("ttft", "TTFT, s", "log"), ("tpot", "TPOT, s", "linear"))
    for ax, (name, label, scale) in zip(axes, panels, strict=True):
        for policy, recorder in runs.items():
            values = np.asarray(getattr(recorder, name))[recorder.first :]
            values = np.sort(values[np.isfinite(values)])
            if len(values):
                thin = values[:: max(len(values) // 2000, 1)]
                ax.plot(thin, np.linspace(0, 1, len(thin)), color=COLOURS[policy], label=policy.value)
        ax.set_xlabel(label)
        ax.set_xscale(scale)
        ax.set_ylabel("share of served requests")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    out = save(figure, folder, "distributions")
    plt.close(figure)
    for policy, recorder in runs.items():
        out += _over_time(plt, recorder, folder, policy, title)
    return out


def _over_time(plt: Any, recorder: Recorder, folder: Path, policy: Policy, title: str) -> list[Path]:
    rows = np.array(recorder.series)
    if not len(rows):
        return []
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 6.5), sharex=True, gridspec_kw={"hspace": 0.15})
    minutes = rows[:, 0] / 60.0
    shown = np.where(np.isfinite(rows[:, 1]), rows[:, 1], np.nan)
    top.plot(minutes, shown / 1e3, color=BLUE)
    top.set_ylabel("t, 1,000 tokens")
    for column, label, colour in ((2, "local prefill", GREEN), (3, "PrfaaS", BLUE), (4, "decode", ORANGE)):
        middle.plot(minutes, rows[:, column], color=colour, lw=0.9, label=label)
    middle.set_ylabel("queued requests")
    middle.legend(frameon=False, fontsize=8, ncols=3)
    bottom.plot(minutes, rows[:, 5] / GBPS, color=BLUE, lw=0.8, label="sent")
    bottom.plot(minutes, rows[:, 6] / GBPS, color=GREY, lw=0.8, label="capacity")
    bottom.set_ylabel("link, Gbps")
    bottom.set_xlabel("minutes")
    bottom.legend(frameon=False, fontsize=8, ncols=2)
    figure.suptitle(f"{policy.value}: {title}", fontsize=10)
    out = save(figure, folder, f"time-{policy.value}")
    plt.close(figure)
    return out


def table_picture(rows: Sequence[Row], folder: Path, *, name: str, title: str) -> list[Path]:
    """TTFT and goodput over load, a line per policy."""
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), gridspec_kw={"wspace": 0.28})
    panels = (
        ("goodput_per_s", "goodput, req/s", "linear"),
        ("ttft_mean_s", "mean TTFT, s", "log"),
        ("ttft_p90_s", "P90 TTFT, s", "log"),
    )
    for ax, (metric, label, scale) in zip(axes, panels, strict=True):
        for policy in dict.fromkeys(r.policy for r in rows):
            mine = [r for r in rows if r.policy is policy and metric in r.estimates]
            ax.errorbar(
                [r.load for r in mine],
                [r.estimates[metric].mean for r in mine],
                yerr=[r.estimates[metric].half or 0.0 for r in mine],
                color=COLOURS[policy],
                marker="o",
                ms=4,
                capsize=2,
                label=policy.value,
            )
        ax.set_xlabel("load / planned capacity")
        ax.set_ylabel(label)
        ax.set_yscale(scale)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    out = save(figure, folder, name)
    plt.close(figure)
    return out
