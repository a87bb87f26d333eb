"""Pictures of replays (PNG and SVG); needs the ``bench`` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.scheduling.plots import BLUE, GREEN, GREY, ORANGE, RED, load_pyplot, save

from .run import Outcome

COLOURS = {"marconi": BLUE, "lru": ORANGE, "gdsf": GREEN, "s3fifo": RED, "sieve": "#8a5fa8", "clairvoyant": GREY}
GIB = float(1 << 30)
SMOOTH = 9
"""Samples that one point of the hit rate is the mean of."""


def timeline_picture(outcomes: Sequence[Outcome], folder: Path, *, name: str = "replay") -> list[Path]:
    """Bytes by group (of the first outcome) and hit rate over time (of all); the files written."""
    plt = load_pyplot()
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.2, 5.6), sharex=True)
    shown = outcomes[0]
    times = np.array([s.at for s in shown.timeline]) / 60
    groups = list(shown.peak_bytes)
    held = np.array([[s.group_bytes.get(g, 0) for s in shown.timeline] for g in groups]) / GIB
    above.stackplot(times, held, labels=groups, alpha=0.85)
    if shown.memory_bytes is not None:
        above.axhline(shown.memory_bytes / GIB, color=GREY, linewidth=1, linestyle="--", label="memory")
    above.set_ylabel("GiB held")
    above.set_title(f"{shown.layout}, {shown.policy}", fontsize=10)
    above.legend(fontsize=8, loc="upper left")
    for outcome in outcomes:
        rate = np.array([s.token_hit_rate for s in outcome.timeline])
        window = min(SMOOTH, len(rate))
        smooth = np.convolve(rate, np.ones(window) / window, mode="valid")
        at = np.array([s.at for s in outcome.timeline])[window - 1 :] / 60
        below.plot(at, 100 * smooth, label=outcome.policy, color=COLOURS.get(outcome.policy), linewidth=1.4)
    below.set_ylabel("input tokens hit, %")
    below.set_xlabel("minutes of the trace")
    below.set_ylim(bottom=0)
    below.legend(fontsize=8)
    figure.tight_layout()
    out = save(figure, folder, name)
    plt.close(figure)
    return out


def sweep_picture(rows: Sequence[dict[str, Any]], folder: Path, *, name: str = "caching") -> list[Path]:
    """Token hit rate over memory, a panel per layout; the files written."""
    plt = load_pyplot()
    layouts = list(dict.fromkeys(r["layout"] for r in rows))
    columns = 2 if len(layouts) > 1 else 1
    lines = -(-len(layouts) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), sharey=True, squeeze=False)
    for ax, layout in zip(axes.flat, layouts, strict=False):
        own = [r for r in rows if r["layout"] == layout]
        for policy in dict.fromkeys(r["policy"] for r in own):
            points = [(100 * r["memory_share"], 100 * r["token_hit_rate"]) for r in own if r["policy"] == policy]
            kind = next((r["kind"] for r in own if r["policy"] == policy and "kind" in r), "")
            style = "--" if policy == "clairvoyant" else "-"
            label = f"{policy} ({kind})" if kind else policy
            ax.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=label, color=COLOURS.get(policy))
        ax.set_xscale("log")
        ticks = sorted({100 * r["memory_share"] for r in own})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_title(layout, fontsize=10)
        ax.set_xlabel("memory, % of the working set")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7, loc="lower right")
    for ax in list(axes.flat)[len(layouts) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel("input tokens hit, %")
    figure.tight_layout()
    out = save(figure, folder, name)
    plt.close(figure)
    return out
