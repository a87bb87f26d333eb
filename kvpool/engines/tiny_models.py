"""Tiny, randomly initialised models of real hybrid architectures, for demos and tests on a CPU.

Their caches have every shape the adapter must carry: GQA, MLA (keys and values of different widths), an
indexer's keys, sliding windows, KDA, gated delta net, Mamba-2 and convolution states, attention and state in
one layer. Outputs are meaningless but depend on every cached byte that matters: the initialiser is large, so that
logits are far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvtransport.errors import ConfigError

from .hf_layout import require

VOCABULARY = 512
INITIALIZER_RANGE = 0.2

_BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
}
_GQA = {**_BASE, "max_position_embeddings": 4096, "num_key_value_heads": 2}
_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
}
_DELTA_NET = {
    **_GQA,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_KDA = {
    **_MLA,
    "model_max_length": 4096,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "linear_head_dim": 32,
    "linear_num_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (config class of transformers, its arguments)
_CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_DELTA_NET,
            "num_hidden_layers": 8,
            "full_attention_interval": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {**_DELTA_NET, "num_hidden_layers": 4}),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_KDA,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_MLA,
            "max_position_embeddings": 4096,
            "num_hidden_layers": 3,
            "q_lora_rank": 32,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        {
            **_MLA,
            "max_position_embeddings": 4096,
            "num_hidden_layers": 3,
            "q_lora_rank": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "index_topk": 64,
            "index_head_dim": 32,
            "index_n_heads": 2,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GQA,
            "head_dim": 32,
            "num_hidden_layers": 6,
            "sliding_window": 64,
            "tie_word_embeddings": False,  # tied and random, it repeats its last token for ever
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            **_GQA,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_GQA,
            "head_dim": 32,
            "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 64,
        },
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        {
            **_KDA,
            "num_hidden_layers": 6,
            "layer_types": ["linear_attention"] * 5 + ["full_attention"],
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
            "num_expert_group": 2,
            "topk_group": 1,
        },
    ),
    "lfm2": ("Lfm2Config", {**_GQA, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}),
}

NAMES: tuple[str, ...] = tuple(_CONFIGS)
"""The architectures there are tiny models of."""


def tiny_config(name: str) -> Any:
    """The transformers config of a tiny model (bfloat16); raises ConfigError for a name that is not in NAMES."""
    if name not in _CONFIGS:
        raise ConfigError(f"no tiny model {name!r}; there are {', '.join(NAMES)}")
    kind, arguments = _CONFIGS[name]
    transformers = require("transformers")
    make: Callable[..., Any] | None = getattr(transformers, kind, None)
    if make is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no {kind}: tiny model {name!r} needs 5.20 or later"
        )
    # Copied: configs keep the lists they are given.
    config = make(**{key: list(value) if isinstance(value, list) else value for key, value in arguments.items()})
    config.initializer_range = INITIALIZER_RANGE
    config.dtype = require("torch").bfloat16
    return config


def save_tiny(name: str, directory: str | Path, seed: int = 0) -> Path:
    """Write the tiny model ``name`` with the weights of ``seed`` (config and safetensors); returns the directory.

    The weights depend on name and seed alone; the caller's random state is left as it was.
    """
    torch, transformers = require("torch"), _quiet_transformers()
    config = tiny_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16)
    model.save_pretrained(directory)
    return Path(directory)


def load_tiny(directory: str | Path) -> Any:
    """Load a model :func:`save_tiny` wrote, from disk alone, ready to compare runs bitwise.

    Sets torch to one thread and deterministic algorithms *for the process*: the order of sums is part of the result.
    """
    torch, transformers = require("torch"), _quiet_transformers()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, local_files_only=True)
    return model.eval()


def _quiet_transformers() -> Any:
    """transformers without progress bars and without notices about missing CUDA kernels (for the process)."""
    transformers = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def random_tokens(count: int, seed: int, vocabulary: int = VOCABULARY) -> list[int]:
    """``count`` token ids from ``seed``, the same everywhere; 0..2 (padding, begin, end) never occur."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, vocabulary, count)]
