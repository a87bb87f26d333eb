"""``python -m tests.sim.cluster --seed N`` replays one seed with a trace; ``--seeds A:B`` runs many; ``--mutations`` puts faults into the code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .mutations import MUTATIONS, mutated
from .world import Violation, run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.cluster", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay one seed with a trace")
    what.add_argument("--seeds", help="A:B, run seeds A to B-1; names what failed")
    what.add_argument("--mutations", action="store_true", help="the first seed below 1000 that catches each fault")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="with this fault put into the code")
    parser.add_argument("--json", type=Path, help="write what was done to this file")
    args = parser.parse_args()
    if args.mutations:
        return _mutations(args.json)
    with mutated(args.mutation):
        if args.seed is not None:
            return _one(args.seed)
        first, _, last = args.seeds.partition(":")
        return _many(int(first), int(last), args.json)


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


def _many(first: int, last: int, out: Path | None) -> int:
    begin, failed = time.monotonic(), []
    counts: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            world = run_seed(seed)
        except Violation as violation:
            failed.append(seed)
            print(violation, flush=True)
            continue
        counts.update(hits=world.hits, misses=world.misses, errors=world.errors, copies=world.copies)
        counts.update({f"profile {world.profile}": 1, "seeds": 1})
        counts.update(f"fault {name}" for name in world.faults)
        if seed % 100 == 99:
            print(f"{seed + 1 - first} of {last - first}, {len(failed)} failed", file=sys.stderr)
    body: dict[str, Any] = {
        "first": first,
        "last": last,
        "failed": failed,
        "seconds": time.monotonic() - begin,
        "cpu_seconds": time.process_time(),
        **counts,
    }
    print(", ".join(f"{k}: {v:.0f}" for k, v in sorted(counts.items())))
    print(
        f"{last - first} seeds in {body['seconds']:.0f} s ({time.process_time():.0f} s of CPU), {len(failed)} failed {failed[:20] or ''}"
    )
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
