"""DeepSeek-V3 (arXiv 2412.19437), also Moonlight and Kimi-K2: transformers' DeepseekV3ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, register, shared_to_count
from moetrain.convert.parts import BIAS, DENSE, EXPERTS, FUSED, MLA, SHARED, TRUNK


@register
class DeepseekV3(Family):
    """Latent attention; sigmoid scores with a bias for choosing, in groups; shared experts; leading dense layers."""

    name = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.qk_nope_head_dim": "qk_nope_head_dim",
        "attention.qk_rope_head_dim": "qk_rope_head_dim",
        "attention.v_head_dim": "v_head_dim",
        "rope.interleaved": "rope_interleave",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "n_routed_experts",
        "moe.expert_dim": "moe_intermediate_size",
        "moe.first_dense": "first_k_dense_replace",
        "router.renormalize": "norm_topk_prob",
        "router.scale": "routed_scaling_factor",
        "router.n_groups": "n_group",
        "router.topk_groups": "topk_group",
    }
    implied: ClassVar = {"attention.kind": "mla", "router.score": "sigmoid", "router.group_score": "top2_sum"}
    fixed: ClassVar = {
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    rules = (*TRUNK, *MLA, *DENSE, *EXPERTS, *SHARED, BIAS)
    in_memory = FUSED
    zeros = (BIAS,)
    # the multi-token prediction layer comes after the last decoder layer
    ignored = (r"model\.layers\.{n_layers}\..*",)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"moe.shared_dim": hf["n_shared_experts"] * hf["moe_intermediate_size"]}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "num_key_value_heads": cfg.attention.n_heads,
            "n_shared_experts": max(1, shared_to_count(cfg)),  # the class cannot do without
            "num_nextn_predict_layers": 0,
        }
