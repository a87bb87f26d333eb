"""kvpoold beside Redis, memcached and Mooncake Store, in turns in one run, under one congestion control.

    python benchmarks/stores.py --peers-python .venv-stores/bin/python --congestion cubic --rounds 7 --json stores.json
    python benchmarks/stores.py --peers-python ... --lmcache-python .venv-lmcache/bin/python --congestion cubic --rounds 5

Every turn starts a store, puts and gets 128 MiB of objects of each size (after once that does not count), checks what came back, and
asks for 512 keys of which half are there. The link alone (``kvbench loopback``) takes its turn too: what the machine allows a daemon is
a share of that. Needs redis-server and memcached on the PATH, and for the peers a Python with redis, hiredis, pylibmc and
mooncake-transfer-engine-non-cuda (with numpy): ``--peers-python``. LMCache's native RESP client (four workers, against the same
redis-server) has a row when ``--lmcache-python`` names a Python with lmcache and torch, which is heavy to install. A congestion control of its own needs root: the run then has a network
namespace to itself, and everything in it uses that.

Given a ``--json`` file that is there already, the rounds of this run are added to its rounds and the table is of all: long tables come
together out of short runs. A run's turns stand side by side, so stores are only to be compared when every run had all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = "kvpool"
LINK = "kvbench loopback"
LMCACHE = "lmcache-resp"
NAMESPACE = "KVPOOL_STORES_NAMESPACE"


def enter_namespace(congestion: str) -> None:
    """Go on in a network namespace whose default is ``congestion``."""
    if os.environ.get(NAMESPACE) == congestion:
        try:
            Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(congestion)
        except PermissionError:
            raise SystemExit(
                f"a namespace may not use {congestion}: sysctl -w net.ipv4.tcp_allowed_congestion_control='reno {congestion}' first"
            ) from None
        return
    if os.geteuid():
        raise SystemExit("a congestion control of its own needs root; run as root or say --congestion system")
    command = 'ip link set lo up && exec "$0" "$@"'
    os.environ[NAMESPACE] = congestion
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", command, sys.executable, *sys.argv])


def run_json(*argv: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:4])} failed: {done.stderr[-800:] or done.stdout[-800:]}")
    text = done.stdout
    return dict(json.loads(text[text.index("\n{") if "\n{" in text else text.index("{") :]))


def turn(name: str, python: str, args: argparse.Namespace) -> dict[str, Any]:
    if name == LINK:
        done = run_json(
            sys.executable, "-m", "kvtransport.bench.cli", "loopback", "--connections", str(args.connections),
            "--repeat", "1", "--tokens", "16384", "--json", "-",
        )  # fmt: skip
        return {"loopback_gb_s": done["goodput_gbps"] / 8}
    sizes = [str(size) for size in args.sizes]
    return run_json(
        python, str(HERE / "stores_worker.py"), name, "--bytes", str(args.bytes), "--sizes", *sizes,
        environment={"KVPOOL_CONNECTIONS": str(args.connections)},
    )  # fmt: skip


def flat(figures: dict[str, Any]) -> dict[str, float]:
    """One level of names: "1048576 put_gb_s"."""
    found = {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
    for size, values in figures.get("objects", {}).items():
        found.update({f"{size} {what}": float(v) for what, v in values.items()})
    return found


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "iqr": high - low, "rounds": len(values)}


def table(summary: dict[str, dict[str, dict[str, float]]], sizes: list[int]) -> str:
    names = [n for n in summary if n != LINK]
    columns = [f"{size} {what}_gb_s" for size in sizes for what in ("put", "get")]
    heads = [f"{size >> 10} KiB {what}" for size in sizes for what in ("put", "get")]
    columns += ["lookup_512_us", "put_4k_us", "get_4k_us"]
    heads += ["512 keys us", "put 4K us", "get 4K us"]
    lines = [f"{'':14}" + "".join(f"{h:>15}" for h in heads)]
    for name in names:
        cells = []
        for column in columns:
            value = summary[name].get(column)
            if value is None:
                cells.append(f"{'-':>15}")
            elif column.endswith("us"):
                cells.append(f"{value['median']:9.0f} ±{value['iqr']:4.0f}")
            else:
                cells.append(f"{value['median']:9.2f} ±{value['iqr']:4.2f}")
        lines.append(f"{name:14}" + "".join(f"{c:>15}" for c in cells))
    if LINK in summary:
        value = summary[LINK]["loopback_gb_s"]
        lines.append(f"{LINK}: {value['median']:.2f} ±{value['iqr']:.2f} GB/s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", default=[OURS, "kvpool-local", "redis", "memcached", "mooncake"])
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="PYTHON", help="has the peers' client libraries"
    )
    parser.add_argument("--lmcache-python", metavar="PYTHON", help=f"has lmcache and torch: adds {LMCACHE} to the stores")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64 << 10, 1 << 20, 4 << 20], metavar="BYTES")
    parser.add_argument("--bytes", type=int, default=128 << 20, help="moved a time")
    parser.add_argument("--connections", type=int, default=4, help="of our link")
    parser.add_argument("--congestion", default="system", help="cubic, bbr, ... for all, or the system's")
    parser.add_argument("--json", metavar="PATH", help="write the result here, - for standard output")
    args = parser.parse_args()
    if args.congestion != "system":
        enter_namespace(args.congestion)
    stores = [*args.stores]
    if args.lmcache_python and LMCACHE not in stores:
        stores.append(LMCACHE)
    names = [*stores, LINK]
    pythons = {LMCACHE: args.lmcache_python or args.peers_python}
    path = None if args.json in (None, "-") else Path(args.json)
    settings = {
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "congestion": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "bytes": args.bytes,
        "connections": args.connections,
    }
    result = earlier(path, settings) or {**settings, "runs": [], "summary": {}, "rounds": {}}
    samples: dict[str, list[dict[str, float]]] = result["rounds"]
    started = time.time()
    for number in range(args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            python = sys.executable if name.startswith(OURS) else pythons.get(name, args.peers_python)
            samples.setdefault(name, []).append(flat(turn(name, python, args)))
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
    result["summary"] = summary = {
        name: {
            what: spread([r[what] for r in rounds if what in r]) for what in dict.fromkeys(w for r in rounds for w in r)
        }
        for name, rounds in samples.items()
    }
    print(table(summary, args.sizes), file=sys.stderr)
    result["runs"].append(
        {"arguments": sys.argv[1:], "stores": names, "rounds": args.rounds, "seconds": time.time() - started}
    )
    if args.json == "-":
        print(json.dumps(result, indent=1))
    elif path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def earlier(path: Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is in ``path`` already; refused when it was measured otherwise."""
    if path is None or not path.exists():
        return None
    body: dict[str, Any] = json.loads(path.read_text())
    other = [name for name, value in settings.items() if body.get(name) != value]
    if other:
        raise SystemExit(f"{path} was measured with other {', '.join(other)}: name another file")
    return body


if __name__ == "__main__":
    main()
