"""``kvbench peers``: ours, the C loop and the usual ways to move bytes, on one machine, in turns, one congestion control.

Every peer is two processes of its own. Whoever has no turn is frozen (SIGSTOP): some peers poll, and would take the
processors of the others. Rounds go through all peers before the next begins, so that ratios mean something.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, KVError
from .baseline import CALLS, Baseline
from .compiled import program
from .crew import Crew, Process
from .environment import child_environment
from .peers_known import KNOWN, Known
from .progress import Steps
from .summary import paired_ratio, spread
from .wan import available_congestion

GB = 1e9
START_S = 120.0
ANSWER_S = 180.0
FREEZE_S = 2.0
PING_BYTES = 4096
JUST = 0.85
"""A peer below this share of its own documented ratio to the C loop was not measured fairly."""
DRIVERS = Path(__file__).parent / "drivers"
OURS, C_LOOP = "kvtransport", "c"


@dataclass(frozen=True, slots=True)
class PeersOptions:
    """What is measured. Bytes; ``region_bytes`` is the memory of each end, ``move_bytes`` what one move carries."""

    peers: tuple[str, ...] = tuple(k.name for k in KNOWN)
    congestion: tuple[str, ...] = ("cubic", "bbr")
    blocks: tuple[int, ...] = (64 << 10, 1 << 20, 4 << 20)
    rounds: int = 7
    region_bytes: int = 512 << 20
    move_bytes: int = 256 << 20
    pings: int = 1_000
    connections: int | None = None
    c_connections: int = 4

    def check(self) -> None:
        """Raises ConfigError naming the first option that makes no sense."""
        known = [k.name for k in KNOWN]
        for name in self.peers:
            if name not in known:
                raise ConfigError(f"there is no peer {name!r}; known: {', '.join(known)}")
        for label, value, low, high in (
            ("--rounds", self.rounds, 1, 1_000),
            ("--pings", self.pings, 1, 100_000),
            ("--move-bytes", self.move_bytes, 8 << 20, 8 << 30),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{label} must be {low} to {high}, got {value}")
        for block in self.blocks:
            if block < 4096 or self.move_bytes % block or self.region_bytes % self.move_bytes:
                raise ConfigError(f"blocks of {block} bytes do not divide moves of {self.move_bytes}")
        here = available_congestion()
        for name in self.congestion:
            if here and name not in here:
                raise ConfigError(f"{name} is not available in this kernel ({', '.join(here)}): modprobe tcp_{name}")


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of all threads of ``pids`` that are alive, to the nanosecond where the kernel says so."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _runs(pid: int) -> bool:
    """Whether the process is neither stopped nor gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "TtZX"


