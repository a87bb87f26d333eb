"""What a flood of strangers costs an established transfer: ``python benchmarks/flood.py [--json PATH]``.

One process opens connections to the receiver of a running TLS transfer as fast as it can and says half a TLS hello on
each ("half-open"), or shakes hands completely and then says nothing ("handshakes"). On a small machine the flooding
process takes processor time by itself; the control is therefore the same process against a listener that never
accepts, whose queue is full. Rounds are taken in turns; goodputs are ratios to the quiet rounds beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import time

from kvtransport.bench.loopback import Loopback, LoopbackOptions
from kvtransport.bench.summary import paired_ratio, spread

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


def flood(host: str, port: int, kind: str) -> None:
    """Until standard input ends; then says how many connections and CPU seconds."""
    os.set_blocking(0, False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    held: list[socket.socket] = []
    count = shaken = 0
    while True:
        with contextlib.suppress(BlockingIOError):
            if os.read(0, 1) == b"":
                break
        sock = socket.socket()
        try:
            sock.settimeout(0.2)
            sock.connect((host, port))
            count += 1
            if kind == "handshakes":
                sock = context.wrap_socket(sock, server_hostname="x")
                shaken += 1
            else:
                sock.send(HELLO + os.urandom(20))
        except OSError:
            pass
        held.append(sock)
        if len(held) > 200:
            held.pop(0).close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"connections": count, "handshakes": shaken, "cpu_s": used.ru_utime + used.ru_stime}))


class Flood:
    def __init__(self, port: int, kind: str) -> None:
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--flood", kind, "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        time.sleep(0.7)  # it is at full speed

    def stop(self) -> dict[str, float]:
        out, _ = self._process.communicate(timeout=30)
        seconds = time.perf_counter() - self._started
        told = json.loads(out)
        return {**{k: v / seconds for k, v in told.items()}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flood")
    parser.add_argument("--port", type=int)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.flood:
        flood("127.0.0.1", args.port, args.flood)
        return
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    options = LoopbackOptions(connections=2, tls=True)
    conditions = ("quiet", "control", "half-open", "handshakes")
    rounds: dict[str, list[float]] = {name: [] for name in conditions}
    cpu: dict[str, list[float]] = {name: [] for name in conditions}
    floods: dict[str, list[dict[str, float]]] = {name: [] for name in conditions}
    with Loopback(options) as bench:
        bench.round()
        for _ in range(args.repeat):
            for name in conditions:
                attack = None
                if name != "quiet":
                    port = full.getsockname()[1] if name == "control" else bench.port
                    attack = Flood(port, "half-open" if name == "control" else name)
                results = [bench.round() for _ in range(3)]
                if attack is not None:
                    floods[name].append(attack.stop())
                assert all(r.verified for r in results)
                rounds[name].append(statistics.median(r.goodput_gbps for r in results))
                cpu[name].append(statistics.median(r.receiver_cpu_s_per_gb for r in results))
    body = {}
    for name in conditions:
        body[name] = {
            "goodput_gbps": spread(rounds[name]),
            "ratio_to_quiet": paired_ratio(rounds[name], rounds["quiet"]),
            "ratio_to_control": paired_ratio(rounds[name], rounds["control"]),
            "receiver_cpu_s_per_gb": spread(cpu[name])["median"],
            "flood_per_s": {
                k: statistics.median(f[k] for f in floods[name]) for k in ("connections", "handshakes", "cpu_s")
            }
            if floods[name]
            else None,
        }
    text = json.dumps(body, indent=2)
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
