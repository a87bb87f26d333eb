"""Cache geometry: what one request's KVCache of a model consists of.

A :class:`CacheLayout` is pure data: groups of layers cached by one rule, each with the tensors every layer
of the group holds. Everything else (sizes, fingerprints, which bytes a token range is) is derived here, so
that the transport, the pool and the engine adapters cannot disagree.

Two layers of a group always have the same tensors. A layer index may appear in several groups (a Falcon-H1
layer has attention *and* a Mamba-2 mixer); on the wire its tensors are numbered through, group by group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgpack

from .errors import LayoutError, ParallelismError

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
"""Element sizes in bytes of the dtypes a cache may hold; names are torch's."""

MAX_LAYERS = 65_535
MAX_TENSORS_PER_LAYER = 64


class GroupKind(StrEnum):
    """The rule a group of layers is cached by."""

    FULL = "full"
    """Full attention: every token's KV is kept; any block-aligned prefix may be reused."""
    SLIDING = "sliding"
    """Sliding-window attention: only the window before the endpoint is needed."""
    RECURRENT = "recurrent"
    """Linear attention, SSM, convolution: one fixed-size state, valid at exactly one position."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One cached tensor of a layer.

    ``shape`` is the shape *per token* (full, sliding) or of the whole state (recurrent), before tensor
    parallelism. ``shard_axis`` is the axis of ``shape`` that tensor parallelism splits, or None when every
    rank holds the same bytes (MLA latents): those are sent and stored once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard_axis: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"tensor {self.name!r}: unknown dtype {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        if not self.shape or any(n <= 0 for n in self.shape):
            raise LayoutError(f"tensor {self.name!r}: shape {self.shape} must be non-empty and positive")
        if self.shard_axis is not None and not 0 <= self.shard_axis < len(self.shape):
            raise LayoutError(f"tensor {self.name!r}: shard axis {self.shard_axis} is not an axis of {self.shape}")

    @property
    def width(self) -> int:
        """Elements per token, or of the whole state."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes per token, or of the whole state."""
        return self.width * DTYPE_BYTES[self.dtype]

    def sharded(self, tp_size: int) -> TensorSpec:
        """This tensor as one of ``tp_size`` ranks holds it."""
        if self.shard_axis is None or tp_size == 1:
            return self
        size = self.shape[self.shard_axis]
        if size % tp_size:
            raise ParallelismError(
                f"tensor {self.name!r}: axis {self.shard_axis} of {self.shape} does not divide by "
                f"tensor parallelism {tp_size}"
            )
        shape = list(self.shape)
        shape[self.shard_axis] = size // tp_size
        return replace(self, shape=tuple(shape))


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers cached by one rule. ``window`` (tokens, the current one included) is set for sliding groups only.

    ``page_tokens``: KV of this group travels in whole pages of so many tokens, whatever the range. For engines whose
    page interior is not in token order (vLLM: head by head, or packed for a kernel).
    """

    name: str
    kind: GroupKind
    layers: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    window: int | None = None
    page_tokens: int = 1

    def __post_init__(self) -> None:
        if not self.layers or not self.tensors:
            raise LayoutError(f"group {self.name!r} needs at least one layer and one tensor")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0 or self.layers[-1] >= MAX_LAYERS:
            raise LayoutError(f"group {self.name!r}: layers must be ascending, unique and within 0..{MAX_LAYERS - 1}")
        if (self.window is not None) != (self.kind is GroupKind.SLIDING) or (
            self.window is not None and self.window < 2
        ):
            raise LayoutError(
                f"group {self.name!r}: a window of at least 2 tokens belongs to sliding groups, only there"
            )
        if self.page_tokens < 1 or (self.page_tokens > 1 and self.kind is GroupKind.RECURRENT):
            raise LayoutError(
                f"group {self.name!r}: pages of {self.page_tokens} tokens; at least 1, and states have no tokens"
            )

    @property
    def layer_bytes(self) -> int:
        """Bytes per token of one layer (full, sliding) or of one layer's state (recurrent)."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def unit_bytes(self) -> int:
        """Bytes per token, or per state, over all layers of the group."""
        return self.layer_bytes * len(self.layers)

    def tokens_needed(self, boundary: int) -> int:
        """Tokens of this group that must be there to continue at ``boundary``.

        The next token attends to itself and the ``window - 1`` tokens before it, so a sliding group needs
        ``window - 1`` of them. A recurrent group needs no token, only its state.
        """
        if self.kind is GroupKind.RECURRENT:
            return 0
        if self.window is None:
            return boundary
        return min(boundary, self.window - 1)

    def bytes_at(self, boundary: int) -> int:
        """Bytes of this group's cache at ``boundary`` tokens."""
        if self.kind is GroupKind.RECURRENT:
            return self.unit_bytes
        return self.unit_bytes * self.tokens_needed(boundary)


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One (layer, tensor) slot: ``tensor`` is its number on the wire."""

    layer: int
    tensor: int
    group: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Span:
    """``tokens`` tokens from ``first``; with ``tokens == 0`` the recurrent state at exactly ``first``."""

    first: int
    tokens: int

    @property
    def stop(self) -> int:
        return self.first + self.tokens


@dataclass(frozen=True, slots=True)
class Extent:
    """What a transfer holds of one (layer, tensor).

    The *byte space* of an extent is the concatenation of its spans, ``unit`` bytes a token (or a state);
    chunk offsets count in it.
    """

    layer: int
    tensor: int
    unit: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        spans = self.spans
        if len(spans) == 1:  # nearly all, and asked for often
            return self.unit * (spans[0].tokens or 1)
        return self.unit * sum(s.tokens or 1 for s in spans)

    def byte_range(self, first: int, tokens: int) -> tuple[int, int]:
        """Byte space interval of ``tokens`` tokens from ``first`` (``tokens == 0``: the state at ``first``).

        Raises LayoutError when the interval is not inside one span.
        """
        base = 0
        for span in self.spans:
            if tokens == 0:
                if span.tokens == 0 and span.first == first:
                    return base, base + self.unit
            elif span.tokens and span.first <= first and first + tokens <= span.stop:
                start = base + (first - span.first) * self.unit
                return start, start + tokens * self.unit
            base += self.unit * (span.tokens or 1)
        what = f"tokens {first}..{first + tokens}" if tokens else f"the state at {first}"
        raise LayoutError(
            f"layer {self.layer} tensor {self.tensor} of this transfer does not hold {what}: {self.spans}"
        )


@dataclass(frozen=True)
class CacheLayout:
    """A model's cache geometry, as one tensor-parallel rank holds it.

    ``groups`` describe the whole model; ``tp_size``/``tp_rank`` say which shard this side holds. The
    :meth:`fingerprint` covers everything but the rank, so that caches which cannot be exchanged never meet.
    """

    model: str
    groups: tuple[CacheGroup, ...]
    revision: str = ""
    tp_size: int = 1
    tp_rank: int = 0
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.groups:
            raise LayoutError(f"layout of {self.model!r} has no groups")
        names = [g.name for g in self.groups]
        if len(set(names)) != len(names):
            raise LayoutError(f"layout of {self.model!r}: group names must be unique, got {names}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ParallelismError(f"tensor parallel rank {self.tp_rank} is not below size {self.tp_size}")
        for slots in self.by_layer.values():
            if len(slots) > MAX_TENSORS_PER_LAYER:
                raise LayoutError(f"layer {slots[0].layer}: more than {MAX_TENSORS_PER_LAYER} tensors")

    # -- geometry ------------------------------------------------------------------------------

    @cached_property
    def by_layer(self) -> dict[int, tuple[LayerTensor, ...]]:
        """Layer index -> its tensors in wire order (group order, then tensor order), sharded to this rank."""
        found: dict[int, list[LayerTensor]] = {}
        for index, group in enumerate(self.groups):
            specs = [t.sharded(self.tp_size) for t in group.tensors]
            for layer in group.layers:
                slots = found.setdefault(layer, [])
                base = len(slots)
                slots.extend(LayerTensor(layer, base + i, index, spec) for i, spec in enumerate(specs))
        return {layer: tuple(found[layer]) for layer in sorted(found)}

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that cache anything, ascending."""
        return tuple(self.by_layer)

    def slots(self, group: int | None = None) -> Iterator[LayerTensor]:
        """All (layer, tensor) slots in layer order, or those of one group."""
        for slots in self.by_layer.values():
            for slot in slots:
                if group is None or slot.group == group:
                    yield slot

    def group_index(self, name: str) -> int:
        for index, group in enumerate(self.groups):
            if group.name == name:
                return index
        raise LayoutError(f"layout of {self.model!r} has no group {name!r}; it has {[g.name for g in self.groups]}")

    @property
    def is_hybrid(self) -> bool:
        return len({g.kind for g in self.groups}) > 1

    @property
    def has_states(self) -> bool:
        return any(g.kind is GroupKind.RECURRENT for g in self.groups)

    # -- sizes ---------------------------------------------------------------------------------

    def group_bytes(self, boundary: int) -> dict[str, int]:
        """Bytes by group name of a cache at ``boundary`` tokens, this rank's share."""
        out: dict[str, int] = {}
        for group in self.groups:
            specs = sum(t.sharded(self.tp_size).nbytes for t in group.tensors) * len(group.layers)
            out[group.name] = specs if group.kind is GroupKind.RECURRENT else specs * group.tokens_needed(boundary)
        return out

    def bytes_at(self, boundary: int) -> int:
        """S_kv(l): bytes of one request's cache at ``boundary`` tokens, this rank's share."""
        return sum(self.group_bytes(boundary).values())

    # -- transfers -----------------------------------------------------------------------------

    def extents(
        self,
        boundary: int,
        *,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        align: int = 1,
    ) -> tuple[Extent, ...]:
        """What a transfer of tokens ``[start, boundary)`` holds, in layer order.

        Full-attention tensors hold ``[start, boundary)``. Recurrent tensors hold their state at every position
        of ``checkpoints`` and at ``boundary``, ascending. Sliding tensors hold, for each of these
        positions p, the tokens of ``[p - (window - 1), p)`` from ``start`` on, the first one rounded down to
        ``align`` (the block size, when whole blocks are stored). Groups with ``page_tokens`` hold whole pages: both
        ends of their spans are rounded outwards.
        """
        if align < 1:
            raise LayoutError(f"spans are aligned to at least 1 token, got align={align}")
        if not 0 <= start < boundary:
            raise LayoutError(f"a transfer needs 0 <= start < boundary, got start {start}, boundary {boundary}")
        points = sorted({*checkpoints, boundary})
        if points[0] <= start or points[-1] != boundary:
            raise LayoutError(f"checkpoints must lie in ({start}, {boundary}], got {points}")
        spans_of: list[tuple[Span, ...]] = []
        for group in self.groups:
            if group.kind is GroupKind.RECURRENT:
                spans_of.append(tuple(Span(p, 0) for p in points))
            elif group.kind is GroupKind.FULL:
                first = start // group.page_tokens * group.page_tokens
                spans_of.append((Span(first, _page_end(group, boundary) - first),))
            else:
                spans_of.append(tuple(_windows(group, points, start, align)))
        return tuple(
            Extent(slot.layer, slot.tensor, slot.spec.nbytes, spans_of[slot.group])
            for slot in self.slots()
            if spans_of[slot.group]
        )

    # -- identity ------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """A plain, ordered description; what :meth:`fingerprint` hashes and :meth:`from_description` reads."""
        return {
            "model": self.model,
            "revision": self.revision,
            "tp_size": self.tp_size,
            "groups": [
                {
                    "name": g.name,
                    "kind": str(g.kind),
                    "layers": list(g.layers),
                    "window": g.window,
                    # Only where it says something: fingerprints of layouts without pages stay what they were.
                    **({"page_tokens": g.page_tokens} if g.page_tokens > 1 else {}),
                    "tensors": [
                        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "shard_axis": t.shard_axis}
                        for t in g.tensors
                    ],
                }
                for g in self.groups
            ],
        }

    @classmethod
    def from_description(cls, body: Mapping[str, Any], *, tp_rank: int = 0) -> CacheLayout:
        """Inverse of :meth:`describe`; raises LayoutError for anything malformed."""
        try:
            groups = tuple(
                CacheGroup(
                    name=str(g["name"]),
                    kind=GroupKind(g["kind"]),
                    layers=tuple(int(i) for i in g["layers"]),
                    window=None if g["window"] is None else int(g["window"]),
                    page_tokens=int(g.get("page_tokens", 1)),
                    tensors=tuple(
                        TensorSpec(
                            str(t["name"]),
                            str(t["dtype"]),
                            tuple(int(n) for n in t["shape"]),
                            None if t["shard_axis"] is None else int(t["shard_axis"]),
                        )
                        for t in g["tensors"]
                    ),
                )
                for g in body["groups"]
            )
            return cls(str(body["model"]), groups, str(body["revision"]), int(body["tp_size"]), tp_rank)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise LayoutError(f"not a layout description: {type(error).__name__} {error}") from error

    def fingerprint(self, block_tokens: int = 0) -> bytes:
        """SHA-256 (32 bytes) over model, revision, dtypes, layout, tensor parallelism and block size.

        ``block_tokens`` is 0 for transfers that store no blocks.
        """
        packed = msgpack.packb([self.describe(), block_tokens], use_bin_type=True)
        return hashlib.sha256(b"kvt1-layout" + packed).digest()


def _page_end(group: CacheGroup, token: int) -> int:
    """``token`` rounded up to whole pages."""
    return -(-token // group.page_tokens) * group.page_tokens


def _windows(group: CacheGroup, points: list[int], start: int, align: int) -> Iterator[Span]:
    """Disjoint, ascending spans covering the window before each point; windows that touch are joined."""
    lo = hi = -1
    for point in points:
        page = group.page_tokens
        first = max(start, (point - group.tokens_needed(point)) // align * align) // page * page
        if first <= hi and hi >= 0:
            hi = _page_end(group, point)
            continue
        if hi > lo >= 0:
            yield Span(lo, hi - lo)
        lo, hi = first, _page_end(group, point)
    if hi > lo >= 0:
        yield Span(lo, hi - lo)
