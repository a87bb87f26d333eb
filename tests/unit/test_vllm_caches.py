"""vLLM's caches as page lists and layouts: groups, pages, geometry, and reading vLLM's own objects (stand-ins of them)."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvpool.engines.vllm.config import ConnectorConfig
from kvpool.engines.vllm.geometry import Geometry, LayerCache, attention_tensors, state_tensors
from kvpool.engines.vllm.groups import GroupRule
from kvpool.engines.vllm.pages import page_shape
from kvpool.engines.vllm.reading import geometry_of, place_of, rules_of, storage_of
from kvpool.engines.vllm.steps import BlockRun
from kvpool.engines.vllm.worker import Place
from kvtransport.errors import DestinationError, FingerprintError, LayoutError, ParallelismError
from kvtransport.layout import GroupKind
from kvtransport.manifest import Manifest

FULL = GroupRule(GroupKind.FULL, 16)
SLIDING = GroupRule(GroupKind.SLIDING, 16, window=40)
STATE = GroupRule(GroupKind.RECURRENT, 4096, spare_blocks=2)


# -- groups ----------------------------------------------------------------------------------


def test_full_attention_hands_over_whole_blocks_and_at_the_end_the_rest():
    ids = list(range(10, 20))
    assert FULL.ready(ids, 0, 100, 150) == BlockRun(0, (10, 11, 12, 13, 14, 15))
    assert FULL.ready(ids, 100, 150, 150) == BlockRun(6, (16, 17, 18, 19))
    assert FULL.ready(ids, 0, 15, 150) is None
    assert FULL.whole(ids, 150) == BlockRun(0, tuple(ids))


@pytest.mark.parametrize("cuts", [(150,), (64, 128, 150), (1, 17, 33, 149, 150), (16, 32, 150), (100, 144, 150)])
@pytest.mark.parametrize("rule", [FULL, SLIDING])
def test_however_a_prompt_is_cut_every_block_is_handed_over_once(rule, cuts):
    ids = list(range(100, 110))
    handed: list[int] = []
    before = 0
    for until in cuts:
        run = rule.ready(ids, before, until, 150)
        if run is not None:
            assert run.first == ids.index(run.ids[0])
            handed += run.ids
        before = until
    whole = rule.whole(ids, 150)
    assert tuple(handed) == whole.ids
    assert whole.first == rule.span(150)[0]


def test_a_sliding_window_is_clipped_and_needs_no_block_before_it():
    # Continuing at 150 needs tokens 111..149: blocks 6 to 9. What vLLM gave back before them is its null block.
    ids = [0] * 6 + [16, 17, 18, 19]
    assert SLIDING.span(150) == (6, 10)
    assert SLIDING.whole(ids, 150) == BlockRun(6, (16, 17, 18, 19))
    assert SLIDING.ready(ids, 0, 96, 150) is None
    with pytest.raises(DestinationError, match="blocks 6 to 10 of a sliding group are needed"):
        SLIDING.whole([0] * 7 + [17, 18, 19], 150)


def test_a_state_leaves_once_from_the_block_before_the_speculative_ones():
    assert STATE.ready([0, 0, 7, 8, 9], 0, 100, 150) is None
    assert STATE.ready([0, 0, 7, 8, 9], 100, 150, 150) == BlockRun(0, (7,))
    assert STATE.whole([5], 150) == BlockRun(0, (5,))
    with pytest.raises(DestinationError, match="holds no state"):
        STATE.whole([0, 8, 9], 150)
    with pytest.raises(DestinationError, match="holds no state"):
        STATE.whole([], 150)


def test_the_null_block_is_never_part_of_a_run():
    with pytest.raises(DestinationError, match="10 entries, 9 of them blocks"):
        FULL.whole([0, *range(11, 20)], 150)
    with pytest.raises(DestinationError, match="4 entries"):
        FULL.ready([1, 2, 3, 4], 0, 150, 150)


def test_groups_that_the_engine_rebuilds_do_not_travel():
    rule = GroupRule(GroupKind.FULL, 16, transfers=False)
    assert rule.whole([0, 0], 150) == BlockRun(0, ())
    assert rule.ready([0, 0], 0, 150, 150) is None


@pytest.mark.parametrize("boundary", [1, 15, 16, 17, 39, 40, 41, 150, 160])
def test_spans_are_those_of_the_layout(boundary):
    """The scheduler counts blocks, the manifest tokens; both must say the same."""
    tensors = attention_tensors(page_shape((64, 1, 16, 8), (128, 128, 8, 1), 2, 0, 64), 16, "bfloat16")
    pages = page_shape((64, 1, 16, 8), (128, 128, 8, 1), 2, 0, 64)
    layers = [LayerCache(f"layers.{i}.attn", i, rule, pages, tensors) for i, rule in enumerate((FULL, SLIDING))]
    layout = Geometry("m", "", layers, (FULL, SLIDING)).layout
    for extent, rule in zip(layout.extents(boundary), (FULL, SLIDING), strict=True):
        first, stop = rule.span(boundary)
        (span,) = extent.spans
        assert (span.first, span.stop) == (first * 16, stop * 16)


# -- pages -----------------------------------------------------------------------------------


def reference(array: np.ndarray, block: int, blocks: int) -> bytes:
    """The content of a block in address order, the slow way."""
    ratio = array.shape[0] // blocks
    cells = array[block * ratio : (block + 1) * ratio]
    index = np.indices(cells.shape).reshape(cells.ndim, -1).T
    at = sorted(index.tolist(), key=lambda i: sum(a * s for a, s in zip(i, cells.strides, strict=True)))
    return b"".join(cells[tuple(i)].tobytes() for i in at)


@pytest.mark.parametrize(
    ("order", "padding", "pieces"),
    [
        ((0, 1, 2, 3), 0, 1),  # blocks are dense: heads, tokens, content
        ((0, 2, 1, 3), 0, 1),  # tokens before heads
        ((0, 1, 2, 3), 64, 1),  # padded pages
        ((1, 0, 2, 3), 0, 2),  # heads outside the blocks
        ((2, 0, 1, 3), 0, 4),  # tokens outside the blocks
    ],
)
def test_pages_are_the_bytes_of_a_block_in_address_order(order, padding, pieces):
    blocks, shape = 5, (5, 2, 4, 6)
    rng = np.random.default_rng(1)
    outer = [shape[i] for i in order]
    if padding:
        backing = rng.integers(0, 1 << 16, (blocks, 2 * 4 * 6 + padding), np.uint16)
        array = np.lib.stride_tricks.as_strided(backing, shape, (backing.strides[0], 4 * 6 * 2, 6 * 2, 2))
    else:
        backing = rng.integers(0, 1 << 16, outer, np.uint16)
        array = backing.transpose(np.argsort(order))
    found = page_shape(array.shape, [s // 2 for s in array.strides], 2, 0, blocks)
    assert found.nbytes == 2 * 4 * 6 * 2
    assert len(found.pieces) == pieces
    base = memoryview(backing).cast("B")
    assert found.of([3, 1], base).tobytes() == reference(array, 3, blocks) + reference(array, 1, blocks)
    assert found.part(10, 50).of([2], base).tobytes() == reference(array, 2, blocks)[10:50]


def test_kernel_blocks_of_a_block_are_one_page():
    blocks, ratio = 4, 2
    array = np.random.default_rng(2).integers(0, 256, (blocks * ratio, 2, 3, 8), np.uint8)
    found = page_shape(array.shape, array.strides, 1, 0, blocks)
    assert found.nbytes == ratio * 2 * 3 * 8
    assert found.of([3], memoryview(array).cast("B")).tobytes() == array[6:8].tobytes()
    assert "K2" in found.order


def test_orders_of_axes_are_told_apart():
    dense = page_shape((4, 2, 8, 16), (256, 128, 16, 1), 2, 0, 4)
    tokens_first = page_shape((4, 2, 8, 16), (256, 16, 32, 1), 2, 0, 4)
    assert dense.nbytes == tokens_first.nbytes
    assert dense.order != tokens_first.order
    assert attention_tensors(dense, 8, "bfloat16") != attention_tensors(tokens_first, 8, "bfloat16")


@pytest.mark.parametrize(
    ("shape", "strides", "says"),
    [
        ((4, 2, 8), (16, 8, 1), "is not"),
        ((5, 2, 8, 16), (256, 128, 16, 1), "is not"),
        ((4, 1, 8, 16), (64, 128, 16, 1), "overlapping"),
        ((4, 2, 8, 16), (256, 0, 16, 1), "overlapping"),
    ],
)
def test_tensors_that_are_no_pages_are_refused(shape, strides, says):
    with pytest.raises(LayoutError, match=says):
        page_shape(shape, strides, 2, 0, 4)


@pytest.mark.parametrize("ids", [[0], [4], [-1], [1, 2, 9]])
def test_blocks_that_do_not_exist_and_the_null_block_are_refused(ids):
    pages = page_shape((4, 1, 1, 8), (8, 8, 8, 1), 1, 0, 4)
    with pytest.raises(DestinationError, match="blocks are 1 to 3"):
        pages.of(ids, bytearray(32))


def test_compressed_caches_are_refused():
    pages = page_shape((4, 1, 3, 5), (15, 15, 5, 1), 1, 0, 4)
    with pytest.raises(LayoutError, match="compressed"):
        attention_tensors(pages, 16, "uint8")
    with pytest.raises(LayoutError, match="have 24 bytes, their page 15"):
        state_tensors(pages, [(2, 3)], ["float32"])


# -- geometry --------------------------------------------------------------------------------


def hybrid_geometry(revision: str = "", **identity: str) -> Geometry:
    attention = page_shape((8, 1, 16, 8), (128, 128, 8, 1), 2, 0, 8)
    state = page_shape((8, 1, 1, 48), (256, 256, 256, 1), 1, 0, 8)
    tensors = attention_tensors(attention, 16, "bfloat16")
    states = state_tensors(state, [(3, 4), (6,)], ["bfloat16", "float32"])
    layers = [
        LayerCache("model.layers.3.self_attn.attn", 1, FULL, attention, tensors),
        *(LayerCache(f"model.layers.{i}.linear_attn", 0, STATE, state, states) for i in (2, 0, 1, 4, 10)),
        LayerCache("model.layers.9.self_attn.attn", 2, FULL, attention, tensors),
    ]
    return Geometry("m", revision, layers, (STATE, FULL, FULL), identity=identity)


def test_layers_are_in_the_order_of_execution_and_share_groups_by_shape():
    geometry = hybrid_geometry()
    assert [layer.name.split(".")[2] for layer in geometry.layers] == ["0", "1", "2", "3", "4", "9", "10"]
    assert [(g.kind, g.layers) for g in geometry.layout.groups] == [("recurrent", (0, 1, 2, 4, 6)), ("full", (3, 5))]
    conv, state = geometry.parts[0]
    assert (conv.nbytes, state.nbytes) == (24, 24)
    assert state.pieces.tolist() == [[24, 24]]


def test_recurrent_layers_leave_with_the_next_attention_layer_of_their_stack():
    geometry = hybrid_geometry()
    assert geometry.leaves_with == {
        "model.layers.3.self_attn.attn": (0, 1, 2, 3),
        "model.layers.9.self_attn.attn": (0, 1, 2, 4, 5),
    }  # layer 10 has nothing after it: it waits for the end of the step


def test_a_mixer_beside_attention_and_a_draft_model_wait_for_the_end_of_the_step():
    attention = page_shape((8, 1, 16, 8), (128, 128, 8, 1), 2, 0, 8)
    state = page_shape((8, 1, 1, 24), (256, 256, 256, 1), 1, 0, 8)
    tensors = attention_tensors(attention, 16, "bfloat16")
    states = state_tensors(state, [(6,)], ["float32"])
    layers = [
        LayerCache("model.layers.1.attn", 0, FULL, attention, tensors),
        LayerCache("model.layers.1.mixer", 1, STATE, state, states),
        LayerCache("draft.layers.0.mixer", 1, STATE, state, states),
    ]
    geometry = Geometry("m", "", layers, (FULL, STATE))
    names = [geometry.layers[i].name for i in geometry.leaves_with["model.layers.1.attn"]]
    assert names == ["model.layers.1.attn"]


def test_what_pages_mean_must_be_the_same_on_both_sides():
    ours = hybrid_geometry(vLLM="1.0", packing="amx")
    ours.check_identity({"model": "m", "revision": "", "vLLM": "1.0", "packing": "amx"})
    with pytest.raises(FingerprintError, match=r"packing is 'vec' on prefill, 'amx' on decode"):
        ours.check_identity({**ours.identity, "packing": "vec"})
    with pytest.raises(FingerprintError, match="vLLM is None on prefill"):
        ours.check_identity({})
    assert hybrid_geometry("a").layout.fingerprint() != hybrid_geometry("b").layout.fingerprint()
    assert "5 recurrent (48 bytes a state), 2 full (16 bytes a token)" in ours.describe()


# -- reading vLLM ----------------------------------------------------------------------------


@dataclass
class FullAttentionSpec:
    block_size: int = 16


@dataclass
class MLAAttentionSpec(FullAttentionSpec):
    pass


@dataclass
class SlidingWindowSpec:
    block_size: int = 16
    sliding_window: int = 40


@dataclass
class ChunkedLocalAttentionSpec:
    block_size: int = 16


@dataclass
class MambaSpec:
    block_size: int = 4096
    shapes: tuple[tuple[int, ...], ...] = ((3, 4), (6,))
    dtypes: tuple[str, ...] = ("torch.bfloat16", "torch.float32")
    num_speculative_blocks: int = 0
    mamba_cache_mode: str = "none"


@dataclass
class UniformTypeKVCacheSpecs:
    block_size: int
    kv_cache_specs: dict[str, Any]


@dataclass
class Group:
    kv_cache_spec: Any
    layer_names: list[str] = field(default_factory=list)
    enable_kv_transfer: bool = True


def caches_config(*groups: Group) -> Any:
    return SimpleNamespace(kv_cache_groups=list(groups), num_blocks=8)


def test_rules_are_read_from_vllms_specs():
    mixed = UniformTypeKVCacheSpecs(16, {"a": FullAttentionSpec(), "b": MLAAttentionSpec()})
    rules = rules_of(
        caches_config(
            Group(MLAAttentionSpec(32)),
            Group(SlidingWindowSpec()),
            Group(MambaSpec(num_speculative_blocks=2)),
            Group(mixed),
            Group(ChunkedLocalAttentionSpec(), enable_kv_transfer=False),
        )
    )
    assert rules == (
        GroupRule(GroupKind.FULL, 32),
        SLIDING,
        STATE,
        FULL,
        GroupRule(GroupKind.FULL, 16, transfers=False),
    )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ChunkedLocalAttentionSpec(), "chunked local attention"),
        (MambaSpec(mamba_cache_mode="all"), "'all' keeps a state per block"),
        (SimpleNamespace(block_size=1), "are not known"),
        (
            UniformTypeKVCacheSpecs(16, {"a": FullAttentionSpec(), "b": SlidingWindowSpec()}),
            "cached by several rules",
        ),
    ],
)
def test_caches_that_cannot_be_transferred_are_refused_by_name(spec, says):
    with pytest.raises(LayoutError, match=says):
        rules_of(caches_config(Group(spec, ["x"])))


def parallel(**sizes: int) -> Any:
    known = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_index": 0,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    return SimpleNamespace(parallel_config=SimpleNamespace(**{**known, **sizes}))


def test_ranks_listen_side_by_side():
    place = place_of(parallel(tensor_parallel_size=4, data_parallel_index=2), 3)
    assert place == Place(3, 4, 2)
    assert place.listen_offset == 11


@pytest.mark.parametrize(
    "name", ["pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"]
)
def test_other_parallelism_is_refused_by_name(name):
    with pytest.raises(ParallelismError, match=f"{name} is 2"):
        place_of(parallel(**{name: 2}))


@pytest.mark.torch
def test_the_geometry_of_registered_tensors():
    """As vLLM lays out a hybrid: two groups alias the same bytes, the state's pages are padded."""
    torch = pytest.importorskip("torch")
    buffer = torch.zeros(8 * 512, dtype=torch.int8)
    caches = {
        "model.layers.1.attn": torch.as_strided(buffer, (8, 2, 16, 16), (512, 256, 16, 1), 0).view(torch.bfloat16),
        "model.layers.0.linear": torch.as_strided(buffer, (8, 1, 1, 48), (512, 512, 512, 1), 0),
    }
    backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    engine = SimpleNamespace(
        model_config=SimpleNamespace(model="/models/tiny/"),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            static_forward_context={
                "model.layers.1.attn": SimpleNamespace(get_attn_backend=lambda: backend, isa="amx"),
                "model.layers.0.linear": SimpleNamespace(),
            }
        ),
    )
    config = caches_config(
        Group(MambaSpec(), ["model.layers.0.linear"]), Group(FullAttentionSpec(), ["model.layers.1.attn"])
    )
    geometry = geometry_of(engine, config, caches, ConnectorConfig(revision="r1"), Place(), version="9.9")
    assert geometry.identity == {
        "model": "tiny",
        "revision": "r1",
        "vLLM": "9.9",
        "attention backends": "CPU_ATTN (amx)",
        "kv cache dtype": "auto",
    }
    state, attention = geometry.layers
    assert (state.recurrent, state.group, state.pages.nbytes, state.pages.stride) == (True, 0, 48, 512)
    assert (attention.pages.nbytes, attention.tensors[0].nbytes, attention.tensors[0].dtype) == (512, 32, "bfloat16")
    manifest = Manifest.of_layout(geometry.layout, 100, transfer=bytes(16))
    assert manifest.total_bytes == 48 + 7 * 512
    flat = storage_of(caches)
    assert (flat.dtype, flat.numel(), flat.data_ptr()) == (torch.uint8, buffer.numel(), buffer.data_ptr())
    del caches["model.layers.0.linear"]
    with pytest.raises(LayoutError, match=r"registered no cache tensor for layer model\.layers\.0\.linear"):
        geometry_of(engine, config, caches, ConnectorConfig(), Place(), version="9.9")
    with pytest.raises(LayoutError, match="2 pieces of memory"):
        storage_of({"a": torch.zeros(1), "b": torch.zeros(1)})
