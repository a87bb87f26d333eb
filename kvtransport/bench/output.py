"""How every ``kvbench`` command speaks: one JSON object where asked, a table for people beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError


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
