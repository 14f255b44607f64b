"""Llama 1 to 3 (arXiv 2407.21783), also SmolLM2 and all that is built alike: transformers' LlamaForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.family import NO_EXPERTS, Family, register
from moetrain.convert.parts import DENSE, GQA, TRUNK


@register
class Llama(Family):
    """Grouped-query attention and a SwiGLU MLP in every layer."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
    }
    implied = NO_EXPERTS
    fixed: ClassVar = {"mlp_bias": False}
    rules = (*TRUNK, *GQA, *DENSE)
