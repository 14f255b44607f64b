"""Tiny random models of transformers, the independent reference of the model and convert tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
TOP_2 = {"num_experts_per_tok": 2}
MOE = TOP_2 | {"moe_intermediate_size": 24, "num_experts": 6}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEEPSEEK = TOP_2 | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_nextn_predict_layers": 0,
}

GLM = TOP_2 | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "head_dim": 12,
    "num_mtp_layers": 0,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.5,
    "logits_scaling": 1.7,
}
ERNIE = {"moe_k": 2, "moe_num_experts": 6, "moe_intermediate_size": 24, "moe_num_shared_experts": 2}

# name -> (model_type, settings beside BASE): each class as released, and the options that its checkpoints use
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 10}),  # as SmolLM2
    "llama-biases-llama3-geglu": (
        "llama",
        {"attention_bias": True, "rope_parameters": LLAMA3, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma": ("gemma", {"head_dim": 10, "num_key_value_heads": 1}),
    "arcee": ("arcee", {}),
    "arcee-gelu-yarn": ("arcee", {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-full-reglu": ("mistral", {"sliding_window": None, "head_dim": 10, "hidden_act": "relu"}),
    "qwen2": ("qwen2", {}),
    "qwen2-some-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-biases-windows": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
    ),
    "granite": ("granite", GRANITE | {"attention_bias": True}),
    "granitemoe": ("granitemoe", GRANITE | TOP_2 | {"num_local_experts": 6, "tie_word_embeddings": True}),
    "granitemoeshared": (
        "granitemoeshared",
        GRANITE | TOP_2 | {"num_local_experts": 6, "shared_intermediate_size": 28, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "olmo2": ("olmo2", {}),
    "flex_olmo": ("flex_olmo", TOP_2 | {"num_experts": 6}),
    "flex_olmo-renormalised-biases": (
        "flex_olmo",
        TOP_2 | {"num_experts": 6, "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", TOP_2 | {"num_local_experts": 6, "head_dim": 8}),
    "mixtral-window-tied": (
        "mixtral",
        TOP_2 | {"num_local_experts": 6, "head_dim": 8, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", MOE | {"head_dim": 10, "norm_topk_prob": True}),
    "qwen3_moe-dense-layer-reglu": (
        "qwen3_moe",
        MOE
        | {
            "head_dim": 8,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "hidden_act": "relu",
        },
    ),
    "olmoe": ("olmoe", TOP_2 | {"num_experts": 6}),
    "olmoe-clip-llama3": (
        "olmoe",
        TOP_2
        | {
            "num_experts": 6,
            "clip_qkv": 0.9,
            "norm_topk_prob": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3-yarn-plain-queries": (
        "deepseek_v3",
        DEEPSEEK | {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}),
    "deepseek_v2-lite-yarn": (
        "deepseek_v2",
        DEEPSEEK | {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "glm4_moe": ("glm4_moe", GLM | {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5}),
    "glm4_moe-whole-heads-groups-geglu": (
        "glm4_moe",
        GLM
        | {
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "ernie4_5_moe": ("ernie4_5_moe", ERNIE),
    "ernie4_5_moe-every-other": (
        "ernie4_5_moe",
        ERNIE | {"moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 0, "head_dim": 10},
    ),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 28}),
    "gpt_oss": (
        "gpt_oss",
        TOP_2
        | {
            "num_local_experts": 6,
            "head_dim": 8,
            "sliding_window": 5,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """transformers' model ``name`` with every parameter random (norms, biases and sinks too), eager implementations."""
    model_type, settings = MODELS[name]
    config = AutoConfig.for_model(model_type, **(BASE | settings))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.state_dict().items():
            random = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            scale = 0.1 if p.dim() == 1 else 0.2  # large enough that attention and routing are not flat
            p.copy_((1.0 if key.endswith("norm.weight") else 0.0) + scale * random)
    return model


def tokens(batch: int = 2, seq_len: int = 17, seed: int = 1) -> torch.Tensor:
    """Random ids (B, S) of the tiny vocabulary."""
    return torch.randint(0, BASE["vocab_size"], (batch, seq_len), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Let transformers' code compute in float64 where it names float32.

    Its classes cast to float32 inside norms, softmax, rotary tables and routers, whatever the model's dtype. While this
    is in force the names they use for float32 mean float64, so a float64 model of theirs is exact to float64 and can be
    a reference at 1e-9. Only transformers' code should run inside; nothing of the formulas changes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
