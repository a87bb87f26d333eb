"""What a transfer holds and in which order: the producer's promise, sealed at the end.

The consumer checks the manifest against *its own* layout before it grants a byte of memory, so that a peer
with another geometry is refused by name instead of filling the wrong places.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgpack

from .errors import Fault, FingerprintError, LayoutError, LimitError, ManifestError, ParallelismError
from .layout import MAX_LAYERS, MAX_TENSORS_PER_LAYER, CacheLayout, Extent, Span

MAX_MANIFEST_BYTES = 1 << 20
MAX_EXTENTS = 65_536
MAX_SPANS = 1_024
MAX_TOKENS = 1 << 40
MAX_TRANSFER_BYTES = 1 << 46
FLAT = bytes(32)
"""Fingerprint of transfers without a layout (flat objects)."""


def new_transfer_id() -> bytes:
    """16 random bytes; the consumer names the transfer."""
    return os.urandom(16)


@dataclass(frozen=True)
class Manifest:
    """One transfer: tokens ``[start, boundary)``, the extents in the order they will be handed over.

    ``checkpoints`` are the positions before the boundary at which recurrent states are included.
    ``meta`` is the application's (small values that msgpack carries); the transport does not read it.
    """

    transfer: bytes
    fingerprint: bytes
    boundary: int
    extents: tuple[Extent, ...]
    start: int = 0
    checkpoints: tuple[int, ...] = ()
    tp_size: int = 1
    tp_rank: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)

    # -- making --------------------------------------------------------------------------------

    @classmethod
    def of_layout(
        cls,
        layout: CacheLayout,
        boundary: int,
        *,
        transfer: bytes,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        block_tokens: int = 0,
        meta: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """The manifest of tokens ``[start, boundary)`` of ``layout``; see :meth:`CacheLayout.extents`."""
        points = tuple(sorted({*checkpoints} - {boundary}))
        return cls(
            transfer,
            layout.fingerprint(block_tokens),
            boundary,
            layout.extents(boundary, start=start, checkpoints=points, align=max(1, block_tokens)),
            start,
            points,
            layout.tp_size,
            layout.tp_rank,
            meta or {},
        )

    @classmethod
    def of_objects(cls, sizes: Iterable[int], *, transfer: bytes, meta: Mapping[str, Any] | None = None) -> Manifest:
        """A transfer of flat objects: object i of ``sizes[i]`` bytes is (layer i // 64, tensor i % 64)."""
        extents = tuple(
            Extent(i // MAX_TENSORS_PER_LAYER, i % MAX_TENSORS_PER_LAYER, int(n), (Span(0, 0),))
            for i, n in enumerate(sizes)
        )
        return cls(transfer, FLAT, 0, extents, meta=meta or {})

    # -- reading -------------------------------------------------------------------------------

    @cached_property
    def by_slot(self) -> dict[tuple[int, int], Extent]:
        return {(e.layer, e.tensor): e for e in self.extents}

    @cached_property
    def by_layer(self) -> dict[int, tuple[Extent, ...]]:
        found: dict[int, list[Extent]] = {}
        for extent in self.extents:
            found.setdefault(extent.layer, []).append(extent)
        return {layer: tuple(extents) for layer, extents in found.items()}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in the order they will be handed over."""
        return tuple(self.by_layer)

    @cached_property
    def total_bytes(self) -> int:
        return sum(e.nbytes for e in self.extents)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of :meth:`encode`, or of what it was decoded from; the seal repeats it."""
        return hashlib.sha256(self._encoded).digest()

    def extent(self, layer: int, tensor: int) -> Extent:
        try:
            return self.by_slot[layer, tensor]
        except KeyError:
            raise ManifestError(f"layer {layer} tensor {tensor} is not in the manifest of this transfer") from None

    # -- checking ------------------------------------------------------------------------------

    def check(self, layout: CacheLayout, *, block_tokens: int = 0) -> None:
        """Hold this manifest against the consumer's own layout.

        Raises FingerprintError (other model, dtype, geometry or block size), ParallelismError (other tensor
        parallelism) or ManifestError naming the first extent that contradicts the layout.
        """
        if self.tp_size != layout.tp_size:
            raise ParallelismError(
                f"the producer runs tensor parallelism {self.tp_size}, this side {layout.tp_size}; "
                "resharding is not supported yet: run both sides with the same tensor parallelism"
            )
        if self.tp_rank != layout.tp_rank:
            raise ParallelismError(
                f"the producer sends tensor parallel rank {self.tp_rank}, this is rank {layout.tp_rank}"
            )
        if self.fingerprint != layout.fingerprint(block_tokens):
            raise FingerprintError(
                f"fingerprint {self.fingerprint.hex()[:16]} is not this side's {layout.fingerprint(block_tokens).hex()[:16]} "
                f"for {layout.model!r} (blocks of {block_tokens} tokens): model, revision, dtypes, layout and "
                "block size must be the same on both sides"
            )
        try:
            extents = layout.extents(
                self.boundary, start=self.start, checkpoints=self.checkpoints, align=max(1, block_tokens)
            )
        except LayoutError as error:
            raise ManifestError(
                f"the manifest's token range is not one of {layout.model!r}: {error.message}"
            ) from error
        wanted = {(e.layer, e.tensor): e for e in extents}
        for extent in self.extents:
            expected = wanted.pop((extent.layer, extent.tensor), None)
            where = f"layer {extent.layer} tensor {extent.tensor}"
            if expected is None:
                raise ManifestError(f"{where} is not in the layout of {layout.model!r}")
            if extent.unit != expected.unit:
                raise ManifestError(f"{where}: {extent.unit} bytes a unit, the layout says {expected.unit}")
            if extent.spans != expected.spans:
                raise ManifestError(f"{where} holds {_show(extent.spans)}, the layout needs {_show(expected.spans)}")
        if wanted:
            layer, tensor = min(wanted)
            raise ManifestError(
                f"{len(wanted)} tensors of the layout are missing, the first is layer {layer} tensor {tensor}"
            )

    # -- travelling ----------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The msgpack form, made once; raises LimitError when it is over MAX_MANIFEST_BYTES."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        # Spans are shared by all layers of a group: they are written once and referred to by number.
        tables: dict[tuple[Span, ...], int] = {}
        rows = [[e.layer, e.tensor, e.unit, tables.setdefault(e.spans, len(tables))] for e in self.extents]
        body = {
            "transfer": self.transfer,
            "fingerprint": self.fingerprint,
            "boundary": self.boundary,
            "start": self.start,
            "checkpoints": list(self.checkpoints),
            "tp": [self.tp_size, self.tp_rank],
            "spans": [[[s.first, s.tokens] for s in spans] for spans in tables],
            "extents": rows,
            "meta": dict(self.meta),
        }
        try:
            packed: bytes = msgpack.packb(body, use_bin_type=True)
        except (TypeError, ValueError, OverflowError) as error:
            raise ManifestError(f"meta holds what msgpack cannot carry: {error}", fault=Fault.LOCAL) from error
        if len(packed) > MAX_MANIFEST_BYTES:
            raise LimitError(f"a manifest of {len(packed)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Inverse of :meth:`encode` for bytes from the wire; raises ManifestError or LimitError."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise LimitError(f"a manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
        try:
            body = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
            transfer, fingerprint = body["transfer"], body["fingerprint"]
            tables = [
                tuple(Span(_int(f, MAX_TOKENS), _int(n, MAX_TOKENS)) for f, n in spans) for spans in body["spans"]
            ]
            tp_size, tp_rank = (_int(n, 1 << 16) for n in body["tp"])
            rows = body["extents"]
            if not isinstance(transfer, bytes) or len(transfer) != 16:
                raise ManifestError("transfer must be 16 bytes")
            if not isinstance(fingerprint, bytes) or len(fingerprint) != 32:
                raise ManifestError("fingerprint must be 32 bytes")
            if len(rows) > MAX_EXTENTS or len(tables) > MAX_SPANS or any(not 0 < len(t) <= MAX_SPANS for t in tables):
                raise LimitError(f"a manifest of {len(rows)} extents, {len(tables)} span tables is over the limits")
            for spans in tables:
                if any(b.first < a.stop or (b.first == a.first) for a, b in itertools.pairwise(spans)):
                    raise ManifestError(f"spans {spans} are not ascending and disjoint")
            extents = tuple(_extent(tables, *row) for row in rows)
            meta = body["meta"]
            if not isinstance(meta, dict):
                raise ManifestError("meta must be a map")
            manifest = cls(
                transfer,
                fingerprint,
                _int(body["boundary"], MAX_TOKENS),
                extents,
                _int(body["start"], MAX_TOKENS),
                tuple(_int(p, MAX_TOKENS) for p in body["checkpoints"]),
                tp_size,
                tp_rank,
                meta,
            )
        except (ManifestError, LimitError):
            raise
        except (KeyError, TypeError, ValueError, IndexError, RecursionError, msgpack.UnpackException) as error:
            raise ManifestError(f"not a manifest: {type(error).__name__} {error}") from error
        if len(manifest.by_slot) != len(extents):
            raise ManifestError("a (layer, tensor) appears twice")
        if manifest.total_bytes > MAX_TRANSFER_BYTES:
            raise LimitError(f"a transfer of {manifest.total_bytes} bytes is over the limit of {MAX_TRANSFER_BYTES}")
        manifest.__dict__["_encoded"] = bytes(data)
        return manifest


def _show(spans: tuple[Span, ...]) -> str:
    return (
        ", ".join(f"tokens {s.first}..{s.stop}" if s.tokens else f"the state at {s.first}" for s in spans) or "nothing"
    )


def _extent(tables: list[tuple[Span, ...]], layer: object, tensor: object, unit: object, table: object) -> Extent:
    if (
        type(layer) is int
        and 0 <= layer < MAX_LAYERS
        and type(tensor) is int
        and 0 <= tensor < MAX_TENSORS_PER_LAYER
        and type(unit) is int
        and 0 <= unit <= 1 << 40
        and type(table) is int
        and 0 <= table <= MAX_SPANS
    ):
        return Extent(layer, tensor, unit, tables[table])
    for value, most in ((layer, MAX_LAYERS - 1), (tensor, MAX_TENSORS_PER_LAYER - 1), (unit, 1 << 40), (table, MAX_SPANS)):
        _int(value, most)  # the first that is wrong is named
    raise AssertionError("one of them is wrong")


def _int(value: object, maximum: int) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise ManifestError(f"expected an integer in 0..{maximum}, got {value!r}")
    return value