class Pair:
    """Two processes of one peer and what they have measured."""

    def __init__(self, name: str, start: Callable[[Crew], tuple[Process, Process, dict[str, Any]]]) -> None:
        self.name = name
        self.crew = Crew()
        try:
            self.target, self.initiator, self.facts = start(self.crew)
        except BaseException:
            self.crew.close()
            raise
        self._target_pids = (self.target.pid, *self.facts.get("pids", ()))
        self.freeze()

    def freeze(self) -> None:
        """Stop both ends, and wait until they have stopped: the next one's turn begins then."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + FREEZE_S
        while any(_runs(pid) for pid in self._pids) and time.monotonic() < deadline:
            time.sleep(0.0005)

    @property
    def _pids(self) -> tuple[int, ...]:
        return (*self._target_pids, self.initiator.pid)

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.freeze()

    def _both(self, command: Mapping[str, Any], event: str) -> dict[str, Any]:
        self.target.say(command)
        self.crew.wait(self.target, "expecting", ANSWER_S)
        self.initiator.say(command)
        return self.crew.wait(self.initiator, event, ANSWER_S)

    def move(self, op: str, block: int, offset: int, nbytes: int) -> dict[str, Any]:
        command = {"do": "move", "op": op, "block": block, "offset": offset, "nbytes": nbytes}
        before = cpu_seconds((self.initiator.pid,)), cpu_seconds(self._target_pids)
        seconds = self._both(command, "moved")["seconds"]
        gb = nbytes / GB
        return {
            "seconds": seconds,
            "gb_per_s": gb / seconds,
            "initiator_cpu_s_per_gb": (cpu_seconds((self.initiator.pid,)) - before[0]) / gb,
            "target_cpu_s_per_gb": (cpu_seconds(self._target_pids) - before[1]) / gb,
        }

    def ping(self, op: str, count: int) -> dict[str, Any]:
        told = self._both({"do": "ping", "op": op, "count": count}, "pinged")
        return {"p50_us": told["p50_s"] * 1e6, "p99_us": told["p99_s"] * 1e6}

    def agree(self, offset: int, nbytes: int) -> bool:
        """Whether both ends hold the same bytes there."""
        found = []
        for end in (self.target, self.initiator):
            end.say({"do": "digest", "offset": offset, "nbytes": nbytes})
            found.append(self.crew.wait(end, "digest", ANSWER_S)["digest"])
        return bool(found[0] == found[1])

    def close(self) -> None:
        # A frozen process cannot see the end of its input.
        self._signal(signal.SIGCONT)
        for each in (self.initiator, self.target):
            each.process.kill()
        self.crew.close()


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_pair(
    crew: Crew, name: str, argv: Sequence[str], env: Mapping[str, str], config: dict[str, Any]
) -> tuple[Process, Process, dict[str, Any]]:
    target = crew.start(f"{name} target", [*argv, "target"], env)
    target.say(config)
    told = crew.wait(target, "ready", START_S)
    initiator = crew.start(f"{name} initiator", [*argv, "initiator"], env)
    initiator.say({**config, "target": told})
    return target, initiator, {**told, **crew.wait(initiator, "ready", START_S)}


def start_known(known: Known, options: PeersOptions, congestion: str, say: Callable[[str], None]) -> Pair:
    """Raises KVError when it cannot be installed or does not start."""
    python = known.environment.make(say)
    shim = program("congestion", shared=True)
    env = {**os.environ, **known.env, "LD_PRELOAD": str(shim), "KVBENCH_CONGESTION": congestion}
    config = {"region": options.region_bytes, "port": free_port()}
    return Pair(
        known.name, lambda crew: _start_pair(crew, known.name, [python, str(DRIVERS / known.driver)], env, config)
    )


def start_ours(options: PeersOptions, congestion: str) -> Pair:
    config = {"region": options.region_bytes, "congestion": congestion, "connections": options.connections}
    argv = [sys.executable, "-m", "kvtransport.bench.peers_ours"]
    env = {**child_environment(), "LD_PRELOAD": str(program("congestion", shared=True))}
    return Pair(OURS, lambda crew: _start_pair(crew, OURS, argv, env, config))


class Results:
    """Rounds of one peer, by operation and block."""

    def __init__(self) -> None:
        self.moves: dict[str, dict[int, list[dict[str, Any]]]] = {}
        self.pings: dict[str, list[dict[str, Any]]] = {}
        self.verified = True
        self.failed: str | None = None

    def moved(self, op: str, block: int, measured: dict[str, Any]) -> None:
        self.moves.setdefault(op, {}).setdefault(block, []).append(measured)

    def pinged(self, op: str, measured: dict[str, Any]) -> None:
        self.pings.setdefault(op, []).append(measured)

    def best(self, block: int, ops: Sequence[str] | None = None) -> tuple[str, list[float]] | None:
        """The operation with the best median at ``block``, and its rounds in GB/s; None where there is none."""
        tried = {
            op: [r["gb_per_s"] for r in by_block[block]]
            for op, by_block in self.moves.items()
            if by_block.get(block) and (ops is None or op in ops)
        }
        if not tried:
            return None
        op = max(tried, key=lambda o: statistics.median(tried[o]))
        return op, tried[op]

    def p50_us(self) -> float | None:
        """Of the fastest kind of ping."""
        return min((statistics.median(r["p50_us"] for r in rounds) for rounds in self.pings.values()), default=None)

    def describe(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "failed": self.failed,
            "moves": {
                op: {
                    str(block): {
                        "gb_per_s": spread([r["gb_per_s"] for r in rounds]),
                        "initiator_cpu_s_per_gb": statistics.median(r["initiator_cpu_s_per_gb"] for r in rounds),
                        "target_cpu_s_per_gb": statistics.median(r["target_cpu_s_per_gb"] for r in rounds),
                        "rounds": rounds,
                    }
                    for block, rounds in by_block.items()
                }
                for op, by_block in self.moves.items()
            },
            "pings": {
                op: {
                    "p50_us": spread([r["p50_us"] for r in rounds]),
                    "p99_us": spread([r["p99_us"] for r in rounds]),
                    "rounds": rounds,
                }
                for op, rounds in self.pings.items()
            },
        }


OUR_MOVES = ("objects", "pages")


def measure(options: PeersOptions, congestion: str, steps: Steps) -> dict[str, Any]:
    """All peers under one congestion control; returns one element of ``runs``."""
    missing: dict[str, str] = {}
    results: dict[str, Results] = {C_LOOP: Results(), OURS: Results()}
    pairs: dict[str, tuple[Pair, tuple[str, ...], tuple[str, ...]]] = {}
    facts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        ours = start_ours(options, congestion)
        stack.callback(ours.close)
        facts[OURS] = ours.facts
        pairs[OURS] = (ours, OUR_MOVES, ("call",))
        for known in (k for k in KNOWN if k.name in options.peers):
            steps.step(f"{congestion}: starting {known.title}")
            try:
                pair = start_known(known, options, congestion, steps.step)
            except KVError as error:
                missing[known.name] = error.message
                continue
            stack.callback(pair.close)
            pairs[known.name] = (pair, known.moves, known.pings)
            results[known.name] = Results()
        loop = stack.enter_context(
            Baseline(
                options.move_bytes,
                connections=options.c_connections,
                copies=max(1, options.region_bytes // options.move_bytes),
                congestion=congestion,
            )
        )
        facts[C_LOOP] = {"connections": options.c_connections, "congestion": loop.congestion}
        for at in range(-1, options.rounds):  # the first one warms up
            _round_of_c(loop, options, results[C_LOOP], at, steps, congestion)
            for name, (pair, moves, pings) in list(pairs.items()):
                steps.step(f"{congestion}: {'warming up' if at < 0 else f'round {at + 1}'}, {name}")
                try:
                    with pair.turn():
                        _round(pair, moves, pings, options, results[name], at)
                except KVError as error:
                    results[name].failed = error.message
                    del pairs[name]
    return _conclude(options, congestion, results, missing, facts)


def _round(
    pair: Pair, moves: Sequence[str], pings: Sequence[str], options: PeersOptions, into: Results, at: int
) -> None:
    places = options.region_bytes // options.move_bytes
    turn = at + 1
    for op in moves:
        for block in options.blocks:
            offset = turn % places * options.move_bytes
            turn += 1
            measured = pair.move(op, block, offset, options.move_bytes)
            if at >= 0:
                into.moved(op, block, measured)
            else:
                into.verified &= pair.agree(offset, options.move_bytes)
    for op in pings:
        told = pair.ping(op, options.pings if at >= 0 else 50)
        if at >= 0:
            into.pinged(op, told)


def _round_of_c(loop: Baseline, options: PeersOptions, into: Results, at: int, steps: Steps, congestion: str) -> None:
    steps.step(f"{congestion}: {'warming up' if at < 0 else f'round {at + 1}'}, C loop")
    for block in options.blocks:
        for call in CALLS:
            measured = loop.round(call, send_call=block)
            into.verified &= measured.verified
            if at >= 0:
                each = {
                    "seconds": measured.seconds,
                    "gb_per_s": measured.goodput_gbps / 8,
                    "initiator_cpu_s_per_gb": measured.sender_cpu_s_per_gb,
                    "target_cpu_s_per_gb": measured.receiver_cpu_s_per_gb,
                }
                into.moved(f"receive {call >> 10} KiB", block, each)
    p50, p99 = loop.ping(PING_BYTES, options.pings)
    if at >= 0:
        into.pinged("echo", {"p50_us": p50 * 1e6, "p99_us": p99 * 1e6})


def _conclude(
    options: PeersOptions,
    congestion: str,
    results: dict[str, Results],
    missing: dict[str, str],
    facts: dict[str, Any],
) -> dict[str, Any]:
    c, ours = results[C_LOOP], results[OURS]
    peers: dict[str, Any] = {}
    for known in KNOWN:
        if known.name not in results:
            continue
        mine = results[known.name]
        to_c, documented, void = None, known.documented.get(congestion), None
        best, best_c = mine.best(1 << 20), c.best(1 << 20)
        if best is not None and best_c is not None and len(best[1]) == len(best_c[1]):
            to_c = paired_ratio(best[1], best_c[1])
            if documented is not None:
                void = to_c["median"] < JUST * documented
        peers[known.name] = {
            "title": known.title,
            "settings": known.settings,
            "latency_only": known.latency_only,
            **mine.describe(),
            "to_c_at_1_mib": to_c,
            "documented_to_c_at_1_mib": documented,
            "void": void,
            "ours_over_it": {op: _over(ours, mine, options, (op,)) for op in OUR_MOVES},
            "p50_us": mine.p50_us(),
        }
    return {
        "congestion": congestion,
        "kvtransport": {
            **ours.describe(),
            "facts": facts.get(OURS),
            "p50_us": ours.p50_us(),
            "over_c": {op: _over(ours, c, options, (op,)) for op in OUR_MOVES},
        },
        "c": {**c.describe(), "facts": facts.get(C_LOOP), "p50_us": c.p50_us()},
        "peers": peers,
        "not_installed": missing,
        "void": [name for name, each in peers.items() if each["void"]],
    }


def _over(ours: Results, theirs: Results, options: PeersOptions, ops: Sequence[str]) -> dict[str, Any]:
    """By block, ours over the best of theirs, round by round."""
    out = {}
    for block in options.blocks:
        mine, other = ours.best(block, ops), theirs.best(block)
        if mine is not None and other is not None and len(mine[1]) == len(other[1]):
            out[str(block)] = paired_ratio(mine[1], other[1])
    return out


def run(options: PeersOptions, out: Console) -> dict[str, Any]:
    """Measure under every congestion control asked for; installs what is missing first."""
    options.check()
    runs = []
    per_run = len(options.peers) + (options.rounds + 1) * (len(options.peers) + 2)
    with Steps(per_run * len(options.congestion), "peers") as steps:
        for congestion in options.congestion:
            runs.append(measure(options, congestion, steps))
    body = {"options": asdict(options), "ping_bytes": PING_BYTES, "runs": runs}
    render(out, body)
    return body


def render(out: Console, body: Mapping[str, Any]) -> None:
    """The same for people."""
    blocks = [str(b) for b in body["options"]["blocks"]]
    for each in body["runs"]:
        table = Table(title=f"host memory to host memory over loopback, {each['congestion']}, GB/s (ours / theirs)")
        for heading in ("", "operation", *(_size(int(b)) for b in blocks), "CPU s/GB", "4 KiB p50"):
            table.add_column(heading, justify="left" if heading in ("", "operation") else "right")
        everyone = {
            "C loop": each["c"],
            "kvtransport": each["kvtransport"],
            **{p["title"]: p for p in each["peers"].values()},
        }
        for title, peer in everyone.items():
            _rows(table, title, peer, blocks)
        out.print(table)
        for name, why in each["not_installed"].items():
            out.print(f"{name} took no part: {why}")
        for name in each["void"]:
            peer = each["peers"][name]
            out.print(
                f"[red]void for {name}[/]: {peer['to_c_at_1_mib']['median']:.2f} of the C loop at 1 MiB, documented "
                f"{peer['documented_to_c_at_1_mib']:.2f}; below {JUST} of that it was not measured fairly"
            )


def _rows(table: Table, title: str, peer: Mapping[str, Any], blocks: Sequence[str]) -> None:
    over = peer.get("ours_over_it", {}).get("objects", {})
    p50 = "-" if peer["p50_us"] is None else f"{peer['p50_us']:.0f} us"
    name = title if peer["verified"] else f"{title} [red](bytes differ)[/]"
    if peer["failed"]:
        name += f" [red](failed: {peer['failed'][:60]})[/]"
    if not peer["moves"]:
        table.add_row(name, "-", *("-" for _ in blocks), "-", p50)
    for i, (op, by_block) in enumerate(peer["moves"].items()):
        cells = []
        for block in blocks:
            reached = by_block[block]["gb_per_s"]["median"] if block in by_block else None
            ratio = f" ({over[block]['median']:.1f}x)" if i == 0 and block in over else ""
            cells.append("-" if reached is None else f"{reached:.2f}{ratio}")
        at = by_block.get(str(1 << 20)) or next(iter(by_block.values()))
        cpu = f"{at['initiator_cpu_s_per_gb']:.2f} + {at['target_cpu_s_per_gb']:.2f}"
        table.add_row(name if i == 0 else "", op, *cells, cpu, p50 if i == 0 else "")


def _size(block: int) -> str:
    return f"{block >> 20} MiB" if block >= 1 << 20 else f"{block >> 10} KiB"
