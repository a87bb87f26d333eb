"""Caches whose bytes are a function of the tokens before them: what comes out of a pool can be checked without remembering it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from kvpool.arena import PageArena
from kvpool.core import PoolCore
from kvpool.keys import KeyChain, Namespace
from kvpool.put import Put
from kvtransport.buffers import Arena, PageList
from kvtransport.layout import CacheGroup, CacheLayout, Extent, GroupKind, TensorSpec

STEP = 16

FULL = CacheGroup("full", GroupKind.FULL, (0, 3), (TensorSpec("k", "bfloat16", (3,)), TensorSpec("v", "float32", (2,))))
INDEXER = CacheGroup("indexer", GroupKind.FULL, (3,), (TensorSpec("idx", "int8", (3,)),))
WINDOW = CacheGroup("window", GroupKind.SLIDING, (1,), (TensorSpec("k", "bfloat16", (5,)),), window=40)
NARROW = CacheGroup("narrow", GroupKind.SLIDING, (4,), (TensorSpec("k", "int8", (7,)),), window=9)
LINEAR = CacheGroup(
    "linear", GroupKind.RECURRENT, (0, 2), (TensorSpec("s", "float32", (7, 3)), TensorSpec("c", "bfloat16", (9,)))
)
MAMBA = CacheGroup("mamba", GroupKind.RECURRENT, (5,), (TensorSpec("s", "float32", (11,)),))

LAYOUTS = {
    "hybrid": CacheLayout("hybrid", (LINEAR, FULL, WINDOW)),
    "everything": CacheLayout("everything", (FULL, INDEXER, WINDOW, NARROW, LINEAR, MAMBA)),
    "dense": CacheLayout("dense", (FULL,)),
    "windows": CacheLayout("windows", (WINDOW, NARROW)),
    "recurrent": CacheLayout("recurrent", (LINEAR, MAMBA)),
    "full+window": CacheLayout("full+window", (FULL, NARROW)),
}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_core(pages: int = 4096, page_bytes: int = 256, **options) -> PoolCore:
    options.setdefault("clock", Clock())
    return PoolCore(PageArena(Arena(pages * page_bytes, lock="off", cuda="off", huge="off"), page_bytes), **options)


@lru_cache(maxsize=512)
def _digests(tokens: tuple[int, ...]) -> tuple[bytes, ...]:
    out = [b"start"]
    for token in tokens:
        out.append(hashlib.sha256(out[-1] + token.to_bytes(4, "little")).digest())
    return tuple(out)


@lru_cache(maxsize=65_536)
def _unit(layer: int, tensor: int, digest: bytes, state: bool, nbytes: int) -> bytes:
    return hashlib.shake_128(b"%d/%d/%d/" % (layer, tensor, state) + digest).digest(nbytes)


def content(extent: Extent, tokens: Sequence[int]) -> bytes:
    """The bytes of ``extent`` of these tokens: each token's depend on all tokens up to it."""
    digests = _digests(tuple(tokens))
    out = []
    for span in extent.spans:
        if span.tokens == 0:
            out.append(_unit(extent.layer, extent.tensor, digests[span.first], True, extent.unit))
        for at in range(span.first, span.stop):
            out.append(_unit(extent.layer, extent.tensor, digests[at + 1], False, extent.unit))
    return b"".join(out)


def fill(put: Put, tokens: Sequence[int], slots: Iterable[tuple[int, int]] | None = None) -> None:
    """Write the right bytes into (some of) the destinations of a put and say so."""
    for slot in put.extents if slots is None else slots:
        extent = put.extents[slot]
        put.destinations[slot].copy_from(PageList.of(content(extent, tokens)))
        put.progress(*slot, 0, extent.nbytes)


def store(
    core: PoolCore, ns: Namespace, tokens: Sequence[int], boundary: int | None = None, *, start: int = 0, checkpoints=()
) -> None:
    """One committed put of ``tokens``."""
    boundary = len(tokens) if boundary is None else boundary
    put = core.begin_put(
        ns, KeyChain(ns, tokens), boundary=boundary, start=start, checkpoints=checkpoints, deadline=core.clock() + 60
    )
    fill(put, tokens)
    put.commit()


def check_get(core: PoolCore, ns: Namespace, tokens: Sequence[int], boundary: int, *, start: int = 0) -> None:
    """A get of ``boundary`` tokens gives the right bytes."""
    get = core.plan_get(ns, KeyChain(ns, tokens), boundary=boundary, start=start, deadline=core.clock() + 60)
    try:
        check_sources(get.sources, get.extents.values(), tokens)
    finally:
        get.close()


def check_sources(sources, extents: Iterable[Extent], tokens: Sequence[int]) -> None:
    for extent in extents:
        got = sources[extent.layer, extent.tensor].tobytes()
        assert got == content(extent, tokens), f"layer {extent.layer} tensor {extent.tensor}"


def scribble(core: PoolCore) -> None:
    """Write over all memory that is free: whoever still reads it will notice."""
    put = core.begin_put_flat("scribble", {b"junk": core.arena.free_bytes}, deadline=core.clock() + 1)
    for pages in put.destinations.values():
        pages.copy_from(PageList.of(b"\xa5" * pages.nbytes))
    put.abort()


def check_idle(core: PoolCore) -> None:
    """Nothing is open; after clearing no byte is in use and no node is left."""
    stat = core.stat()
    assert (stat["active"], stat["leases"], stat["requests"]) == (0, 0, 0)
    assert stat["evictable_bytes"] == stat["used_bytes"]
    core.clear()
    stat = core.stat()
    assert stat["used_bytes"] == stat["evictable_bytes"] == 0
    assert stat["free_bytes"] == stat["total_bytes"]
    assert not any(stat["class_bytes"].values())
    assert not any(stat["group_bytes"].values())
    assert not any(stat["entries"].values())
    assert (core.arena.page_generation == 0).all()
