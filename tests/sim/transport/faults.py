"""The faults of a plan, each when its time has come."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvtransport.engine.incoming import PythonIncoming
from kvtransport.wire import bodies
from kvtransport.wire.frames import FrameType
from kvtransport.wire.state import TransferEvent

from .network import SimStream

if TYPE_CHECKING:
    from .world import Job, World


async def inject(world: World) -> None:
    start = world.loop.time()
    for at, name in world.plan.faults:
        await asyncio.sleep(max(0.0, start + at - world.loop.time()))
        world.log(f"fault: {name}")
        world.injected.append(name)
        result = ACTIONS_BY_NAME[name](world)
        if result is not None:
            await result
        world.check_incarnations()


def _pick(world: World) -> tuple[SimStream, SimStream] | None:
    live = world.network.live()
    return world.rng.choice(live) if live else None


def _end(world: World, pair: tuple[SimStream, SimStream]) -> SimStream:
    return pair[world.rng.randrange(2)]


def _cut(world: World, pair: tuple[SimStream, SimStream]) -> None:
    """Each side learns in its own time; one of them perhaps only by its keepalive."""
    rng = world.rng
    deaf = rng.choice((None, None, None, 0, 1))
    for i, stream in enumerate(pair):
        if i != deaf:
            stream.broke(rng.choice((0.0, 0.001, 0.05, 0.3)), drop=rng.random() < 0.5)


def _cut_one(world: World) -> None:
    pair = _pick(world)
    if pair is not None:
        _cut(world, pair)


def _cut_all(world: World) -> None:
    for pair in world.network.live():
        _cut(world, pair)


def _reset_one(world: World) -> None:
    """The peer's kernel drops the connection: everything on its way is lost, both know at once."""
    pair = _pick(world)
    if pair is not None:
        for stream in pair:
            stream.broke(0.0)


def _hole_one(world: World) -> None:
    pair = _pick(world)
    if pair is not None:
        pair[0].black_hole()


def _hole_all(world: World) -> None:
    for pair in world.network.live():
        pair[0].black_hole()


def _stall(world: World) -> None:
    pair = _pick(world)
    if pair is not None:
        _end(world, pair).stall(world.rng.choice((0.1, 0.5, 1.5)))


def _pause(world: World) -> None:
    pair = _pick(world)
    if pair is not None:
        _end(world, pair).pause(world.rng.choice((0.05, 0.3, 1.0)))


def _flip(world: World) -> None:
    pair = _pick(world)
    if pair is not None:
        _end(world, pair).flip(
            world.rng.choice((world.rng.randrange(64), world.rng.randrange(4000))), world.rng.randrange(8)
        )


def _flowing(world: World) -> list[Job]:
    return [
        job
        for job in world.jobs
        if job.receiver is not None
        and job.sender is not None
        and job.receiver._machine.allows(TransferEvent.SEND_RESUME)
    ]


def _resume(world: World) -> None:
    """The consumer asks for something again: it may at any time, and what is on its way arrives twice."""
    jobs = _flowing(world)
    if not jobs:
        return
    job = world.rng.choice(jobs)
    assert job.receiver is not None
    slots = [slot for slot, data in job.truth.items() if data]
    if not slots:
        return
    slot = world.rng.choice(slots)
    assert isinstance(job.receiver._into, PythonIncoming)
    missing = job.receiver._into._ranges[slot].missing(0, len(job.truth[slot]))
    ranges = bodies.byte_ranges([(*slot, start, stop) for start, stop in missing])
    if ranges:
        job.receiver._machine.fire(TransferEvent.SEND_RESUME)
        job.receiver._send(FrameType.RESUME, bodies.Resume(ranges=ranges))


def _restate(world: World) -> None:
    """Both sides say again what is true, as after a lost connection: every frame of it is a duplicate."""
    for job in _flowing(world):
        assert job.receiver is not None
        assert job.sender is not None
        job.receiver.say_again(None)
        if job.sender.error is None and not job.sender._machine.terminal:
            job.sender.say_again(None)


async def _unreachable(world: World) -> None:
    world.network.unreachable = True
    await asyncio.sleep(world.rng.choice((0.1, 1.0)))
    world.network.unreachable = False


async def _restart(world: World) -> None:
    """A process dies without a word, and another incarnation takes its place."""
    which = world.rng.choice(("A", "D"))
    old = world.acceptor if which == "A" else world.dialler
    loud = world.rng.random() < 0.7
    for mine, theirs in list(world.network.streams):
        stream = mine if mine.process is old else theirs if theirs.process is old else None
        if stream is None or stream.closed:
            continue
        assert stream.other is not None
        if loud:
            stream.other.broke(world.rng.random() * 0.05)
            stream.out.gone = stream.into.gone = True
        else:
            stream.black_hole()
    old.dead = True
    await old.endpoint.close()
    await asyncio.sleep(world.rng.choice((0.0, 0.01, 0.5)))
    new = world.start_process(which)
    if which == "A":
        world.acceptor = new
        await new.endpoint.listen("a", 7000)
    else:
        world.dialler = new
        await world.listen_too(new)


ACTIONS_BY_NAME = {
    "cut one": _cut_one,
    "cut all": _cut_all,
    "reset one": _reset_one,
    "hole one": _hole_one,
    "hole all": _hole_all,
    "stall": _stall,
    "pause": _pause,
    "flip": _flip,
    "resume": _resume,
    "restate": _restate,
    "unreachable": _unreachable,
    "restart": _restart,
}
