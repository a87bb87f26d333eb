"""The environment of child processes that run this Python with these packages."""

from __future__ import annotations

import os
from pathlib import Path


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child finds the very packages this process runs.

    However they were found: installed, or a source tree as the working directory. Without the safe path a child started
    in a source tree would import *that*, not what is installed.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
