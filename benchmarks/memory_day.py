"""A simulated day of churn in one pool: two models, states and blocks, transfers that come and go; who holds what, and how scattered.

``python benchmarks/memory_day.py --json day.json --plot day.png``. The real pool core on a simulated clock. By day conversations with a
hybrid model (blocks and states), by night batches of long prompts for a dense one, requests without a key chain at any hour, some of them aborted
or left to their deadlines; demand shifts by the hour. Every ten minutes: bytes by model and group; *runs*, how many neighbouring pages the
page lists of 16 put-sized allocations have on average, were they made now; hit rates.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.arena import PageArena
from kvpool.core import PoolCore
from kvpool.errors import PoolFullError
from kvpool.keys import KeyChain, Namespace
from kvtransport.buffers import Arena
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

PAGE = 4096
STEP = 64
HYBRID = CacheLayout(
    "hybrid",
    (
        CacheGroup("attention", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (512,)),)),
        CacheGroup("states", GroupKind.RECURRENT, (1,), (TensorSpec("state", "int8", (100 * PAGE,)),)),
    ),
)
DENSE = CacheLayout("dense", (CacheGroup("attention", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (1024,)),)),))
SAMPLE_S = 600


class Day:
    def __init__(self, nbytes: int, seed: int) -> None:
        self.now = 0.0
        memory = Arena(nbytes, lock="off", cuda="off", huge="off", populate=False)
        self.core = PoolCore(PageArena(memory, PAGE), clock=lambda: self.now)
        self.rng = np.random.default_rng(seed)
        self.spaces = {layout.model: self.core.open_namespace("t", layout, STEP) for layout in (HYBRID, DENSE)}
        self.conversations: list[tuple[int, int]] = []  # seed of the tokens, tokens so far
        self.asked: Counter[str] = Counter()
        self.hit: Counter[str] = Counter()
        self.refused = 0
        self.transfers: list[tuple[float, Any]] = []
        self._next = 0

    def demand(self) -> tuple[float, float, float]:
        """Requests a minute of conversations, of batches, of transfers, at this time of day."""
        hour = self.now / 3600
        day = max(0.0, math.sin((hour - 6) / 24 * 2 * math.pi))
        night = max(0.0, -math.sin((hour - 6) / 24 * 2 * math.pi))
        return 14 * day + 1, 10 * night + 1, 3 + 3 * math.sin(hour)

    def minute(self) -> None:
        conversations, batches, transfers = (self.rng.poisson(max(0.0, n)) for n in self.demand())
        for work, count in ((self.converse, conversations), (self.batch, batches), (self.transfer, transfers)):
            for _ in range(count):
                self.now += 60 / (conversations + batches + transfers)
                self.end_transfers()
                work()
        self.core.expire()

    def prompt(self, ns: Namespace, seed: int, length: int) -> None:
        tokens = np.random.default_rng(seed).integers(0, 150_000, length + 1, dtype=np.uint32)
        chain = KeyChain(ns, tokens)
        found = self.core.match(ns, chain)
        model = ns.layout.model
        self.asked[model] += length
        self.hit[model] += found.length
        if found.length == length:
            return
        try:
            put = self.core.begin_put(ns, chain, boundary=length, start=found.length, deadline=self.now + 60)
        except PoolFullError:
            self.refused += 1
            return
        for (layer, tensor), extent in put.extents.items():
            put.progress(layer, tensor, 0, extent.nbytes)
        put.commit()

    def converse(self) -> None:
        if self.conversations and self.rng.random() < 0.75:
            i = int(len(self.conversations) * self.rng.power(4))  # rather one of the latest
            seed, length = self.conversations[i]
        else:
            i, self._next = len(self.conversations), self._next + 1
            seed, length = self._next, 0
            self.conversations.append((seed, 0))
        length = min(length + STEP * int(self.rng.integers(1, 12)), 200 * STEP)
        self.conversations[i] = (seed, length)
        self.prompt(self.spaces["hybrid"], seed, length)
        del self.conversations[:-400]

    def batch(self) -> None:
        """Prompts that are cut from sixty long documents, some more asked for than others."""
        self._next += 1
        seed = 1_000_000 + int(60 * self.rng.power(2))
        length = STEP * int(self.rng.integers(40, 90))
        self.prompt(self.spaces["dense"], seed, length)

    def transfer(self) -> None:
        ns = self.spaces["hybrid"]
        request = self.rng.bytes(16)
        try:
            put = self.core.begin_put(
                ns, None, boundary=STEP * int(self.rng.integers(5, 60)), request=request, deadline=self.now + 30
            )
        except PoolFullError:
            self.refused += 1
            return
        self.transfers.append((self.now + float(self.rng.exponential(15)), put))

    def end_transfers(self) -> None:
        """Read and done, or aborted; the slowest of them meet their deadlines."""
        self.core.expire()
        for item in [t for t in self.transfers if t[0] <= self.now or t[1].closed]:
            self.transfers.remove(item)
            put = item[1]
            if put.closed:
                continue
            if self.rng.random() < 0.3:
                put.abort()
                continue
            for (layer, tensor), extent in put.extents.items():
                put.progress(layer, tensor, 0, extent.nbytes)
            put.commit()
            get = self.core.plan_get(put.ns, None, boundary=put.boundary, request=put.request, deadline=self.now + 9)
            get.close()

    def sample(self) -> dict[str, Any]:
        stat = self.core.stat()
        asked, hit, self.asked, self.hit = self.asked, self.hit, Counter(), Counter()
        return {
            "hour": self.now / 3600,
            "groups": dict(stat["group_bytes"]),
            "transfer_bytes": stat["class_bytes"]["transfer"],
            "free_bytes": stat["free_bytes"],
            "hit_rate": {model: hit[model] / asked[model] if asked[model] else None for model in ("hybrid", "dense")},
            "neighbours": self.neighbours(),
            "refused": self.refused,
        }

    def neighbours(self) -> float:
        """Pages a piece of a page list has on average, over the blocks that are resident."""
        found = []
        for ns in self.spaces.values():
            tree = self.core._rooms[ns.id].tree
            for chain in tree.chains()[:40]:
                path = tree.find(chain)
                pages = tree.slabs(0, path[: max(1, len(path) // 2)]).pages.reshape(-1)
                found.append(len(pages) / (1 + int((np.diff(pages) != 1).sum())))
        return float(np.mean(found)) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--memory", type=int, default=256 << 20, help="bytes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--plot", metavar="PATH")
    args = parser.parse_args()
    day, samples = Day(args.memory, args.seed), []
    while day.now < args.hours * 3600:
        day.minute()
        if day.now >= (len(samples) + 1) * SAMPLE_S:
            samples.append(day.sample())
            if len(samples) % 12 == 0:
                print(f"{samples[-1]}", file=sys.stderr, flush=True)
    day.now += 3600
    day.core.expire()
    day.core.clear()
    stat = day.core.stat()
    result = {
        "memory": args.memory,
        "page_bytes": PAGE,
        "requests": stat["counters"],
        "evictions": stat["evictions"],
        "refused": day.refused,
        "left_at_the_end": {"used_bytes": stat["used_bytes"], "active": stat["active"]},
        "samples": samples,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = result["samples"]
    hours = [s["hour"] for s in samples]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 8), sharex=True)
    groups = [g for g in samples[-1]["groups"] if g != "flat"]
    layers = [[s["groups"].get(g, 0) / 2**20 for s in samples] for g in groups]
    layers.append([s["transfer_bytes"] / 2**20 for s in samples])
    top.stackplot(hours, layers, labels=[*groups, "transfers"])
    top.set_ylabel("MiB")
    top.legend(loc="upper left", fontsize=8)
    for model in ("hybrid", "dense"):
        middle.plot(hours, [s["hit_rate"][model] for s in samples], label=model)
    middle.set_ylabel("token hit rate")
    middle.set_ylim(0, 1)
    middle.legend(fontsize=8)
    bottom.plot(hours, [s["neighbours"] for s in samples])
    bottom.set_ylabel("neighbouring pages a piece")
    bottom.set_yscale("log")
    bottom.set_xlabel("hour of the day")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
