"""Rules of the parts that many families share, our tensor -> theirs: a family's ``rules`` are made of these."""

from __future__ import annotations

from moetrain.convert.layout import rule

_LAYER = "model.layers.{l}."

_TABLES = (
    rule("embed.weight", "model.embed_tokens.weight"),
    rule("norm.weight", "model.norm.weight"),
    rule("head.weight", "lm_head.weight"),
    rule("layers.{l}.attention.wo.weight", _LAYER + "self_attn.o_proj.weight"),
)
# what all have in common, with norms before attention and MLP, or after
TRUNK = (
    *_TABLES,
    rule("layers.{l}.attention_norm.weight", _LAYER + "input_layernorm.weight"),
    rule("layers.{l}.mlp_norm.weight", _LAYER + "post_attention_layernorm.weight"),
)
POST_NORM_TRUNK = (
    *_TABLES,
    rule("layers.{l}.attention_norm.weight", _LAYER + "post_attention_layernorm.weight"),
    rule("layers.{l}.mlp_norm.weight", _LAYER + "post_feedforward_layernorm.weight"),
)

GQA = (
    *(
        rule(f"layers.{{l}}.attention.w{p}.{kind}", f"{_LAYER}self_attn.{p}_proj.{kind}")
        for p in "qkv"
        for kind in ("weight", "bias")
    ),
    rule("layers.{l}.attention.wo.bias", _LAYER + "self_attn.o_proj.bias"),
    rule("layers.{l}.attention.q_norm.weight", _LAYER + "self_attn.q_norm.weight"),
    rule("layers.{l}.attention.k_norm.weight", _LAYER + "self_attn.k_norm.weight"),
)
_LATENT = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
}
MLA = tuple(
    rule(f"layers.{{l}}.attention.{ours}.weight", f"{_LAYER}self_attn.{theirs}.weight")
    for ours, theirs in _LATENT.items()
)

DENSE = tuple(rule(f"layers.{{l}}.mlp.w_{p}.weight", f"{_LAYER}mlp.{p}_proj.weight") for p in ("gate", "up", "down"))
SHARED = tuple(
    rule(f"layers.{{l}}.moe.shared.w_{p}.weight", f"{_LAYER}mlp.shared_experts.{p}_proj.weight")
    for p in ("gate", "up", "down")
)

_GATE = rule("layers.{l}.moe.router.weight", _LAYER + "mlp.gate.weight")
_EXPERT = _LAYER + "mlp.experts.{e}."
EXPERTS = (
    _GATE,
    rule("layers.{l}.moe.experts.w13", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    rule("layers.{l}.moe.experts.w2", _EXPERT + "down_proj.weight"),
)
# transformers keeps the experts of a layer in two tensors in memory; ``state_dict()`` of its models has these names
FUSED = (
    _GATE,
    rule("layers.{l}.moe.experts.w13", _LAYER + "mlp.experts.gate_up_proj", rearrange="e p f d -> e (p f) d"),
    rule("layers.{l}.moe.experts.w2", _LAYER + "mlp.experts.down_proj"),
)
# the bias by which experts are chosen, as DeepSeek-V3 names it
BIAS = rule("layers.{l}.moe.router.balance.bias.bias_E", _LAYER + "mlp.gate.e_score_correction_bias")
