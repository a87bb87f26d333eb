"""KV cache events as they travel: a msgpack batch of tagged records.

Written like vLLM 0.32 does (vllm/distributed/kv_events.py: the batch an array, the events maps with "type"). Read like that, and like
SGLang and earlier vLLM write them (events as arrays, in the same order of fields) or later vLLM (the batch a map).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvtransport.errors import ProtocolError

BlockHash = bytes | int
MEDIUM_CPU = "CPU"
LOCALITY_REMOTE = "REMOTE"
"""Held by another process than an engine."""
MAX_MESSAGE_BYTES = 64 << 20


class BlockStored(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Blocks that follow each other are there now; ``parent_block_hash`` (None: the root) is what the first of them follows.

    ``block_size`` in tokens; whoever knows no tokens leaves ``token_ids`` empty. ``kv_cache_spec_sliding_window`` in tokens.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """These blocks are gone from ``medium``."""

    block_hashes: list[BlockHash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Nothing is there any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """``ts`` in seconds since the epoch."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


_KINDS: dict[str, type[Event]] = {k.__name__: k for k in (BlockStored, BlockRemoved, AllBlocksCleared)}
_ABSENT: dict[str, Any] = {
    "parent_block_hash": None,
    "token_ids": [],
    "block_size": 0,
    "lora_id": None,
    "medium": None,
    "lora_name": None,
}
_encoder = msgspec.msgpack.Encoder()


def encode(ts: float, events: Sequence[Event], data_parallel_rank: int | None = None) -> bytes:
    return _encoder.encode(EventBatch(ts, list(events), data_parallel_rank))


def decode(data: bytes) -> EventBatch:
    """A batch in any of the forms; kinds of events that we do not know are left out. Raises ProtocolError."""
    try:
        body = msgspec.msgpack.decode(data)
        if isinstance(body, dict):
            body = [body["ts"], body["events"], body.get("data_parallel_rank")]
        ts, events, *rest = body
        known = [e for e in map(_event, events) if e is not None]
        return EventBatch(msgspec.convert(ts, float), known, msgspec.convert(rest[0], int | None) if rest else None)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ProtocolError(f"this is no batch of KV cache events: {error}") from error


def _event(body: Any) -> Event | None:
    name: Any = body.get("type") if isinstance(body, dict) else body[0]
    kind = _KINDS.get(name)
    if kind is None:
        return None
    if not isinstance(body, dict):
        body = dict(zip(kind.__struct_fields__, body[1:], strict=False))
    absent = {k: v for k, v in _ABSENT.items() if k in kind.__struct_fields__ and k not in body}
    return msgspec.convert({**body, **absent, "type": name}, kind)
