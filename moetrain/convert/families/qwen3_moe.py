"""Qwen3-MoE (arXiv 2505.09388): transformers' Qwen3MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, layers_from_qwen, layers_to_qwen, register
from moetrain.convert.parts import DENSE, EXPERTS, FUSED, GQA, TRUNK


@register
class Qwen3Moe(Family):
    """Grouped-query attention with RMSNorm on every query and key head; softmax scores, renormalised or not."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "attention.sliding_window": "sliding_window",
        "moe.top_k": "num_experts_per_tok",
        "moe.expert_dim": "moe_intermediate_size",
        "router.renormalize": "norm_topk_prob",
    }
    implied: ClassVar = {"attention.qk_norm": "head"}
    rules = (*TRUNK, *GQA, *DENSE, *EXPERTS)
    in_memory = FUSED

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return layers_from_qwen(hf)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"use_sliding_window": cfg.attention.sliding_window is not None} | layers_to_qwen(cfg)
