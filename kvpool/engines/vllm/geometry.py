"""A model's caches as vLLM holds them: its layers in wire order, their layout, and when they may leave.

Wire layer i is the i-th name in the order of execution. Layers of vLLM's groups with one rule and one shape are one
group of the layout, whatever groups vLLM made of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvtransport.errors import FingerprintError, LayoutError
from kvtransport.layout import DTYPE_BYTES, CacheGroup, CacheLayout, GroupKind, TensorSpec

from .groups import GroupRule
from .pages import PageShape

_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer: the engine's group it belongs to, its pages, its tensors in page order."""

    name: str
    group: int
    rule: GroupRule
    pages: PageShape
    tensors: tuple[TensorSpec, ...]

    @property
    def recurrent(self) -> bool:
        return self.rule.kind is GroupKind.RECURRENT


def attention_tensors(pages: PageShape, block_tokens: int, dtype: str) -> tuple[TensorSpec, ...]:
    """The one tensor of an attention layer: its pages' bytes, per token. Raises LayoutError where they do not divide."""
    unit, rest = divmod(pages.nbytes, block_tokens)
    size = DTYPE_BYTES.get(dtype, 1)
    if rest or unit % size:
        raise LayoutError(
            f"a page of {pages.nbytes} bytes does not divide into {block_tokens} tokens of {dtype}; compressed caches are not supported"
        )
    return (TensorSpec(f"kv.{pages.order}", dtype if dtype in DTYPE_BYTES else "uint8", (unit // size,)),)


def state_tensors(pages: PageShape, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The states of a recurrent layer, packed one after the other in its page. Raises LayoutError where they do not fill it."""
    tensors = tuple(
        TensorSpec(f"state{i}", dtype, tuple(int(n) for n in shape))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    )
    if sum(t.nbytes for t in tensors) != pages.nbytes:
        raise LayoutError(f"states {tensors} have {sum(t.nbytes for t in tensors)} bytes, their page {pages.nbytes}")
    return tensors


class Geometry:
    """All layers of one rank. ``rules`` are the engine's groups, by its own numbers.

    ``identity``: what must be the same on both sides beyond the layout, since it decides what the bytes of a page mean.
    """

    def __init__(
        self,
        model: str,
        revision: str,
        layers: Iterable[LayerCache],
        rules: Sequence[GroupRule],
        *,
        tp_size: int = 1,
        tp_rank: int = 0,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.identity: Mapping[str, str] = {"model": model, "revision": revision, **(identity or {})}
        self.layers = tuple(sorted(layers, key=lambda layer: _order(layer.name)))
        self.rules = tuple(rules)
        self.index: Mapping[str, int] = {layer.name: i for i, layer in enumerate(self.layers)}
        if not self.layers:
            raise LayoutError("the engine has no cache that could be transferred")
        if len(self.index) != len(self.layers):
            raise LayoutError("two layers have one name")
        self.layout = CacheLayout(model, tuple(_groups(self.layers)), revision, tp_size, tp_rank)

    def describe(self) -> str:
        """One line for a log: layers, bytes, identity."""
        kinds = ", ".join(
            f"{len(group.layers)} {group.kind} ({group.layer_bytes:,} bytes a {'state' if group.kind is GroupKind.RECURRENT else 'token'})"
            for group in self.layout.groups
        )
        known = ", ".join(f"{name} {value or 'unset'}" for name, value in self.identity.items())
        return f"kvtransport carries {len(self.layers)} layers: {kinds}; {known}"

    def check_identity(self, theirs: Mapping[str, object]) -> None:
        """Raises FingerprintError naming what differs in the producer's identity."""
        wrong = [
            f"{name} is {theirs.get(name)!r} on prefill, {ours!r} on decode"
            for name, ours in self.identity.items()
            if theirs.get(name) != ours
        ]
        if wrong:
            raise FingerprintError("the two engines keep different caches: " + "; ".join(wrong))

    @cached_property
    def parts(self) -> tuple[tuple[PageShape, ...], ...]:
        """Per wire layer, per tensor: the pages that hold it."""
        found = []
        for layer in self.layers:
            at, parts = 0, []
            for spec in layer.tensors:
                nbytes = spec.nbytes if layer.recurrent else layer.pages.nbytes
                parts.append(layer.pages.part(at, at + nbytes) if len(layer.tensors) > 1 else layer.pages)
                at += nbytes
            found.append(tuple(parts))
        return tuple(found)

    @cached_property
    def leaves_with(self) -> Mapping[str, tuple[int, ...]]:
        """Attention layer -> wire layers that are surely computed when its hook is called.

        Recurrent layers have no hook: those before it, in the same stack of layers, leave with it. Never a layer of the same
        number (it may run after it) nor of another stack (a draft model); those wait for the end of the step.
        """
        found: dict[str, tuple[int, ...]] = {}
        for i, layer in enumerate(self.layers):
            if layer.recurrent:
                continue
            stack, number = _place(layer.name)
            earlier = [
                j
                for j, other in enumerate(self.layers)
                if other.recurrent and _place(other.name)[0] == stack and _place(other.name)[1] < number
            ]
            found[layer.name] = (*earlier, i)
        return found


def _place(name: str) -> tuple[str, int]:
    """("model.layers", 3) of "model.layers.3.self_attn.attn"; the stack of layers and the number in it."""
    found = _NUMBER.search(name)
    return (name, -1) if found is None else (name[: found.start()], int(found.group()))


def _order(name: str) -> tuple[tuple[int, ...], str]:
    return tuple(int(n) for n in _NUMBER.findall(name)), name


def _groups(layers: Sequence[LayerCache]) -> Iterable[CacheGroup]:
    members: dict[tuple[GroupKind, int, int | None, tuple[TensorSpec, ...]], list[int]] = {}
    for i, layer in enumerate(layers):
        page = 1 if layer.recurrent else layer.rule.block_tokens
        members.setdefault((layer.rule.kind, page, layer.rule.window, layer.tensors), []).append(i)
    for (kind, page, window, tensors), indices in members.items():
        yield CacheGroup(f"{kind}{indices[0]}", kind, tuple(indices), tensors, window, page)
