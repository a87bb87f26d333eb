"""Policies x memory x layouts over one trace, each run in a process of its own: the table of docs/caching.md."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from kvpool.scheduling.traces import Trace
from kvtransport.layout import CacheLayout, GroupKind

from .accounting import page_bytes_for
from .clairvoyant import clairvoyant
from .run import Replay, folded, working_set_bytes
from .table import CLAIRVOYANT, Name, Row

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
        "policy": CLAIRVOYANT,
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
    add: Callable[[Row], None],
    known: Collection[Name] = (),
    block_tokens: int | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> None:
    """Run what is not ``known`` yet and ``add`` each row as it is done, in no order; hits are counted from request ``first`` on."""
    wanted = {
        name: [(share, p) for share in shares for p in (*policies, CLAIRVOYANT) if (name, share, p) not in known]
        for name in layouts
    }
    wanted = {name: runs for name, runs in wanted.items() if runs}
    total = sum(1 + len(runs) for runs in wanted.values())
    done = 0

    def one(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / total, what)

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: dict[Future[Any], Job | str] = {
            pool.submit(_working_set, trace, layouts[name], block_tokens): name for name in wanted
        }
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                if isinstance(job, str):
                    one(f"{job}: working set")
                    for share, policy in wanted[job]:
                        memory = int(future.result() * share)
                        more = Job(trace, layouts[job], job, policy, share, memory, first, block_tokens)
                        pending[pool.submit(_best if policy == CLAIRVOYANT else _run, more)] = more
                else:
                    add(future.result())
                    one(f"{job.name} {job.share:.0%} {job.policy}")
