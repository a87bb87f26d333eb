"""Cache bytes to code: normal bfloat16, and the caches of tiny models with random weights, prefilled here."""

from __future__ import annotations

import tempfile
from collections import defaultdict

import numpy as np

MODELS = ("kimi_linear", "qwen3_next", "gemma3", "falcon_h1")


def normal(nbytes: int) -> np.ndarray:
    values = np.random.default_rng(7).standard_normal(nbytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def caches(tokens: int) -> dict[str, list[np.ndarray]]:
    """The bfloat16 bytes of each model's cache after a prefill of random tokens, tensor by tensor."""
    from kvpool.engines.tiny_models import load_tiny, random_tokens, save_tiny
    from kvpool.engines.transformers import PrefillRun, layout_of

    found: dict[str, list[np.ndarray]] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            model = load_tiny(save_tiny(name, directory))
        layout = layout_of(model)
        slots = {(s.layer, s.tensor): s for s in layout.slots()}
        parts: dict[tuple[int, int], list[bytes]] = defaultdict(list)

        def keep(layer: int, tensor: int, data: memoryview, first: int, count: int, slots=slots, parts=parts) -> None:
            if slots[layer, tensor].spec.dtype == "bfloat16":
                parts[layer, tensor].append(bytes(data))

        PrefillRun(model, layout, random_tokens(tokens, 3), on_unit=keep).run()
        found[name] = [np.frombuffer(b"".join(data), np.uint8) for data in parts.values()]
    return found
