"""``kvpool events``: look at what an engine or a pool publishes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from .messages import AllBlocksCleared, BlockStored, EventBatch
from .subscriber import EventSubscriber

HELP = """Follow the KV cache events of a kvpoold, vLLM or SGLang, until Ctrl-C.

Examples:

  kvpool events tcp://127.0.0.1:5557 --replay tcp://127.0.0.1:5558

  kvpool events tcp://engine:5557 --json
"""


def _text(key: bytes | int | None) -> str | int | None:
    return key.hex() if isinstance(key, bytes) else key


def lines(batch: EventBatch) -> list[dict[str, Any]]:
    """What ``--json`` prints of a batch, one object an event; hashes in hexadecimal."""
    out = []
    for event in batch.events:
        line: dict[str, Any] = {"ts": batch.ts, "event": type(event).__name__}
        if not isinstance(event, AllBlocksCleared):
            line |= {"group": event.group_idx, "medium": event.medium, "blocks": [_text(h) for h in event.block_hashes]}
        if isinstance(event, BlockStored):
            line |= {"parent": _text(event.parent_block_hash), "block_size": event.block_size}
        out.append(line)
    return out


def events(
    endpoint: Annotated[str, typer.Argument(help="ZeroMQ address of the publisher, such as tcp://127.0.0.1:5557")],
    replay: Annotated[str, typer.Option(help="Where to ask for what was missed \\[nowhere]")] = "",
    topic: Annotated[str, typer.Option(help="Only messages whose topic begins so")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an event, on standard output")] = False,
    seconds: Annotated[float | None, typer.Option(help="End after so long \\[never]", min=0.1)] = None,
) -> None:
    console = Console()

    def apply(batch: EventBatch) -> None:
        for line in lines(batch):
            if as_json:
                print(json.dumps(line), flush=True)
                continue
            keys = line.get("blocks", [])
            when = time.strftime("%H:%M:%S", time.localtime(batch.ts))
            shown = ", ".join(str(k)[:12] for k in keys[:3]) + (" ..." if len(keys) > 3 else "")
            console.print(
                f"{when} {line['event']:<16} group {line.get('group') or 0}: {len(keys):,} blocks {shown}",
                highlight=False,
            )

    def reset() -> None:
        if as_json:
            print(json.dumps({"event": "reset"}), flush=True)
        else:
            console.print("[yellow]events were lost: what came before is void[/]")

    async def work() -> None:
        async with EventSubscriber(endpoint, replay, apply=apply, reset=reset, topic=topic):
            await asyncio.sleep(1e9 if seconds is None else seconds)

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def register(app: typer.Typer) -> None:
    """Add ``events`` to ``app``."""
    app.command("events", help=HELP)(events)
