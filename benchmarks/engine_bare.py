"""The native I/O engine without asyncio, handshakes or transfers' bookkeeping: one extent from process to process.

    python benchmarks/engine_bare.py --connections 4 --no-checksum --page-bytes 18432 --congestion cubic

What it gives is the engine's own limit; hold it against a C loop in turns (``kvbench loopback --baseline`` has one). ``--threads``
defaults to half the cores, as endpoints do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import socket
import statistics
import subprocess
import sys
import time

import numpy as np

from kvtransport import _native
from kvtransport.buffers import Arena, PageList
from kvtransport.wire.frames import DEFAULT_LIMITS

MIB = 1 << 20
APPLIED, ACKED = 6, 7
WINDOW = 64 * MIB


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--checksum", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--page-bytes", type=int, default=0, help="0: contiguous")
    parser.add_argument("--chunk-bytes", type=int, default=MIB)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--congestion")
    parser.add_argument("--role", choices=["receiver", "sender"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def memory(options: argparse.Namespace, seed: int) -> PageList:
    nbytes, page = options.mib * MIB, options.page_bytes
    arena = Arena(nbytes + (nbytes // 4 if page else 0), memfd=False, lock="off", cuda="off")
    view = memoryview(arena)
    np.frombuffer(view, np.uint64)[:] = np.arange(len(view) // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 + seed)
    if not page:
        return PageList.of(view).slice(0, nbytes)
    chosen = np.random.default_rng(seed).permutation(len(view) // page)[: -(-nbytes // page)]
    return PageList.pages(view, chosen * page, page, nbytes)


def tuned(sock: socket.socket, congestion: str | None) -> int:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if congestion:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    return sock.detach()


def say(**body: object) -> None:
    print(json.dumps(body), flush=True)


def work(options: argparse.Namespace) -> None:
    receiving = options.role == "receiver"
    pages = memory(options, int(receiving))
    if receiving:
        with socket.create_server(("127.0.0.1", 0)) as server:
            say(port=server.getsockname()[1])
            socks = [server.accept()[0] for _ in range(options.connections)]
    else:
        socks = [socket.create_connection(("127.0.0.1", options.port)) for _ in range(options.connections)]
    engine = _native.Engine(options.threads)
    group = engine.group()
    conns = [engine.adopt(tuned(sock, options.congestion), DEFAULT_LIMITS.by_type, i) for i, sock in enumerate(socks)]
    for conn in conns:
        conn.join(group)
    for number in range(options.rounds + 1):
        name = (number + 1).to_bytes(16, "little")
        if receiving:
            slots = [(0, 0, pages.nbytes, pages.base, pages.pieces)]
            into = group.incoming(name, slots, 100, pages.nbytes, WINDOW, WINDOW, not options.checksum, False)
            say(expecting=number)
        else:
            sys.stdin.readline()
        cpu, started, left = cpu_s(), time.perf_counter(), pages.nbytes
        if not receiving:
            out = group.outgoing(name, [(0, 0)], 100, 0, options.checksum)
            out.accept(options.chunk_bytes, WINDOW)
            out.add(0, 0, 0, pages.base, pages.pieces)
        while left:
            select.select([engine.fileno()], [], [])
            for event in engine.drain():
                if event[0] == APPLIED:
                    left -= sum(stop - start for _, _, start, stop, _ in event[2])
                elif event[0] == ACKED:
                    left -= sum(nbytes for _, _, nbytes in event[2])
                else:
                    raise SystemExit(f"unexpected event {event[0]} of the {options.role}")
        seconds, cpu = time.perf_counter() - started, cpu_s() - cpu
        (into if receiving else out).close()
        say(seconds=seconds, cpu_s=cpu, digest=pages.hash() if number == 0 else None)
    sys.stdin.readline()


def main() -> None:
    options = arguments()
    if options.role:
        work(options)
        return
    ends: list[subprocess.Popen[str]] = []

    def start(role: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *sys.argv[1:], "--role", role, *more]
        end = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        ends.append(end)
        return end

    def hear(end: subprocess.Popen[str]) -> dict[str, float]:
        assert end.stdout is not None
        line = end.stdout.readline()
        if not line:
            raise SystemExit("one end died")
        return json.loads(line)

    receiver = start("receiver")
    sender = start("sender", "--port", str(hear(receiver)["port"]))
    rounds = []
    try:
        for number in range(options.rounds + 1):
            hear(receiver)
            assert sender.stdin is not None
            print("go", file=sender.stdin, flush=True)
            got, sent = hear(receiver), hear(sender)
            assert got["digest"] == sent["digest"], "the bytes differ"
            if number:
                rounds.append((sent["seconds"], sent["cpu_s"], got["cpu_s"]))
    finally:
        for end in ends:
            assert end.stdin is not None
            end.stdin.close()
            end.wait(10)
    gb = options.mib * MIB / 1e9
    seconds, sender_s, receiver_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    say(
        gbps=round(gb * 8 / seconds, 2),
        sender_cpu_s_per_gb=round(sender_s / gb, 3),
        receiver_cpu_s_per_gb=round(receiver_s / gb, 3),
        rounds=[round(gb * 8 / each[0], 2) for each in rounds],
        **{k: v for k, v in vars(options).items() if k not in ("role", "port", "rounds")},
    )


if __name__ == "__main__":
    main()
