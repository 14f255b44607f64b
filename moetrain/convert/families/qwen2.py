"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): transformers' Qwen2ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import NO_EXPERTS, Family, register, windows_from_layer_types, windows_to_layer_types
from moetrain.convert.parts import DENSE, GQA, TRUNK


@register
class Qwen2(Family):
    """Grouped-query attention with biases on queries, keys and values; some layers may be windowed."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.sliding_window": "sliding_window",
    }
    implied: ClassVar = NO_EXPERTS | {"attention.qkv_bias": True}
    rules = (*TRUNK, *GQA, *DENSE)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return windows_from_layer_types(hf)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"use_sliding_window": cfg.attention.sliding_window is not None} | windows_to_layer_types(cfg)
