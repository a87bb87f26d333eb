"""Request traces with prefix structure: arrival times, lengths, and one id per block of the prompt.

The format is Mooncake's (kvcache-ai/Mooncake, FAST25 release): JSON lines with ``timestamp`` (ms),
``input_length``, ``output_length`` (tokens) and ``hash_ids``, equal ids being equal prefixes.
"""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from kvtransport.errors import ConfigError

from .profiles import Floats

BLOCK_TOKENS = 512
"""Tokens of one ``hash_ids`` entry in the public traces."""

PACKAGED = resources.files(__package__) / "data" / "traces"


@dataclass(frozen=True, slots=True)
class Trace:
    """``arrivals`` in seconds from the first request, ascending; the rest by request, in the same order."""

    arrivals: Floats
    input_tokens: Floats
    output_tokens: Floats
    blocks: tuple[tuple[int, ...], ...]
    block_tokens: int = BLOCK_TOKENS

    def __len__(self) -> int:
        return len(self.arrivals)


def packaged_traces() -> list[str]:
    return sorted(p.name.removesuffix(".jsonl.gz") for p in PACKAGED.iterdir() if p.name.endswith(".jsonl.gz"))


def load_trace(name: str, *, relative_to: Path | None = None, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """A trace by packaged name or path (``.jsonl`` or ``.jsonl.gz``). Raises ConfigError naming the line at fault."""
    path = (relative_to or Path()) / name
    try:
        data = (PACKAGED / f"{name}.jsonl.gz").read_bytes() if name in packaged_traces() else path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        known = ", ".join(packaged_traces())
        raise ConfigError(f"no trace {name!r}: not packaged ({known}), and {path} is not readable ({error})") from error
    return parse_trace(text, where=name, block_tokens=block_tokens)


def parse_trace(text: str, *, where: str, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Read JSON lines; requests are sorted by time."""
    rows: list[tuple[float, float, float, tuple[int, ...]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tokens, output = float(row["input_length"]), float(row["output_length"])
            rows.append((float(row["timestamp"]) / 1e3, tokens, output, tuple(int(h) for h in row["hash_ids"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"trace {where}, line {number}: expected timestamp, input_length, output_length and hash_ids "
                f"({type(error).__name__}: {error})"
            ) from error
        if tokens <= 0 or output < 0 or len(rows[-1][3]) * block_tokens < tokens - block_tokens:
            raise ConfigError(
                f"trace {where}, line {number}: {tokens:g} input and {output:g} output tokens with "
                f"{len(rows[-1][3])} blocks of {block_tokens} do not fit together"
            )
    if not rows:
        raise ConfigError(f"trace {where}: no requests")
    rows.sort(key=lambda r: r[0])
    start = rows[0][0]
    return Trace(
        np.array([r[0] - start for r in rows]),
        np.array([r[1] for r in rows]),
        np.maximum(np.array([r[2] for r in rows]), 1.0),
        tuple(r[3] for r in rows),
        block_tokens,
    )


class BlockCache:
    """A cluster's prefix cache at block granularity: least recently used goes first, bounded in blocks.

    A match is a run of present blocks from the first one on, never the whole prompt (an engine has to
    compute its last token).
    """

    __slots__ = ("_blocks", "block_tokens", "capacity")

    def __init__(self, capacity: int, block_tokens: int) -> None:
        if capacity < 0:
            raise ConfigError(f"a prefix cache cannot hold {capacity} blocks")
        self.capacity = capacity
        self.block_tokens = block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, blocks: Sequence[int], tokens: float) -> float:
        """Tokens of the longest cached prefix, below ``tokens``."""
        held = self._blocks
        count = 0
        for block in blocks:
            if block not in held:
                break
            count += 1
        size = self.block_tokens
        return float(min(count, max(int((tokens - 1) // size), 0)) * size)

    def insert(self, blocks: Sequence[int]) -> None:
        """Store a prompt's blocks; the first ones count as used last, so that a prefix outlives its branches."""
        held = self._blocks
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > self.capacity:
            held.popitem(last=False)


def uncached_lengths(trace: Trace, cache_blocks: int) -> Floats:
    """The uncached input tokens of every request behind one prefix cache of ``cache_blocks`` (0: no cache)."""
    if cache_blocks == 0:
        return trace.input_tokens
    cache = BlockCache(cache_blocks, trace.block_tokens)
    out = np.empty(len(trace))
    for i, blocks in enumerate(trace.blocks):
        tokens = float(trace.input_tokens[i])
        out[i] = tokens - cache.match(blocks, tokens)
        cache.insert(blocks)
    return out
