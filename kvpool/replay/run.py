"""One replay: a trace's requests one after another through a pool without payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core import PoolCore
from kvpool.errors import PoolFullError
from kvpool.eviction.flops import FlopsModel
from kvpool.keys import KeyChain, Namespace
from kvpool.scheduling.traces import Trace
from kvtransport.errors import ConfigError
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind

from .accounting import AccountingArena, page_bytes_for

TENANT = "replay"
SAMPLES = 200
"""Points of the timeline."""
DEADLINE_S = 1e9

Progress = Callable[[float], None]
"""Called with the share of requests that are done."""


@dataclass(slots=True)
class Counts:
    """Sums over requests; blocks are the trace's, a last partial one included, tokens the real ones."""

    requests: int = 0
    hits: int = 0
    blocks: int = 0
    hit_blocks: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    flops: float = 0.0
    flops_saved: float = 0.0
    refused: int = 0
    """Puts that found no room, because everything else was smaller than they are."""
    states: int = 0
    """Checkpoints put."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "requests_hit": self.hits,
            "block_hit_rate": self.hit_blocks / max(1, self.blocks),
            "token_hit_rate": self.hit_tokens / max(1, self.tokens),
            "flops_saved": self.flops_saved,
            "flops_saved_rate": self.flops_saved / max(1.0, self.flops),
            "input_tokens": self.tokens,
            "hit_tokens": self.hit_tokens,
            "checkpoints_put": self.states,
            "refused_puts": self.refused,
        }


@dataclass(slots=True)
class Sample:
    """The pool after a request: seconds of the trace, bytes by group, hits since the sample before."""

    at: float
    group_bytes: dict[str, int]
    token_hit_rate: float


@dataclass(slots=True)
class Outcome:
    """What a replay gave. ``counts`` are of the requests from ``first`` on."""

    policy: str
    layout: str
    memory_bytes: int | None
    block_tokens: int
    first: int
    counts: Counts
    peak_bytes: dict[str, int]
    evictions: int
    learnt: dict[str, Any]
    timeline: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "layout": self.layout,
            "memory_bytes": self.memory_bytes,
            "block_tokens": self.block_tokens,
            "first_request": self.first,
            **self.counts.as_dict(),
            "peak_bytes": self.peak_bytes,
            "evictions": self.evictions,
            "policy_state": self.learnt,
        }


def folded(layout: CacheLayout) -> CacheLayout:
    """The same sizes by group in one layer and tensor each: what costs time per layer is bytes, and there are none."""
    groups = []
    for index, group in enumerate(layout.groups):
        spec = group.tensors[0]
        nbytes = sum(slot.spec.nbytes for slot in layout.slots(index))
        tensor = type(spec)(spec.name, "uint8", (nbytes,))
        groups.append(CacheGroup(group.name, group.kind, (index,), (tensor,), group.window))
    return CacheLayout(layout.model, tuple(groups))


class Replay:
    """A pool of ``memory_bytes`` (None: unlimited) for ``layout``, and one trace's requests through it.

    A request asks for the longest restorable prefix, uses it, and stores the rest with the checkpoints that
    :meth:`kvpool.core.PoolCore.checkpoint_hints` names. Blocks are ``block_tokens`` long (a divisor of the trace's; default: the trace's). A trace's last,
    partial block is stored as a whole one where all groups are full attention; where states or windows must be exact it
    is not stored, and the last checkpoint is at the last full block: hashes have no keys inside blocks. Raises ConfigError.
    """

    def __init__(
        self,
        trace: Trace,
        layout: CacheLayout,
        *,
        memory_bytes: int | None,
        policy: str,
        block_tokens: int | None = None,
    ) -> None:
        size = block_tokens or trace.block_tokens
        if trace.block_tokens % size:
            raise ConfigError(
                f"blocks of {size} tokens do not divide the trace's of {trace.block_tokens}: choose another size"
            )
        self._trace, self._size = trace, size
        self._name = layout.model
        self._time = 0.0
        slim = folded(layout)
        sizes = [g.unit_bytes for g in slim.groups if g.kind is not GroupKind.RECURRENT]
        page_bytes = page_bytes_for(min(sizes) * size) if sizes else 65_536
        self.core = PoolCore(AccountingArena(memory_bytes, page_bytes), clock=lambda: self._time, policy=policy)
        self._memory = memory_bytes
        self.flops = FlopsModel(layout)
        self.ns: Namespace = self.core.open_namespace(TENANT, slim, size)
        self.core.use_flops(self.ns, self.flops)
        self._exact = any(g.kind is not GroupKind.FULL for g in layout.groups)
        self._subs = trace.block_tokens // size

    def run(self, first: int = 0, progress: Progress | None = None) -> Outcome:
        """Replay everything; count from request ``first`` on."""
        trace, counts = self._trace, Counts()
        peaks: dict[str, int] = {}
        timeline: list[Sample] = []
        every = max(1, len(trace) // SAMPLES)
        seen = (0, 0)
        for index, (chain, tokens) in enumerate(self._chains()):
            if index == first:
                counts = Counts()
                seen = (0, 0)
            self._time = float(trace.arrivals[index])
            self._request(chain, tokens, counts)
            if index % every == every - 1 or index + 1 == len(trace):
                held = self._group_bytes()
                for name, nbytes in held.items():
                    peaks[name] = max(peaks.get(name, 0), nbytes)
                asked = counts.tokens - seen[1]
                timeline.append(Sample(self._time, held, (counts.hit_tokens - seen[0]) / max(1, asked)))
                seen = (counts.hit_tokens, counts.tokens)
                if progress is not None:
                    progress((index + 1) / len(trace))
        policy = self.core.policy
        return Outcome(
            policy.name,
            self._name,
            self._memory,
            self._size,
            first,
            counts,
            peaks,
            sum(self.core.memory.evictions.values()),
            policy.describe(),
            timeline,
        )

    def _request(self, chain: KeyChain, tokens: int, counts: Counts) -> None:
        core, ns = self.core, self.ns
        found = core.match(ns, chain)
        hit = min(found.length, tokens)
        flops = self.flops.upto(np.array([hit, tokens]))
        counts.requests += 1
        counts.hits += bool(hit)
        counts.blocks += -(-tokens // self._size)
        counts.hit_blocks += found.length // self._size
        counts.tokens += tokens
        counts.hit_tokens += hit
        counts.flops_saved += float(flops[0])
        counts.flops += float(flops[1])
        if found.length:
            core.release(core.lease(ns, chain, found.length, DEADLINE_S).id)
        hints = core.checkpoint_hints(ns, chain)
        boundary = hints.last if self._exact else chain.tokens // self._size * self._size
        if not boundary or boundary <= hints.start:
            return
        try:
            put = core.begin_put(
                ns,
                chain,
                boundary=boundary,
                start=hints.start,
                checkpoints=hints.lengths,
                deadline=self._time + DEADLINE_S,
            )
        except PoolFullError:
            counts.refused += 1
            return
        counts.states += len(hints.lengths)
        put.complete_without_bytes()
        put.commit()

    def _group_bytes(self) -> dict[str, int]:
        body: dict[str, int] = self.core.stat()["group_bytes"]
        return {name.rpartition("/")[2]: nbytes for name, nbytes in body.items() if name != "flat"}

    def _chains(self) -> Iterator[tuple[KeyChain, int]]:
        """(chain, real tokens) of each request; a token beyond the end, since a match never covers the last one."""
        for ids, length in zip(self._trace.blocks, self._trace.input_tokens.tolist(), strict=True):
            tokens = int(length)
            count = tokens // self._size if self._exact else -(-tokens // self._size)
            keys = [i.to_bytes(8, "little") for i in self._block_ids(ids, count)]
            yield KeyChain.of_hashes(self.ns, keys, count * self._size + 1), tokens

    def _block_ids(self, ids: tuple[int, ...], count: int) -> list[int]:
        if self._subs == 1:
            return list(ids[:count])
        fine: NDArray[np.int64] = np.asarray(ids, dtype=np.int64)[:, None] * self._subs + np.arange(self._subs)
        out: list[int] = fine.reshape(-1)[:count].tolist()
        return out


def working_set_bytes(
    trace: Trace, layout: CacheLayout, block_tokens: int | None = None, progress: Progress | None = None
) -> int:
    """Bytes that a replay under unlimited memory ends up with: what there is to be cached."""
    replay = Replay(trace, layout, memory_bytes=None, policy="lru", block_tokens=block_tokens)
    outcome = replay.run(len(trace) - 1, progress)
    return sum(outcome.timeline[-1].group_bytes.values())
