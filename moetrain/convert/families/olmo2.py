"""OLMo 2 (arXiv 2501.00656): transformers' Olmo2ForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.family import NO_EXPERTS, Family, register
from moetrain.convert.parts import DENSE, GQA, POST_NORM_TRUNK


@register
class Olmo2(Family):
    """RMSNorm after attention and MLP, and over all query heads together, and all key heads."""

    name = "olmo2"
    architecture = "Olmo2ForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
    }
    implied: ClassVar = NO_EXPERTS | {"norm_place": "post", "attention.qk_norm": "full"}
    rules = (*POST_NORM_TRUNK, *GQA, *DENSE)
