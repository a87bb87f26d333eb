"""KV cache events over real ZeroMQ sockets: loss, late joiners, slow subscribers, kvpoold itself."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys

import pytest
import zmq

import kvpool
from kvpool.events.engine import EngineCache
from kvpool.events.messages import BlockRemoved
from kvpool.events.publisher import END, HIGH_WATER, EventPublisher
from kvpool.events.subscriber import EventSubscriber
from kvpool.keys import KeyChain
from kvtransport.errors import ConfigError
from tests.clusterkit import CUT, put
from tests.conftest import no_tasks_left
from tests.poolkit import store
from tests.unit.test_events import World, tokens, truth, watched

LOOPBACK = "tcp://127.0.0.1:*"


async def until(what, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.01)


@pytest.fixture
async def stage():
    core, log, ns = watched()
    publisher = EventPublisher(log, LOOPBACK, LOOPBACK)
    await publisher.start()
    yield core, log, ns, publisher
    await publisher.close()
    await no_tasks_left()


def follow(publisher: EventPublisher, world: World, **options) -> EventSubscriber:
    return EventSubscriber(publisher.endpoint, publisher.replay, apply=world.apply, reset=world.reset, **options)


async def test_a_late_joiner_and_one_from_the_beginning_know_the_same(stage):
    core, _, ns, publisher = stage
    early, late = World(), World()
    async with follow(publisher, early) as first:
        for seed in range(20):
            store(core, ns, tokens(16 * 12, seed))
        await until(lambda: early.known == truth(core, ns))
        async with follow(publisher, late) as second:
            await until(lambda: late.known == truth(core, ns))
            core.clear()
            store(core, ns, tokens(64, 77))
            await until(lambda: early.known == late.known == truth(core, ns))
            assert first.following
            assert second.following
            assert len(truth(core, ns)) > 0


async def test_a_lost_message_is_asked_for(stage):
    core, log, ns, publisher = stage
    world = World()
    store(core, ns, tokens(64, 0))
    async with follow(publisher, world) as subscriber:
        await until(lambda: world.known == truth(core, ns) and subscriber.following)
        publisher._log.changed = lambda: None
        store(core, ns, tokens(64, 1))
        assert log.take() is not None  # numbered, kept, never sent
        publisher._log.changed = publisher._wake.set
        store(core, ns, tokens(64, 2))
        await until(lambda: world.known == truth(core, ns))
        assert (subscriber.sequence.gaps, world.resets) == (1, 0)


async def test_the_frames_are_those_of_vllm(stage):
    core, log, ns, publisher = stage
    with zmq.Context() as context, context.socket(zmq.SUB) as sub, context.socket(zmq.DEALER) as asker:
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.connect(publisher.endpoint)
        asker.connect(publisher.replay)
        await asyncio.sleep(0.2)
        number = log.next
        store(core, ns, tokens(64, 0))
        while not sub.poll(0):
            await asyncio.sleep(0.01)
        topic, seq, payload = sub.recv_multipart()
        assert (topic, seq) == (b"", number.to_bytes(8, "big"))
        asker.send_multipart([b"", seq])
        frames = []
        async with asyncio.timeout(5):
            while not frames or frames[-1][1] != END:
                if asker.poll(0):
                    frames.append(asker.recv_multipart())
                await asyncio.sleep(0.01)
        assert frames == [[b"", seq, payload], [b"", b"\xff" * 8, b""]]


async def test_a_subscriber_that_does_not_read_costs_nobody_anything(stage):
    """It misses what does not fit and the pool does not wait; afterwards it knows everything again."""
    core, log, ns, publisher = stage
    lazy = World()
    store(core, ns, tokens(64, 1))
    async with follow(publisher, lazy) as sleeper:
        await until(lambda: sleeper.following)
        sleeper._task.cancel()
        await asyncio.wait([sleeper._task])
        keys = [i.to_bytes(32, "big") for i in range(4096)]
        first, count = log.next, HIGH_WATER * 4
        for _ in range(count):
            log._add([BlockRemoved(keys, "CPU", 0)])
            await asyncio.sleep(0)
        await until(lambda: log.next >= first + count)  # 140 MB, and nobody took them
        sleeper._task = asyncio.get_running_loop().create_task(sleeper._follow())
        store(core, ns, tokens(64, 2))
        await until(lambda: lazy.known == truth(core, ns) and sleeper.following, 20)
        assert sleeper.sequence.gaps >= 1


async def test_a_replay_that_nobody_answers_does_not_hold_events_back(stage):
    _, _, _, publisher = stage
    world = World()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.bind("tcp://127.0.0.1:*")
        where = deaf.getsockopt(zmq.LAST_ENDPOINT).decode()
        subscriber = EventSubscriber(publisher.endpoint, where, apply=world.apply, reset=world.reset, replay_s=0.2)
        async with subscriber:
            await until(lambda: subscriber.sequence.resets >= 2)
            assert not subscriber.following


async def test_an_address_in_use_is_said_and_nothing_is_left(stage):
    _, log, _, publisher = stage
    second = EventPublisher(log, LOOPBACK, publisher.endpoint)
    with pytest.raises(ConfigError, match="cannot publish events"):
        await second.start()


async def test_kvpoold_publishes_and_restarts(tmp_path):
    world = World()
    engine = EngineCache()

    def daemon(*options: str) -> tuple[subprocess.Popen[str], int, list[str]]:
        command = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", "16MiB", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = ""
        while "events on" not in said:
            said = process.stderr.readline()
            assert said, process.wait()
        return process, int(re.search(r":(\d+),", process.stdout.readline())[1]), re.findall(r"tcp://[\d.:]+", said)

    process, port, (events, replay) = daemon("--events", LOOPBACK, "--events-replay", LOOPBACK)
    try:
        async with (
            EventSubscriber(events, replay, apply=engine.apply, reset=engine.reset),
            EventSubscriber(events, replay, apply=world.apply, reset=world.reset),
        ):
            async with await kvpool.connect("127.0.0.1", port) as pool:
                ns = await pool.namespace(CUT, 16)
                prompt = tokens(16 * 40 + 1, 5)
                await put(pool, ns, prompt, 16 * 40, checkpoints=(320,))
                keys = KeyChain(ns, prompt).blocks
                await until(lambda: engine.match(keys, len(prompt)).length == 16 * 40)
                assert engine.match(keys, len(prompt)).restorable == (320, 640)
                shown = await asyncio.to_thread(
                    subprocess.run,
                    [sys.executable, "-m", "kvpool.cli", "events", events, "--replay", replay, "--json", "--seconds", "2"],
                    capture_output=True, text=True, timeout=60, check=True,
                )  # fmt: skip
                blocks = {h for line in map(json.loads, shown.stdout.splitlines()) for h in line.get("blocks", ())}
                assert {k.hex() for k in keys} <= blocks
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=20)
            await asyncio.sleep(1.1)  # numbers begin with the second
            process, port, _ = daemon("--events", events, "--events-replay", replay)
            async with await kvpool.connect("127.0.0.1", port) as pool:
                ns = await pool.namespace(CUT, 16)
                other = tokens(64, 6)
                await put(pool, ns, other, 64)
                await until(lambda: engine.match(KeyChain(ns, other).blocks, 65).length == 64)
                assert engine.match(keys, len(prompt)).length == 0
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0
    await no_tasks_left()
