"""Gemma 1 (arXiv 2403.08295): transformers' GemmaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.convert.family import NO_EXPERTS, Family, register
from moetrain.convert.parts import DENSE, GQA, TRUNK


@register
class Gemma(Family):
    """Llama with a GeGLU MLP, norms with weight 1 + w, and embeddings times the root of their width."""

    name = "gemma"
    architecture = "GemmaForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
    }
    implied: ClassVar = NO_EXPERTS | {"norm_offset": 1.0}
    fixed: ClassVar = {"use_bidirectional_attention": None}
    rules = (*TRUNK, *GQA, *DENSE)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"embedding_multiplier": hf["hidden_size"] ** 0.5}
