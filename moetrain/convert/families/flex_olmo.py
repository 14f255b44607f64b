"""FlexOlmo (arXiv 2507.07024): transformers' FlexOlmoForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.family import Family, register
from moetrain.convert.parts import EXPERTS, FUSED, GQA, POST_NORM_TRUNK


@register
class FlexOlmo(Family):
    """OLMo 2 with experts in every layer: norms after attention and experts; softmax scores, renormalised or not."""

    name = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    fields: ClassVar = {
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "num_experts",
        "moe.expert_dim": "intermediate_size",
        "router.renormalize": "norm_topk_prob",
    }
    implied: ClassVar = {"norm_place": "post", "attention.qk_norm": "full"}
    rules = (*POST_NORM_TRUNK, *GQA, *EXPERTS)
    in_memory = FUSED
