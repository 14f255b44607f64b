"""Qwen2-MoE (arXiv 2407.10671): transformers' Qwen2MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, layers_from_qwen, layers_to_qwen, register
from moetrain.convert.layout import rule
from moetrain.convert.parts import DENSE, EXPERTS, FUSED, GQA, TRUNK

_MLP = "model.layers.{l}.mlp."
SHARED = (
    rule("layers.{l}.moe.shared.w_gate.weight", _MLP + "shared_expert.gate_proj.weight"),
    rule("layers.{l}.moe.shared.w_up.weight", _MLP + "shared_expert.up_proj.weight"),
    rule("layers.{l}.moe.shared.w_down.weight", _MLP + "shared_expert.down_proj.weight"),
    rule("layers.{l}.moe.shared.gate.weight", _MLP + "shared_expert_gate.weight"),
)


@register
class Qwen2Moe(Family):
    """Grouped-query attention with biases on queries, keys and values; shared experts behind a sigmoid gate."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.qkv_bias": "qkv_bias",
        "moe.top_k": "num_experts_per_tok",
        "moe.expert_dim": "moe_intermediate_size",
        "moe.shared_dim": "shared_expert_intermediate_size",
        "router.renormalize": "norm_topk_prob",
    }
    implied: ClassVar = {"moe.shared_gate": True}
    fixed: ClassVar = {"use_sliding_window": False}
    rules = (*TRUNK, *GQA, *DENSE, *EXPERTS, *SHARED)
    in_memory = FUSED

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return layers_from_qwen(hf)

    def hollow(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        shapes = ((0, cfg.dim), (0, cfg.dim), (cfg.dim, 0), (1, cfg.dim))
        none = not any(cfg.layer_value("shared_dim", layer) for layer in cfg.moe_layers())
        pairs = list(zip(SHARED, shapes, strict=True)) if none else []
        return {rule.theirs[0].format(l=layer): shape for layer in cfg.moe_layers() for rule, shape in pairs}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return layers_to_qwen(cfg)
