"""``kvbench doctor``: what of this system stands between a link and its speed, each with the command that fixes it.

Every check is a pure function of what :class:`System` read; nothing here changes anything.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from ..buffers import native_available

JUMBO = 9_000
FILES = 65_536
PINNED = 8 << 30
"""Memory that an arena may want to lock: tens of gigabytes on a decode node, this much at least."""


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    """Costs speed on some paths."""
    FAIL = "fail"
    """Costs speed here, or does not work."""
    UNKNOWN = "unknown"
    """The system does not say."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what is there, why it matters where it is not right, and the command that sets it right."""

    check: str
    status: Status
    value: str
    why: str = ""
    fix: str = ""


class System(Protocol):
    """Where the checks look. None: not there, or not readable."""

    def read(self, path: str) -> str | None: ...
    def run(self, *argv: str) -> str | None: ...
    def interfaces(self) -> list[str]: ...
    def limit(self, which: int) -> int: ...


class LinuxSystem:
    """The real one."""

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def run(self, *argv: str) -> str | None:
        if shutil.which(argv[0]) is None:
            return None
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def interfaces(self) -> list[str]:
        """Those that are up and lead somewhere: no loopback, nothing virtual that carries no address."""
        found = []
        for path in sorted(Path("/sys/class/net").glob("*")):
            if path.name != "lo" and self.read(str(path / "operstate")) in ("up", "unknown"):
                found.append(path.name)
        return found

    def limit(self, which: int) -> int:
        soft, _ = resource.getrlimit(which)
        return -1 if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """The path that shall be filled: Gbps, milliseconds, connections. ``interface`` None: all that are up."""

    rate_gbps: float = 10.0
    rtt_ms: float = 10.0
    connections: int = 4
    interface: str | None = None

    @property
    def window_bytes(self) -> int:
        """What one connection must have on its way: its share of bandwidth times delay, twice (it can grow only so)."""
        return int(2 * self.rate_gbps * 1e9 / 8 * self.rtt_ms / 1e3 / self.connections)


# -- socket limits ----------------------------------------------------------------------------------------


def check_buffers(system: System, options: DoctorOptions) -> Iterator[Finding]:
    """``tcp_rmem`` and ``tcp_wmem``: how much one connection may have on its way."""
    need = options.window_bytes
    for name, which in (("tcp_rmem", "receive"), ("tcp_wmem", "send")):
        text = system.read(f"/proc/sys/net/ipv4/{name}")
        values = (text or "").split()
        if len(values) != 3:
            yield Finding(name, Status.UNKNOWN, text or "not there")
            continue
        most = int(values[2])
        ok = most >= need
        yield Finding(
            name,
            Status.OK if ok else Status.FAIL,
            f"{most / 1e6:.1f} MB at most",
            ""
            if ok
            else f"{options.rate_gbps:g} Gbps at {options.rtt_ms:g} ms over {options.connections} connections need {need / 1e6:.1f} MB of {which} buffer each",
            "" if ok else f'sysctl -w net.ipv4.{name}="{values[0]} {values[1]} {max(need, most)}"',
        )


def check_flags(system: System, options: DoctorOptions) -> Iterator[Finding]:
    """Settings of TCP that are either right or wrong."""
    for name, right, why, status in (
        ("tcp_slow_start_after_idle", "0", "a link that rested a moment starts slowly again", Status.WARN),
        ("tcp_window_scaling", "1", "a connection has at most 64 KiB on its way", Status.FAIL),
        ("tcp_sack", "1", "one lost segment costs a whole window", Status.FAIL),
        ("tcp_timestamps", "1", "round trips are measured once a window", Status.WARN),
        ("tcp_moderate_rcvbuf", "1", "receive buffers do not grow with the path", Status.FAIL),
    ):
        value = system.read(f"/proc/sys/net/ipv4/{name}")
        if value is None:
            yield Finding(name, Status.UNKNOWN, "not there")
            continue
        ok = value == right
        yield Finding(
            name,
            Status.OK if ok else status,
            value,
            "" if ok else why,
            "" if ok else f"sysctl -w net.ipv4.{name}={right}",
        )


def check_limits(system: System, options: DoctorOptions) -> Iterator[Finding]:
    """Resource limits of this process."""
    for name, which, need, why, fix in (
        ("open files", resource.RLIMIT_NOFILE, FILES, "each connection is one", f"ulimit -n {FILES}"),
        (
            "locked memory",
            resource.RLIMIT_MEMLOCK,
            PINNED,
            "arenas cannot be pinned; a device then copies by way of a buffer in between",
            "ulimit -l unlimited   # or LimitMEMLOCK=infinity in the unit, --ulimit memlock=-1 for a container",
        ),
    ):
        value = system.limit(which)
        ok = value < 0 or value >= need
        shown = "unlimited" if value < 0 else f"{value:,}"
        yield Finding(name, Status.OK if ok else Status.WARN, shown, "" if ok else why, "" if ok else fix)


