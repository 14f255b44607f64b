"""DeepSeek-V2 (arXiv 2405.04434), also V2-Lite: transformers' DeepseekV2ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.errors import ConvertError
from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, register, shared_to_count, value_of
from moetrain.convert.parts import DENSE, EXPERTS, FUSED, MLA, SHARED, TRUNK


@register
class DeepseekV2(Family):
    """Latent attention; softmax scores, in groups by their best expert or not; shared experts; leading dense layers."""

    name = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.qk_nope_head_dim": "qk_nope_head_dim",
        "attention.qk_rope_head_dim": "qk_rope_head_dim",
        "attention.v_head_dim": "v_head_dim",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "n_routed_experts",
        "moe.expert_dim": "moe_intermediate_size",
        "moe.first_dense": "first_k_dense_replace",
        "router.scale": "routed_scaling_factor",
    }
    implied: ClassVar = {
        "attention.kind": "mla",
        "rope.interleaved": True,
        "router.renormalize": False,
        "router.group_score": "max",
    }
    # the class ignores norm_topk_prob, so a model that needs it would be another one there
    fixed: ClassVar = {
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    }
    rules = (*TRUNK, *MLA, *DENSE, *EXPERTS, *SHARED)
    in_memory = FUSED

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = {"moe.shared_dim": hf["n_shared_experts"] * hf["moe_intermediate_size"]}
        if hf["topk_method"] == "greedy":
            return found
        if hf["topk_method"] != "group_limited_greedy":
            raise ConvertError(f"config.json of {self.name}: topk_method={hf['topk_method']!r} is not covered")
        return found | {"router.n_groups": hf["n_group"], "router.topk_groups": hf["topk_group"]}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        groups = value_of(cfg, "router.n_groups")
        return {
            "num_key_value_heads": cfg.attention.n_heads,
            "n_shared_experts": max(1, shared_to_count(cfg)),  # the class cannot do without
            "topk_method": "greedy" if groups in (None, 1) else "group_limited_greedy",
            "n_group": groups,
            "topk_group": value_of(cfg, "router.topk_groups"),
        }
