"""The rows of a sweep and the file that holds them: written after every row, continued when it is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpool.eviction import DEFAULT_POLICY
from kvtransport.errors import ConfigError

CLAIRVOYANT = "clairvoyant"
Row = dict[str, Any]
Name = tuple[str, float, str]
"""(layout, share of the working set, policy): what a row is of."""


def name_of(row: Mapping[str, Any]) -> Name:
    return str(row["layout"]), float(row["memory_share"]), str(row["policy"])


class SweepFile:
    """Rows by name, and ``settings`` (trace, requests counted, ...) that all of them share.

    With a ``path`` every :meth:`add` replaces the file at once: what is interrupted goes on where it stopped.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None) -> None:
        self.settings = dict(settings)
        self.path = path
        self._rows: dict[Name, Row] = {}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        """Raises ConfigError for a file of something else."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            rows = {name_of(row): dict(row) for row in body["runs"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no sweep ({error}): name another file, or remove it") from error
        for name, value in self.settings.items():
            if body.get(name) != value:
                raise ConfigError(
                    f"{path} holds a sweep with {name} {body.get(name)!r}, not {value!r}: name another file, or remove it"
                )
        self._rows = rows

    @property
    def names(self) -> frozenset[Name]:
        """What is in it."""
        return frozenset(self._rows)

    def rows(self, layouts: Sequence[str] = (), policies: Sequence[str] = ()) -> list[Row]:
        """All rows by layout, share and policy, in the order given; those not named follow, by name."""
        places = [{name: i for i, name in enumerate(names)} for names in (layouts, [*policies, CLAIRVOYANT])]

        def order(row: Row) -> tuple[Any, ...]:
            layout, share, policy = name_of(row)
            return places[0].get(layout, len(layouts)), layout, share, places[1].get(policy, len(policies)), policy

        return sorted(self._rows.values(), key=order)

    def add(self, row: Row) -> None:
        """Keep ``row``, in the place of an older one of that name."""
        self._rows[name_of(row)] = row
        self.save()

    def body(self) -> dict[str, Any]:
        rows = self.rows()
        return {**self.settings, "claims": claims(rows), "runs": rows}

    def save(self) -> None:
        """Replace the file, if there is a path: readers see the old rows or the new ones, never half of them."""
        if self.path is None:
            return
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps(self.body(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def claims(rows: Iterable[Mapping[str, Any]], default: str = DEFAULT_POLICY) -> list[Row]:
    """How ``default`` stands by layout and share, in points of tokens hit: over lru, and behind the best of the others (at least 0).

    Only of what was run: None where ``default`` or what it is held against is missing.
    """
    found: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        layout, share, policy = name_of(row)
        found.setdefault((layout, share), {})[policy] = 100 * float(row["token_hit_rate"])
    out: list[Row] = []
    for (layout, share), rates in sorted(found.items()):
        own = rates.get(default)
        others = {policy: rate for policy, rate in rates.items() if policy not in (default, CLAIRVOYANT)}
        best = max(others, key=lambda name: others[name], default=None)
        out.append(
            {
                "layout": layout,
                "memory_share": share,
                "over_lru_points": None if own is None or "lru" not in rates else own - rates["lru"],
                "behind_best_points": None if own is None or best is None else max(0.0, others[best] - own),
                "best_other": best,
                "behind_clairvoyant_points": None
                if own is None or CLAIRVOYANT not in rates
                else rates[CLAIRVOYANT] - own,
            }
        )
    return out
