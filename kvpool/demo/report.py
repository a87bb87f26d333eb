"""What a demo measured: one JSON object, and a table for people.

All times are CLOCK_MONOTONIC, which processes of one Linux machine share. ``first_byte_s`` and ``applied_s`` are read off
the decode process's event loop, whose clock stands still while it handles what one poll brought (uvloop's counts in milliseconds).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kvtransport.layout import Extent

from .plan import Plan


def request_report(
    plan: Plan, prefill: Mapping[str, Any], decode: Mapping[str, Any], origin_s: float
) -> dict[str, Any]:
    """One request, from the ``done`` events of both processes; times relative to ``origin_s``.

    ``streamed_bytes`` is what went from prefill to decode while it was computed (a checkpoint stays in the pool, the
    prefix came from there). ``on_the_way_s`` is how long some layer was ready at prefill and not yet applied at decode;
    the part of it after prefill had ended is ``exposed_s``, the rest was hidden behind compute. ``goodput_gbps`` is
    ``streamed_bytes`` over ``on_the_way_s``: a prefix that is fetched at the same time shares the wire and is not in it.
    """
    number, start = int(prefill["number"]), int(prefill["start"])
    ready, first = dict(prefill["ready_s"]), dict(decode["first_byte_s"])
    applied, consumed = dict(decode["applied_s"]), dict(decode["consumed_s"])
    layers = [
        {
            "layer": layer,
            "groups": [g.name for g in plan.layout.groups if layer in g.layers],
            "ready_s": _since(ready.get(layer), origin_s),
            "first_byte_s": _since(first.get(layer), origin_s),
            "applied_s": _since(applied.get(layer), origin_s),
            "consumed_s": _since(consumed.get(layer), origin_s),
        }
        for layer in applied
    ]
    computed = max(ready.values())
    on_the_way = _covered((ready[layer], applied[layer]) for layer in ready)
    exposed = min(on_the_way, max(0.0, max(applied.values()) - computed))
    whole = plan.layout.extents(plan.tokens, align=plan.block_tokens)
    streamed = plan.layout.extents(plan.tokens, start=start, align=plan.block_tokens)
    streamed_bytes = sum(e.nbytes for e in streamed)
    prefix = prefill["prefix"]
    return {
        "number": number,
        "request": plan.request_id(number).hex(),
        "tokens": plan.tokens,
        "computed_tokens": plan.tokens - start,
        "bytes_by_group": by_group(plan, whole),
        "received_bytes": decode["received"]["moved_bytes"],
        "sent_bytes": prefill["sent"]["moved_bytes"],
        "sent_bytes_by_group": by_group(plan, plan.extents(start)),
        "streamed_bytes": streamed_bytes,
        "prefix_hit": {
            "tokens": start,
            "bytes_not_sent": sum(e.nbytes for e in whole) - streamed_bytes,
            "fetched_bytes": prefix["moved_bytes"] if prefix else 0,
            "fetch_s": prefix["seconds"] if prefix else 0.0,
            "fetch_gbps": _gbps(prefix["moved_bytes"], prefix["seconds"]) if prefix else None,
        },
        "begun_s": _since(prefill["begun_s"], origin_s),
        "prefill_s": computed - prefill["computing_s"],
        "time_to_decode_s": max(consumed.values()) - prefill["begun_s"],
        "on_the_way_s": on_the_way,
        "exposed_s": exposed,
        "hidden_s": on_the_way - exposed,
        "hidden_share": (on_the_way - exposed) / on_the_way if on_the_way else None,
        "goodput_gbps": _gbps(streamed_bytes, on_the_way),
        "checksums_verified": {
            # The receiver acknowledges a chunk after its checksum, and all of these were acknowledged.
            "sent_by_prefill": prefill["sent"]["chunks"],
            "received_by_prefill": prefix["checksums_verified"] if prefix else 0,
            "received_by_decode": decode["received"]["checksums_verified"],
        },
        "content_verified": bool(decode["content_verified"] and (not prefix or prefix["content_verified"])),
        "sender": prefill["sent"],
        "receiver": decode["received"],
        "layers": layers,
    }


def demo_report(
    plan: Plan,
    requests: Sequence[Mapping[str, Any]],
    memory: Mapping[str, int],
    pool: Mapping[str, Any],
    origin_s: float,
) -> dict[str, Any]:
    """The whole: ``memory`` in bytes by process, ``pool`` as its stat() at the end (empty without one)."""
    return {
        "demo": "direct" if plan.direct else "pool",
        "model": plan.layout.model,
        **plan.as_dict(),
        "clock": "CLOCK_MONOTONIC",
        "origin_s": origin_s,
        "memory_bytes": dict(memory),
        "verified": all(r["content_verified"] for r in requests),
        "totals": {
            "received_bytes": sum(r["received_bytes"] for r in requests),
            "sent_bytes": sum(r["sent_bytes"] for r in requests),
            "prefix_hit_tokens": sum(r["prefix_hit"]["tokens"] for r in requests),
            "bytes_not_sent": sum(r["prefix_hit"]["bytes_not_sent"] for r in requests),
            "checksums_verified": sum(sum(r["checksums_verified"].values()) for r in requests),
            "resent_bytes": sum(r["sender"]["resent_bytes"] for r in requests),
            "seconds": max(r["begun_s"] + r["time_to_decode_s"] for r in requests),
        },
        "pool": dict(pool),
        "requests": list(requests),
    }


def by_group(plan: Plan, extents: Iterable[Extent]) -> dict[str, int]:
    """Bytes of extents by group name."""
    group_of = {(slot.layer, slot.tensor): slot.group for slot in plan.layout.slots()}
    found: Counter[str] = Counter({group.name: 0 for group in plan.layout.groups})
    for extent in extents:
        found[plan.layout.groups[group_of[extent.layer, extent.tensor]].name] += extent.nbytes
    return dict(found)


def _since(at: float | None, origin_s: float) -> float | None:
    return None if at is None else at - origin_s


def _gbps(nbytes: int, seconds: float) -> float | None:
    return nbytes * 8 / seconds / 1e9 if seconds > 0 else None


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


# -- for people ----------------------------------------------------------------------------------


def render(console: Console, report: Mapping[str, Any]) -> None:
    """The table at the end."""
    requests = report["requests"]
    console.print(_title(report), style="bold")
    table = Table()
    table.add_column("")
    for request in requests:
        table.add_column(f"request {request['number']}", justify="right")
    for name, values in _rows(report, requests):
        table.add_row(name, *values)
    console.print(table)
    if len(requests) > 1:
        first, second = requests[0], requests[1]
        hit = second["prefix_hit"]
        console.print(
            f"Prefix hit: {hit['tokens']:,} of {second['tokens']:,} tokens came from the pool. {_mb(hit['bytes_not_sent'])} were "
            f"neither computed nor sent again; prefill took {second['prefill_s']:.2f} s instead of {first['prefill_s']:.2f} s.",
            soft_wrap=True,
        )
    console.print(
        f"Every byte verified: {report['totals']['checksums_verified']:,} chunk checksums, and the content of every layer "
        "recomputed from the tokens at decode.",
        soft_wrap=True,
    )


def _title(report: Mapping[str, Any]) -> str:
    way = "prefill -> decode" if report["demo"] == "direct" else "prefill -> kvpoold -> decode"
    return f"{report['model']}: {way}, loopback, {report['connections']} connections"


def _rows(report: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, list[str]]]:
    def each(show: Any) -> list[str]:
        return [show(r) for r in requests]

    yield "tokens", each(lambda r: f"{r['tokens']:,}")
    yield "  of them from the pool (prefix hit)", each(lambda r: f"{r['prefix_hit']['tokens']:,}")
    for group in requests[0]["bytes_by_group"]:
        yield f"cache of group {group}", each(lambda r, g=group: _mb(r["bytes_by_group"][g]))
    yield "sent by prefill, with checkpoints", each(lambda r: _mb(r["sent_bytes"]))
    yield "received by decode", each(lambda r: _mb(r["received_bytes"]))
    if any(r["prefix_hit"]["tokens"] for r in requests):
        yield (
            "prefix fetched by prefill",
            each(lambda r: _rate(r["prefix_hit"]["fetched_bytes"], r["prefix_hit"]["fetch_gbps"])),
        )
    yield "prefill", each(lambda r: f"{r['prefill_s']:.3f} s")
    yield "from the match to the last layer consumed", each(lambda r: f"{r['time_to_decode_s']:.3f} s")
    yield "layers on their way to decode", each(lambda r: f"{r['on_the_way_s']:.3f} s")
    yield "  hidden behind compute", each(lambda r: "-" if r["hidden_share"] is None else f"{r['hidden_share']:.1%}")
    yield "  exposed after prefill", each(lambda r: f"{r['exposed_s'] * 1e3:.1f} ms")
    yield (
        "goodput while on their way",
        each(lambda r: "-" if r["goodput_gbps"] is None else f"{r['goodput_gbps']:.2f} Gbps"),
    )
    for key, name in (
        ("sent_by_prefill", "checksums verified, of prefill's chunks"),
        ("received_by_prefill", "checksums verified by prefill"),
        ("received_by_decode", "checksums verified by decode"),
    ):
        yield name, each(lambda r, k=key: f"{r['checksums_verified'][k]:,}")
    yield "content verified", each(lambda r: "yes" if r["content_verified"] else "NO")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _rate(nbytes: int, gbps: float | None) -> str:
    return "-" if not nbytes else _mb(nbytes) + ("" if gbps is None else f" at {gbps:.2f} Gbps")
