"""The router's costs: one decision, one solve of the threshold, and a request of 128K tokens from its tokens to its decision.

``pytest benchmarks/test_scheduling.py --benchmark-columns=median,iqr,ops``
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from kvpool.arena import PageArena
from kvpool.core import PoolCore
from kvpool.keys import KeyChain
from kvpool.scheduling.config import load_case
from kvpool.scheduling.model import Means
from kvpool.scheduling.router import Path, Request, Router, RouterConfig
from kvpool.scheduling.window import Resources
from kvtransport.buffers import Arena
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

SYSTEM = replace(load_case("paper").system, means=Means.EXPECTED)
FULL = CacheGroup("full", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (4,)),))
LINEAR = CacheGroup("linear", GroupKind.RECURRENT, (1,), (TensorSpec("state", "int8", (64,)),))
SMALL = CacheLayout("small", (FULL, LINEAR))
"""A hybrid of few bytes: what is measured is the index."""
RATE = 3.0


def new_router() -> Router:
    assert SYSTEM.prfaas is not None
    router = Router(
        RouterConfig(),
        pd=SYSTEM.pd.profile,
        prfaas=SYSTEM.prfaas.profile,
        n_p=3,
        n_prfaas=4,
        egress=SYSTEM.prfaas.egress,
        threshold=19_400.0,
    )
    router.on_decode(0.0, present=0, places=100, finished=0)
    return router


def requests(n: int) -> list[Request]:
    rng = np.random.default_rng(1)
    lengths = SYSTEM.workload.lengths.sample(rng, n)
    parts = rng.uniform(0.0, 0.9, (2, n))
    return [Request(float(x), float(x * a), float(x * b)) for x, a, b in zip(lengths, *parts, strict=True)]


@pytest.mark.benchmark(group="router")
def test_decisions(benchmark):
    """A thousand decisions with match results, decode reporting every second and t re-solved every five."""
    router, drawn = new_router(), requests(1000)
    count = itertools.count()

    def thousand():
        for request in drawn:
            i = next(count)
            now = i / RATE
            if i % 3 == 0:
                router.on_decode(now, present=60, places=100, finished=i)
            router.route(now, request)

    benchmark(thousand)
    benchmark.extra_info["decisions_per_s"] = 1000 / benchmark.stats.stats.median


@pytest.mark.benchmark(group="router")
def test_solve(benchmark):
    """One solve over a full window."""
    router = new_router()
    for i, request in enumerate(requests(router.controller.window.size + 10)):
        router.route(i / RATE, request)
    window = router.controller.window
    assert window.count == window.size
    benchmark(window.quickest, Resources(4, 3, 10e9), RATE)


def stored(block_tokens: int, tokens: np.ndarray, length: int) -> PoolCore:
    arena = Arena(64 << 20, lock="off", cuda="off", populate=False)
    core = PoolCore(PageArena(arena, 4096), clock=time.monotonic)
    ns = core.open_namespace("t", SMALL, block_tokens)
    put = core.begin_put(
        ns, KeyChain(ns, tokens), boundary=length, checkpoints=range(4096, length, 4096), deadline=core.clock() + 60
    )
    for (layer, tensor), extent in put.extents.items():
        put.progress(layer, tensor, 0, extent.nbytes)
    put.commit()
    return core


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.benchmark(group="128K tokens, from the prompt to the decision")
def test_end_to_end(benchmark, block_tokens):
    """Keys of the prompt, a match in the index of each of two clusters, and the decision."""
    tokens = np.random.default_rng(2).integers(0, 150_000, 131_072, dtype=np.uint32)
    clusters = [stored(block_tokens, tokens, n) for n in (65_536, 122_880)]
    namespaces = [core.open_namespace("t", SMALL, block_tokens) for core in clusters]
    router = new_router()
    count = itertools.count()

    def once():
        chain = KeyChain(namespaces[0], tokens)
        found = [core.match(ns, chain).length for core, ns in zip(clusters, namespaces, strict=True)]
        decision = router.route(next(count) * 10.0, Request(131_072.0, float(found[0]), float(found[1])))
        assert decision.path is not Path.SHED
        return found

    assert benchmark(once) == [65_536, 122_880]
