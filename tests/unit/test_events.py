"""KV cache events: the bytes are vLLM's, the order of arrivals does not matter, nothing is believed after a loss."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest

from kvpool.core import PoolCore
from kvpool.events import messages
from kvpool.events.engine import EngineCache
from kvpool.events.log import EventLog
from kvpool.events.messages import decode, encode
from kvpool.events.sequence import Sequence, Standing
from kvpool.keys import KeyChain
from kvtransport.errors import InsecureBindError, ProtocolError
from tests.poolkit import LAYOUTS, make_core, store

# -- the structs of vLLM 0.32.0, vllm/distributed/kv_events.py (Apache-2.0): field names, their order and defaults ------------


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


# -- SGLang, python/sglang/srt/disaggregation/kv_events.py (Apache-2.0): events are arrays ------------------------------------


class SglangStored(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


class SglangRemoved(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockRemoved"):
    block_hashes: list[int]


class SglangCleared(msgspec.Struct, array_like=True, omit_defaults=True, tag="AllBlocksCleared"):
    pass


KEY = bytes(range(32))


def test_our_bytes_are_vllms():
    theirs = msgspec.msgpack.encode(
        KVEventBatch(
            1.5,
            [
                BlockStored([KEY, 7], None, [1, 2], 16, None, "CPU", None, group_idx=1, kv_cache_spec_kind="mamba"),
                BlockStored([KEY], KEY, [], 16, 3, None, "a", [("x",)], 0, "sliding_window", 64, "REMOTE", "us", "s"),
                BlockRemoved([KEY], "GPU", 0, None, "us"),
                AllBlocksCleared(),
            ],
            2,
        )
    )
    ours = encode(
        1.5,
        [
            messages.BlockStored(
                [KEY, 7], None, [1, 2], 16, None, "CPU", None, group_idx=1, kv_cache_spec_kind="mamba"
            ),
            messages.BlockStored(
                [KEY], KEY, [], 16, 3, None, "a", [("x",)], 0, "sliding_window", 64, "REMOTE", "us", "s"
            ),
            messages.BlockRemoved([KEY], "GPU", 0, None, "us"),
            messages.AllBlocksCleared(),
        ],
        2,
    )
    assert ours == theirs
    assert msgspec.msgpack.decode(ours, type=KVEventBatch).events[0].block_hashes == [KEY, 7]
    again = decode(theirs)
    assert encode(again.ts, again.events, again.data_parallel_rank) == theirs


def test_sglangs_and_later_forms_are_read():
    arrays = [SglangStored([5, -3], 9, [1, 2], 1, None), SglangRemoved([5]), SglangCleared()]
    batch = decode(msgspec.msgpack.encode([2.0, arrays]))
    assert batch.events == [
        messages.BlockStored([5, -3], 9, [1, 2], 1, None, None, None),
        messages.BlockRemoved([5], None),
        messages.AllBlocksCleared(),
    ]
    as_map = {
        "ts": 2,
        "events": [{"type": "BlockRemoved", "block_hashes": [1], "medium": None, "new": 1}, ["Later", 1]],
    }
    assert decode(msgspec.msgpack.encode(as_map)).events == [messages.BlockRemoved([1], None)]


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x01", b"\x91\x01", b"\x92\x01\x91\x90", b"\x92\x01\x91\x92\xabBlockStored\x01"]
)
def test_what_is_no_batch_is_refused(body):
    with pytest.raises(ProtocolError):
        decode(body)


# -- the log ----------------------------------------------------------------------------------------------------------------


FIRST = 5 << 20
"""The number that a log begins with whose clock shows 5 seconds."""


def watched(layout="everything", life: float = 5.0, **options) -> tuple[PoolCore, EventLog, Any]:
    core = make_core()
    core.watcher = log = EventLog(clock=lambda: life, **options)
    return core, log, core.open_namespace("default", LAYOUTS[layout], 16)


def drain(log: EventLog) -> list[tuple[int, bytes]]:
    out = []
    while (batch := log.take()) is not None:
        out.append(batch)
    return out


class World:
    """What a follower knows: (group, hash)."""

    def __init__(self):
        self.known = set()
        self.resets = 0

    def reset(self):
        self.known.clear()
        self.resets += 1

    def apply(self, batch):
        for e in batch.events:
            if isinstance(e, messages.AllBlocksCleared):
                self.known.clear()
            elif isinstance(e, messages.BlockStored):
                self.known |= {(e.group_idx, h) for h in e.block_hashes}
            else:
                self.known -= {(e.group_idx, h) for h in e.block_hashes}


def truth(core: PoolCore, ns) -> set:
    tree = core._rooms[ns.id].tree
    out = set()
    for unit, groups in enumerate(tree.units):
        for node in tree.held(unit).tolist():
            if tree.place_of(node)[1] % 16 == 0:
                out |= {(g, tree.key(unit, node)) for g in groups}
    return out


def tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50_000, n).tolist()


def test_events_say_what_is_there():
    core, log, ns = watched()
    world = World()
    prompt = tokens(16 * 20 + 5, 1)
    store(core, ns, prompt, 16 * 20, checkpoints=(160, 77))
    batches = drain(log)
    for _, payload in batches:
        world.apply(decode(payload))
    assert world.known == truth(core, ns)
    assert [n for n, _ in batches] == list(range(FIRST, FIRST + len(batches)))
    stored = decode(batches[0][1]).events
    keys = KeyChain(ns, prompt).blocks
    full = next(e for e in stored if e.kv_cache_spec_kind == "full_attention" and len(e.block_hashes) == 20)
    assert (full.block_hashes, full.parent_block_hash, full.block_size) == (keys, None, 16)
    states = [e for e in stored if e.kv_cache_spec_kind == "mamba"]
    assert {(e.parent_block_hash, *e.block_hashes) for e in states} == {(keys[8], keys[9]), (keys[18], keys[19])}
    core.clear()
    for _, payload in drain(log):
        world.apply(decode(payload))
    assert world.known == truth(core, ns) == set()


def test_other_tenants_are_not_told_of():
    core, log, _ = watched()
    other = core.open_namespace("other", LAYOUTS["everything"], 16)
    store(core, other, tokens(64, 1))
    core.clear()
    assert log.take() is None
    assert list(log.snapshot())[1:] == []


def test_what_is_kept_is_bounded_and_a_snapshot_stands_in():
    core, log, ns = watched(max_batches=3)
    for seed in range(8):
        store(core, ns, tokens(64, seed))
        drain(log)
    assert log.since(0) is None
    assert [n for n, _ in log.since(FIRST + 6)] == [FIRST + 6, FIRST + 7]
    assert log.since(FIRST + 8) == []
    assert log.since(FIRST + 9) is None  # of another life
    world = World()
    for number, payload in log.snapshot():
        assert number == FIRST + 7
        world.apply(decode(payload))
    assert world.known == truth(core, ns)


def test_too_much_at_once_is_dropped_and_everybody_resynchronises():
    core, log, ns = watched(max_pending=50)
    world = World()
    sequence = Sequence(world.apply, world.reset, can_ask=True)
    store(core, ns, tokens(64, 0))
    assert sequence.came(*log.take()) == 0
    for number, payload in log.snapshot():
        sequence.replayed(number, payload)
    assert sequence.replay_ended() is None
    for seed in range(1, 6):
        store(core, ns, tokens(128, seed))
    assert log.dropped > 0
    store(core, ns, tokens(64, 9))
    asks = [sequence.came(n, p) for n, p in drain(log)]
    assert asks[0] == FIRST + 1  # the number left out
    assert log.since(FIRST + 1) is None
    for number, payload in log.snapshot():
        sequence.replayed(number, payload)
    assert sequence.replay_ended() is None
    assert (world.known, world.resets) == (truth(core, ns), 0)


@pytest.mark.parametrize("seed", range(60))
def test_any_losses_end_in_the_truth(seed):
    """Batches are lost, the publisher forgets or begins anew; whenever the follower is up to date it knows what is there."""
    rng = random.Random(seed)
    core, log, ns = watched(max_batches=rng.choice([1, 3, 50]))
    world = World()
    sequence = Sequence(world.apply, world.reset, can_ask=True)
    asked: int | None = None
    rounds = 0

    def answer():
        nonlocal asked, rounds
        while asked is not None:
            rounds += 1
            kept = log.since(asked)
            for number, payload in log.snapshot() if kept is None else kept:
                sequence.replayed(number, payload)
            asked = sequence.replay_ended()

    def publish(loss: float) -> None:
        nonlocal asked
        for number, payload in drain(log):
            if rng.random() >= loss:
                ask = sequence.came(number, payload)
                asked = ask if asked is None else asked

    for life in range(30):
        if rng.random() < 0.1:  # another process, empty
            core, log, ns = watched(max_batches=rng.choice([1, 3, 50]), life=6.0 + life)
        store(core, ns, tokens(16 * rng.randrange(1, 9), rng.randrange(6)))
        if rng.random() < 0.2:
            core.clear()
        publish(0.4)
        if rng.random() < 0.7:
            answer()
    for more in range(3):
        store(core, ns, tokens(64, 99 + more))
        publish(0.0)
        answer()
    assert sequence.standing is Standing.FOLLOWING
    assert rounds < 100
    assert sequence.expected == log.next
    assert world.known == truth(core, ns)


def batch(*events, ts=1.0) -> bytes:
    return encode(ts, events)


def one(key: int) -> messages.BlockStored:
    return messages.BlockStored([key], None, [], 16, None, "GPU", None, group_idx=0)


def keys_of(world: World) -> list:
    return sorted(h for _, h in world.known)


def test_a_gap_is_filled_by_a_replay_and_what_came_meanwhile_is_applied_after():
    world = World()
    sequence = Sequence(world.apply, world.reset, can_ask=True)
    assert sequence.came(0, batch(one(0))) is None
    assert sequence.came(3, batch(one(3))) == 1
    assert sequence.came(4, batch(messages.BlockRemoved([1], "GPU", 0))) is None
    assert keys_of(world) == [0]
    sequence.replayed(1, batch(one(1)))
    sequence.replayed(2, batch(one(2)))
    sequence.replayed(3, batch(one(3)))
    assert sequence.replay_ended() is None
    assert (keys_of(world), world.resets, sequence.gaps) == ([0, 2, 3], 0, 1)


def test_an_engine_that_has_forgotten_the_gap_voids_what_was_known():
    world = World()
    sequence = Sequence(world.apply, world.reset, can_ask=True)
    sequence.came(0, batch(one(0)))
    assert sequence.came(9, batch(one(9))) == 1
    sequence.replayed(8, batch(one(8)))
    sequence.replayed(9, batch(one(9)))
    assert sequence.replay_ended() is None
    assert (keys_of(world), world.resets) == ([8, 9], 1)
    assert sequence.came(12, batch(one(12))) == 10
    assert sequence.replay_ended() is None  # it had nothing at all
    assert (keys_of(world), world.resets) == ([12], 2)


def test_without_a_replay_a_gap_voids_and_so_does_a_restart():
    world = World()
    sequence = Sequence(world.apply, world.reset, can_ask=False)
    sequence.came(5, batch(one(5)))  # a late joiner knows what it has seen
    assert keys_of(world) == [5]
    sequence.came(7, batch(one(7)))
    assert (keys_of(world), world.resets) == ([7], 1)
    sequence.came(0, batch(one(0)))
    assert (keys_of(world), world.resets) == ([0], 2)
    sequence.came(1, b"rubbish")
    assert (keys_of(world), sequence.malformed) == ([], 1)


# -- what an engine holds -----------------------------------------------------------------------------------------------------


def stored(keys, *, group=0, kind="full_attention", window=None, medium="GPU", size=16) -> messages.BlockStored:
    return messages.BlockStored(
        keys, None, [], size, None, medium, None, group_idx=group, kv_cache_spec_kind=kind,
        kv_cache_spec_sliding_window=window,
    )  # fmt: skip


def test_the_router_learns_what_an_engine_can_start_from():
    engine = EngineCache()
    assert engine.match([1, 2, 3], 100).length == 0
    engine.apply(decode(batch(stored([1, 2, 3, 4]), stored([2, 4], group=1, kind="mamba"))))
    assert engine.match([1, 2, 3, 4], 65).restorable == (32, 64)
    assert engine.match([1, 2, 3, 4], 64).restorable == (32,)  # the last token must be computed
    assert engine.match([1, 9, 3, 4], 65).length == 0
    engine.apply(decode(batch(messages.BlockRemoved([4], "GPU", 1))))
    assert engine.match([1, 2, 3, 4], 65).length == 32
    engine.apply(decode(batch(stored([1, 2], medium="CPU"), messages.BlockRemoved([1, 2], "GPU"))))
    assert engine.match([1, 2], 40).length == 0  # group 1 has lost its state at 2
    engine.apply(decode(batch(stored([2], group=1, kind="mamba"))))
    assert engine.match([1, 2], 40).length == 32  # still in CPU memory
    engine.apply(decode(batch(messages.AllBlocksCleared())))
    assert (len(engine), engine.match([1, 2], 40).length) == (0, 0)


def test_windows_and_unknown_kinds_of_engines():
    engine = EngineCache(media=["GPU"])
    engine.apply(decode(batch(stored([3, 4], kind="sliding_window", window=32), stored([1], medium="CPU"))))
    assert engine.match([1, 2, 3, 4], 65).restorable == (64,)
    assert len(engine) == 2
    engine.apply(decode(batch(stored([1], group=1, kind="chunked_local_attention"))))
    assert engine.match([1, 2, 3, 4], 65).length == 0


def test_what_is_remembered_of_an_engine_is_bounded():
    engine = EngineCache(max_blocks=10)
    for first in range(0, 100, 5):
        engine.apply(decode(batch(stored(list(range(first, first + 5))))))
    assert len(engine) == 10
    assert engine.match(list(range(90, 100)), 1000).length == 160


def test_publishing_beyond_this_machine_must_be_asked_for():
    from kvpool.events.sockets import check_bind

    for endpoint in ("tcp://127.0.0.1:0", "tcp://[::1]:1", "ipc:///tmp/x"):
        check_bind(endpoint, False)
    with pytest.raises(InsecureBindError, match="insecure = true"):
        check_bind("tcp://*:5557", False)
    check_bind("tcp://*:5557", True)
