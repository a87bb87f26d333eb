"""``python -m tests.sim.transport --seed N`` replays one seed with a trace; ``--seeds A:B`` runs many."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

from .mutations import MUTATIONS, mutated
from .world import Violation, World, run_seed


@dataclass(slots=True)
class Tally:
    """What a run of many seeds did. Times in seconds."""

    first_seed: int
    seeds: int = 0
    failed: list[int] = field(default_factory=list)
    events: int = 0
    simulated_s: float = 0.0
    wall_s: float = 0.0
    transfers: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    addresses: Counter[str] = field(default_factory=Counter)
    coded: Counter[str] = field(default_factory=Counter)
    """Chunks that came coded, of their bytes as they came out; corrupt ones and copies of seeds with a codec."""

    def add(self, world: World) -> None:
        self.events += world.loop.events
        self.simulated_s += world.loop.time()
        self.transfers += len(world.jobs)
        self.calls.update(world.calls)
        self.profiles[world.plan.profile] += 1
        self.faults.update(world.injected)
        self.addresses.update(world.addresses)
        for job in world.jobs:
            if world.plan.codec and job.receiver is not None:
                stats = job.receiver.stats
                self.coded["chunks"] += stats.chunks
                self.coded["bytes coded"] += stats.coded_raw_bytes
                self.coded["bytes"] += stats.moved_bytes
                self.coded["corrupt chunks"] += stats.corrupt_chunks
                self.coded["duplicate bytes"] += stats.duplicate_bytes
            for said in (job.sent, job.got):
                self.outcomes[said if isinstance(said, str) else type(said).__name__] += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.transport", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay one seed with a trace")
    what.add_argument("--seeds", help="A:B, run seeds A to B-1; stops at nothing, names what failed")
    what.add_argument(
        "--mutations", action="store_true", help="put each fault into the code in turn: the first seed to catch it"
    )
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="with this fault put into the code")
    parser.add_argument("--json", type=Path, help="write what was done to this file")
    args = parser.parse_args()
    if args.mutations:
        return _mutations(args.json)
    with mutated(args.mutation):
        if args.seed is not None:
            return _one(args.seed)
        first, _, last = args.seeds.partition(":")
        return _many(int(first), int(last), args.mutation, args.json)


def first_caught(mutation: str, most: int = 1000) -> tuple[int, str] | None:
    """The first seed below ``most`` in which ``mutation`` breaks an invariant, and how."""
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
        print(f"\n{violation}")
        return 1
    print("\n".join(world.lines))
    print(f"\nseed {seed} ({world.plan.profile}): every invariant holds")
    return 0


def _many(first: int, last: int, mutation: str | None, out: Path | None) -> int:
    started = time.monotonic()
    tally = Tally(first)
    for seed in range(first, last):
        try:
            tally.add(run_seed(seed))
        except Violation as violation:
            tally.failed.append(seed)
            print(f"\n{violation}", flush=True)
        tally.seeds += 1
        tally.wall_s = time.monotonic() - started
        if tally.seeds % 500 == 0 or seed + 1 == last:
            rate = tally.seeds / max(1e-9, tally.wall_s)
            print(f"{tally.seeds} of {last - first}, {len(tally.failed)} failed, {rate:.0f} seeds/s", file=sys.stderr)
    print(
        f"{tally.seeds} seeds, {tally.transfers} transfers, {tally.events} events, {tally.simulated_s:.0f} simulated s "
        f"in {tally.wall_s:.0f} s: {len(tally.failed)} failed{' ' + str(tally.failed[:20]) if tally.failed else ''}"
    )
    for name in ("faults", "outcomes", "calls", "addresses", "coded"):
        print(f"{name}: " + ", ".join(f"{n} {key}" for key, n in getattr(tally, name).most_common()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Not asdict: it takes a Counter apart.
        out.write_text(json.dumps({f.name: getattr(tally, f.name) for f in fields(tally)}, indent=1) + "\n")
    if tally.failed:
        also = f' --mutation "{mutation}"' if mutation else ""
        print(f"replay one with: python -m tests.sim.transport --seed {tally.failed[0]}{also}")
    return 1 if tally.failed else 0


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
