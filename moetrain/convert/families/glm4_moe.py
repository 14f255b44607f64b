"""GLM-4.5 and 4.6 (arXiv 2508.06471): transformers' Glm4MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, register, shared_to_count
from moetrain.convert.parts import BIAS, DENSE, EXPERTS, FUSED, GQA, SHARED, TRUNK


@register
class Glm4Moe(Family):
    """Grouped-query attention, heads rotated in part and normalised or not; the experts and router of DeepSeek-V3."""

    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.qkv_bias": "attention_bias",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "n_routed_experts",
        "moe.expert_dim": "moe_intermediate_size",
        "moe.first_dense": "first_k_dense_replace",
        "router.renormalize": "norm_topk_prob",
        "router.scale": "routed_scaling_factor",
        "router.n_groups": "n_group",
        "router.topk_groups": "topk_group",
    }
    implied: ClassVar = {"router.score": "sigmoid", "router.group_score": "top2_sum"}
    rules = (*TRUNK, *GQA, *DENSE, *EXPERTS, *SHARED, BIAS)
    in_memory = FUSED
    zeros = (BIAS,)
    partial_rotary = True
    # the multi-token prediction layer comes after the last decoder layer
    ignored = (r"model\.layers\.{n_layers}\..*",)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attention.qk_norm": "head" if hf["use_qk_norm"] else "none",
            "moe.shared_dim": hf["n_shared_experts"] * hf["moe_intermediate_size"],
        }

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "use_qk_norm": cfg.attention.qk_norm == "head",
            "n_shared_experts": max(1, shared_to_count(cfg)),  # the class cannot do without
            "num_nextn_predict_layers": 0,
        }
