"""Background tasks of a node and of a client."""

from __future__ import annotations

import asyncio

from kvpool.cluster import tasks


async def test_what_fails_unexpectedly_is_told_and_begins_again(monkeypatch):
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    runs = []

    async def work() -> None:
        runs.append(len(runs))
        await asyncio.sleep(0)
        if len(runs) < 3:
            raise ValueError(f"run {runs[-1]}")

    await asyncio.wait_for(tasks.keep_running(work, "the work"), 5)
    assert runs == [0, 1, 2]
    assert [str(t["exception"]) for t in told] == ["run 0", "run 1"]
    assert all(t["message"].startswith("the work failed") for t in told)


async def test_cancelled_it_ends():
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(tasks.keep_running(work, "the work"))
    await begun.wait()
    await tasks.end([task])
    assert task.cancelled()
