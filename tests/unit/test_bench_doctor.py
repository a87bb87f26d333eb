"""kvbench doctor over a system that is made up: every finding, and the command that fixes it."""

from __future__ import annotations

import json
import resource

import pytest
from typer.testing import CliRunner

from kvtransport.bench import cli, doctor
from kvtransport.bench.doctor import DoctorOptions, Status, examine, parse_offloads

ETHTOOL = """Features for eth0:
rx-checksumming: on
tx-checksumming: on
\ttx-checksum-ipv4: off [fixed]
scatter-gather: on
tcp-segmentation-offload: off
\ttx-tcp-segmentation: off
generic-segmentation-offload: on
generic-receive-offload: off [fixed]
large-receive-offload: off [fixed]
"""

GOOD = {
    "/proc/sys/net/ipv4/tcp_rmem": "4096 131072 67108864",
    "/proc/sys/net/ipv4/tcp_wmem": "4096\t16384\t67108864",
    "/proc/sys/net/ipv4/tcp_slow_start_after_idle": "0",
    "/proc/sys/net/ipv4/tcp_window_scaling": "1",
    "/proc/sys/net/ipv4/tcp_sack": "1",
    "/proc/sys/net/ipv4/tcp_timestamps": "1",
    "/proc/sys/net/ipv4/tcp_moderate_rcvbuf": "1",
    "/proc/sys/net/ipv4/tcp_available_congestion_control": "reno cubic bbr",
    "/proc/sys/net/ipv4/tcp_allowed_congestion_control": "reno cubic bbr",
    "/proc/sys/net/ipv4/tcp_congestion_control": "cubic",
    "/proc/sys/net/core/default_qdisc": "fq",
    "/sys/devices/system/node/online": "0",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "/proc/net/tls_stat": "TlsCurrTxSw 0",
    "/sys/class/net/eth0/mtu": "9000",
    "/sys/class/net/eth0/speed": "100000",
}
ALL_ON = ETHTOOL.replace("off [fixed]", "on").replace(": off", ": on")


class Fake:
    def __init__(self, *, ethtool: str | None = ALL_ON, limits: int = -1, **changes) -> None:
        self.files = {**GOOD, **changes.pop("files", {})}
        self.ethtool = ethtool
        self.limits = limits

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def run(self, *argv: str) -> str | None:
        if argv[0] != "ethtool" or self.ethtool is None:
            return None
        return "ethtool version 6.1" if argv[1] == "--version" else self.ethtool

    def interfaces(self) -> list[str]:
        return ["eth0"]

    def limit(self, which: int) -> int:
        assert which in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
        return self.limits


def findings(system: Fake, *, native: bool = True, **options) -> dict[str, doctor.Finding]:
    found = examine(system, DoctorOptions(**options), native=native)
    return {f.check: f for group in found.values() for f in group}


def test_a_system_that_is_well():
    found = findings(Fake())
    assert {f.status for f in found.values()} == {Status.OK}
    assert not any(f.fix or f.why for f in found.values())


P = "/proc/sys/net/ipv4/"


@pytest.mark.parametrize(
    ("files", "check", "status", "fix"),
    [
        ({P + "tcp_rmem": "4096 131072 1000000"}, "tcp_rmem", "fail", 'sysctl -w net.ipv4.tcp_rmem="4096 131072 6250000"'),
        ({P + "tcp_wmem": "4096 16384 4194304"}, "tcp_wmem", "fail", 'sysctl -w net.ipv4.tcp_wmem="4096 16384 6250000"'),
        ({P + "tcp_slow_start_after_idle": "1"}, "tcp_slow_start_after_idle", "warn", "sysctl -w net.ipv4.tcp_slow_start_after_idle=0"),
        ({P + "tcp_sack": "0"}, "tcp_sack", "fail", "sysctl -w net.ipv4.tcp_sack=1"),
        ({P + "tcp_available_congestion_control": "reno cubic"}, "bbr", "fail", "modprobe tcp_bbr"),
        ({P + "tcp_allowed_congestion_control": "reno bbr"}, "cubic", "warn", 'sysctl -w net.ipv4.tcp_allowed_congestion_control="reno bbr cubic"'),
        ({"/proc/sys/net/core/default_qdisc": "pfifo_fast"}, "queueing discipline", "warn", "sysctl -w net.core.default_qdisc=fq"),
        ({"/sys/class/net/eth0/mtu": "1500"}, "eth0: MTU", "warn", "ip link set dev eth0 mtu 9000"),
        ({"/sys/class/net/eth0/speed": "1000"}, "eth0: speed", "fail", "ethtool eth0"),
        ({"/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave"}, "CPU governor", "warn", "cpupower frequency-set -g performance"),
        ({"/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}, "transparent huge pages", "warn", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        ({"/sys/devices/system/node/online": "0-1", "/proc/sys/kernel/numa_balancing": "1"}, "NUMA balancing", "warn", "sysctl -w kernel.numa_balancing=0"),
        ({"/sys/devices/system/node/online": "0-1", "/sys/class/net/eth0/device/numa_node": "1"}, "eth0: NUMA node", "warn", "numactl --cpunodebind=1 --membind=1 COMMAND"),
    ],
)  # fmt: skip
def test_each_finding_comes_with_its_fix(files, check, status, fix):
    found = findings(Fake(files=files))[check]
    assert (found.status, found.fix) == (status, fix)
    assert found.why


def test_limits_native_and_what_is_not_there():
    found = findings(Fake(limits=1024), native=False)
    assert found["open files"].fix == "ulimit -n 65536"
    assert found["locked memory"].status is Status.WARN
    assert found["native extension"].status is Status.FAIL
    empty = Fake(ethtool=None)
    empty.files = {}
    unknown = findings(empty)
    assert unknown["tcp_rmem"].status is Status.UNKNOWN
    assert unknown["eth0: offloads"].fix == "apt-get install ethtool"
    assert unknown["kernel TLS"].fix == "modprobe tls"


def test_the_window_is_a_share_of_bandwidth_times_delay():
    assert DoctorOptions(10, 10, 4).window_bytes == 6_250_000
    assert DoctorOptions(100, 30, 16).window_bytes == 46_875_000
    assert findings(Fake(), rate_gbps=100, rtt_ms=30, connections=2)["tcp_wmem"].status is Status.FAIL


def test_offloads():
    told = parse_offloads(ETHTOOL)
    assert told["tcp-segmentation-offload"] == (False, False)
    assert told["generic-receive-offload"] == (False, True)
    assert told["rx-checksumming"] == (True, False)
    found = findings(Fake(ethtool=ETHTOOL))["eth0: offloads"]
    assert (found.status, found.fix) == (Status.FAIL, "ethtool -K eth0 tso on")
    assert found.value == "off: tso, gro (fixed)"


def test_the_command_on_this_system():
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["doctor", "--json", "-"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["command"] == "doctor"
    assert sum(body["counts"].values()) == sum(len(group) for group in body["groups"].values())
    assert set(body["groups"]) >= {"socket limits", "congestion control", "machine"}
    for fix in body["fixes"]:
        assert fix in result.stderr  # whole, so that it can be copied
