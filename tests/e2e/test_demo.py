"""``kvpool demo``: the whole with real processes, how it ends when one dies, and its parts."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from kvpool.arena import PageArena
from kvpool.cli import app
from kvpool.core import PoolCore
from kvpool.demo.decode import consume
from kvpool.demo.memory import EngineMemory, check, fill
from kvpool.demo.plan import Plan, by_layer
from kvpool.demo.prefill import Prefix, produce
from kvpool.demo.report import request_report
from kvpool.demo.routes import ConsumerRoute, PoolRoute, ProducerRoute, direct_consumer, direct_producer, pool_route
from kvpool.demo.run import daemon_line
from kvpool.demo.synthetic import SyntheticCache
from kvpool.keys import KeyChain
from kvpool.pool import Pool
from kvpool.server import PoolServer
from kvtransport.buffers import Arena
from kvtransport.endpoint import Endpoint
from kvtransport.errors import ConfigError, IntegrityError
from tests.conftest import no_tasks_left

ROOT = Path(__file__).parents[2]
SMALL = Plan(tokens=200, prefix_tokens=128, layer_ms=0)

# -- as a command ------------------------------------------------------------------------------------


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "kvpool.cli", "demo", *arguments]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield demo
    finally:
        demo.kill()
        demo.communicate()


def children_at_work(demo: subprocess.Popen[str], number: int) -> dict[str, psutil.Process]:
    """The demo's processes by role, once the first request has begun."""
    for line in demo.stdout:
        if "request 1:" in line:
            break
    else:
        pytest.fail(f"the demo ended early: {demo.stderr.read()}")
    found = psutil.Process(demo.pid).children()
    assert len(found) == number
    return {p.cmdline()[2].rpartition(".")[2]: p for p in found}


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def test_pool_demo_overlaps_reuses_and_verifies():
    arguments = ["--tokens", "1024", "--layer-ms", "30", "--json", "-"]
    with running(*arguments) as demo:
        out, err = demo.communicate(timeout=60)
    assert demo.returncode == 0, err
    assert "prefix hit" in err
    assert "hidden behind compute" in err
    report = json.loads(out)
    plan = Plan(tokens=1024, prefix_tokens=768, layer_ms=30)
    assert report["verified"] is True
    assert report["clock"] == "CLOCK_MONOTONIC"
    first, second = report["requests"]
    for request in (first, second):
        assert request["content_verified"] is True
        assert request["bytes_by_group"] == plan.layout.group_bytes(1024)
        assert request["received_bytes"] == plan.layout.bytes_at(1024)
        assert request["checksums_verified"]["received_by_decode"] == request["receiver"]["chunks"] > 0
        assert request["sender"]["corrupt_chunks"] == request["receiver"]["corrupt_chunks"] == 0
        assert [layer["layer"] for layer in request["layers"]] == list(plan.layout.layers)
        for layer in request["layers"]:
            # uvloop's clock counts milliseconds and may lag behind by what one poll brought.
            assert layer["first_byte_s"] <= layer["applied_s"] <= layer["consumed_s"] + 0.001
            assert layer["ready_s"] < layer["consumed_s"]
    # The overlap: when prefill hands over its last layer, decode has consumed most of those before it.
    last_ready = first["layers"][-1]["ready_s"]
    early = sum(layer["consumed_s"] < last_ready for layer in first["layers"])
    assert early >= 0.8 * len(first["layers"])
    assert first["exposed_s"] < first["prefill_s"]
    # The reuse: what the pool had was neither computed nor sent again.
    assert first["prefix_hit"]["tokens"] == 0
    assert second["prefix_hit"]["tokens"] == 768
    assert second["prefix_hit"]["fetched_bytes"] == plan.layout.bytes_at(768)
    assert second["computed_tokens"] == 256
    assert second["sent_bytes"] == sum(e.nbytes for e in plan.extents(768)) < first["sent_bytes"]
    assert report["totals"]["prefix_hit_tokens"] == 768
    assert report["pool"]["counters"]["puts_committed"] == 2


