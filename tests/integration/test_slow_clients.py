"""A client that stands still, or goes, holds up nobody: leases and transfers have deadlines, and each client its own bounds."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from kvpool.client import connect
from kvpool.keys import KeyChain
from kvtransport.buffers import PageList
from tests.poolkit import LAYOUTS, STEP, content

FROZEN = """
import asyncio, os, signal, sys
import numpy as np
from kvpool.client import connect
from kvpool.keys import KeyChain
from kvpool.messages import keys_to_wire
from kvtransport.buffers import PageList
from tests.poolkit import LAYOUTS, STEP

async def main():
    pool = await connect("127.0.0.1", int(sys.argv[1]), connections=2)
    ns = await pool.namespace(LAYOUTS["hybrid"], STEP)
    chain = KeyChain(ns, np.arange(40 * STEP + 1))
    await pool.lease(ns, chain, 40 * STEP, 2.0)
    await pool.put(ns, KeyChain(ns, np.arange(5, 60 * STEP)), boundary=50 * STEP, deadline_s=2.0)
    for i in range(4):
        # Its OPENs and DATA come while this process stands still: socket buffers fill up.
        await pool.link.call("get_objects", {**keys_to_wire([b"big"]), "transfer": bytes([i + 1]) * 16, "deadline_s": 2.0})
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

asyncio.run(main())
"""


@pytest.fixture
def port():
    argv = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", "128MiB"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield int(re.search(r"listening on 127\.0\.0\.1:(\d+)", child.stdout.readline())[1])
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(20)
    assert child.returncode == 0


async def rounds(pool, ns, seconds):
    """What a healthy client does; the longest of its rounds in seconds, and how many."""
    longest, count, until = 0.0, 0, time.monotonic() + seconds
    while time.monotonic() < until:
        start = time.monotonic()
        body = b"%d" % count * 50_000
        await pool.put_objects({b"mine": body})
        assert await pool.get_objects([b"mine"]) == [body]
        assert (await pool.match(ns, KeyChain(ns, np.arange(40 * STEP + 1)))).length == 40 * STEP
        longest, count = max(longest, time.monotonic() - start), count + 1
    return longest, count


async def test_a_frozen_client_holds_up_nobody_and_loses_what_it_held(port):
    async with await connect("127.0.0.1", port, connections=2) as pool:
        ns = await pool.namespace(LAYOUTS["hybrid"], STEP)
        tokens = list(range(40 * STEP + 1))
        sender = await pool.put(ns, KeyChain(ns, tokens), boundary=40 * STEP)
        for extent in sender.manifest.extents:
            sender.ready(extent.layer, extent.tensor, PageList.of(content(extent, tokens)))
        await sender.seal()
        await pool.put_objects({b"big": bytes(24 << 20)})
        await rounds(pool, ns, 0.3)
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(FROZEN), str(port)], stdout=subprocess.PIPE)
        try:
            waiting = asyncio.get_running_loop().run_in_executor(None, child.stdout.readline)
            assert await asyncio.wait_for(waiting, 20) == b"frozen\n"
            held = await pool.stat()
            assert held["leases"] == 1
            assert held["active"] >= 3
            longest, count = await rounds(pool, ns, 1.5)
            assert count > 5
            assert longest < 1.0
            deadline = time.monotonic() + 10
            while (stat := await pool.stat())["active"] and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            # The client is still there, frozen: its deadlines ended what it held.
            assert (stat["active"], stat["leases"], stat["links"]) == (0, 0, 2)
            await pool.clear()
            assert (await pool.stat())["used_bytes"] == 0
        finally:
            child.kill()
            child.wait()
