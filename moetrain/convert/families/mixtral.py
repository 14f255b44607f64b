"""Mixtral (arXiv 2401.04088): transformers' MixtralForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.family import Family, register
from moetrain.convert.layout import rule
from moetrain.convert.parts import FUSED, GQA, TRUNK

_MOE = "model.layers.{l}.block_sparse_moe."
_EXPERT = _MOE + "experts.{e}."


@register
class Mixtral(Family):
    """Grouped-query attention, optionally windowed; experts in every layer, weighed by a softmax over the chosen."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    fields: ClassVar = {
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.head_dim": "head_dim",
        "attention.sliding_window": "sliding_window",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "num_local_experts",
        "moe.expert_dim": "intermediate_size",
    }
    implied: ClassVar = {"router.renormalize": True}
    fixed: ClassVar = {"router_jitter_noise": 0.0}
    rules = (
        *TRUNK,
        *GQA,
        rule("layers.{l}.moe.router.weight", _MOE + "gate.weight"),
        rule("layers.{l}.moe.experts.w13", _EXPERT + "w1.weight", _EXPERT + "w3.weight"),
        rule("layers.{l}.moe.experts.w2", _EXPERT + "w2.weight"),
    )
    in_memory = FUSED