def test_direct_demo_is_one_request_without_a_pool(tmp_path):
    path = tmp_path / "report.json"
    with running(
        "--direct", "--tokens", "256", "--layer-ms", "0", "--preset", "mimo-v2-flash", "--json", str(path)
    ) as demo:
        out, err = demo.communicate(timeout=60)
    assert demo.returncode == 0, err
    assert "content verified" in out
    report = json.loads(path.read_text())
    assert report["demo"] == "direct"
    assert set(report["memory_bytes"]) == {"prefill", "decode"}
    (request,) = report["requests"]
    assert report["verified"] is True
    assert request["sent_bytes"] == request["received_bytes"] == sum(request["bytes_by_group"].values())
    assert request["prefix_hit"]["tokens"] == 0


@pytest.mark.parametrize("victim", ["daemon", "prefill", "decode"])
def test_a_process_that_is_killed_is_named_and_ends_the_others(victim):
    with running("--tokens", "256", "--layer-ms", "1000") as demo:
        children = children_at_work(demo, 3)
        children[victim].kill()
        _, err = demo.communicate(timeout=30)
    assert demo.returncode == 1
    name = "kvpoold" if victim == "daemon" else victim
    assert f"process_died error: {name} (process {children[victim].pid}) was ended by SIGKILL" in err
    assert all_gone(list(children.values()))


@pytest.mark.parametrize(
    ("number", "status", "way", "processes"), [(signal.SIGINT, 130, [], 3), (signal.SIGTERM, 143, ["--direct"], 2)]
)
def test_ctrl_c_leaves_no_process(number, status, way, processes):
    with running(*way, "--tokens", "256", "--layer-ms", "1000") as demo:
        children = children_at_work(demo, processes)
        demo.send_signal(number)
        demo.communicate(timeout=30)
    assert demo.returncode == status
    assert all_gone(list(children.values()))


def test_not_even_killing_the_demo_leaves_a_process():
    with running("--direct", "--tokens", "256", "--layer-ms", "1000") as demo:
        children = children_at_work(demo, 2)
        demo.kill()
        assert all_gone(list(children.values()))


def test_a_pool_too_small_says_so():
    with running("--tokens", "256", "--layer-ms", "0", "--memory", "32MiB") as demo:
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "pool_full error: prefill: " in err
    assert "give the pool more memory" in err


