"""GPT-OSS (arXiv 2508.10925): transformers' GptOssForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, register, windows_from_layer_types, windows_to_layer_types
from moetrain.convert.layout import rule
from moetrain.convert.parts import GQA, TRUNK

_MLP = "model.layers.{l}.mlp."
_EXPERTS = _MLP + "experts."


@register
class GptOss(Family):
    """Grouped-query attention with sinks and alternating windows; biases everywhere; clamped SwiGLU experts."""

    name = "gpt_oss"
    architecture = "GptOssForCausalLM"
    fields: ClassVar = {
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "attention.sliding_window": "sliding_window",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "num_local_experts",
        "moe.expert_dim": "intermediate_size",
    }
    implied: ClassVar = {
        "attention.sinks": True,
        "moe.activation": "gpt_oss",
        "moe.bias": True,
        "router.order": "topk_then_score",
        "router.logits_bias": True,
    }
    fixed: ClassVar = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    activations: ClassVar = {"silu": "swiglu"}  # which no part of the class has
    rules = (
        *TRUNK,
        *GQA,
        rule("layers.{l}.attention.sinks", "model.layers.{l}.self_attn.sinks"),
        rule("layers.{l}.moe.router.weight", _MLP + "router.weight"),
        rule("layers.{l}.moe.router.bias", _MLP + "router.bias"),
        rule("layers.{l}.moe.experts.w13", _EXPERTS + "gate_up_proj", rearrange="e p f d -> e d (f p)"),
        rule("layers.{l}.moe.experts.b13", _EXPERTS + "gate_up_proj_bias", rearrange="e p f -> e (f p)"),
        rule("layers.{l}.moe.experts.w2", _EXPERTS + "down_proj", rearrange="e d f -> e f d"),
        rule("layers.{l}.moe.experts.b2", _EXPERTS + "down_proj_bias"),
    )

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return windows_from_layer_types(hf)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        # the class makes a mask of it although no layer may use it
        return {"sliding_window": cfg.attention.sliding_window or cfg.max_seq_len} | windows_to_layer_types(cfg)