# -- congestion control --------------------------------------------------------------------------------------


def check_congestion(system: System, options: DoctorOptions) -> Iterator[Finding]:
    """BBR for lossy paths, cubic for local ones: both should be there and allowed without privilege."""
    here = system.read("/proc/sys/net/ipv4/tcp_available_congestion_control")
    allowed = system.read("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    default = system.read("/proc/sys/net/ipv4/tcp_congestion_control")
    if here is None or allowed is None:
        yield Finding("congestion control", Status.UNKNOWN, "not there")
        return
    for name, why in (
        ("bbr", "0.01% loss at 10 ms leaves cubic a tenth of the path"),
        ("cubic", "BBR halves a local path"),
    ):
        if name not in here.split():
            yield Finding(name, Status.FAIL, "not in this kernel", why, f"modprobe tcp_{name}")
        elif name not in allowed.split():
            names = " ".join(dict.fromkeys([*allowed.split(), name]))
            fix = f'sysctl -w net.ipv4.tcp_allowed_congestion_control="{names}"'
            yield Finding(
                name, Status.WARN, "only with privilege", f"processes without CAP_NET_ADMIN go without: {why}", fix
            )
        else:
            yield Finding(name, Status.OK, "allowed" + (", the default" if name == default else ""))
    queue = system.read("/proc/sys/net/core/default_qdisc")
    if queue is not None:
        ok = queue == "fq"
        yield Finding(
            "queueing discipline",
            Status.OK if ok else Status.WARN,
            queue,
            "" if ok else "fq paces BBR's packets in the kernel; without it timers per socket do",
            "" if ok else "sysctl -w net.core.default_qdisc=fq",
        )


# -- interfaces ----------------------------------------------------------------------------------------------

OFFLOADS = {
    "tcp-segmentation-offload": "tso",
    "generic-segmentation-offload": "gso",
    "generic-receive-offload": "gro",
    "scatter-gather": "sg",
    "tx-checksumming": "tx",
    "rx-checksumming": "rx",
}


def parse_offloads(text: str) -> dict[str, tuple[bool, bool]]:
    """``ethtool -k``: by feature, whether it is on, and whether it is fixed."""
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.strip().partition(":")
        words = rest.split()
        if colon and words and words[0] in ("on", "off"):
            found[name] = (words[0] == "on", "[fixed]" in words)
    return found


def check_interface(system: System, options: DoctorOptions, name: str) -> Iterator[Finding]:
    """MTU, speed, offloads and NUMA node of one interface."""
    mtu = system.read(f"/sys/class/net/{name}/mtu")
    if mtu is not None and mtu.isdigit():
        ok = int(mtu) >= JUMBO
        yield Finding(
            f"{name}: MTU",
            Status.OK if ok else Status.WARN,
            mtu,
            "" if ok else "six times as many packets as jumbo frames; only where every switch on the way takes them",
            "" if ok else f"ip link set dev {name} mtu {JUMBO}",
        )
    speed = system.read(f"/sys/class/net/{name}/speed")
    if speed is not None and speed.lstrip("-").isdigit() and int(speed) > 0:
        ok = int(speed) >= options.rate_gbps * 1e3
        why = "" if ok else f"slower than the {options.rate_gbps:g} Gbps asked about; is the right port linked?"
        yield Finding(
            f"{name}: speed",
            Status.OK if ok else Status.FAIL,
            f"{int(speed) / 1e3:g} Gbps",
            why,
            "" if ok else f"ethtool {name}",
        )
    yield from _offloads(system, name)
    node = system.read(f"/sys/class/net/{name}/device/numa_node")
    nodes = system.read("/sys/devices/system/node/online")
    if node is not None and node.lstrip("-").isdigit() and nodes not in (None, "0"):
        at = int(node)
        yield Finding(
            f"{name}: NUMA node",
            Status.WARN if at >= 0 else Status.UNKNOWN,
            node,
            f"this machine has nodes {nodes}; a process on another one crosses them with every byte",
            f"numactl --cpunodebind={max(at, 0)} --membind={max(at, 0)} COMMAND",
        )


def _offloads(system: System, name: str) -> Iterator[Finding]:
    text = system.run("ethtool", "-k", name)
    if text is None:
        has = system.run("ethtool", "--version") is not None
        yield Finding(
            f"{name}: offloads",
            Status.UNKNOWN,
            "ethtool cannot read them" if has else "ethtool is not installed",
            "",
            "" if has else "apt-get install ethtool",
        )
        return
    told = parse_offloads(text)
    off = [(short, told[long][1]) for long, short in OFFLOADS.items() if long in told and not told[long][0]]
    can = [short for short, fixed in off if not fixed]
    yield Finding(
        f"{name}: offloads",
        Status.OK if not off else Status.FAIL if can else Status.WARN,
        "all on" if not off else "off: " + ", ".join(short + (" (fixed)" if fixed else "") for short, fixed in off),
        "" if not off else "the processor does what the card could: one packet at a time",
        "ethtool -K " + name + "".join(f" {short} on" for short in can) if can else "",
    )


# -- processor and memory ------------------------------------------------------------------------------------


def check_machine(system: System, options: DoctorOptions) -> Iterator[Finding]:
    """NUMA, frequency, huge pages, and what the extension was built with."""
    nodes = system.read("/sys/devices/system/node/online")
    balancing = system.read("/proc/sys/kernel/numa_balancing")
    if nodes not in (None, "0") and balancing is not None:
        ok = balancing == "0"
        why = "" if ok else "pages of the arenas migrate while bytes arrive in them"
        yield Finding(
            "NUMA balancing",
            Status.OK if ok else Status.WARN,
            balancing,
            why,
            "" if ok else "sysctl -w kernel.numa_balancing=0",
        )
    else:
        yield Finding(
            "NUMA",
            Status.OK if nodes is not None else Status.UNKNOWN,
            "one node" if nodes is not None else "the system does not say",
        )
    governor = system.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor is not None:
        ok = governor == "performance"
        why = "" if ok else "the frequency follows the load, always a moment late"
        yield Finding(
            "CPU governor",
            Status.OK if ok else Status.WARN,
            governor,
            why,
            "" if ok else "cpupower frequency-set -g performance",
        )
    huge = system.read("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge is not None:
        chosen = huge.partition("[")[2].partition("]")[0]
        ok = chosen in ("always", "madvise")
        why = "" if ok else "touching a new GiB takes 0.55 s instead of 0.1 s"
        fix = "" if ok else "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("transparent huge pages", Status.OK if ok else Status.WARN, chosen or huge, why, fix)
    tls = system.read("/proc/net/tls_stat")
    yield Finding(
        "kernel TLS",
        Status.OK if tls is not None else Status.WARN,
        "there" if tls is not None else "not loaded",
        "" if tls is not None else "TLS records are made in user space",
        "" if tls is not None else "modprobe tls",
    )


def check_native(available: bool) -> Finding:
    """Whether the C extension is there."""
    return Finding(
        "native extension",
        Status.OK if available else Status.FAIL,
        "loaded" if available else "missing: the pure-Python twin serves",
        "" if available else "several times slower on paged memory",
        "" if available else "apt-get install gcc python3-dev && pip install --force-reinstall --no-deps kvtransport",
    )


GROUPS: tuple[tuple[str, Callable[[System, DoctorOptions], Iterator[Finding]]], ...] = (
    ("socket limits", check_buffers),
    ("socket limits", check_flags),
    ("socket limits", check_limits),
    ("congestion control", check_congestion),
    ("machine", check_machine),
)


def examine(system: System, options: DoctorOptions, *, native: bool) -> dict[str, list[Finding]]:
    """Every finding by group, in the order they are shown."""
    out: dict[str, list[Finding]] = {}
    for group, check in GROUPS:
        out.setdefault(group, []).extend(check(system, options))
    names = [options.interface] if options.interface is not None else system.interfaces()
    for name in names:
        out[f"interface {name}"] = list(check_interface(system, options, name))
    out["machine"].append(check_native(native))
    return out


def run(options: DoctorOptions, out: Console, system: System | None = None) -> dict[str, Any]:
    """Examine, print, and return what ``--json`` writes."""
    found = examine(system or LinuxSystem(), options, native=native_available)
    every = [f for group in found.values() for f in group]
    body = {
        "options": {**asdict(options), "window_bytes": options.window_bytes},
        "groups": {group: [asdict(f) for f in findings] for group, findings in found.items()},
        "counts": {str(s): sum(f.status is s for f in every) for s in Status},
        "fixes": [f.fix for f in every if f.fix and f.status in (Status.FAIL, Status.WARN)],
    }
    render(out, found, options)
    return body


_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red", Status.UNKNOWN: "dim"}


def render(out: Console, found: dict[str, list[Finding]], options: DoctorOptions) -> None:
    """The same for people."""
    title = f"for {options.rate_gbps:g} Gbps at {options.rtt_ms:g} ms over {options.connections} connections"
    table = Table(title=title)
    for heading in ("", "check", "is", "why it matters"):
        table.add_column(heading, overflow="fold")
    for group, findings in found.items():
        table.add_section()
        table.add_row("", f"[bold]{group}[/]", "", "")
        for each in findings:
            table.add_row(f"[{_STYLES[each.status]}]{each.status}[/]", each.check, each.value, each.why)
    out.print(table)
    # Below the table and on lines of their own: commands are there to be copied.
    for each in (f for findings in found.values() for f in findings if f.fix):
        out.print(f"[{_STYLES[each.status]}]{each.check}[/]:")
        out.print(f"    {each.fix}", markup=False, soft_wrap=True)
