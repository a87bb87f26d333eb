"""The live view: one cell per layer and process, filled as layers are computed, arrive and are consumed."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .plan import Plan

_CELLS = {"": ("·", "dim"), "ready": ("█", "green"), "applied": ("▒", "yellow"), "consumed": ("█", "blue")}


class Progress:
    """Draws events as they come: live on a terminal, else a line per milestone. Use as a context manager."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console = console
        self._plan = plan
        self._layers = plan.layout.layers
        self._status = "starting the processes"
        self._requests: dict[int, dict[str, dict[int, str]]] = {}
        self._notes: dict[int, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # Without a thread: events are frequent enough, and a fork must not meet a drawing thread.
            self._live = Live(self._draw(), console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._update()
            self._live.stop()

    def say(self, status: str) -> None:
        """A milestone."""
        self._status = status
        if self._live is None:
            self._console.print(status)
        self._update()

    def on_event(self, side: str, event: Mapping[str, Any]) -> None:
        """An event of the ``prefill`` or ``decode`` process."""
        kind, number = event["event"], event.get("number")
        if number is None:
            return
        request = self._requests.setdefault(number, {"prefill": {}, "decode": {}})
        if kind == "matched":
            start = event["start"]
            self._notes[number] = f"{start:,} tokens matched in the pool" if start else "nothing matched"
            if start:
                self.say(f"request {number}: {start:,} of {self._plan.tokens:,} tokens matched in the pool")
        elif kind in ("ready", "applied", "consumed"):
            station = request[side]
            if kind != "applied" or event["layer"] not in station:
                station[event["layer"]] = kind
        elif kind == "done" and self._live is None:
            self._console.print(f"request {number}: {side} is done")
        self._update()

    def _update(self) -> None:
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def _draw(self) -> Group:
        lines: list[Text] = []
        for number, sides in self._requests.items():
            note = "" if self._plan.direct else f", {self._notes.get(number, 'looking it up')}"
            lines.append(Text(f"request {number}: {self._plan.tokens:,} tokens{note}", style="bold"))
            for side, station in sides.items():
                lines.append(self._bar(side, station))
        legend = Text("prefill ", style="dim")
        legend.append("█", "green").append(" computed   decode ", "dim").append("▒", "yellow")
        legend.append(" arrived, ", "dim").append("█", "blue").append(" consumed; one cell is one layer", "dim")
        return Group(*lines, legend, Text(self._status, style="italic"))

    def _bar(self, side: str, station: Mapping[int, str]) -> Text:
        bar = Text(f"  {side:<8}")
        for layer in self._layers:
            glyph, style = _CELLS[station.get(layer, "")]
            bar.append(glyph, style)
        if side == "prefill":
            return bar.append(f"  {len(station)}/{len(self._layers)} layers")
        consumed = sum(s == "consumed" for s in station.values())
        return bar.append(f"  {consumed}/{len(self._layers)} consumed, {len(station) - consumed} arrived")
