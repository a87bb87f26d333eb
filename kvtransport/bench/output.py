"""How every ``kvbench`` command speaks: one JSON object where asked, a table for people beside it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError

_BUSY_BEFORE = os.getloadavg()[0]
"""Load average when this process began: how busy the machine was without it."""


def recorded() -> dict[str, Any]:
    """When, where and with what a result was measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        cpu = platform.processor()
    try:
        version = metadata.version("kvtransport")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvtransport": version,
        "load_average_before": _BUSY_BEFORE,
    }


def console(json_to: str | None) -> Console:
    """Where the pretty output goes: standard output, or standard error when that carries the JSON."""
    return Console(stderr=json_to == "-", highlight=False)


def write_json(json_to: str | None, body: Mapping[str, Any]) -> None:
    """Write ``body`` as one JSON object to the path ``json_to``, to standard output for ``-``, nowhere for None.

    Raises ConfigError when the file cannot be written.
    """
    if json_to is None:
        return
    text = json.dumps(body, indent=2, allow_nan=False) + "\n"
    if json_to == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(json_to).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the JSON to {json_to!r}: {error.strerror or error}") from error


def write_result(json_to: str | None, command: str, body: Mapping[str, Any]) -> None:
    """:func:`write_json` of what ``kvbench COMMAND`` found, with ``command`` and :func:`recorded`."""
    write_json(json_to, {"command": command, **body, "recorded": recorded()})
