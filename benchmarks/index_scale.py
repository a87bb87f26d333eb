"""Ten million blocks in one index: bytes a block, the longest pauses, and matches of 128K tokens among them.

``python benchmarks/index_scale.py --blocks 10000000 --json -``. The real pool core, policy and all, over pages of 64 bytes (a
block of 16 tokens is one page, and so is a state): payload hardly counts, what is measured is everything else. Sequences continue
earlier ones half of the time, as conversations do. When the blocks are there as many again are put, and each evicts others.

What kvpoold does in steps, between which it serves others, is done in steps: opening a put (evicting for it), learning from it, and collecting
garbage (every 20 puts).

Bytes a block are what the process grew by (nobody writes the payload, so it takes none) and 12 for each page, which an arena takes
at once. A pause is the CPU time of one call (open a put, commit it, match), so
that other processes' turns do not count; the garbage collector's turns do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvpool.arena import PageArena
from kvpool.collecting import Collector
from kvpool.core import PoolCore
from kvpool.keys import KeyChain, Namespace
from kvtransport.buffers import Arena
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

STEP = 16
PAGE = 64
FULL = CacheGroup("full", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (4,)),))
LINEAR = CacheGroup("linear", GroupKind.RECURRENT, (1,), (TensorSpec("state", "int8", (64,)),))
LAYOUT = CacheLayout("hybrid", (FULL, LINEAR))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Calls:
    """CPU milliseconds of every call, by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._gc_start = 0.0
        gc.callbacks.append(self._on_gc)

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_start = time.thread_time()
        else:
            self.times.setdefault(f"gc generation {info['generation']}", []).append(
                (time.thread_time() - self._gc_start) * 1e3
            )

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.thread_time()
        try:
            return call()
        finally:
            self.times.setdefault(name, []).append((time.thread_time() - start) * 1e3)

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "calls": len(times),
                "p50_ms": float(np.percentile(times, 50)),
                "p999_ms": float(np.percentile(times, 99.9)),
                "longest_ms": float(max(times)),
            }
            for name, times in sorted(self.times.items())
        }


class World:
    """A pool and the sequences in it."""

    def __init__(self, blocks: int, mean_blocks: int, seed: int) -> None:
        # A state per hundred blocks, and room for one chain more.
        pages = blocks + blocks // 50 + 20_000
        memory = Arena(pages * PAGE, lock="off", cuda="off", huge="off", populate=False)
        self.core = PoolCore(PageArena(memory, PAGE), clock=time.monotonic)
        self.ns: Namespace = self.core.open_namespace("bench", LAYOUT, STEP)
        self.rng = np.random.default_rng(seed)
        self.mean = mean_blocks
        self.collector = Collector(time.monotonic)  # as kvpoold does
        self.collector.start()
        self.calls = Calls()
        self.core.on_work = lambda: None  # put() has it done in steps
        # Filled now: what the sequences take is not the index's.
        self.memory = np.full((256, 8192 * STEP + 5), 7, np.uint32)
        self.lengths = [0] * 256
        self.blocks = 0
        self.puts = 0

    def sequence(self) -> np.ndarray:
        more = int(np.clip(self.rng.exponential(self.mean), 1, 8192)) * STEP
        tokens = self.rng.integers(0, 150_000, more + 5, dtype=np.uint32)
        slot = int(self.rng.integers(256))
        if self.rng.random() < 0.5:
            old = self.memory[slot, : self.lengths[slot]]
            tokens = np.concatenate([old[: len(old) // STEP * STEP], tokens])
        tokens = tokens[: 8192 * STEP + 5]
        slot = int(self.rng.integers(256))
        self.memory[slot, : len(tokens)] = tokens
        self.lengths[slot] = len(tokens)
        return tokens

    def put(self, tokens: np.ndarray) -> KeyChain:
        core, ns, calls = self.core, self.ns, self.calls
        chain = KeyChain(ns, tokens)
        found = calls.run("match", lambda: core.match(ns, chain))
        boundary = len(tokens) // STEP * STEP
        if found.length >= boundary:
            return chain
        steps = core.put_steps(ns, chain, boundary=boundary, start=found.length, deadline=core.clock() + 60)
        while True:
            try:
                calls.run("open a put: a step", lambda: next(steps))
            except StopIteration as done:
                put = done.value
                break
        for (layer, tensor), extent in put.extents.items():
            put.progress(layer, tensor, 0, extent.nbytes)
        calls.run("commit a put", put.commit)
        while calls.run("learn: a step", core.policy.work):
            pass
        self.puts += 1
        if self.puts % 20 == 0:
            calls.run("collect garbage", lambda: self.collector.tick(quiet=False))
        self.blocks += (boundary - found.length) // STEP
        return chain


def measure(
    blocks: int, mean_blocks: int, seed: int = 1, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    gc.collect()
    world = World(blocks, mean_blocks, seed)
    pages = world.core.arena.total_pages
    before = resident() - 12 * pages  # its generation, and its place among the free ones
    start = time.monotonic()
    while world.blocks < blocks:
        world.put(world.sequence())
        if len(world.calls.times.get("match", ())) % 2000 == 0:
            progress(f"{world.blocks} blocks, {time.monotonic() - start:.0f} s")
    entries = world.core.stat()["entries"]
    payload = world.core.arena.used_bytes
    filled = {
        "blocks": entries["units"] - entries["states"],
        "states": entries["states"],
        "bytes_a_block": (resident() - before) / max(1, entries["units"] - entries["states"]),
        "index_bytes_reserved_a_block": world.core._rooms[world.ns.id].tree.nbytes / max(1, entries["units"]),
        "payload_bytes": payload,
        "calls": world.calls.summary(),
    }
    progress(f"filled: {filled['bytes_a_block']:.1f} B/block")

    longest = np.random.default_rng(9).integers(0, 150_000, 8192 * STEP + 1, dtype=np.uint32)
    chain = world.put(longest)
    assert len(chain.blocks) == 8192
    times = []
    for _ in range(101):
        began = time.perf_counter()
        found = world.core.match(world.ns, chain)
        times.append((time.perf_counter() - began) * 1e3)
        assert found.length == 8192 * STEP
    match = {"p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))}

    world.calls.times.clear()
    target = world.blocks + blocks
    while world.blocks < target:
        world.put(world.sequence())
        if len(world.calls.times.get("match", ())) % 2000 == 0:
            progress(f"churned {world.blocks - target + blocks} blocks, {time.monotonic() - start:.0f} s")
    entries = world.core.stat()["entries"]
    churned = {
        "blocks": entries["units"] - entries["states"],
        "evictions": dict(world.core.stat()["evictions"]),
        "bytes_a_block": (resident() - before) / max(1, entries["units"] - entries["states"]),
        "calls": world.calls.summary(),
    }
    return {
        "block_tokens": STEP,
        "mean_new_blocks_a_sequence": mean_blocks,
        "filled": filled,
        "match_of_8192_blocks": match,
        "churned": churned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--mean", type=int, default=256, help="new blocks a sequence, on average")
    parser.add_argument("--json", metavar="PATH", help="write the result here, - for standard output")
    args = parser.parse_args()
    result = measure(args.blocks, args.mean, progress=lambda text: print(text, file=sys.stderr, flush=True))
    text = json.dumps(result, indent=1)
    if args.json and args.json != "-":
        with open(args.json, "w") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
