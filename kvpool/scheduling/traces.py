"""Request traces with prefix structure: arrival times, lengths, and one id per block of the prompt.

Two formats of JSON lines, told apart by their fields, with ``input_length``, ``output_length`` (tokens) and ``hash_ids``:

* Mooncake's (kvcache-ai/Mooncake, FAST25 release): ``timestamp`` in ms, blocks of 512 tokens, equal ids being equal prefixes,
* Qwen-Bailian's (alibaba-edu/qwen-bailian-usagetraces-anon), known by its ``chat_id``: ``timestamp`` in s, blocks of 16 tokens, equal
  ids being equal *contents* of a block: they are numbered anew by prefix here.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import tomllib
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from kvtransport.errors import ConfigError

from .profiles import Floats

BLOCK_TOKENS = 512
"""Tokens of one ``hash_ids`` entry in Mooncake's traces."""
BAILIAN_BLOCK_TOKENS = 16
"""The same in Qwen-Bailian's."""
MAX_ID = 1 << 48
"""Ids are below this: what is cut into finer blocks numbers them in 64 bits."""

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
    return sorted(p.name.removesuffix(".toml") for p in PACKAGED.iterdir() if p.name.endswith(".toml"))


def load_trace(name: str, *, relative_to: Path | None = None, block_tokens: int | None = None) -> Trace:
    """A trace by packaged name or path (``.jsonl``, also ``.gz`` or ``.xz``). Raises ConfigError naming the line at fault."""
    path = (relative_to or Path()) / name
    first: int | None = None
    try:
        if name in packaged_traces():
            about = tomllib.loads((PACKAGED / f"{name}.toml").read_text(encoding="utf-8"))
            data, first = (PACKAGED / about["file"]).read_bytes(), about.get("first")
        else:
            data = path.read_bytes()
        text = _unpacked(data).decode()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        known = ", ".join(packaged_traces())
        raise ConfigError(f"no trace {name!r}: not packaged ({known}), and {path} is not readable ({error})") from error
    lines = text.splitlines()
    return parse_trace("\n".join(lines[:first]), where=name, block_tokens=block_tokens)


def _unpacked(data: bytes) -> bytes:
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    return lzma.decompress(data) if data[:6] == b"\xfd7zXZ\x00" else data


def parse_trace(text: str, *, where: str, block_tokens: int | None = None) -> Trace:
    """Read JSON lines of either format; requests are sorted by time.

    ``block_tokens`` (tokens of one id) is the format's by default: BLOCK_TOKENS, or BAILIAN_BLOCK_TOKENS.
    """
    rows: list[tuple[float, float, float, tuple[int, ...]]] = []
    prefixes: dict[tuple[int, int], int] = {}
    size = block_tokens or BLOCK_TOKENS
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tokens, output = float(row["input_length"]), float(row["output_length"])
            ids, unit = tuple(int(h) for h in row["hash_ids"]), 1e3
            if "chat_id" in row:
                ids, unit, size = _of_prefixes(ids, prefixes), 1.0, block_tokens or BAILIAN_BLOCK_TOKENS
            at = float(row["timestamp"]) / unit
            if not all(map(math.isfinite, (at, tokens, output))):
                raise ValueError("a number is infinite, or none")
            if ids and not 0 <= min(ids) <= max(ids) < MAX_ID:
                raise ValueError(f"hash_ids are numbers from 0 up to {MAX_ID - 1}")
            rows.append((at, tokens, output, ids))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"trace {where}, line {number}: expected timestamp, input_length, output_length and hash_ids "
                f"({type(error).__name__}: {error})"
            ) from error
        if tokens <= 0 or output < 0 or len(ids) * size < tokens - size:
            raise ConfigError(
                f"trace {where}, line {number}: {tokens:g} input and {output:g} output tokens with "
                f"{len(ids)} blocks of {size} do not fit together"
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
        size,
    )


def _of_prefixes(contents: Sequence[int], known: dict[tuple[int, int], int]) -> tuple[int, ...]:
    """Ids of whole prefixes from ids of blocks' contents, which say nothing of what stands before them."""
    at, ids = -1, []
    for content in contents:
        at = known.setdefault((at, content), len(known))
        ids.append(at)
    return tuple(ids)


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
