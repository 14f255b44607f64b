"""The dense models of Granite 3 (IBM's report, October 2024): transformers' GraniteForCausalLM."""

from __future__ import annotations

from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import NO_EXPERTS, Family, register
from moetrain.convert.parts import DENSE, GQA, TRUNK


@register
class Granite(Family):
    """Llama with factors on embeddings, attention scores, what layers add, and logits."""

    name = "granite"
    architecture = "GraniteForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_divisor": "logits_scaling",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "attention.scale": "attention_multiplier",
    }
    implied = NO_EXPERTS
    fixed: ClassVar = {"mlp_bias": False}
    last_choice = True
    rules = (*TRUNK, *GQA, *DENSE)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"attention_multiplier": cfg.attention.score_scale()}
