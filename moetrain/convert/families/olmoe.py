"""OLMoE (arXiv 2409.02060): transformers' OlmoeForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.family import Family, register
from moetrain.convert.parts import EXPERTS, FUSED, GQA, TRUNK


@register
class Olmoe(Family):
    """Attention with RMSNorm over all query heads together, and all key heads; softmax scores, renormalised or not."""

    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    fields: ClassVar = {
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "attention.clip_qkv": "clip_qkv",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "num_experts",
        "moe.expert_dim": "intermediate_size",
        "router.renormalize": "norm_topk_prob",
    }
    implied: ClassVar = {"attention.qk_norm": "full"}
    rules = (*TRUNK, *GQA, *EXPERTS)
    in_memory = FUSED
