"""A process of the fault tests: one endpoint, and one side of one transfer after another.

``python -m tests.faults.party NAME`` takes commands, JSON lines with an ``id``, and answers each with its id; ends with its input.
The bytes of a transfer follow from its seed, so that both sides know what is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import AddressError, KVError, ProtocolError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation, Receiver
from kvtransport.sender import Sender

POISON = 0xEE
KEEPALIVE_S = 0.5
DEAD_AFTER_S = 2.0
RECONNECT_S = 8.0


def truth(seed: int, sizes: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n, np.uint8) for n in sizes]


class Party:
    def __init__(self, name: str) -> None:
        self.endpoint = Endpoint(
            EndpointConfig(
                name=name,
                insecure=True,
                chunk_bytes=256 << 10,
                keepalive_s=KEEPALIVE_S,
                dead_after_s=DEAD_AFTER_S,
                handshake_timeout_s=2.0,
                reconnect_s=RECONNECT_S,
                spill=SpillPolicy(budget_bytes=0),
            )
        )
        self.sender: Sender | None = None
        self.receiver: Receiver | None = None
        self.buffers: list[np.ndarray] = []
        self.right: list[np.ndarray] = []
        self.wrong_ranges = 0
        self.applied: list[tuple[float, int]] = []
        """When how many bytes were in place, at most one entry a millisecond."""
        self.moved = 0

    # -- commands --------------------------------------------------------------------------------

    async def listen(self, host: str, port: int) -> dict[str, Any]:
        return {"port": (await self.endpoint.listen(host, port))[1]}

    async def dial(self, host: str, port: int, connections: int = 4) -> dict[str, Any]:
        await self.endpoint.connect(host, port, connections=connections)
        return {}

    async def produce(self, transfer: str, seed: int, sizes: list[int], deadline_s: float) -> dict[str, Any]:
        """Send all of it; answers when it is sealed, or with the error."""
        self.buffers = truth(seed, sizes)
        manifest = Manifest.of_objects(sizes, transfer=bytes.fromhex(transfer))
        sender = self.sender = self.endpoint.links[-1].open(manifest, deadline_s=deadline_s)
        units = [
            sender.ready(extent.layer, extent.tensor, PageList.of(b))
            for extent, b in zip(manifest.extents, self.buffers, strict=True)
        ]
        try:
            await sender.seal()
        finally:
            for unit in units:
                await asyncio.wait_for(unit.released(), 5)
        return {"resent_bytes": sender.stats.resent_bytes, "chunks": sender.stats.chunks}

    async def consume(self, transfer: str, seed: int, sizes: list[int], deadline_s: float) -> dict[str, Any]:
        """Expect it and answer when it is sealed: how many bytes are wrong (0), and how it went."""
        self.right = truth(seed, sizes)
        self.buffers = [np.zeros(n, np.uint8) for n in sizes]
        self.applied, self.moved, self.wrong_ranges = [], 0, 0
        slots: dict[tuple[int, int], int] = {}

        def grant(manifest: Manifest) -> dict[tuple[int, int], PageList]:
            slots.update({(e.layer, e.tensor): i for i, e in enumerate(manifest.extents)})
            return {slot: PageList.of(self.buffers[i]) for slot, i in slots.items()}

        def on_range(layer: int, tensor: int, start: int, stop: int) -> None:
            i = slots[layer, tensor]
            self.wrong_ranges += not np.array_equal(self.buffers[i][start:stop], self.right[i][start:stop])
            self.moved += stop - start
            now = time.monotonic()
            if not self.applied or now - self.applied[-1][0] > 0.001:
                self.applied.append((now, self.moved))

        wanted = Expectation(grant=grant, deadline_s=deadline_s, window_bytes=4 << 20, on_range=on_range)
        receiver = self.receiver = self.endpoint.expect(bytes.fromhex(transfer), wanted)
        say(event="expecting")
        await receiver.sealed()
        return {"wrong_bytes": self.wrong()}

    def wrong(self) -> int:
        return sum(int(np.count_nonzero(a != b)) for a, b in zip(self.buffers, self.right, strict=True))

    async def progress(self, after: float) -> dict[str, Any]:
        """When bytes were applied first after ``after`` (None: not), and the number of ranges verified and yet wrong."""
        first = next((at for at, _ in self.applied if at >= after), None)
        stats = self.receiver.stats if self.receiver is not None else None
        return {
            "first": first,
            "moved": self.moved,
            "wrong_ranges": self.wrong_ranges,
            "duplicate_bytes": 0 if stats is None else stats.duplicate_bytes,
            "corrupt_chunks": 0 if stats is None else stats.corrupt_chunks,
        }

    async def until(self, nbytes: int) -> dict[str, Any]:
        while self.moved < nbytes:
            await asyncio.sleep(0.005)
        return {}

    async def cancel(self, watch_s: float) -> dict[str, Any]:
        """Cancel, then take the memory back at once; whatever touches it in the next seconds is found."""
        begun = time.monotonic()
        transfer = self.sender or self.receiver
        assert transfer is not None
        await transfer.cancel("the test changed its mind")
        took_s = time.monotonic() - begun
        for buffer in self.buffers:
            buffer[:] = POISON
        await asyncio.sleep(watch_s)
        touched = sum(int(np.count_nonzero(buffer != POISON)) for buffer in self.buffers)
        return {"took_s": took_s, "touched": touched}

    async def state(self) -> dict[str, Any]:
        """What is held for links and transfers right now."""
        endpoint = self.endpoint
        return {
            "links": len(endpoint.links),
            "outgoing": sum(len(link._outgoing) for link in endpoint.links),
            "incoming": sum(len(link._incoming) for link in endpoint.links),
            "expected": len(endpoint._expected),
            "waiting": len(endpoint._waiting),
            "handshakes": len(endpoint._handshakes),
            "spilled": endpoint.spill_area.used_bytes,
            "sockets": sum(
                os.path.realpath(f"/proc/self/fd/{fd}").find("socket:") >= 0 for fd in os.listdir("/proc/self/fd")
            ),
        }

    async def advertise(self, host: str, port: int, own: str, how: str, timeout_s: float) -> dict[str, Any]:
        """Dial with the word that others reach this process at ``own``, where nobody listens or (``how`` "hole") packets vanish."""
        with contextlib.ExitStack() as held:
            taken = held.enter_context(socket.socket())
            taken.bind((own, 0))
            address = f"{own}:{taken.getsockname()[1]}"
            if how == "hole":
                taken.listen(0)
                # Nobody accepts, and the queue has room for one or two: the kernel drops what else arrives.
                for _ in range(4):
                    waiting = held.enter_context(socket.socket())
                    waiting.setblocking(False)
                    waiting.connect_ex(taken.getsockname())
            begun = time.monotonic()
            async with Endpoint(replace(self.endpoint.config, advertise=address)) as endpoint:
                link = await endpoint.connect(host, port, connections=2)
                code, message, answers = "", "", False
                try:
                    await link.reachable(timeout_s)
                except AddressError as error:
                    code, message = error.code, error.message
                took_s = time.monotonic() - begun
                try:
                    await link.call("nothing")
                except ProtocolError:  # the peer has no such verb, and says so
                    answers = True
                return {"took_s": took_s, "code": code, "message": message, "address": address, "answers": answers}

    async def ended(self) -> dict[str, Any]:
        """Wait until the last link has ended; says why."""
        links = self.endpoint.links
        error = await links[-1].wait_closed() if links else None
        return {"error": error.as_dict() if error is not None else None}

    async def leave(self) -> dict[str, Any]:
        await self.endpoint.close()
        return {}

    # -- serving ---------------------------------------------------------------------------------

    async def answer(self, command: dict[str, Any]) -> None:
        number, name = command.pop("id"), command.pop("do")
        try:
            reply = await getattr(self, name)(**command)
        except KVError as error:
            say(id=number, at=time.monotonic(), error=error.as_dict())
        except Exception as error:  # noqa: BLE001  a bug must reach the test
            say(id=number, at=time.monotonic(), error={"code": "bug", "message": f"{type(error).__name__}: {error}"})
        else:
            say(id=number, at=time.monotonic(), **reply)


def say(**body: Any) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


async def main() -> None:
    party = Party(sys.argv[1])
    loop = asyncio.get_running_loop()
    say(event="ready")
    tasks: set[asyncio.Task[None]] = set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = loop.create_task(party.answer(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await party.endpoint.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
