"""The demo itself: a pool, a prefill and a decode process, two requests, one report."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any

from .plan import POOL_PAGE_BYTES, Plan
from .processes import Child, Crew
from .progress import Progress
from .report import demo_report, request_report
from .worker import clock

START_S = 60.0
"""Seconds until a process must be up: it imports, and takes and touches its memory."""


def daemon_line(line: str) -> dict[str, Any] | None:
    """kvpoold's line that it is listening, as an event."""
    found = re.match(r"kvpoold listening on (\S+):(\d+)", line)
    return None if found is None else {"event": "up", "host": found[1], "port": int(found[2])}


async def start_pool(crew: Crew, memory_bytes: int) -> Child:
    """A kvpoold of ``memory_bytes`` on any free port of loopback; its ``up`` event says which."""
    arguments = ["-m", "kvpool.daemon", "--port", "0", "--memory", str(memory_bytes), "--grace-s", "1"]
    return await crew.start("kvpoold", arguments, on_line=daemon_line)


async def run(crew: Crew, plan: Plan, memory_bytes: int, progress: Progress) -> dict[str, Any]:
    """Run ``plan`` with a pool of ``memory_bytes``; returns the report. The processes are ``crew``'s to end."""
    origin = clock()
    memory: dict[str, int] = {}
    pool_at: dict[str, Any] = {}
    # All at once: starting Python and touching memory is most of the time that a demo is not the demo.
    daemon = None if plan.direct else await start_pool(crew, memory_bytes)
    prefill = await crew.start("prefill", ["-m", "kvpool.demo.prefill"], on_event=partial(progress.on_event, "prefill"))
    decode = await crew.start("decode", ["-m", "kvpool.demo.decode"], on_event=partial(progress.on_event, "decode"))
    if daemon is not None:
        pool_at = _address(await daemon.receive("up", timeout_s=START_S))
        memory["kvpoold"] = memory_bytes // POOL_PAGE_BYTES * POOL_PAGE_BYTES
    await decode.send(op="setup", plan=plan.as_dict(), **pool_at)
    if daemon is not None:
        await prefill.send(op="setup", plan=plan.as_dict(), **pool_at)
    up = await decode.receive("up", timeout_s=START_S)
    memory["decode"] = up["memory_bytes"]
    if daemon is None:
        await prefill.send(op="setup", plan=plan.as_dict(), **_address(up))
    memory["prefill"] = (await prefill.receive("up", timeout_s=START_S))["memory_bytes"]
    requests = []
    pool: dict[str, Any] = {}
    for number in plan.requests:
        progress.say(f"request {number}: {plan.tokens:,} tokens, decode reads behind prefill")
        await decode.send(op="request", number=number)
        await prefill.send(op="request", number=number)
        # Longer than the deadlines of the transfers, whose errors say more.
        limit_s = 2 * plan.deadline_s(plan.layout.bytes_at(plan.tokens)) + START_S
        produced, received = await asyncio.gather(
            prefill.receive("done", timeout_s=limit_s), decode.receive("done", timeout_s=limit_s)
        )
        requests.append(request_report(plan, produced, received, origin))
        pool = produced["pool"]
    progress.say(f"done in {clock() - origin:.1f} s")
    return demo_report(plan, requests, memory, pool, origin)


def _address(event: dict[str, Any]) -> dict[str, Any]:
    return {"host": event["host"], "port": event["port"]}
