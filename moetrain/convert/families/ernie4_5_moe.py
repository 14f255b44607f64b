"""ERNIE 4.5 (Baidu's technical report, June 2025), its text models: transformers' Ernie4_5_MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, experts_by_layer, register, shared_to_count
from moetrain.convert.layout import rule
from moetrain.convert.parts import DENSE, EXPERTS, FUSED, GQA, SHARED, TRUNK

_OURS = "layers.{l}.moe.router.balance.bias.bias_E"
_MLP = "model.layers.{l}.mlp."
_STATICS = "moe_statics.e_score_correction_bias"
BIAS = rule(_OURS, _MLP + _STATICS, rearrange="e -> () e")


@register
class Ernie45Moe(Family):
    """Grouped-query attention; softmax scores, renormalised, with a bias for choosing; shared experts."""

    name = "ernie4_5_moe"
    architecture = "Ernie4_5_MoeForCausalLM"
    fields: ClassVar = {
        "dense_dim": "intermediate_size",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "moe.top_k": "moe_k",
        "moe.expert_dim": "moe_intermediate_size",
        "router.min_sum": "moe_norm_min",
    }
    implied: ClassVar = {"rope.interleaved": True, "router.renormalize": True}
    fixed: ClassVar = {"use_bias": False}
    rules = (*TRUNK, *GQA, *DENSE, *EXPERTS, *SHARED, BIAS)
    in_memory = (*FUSED, rule(_OURS, _MLP + "gate." + _STATICS, rearrange="e -> () e"))
    zeros = (BIAS,)
    ignored = (r"model\.mtp_.*",)  # multi-token prediction

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        n, step = hf["num_hidden_layers"], hf["moe_layer_interval"]
        within = range(hf["moe_layer_start_index"], min(hf["moe_layer_end_index"] + 1, n))
        sparse = [i for i in within if (i + 1) % step == 0]
        shared = hf["moe_num_shared_experts"] * hf["moe_intermediate_size"]
        return experts_by_layer(n, sparse, hf["moe_num_experts"]) | {"moe.shared_dim": shared}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        sparse = cfg.moe_layers()
        return {
            "moe_num_experts": cfg.layer_value("num_experts", sparse[0]),
            "moe_num_shared_experts": shared_to_count(cfg),
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        }
