"""The transformers adapter on real, tiny models: bytes out, bytes in, and nothing in the logits tells the difference."""

import subprocess
import sys

import pytest
import torch

from kvpool.engines import hf_layout, tiny_models
from kvpool.engines import transformers as adapter
from kvtransport.buffers import PageList
from kvtransport.errors import ConfigError, LayoutError
from kvtransport.layout import GroupKind, Span
from kvtransport.manifest import Manifest, new_transfer_id

pytestmark = pytest.mark.torch

BLOCK, CHUNK, STEPS = 16, 128, 16
FORK, BOUNDARY, OTHER = 192, 333, 230
"""Tokens: what the two prompts share (a checkpoint), and their lengths; neither length is on the grid."""
PROMPT = tiny_models.random_tokens(BOUNDARY, seed=1)
BRANCH = PROMPT[:FORK] + tiny_models.random_tokens(OTHER - FORK, seed=2)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """name -> (model, layout); each built once."""
    made = {}

    def get(name):
        if name not in made:
            model = tiny_models.load_tiny(tiny_models.save_tiny(name, tmp_path_factory.mktemp(name)))
            made[name] = model, adapter.layout_of(model, block_tokens=BLOCK)
        return made[name]

    return get


class Collector:
    """The far end: one buffer per extent of the manifest, every byte written exactly once."""

    def __init__(self, layout, boundary, *, start=0, checkpoints=()):
        self.manifest = Manifest.of_layout(
            layout, boundary, transfer=new_transfer_id(), start=start, checkpoints=checkpoints, block_tokens=BLOCK
        )
        self.manifest.check(layout, block_tokens=BLOCK)
        self.buffers = {slot: bytearray(e.nbytes) for slot, e in self.manifest.by_slot.items()}
        self.written = {slot: bytearray(e.nbytes) for slot, e in self.manifest.by_slot.items()}
        self.order = []

    def __call__(self, layer, tensor, data, first, tokens):
        begin, end = self.manifest.extent(layer, tensor).byte_range(first, tokens)
        assert data.nbytes == end - begin
        assert data.format == "B"
        assert not any(self.written[layer, tensor][begin:end])
        self.buffers[layer, tensor][begin:end] = data
        self.written[layer, tensor][begin:end] = b"\1" * (end - begin)
        self.order.append((layer, tensor, first, tokens))

    @property
    def complete(self):
        return all(all(marks) for marks in self.written.values())

    def unit(self, layer, tensor, first, tokens):
        begin, end = self.manifest.extent(layer, tensor).byte_range(first, tokens)
        return self.buffers[layer, tensor][begin:end]


