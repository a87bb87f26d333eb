"""``python -m tests.sim.transport --seed N`` replays one seed with a trace; ``--seeds A:B`` runs many."""

from __future__ import annotations

import argparse
import sys
import time

from .mutations import MUTATIONS, mutated
from .world import Violation, run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.transport", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay one seed with a trace")
    what.add_argument("--seeds", help="A:B, run seeds A to B-1")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="with this fault put into the code")
    args = parser.parse_args()
    with mutated(args.mutation):
        if args.seed is not None:
            return _one(args.seed)
        first, _, last = args.seeds.partition(":")
        return _many(int(first), int(last))


def _one(seed: int) -> int:
    try:
        world = run_seed(seed, trace=True)
    except Violation as violation:
        print(f"\n{violation}")
        return 1
    print("\n".join(world.lines))
    print(f"\nseed {seed} ({world.plan.profile}): every invariant holds")
    return 0


def _many(first: int, last: int) -> int:
    failed: list[int] = []
    started = time.monotonic()
    outcomes: dict[str, int] = {}
    for seed in range(first, last):
        try:
            world = run_seed(seed)
            for job in world.jobs:
                for said in (job.sent, job.got):
                    key = said if isinstance(said, str) else type(said).__name__
                    outcomes[key] = outcomes.get(key, 0) + 1
        except Violation as violation:
            failed.append(seed)
            print(f"\n{violation}", flush=True)
        done = seed + 1 - first
        if done % 100 == 0 or seed + 1 == last:
            rate = done / max(1e-9, time.monotonic() - started)
            print(f"{done} of {last - first} seeds, {len(failed)} failed, {rate:.0f} seeds/s", file=sys.stderr)
    print(f"{last - first} seeds, {len(failed)} failed{': ' + str(failed[:20]) if failed else ''}")
    print("outcomes: " + ", ".join(f"{n} {key}" for key, n in sorted(outcomes.items(), key=lambda i: -i[1])))
    if failed:
        print(f"replay one with: python -m tests.sim.transport --seed {failed[0]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
