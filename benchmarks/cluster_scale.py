"""A cluster of a thousand nodes on paper and in numbers: how even placement is, what a node more or less moves, what membership costs.

    python benchmarks/cluster_scale.py --nodes 1000 --segments 1000000 --json -

Placement is the client's own code; membership traffic is counted from the records that nodes write and clients read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from kvpool.cluster.members import Member, Pulse
from kvpool.cluster.placement import Rendezvous, scores, weights
from kvtransport.bench.output import write_json

TTL_S = 3.0
CLIENTS_PER_NODE = 1


def member(i: int, capacity: int) -> Member:
    return Member(
        id=f"node-{i:05}.example:7777",
        incarnation=i.to_bytes(16, "little"),
        cluster="east",
        addresses=(f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}:7777",),
        capacity=capacity,
        used=capacity // 2,
    )


def first(members: list[Member], names: list[bytes]) -> np.ndarray:
    """The winner of each segment."""
    seeds, capacities = weights(members)
    return np.array([int(np.argmin(scores(n, seeds, capacities))) for n in names])


def measure(nodes: int, segments: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    data = rng.bytes(16 * segments)
    names = [data[i : i + 16] for i in range(0, len(data), 16)]
    equal = [member(i, 1 << 37) for i in range(nodes)]
    mixed = [member(i, (1, 2, 4)[i % 3] << 36) for i in range(nodes)]
    out: dict[str, Any] = {"nodes": nodes, "segments": segments}
    winners = first(equal, names)
    counts = np.bincount(winners, minlength=nodes)
    out["load_max_over_mean"] = float(counts.max() / counts.mean())
    few = names[: max(segments // 10, 1)]
    capacities = np.array([m.capacity for m in mixed], dtype=float)
    shares = np.bincount(first(mixed, names), minlength=nodes) / (segments * capacities / capacities.sum())
    out["load_max_over_mean_mixed_capacities"] = float(shares.max())
    without = first(equal[:-1], few)
    out["moved_when_one_leaves"] = float((without != winners[: len(few)]).mean())
    out["moved_when_one_joins"] = float((first([*equal, member(nodes, 1 << 37)], few) != winners[: len(few)]).mean())
    out["ideal_moved"] = 1 / nodes
    placement = Rendezvous()
    begin = time.perf_counter()
    for name in names[:2000]:
        placement.order(name, equal)
    out["order_us"] = (time.perf_counter() - begin) / min(2000, segments) * 1e6
    record = len(equal[0].encode())
    beats = 1 / Pulse(TTL_S).interval_s
    out["record_bytes"] = record
    out["beats_per_s"] = nodes * beats
    out["snapshot_bytes"] = nodes * (record + len(equal[0].id))
    clients = nodes * CLIENTS_PER_NODE
    out["clients"] = clients
    out["snapshots_per_s"] = clients * beats
    out["snapshot_gbps"] = clients * beats * out["snapshot_bytes"] * 8 / 1e9
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--segments", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="PATH", help="write one JSON object; '-' is standard output")
    options = parser.parse_args()
    body = measure(options.nodes, options.segments)
    print(json.dumps(body, indent=2), file=sys.stderr if options.json == "-" else sys.stdout)
    write_json(options.json, body)


if __name__ == "__main__":
    main()
