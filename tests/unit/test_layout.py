"""Cache layouts and manifests: which bytes a transfer holds, and every way in which two sides can disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.errors import FingerprintError, KVError, LayoutError, LimitError, ManifestError, ParallelismError
from kvtransport.layout import CacheGroup, CacheLayout, Extent, GroupKind, Span, TensorSpec
from kvtransport.manifest import (
    FLAT,
    MAX_EXTENTS,
    MAX_MANIFEST_BYTES,
    MAX_SPANS,
    Manifest,
    new_transfer_id,
)

TRANSFER = bytes(range(16))
FULL = CacheGroup(
    "full", GroupKind.FULL, (1, 3), (TensorSpec("k", "bfloat16", (4, 8), 0), TensorSpec("v", "bfloat16", (4, 6), 0))
)
LATENT = CacheGroup("latent", GroupKind.FULL, (2,), (TensorSpec("kv_c", "bfloat16", (32,)),))
SLIDING = CacheGroup("sliding", GroupKind.SLIDING, (0,), (TensorSpec("k", "bfloat16", (4, 2), 0),), window=10)
STATE = CacheGroup("state", GroupKind.RECURRENT, (0, 3), (TensorSpec("s", "float32", (4, 16), 0),))
LAYOUT = CacheLayout("toy", (FULL, LATENT, SLIDING, STATE), revision="r1")


# -- specs and groups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TensorSpec("k", "bf16", (1,)), "unknown dtype 'bf16'; known: float64"),
        (lambda: TensorSpec("k", "float32", ()), "non-empty and positive"),
        (lambda: TensorSpec("k", "float32", (4, 0)), "non-empty and positive"),
        (lambda: TensorSpec("k", "float32", (4,), 1), "shard axis 1 is not an axis"),
        (lambda: replace(FULL, layers=()), "at least one layer"),
        (lambda: replace(FULL, tensors=()), "at least one layer"),
        (lambda: replace(FULL, layers=(3, 1)), "ascending, unique"),
        (lambda: replace(FULL, layers=(1, 1)), "ascending, unique"),
        (lambda: replace(FULL, layers=(-1, 1)), "within 0"),
        (lambda: replace(FULL, layers=(65_535,)), "within 0..65534"),
        (lambda: replace(FULL, window=8), "belongs to sliding groups"),
        (lambda: replace(SLIDING, window=None), "belongs to sliding groups"),
        (lambda: replace(SLIDING, window=1), "at least 2 tokens"),
        (lambda: CacheLayout("m", ()), "has no groups"),
        (lambda: CacheLayout("m", (FULL, FULL)), "unique"),
        (
            lambda: CacheLayout(
                "m", (replace(FULL, tensors=tuple(TensorSpec(f"t{i}", "int8", (1,)) for i in range(65))),)
            ),
            "layer 1: more than 64 tensors",
        ),
    ],
)
def test_malformed_geometry_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        make()


def test_layer_in_two_groups_numbers_its_tensors_through() -> None:
    slots = LAYOUT.by_layer[3]
    assert [(s.tensor, s.spec.name, s.group) for s in slots] == [(0, "k", 0), (1, "v", 0), (2, "s", 3)]
    assert LAYOUT.layers == (0, 1, 2, 3)
    assert [(s.layer, s.tensor) for s in LAYOUT.slots(group=3)] == [(0, 1), (3, 2)]
    assert LAYOUT.group_index("state") == 3
    assert LAYOUT.is_hybrid
    assert LAYOUT.has_states
    with pytest.raises(LayoutError, match="no group 'mla'; it has"):
        LAYOUT.group_index("mla")


@given(boundary=st.integers(1, 5_000))
def test_bytes_at_is_what_a_whole_transfer_holds(boundary: int) -> None:
    assert sum(e.nbytes for e in LAYOUT.extents(boundary)) == LAYOUT.bytes_at(boundary)
    assert sum(g.bytes_at(boundary) for g in LAYOUT.groups) == LAYOUT.bytes_at(boundary)


# -- tensor parallelism ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_hold_the_whole_and_latents_once_each(size: int) -> None:
    ranks = [replace(LAYOUT, tp_size=size, tp_rank=r) for r in range(size)]
    for name, total in LAYOUT.group_bytes(100).items():
        shares = [r.group_bytes(100)[name] for r in ranks]
        assert sum(shares) == (total * size if name == "latent" else total)
    assert len({r.fingerprint() for r in ranks}) == 1


@pytest.mark.parametrize(("size", "rank"), [(0, 0), (2, 2), (2, -1), (-1, 0)])
def test_impossible_ranks_are_refused(size: int, rank: int) -> None:
    with pytest.raises(ParallelismError, match="is not below size"):
        replace(LAYOUT, tp_size=size, tp_rank=rank)


def test_indivisible_axis_is_refused_by_name() -> None:
    with pytest.raises(ParallelismError, match=r"'k': axis 0 of \(4, 8\) does not divide by tensor parallelism 3"):
        replace(LAYOUT, tp_size=3)


# -- extents ---------------------------------------------------------------------------------------


def _positions(extent: Extent) -> list[int]:
    """Token positions of an extent in byte order; a state counts as its position."""
    return [p for s in extent.spans for p in (range(s.first, s.stop) if s.tokens else [s.first])]


@st.composite
def _transfers(draw: st.DrawFn) -> tuple[int, int, list[int], int]:
    boundary = draw(st.integers(1, 200))
    start = draw(st.integers(0, boundary - 1))
    points = draw(st.lists(st.integers(start + 1, boundary), max_size=6))
    return boundary, start, points, draw(st.sampled_from([1, 4, 16]))


@given(_transfers())
def test_extents_hold_exactly_what_restoring_needs(case: tuple[int, int, list[int], int]) -> None:
    boundary, start, checkpoints, align = case
    points = sorted({*checkpoints, boundary})
    extents = LAYOUT.extents(boundary, start=start, checkpoints=checkpoints, align=align)
    assert [(e.layer, e.tensor) for e in extents] == [(s.layer, s.tensor) for s in LAYOUT.slots()]
    for extent, slot in zip(extents, LAYOUT.slots(), strict=True):
        group = LAYOUT.groups[slot.group]
        held = _positions(extent)
        assert held == sorted(set(held))
        assert extent.spans[-1].stop == boundary
        assert extent.nbytes == len(held) * slot.spec.nbytes
        if group.kind is GroupKind.RECURRENT:
            assert held == points
        elif group.kind is GroupKind.FULL:
            assert held == list(range(start, boundary))
        else:
            need = {t for p in points for t in range(max(start, p - 9), p)}
            assert need <= set(held)
            # Nothing beyond the windows but what rounding down to the block adds, in spans that do not touch.
            assert all(any(p - 9 - align < t < p for p in points) for t in held)
            assert all(t >= start for t in held)
            assert all(a.stop < b.first for a, b in zip(extent.spans, extent.spans[1:], strict=False))
            assert all(s.first == start or s.first % align == 0 for s in extent.spans)


@given(_transfers(), st.data())
def test_byte_range_finds_each_token_where_the_concatenation_puts_it(
    case: tuple[int, int, list[int], int], data: st.DataObject
) -> None:
    boundary, start, checkpoints, align = case
    extent = data.draw(st.sampled_from(LAYOUT.extents(boundary, start=start, checkpoints=checkpoints, align=align)))
    held = _positions(extent)
    index = data.draw(st.integers(0, len(held) - 1))
    if extent.spans[0].tokens == 0:
        assert extent.byte_range(held[index], 0) == (index * extent.unit, (index + 1) * extent.unit)
        with pytest.raises(LayoutError, match=r"does not hold tokens"):
            extent.byte_range(held[index] - 1, 1)
        return
    span = next(s for s in extent.spans if s.first <= held[index] < s.stop)
    tokens = data.draw(st.integers(1, span.stop - held[index]))
    assert extent.byte_range(held[index], tokens) == (index * extent.unit, (index + tokens) * extent.unit)
    with pytest.raises(LayoutError, match=r"does not hold tokens"):
        extent.byte_range(span.first, span.tokens + 1)
    with pytest.raises(LayoutError, match=r"does not hold the state at"):
        extent.byte_range(held[index], 0)


@pytest.mark.parametrize(
    ("boundary", "start", "checkpoints", "says"),
    [
        (0, 0, [], "0 <= start < boundary"),
        (8, 8, [], "0 <= start < boundary"),
        (8, -1, [], "0 <= start < boundary"),
        (8, 4, [4], r"checkpoints must lie in \(4, 8\]"),
        (8, 0, [9], r"checkpoints must lie in \(0, 8\]"),
    ],
)
def test_impossible_transfers_are_refused(boundary: int, start: int, checkpoints: list[int], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        LAYOUT.extents(boundary, start=start, checkpoints=checkpoints)


# -- identity --------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[], CacheLayout]] = {
    "model": lambda: replace(LAYOUT, model="other"),
    "revision": lambda: replace(LAYOUT, revision="r2"),
    "tensor parallelism": lambda: replace(LAYOUT, tp_size=2),
    "group order": lambda: replace(LAYOUT, groups=(LATENT, FULL, SLIDING, STATE)),
    "group name": lambda: replace(LAYOUT, groups=(FULL, replace(LATENT, name="mla"), SLIDING, STATE)),
    "group missing": lambda: replace(LAYOUT, groups=(FULL, LATENT, SLIDING)),
    "kind": lambda: replace(LAYOUT, groups=(FULL, replace(LATENT, kind=GroupKind.RECURRENT), SLIDING, STATE)),
    "layers": lambda: replace(LAYOUT, groups=(FULL, replace(LATENT, layers=(4,)), SLIDING, STATE)),
    "window": lambda: replace(LAYOUT, groups=(FULL, LATENT, replace(SLIDING, window=11), STATE)),
    "tensor name": lambda: replace(LAYOUT, groups=(FULL, _latent(TensorSpec("c", "bfloat16", (32,))), SLIDING, STATE)),
    "dtype": lambda: replace(LAYOUT, groups=(FULL, _latent(TensorSpec("kv_c", "float16", (32,))), SLIDING, STATE)),
    "shape": lambda: replace(LAYOUT, groups=(FULL, _latent(TensorSpec("kv_c", "bfloat16", (4, 8))), SLIDING, STATE)),
    "sharding": lambda: replace(
        LAYOUT, groups=(FULL, _latent(TensorSpec("kv_c", "bfloat16", (32,), 0)), SLIDING, STATE)
    ),
}


def _latent(spec: TensorSpec) -> CacheGroup:
    return replace(LATENT, tensors=(spec,))


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_fingerprint_differs_when_anything_differs(what: str) -> None:
    assert CHANGES[what]().fingerprint() != LAYOUT.fingerprint()


def test_fingerprint_covers_the_block_size_but_not_rank_and_source() -> None:
    prints = {LAYOUT.fingerprint(n) for n in (0, 16, 64)}
    assert len(prints) == 3
    assert all(len(p) == 32 for p in prints)
    assert replace(LAYOUT, source="elsewhere").fingerprint() == LAYOUT.fingerprint()
    two = replace(LAYOUT, tp_size=2)
    assert replace(two, tp_rank=1).fingerprint() == two.fingerprint()


def test_fingerprint_is_pinned() -> None:
    # Caches on disk outlive the code that wrote them: a change here needs a new prefix in fingerprint().
    assert LAYOUT.fingerprint(16).hex() == PINNED


PINNED = "3e50291971a858b4eeffae97926f19ace0f5c1e10f133e21e6f1d05e82f52c23"


@pytest.mark.parametrize("what", ["itself", *sorted(CHANGES)])
def test_description_round_trip(what: str) -> None:
    layout = LAYOUT if what == "itself" else CHANGES[what]()
    body = msgpack.unpackb(msgpack.packb(layout.describe()))
    assert CacheLayout.from_description(body) == layout


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.pop("groups"),
        lambda b: b.pop("revision"),
        lambda b: b.update(tp_size="two"),
        lambda b: b.update(groups=7),
        lambda b: b["groups"][0].update(kind="quadratic"),
        lambda b: b["groups"][0].update(layers=[1, None]),
        lambda b: b["groups"][0].update(layers=[]),
        lambda b: b["groups"][0]["tensors"][0].update(dtype="float3"),
        lambda b: b["groups"][0]["tensors"][0].pop("shape"),
        lambda b: b["groups"][2].update(window=None),
    ],
)
def test_malformed_descriptions_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    body = LAYOUT.describe()
    change(body)
    with pytest.raises(LayoutError):
        CacheLayout.from_description(body)


# -- manifests -------------------------------------------------------------------------------------


def _manifest(**kwargs: Any) -> Manifest:
    return Manifest.of_layout(LAYOUT, 100, transfer=TRANSFER, **kwargs)


def _with(manifest: Manifest, slot: tuple[int, int], **change: Any) -> Manifest:
    extents = tuple(replace(e, **change) if (e.layer, e.tensor) == slot else e for e in manifest.extents)
    return replace(manifest, extents=extents)


@given(_transfers())
def test_a_manifest_of_a_layout_passes_its_check_after_the_wire(case: tuple[int, int, list[int], int]) -> None:
    boundary, start, checkpoints, blocks = case
    manifest = Manifest.of_layout(
        LAYOUT, boundary, transfer=TRANSFER, start=start, checkpoints=checkpoints, block_tokens=blocks, meta={"n": 1}
    )
    back = Manifest.decode(manifest.encode())
    assert back == manifest
    assert back.digest == manifest.digest
    assert replace(back).encode() == back.encode() == manifest.encode()
    assert back.total_bytes == sum(e.nbytes for e in manifest.extents)
    assert back.layers == LAYOUT.layers
    back.check(LAYOUT, block_tokens=blocks)


def test_lookups() -> None:
    manifest = _manifest()
    assert manifest.extent(2, 0).unit == 64
    assert [e.tensor for e in manifest.by_layer[3]] == [0, 1, 2]
    with pytest.raises(ManifestError, match="layer 9 tensor 1 is not in the manifest"):
        manifest.extent(9, 1)
    assert len(new_transfer_id()) == 16
    assert new_transfer_id() != new_transfer_id()


def test_flat_objects() -> None:
    sizes = [(i * 7) % 50 for i in range(200)]
    manifest = Manifest.decode(Manifest.of_objects(sizes, transfer=TRANSFER, meta={"keys": [b"k"]}).encode())
    assert manifest.fingerprint == FLAT
    assert [e.nbytes for e in manifest.extents] == sizes
    assert manifest.extent(130 // 64, 130 % 64).unit == sizes[130]
    assert manifest.meta == {"keys": [b"k"]}
    with pytest.raises(FingerprintError):
        manifest.check(LAYOUT)


@pytest.mark.parametrize("what", sorted(set(CHANGES) - {"tensor parallelism"}))
def test_check_refuses_another_layout(what: str) -> None:
    with pytest.raises(FingerprintError, match="must be the same on both sides"):
        _manifest().check(CHANGES[what]())


def test_check_refuses_another_block_size() -> None:
    with pytest.raises(FingerprintError, match="blocks of 16 tokens"):
        _manifest(block_tokens=64).check(LAYOUT, block_tokens=16)


def test_check_refuses_other_tensor_parallelism_before_the_fingerprint_differs() -> None:
    two = replace(LAYOUT, tp_size=2)
    with pytest.raises(ParallelismError, match="producer runs tensor parallelism 1, this side 2; resharding"):
        _manifest().check(two)
    with pytest.raises(ParallelismError, match="rank 0, this is rank 1"):
        Manifest.of_layout(two, 100, transfer=TRANSFER).check(replace(two, tp_rank=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda m: replace(m, extents=m.extents[1:]),
            "1 tensors of the layout are missing, the first is layer 0 tensor 0",
        ),
        (lambda m: replace(m, extents=m.extents + m.extents[:1]), "layer 0 tensor 0 is not in the layout"),
        (lambda m: _with(m, (2, 0), layer=7), "layer 7 tensor 0 is not in the layout"),
        (lambda m: _with(m, (2, 0), unit=32), "layer 2 tensor 0: 32 bytes a unit, the layout says 64"),
        (
            lambda m: _with(m, (2, 0), spans=(Span(100, 0),)),
            r"holds the state at 100, the layout needs tokens 0\.\.100",
        ),
        (
            lambda m: _with(m, (3, 2), spans=(Span(0, 100),)),
            r"holds tokens 0\.\.100, the layout needs the state at 100",
        ),
        (lambda m: _with(m, (2, 0), spans=(Span(0, 99),)), r"holds tokens 0\.\.99, the layout needs tokens 0\.\.100"),
        (lambda m: _with(m, (2, 0), spans=(Span(0, 10), Span(20, 80))), r"holds tokens 0\.\.10, tokens 20\.\.100"),
        (lambda m: _with(m, (2, 0), spans=(Span(99, 1),)), r"holds tokens 99\.\.100"),
        (lambda m: _with(m, (2, 0), spans=()), "holds nothing"),
        (lambda m: _with(m, (3, 2), spans=(Span(99, 0),)), "holds the state at 99, the layout needs the state at 100"),
        (lambda m: replace(m, boundary=101), r"the layout needs tokens \d+\.\.101"),
        (lambda m: replace(m, start=100), "token range is not one of"),
    ],
)
def test_check_names_the_extent_that_contradicts_the_layout(change: Callable[[Manifest], Manifest], says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        change(_manifest()).check(LAYOUT)


# -- manifests from the wire -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(transfer=b"short"),
        lambda b: b.update(transfer="0123456789abcdef"),
        lambda b: b.update(fingerprint=b"x"),
        lambda b: b.update(boundary=-1),
        lambda b: b.update(boundary=1 << 41),
        lambda b: b.update(boundary=True),
        lambda b: b.update(tp=[1]),
        lambda b: b.update(tp=[1, -1]),
        lambda b: b.update(meta=[1]),
        lambda b: b.pop("extents"),
        lambda b: b.update(extents=5),
        lambda b: b["extents"].append(b["extents"][0]),
        lambda b: b["extents"][0].append(1),
        lambda b: b["extents"].append([0, 64, 1, 0]),
        lambda b: b["extents"].append([65_535, 0, 1, 0]),
        lambda b: b["extents"].append([9, 0, 1.5, 0]),
        lambda b: b["extents"].append([9, 0, 1, 99]),
        lambda b: b["extents"].append([9, 0, 1, -1]),
        lambda b: b["spans"].append([[5, 5], [8, 5]]),
        lambda b: b["spans"].append([[5, 5], [0, 5]]),
        lambda b: b["spans"].append([[5, 0], [5, 0]]),
        lambda b: b["spans"].append([[5]]),
        lambda b: b["spans"].append([[-5, 1]]),
    ],
)
def test_malformed_manifests_from_the_wire(change: Callable[[dict[str, Any]], object]) -> None:
    body = msgpack.unpackb(_manifest().encode())
    change(body)
    with pytest.raises(ManifestError):
        Manifest.decode(msgpack.packb(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["spans"].append([]),
        lambda b: b["spans"].append([[i, 0] for i in range(MAX_SPANS + 1)]),
        lambda b: b["extents"].extend([i // 60, i % 60, 0, 0] for i in range(MAX_EXTENTS + 1)),
        lambda b: b["extents"].append([9, 0, 1 << 40, b["spans"].index([[0, 100]])]),
    ],
)
def test_manifests_over_the_limits(change: Callable[[dict[str, Any]], object]) -> None:
    body = msgpack.unpackb(_manifest().encode())
    change(body)
    with pytest.raises(LimitError, match="over the limit"):
        Manifest.decode(msgpack.packb(body))


def test_manifest_too_large_both_ways() -> None:
    fat = _manifest(meta={"x": bytes(MAX_MANIFEST_BYTES)})
    with pytest.raises(LimitError, match=f"over the limit of {MAX_MANIFEST_BYTES}"):
        fat.encode()
    with pytest.raises(LimitError, match=f"over the limit of {MAX_MANIFEST_BYTES}"):
        Manifest.decode(bytes(MAX_MANIFEST_BYTES + 1))


@given(st.binary(max_size=64))
def test_noise_is_an_error_of_ours(noise: bytes) -> None:
    with pytest.raises(KVError):
        Manifest.decode(noise)


@given(st.data())
def test_a_damaged_manifest_is_an_error_of_ours_or_differs(data: st.DataObject) -> None:
    good = _manifest().encode()
    cut = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(KVError):
        Manifest.decode(good[:cut])
    flipped = bytearray(good)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    try:
        other = Manifest.decode(bytes(flipped))
    except KVError:
        return
    assert other.digest != _manifest().digest
