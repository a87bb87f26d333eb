"""Whole transfers over paced links, coded and plain in turns: ``python benchmarks/coded_links.py [--gbps 0.5,1,2,4] [--json PATH]``.

Two endpoints in one process on loopback, through the native engine; each connection is paced (SO_MAX_PACING_RATE), so that all of them
together carry what a link of that rate would; 0: not paced. Data: ``normal`` bfloat16, or the caches of tiny models
(benchmarks/codecs.py), repeated to the size. One transfer before, so that the link knows its rate; then pairs, plain and auto in turns. The
figure is the ratio of the medians of goodput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from typing import Any

import numpy as np
import uvloop
from codecs_data import caches, normal

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation

SO_MAX_PACING_RATE = 47
UNIT = 4 << 20
CHUNK = 1 << 20
CONNECTIONS = 4


class Way:
    """A link of its own for one way of sending."""

    def __init__(self, coding: str, codec: str) -> None:
        config = EndpointConfig(coding=coding, codecs=(codec,) if coding != "off" else ())  # type: ignore[arg-type]
        self.producer, self.consumer = Endpoint(config), Endpoint(config)
        self.seconds: list[float] = []
        self.coded = self.raw = 0

    async def start(self, gbps: float) -> None:
        host, port = await self.consumer.listen()
        self.link: Link = await self.producer.connect(host, port, connections=CONNECTIONS)
        if gbps:
            rate = int(gbps * 1e9 / 8 / CONNECTIONS).to_bytes(8, sys.byteorder)
            for connection in self.link.connections:
                connection.native.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)  # type: ignore[attr-defined]

    async def once(self, data: np.ndarray, into: np.ndarray, *, count: bool = True) -> None:
        manifest = Manifest.of_objects([len(data)], transfer=new_transfer_id())
        receiver = self.consumer.expect(manifest.transfer, Expectation(grant=lambda m: {(0, 0): PageList.of(into)}))
        begun = time.perf_counter()
        sender = self.link.open(manifest)
        for start in range(0, len(data), UNIT):
            sender.hand_over(0, 0, start, PageList.of(data[start : start + UNIT]))
        await asyncio.gather(sender.seal(), receiver.sealed())
        seconds = time.perf_counter() - begun
        assert (into == data).all()
        into[:] = 0
        if count:
            self.seconds.append(seconds)
            self.raw += sender.stats.coded_raw_bytes
            self.coded += sender.stats.coded_bytes

    async def stop(self) -> None:
        await self.producer.close()
        await self.consumer.close()


async def compare(name: str, data: np.ndarray, gbps: float, codec: str, pairs: int, seconds: float) -> dict[str, Any]:
    size = int(min(len(data), max(16 << 20, gbps * 1e9 / 8 * seconds))) if gbps else len(data)
    data = data[: size & ~1]
    ways = [Way("off", codec), Way("auto", codec)]
    into = np.zeros(len(data), np.uint8)
    for way in ways:
        await way.start(gbps)
        await way.once(data, into, count=False)
        await way.once(data, into, count=False)
    for i in range(pairs):
        for way in ways if i % 2 == 0 else ways[::-1]:
            await way.once(data, into)
    auto = ways[1]
    for way in ways:
        await way.stop()
    rates = [len(data) * 8 / 1e9 / statistics.median(way.seconds) for way in ways]
    spread = [len(data) * 8 / 1e9 / s for s in (max(auto.seconds), min(auto.seconds))]
    return {
        "data": name, "codec": codec, "link_gbps": gbps, "bytes": len(data), "pairs": pairs, "plain_gbps": rates[0],
        "auto_gbps": rates[1], "auto_gbps_range": spread, "ratio": rates[1] / rates[0],
        "coded_share": auto.raw / (pairs * len(data)), "shrunk_to": auto.coded / auto.raw if auto.raw else 1.0,
    }  # fmt: skip


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    size = args.megabytes << 20
    data = {"normal": normal(size)}
    if args.models:
        for name, tensors in caches(args.tokens).items():
            whole = np.concatenate(tensors)
            if len(whole) < CHUNK:
                print(f"{name}: {len(whole)} bytes would repeat within a chunk, which a codec sees: more --tokens", file=sys.stderr)
                continue
            data[name] = np.tile(whole, -(-size // len(whole)))[:size].copy()
    rows = []
    for name, values in data.items():
        for gbps in args.gbps:
            row = await compare(name, values, gbps, args.codec, args.pairs, args.seconds)
            rows.append(row)
            print(
                f"{name:12} {args.codec} {gbps:4g} Gbps: plain {row['plain_gbps']:.2f}, auto {row['auto_gbps']:.2f} Gbps, ratio "
                f"{row['ratio']:.3f}; {row['coded_share']:.0%} coded to {row['shrunk_to']:.2f}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gbps", type=lambda s: [float(x) for x in s.split(",")], default=[0.5, 1.0, 2.0, 4.0, 0.0])
    parser.add_argument("--codec", default="lz4", choices=["lz4", "zstd"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a plain transfer")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--models", action="store_true", help="caches of tiny models too")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = uvloop.run(run(args))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
