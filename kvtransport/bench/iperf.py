"""iperf3, the tool to hold a wide-area path against."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, RemoteError

STARTING_S = 5.0
MARGIN_S = 30.0
GB = 1e9


@dataclass(frozen=True, slots=True)
class Setting:
    """How iperf3 is run: parallel connections, congestion control."""

    connections: int
    congestion: str

    @property
    def name(self) -> str:
        return f"{self.congestion} x{self.connections}"


def check() -> None:
    """Raises ConfigError when iperf3 is not installed."""
    if shutil.which("iperf3") is None:
        raise ConfigError("iperf3 is missing, the tool this compares with: apt-get install iperf3")


def run(
    setting: Setting,
    host: str,
    *,
    server: Sequence[str],
    client: Sequence[str],
    seconds: float | None = None,
    nbytes: int | None = None,
    omit_s: float = 0.0,
    port: int = 5201,
) -> dict[str, Any]:
    """One run to ``host``; ``server`` and ``client`` come before the commands, as in ``ip netns exec NAME``.

    For ``seconds`` after ``omit_s`` that do not count, or until ``nbytes`` are sent. Returns ``goodput_gbps`` (what
    arrived), ``retransmits``, ``sender_cpu_percent``, ``receiver_cpu_percent``. Raises RemoteError with iperf3's words.
    """
    length = [f"-n{nbytes}"] if nbytes is not None else [f"-t{seconds:g}", f"-O{omit_s:g}"]
    limit = MARGIN_S + (seconds or 0.0) + omit_s + (300.0 if nbytes is not None else 0.0)
    listening = subprocess.Popen(
        [*server, "iperf3", "-s", "-1", "--forceflush", "-B", host, "-p", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_for(b"Server listening", listening)
        argv = [*client, "iperf3", "-J", "-c", host, "-p", str(port), "-P", str(setting.connections)]
        argv += ["-C", setting.congestion, *length]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise RemoteError(f"iperf3 ({setting.name}) did not end within {limit:g} s") from None
    finally:
        listening.kill()
        listening.communicate()
    return parse(done.stdout, setting)


def parse(text: str, setting: Setting) -> dict[str, Any]:
    """What :func:`run` returns, from iperf3's JSON. Raises RemoteError for its errors and for what is no JSON."""
    try:
        body = json.loads(text)
    except ValueError:
        raise RemoteError(f"iperf3 ({setting.name}) gave no JSON: {text.strip()[:200]!r}") from None
    if "error" in body:
        raise RemoteError(f"iperf3 ({setting.name}): {body['error']}")
    end = body["end"]
    cpu = end.get("cpu_utilization_percent", {})
    return {
        "goodput_gbps": end["sum_received"]["bits_per_second"] / GB,
        "seconds": end["sum_received"]["seconds"],
        "bytes": end["sum_received"]["bytes"],
        "retransmits": end["sum_sent"].get("retransmits", 0),
        "sender_cpu_percent": cpu.get("host_total"),
        "receiver_cpu_percent": cpu.get("remote_total"),
    }


def _wait_for(words: bytes, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    deadline = time.monotonic() + STARTING_S
    heard = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while words not in heard:
            data = os.read(process.stdout.fileno(), 4096) if selector.select(deadline - time.monotonic()) else b""
            if not data:
                raise RemoteError(f"the iperf3 server did not start: {heard.decode(errors='replace').strip()[-300:]}")
            heard += data