def test_more_memory_than_there_is_shows_what_kvpoold_said():
    with running("--tokens", "256", "--memory", "900TB") as demo:
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "kvpoold (process" in err
    assert "ended with status 2" in err
    assert "memory = " in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "64"], "--tokens must be more than one block"),
        (["--tokens", "1000", "--prefix-tokens", "100"], "multiple of the block size (64) below --tokens"),
        (["--prefix-tokens", "32768"], "below --tokens (32768), got 32768"),
        (["--block-tokens", "8"], "--block-tokens must be 16 to 1024, got 8"),
        (["--connections", "0"], "--connections must be 1 to 64, got 0"),
        (["--layer-ms", "-1"], "--layer-ms must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--memory", "lots"], "'lots' is not a size"),
        (["--preset", "gpt-9"], "gpt-9"),
        (["--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(arguments, said):
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


# -- the roles, in this process ----------------------------------------------------------------------


@asynccontextmanager
async def routes(kind: str, plan: Plan) -> AsyncIterator[tuple[ProducerRoute, ConsumerRoute]]:
    if kind == "direct":
        async with (
            direct_consumer(plan) as (consumer, host, port),
            direct_producer(plan, host, port) as producer,
        ):
            yield producer, consumer
    elif kind == "embedded":
        async with Pool.create(plan.pool_memory_bytes()) as pool:
            route = PoolRoute(plan, pool, await pool.namespace(plan.layout, plan.block_tokens))
            yield route, route
    else:
        core = PoolCore(PageArena(Arena(plan.pool_memory_bytes())), clock=time.monotonic)
        async with Endpoint() as endpoint:
            server = PoolServer(endpoint, core)
            host, port = await endpoint.listen()
            try:
                async with pool_route(plan, host, port) as producer, pool_route(plan, host, port) as consumer:
                    yield producer, consumer
            finally:
                await server.close()


def engine(plan: Plan, nbytes: int) -> EngineMemory:
    return EngineMemory(nbytes, seed=plan.seed, name="test")


@pytest.mark.parametrize("kind", ["direct", "embedded", "daemon"])
async def test_each_layer_is_consumed_before_the_next_is_computed(kind):
    """The overlap, without a clock: prefill may not compute layer k + 1 before decode has consumed layer k."""
    plan = Plan(tokens=200, prefix_tokens=128, layer_ms=0, direct=kind == "direct")
    cache = SyntheticCache(plan.request_tokens(1), plan.seed)
    layers = plan.layout.layers
    consumed = {layer: asyncio.Event() for layer in layers}
    order: list[tuple[str, int]] = []

    async def before(layer: int) -> None:
        if layer != layers[0]:
            await consumed[layers[layers.index(layer) - 1]].wait()

    def on_layer(station: str, layer: int, at: float) -> None:
        order.append((station, layer))
        if station == "consumed":
            consumed[layer].set()

    async def decode() -> None:
        extents = plan.layout.extents(plan.tokens, align=plan.block_tokens)
        into = engine(plan, plan.decode_memory_bytes()).place(extents)
        transfer = await consumer.follow(1, into)
        times = await consume(transfer, extents, into, cache, on_layer)
        await transfer.sealed()
        assert [layer for layer, _ in times] == list(layers)

    async def prefill() -> None:
        extents = plan.extents(await producer.match(1))
        transfer = await producer.open(1, 0)
        placed = engine(plan, plan.prefill_memory_bytes()).place(extents)
        await produce(
            transfer, extents, placed, cache, 0.0, lambda layer, at: order.append(("ready", layer)), before=before
        )
        await transfer.seal()

    async with asyncio.timeout(60), routes(kind, plan) as (producer, consumer):
        await asyncio.gather(decode(), prefill())
    for a, b in itertools.pairwise(layers):
        assert order.index(("consumed", a)) < order.index(("ready", b))
    await no_tasks_left()


async def test_a_second_request_fetches_its_prefix_and_sends_the_rest():
    plan = SMALL
    memory = engine(plan, plan.prefill_memory_bytes())

    async def prefill(number: int) -> int:
        cache = SyntheticCache(plan.request_tokens(number), plan.seed)
        memory.reset()
        start = await producer.match(number)
        transfer = await producer.open(number, start)
        before = None
        if start:
            prefix = await Prefix.fetch(plan, memory, producer, cache, number, start)
            before = prefix.layer
        extents = plan.extents(start)
        await produce(transfer, extents, memory.place(extents), cache, 0.0, lambda layer, at: None, before=before)
        await transfer.seal()
        if start:
            assert (await prefix.result())["moved_bytes"] == plan.layout.bytes_at(start)
        return start

    async with asyncio.timeout(60), routes("daemon", plan) as (producer, consumer):
        assert await prefill(1) == 0
        assert await prefill(2) == plan.prefix_tokens
        # Both whole requests are in the pool now, the second one partly in the first one's blocks.
        for number in (1, 2):
            extents = plan.layout.extents(plan.tokens, align=plan.block_tokens)
            into = engine(plan, plan.decode_memory_bytes()).place(extents)
            transfer = await consumer.follow(number, into)
            await consume(
                transfer, extents, into, SyntheticCache(plan.request_tokens(number), plan.seed), lambda *_: None
            )


async def test_wrong_content_with_right_checksums_is_caught_at_decode():
    plan = Plan(tokens=200, prefix_tokens=128, layer_ms=0, direct=True)
    others = SyntheticCache(plan.request_tokens(2), plan.seed)

    async def prefill() -> None:
        extents = plan.extents(0)
        transfer = await producer.open(1, 0)
        placed = engine(plan, plan.prefill_memory_bytes()).place(extents)
        await produce(transfer, extents, placed, others, 0.0, lambda layer, at: None)

    async def decode() -> None:
        extents = plan.layout.extents(plan.tokens, align=plan.block_tokens)
        into = engine(plan, plan.decode_memory_bytes()).place(extents)
        transfer = await consumer.follow(1, into)
        own = SyntheticCache(plan.request_tokens(1), plan.seed)
        with pytest.raises(
            IntegrityError, match=r"layer 0 of the request, tensor 0: .* although every checksum was right"
        ):
            await consume(transfer, extents, into, own, lambda *_: None)

    async with asyncio.timeout(60), routes("direct", plan) as (producer, consumer):
        await asyncio.gather(decode(), prefill())
    await no_tasks_left()


# -- the parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["kimi-linear-48b", "mimo-v2-flash"])
def test_content_depends_on_layer_tensor_position_and_every_token_before(preset):
    plan = Plan(preset, tokens=320, prefix_tokens=192, layer_ms=0)
    one, two = (SyntheticCache(plan.request_tokens(n), plan.seed) for n in (1, 2))
    whole = plan.layout.extents(plan.tokens, align=plan.block_tokens)
    prefix = plan.layout.extents(plan.prefix_tokens, align=plan.block_tokens)
    seen = [one.extent(e).hash() for e in whole]
    assert len(set(seen)) == len(seen)
    assert seen == [SyntheticCache(plan.request_tokens(1), plan.seed).extent(e).hash() for e in whole]
    assert all(one.extent(e).hash() == two.extent(e).hash() for e in prefix)
    assert not any(one.extent(e).hash() == two.extent(e).hash() for e in whole)
    other_seed = SyntheticCache(plan.request_tokens(1), plan.seed + 1)
    assert not any(one.extent(e).hash() == other_seed.extent(e).hash() for e in whole)
    for extent in whole:
        assert one.extent(extent).nbytes == extent.nbytes
        # Tokens differ from one another; a window in 2^20 may be another one's.
        data = one.extent(extent).tobytes()
        parts = {data[at : at + extent.unit] for at in range(0, extent.nbytes, extent.unit)}
        assert len(parts) >= 0.98 * (extent.nbytes // extent.unit)


def test_check_finds_a_flipped_bit_and_two_swapped_tokens():
    plan = SMALL
    cache = SyntheticCache(plan.request_tokens(1), plan.seed)
    extents = by_layer(plan.extents(0))[3]  # full attention: (layer 3, tensors 0 and 1)
    memory = engine(plan, EngineMemory.size_of(extents))
    placed = memory.place(extents)
    for extent in extents:
        fill(placed[extent.layer, extent.tensor], cache, extent)
    check(placed, cache, extents, "layer 3")
    pages, unit = placed[3, 0], extents[0].unit
    at = int(pages.pieces[0, 0])
    base = np.frombuffer(pages.base, np.uint8)
    base[at] ^= 1
    with pytest.raises(IntegrityError, match="layer 3, tensor 0"):
        check(placed, cache, extents, "layer 3")
    base[at] ^= 1
    check(placed, cache, extents, "layer 3")
    tokens = base[at : at + 2 * unit].reshape(2, unit)
    tokens[:] = tokens[::-1].copy()
    with pytest.raises(IntegrityError, match="layer 3, tensor 0"):
        check(placed, cache, extents, "layer 3")


def test_engine_memory_is_paged_disjoint_and_wiped():
    plan = SMALL
    extents = plan.extents(0)
    memory = engine(plan, EngineMemory.size_of(extents))
    placed = memory.place(extents)
    taken = np.concatenate([pages.pieces for pages in placed.values()])
    taken = taken[np.argsort(taken[:, 0])]
    assert (taken[1:, 0] >= taken[:-1].sum(axis=1)).all()
    assert len(placed[3, 0].pieces) > 1
    cache = SyntheticCache(plan.request_tokens(1), plan.seed)
    for extent in extents:
        fill(placed[extent.layer, extent.tensor], cache, extent)
    memory.reset()
    assert not any(np.frombuffer(pages.tobytes(), np.uint8).any() for pages in placed.values())
    with pytest.raises(AssertionError, match="sized too small"):
        memory.place([*extents, *extents])


def test_pool_memory_has_room_for_both_requests_of_every_preset():
    for preset in ("kimi-linear-48b", "mimo-v2-flash"):
        plan = Plan(preset, tokens=1000, prefix_tokens=704, layer_ms=0)
        core = PoolCore(PageArena(Arena(plan.pool_memory_bytes(), lock="off", populate=False)), clock=lambda: 0.0)
        ns = core.open_namespace("default", plan.layout, plan.block_tokens)
        for number, start in ((1, 0), (2, plan.prefix_tokens)):
            chain = KeyChain(ns, plan.request_tokens(number))
            assert core.match(ns, chain).length == start
            put = core.begin_put(
                ns, chain, boundary=plan.tokens, start=start, checkpoints=plan.checkpoints(start), deadline=9.0
            )
            for slot, extent in put.extents.items():
                put.progress(*slot, 0, extent.nbytes)
            put.commit()
        assert core.stat()["evictions"] == {}


def test_plan_travels_and_refuses_what_does_not_fit():
    assert Plan.from_dict(json.loads(json.dumps(SMALL.as_dict()))) == SMALL
    assert Plan.default_prefix(32_768, 64) == 24_576
    assert Plan.default_prefix(65, 64) == 64
    assert len({SMALL.request_id(n) for n in (1, 2)}) == 2
    with pytest.raises(ConfigError, match="--prefix-tokens"):
        Plan(tokens=128, prefix_tokens=128)


def test_report_says_what_was_hidden_and_what_was_exposed():
    plan = Plan("mimo-v2-flash", tokens=128, prefix_tokens=64, layer_ms=0, direct=True)
    layers = plan.layout.layers
    stats = dict.fromkeys(("moved_bytes", "chunks", "checksums_verified", "corrupt_chunks", "resent_bytes"), 0)
    # A layer every second, half a second on its way; the last one arrives two seconds late.
    ready = [(layer, 100.0 + i) for i, layer in enumerate(layers)]
    applied = [(layer, at + 0.5) for layer, at in ready[:-1]] + [(layers[-1], ready[-1][1] + 2.0)]
    prefill = {
        "number": 1,
        "start": 0,
        "begun_s": 99.0,
        "computing_s": 99.0,
        "ready_s": ready,
        "prefix": None,
        "sent": stats,
    }
    decode = {
        "first_byte_s": [(layer, at + 0.1) for layer, at in ready],
        "applied_s": applied,
        "consumed_s": applied,
        "content_verified": True,
        "received": stats,
    }
    report = request_report(plan, prefill, decode, 90.0)
    n = len(layers)
    assert report["on_the_way_s"] == pytest.approx((n - 1) * 0.5 + 2.0)
    assert report["exposed_s"] == pytest.approx(2.0)
    assert report["hidden_s"] == pytest.approx((n - 1) * 0.5)
    assert report["prefill_s"] == pytest.approx(n)
    assert report["goodput_gbps"] == pytest.approx(
        sum(e.nbytes for e in plan.extents(0)) * 8e-9 / report["on_the_way_s"]
    )
    assert report["layers"][0]["ready_s"] == pytest.approx(10.0)


def test_daemon_line():
    assert daemon_line("kvpoold listening on 127.0.0.1:4711, 1048576 bytes") == {
        "event": "up",
        "host": "127.0.0.1",
        "port": 4711,
    }
    assert daemon_line("kvpoold: note: not locked") is None
