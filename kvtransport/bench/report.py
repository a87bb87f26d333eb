"""``kvbench report``: one HTML page from the JSON that other commands saved, pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError
from . import crowd, doctor, loopback, peers, pipeline, plots, send, sweep, wan

STYLE = """
:root { color-scheme: light dark; --ink: #1e293b; --paper: #fff; --faint: #64748b; --line: #e2e8f0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --paper: #0f172a; --faint: #94a3b8; --line: #334155; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
pre { overflow-x: auto; font: 12px/1.35 ui-monospace, monospace; } figure { margin: 1rem 0; background: #fff; padding: .5rem; border-radius: .5rem; }
figure svg { max-width: 100%; height: auto; } .from { color: var(--faint); font-size: .85rem; } details summary { cursor: pointer; color: var(--faint); }
"""
RENDERERS = {
    "loopback": loopback.render,
    "sweep": sweep.render,
    "pipeline": pipeline.render,
    "wan": wan.render,
    "crowd": crowd.render,
    "peers": peers.render,
    "send": send.render,
}
WITHOUT_TABLE = ("doctor",)


def load(path: Path) -> dict[str, Any]:
    """One saved JSON object. Raises ConfigError, naming the file, for anything that is not kvbench's."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("command") not in (*RENDERERS, *WITHOUT_TABLE):
        raise ConfigError(f"{path} was not written by kvbench --json: it has no 'command' that kvbench knows")
    return body


def page(bodies: Iterable[tuple[str, dict[str, Any]]], title: str) -> str:
    """The whole page; ``bodies`` are (where it came from, the object). Raises ConfigError when keys are missing."""
    sections = []
    for source, body in bodies:
        try:
            sections.append(_section(source, body))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{source} is not what this version of kvbench writes: {type(error).__name__} {error}"
            ) from error
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        + "".join(sections)
        + "</body></html>\n"
    )


def _section(source: str, body: dict[str, Any]) -> str:
    parts = [f"<h2>kvbench {html.escape(body['command'])}</h2><p class=from>{html.escape(source)}</p>"]
    drawn = plots.figure(body)
    if drawn is not None:
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", bbox_inches="tight")
        text = buffer.getvalue()
        parts.append(f"<figure>{text[text.index('<svg') :]}</figure>")
    parts.append(f"<pre>{html.escape(_table(body))}</pre>")
    raw = html.escape(json.dumps(body, indent=1))
    parts.append(f"<details><summary>JSON</summary><pre>{raw}</pre></details>")
    return f"<section>{''.join(parts)}</section>"


def _table(body: dict[str, Any]) -> str:
    """What the command printed for people."""
    out = Console(file=io.StringIO(), width=132, color_system=None, highlight=False)
    if body["command"] == "doctor":
        found = {
            g: [doctor.Finding(**{**f, "status": doctor.Status(f["status"])}) for f in fs]
            for g, fs in body["groups"].items()
        }
        given = {k: v for k, v in body["options"].items() if k != "window_bytes"}
        doctor.render(out, found, doctor.DoctorOptions(**given))
    else:
        RENDERERS[body["command"]](out, body)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def run(files: list[Path], target: Path, title: str, out: Console) -> dict[str, Any]:
    """Write the page; returns what ``--json`` writes."""
    plots.check(target.with_suffix(".svg"))
    bodies = [(path.name, load(path)) for path in files]
    text = page(bodies, title)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
    out.print(f"{target}: {len(files)} results, {len(text) / 1e3:,.0f} kB")
    return {"path": str(target), "bytes": len(text.encode()), "sections": [body["command"] for _, body in bodies]}
