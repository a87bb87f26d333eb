"""A match of 128K tokens, embedded and through kvpoold on loopback, and what its key chain costs.

``python benchmarks/lookups.py --json -``: medians of 201 calls; blocks of 16 tokens (8,192 keys) and of 64.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.arena import PageArena
from kvpool.client import connect
from kvpool.core import PoolCore
from kvpool.keys import KeyChain, Namespace
from kvtransport.buffers import Arena, PageList
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

TOKENS = np.random.default_rng(1).integers(0, 150_000, 131_073, dtype=np.uint32)
LAYOUT = CacheLayout(
    "hybrid",
    (
        CacheGroup("full", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (4,)),)),
        CacheGroup("linear", GroupKind.RECURRENT, (1,), (TensorSpec("state", "int8", (64,)),)),
    ),
)
CALLS = 201


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"p50_ms": middle * 1e3, "iqr_ms": (high - low) * 1e3}


def timed(call: Callable[[], Any], calls: int = CALLS) -> dict[str, float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return spread(times)


async def timed_async(call: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        await call()
        times.append(time.perf_counter() - start)
    return spread(times)


def embedded(step: int) -> dict[str, Any]:
    core = PoolCore(PageArena(Arena(64 << 20, lock="off", cuda="off"), 64), clock=time.monotonic)
    ns = core.open_namespace("t", LAYOUT, step)
    chain = KeyChain(ns, TOKENS)
    put = core.begin_put(ns, chain, boundary=131_072, deadline=core.clock() + 60)
    for (layer, tensor), extent in put.extents.items():
        put.progress(layer, tensor, 0, extent.nbytes)
    put.commit()
    assert core.match(ns, chain).length == 131_072
    return {
        "whole_chain": timed(lambda: KeyChain(ns, TOKENS), 51),
        "extend_by_one_block": timed(lambda: chain.extend(TOKENS[:step]), 51),
        "match": timed(lambda: core.match(ns, chain)),
    }


async def through_daemon(port: int, step: int) -> dict[str, float]:
    async with await connect("127.0.0.1", port, connections=1) as pool:
        ns: Namespace = await pool.namespace(LAYOUT, step)
        chain = KeyChain(ns, TOKENS)
        sender = await pool.put(ns, chain, boundary=131_072)
        for extent in sender.manifest.extents:
            sender.ready(extent.layer, extent.tensor, PageList.of(bytes(extent.nbytes)))
        await sender.seal()
        assert (await pool.match(ns, chain)).length == 131_072
        return await timed_async(lambda: pool.match(ns, chain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="write the result here, - for standard output")
    args = parser.parse_args()
    try:
        import uvloop as runner
    except ImportError:
        runner = asyncio
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "kvpoold.toml"
        config.write_text('page_bytes = 64\nport = 0\nmemory = "64MiB"\n')
        argv = [sys.executable, "-m", "kvpool.daemon", "--config", str(config)]
        daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert daemon.stdout is not None
            found = re.search(r"listening on 127\.0\.0\.1:(\d+)", daemon.stdout.readline())
            assert found is not None
            for step in (16, 64):
                result[f"blocks of {step}"] = {
                    **embedded(step),
                    "match_through_daemon": runner.run(through_daemon(int(found[1]), step)),
                }
        finally:
            daemon.terminate()
            daemon.wait()
    text = json.dumps(result, indent=1)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
