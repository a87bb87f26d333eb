"""A cluster of a thousand nodes in numbers: how even placement is, what a node more or less moves, what membership costs.

    python benchmarks/cluster_scale.py --nodes 1000 --segments 1000000 --json -

Placement and who copies what are the nodes' own code. Membership is simulated on a virtual clock: every node says that it is there, and every
node and client reads the roster, each in its own rhythm (TTL / 3); one node crashes and one joins. Bytes are those of the records.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import sys
import time
from typing import Any

import numpy as np

from kvpool.cluster.directory import EmbeddedDirectory
from kvpool.cluster.members import Member, Pulse, Roster
from kvpool.cluster.placement import Rendezvous, scores, weights
from kvpool.cluster.replicas import missing
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
    out["two_choices"] = two_choices(nodes, segments)
    out |= membership(nodes)
    out |= copies(nodes, names[: max(segments // 100, 1)])
    return out


def two_choices(nodes: int, segments: int) -> dict[str, float]:
    """Load max over mean when segments, drawn at random, go to the first node, or to the emptier of two: by its fullness now, or as it was.

    Not what placement does; docs/scale.md says why.
    """
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, nodes, segments), rng.integers(0, nodes, segments)
    mean = segments / nodes
    out = {"first": float(np.bincount(one, minlength=nodes).max() / mean)}
    for name, step in (("emptier_now", 1), ("emptier_1_percent_ago", max(segments // 100, 1))):
        load = np.zeros(nodes, dtype=np.int64)
        for at in range(0, segments, step):
            a, b = one[at : at + step], two[at : at + step]
            load += np.bincount(np.where(load[a] <= load[b], a, b), minlength=nodes)
        out[name] = float(load.max() / mean)
    return out


def membership(nodes: int, seconds: float = 20.0) -> dict[str, Any]:
    """Everybody's beats and looks for ``seconds``; a node crashes after 5, another joins. Who knows it when?"""
    random = np.random.default_rng(2)
    clock = [0.0]
    directory = EmbeddedDirectory(lambda: clock[0], b"simulated")
    members = [member(i, 1 << 37) for i in range(nodes + 1)]
    crashed, joining, at = members[0].id, nodes, 5.0
    interval = Pulse(TTL_S).interval_s
    record, name = len(members[0].encode()), len(members[0].id)
    readers = {i: Roster(TTL_S) for i in range(nodes * (1 + CLIENTS_PER_NODE))}
    # (when, what it is, whose): nodes beat and look, clients look.
    events = [(float(random.random() * interval), kind, i) for kind in ("beat", "look") for i in range(nodes)]
    events += [(float(random.random() * interval), "look", i) for i in range(nodes, len(readers))]
    events.append((at, "beat", joining))
    heapq.heapify(events)
    beats = looks = read_bytes = 0
    seen: dict[str, list[float]] = {"crash": [], "join": []}
    known: dict[str, set[int]] = {"crash": set(), "join": set()}

    async def run() -> None:
        nonlocal beats, looks, read_bytes
        while events and events[0][0] < seconds:
            when, kind, who = heapq.heappop(events)
            clock[0] = when
            if kind == "beat" and (who != 0 or when < at):
                await directory.beat(members[who], TTL_S)
                beats += 1
            elif kind == "look":
                snapshot = await directory.snapshot()
                readers[who].update(when, snapshot)
                looks += 1
                read_bytes += len(snapshot.members) * (record + name)
                there = readers[who].members
                for what, happened in (("crash", crashed not in there), ("join", members[joining].id in there)):
                    if happened and when > at and who not in known[what]:
                        known[what].add(who)
                        seen[what].append(when - at)
            heapq.heappush(events, (when + interval, kind, who))

    asyncio.run(run())
    assert len(seen["crash"]) == len(seen["join"]) == len(readers)
    return {
        "record_bytes": record,
        "readers": len(readers),
        "beats_per_s": beats / seconds,
        "beats_gbps": beats * record * 8 / seconds / 1e9,
        "rosters_read_per_s": looks / seconds,
        "rosters_read_gbps": read_bytes * 8 / seconds / 1e9,
        "crash_known_to_all_after_s": max(seen["crash"]),
        "join_known_to_all_after_s": max(seen["join"]),
    }


def copies(nodes: int, names: list[bytes], factor: int = 2) -> dict[str, Any]:
    """What is copied, as part of all segments, when a node is lost and when one joins, with ``factor`` copies of everything."""
    before = [member(i, 1 << 37) for i in range(nodes)]
    placement = Rendezvous()
    lost = joined = 0
    after = [*before, member(nodes, 1 << 37)]
    for name in names:
        holders = [m.id for m in placement.order(name, before)[:factor]]
        there = {h for h in holders if h != before[-1].id}
        without = [m.id for m in placement.order(name, before[:-1])]
        lost += sum(len(missing(without, there, factor, h)) for h in there)
        order = [m.id for m in placement.order(name, after)]
        joined += sum(len(missing(order, set(holders), factor, h)) for h in holders)
    return {
        "copied_when_one_is_lost": lost / len(names),
        "copied_when_one_joins": joined / len(names),
        "ideal_copied": factor / nodes,
        "copies_from_segments": len(names),
    }


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
