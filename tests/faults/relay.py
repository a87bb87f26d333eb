"""A TCP relay that does to connections what networks do: resets, delays, and changes bits.

``python -m tests.faults.relay HOST PORT TO_HOST TO_PORT``; commands as JSON lines with an ``id``, each answered with it.
It follows the frames of each direction, so that a bit can be flipped where the test wants it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from kvtransport.wire.frames import HEADER_BYTES, FrameType, Header, unpack_header

PIECE = 64 << 10


class Follower:
    """Finds the frames in one direction of a connection."""

    def __init__(self, flip: Callable[[Header, int], int | None]) -> None:
        self._flip = flip
        """Called with each header and whether ... its length; the byte of the frame to flip a bit in, or None."""
        self._head = bytearray()
        self._left = 0
        self._at = 0
        self._target: int | None = None

    def pass_on(self, data: bytearray) -> None:
        """Follow ``data``, changing it where asked. A header is only complete with its last byte, so it is never flipped here."""
        at = 0
        while at < len(data):
            if self._left == 0:
                need = HEADER_BYTES - len(self._head)
                self._head += data[at : at + need]
                took = min(need, len(data) - at)
                at += took
                if len(self._head) < HEADER_BYTES:
                    return
                header = unpack_header(bytes(self._head))
                self._head.clear()
                self._left, self._at = header.length, 0
                self._target = self._flip(header, header.length)
                if self._target is not None and self._target < 0:
                    # In the header itself: its last byte is still here.
                    data[at - 1] ^= 0x10
                    self._target = None
                continue
            took = min(self._left, len(data) - at)
            if self._target is not None and self._at <= self._target < self._at + took:
                data[at + self._target - self._at] ^= 0x10
                self._target = None
            self._at += took
            self._left -= took
            at += took


class Pair:
    """One relayed connection."""

    def __init__(self, relay: Relay, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.relay = relay
        self.near = (reader, writer)
        self.far: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        try:
            self.far = await asyncio.open_connection(*self.relay.to)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(self.near[0], self.far[1]))
                group.create_task(self._pump(self.far[0], self.near[1]))
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.reset(hard=False)
            self.relay.pairs.discard(self)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        follower = Follower(self.relay.where)
        while data := await reader.read(PIECE):
            if self.relay.delay_s:
                await asyncio.sleep(random.random() * self.relay.delay_s)
            changed = bytearray(data)
            if self.relay.following:
                follower.pass_on(changed)
            writer.write(changed)
            await writer.drain()
        raise ConnectionResetError

    def reset(self, *, hard: bool = True) -> None:
        for side in (self.near, self.far):
            if side is None:
                continue
            sock = side[1].get_extra_info("socket")
            if hard and sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            side[1].transport.abort()


class Relay:
    def __init__(self, to: tuple[str, int]) -> None:
        self.to = to
        self.pairs: set[Pair] = set()
        self.delay_s = 0.0
        self.following = False
        self.flips: list[dict[str, Any]] = []
        self.flipped: list[dict[str, Any]] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = Pair(self, reader, writer)
        self.pairs.add(pair)
        await pair.run()

    def where(self, header: Header, length: int) -> int | None:
        """Whether to flip a bit of this frame: -1 in its header, else the byte of its payload."""
        for flip in self.flips:
            if header.type.name != flip["type"] or flip["skip"] < 0:
                continue
            if header.sequence and "again" not in flip:
                continue  # a copy of something else
            if flip["skip"] > 0:
                flip["skip"] -= 1
                continue
            key = [header.layer, header.tensor, header.offset]
            if flip.get("again") is not None and flip["again"] != key:
                continue
            at = -1 if flip["where"] == "header" else length // 2
            if at >= length:
                continue
            self.flipped.append(
                {"type": header.type.name, "layer": header.layer, "tensor": header.tensor, "offset": header.offset,
                 "length": header.length, "attempt": header.sequence, "where": flip["where"]}
            )  # fmt: skip
            flip["times"] -= 1
            if flip["times"] == 0:
                flip["skip"] = -1
            elif header.type is FrameType.DATA:
                flip["again"] = key
            return at
        return None

    async def command(self, do: str, **args: Any) -> dict[str, Any]:
        if do == "reset":
            pairs = list(self.pairs)
            if args.get("one"):
                pairs = pairs[:1]
            for pair in pairs:
                pair.reset()
            return {"reset": len(pairs)}
        if do == "delay":
            self.delay_s = args["seconds"]
            return {}
        if do == "flip":
            """``type`` of frame, ``where`` "payload" or "header", after ``skip`` such frames; ``times``: again in copies of it."""
            self.flips.append({"skip": 0, "times": 1, **args})
            return {}
        if do == "flipped":
            return {"flipped": self.flipped}
        raise ValueError(do)


async def main() -> None:
    host, port, to_host, to_port = sys.argv[1:5]
    relay = Relay((to_host, int(to_port)))
    relay.following = len(sys.argv) > 5
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(relay.accept, host, int(port))
    await server.start_serving()
    print(json.dumps({"event": "ready"}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        number = command.pop("id")
        print(json.dumps({"id": number, **await relay.command(command.pop("do"), **command)}), flush=True)
    os._exit(0)  # connections and all


if __name__ == "__main__":
    asyncio.run(main())