def plain(model, tokens, cuts):
    """A run that knows nothing of this project: bare transformers, prompt cut at ``cuts``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for first, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            ids = torch.tensor([tokens[first:stop]])
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], cache


def stitched(layout, base, suffix):
    """What a pool would serve for the branch: its prefix from the first request, the rest from the second."""
    extents = layout.extents(OTHER, align=BLOCK)
    buffers = {}
    for extent in extents:
        parts = []
        for span in extent.spans:
            if span.tokens == 0:
                parts.append(suffix.unit(extent.layer, extent.tensor, span.first, 0))
                continue
            parts.append(base.unit(extent.layer, extent.tensor, span.first, FORK - span.first))
            parts.append(suffix.unit(extent.layer, extent.tensor, FORK, span.stop - FORK))
        buffers[extent.layer, extent.tensor] = b"".join(parts)
    return buffers, extents


def assert_same_decode(model, cache, logits, reference):
    expected_logits, expected = reference
    assert torch.equal(logits, expected_logits)
    tokens, digest, steps = adapter.greedy(model, cache, int(logits.argmax(-1)), STEPS)
    assert tokens == expected[0]
    assert digest == expected[1]
    assert len(steps) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(steps, expected[2], strict=True))


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_decode_and_resume_are_bitwise_equal(load, name):
    model, layout = load(name)
    logits, cache = plain(model, PROMPT, [128, FORK, 256])
    reference = logits, adapter.greedy(model, cache, int(logits.argmax(-1)), STEPS)
    assert len(set(reference[1][0])) > 4  # a model that repeats itself would prove little

    base = Collector(layout, BOUNDARY, checkpoints=[FORK])
    run = adapter.PrefillRun(
        model, layout, PROMPT, checkpoints=[FORK], block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=base
    )
    assert run.extents == base.manifest.extents
    assert run.chunks == ((0, 128), (128, 192), (192, 256), (256, 333))
    result = run.run()
    assert base.complete
    assert sum(map(len, base.buffers.values())) == base.manifest.total_bytes
    # The cache that gave the bytes goes on, and so does one made of the bytes.
    restored = adapter.restore(model, layout, BOUNDARY, base.buffers, base.manifest.extents)
    assert_same_decode(model, result.cache, result.logits, reference)
    assert_same_decode(model, restored, result.logits, reference)

    # A second request resumes at the checkpoint of the first one.
    logits, cache = plain(model, BRANCH, [128, FORK])
    reference = logits, adapter.greedy(model, cache, int(logits.argmax(-1)), STEPS)
    suffix = Collector(layout, OTHER, start=FORK)
    resumed = adapter.PrefillRun(
        model,
        layout,
        BRANCH,
        start=FORK,
        cache=adapter.restore(model, layout, FORK, base.buffers, base.manifest.extents),
        block_tokens=BLOCK,
        chunk_tokens=CHUNK,
        on_unit=suffix,
    ).run()
    assert suffix.complete
    restored = adapter.restore(model, layout, OTHER, *stitched(layout, base, suffix))
    assert_same_decode(model, resumed.cache, resumed.logits, reference)
    assert_same_decode(model, restored, resumed.logits, reference)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_zeroing_one_layer_of_a_group_changes_the_logits(load, name):
    model, layout = load(name)
    sent = Collector(layout, OTHER)
    result = adapter.PrefillRun(model, layout, BRANCH, block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=sent).run()
    _, digest, _ = adapter.greedy(model, result.cache, result.first_token, 4)
    for index, group in enumerate(layout.groups):
        buffers = dict(sent.buffers)
        for slot in layout.by_layer[group.layers[0]]:
            if slot.group == index:
                buffers[slot.layer, slot.tensor] = bytes(len(buffers[slot.layer, slot.tensor]))
        cache = adapter.restore(model, layout, OTHER, buffers, sent.manifest.extents)
        assert adapter.greedy(model, cache, result.first_token, 4)[1] != digest, group.name


# -- layouts -----------------------------------------------------------------------------------


def test_layouts_say_what_the_architectures_are(load):
    kimi = load("kimi_linear")[1]
    mla, kda = kimi.groups
    assert [(g.kind, g.layers) for g in kimi.groups] == [(GroupKind.FULL, (3,)), (GroupKind.RECURRENT, (0, 1, 2))]
    assert [(t.name, t.shape, t.shard_axis) for t in mla.tensors] == [
        ("keys", (1, 64), None),
        ("values", (1, 16), None),
    ]
    assert [(t.name, t.dtype) for t in kda.tensors] == [("conv.0", "bfloat16"), ("recurrent.0", "float32")]
    falcon = load("falcon_h1")[1]
    assert [(g.kind, g.layers) for g in falcon.groups] == [
        (GroupKind.FULL, (0, 1, 2)),
        (GroupKind.RECURRENT, (0, 1, 2)),
    ]
    assert [s.spec.name for s in falcon.by_layer[1]] == ["keys", "values", "conv.0", "recurrent.0"]
    gemma = load("gemma3")[1]
    assert [(g.kind, g.window, len(g.layers)) for g in gemma.groups] == [
        (GroupKind.FULL, None, 1),
        (GroupKind.SLIDING, 64, 5),
    ]
    assert gemma.groups[0].tensors[0].shard_axis == 0
    assert load("nemotron_h")[1].layers == (0, 2, 3)
    assert [t.name for t in load("lfm2")[1].groups[1].tensors] == ["conv.0"]


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_config_gives_the_layout_of_its_model(load, name):
    model, layout = load(name)
    probed = adapter.layout_of(tiny_models.tiny_config(name), block_tokens=BLOCK, revision=layout.revision)
    assert probed.fingerprint(BLOCK) == layout.fingerprint(BLOCK)
    assert layout.model == model.config.model_type


def test_fingerprints_follow_the_weights(load, tmp_path):
    _, layout = load("lfm2")
    same = tiny_models.load_tiny(tiny_models.save_tiny("lfm2", tmp_path / "same", seed=0))
    other = tiny_models.load_tiny(tiny_models.save_tiny("lfm2", tmp_path / "other", seed=1))
    assert adapter.layout_of(same).fingerprint(BLOCK) == layout.fingerprint(BLOCK)
    assert adapter.layout_of(other).fingerprint(BLOCK) != layout.fingerprint(BLOCK)


def test_saving_a_model_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny_models.save_tiny("lfm2", tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_cache_classes_and_unfitting_blocks_are_refused_by_name(load, monkeypatch):
    model, _ = load("lfm2")
    known = {k: v for k, v in hf_layout._ATTENTION.items() if k != "DynamicLayer"}
    monkeypatch.setattr(hf_layout, "_ATTENTION", known)
    with pytest.raises(LayoutError, match="layer 2 keeps its cache in a DynamicLayer"):
        adapter.layout_of(model)
    with pytest.raises(LayoutError, match="blocks of 48 tokens"):
        adapter.layout_of(model, block_tokens=48)


def test_models_that_keep_state_outside_the_cache_are_refused():
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.RecurrentGemmaConfig(**sizes, num_hidden_layers=3, lru_width=64, attention_window_size=64)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(LayoutError, match="layer 0 of RecurrentGemmaForCausalLM kept nothing in its cache"):
        adapter.layout_of(model)
    config = transformers.MiniMaxConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(LayoutError, match="MiniMaxForCausalLM does not run with a DynamicCache: MiniMax uses cache of"):
        adapter.layout_of(model)


# -- prefill -----------------------------------------------------------------------------------


def test_layers_are_handed_over_while_later_ones_are_not_computed(load):
    model, layout = load("qwen3_next")
    seen = []
    cache = hf_layout.new_cache(model)

    def on_unit(layer, tensor, data, first, tokens):
        if layer < 7:
            seen.append((layer, first, tokens, cache.layers[7].get_seq_length()))

    adapter.PrefillRun(
        model, layout, PROMPT[:200], cache=cache, block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=on_unit
    ).run()
    # Chunk by chunk, in each the full-attention layer 3; states only at the boundary; layer 7 always one chunk behind.
    assert seen[:2] == [(3, 0, 128, 0)] * 2
    assert [row[0] for row in seen[2:]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert {row[3] for row in seen[2:]} == {128}
    assert {row[1:3] for row in seen[2:]} == {(200, 0), (128, 72)}


@pytest.mark.parametrize("name", ["gemma3", "falcon_h1"])
def test_a_model_without_visible_decoder_layers_gives_the_same_bytes(load, name, monkeypatch):
    model, layout = load(name)
    hooked, flushed = Collector(layout, OTHER), Collector(layout, OTHER)
    adapter.PrefillRun(model, layout, BRANCH, block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=hooked).run()
    monkeypatch.setattr(adapter, "_decoder_layers", lambda *_: ())
    adapter.PrefillRun(model, layout, BRANCH, block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=flushed).run()
    assert flushed.buffers == hooked.buffers
    assert sorted(flushed.order) == sorted(hooked.order)


def test_whole_blocks_of_a_window_are_stored_though_the_cache_crops(load):
    model, layout = load("gemma3")
    sent = Collector(layout, 300, checkpoints=[128])
    adapter.PrefillRun(
        model, layout, PROMPT[:300], checkpoints=[128], block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=sent
    ).run()
    extent = sent.manifest.extent(0, 0)
    assert extent.spans == (Span(64, 64), Span(224, 76))  # 300 - 63 = 237, down to a block of 16: 224
    assert sent.complete


def test_units_own_their_memory(load):
    model, layout = load("kimi_linear")
    units, copies = [], []

    def on_unit(layer, tensor, data, first, tokens):
        units.append(data)
        copies.append(bytes(data))

    result = adapter.PrefillRun(model, layout, PROMPT, checkpoints=[64, 128], on_unit=on_unit).run()
    adapter.greedy(model, result.cache, result.first_token, 4)
    assert [bytes(unit) for unit in units] == copies
    digest = adapter.greedy(model, plain(model, PROMPT, [256])[1], result.first_token, 4)[1]
    for unit in units:
        unit[:] = bytes(len(unit))  # overwriting them reaches no cache
    again = adapter.PrefillRun(model, layout, PROMPT, on_unit=lambda layer, tensor, data, first, tokens: None).run()
    assert adapter.greedy(model, again.cache, again.first_token, 4)[1] == digest


def test_a_failing_consumer_ends_the_run_and_leaves_no_hooks(load):
    model, layout = load("gemma3")
    cache = hf_layout.new_cache(model)

    def on_unit(layer, tensor, data, first, tokens):
        raise RuntimeError("the link is down")

    run = adapter.PrefillRun(model, layout, PROMPT, cache=cache, on_unit=on_unit)
    with pytest.raises(RuntimeError, match="the link is down"):
        run.run()
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("update" in vars(layer) for layer in cache.layers)
    with pytest.raises(LayoutError, match="has run"):
        run.run()


def test_a_resumed_run_is_cut_where_the_whole_one_is(load):
    model, layout = load("nemotron_h")
    sent = Collector(layout, 257, checkpoints=[128, 192])
    whole = adapter.PrefillRun(
        model, layout, PROMPT[:257], checkpoints=[128, 192], block_tokens=BLOCK, chunk_tokens=CHUNK, on_unit=sent
    )
    assert whole.chunks == ((0, 128), (128, 192), (192, 256), (256, 257))
    logits = whole.run().logits
    for start, chunks in ((128, ((128, 192), *whole.chunks[2:])), (192, whole.chunks[2:])):
        cache = adapter.restore(model, layout, start, sent.buffers, sent.manifest.extents)
        points = [192] if start == 128 else []
        resumed = adapter.PrefillRun(
            model, layout, PROMPT[:257], start=start, cache=cache, checkpoints=points, chunk_tokens=CHUNK
        )
        assert resumed.chunks == chunks
        assert torch.equal(resumed.run().logits, logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundary": 400}, "needs that many tokens, got 333"),
        ({"chunk_tokens": 96}, "chunks of 96 tokens: must be a multiple of 64"),
        ({"chunk_tokens": 64, "block_tokens": 128}, "of the block size 128"),
        ({"checkpoints": [100]}, "checkpoint 100 is not a multiple of 64"),
        ({"start": 100}, "start 100 is not a multiple of 64"),
        ({"start": 64}, "layer 2 of the cache holds 0 tokens, a prefill from 64 needs them all"),
        ({"checkpoints": [64], "start": 64}, "checkpoints must lie in"),
        ({"boundary": 0}, "0 <= start < boundary"),
    ],
)
def test_bad_prefills_are_refused(load, arguments, message):
    model, layout = load("lfm2")
    with pytest.raises(LayoutError, match=message):
        adapter.PrefillRun(model, layout, PROMPT, **arguments)


def test_a_layout_of_a_deeper_model_is_refused(load):
    model, _ = load("lfm2")
    _, layout = load("qwen3_next")
    with pytest.raises(LayoutError, match="the model has 4 layers, the layout of 'qwen3_next' names layer 7"):
        adapter.PrefillRun(model, layout, PROMPT)
    with pytest.raises(LayoutError, match="names layer 7"):
        adapter.restore(model, layout, 64, {}, layout.extents(64))


# -- restoring ---------------------------------------------------------------------------------


def test_a_cache_is_not_given_out_before_every_layer_is_there(load):
    model, layout = load("lfm2")
    sent = Collector(layout, 70)
    result = adapter.PrefillRun(model, layout, PROMPT[:70], on_unit=sent).run()
    building = adapter.CacheRestore(model, layout, 70, sent.manifest.extents)
    for layer in (3, 0, 2):
        building.load(layer, {t: data for (held, t), data in sent.buffers.items() if held == layer})
    with pytest.raises(LayoutError, match="1 layers were not loaded, the first is layer 1"):
        building.finish()
    building.load(1, {0: sent.buffers[1, 0]})
    digest = adapter.greedy(model, result.cache, result.first_token, 4)[1]
    assert set(layout.layers) == {0, 1, 2, 3}
    for buffer in sent.buffers.values():
        buffer[:] = bytes(len(buffer))  # loaded means copied
    assert adapter.greedy(model, building.finish(), result.first_token, 4)[1] == digest


def test_a_cache_is_restored_from_scattered_pages(load):
    model, layout = load("kimi_linear")
    sent = Collector(layout, OTHER)
    result = adapter.PrefillRun(model, layout, BRANCH, on_unit=sent).run()
    paged = {}
    for slot, data in sent.buffers.items():
        order = range(-(-len(data) // 1000) - 1, -1, -1)  # the pages lie backwards in memory
        base = bytearray(1000 * len(order))
        paged[slot] = PageList.pages(base, [1000 * i for i in order], 1000, len(data))
        paged[slot].copy_from(PageList.of(data))
    cache = adapter.restore(model, layout, OTHER, paged, sent.manifest.extents)
    expected = adapter.greedy(model, result.cache, result.first_token, 4)[1]
    assert adapter.greedy(model, cache, result.first_token, 4)[1] == expected


def test_bytes_that_are_not_the_extents_are_refused(load):
    model, layout = load("lfm2")
    extents = layout.extents(128, start=64)
    with pytest.raises(LayoutError, match=r"layer 2 tensor 0 of this transfer does not hold tokens 0\.\.128"):
        adapter.CacheRestore(model, layout, 128, extents)
    extents = layout.extents(128)
    with pytest.raises(LayoutError, match="does not hold the state at 64"):
        adapter.CacheRestore(model, layout, 64, extents)
    with pytest.raises(LayoutError, match=r"layer 3 tensor 0 \(conv.0\) is not in the transfer"):
        adapter.CacheRestore(model, layout, 128, extents[:-1])
    building = adapter.CacheRestore(model, layout, 128, extents)
    with pytest.raises(LayoutError, match=r"layer 0 tensor 0 \(conv.0\): 3 bytes given, the transfer holds 768"):
        building.load(0, {0: b"abc"})
    with pytest.raises(LayoutError, match=r"layer 2 tensor 1 \(values\): no bytes given"):
        building.load(2, {0: bytes(extents[2].nbytes)})
    with pytest.raises(LayoutError, match="layer 9 caches nothing"):
        building.load(9, {})
    _, other = load("falcon_h1")
    with pytest.raises(LayoutError, match="the transfer has 768 bytes a token or state, the layout 128"):
        adapter.CacheRestore(load("falcon_h1")[0], other, 128, extents)


def test_the_layout_of_another_architecture_does_not_install(load):
    model, _ = load("nemotron_h")
    _, layout = load("kimi_linear")
    extents = layout.extents(64)
    buffers = {(e.layer, e.tensor): bytes(e.nbytes) for e in extents}
    with pytest.raises(LayoutError, match=r"layer 1 is a DummyLayer without conv\.0"):
        adapter.restore(model, layout, 64, buffers, extents)


# -- without the extra -------------------------------------------------------------------------


def test_the_modules_import_without_torch_and_say_what_to_install():
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from kvpool.engines import transformers as t, tiny_models as m\n"
        "from kvtransport.errors import ConfigError\n"
        "for call in (lambda: t.layout_of(None), lambda: m.tiny_config('lfm2'), lambda: t.greedy(None, None, 0, 1)):\n"
        "    try: call()\n"
        "    except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("pip install 'kvtransport[engines]'" in line for line in lines)


def test_unknown_tiny_models_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no tiny model 'gpt2'; there are qwen3_next"):
        tiny_models.save_tiny("gpt2", tmp_path)
