"""The Hugging Face transformers adapter: prefill layer by layer, restore exactly, decode.

transformers keeps a request's cache in a ``DynamicCache``, one object per layer. This module turns it into
the bytes of a :class:`~kvtransport.layout.CacheLayout` and back:

* :func:`layout_of` reads the geometry off a probe, two tokens run through the model, so that it holds for every
  architecture whose layers use the stock cache classes.
* :class:`PrefillRun` computes a prompt in chunks and hands over each layer's new bytes as soon as that layer
  is computed, recurrent states only at the positions where they are wanted.
* :class:`CacheRestore` and :func:`restore` build a cache from such bytes, layer by layer or at once.
* :func:`greedy` decodes and digests the raw logits, to compare runs bit by bit.

**Bytes.** transformers keeps ``[1, heads, tokens, dim]``; a layout is token-major: ``[tokens, heads, dim]``,
so that any token range is one run of bytes. Recurrent states keep their shape without the batch axis.
Batch size is always 1, tensor parallelism 1.

**Bitwise means cut alike.** Where a prefill is cut into chunks is part of its result: it decides the shapes of the
matrix products and which sub-chunks of 64 tokens a linear-attention kernel sees. Runs cut at the same places give
the same bits, whether their cache was computed or restored; other cuts may change the last bit (on CPU in
bfloat16: seldom at multiples of 64, more often with Mamba-2 and with sliding layers, which crop to their window).
Hence chunks end at multiples of ``chunk_tokens`` counted from the start of the *prompt*, checkpoints and resume
positions are multiples of :data:`GRID`, and a run resumed at p is bitwise the whole run that was also cut at p.

torch and transformers are imported when first needed; without them every call raises ConfigError naming the extra.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvtransport.buffers import PageList
from kvtransport.errors import LayoutError
from kvtransport.layout import CacheLayout, Extent, GroupKind, LayerTensor

from .hf_layout import (
    GRID,
    STATES,
    device_of,
    layout_of,
    new_cache,
    require,
    state_tensors,
    token_tensors,
    weights_digest,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "GRID",
    "CacheRestore",
    "OnUnit",
    "PrefillResult",
    "PrefillRun",
    "greedy",
    "layout_of",
    "require",
    "restore",
    "weights_digest",
]


class OnUnit(Protocol):
    """Receives a ready unit: the arguments of ``OutgoingTransfer.ready``.

    ``data`` is writable CPU memory of its own (uint8, contiguous), alive as long as it is referenced and never written
    again: ``tokens`` tokens from ``first``, or with ``tokens == 0`` the state at ``first``. Called in the thread
    that computes, between two layers; blocking in it is back-pressure, raising in it ends the run.
    """

    def __call__(self, layer: int, tensor: int, data: memoryview, first: int, tokens: int) -> None: ...


# -- prefill -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefillResult:
    """``cache`` continues at the boundary; ``logits`` [1, vocabulary] predict the token there."""

    cache: Any
    logits: torch.Tensor

    @property
    def first_token(self) -> int:
        """The greedy choice for the token at the boundary."""
        return int(self.logits.argmax(-1))


class PrefillRun:
    """Prefill of ``tokens[start:boundary]``, handing over what ``layout.extents`` of it holds.

    ``tokens`` is the prompt from its first token on, ``boundary`` defaults to its length. ``start > 0`` resumes on a
    ``cache`` that ends there (:func:`restore`). Computed in chunks that end at multiples of ``chunk_tokens``
    (itself one of ``block_tokens`` and :data:`GRID`), at every position of ``checkpoints`` and at the boundary;
    without ``on_unit`` it is the reference to compare others with.

    Raises LayoutError for positions off the grid, a cache of another length, too few tokens.
    """

    def __init__(
        self,
        model: Any,
        layout: CacheLayout,
        tokens: Sequence[int],
        *,
        boundary: int | None = None,
        start: int = 0,
        cache: Any = None,
        checkpoints: Iterable[int] = (),
        block_tokens: int = GRID,
        chunk_tokens: int = 4 * GRID,
        on_unit: OnUnit | None = None,
    ) -> None:
        boundary = len(tokens) if boundary is None else boundary
        points = sorted({*checkpoints} - {boundary})
        if boundary > len(tokens):
            raise LayoutError(f"a prefill up to {boundary} needs that many tokens, got {len(tokens)}")
        if chunk_tokens < 1 or chunk_tokens % math.lcm(GRID, block_tokens):
            raise LayoutError(
                f"chunks of {chunk_tokens} tokens: must be a multiple of {GRID} and of the block size {block_tokens}"
            )
        for what, at in (("start", start), *(("checkpoint", point) for point in points)):
            if at % GRID:
                raise LayoutError(f"{what} {at} is not a multiple of {GRID}: a prefill split there is not exact")
        self.extents = layout.extents(boundary, start=start, checkpoints=points, align=block_tokens)
        """What the run hands over; equal to those of the manifest made with the same arguments."""
        self.chunks = _cut(start, boundary, chunk_tokens, points)
        """Token ranges (first, stop) in the order they are computed."""
        self._model = model
        self._cache = new_cache(model) if cache is None else cache
        self._tokens = list(tokens[:boundary])
        self._on_unit = on_unit
        slots = {(slot.layer, slot.tensor): slot for slot in layout.slots()}
        self._plan: dict[int, list[tuple[LayerTensor, Extent]]] = {}
        for extent in self.extents:
            self._plan.setdefault(extent.layer, []).append((slots[extent.layer, extent.tensor], extent))
        _check_depth(self._cache, layout)
        self._attention = {layer for g in layout.groups if g.kind is not GroupKind.RECURRENT for layer in g.layers}
        self._sliding = [layer for g in layout.groups if g.kind is GroupKind.SLIDING for layer in g.layers]
        for layer in sorted(self._attention):
            held = self._cache.layers[layer].get_seq_length()
            if held != start:
                raise LayoutError(
                    f"layer {layer} of the cache holds {held} tokens, a prefill from {start} needs them all"
                )
        self._window: dict[int, dict[str, torch.Tensor]] = {}
        self._chunk = (start, start)
        self._pending: list[int] = []
        self._spent = False

    def run(self) -> PrefillResult:
        """Compute; blocks until the boundary. Once only: a run changes its cache.

        Whatever is raised (also by ``on_unit``), the model is left without hooks.
        """
        if self._spent:
            raise LayoutError("this prefill has run: make a new PrefillRun, its cache is no longer at the start")
        self._spent = True
        torch = require("torch")
        ids = torch.tensor([self._tokens], dtype=torch.long, device=device_of(self._model))
        logits = None
        with ExitStack() as stack, torch.no_grad():
            for layer in self._sliding:
                stack.enter_context(self._recording(layer))
            for index, module in enumerate(_decoder_layers(self._model, len(self._cache.layers))):
                stack.callback(module.register_forward_hook(self._hook(index)).remove)
            for first, stop in self.chunks:
                self._chunk = (first, stop)
                self._pending = list(self._plan)
                out = self._model(
                    input_ids=ids[:, first:stop], past_key_values=self._cache, use_cache=True, logits_to_keep=1
                )
                logits = out.logits[:, -1].clone()
                # A model that does not show its decoder layers has no hooks: its layers are handed over here.
                for layer in list(self._pending):
                    self._hand_over(layer)
        assert logits is not None  # extents() refuses an empty range
        return PrefillResult(self._cache, logits)

    def _hook(self, layer: int) -> Callable[..., None]:
        def after(*_: object) -> None:
            if layer not in self._pending:
                return
            # Believed only if the attention cache has grown: else this is not the module that computes this layer.
            if layer in self._attention and self._cache.layers[layer].get_seq_length() != self._chunk[1]:
                return
            self._hand_over(layer)

        return after

    @contextmanager
    def _recording(self, layer: int) -> Iterator[None]:
        """Keep the keys and values a sliding layer is given: it crops to its window, but whole blocks are stored."""
        target = self._cache.layers[layer]
        update = target.update

        def recorded(key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._window[layer] = {"keys": key_states, "values": value_states}
            return update(key_states, value_states, *args, **kwargs)

        target.update = recorded
        try:
            yield
        finally:
            del target.update
            self._window.pop(layer, None)

    def _hand_over(self, layer: int) -> None:
        """Give ``on_unit`` everything the extents want of ``layer`` in the chunk just computed."""
        self._pending.remove(layer)
        if self._on_unit is None:
            return
        first, stop = self._chunk
        held = self._cache.layers[layer]
        recorded = self._window.get(layer)
        for slot, extent in self._plan[layer]:
            for span in extent.spans:
                if span.tokens == 0:
                    if span.first == stop:
                        self._on_unit(layer, slot.tensor, _bytes_of(state_tensors(held)[slot.spec.name][0]), stop, 0)
                    continue
                low, high = max(first, span.first), min(stop, span.stop)
                if low < high:
                    tensor = (recorded or token_tensors(held))[slot.spec.name]
                    # Counted from the end: the chunk's tokens are the last ones, whatever is held before them.
                    length = tensor.shape[-2]
                    part = tensor.narrow(-2, length - (stop - low), high - low)[0]
                    data = _bytes_of(part.transpose(0, 1) if part.dim() == 3 else part)
                    self._on_unit(layer, slot.tensor, data, low, high - low)


def _cut(start: int, boundary: int, chunk_tokens: int, points: Sequence[int]) -> tuple[tuple[int, int], ...]:
    grid = range(start // chunk_tokens * chunk_tokens + chunk_tokens, boundary, chunk_tokens)
    ends = sorted({*grid, *points, boundary})
    return tuple(zip([start, *ends[:-1]], ends, strict=True))


# -- restoring ---------------------------------------------------------------------------------


class CacheRestore:
    """Builds a cache at ``boundary`` from transferred bytes, layer by layer in any order.

    ``extents`` are those of the transfer's manifest: they say what the bytes given to :meth:`load` are. The
    transfer may hold more than the boundary needs (checkpoints, whole blocks of a window).

    Raises LayoutError when the extents do not hold what the boundary needs.
    """

    def __init__(self, model: Any, layout: CacheLayout, boundary: int, extents: Iterable[Extent]) -> None:
        self._torch = require("torch")
        self._layout, self._boundary = layout, boundary
        self._cache = new_cache(model)
        layers = _decoder_layers(model, len(self._cache.layers))
        self._devices = [device_of(layer, model) for layer in layers or [model] * len(self._cache.layers)]
        by_slot = {(extent.layer, extent.tensor): extent for extent in extents}
        self._wanted: dict[tuple[int, int], tuple[LayerTensor, int, int, int]] = {}
        for slot in layout.slots():
            group = layout.groups[slot.group]
            tokens = group.tokens_needed(boundary)
            extent = by_slot.get((slot.layer, slot.tensor))
            if extent is None:
                raise LayoutError(f"layer {slot.layer} tensor {slot.tensor} ({slot.spec.name}) is not in the transfer")
            if extent.unit != slot.spec.nbytes:
                raise LayoutError(
                    f"layer {slot.layer} {slot.spec.name}: the transfer has {extent.unit} bytes a token or state, "
                    f"the layout {slot.spec.nbytes}"
                )
            begin, end = extent.byte_range(boundary - tokens, tokens)
            self._wanted[slot.layer, slot.tensor] = (slot, extent.nbytes, begin, end)
        _check_depth(self._cache, layout)
        self._missing = set(layout.layers)

    def load(self, layer: int, buffers: Mapping[int, Any]) -> None:
        """Install one layer: tensor number -> the bytes of its extent, a buffer or a ``PageList``.

        They are copied: the buffers are free when this returns. Raises LayoutError for missing or wrong-sized ones.
        """
        if layer not in self._layout.by_layer:
            raise LayoutError(f"layer {layer} caches nothing in the layout of {self._layout.model!r}")
        tensors: dict[str, torch.Tensor] = {}
        for slot in self._layout.by_layer[layer]:
            _, nbytes, begin, end = self._wanted[layer, slot.tensor]
            if slot.tensor not in buffers:
                raise LayoutError(f"layer {layer} tensor {slot.tensor} ({slot.spec.name}): no bytes given")
            where = f"layer {layer} tensor {slot.tensor} ({slot.spec.name})"
            data = _cut_bytes(buffers[slot.tensor], nbytes, begin, end, where)
            flat = data.view(getattr(self._torch, slot.spec.dtype))
            if self._layout.groups[slot.group].kind is GroupKind.RECURRENT:
                tensor = flat.reshape(1, *slot.spec.shape)
            else:
                tensor = flat.reshape(-1, *slot.spec.shape)
                tensor = (tensor.transpose(0, 1).contiguous() if tensor.dim() == 3 else tensor).unsqueeze(0)
            tensors[slot.spec.name] = tensor.to(self._devices[layer])
        _install(self._cache.layers[layer], layer, tensors, self._boundary)
        self._missing.discard(layer)

    def finish(self) -> Any:
        """The ``DynamicCache``; raises LayoutError while layers are missing."""
        if self._missing:
            raise LayoutError(f"{len(self._missing)} layers were not loaded, the first is layer {min(self._missing)}")
        return self._cache


def restore(
    model: Any, layout: CacheLayout, boundary: int, buffers: Mapping[tuple[int, int], Any], extents: Iterable[Extent]
) -> Any:
    """A ``DynamicCache`` that continues at ``boundary``, from (layer, tensor) -> the bytes of its extent.

    Bitwise the cache that produced the bytes: decode from it, or resume a :class:`PrefillRun` when the boundary
    is a multiple of :data:`GRID`. See :class:`CacheRestore` for errors.
    """
    building = CacheRestore(model, layout, boundary, extents)
    for layer, slots in layout.by_layer.items():
        building.load(layer, {s.tensor: buffers[layer, s.tensor] for s in slots if (layer, s.tensor) in buffers})
    return building.finish()


def _install(layer: Any, index: int, tensors: Mapping[str, torch.Tensor], boundary: int) -> None:
    """Make a fresh cache layer what it was: tensors and the flags without which transformers ignores them."""
    for name, tensor in tensors.items():
        kind, _, number = name.partition(".")
        if not hasattr(layer, STATES.get(kind, name)):
            raise LayoutError(f"layer {index} is a {type(layer).__name__} without {name}: not this model's layout")
        if kind in STATES:
            state = int(number)
            getattr(layer, STATES[kind])[state] = tensor
            getattr(layer, f"is_{STATES[kind]}_initialized")[state] = True
            layer.has_previous_state[state] = True  # a state without it is taken for "no past" and overwritten
            if kind == "conv":
                layer.conv_kernel_size[state] = tensor.shape[-1]
            if layer.device is None or kind == "conv":
                layer.dtype, layer.device = tensor.dtype, tensor.device
        elif name == "indexer_keys":
            layer.indexer_keys, layer.is_indexer_initialized = tensor, True
            layer.indexer_dtype, layer.indexer_device = tensor.dtype, tensor.device
        else:
            setattr(layer, name, tensor)
            layer.dtype, layer.device, layer.is_initialized = tensor.dtype, tensor.device, True
    if hasattr(layer, "cumulative_length"):
        # A sliding layer holds its window but counts every token: positions and masks follow the count.
        layer.cumulative_length = boundary


# -- decoding ----------------------------------------------------------------------------------


def greedy(model: Any, cache: Any, first_token: int, steps: int) -> tuple[list[int], str, list[torch.Tensor]]:
    """Decode ``steps`` tokens greedily after ``first_token``, the one at the cache's boundary.

    Returns the tokens (``first_token`` first, ``steps + 1`` of them), the hex SHA-256 over the raw logits bytes of all
    steps in order, and each step's logits [1, vocabulary]. Advances ``cache``.
    """
    torch = require("torch")
    digest = hashlib.sha256()
    tokens, logits = [int(first_token)], []
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.tensor([[tokens[-1]]], dtype=torch.long, device=device_of(model))
            step = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].clone()
            digest.update(_bytes_of(step))
            logits.append(step)
            tokens.append(int(step.argmax(-1)))
    return tokens, digest.hexdigest(), logits


# -- shared --------------------------------------------------------------------------------------


def _decoder_layers(model: Any, count: int) -> Sequence[Any]:
    """The model's decoder layers: the outermost module list of ``count`` distinct entries, or nothing."""
    torch = require("torch")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        (name.count("."), list(module))
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({id(m) for m in module}) == len(module) == count
    ]
    return min(lists, key=lambda found: found[0])[1] if lists else ()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous copy of ``tensor`` as bytes in CPU memory; never a view, which would keep a whole cache alive."""
    torch = require("torch")
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.copy_(tensor)
    return memoryview(copy.reshape(-1).view(torch.uint8).numpy())


def _cut_bytes(buffer: Any, nbytes: int, begin: int, end: int, where: str) -> torch.Tensor:
    """Bytes ``begin..end`` of a buffer or page list that must hold exactly ``nbytes``, copied into torch's memory.

    Not used in place: kernels may take another path, with other bits, over memory aligned otherwise.
    """
    source = buffer if isinstance(buffer, PageList) else PageList.of(buffer)
    if source.nbytes != nbytes:
        raise LayoutError(f"{where}: {source.nbytes} bytes given, the transfer holds {nbytes}")
    lib = require("torch")
    copy: torch.Tensor = lib.empty(end - begin, dtype=lib.uint8)
    PageList.of(copy.numpy()).copy_from(source.slice(begin, end))
    return copy


def _check_depth(cache: Any, layout: CacheLayout) -> None:
    if len(cache.layers) <= layout.layers[-1]:
        raise LayoutError(
            f"the model has {len(cache.layers)} layers, the layout of {layout.model!r} names layer {layout.layers[-1]}"
        )
