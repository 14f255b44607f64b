"""What a model config means, without what does not matter to it: so two configs can be compared for the same model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ModelConfig
from moetrain.model.attention import window_of
from moetrain.moe.options import as_options

TRUNK = (
    *("vocab_size", "dim", "n_layers", "max_seq_len", "norm_eps", "norm_offset", "norm_place", "parallel_block"),
    "tie_embeddings",
    *("embedding_multiplier", "residual_multiplier", "logits_divisor"),
)
GQA = ("n_kv_heads", "head_dim", "qkv_bias", "out_bias", "qk_norm", "clip_qkv", "sinks", "num_experts", "shared_kv")
MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
YARN = ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": YARN,
}
# Settings of a router that change training only; an exported model routes without them.
TRAINING_ONLY = {"force_balance"}


def features(cfg: ModelConfig) -> dict[str, Any]:
    """Config path -> value, for everything that the outputs of the model depend on.

    Numbers of the MoE layer are lists over the MoE layers; ``moe.num_experts`` is over all, with 0 for dense ones.
    """
    a, moe = cfg.attention, cfg.moe_layers()
    found: dict[str, Any] = {name: getattr(cfg, name) for name in TRUNK}
    if len(moe) < cfg.n_layers:
        found["dense_dim"] = cfg.dense_dim
    if len(moe) < cfg.n_layers or any(cfg.layer_value("shared_dim", i) for i in moe):
        found["activation"] = cfg.activation
    for name in ("kind", "n_heads", *(MLA if a.kind == "mla" else GQA)):
        found[f"attention.{name}"] = getattr(a, name)
    if a.kind == "gqa":
        found["attention.scale"] = a.score_scale()
    found["attention.sliding_window"] = [window_of(cfg, i) for i in range(cfg.n_layers)]
    for name in ("theta", "fraction", "interleaved", "scaling", *ROPE[cfg.rope.scaling]):
        found[f"rope.{name}"] = getattr(cfg.rope, name)
    found["moe.num_experts"] = [cfg.layer_value("num_experts", i) if i in moe else 0 for i in range(cfg.n_layers)]
    if moe:
        for name in ("top_k", "expert_dim", "shared_dim"):
            found[f"moe.{name}"] = [cfg.layer_value(name, i) for i in moe]
        if any(found["moe.shared_dim"]):
            found["moe.shared_gate"] = cfg.moe.shared_gate
        found |= {f"moe.{name}": getattr(cfg.moe, name) for name in ("activation", "bias", "ternary")} | _router(cfg)
    return found


def _router(cfg: ModelConfig) -> dict[str, Any]:
    options = as_options(ROUTERS, cfg.router)
    found: dict[str, Any] = {"router": ROUTERS.entry_of(options).name}
    found |= {f"router.{f.name}": getattr(options, f.name) for f in fields(options) if f.name not in TRAINING_ONLY}
    if found.get("router.order") == "topk_then_score" and found.get("router.score") == "softmax":
        # a softmax over the chosen logits is the renormalised softmax over all of them
        found |= {"router.order": "score_then_topk", "router.renormalize": True}
    if not found.get("router.renormalize"):
        found.pop("router.min_sum", None)
    if found.get("router.n_groups") == 1:  # one group: nothing to limit
        found.pop("router.topk_groups", None)
        found.pop("router.group_score", None)
    return found


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """The features of ``ours`` that ``theirs`` has otherwise, each as "model.path=value".

    A feature that only one of them has hangs on another, which both have and which is named.
    """
    mine, other = features(ours), features(theirs)
    unlike = [name for name, value in mine.items() if name in other and other[name] != value]
    if ours.moe_layers() != theirs.moe_layers():
        unlike = [name for name in unlike if name not in ("moe.top_k", "moe.expert_dim", "moe.shared_dim")]
    return [f"model.{name}={_short(mine[name])}" for name in unlike]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
