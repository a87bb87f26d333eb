"""A process that advertises an address nobody can dial: whom it dials says so, and the link goes on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .stage import PORT, Stage

if TYPE_CHECKING:
    from .__main__ import Row

SCENARIOS = {"advertised address: nobody listens": "nobody", "advertised address: packets vanish": "hole"}
TOLD_S = 20.0
"""For a busy machine: the address is given up after 3 s."""


async def play_address(name: str, row: Row, run: int) -> None:
    """Recovery is the time from the dial to the word."""
    async with Stage(relay=False, pull=False, seed=run) as stage:
        row.runs += 1
        begun = stage.dialler.begin(
            "advertise", host=stage.link.hosts[1], port=PORT, own=stage.link.hosts[0], how=SCENARIOS[name], timeout_s=TOLD_S
        )
        said = await asyncio.wait_for(begun, TOLD_S + 20)
        if said.get("error"):
            row.problem(f"run {run}: {said['error']}")
            return
        row.worst_recovery_s = max(row.worst_recovery_s, said["took_s"])
        row.outcome(said["code"] or "not told")
        if said["code"] != "address" or said["address"] not in said["message"]:
            row.problem(f"run {run}: {said}")
        elif not said["answers"]:
            row.problem(f"run {run}: the link did not go on")
