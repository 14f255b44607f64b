"""Qwen3 (arXiv 2505.09388): transformers' Qwen3ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import NO_EXPERTS, Family, register, windows_from_layer_types, windows_to_layer_types
from moetrain.convert.parts import DENSE, GQA, TRUNK


@register
class Qwen3(Family):
    """Grouped-query attention with RMSNorm on every query and key head; some layers may be windowed."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "attention.sliding_window": "sliding_window",
    }
    implied: ClassVar = NO_EXPERTS | {"attention.qk_norm": "head"}
    rules = (*TRUNK, *GQA, *DENSE)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return windows_from_layer_types(hf)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"use_sliding_window": cfg.attention.sliding_window is not None} | windows_to_layer_types(cfg)
