"""Granite 3's MoE models with shared experts: transformers' GraniteMoeSharedForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.families.granitemoe import GraniteMoe
from moetrain.convert.family import register
from moetrain.convert.layout import rule

_SHARED = "model.layers.{l}.shared_mlp."


@register
class GraniteMoeShared(GraniteMoe):
    """GraniteMoE and shared experts, whose gate and up are one tensor."""

    name = "granitemoeshared"
    architecture = "GraniteMoeSharedForCausalLM"
    fields: ClassVar = GraniteMoe.fields | {"moe.shared_dim": "shared_intermediate_size"}
    rules = (
        *GraniteMoe.rules,
        rule("layers.{l}.moe.shared.w_gate.weight", _SHARED + "input_linear.weight", stretch=(0, 2)),
        rule("layers.{l}.moe.shared.w_up.weight", _SHARED + "input_linear.weight", stretch=(1, 2)),
        rule("layers.{l}.moe.shared.w_down.weight", _SHARED + "output_linear.weight"),
    )
