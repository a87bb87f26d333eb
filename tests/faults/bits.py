"""A relay that flips bits: always noticed, named, sent again once, and after that an error."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .stage import DEADLINE_S, Stage

if TYPE_CHECKING:
    from .__main__ import Row


@dataclass(frozen=True, slots=True)
class Flip:
    name: str
    flips: list[dict[str, Any]] = field(default_factory=list)
    seals: bool = True
    corrupt_chunks: int = 0
    """What the consumer must have noticed."""


FLIPS = (
    Flip("bit flip in a payload", [{"type": "DATA", "where": "payload", "skip": 5}], corrupt_chunks=1),
    Flip(
        "bit flips in five payloads",
        [{"type": "DATA", "where": "payload", "skip": 3 * i + i * i} for i in range(5)],
        corrupt_chunks=5,
    ),
    Flip(
        "bit flip in a chunk and its copy",
        [{"type": "DATA", "where": "payload", "skip": 5, "times": 2}],
        seals=False,
        corrupt_chunks=2,
    ),
    Flip("bit flip in a DATA header", [{"type": "DATA", "where": "header", "skip": 5}]),
    Flip("bit flip in an acknowledgement", [{"type": "ACK", "where": "payload", "skip": 1}]),
    Flip("bit flip in an OPEN", [{"type": "OPEN", "where": "payload"}]),
    Flip("bit flip in a SEAL", [{"type": "SEAL", "where": "payload"}]),
)


async def play_flip(flip: Flip, row: Row, run: int) -> None:
    pull = run % 2 == 1
    async with Stage(relay=True, pull=pull, follow=True, seed=run) as stage:
        assert stage.relay is not None
        for one in flip.flips:
            await stage.relay.ask("flip", **one)
        begun = time.monotonic()
        await stage.begin()
        row.runs += 1
        try:
            sent, got = await asyncio.wait_for(asyncio.gather(stage.sent, stage.got), DEADLINE_S + 5)
        except TimeoutError:
            row.hangs += 1
            row.problem(f"run {run}: no outcome")
            return
        flipped = (await stage.relay.ask("flipped"))["flipped"]
        seen = await stage.consumer.ask("progress", after=0.0)
        codes = [(said.get("error") or {}).get("code", "sealed") for said in (sent, got)]
        row.outcome("/".join(codes))
        row.wrong_bytes += got.get("wrong_bytes", 0) + seen["wrong_ranges"]
        row.worst_recovery_s = max(row.worst_recovery_s, max(sent["at"], got["at"]) - begun)
        if len(flipped) != sum(f.get("times", 1) for f in flip.flips):
            row.problem(f"run {run}: {len(flipped)} bits were flipped: {flipped}")
        if seen["corrupt_chunks"] != flip.corrupt_chunks:
            row.problem(f"run {run}: {seen['corrupt_chunks']} corrupt chunks noticed, {flip.corrupt_chunks} made")
        if flip.seals:
            if codes != ["sealed", "sealed"]:
                row.problem(f"run {run}: {sent.get('error')} and {got.get('error')}")
            elif flip.corrupt_chunks and sent["resent_bytes"] != sum(f["length"] for f in flipped):
                row.problem(f"run {run}: {sent['resent_bytes']} bytes were sent again, corrupt were {flipped}")
            return
        # Named by layer, tensor and offset, on both sides, after one more try.
        bad = flipped[-1]
        words = f"layer {bad['layer']} tensor {bad['tensor']}, {bad['length']} bytes at offset {bad['offset']}: checksum failed 2 times"
        for said in (sent, got):
            error = said.get("error") or {}
            if error.get("code") != "integrity" or words not in error.get("message", ""):
                row.problem(f"run {run}: expected an integrity error that says {words!r}, got {error}")
        if [f["attempt"] for f in flipped] != [0, 1]:
            row.problem(f"run {run}: the copies that were hit: {flipped}")
