"""Tiny random models in the shapes vLLM runs on a CPU; one for every kind of cache.

vLLM wants real weights (its dummy loader emits one constant token) and dimensions its CPU kernels accept, hence not
the smaller models of :mod:`kvpool.engines.tiny_models`. The initialiser is large, so that logits lie far apart
and every cached byte that matters can change a token.

    python -m tests.engines.models qwen3_next DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 1_024
MAX_TOKENS = 4_096

_BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 2 * MAX_TOKENS,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Model:
    """A tiny model: the transformers config class with its arguments, and what its cache has."""

    config: str
    arguments: Mapping[str, Any]
    caches: str
    recurrent: bool = False
    initializer_range: float = 0.15


MODELS: Mapping[str, Model] = {
    "qwen3_next": Model(
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "full_attention_interval": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "decoder_sparse_step": 1,
        },
        "6 gated-delta-net states, 2 full attention",
        recurrent=True,
    ),
    "gemma3": Model(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 256,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        "5 sliding window (256), 1 full attention",
    ),
    "deepseek_v3": Model(
        "DeepseekV3Config",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "topk_method": "noaux_tc",  # vLLM creates the correction bias only when told
            "q_lora_rank": 64,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
        },
        "3 MLA",
    ),
    "llama": Model(
        "LlamaConfig",
        {"num_hidden_layers": 12, "num_key_value_heads": 2, "head_dim": 64},
        "12 full attention",
    ),
}


def save(name: str, directory: Path, seed: int = 0) -> Path:
    """Write config and weights of ``name`` into ``directory``; the bytes depend on name and seed alone."""
    import torch
    import transformers

    model = MODELS[name]
    config = getattr(transformers, model.config)(**{**_BASE, **model.arguments})
    config.initializer_range = model.initializer_range
    config.dtype = torch.bfloat16
    torch.manual_seed(seed)
    weights = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in weights.named_parameters():
            # Decays near 1, so that the state remembers the beginning of the prompt.
            if "A_log" in key:
                parameter.uniform_(0.5, 2).log_()
            elif "dt_bias" in key:
                parameter.uniform_(-3, 0)
    weights.to(torch.bfloat16).save_pretrained(directory)
    return directory


def prompt(tokens: int, seed: int) -> list[int]:
    """``tokens`` token ids, the same everywhere for one seed; 0..2 (padding, begin, end) never occur."""
    import numpy as np

    return [int(i) for i in np.random.default_rng(seed).integers(3, VOCABULARY, tokens)]


def main(names: list[str], directory: Path) -> None:
    """Write the models ``names``, each into its own folder of ``directory``; prints one JSON object."""
    print(json.dumps({name: str(save(name, directory / name)) for name in names}))


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]))
