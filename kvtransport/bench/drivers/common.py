"""What the peers' drivers share. They run in the peers' own environments: nothing here imports kvtransport.

A driver is started twice, as ``DRIVER target`` and ``DRIVER initiator``. It answers commands (a JSON object a line on
standard input) with events (one a line on what was standard output):

    {"region": N, ...}          first line: the configuration; the initiator's has the target's "ready" as "target"
    -> {"event": "ready", ...}
    {"do": "move", "op", "block", "offset", "nbytes"}   target: "expecting"; initiator: "moved" with its seconds
    {"do": "ping", "op", "count"}                       target: "expecting"; initiator: "pinged", p50_s and p99_s
    {"do": "digest", "offset", "nbytes"}                -> "digest" of that part of the region

A move is over when the bytes are in the other end's region (or, reading, in this one's). The process ends with its input.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
import time

HUGE = 2 << 20
PING = 4096


class Region:
    """``nbytes`` of memory larger than the caches; random bytes at the initiator, zeros at the target."""

    def __init__(self, nbytes: int, *, random: bool) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        skip = -start % HUGE
        self.view = memoryview(self._map)[skip : skip + nbytes]
        self.address = start + skip
        for at in range(0, nbytes, 1 << 20):
            piece = self.view[at : at + (1 << 20)]
            piece[:] = os.urandom(len(piece)) if random else bytes(len(piece))

    def digest(self, offset: int, nbytes: int) -> str:
        return hashlib.blake2b(self.view[offset : offset + nbytes], digest_size=16).hexdigest()


_out = None


def tell(event: str, **values: object) -> None:
    """One event. What else writes to standard output goes to standard error."""
    global _out
    if _out is None:
        _out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
    _out.write(json.dumps({"event": event, **values}) + "\n")


def is_target() -> bool:
    return sys.argv[1] == "target"


def configuration() -> dict:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


def commands():
    """Commands until the end of the input, which ends the process."""
    for line in sys.stdin:
        yield json.loads(line)
    os._exit(0)


def obey(region: Region, move, ping) -> None:
    """Follow the commands; ``move`` and ``ping`` get them and do the work between the two clock readings."""
    target = is_target()
    for command in commands():
        if command["do"] == "digest":
            tell("digest", digest=region.digest(command["offset"], command["nbytes"]))
        elif target:
            tell("expecting")
            (move if command["do"] == "move" else ping)(command)
        elif command["do"] == "move":
            started = time.perf_counter()
            move(command)
            tell("moved", seconds=time.perf_counter() - started)
        else:
            once = ping(command)
            seconds = []
            for _ in range(command["count"]):
                started = time.perf_counter()
                once()
                seconds.append(time.perf_counter() - started)
            seconds.sort()
            count = len(seconds)
            tell("pinged", p50_s=seconds[count // 2], p99_s=seconds[count * 99 // 100])


def passive(command: dict) -> None:
    """A target that does nothing itself: its library's threads do."""


def in_thread(work) -> None:
    threading.Thread(target=work, daemon=True).start()


def offsets(command: dict) -> list[int]:
    """Where the blocks of a move begin."""
    block = command["block"]
    return list(range(command["offset"], command["offset"] + command["nbytes"], block))
