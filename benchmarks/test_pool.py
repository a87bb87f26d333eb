"""The embedded pool: lookups over long chains, keys, opening and sealing puts, page lists, flat objects.

``pytest benchmarks/test_pool.py --benchmark-columns=median,iqr``
"""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np
import pytest

from kvpool.arena import BlockClass, PageArena
from kvpool.core import PoolCore
from kvpool.keys import KeyChain, Namespace
from kvpool.pool import Pool
from kvtransport.buffers import Arena
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec
from kvtransport.presets import load

TOKENS = np.random.default_rng(1).integers(0, 150_000, 131_072, dtype=np.uint32)
FULL = CacheGroup("full", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (4,)),))
LINEAR = CacheGroup("linear", GroupKind.RECURRENT, (1,), (TensorSpec("state", "int8", (64,)),))
SMALL = CacheLayout("small", (FULL, LINEAR))
"""A hybrid of few bytes: what is measured is the index."""


def new_core(nbytes: int, page_bytes: int) -> PoolCore:
    return PoolCore(PageArena(Arena(nbytes, lock="off", cuda="off", populate=False), page_bytes), clock=time.monotonic)


def store(core: PoolCore, ns: Namespace, chain: KeyChain, boundary: int, checkpoints=()) -> None:
    put = core.begin_put(ns, chain, boundary=boundary, checkpoints=checkpoints, deadline=core.clock() + 60)
    for (layer, tensor), extent in put.extents.items():
        put.progress(layer, tensor, 0, extent.nbytes)
    put.commit()


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.benchmark(group="keys of 128K tokens")
def test_whole_chain(benchmark, block_tokens):
    ns = Namespace("t", SMALL, block_tokens)
    benchmark(KeyChain, ns, TOKENS)


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.benchmark(group="extending a chain of 128K tokens by one block")
def test_extend(benchmark, block_tokens):
    ns = Namespace("t", SMALL, block_tokens)

    def setup():
        return (KeyChain(ns, TOKENS), TOKENS[:block_tokens]), {}

    benchmark.pedantic(lambda chain, more: chain.extend(more), setup=setup, rounds=20)


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.benchmark(group="match of 128K tokens")
def test_match(benchmark, block_tokens):
    core = new_core(64 << 20, 4096)
    ns = core.open_namespace("t", SMALL, block_tokens)
    chain = KeyChain(ns, TOKENS)
    store(core, ns, chain, len(TOKENS) - block_tokens, checkpoints=range(4096, len(TOKENS) - block_tokens, 4096))
    found = benchmark(core.match, ns, chain)
    assert found.length == len(TOKENS) - block_tokens


@pytest.mark.benchmark(group="32K tokens of kimi-linear-48b")
def test_open_put(benchmark):
    core = new_core(1 << 30, 65_536)
    layout = load("kimi-linear-48b")
    ns = core.open_namespace("t", layout, 64)
    chain = KeyChain(ns, TOKENS[:32_768])

    def once():
        put = core.begin_put(ns, chain, boundary=32_768, checkpoints=(24_576,), deadline=core.clock() + 60)
        assert put.destinations
        put.abort()

    benchmark(once)


@pytest.mark.benchmark(group="32K tokens of kimi-linear-48b")
def test_commit_put(benchmark):
    core = new_core(1 << 30, 65_536)
    layout = load("kimi-linear-48b")
    ns = core.open_namespace("t", layout, 64)
    salts = itertools.count()

    def setup():
        chain = KeyChain(ns, TOKENS[:32_768], extra=b"%d" % next(salts))
        put = core.begin_put(ns, chain, boundary=32_768, checkpoints=(24_576,), deadline=core.clock() + 60)
        for (layer, tensor), extent in put.extents.items():
            put.progress(layer, tensor, 0, extent.nbytes)
        return (put,), {}

    benchmark.pedantic(lambda put: put.commit(), setup=setup, rounds=20)


@pytest.mark.benchmark(group="32K tokens of kimi-linear-48b")
def test_plan_get(benchmark):
    core = new_core(1 << 30, 65_536)
    layout = load("kimi-linear-48b")
    ns = core.open_namespace("t", layout, 64)
    chain = KeyChain(ns, TOKENS[:32_769])
    store(core, ns, chain, 32_768)

    def once():
        core.plan_get(ns, chain, boundary=32_768, deadline=core.clock() + 60).close()

    benchmark(once)


@pytest.mark.benchmark(group="page list of one tensor in 2048 scattered blocks")
def test_pages_of_blocks(benchmark):
    arena = PageArena(Arena(1 << 30, lock="off", cuda="off", populate=False), 65_536)
    slabs = arena.allocate_many([8 * 65_536] * 2048, BlockClass.PREFIX)
    order = np.random.default_rng(2).permutation(2048)
    matrix = arena.stack([slabs[i] for i in order])
    pages = benchmark(arena.pages_of_blocks, matrix, 100_000, 73_728)
    assert pages.nbytes == 2048 * 73_728


@pytest.mark.benchmark(group="evicting")
def test_churn(benchmark):
    """Puts of 64 blocks into a full pool: each evicts 64 blocks and a state."""
    core = new_core(4 << 20, 256)
    ns = core.open_namespace("t", SMALL, 64)
    seeds = itertools.count()
    for _ in range(300):
        store(core, ns, KeyChain(ns, TOKENS[:4096], extra=b"%d" % next(seeds)), 4096)
    assert core.stat()["evictions"]

    def setup():
        return (core, ns, KeyChain(ns, TOKENS[:4096], extra=b"%d" % next(seeds)), 4096), {}

    benchmark.pedantic(store, setup=setup, rounds=50)


@pytest.mark.parametrize("size", [65_536, 1 << 20])
@pytest.mark.benchmark(group="flat objects")
def test_objects(benchmark, size):
    objects = {b"%d" % i: np.random.default_rng(i).bytes(size) for i in range(16)}
    keys = list(objects)

    async def put_and_get(pool):
        await pool.put_objects(objects)
        assert None not in await pool.get_objects(keys)

    loop = asyncio.new_event_loop()
    pool = Pool.create(256 << 20, page_bytes=65_536)
    try:
        benchmark(lambda: loop.run_until_complete(put_and_get(pool)))
    finally:
        loop.run_until_complete(pool.close())
        loop.close()
