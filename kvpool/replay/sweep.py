"""Policies x memory x layouts over one trace, each run in a process of its own: the table of docs/caching.md."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from kvpool.scheduling.traces import Trace
from kvtransport.layout import CacheLayout, GroupKind

from .accounting import page_bytes_for
from .clairvoyant import clairvoyant
from .run import Replay, folded, working_set_bytes

LAYOUTS = ("kimi-linear-48b", "qwen3.5-397b", "mimo-v2-flash", "qwen3-235b")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Memory as shares of the working set: what an unlimited pool ends up holding."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run, as processes pass it."""

    trace: Trace
    layout: CacheLayout
    name: str
    policy: str
    share: float
    memory_bytes: int
    first: int
    block_tokens: int | None


def blocks_in(layout: CacheLayout, memory_bytes: int, block_tokens: int) -> int:
    """Full-attention blocks of ``block_tokens`` that fit, in the pages the replay counts in."""
    slim = folded(layout)
    page = page_bytes_for(min(g.unit_bytes for g in slim.groups if g.kind is not GroupKind.RECURRENT) * block_tokens)
    full = sum(-(-g.unit_bytes * block_tokens // page) for g in slim.groups if g.kind is GroupKind.FULL)
    return memory_bytes // page // full


def is_exact(layout: CacheLayout) -> bool:
    """Whether prefixes can be restored where states or windows are only."""
    return any(g.kind is not GroupKind.FULL for g in layout.groups)


def _working_set(trace: Trace, layout: CacheLayout, block_tokens: int | None) -> int:
    return working_set_bytes(trace, layout, block_tokens)


def _run(job: Job) -> dict[str, Any]:
    replay = Replay(
        job.trace, job.layout, memory_bytes=job.memory_bytes, policy=job.policy, block_tokens=job.block_tokens
    )
    body = replay.run(job.first).as_dict()
    return {**body, "layout": job.name, "memory_share": job.share}


def _best(job: Job) -> dict[str, Any]:
    exact = is_exact(job.layout)
    blocks = blocks_in(job.layout, job.memory_bytes, job.trace.block_tokens)
    best = clairvoyant(job.trace, blocks, first=job.first, partial=not exact, exact=exact)
    return {
        "layout": job.name,
        "memory_share": job.share,
        "memory_bytes": job.memory_bytes,
        "policy": "clairvoyant",
        "token_hit_rate": best.token_hit_rate,
        "block_hit_rate": best.block_hit_rate,
        "kind": best.kind,
    }


def sweep(
    trace: Trace,
    layouts: dict[str, CacheLayout],
    policies: Sequence[str],
    shares: Sequence[float],
    *,
    first: int,
    jobs: int,
    block_tokens: int | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> list[dict[str, Any]]:
    """All runs, in the order of layouts, shares and policies; hits are counted from request ``first`` on."""
    rows: list[dict[str, Any]] = []
    total = len(layouts) * (1 + len(shares) * (len(policies) + 1))
    done = 0

    def one(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / total, what)

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        sizes = {pool.submit(_working_set, trace, layout, block_tokens): name for name, layout in layouts.items()}
        pending = {}
        for size in as_completed(sizes):
            name = sizes[size]
            one(f"{name}: working set")
            for share in shares:
                memory = int(size.result() * share)
                for policy in [*policies, "clairvoyant"]:
                    job = Job(trace, layouts[name], name, policy, share, memory, first, block_tokens)
                    pending[pool.submit(_best if policy == "clairvoyant" else _run, job)] = job
        for run in as_completed(pending):
            job = pending[run]
            one(f"{job.name} {job.share:.0%} {job.policy}")
            rows.append(run.result())
    order = {name: i for i, name in enumerate(layouts)}
    ranks = {name: i for i, name in enumerate([*policies, "clairvoyant"])}
    rows.sort(key=lambda r: (order[r["layout"]], r["memory_share"], ranks[r["policy"]]))
    return rows
