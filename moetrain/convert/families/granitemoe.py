"""The MoE models of Granite 3 (IBM's report, October 2024), and PowerMoE: transformers' GraniteMoeForCausalLM."""

from __future__ import annotations

from typing import Any, ClassVar

from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, register
from moetrain.convert.layout import rule
from moetrain.convert.parts import GQA, TRUNK

_MOE = "model.layers.{l}.block_sparse_moe."
_FUSE = "e p f d -> e (p f) d"


@register
class GraniteMoe(Family):
    """Mixtral with the factors of Granite; the experts of a layer are stored together."""

    name = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    fields: ClassVar = {
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_divisor": "logits_scaling",
        "attention.n_kv_heads": "num_key_value_heads",
        "attention.qkv_bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "attention.scale": "attention_multiplier",
        "moe.top_k": "num_experts_per_tok",
        "moe.num_experts": "num_local_experts",
        "moe.expert_dim": "intermediate_size",
    }
    implied: ClassVar = {"router.order": "topk_then_score"}
    rules = (
        *TRUNK,
        *GQA,
        rule("layers.{l}.moe.router.weight", _MOE + "router.layer.weight"),
        rule("layers.{l}.moe.experts.w13", _MOE + "input_linear.weight", rearrange=_FUSE),
        rule("layers.{l}.moe.experts.w2", _MOE + "output_linear.weight"),
    )
    last_choice = True
    in_memory = (
        rule("layers.{l}.moe.router.weight", _MOE + "router.weight"),
        rule("layers.{l}.moe.experts.w13", _MOE + "experts.gate_up_proj", rearrange=_FUSE),
        rule("layers.{l}.moe.experts.w2", _MOE + "experts.down_proj"),
    )

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"attention_multiplier": cfg.attention.score_scale()}
