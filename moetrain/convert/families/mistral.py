"""Mistral 7B (arXiv 2310.06825): transformers' MistralForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.family import NO_EXPERTS, Family, register
from moetrain.convert.parts import DENSE, GQA, TRUNK


@register
class Mistral(Family):
    """Grouped-query attention, within a window in every layer or in none, and a SwiGLU MLP."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.sliding_window": "sliding_window",
    }
    implied = NO_EXPERTS
    rules = (*TRUNK, *GQA, *DENSE)
