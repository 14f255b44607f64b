"""Mistral 7B (arXiv 2310.06825): transformers' MistralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.errors import ConvertError
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

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        if hf.get("layer_types") is not None:  # transformers takes another class where this key is there
            raise ConvertError(f"config.json of {self.name}: layer_types is not covered, all layers have one window")
        return {}
