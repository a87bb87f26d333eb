"""``python -m tests.sim.cluster --seed N`` replays one seed with a trace; ``--seeds A:B`` runs many; ``--mutations`` puts faults into the code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .mutations import MUTATIONS, mutated
from .world import Violation, run_seed

SLICE = 25
"""Seeds that a process runs before it says how far it is."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.cluster", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay one seed with a trace")
    what.add_argument("--seeds", help="A:B, run seeds A to B-1; names what failed")
    what.add_argument("--mutations", action="store_true", help="the first seed below 1000 that catches each fault")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="with this fault put into the code")
    parser.add_argument("--jobs", type=int, default=0, help="processes for many seeds (default: one per processor)")
    parser.add_argument("--json", type=Path, help="write what was done to this file")
    args = parser.parse_args()
    if args.mutations:
        return _mutations(args.json)
    if args.seed is not None:
        with mutated(args.mutation):
            return _one(args.seed)
    first, _, last = args.seeds.partition(":")
    return _many(int(first), int(last), args.json, args.jobs or os.cpu_count() or 1, args.mutation)


def first_caught(mutation: str, most: int = 1000) -> tuple[int, str] | None:
    """The first seed below ``most`` in which ``mutation`` breaks something, and how."""
    with mutated(mutation):
        for seed in range(most):
            try:
                run_seed(seed)
            except Violation as violation:
                return seed, str(violation)
    return None


def _one(seed: int) -> int:
    try:
        world = run_seed(seed, trace=True)
    except Violation as violation:
        print("\n".join(getattr(violation, "__notes__", [])))
        print(f"\n{violation}")
        return 1
    print("\n".join(world.lines))
    print(f"\nseed {seed} ({world.profile}): everything holds")
    return 0


def _slice(first: int, last: int, mutation: str | None) -> tuple[Counter[str], dict[int, str], float]:
    """(counts, what failed by seed, seconds of CPU) of seeds ``first`` to ``last`` - 1."""
    begin, failed = time.process_time(), {}
    counts: Counter[str] = Counter()
    with mutated(mutation):
        for seed in range(first, last):
            try:
                world = run_seed(seed)
            except Violation as violation:
                failed[seed] = str(violation)
                continue
            except Exception as error:  # noqa: BLE001 - nothing else may come out of a seed
                failed[seed] = f"seed {seed}: {error!r}"
                continue
            counts.update(hits=world.hits, misses=world.misses, errors=world.errors, copies=world.copies)
            counts.update({f"profile {world.profile}": 1, "seeds": 1})
            counts.update(f"fault {name}" for name in world.faults)
    return counts, failed, time.process_time() - begin


def _many(first: int, last: int, out: Path | None, jobs: int, mutation: str | None) -> int:
    begin, cpu_s = time.monotonic(), 0.0
    failed: list[int] = []
    counts: Counter[str] = Counter()
    starts = range(first, last, SLICE)
    with ProcessPoolExecutor(min(jobs, len(starts)) or 1) as pool:
        work = [pool.submit(_slice, at, min(at + SLICE, last), mutation) for at in starts]
        for done, future in enumerate(as_completed(work), 1):
            some, bad, seconds = future.result()
            counts, cpu_s = counts + some, cpu_s + seconds
            failed = sorted([*failed, *bad])
            for text in bad.values():
                print(text, flush=True)
            took = time.monotonic() - begin
            print(
                f"{min(done * SLICE, last - first)} of {last - first} seeds, {len(failed)} failed, {took:.0f} s, "
                f"{took / done * (len(work) - done):.0f} s to go",
                file=sys.stderr,
            )
    body: dict[str, Any] = {
        "first": first,
        "last": last,
        "failed": failed,
        "seconds": time.monotonic() - begin,
        "cpu_seconds": cpu_s,
        **counts,
    }
    print(", ".join(f"{k}: {v:.0f}" for k, v in sorted(counts.items())))
    print(f"{last - first} seeds in {body['seconds']:.0f} s ({cpu_s:.0f} s of CPU), {len(failed)} failed {failed[:20] or ''}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(body, indent=1) + "\n")
    return 1 if failed else 0


def _mutations(out: Path | None) -> int:
    found = {name: first_caught(name) for name in MUTATIONS}
    for name, caught in found.items():
        print(f"{name}: {'NOT CAUGHT in 1000 seeds' if caught is None else f'caught by {caught[1]}'}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({n: None if c is None else c[0] for n, c in found.items()}, indent=1) + "\n")
    return 1 if None in found.values() else 0


if __name__ == "__main__":
    sys.exit(main())
