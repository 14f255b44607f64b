"""Every check of a config that needs no device and no torch. A refusal says the rule, the sizes and what would do."""

from __future__ import annotations

from moetrain.config.advice import enforce
from moetrain.config.check_data import check_data
from moetrain.config.check_mapping import batch, check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.schema import AttentionConfig, Config, ModelConfig
from moetrain.config.sizes import Sizes, divisors, near, resolve_sizes

__all__ = ["Sizes", "check_config", "check_mapping", "check_model", "resolve_sizes"]

# settings of grouped-query attention -> the value that turns them off
GQA_ONLY = {
    **{"qkv_bias": False, "out_bias": False, "sinks": False, "qk_norm": "none", "clip_qkv": None, "scale": None},
    **{"num_experts": 1, "shared_kv": False},
}
FP8_BACKENDS = ("auto", "cpu", "triton")
PER_LAYER = ("num_experts", "top_k", "expert_dim", "shared_dim", "capacity_factor")


def check_config(cfg: Config, resumed: bool = False) -> None:
    """Every check that needs no number of ranks. resumed: the run has begun, maybe with other settings. Raises
    ConfigError for the first rule that is broken."""
    check_model(cfg.model)
    _check_fp8(cfg)
    train, model, tokenizer = cfg.train, cfg.model, cfg.data.tokenizer
    if train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={train.seq_len} is longer than model.max_seq_len={model.max_seq_len}; "
            "lower the one or raise the other"
        )
    enforce([batch], cfg, Sizes())
    if tokenizer.path is None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size={tokenizer.vocab_size} is larger than model.vocab_size={model.vocab_size}; "
            "the embedding needs a row for every token"
        )
    if cfg.init_optimizer and cfg.init is None:
        raise ConfigError("init_optimizer=true goes with init=PATH, which is null")
    if cfg.train.snapshot.every and cfg.parallel.engine == "deepspeed":
        raise ConfigError(
            f"train.snapshot.every={cfg.train.snapshot.every} is for parallel.engine=torch; set it to 0, and "
            "checkpoint.every to what may be lost"
        )
    check_data(cfg, resumed)


def check_model(model: ModelConfig) -> None:
    """Every check of a model alone, but for its router's. Raises ConfigError for the first rule that is broken."""
    _check_attention(model)
    _check_rope(model)
    _check_block(model)
    _check_moe(model)


def _check_attention(model: ModelConfig) -> None:
    a = model.attention
    if a.kind == "gqa":
        if a.n_heads % a.n_kv_heads:
            hint = " or ".join(f"model.attention.n_kv_heads={n}" for n in near(a.n_kv_heads, divisors(a.n_heads)))
            raise ConfigError(
                f"model.attention.n_kv_heads={a.n_kv_heads} must divide n_heads={a.n_heads}; nearest legal: {hint}"
            )
        if a.head_dim * model.rope.fraction % 2:
            part = "" if model.rope.fraction == 1 else f" times model.rope.fraction={model.rope.fraction}"
            raise ConfigError(f"model.attention.head_dim={a.head_dim}{part} must be even: rotary positions turn pairs")
        _check_attention_experts(a)
    else:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(a, name) < 1:
                raise ConfigError(f"model.attention.kind=mla needs model.attention.{name} of at least 1")
        for name, none in GQA_ONLY.items():
            if getattr(a, name) != none:
                word = "null" if none is None else str(none).lower()
                raise ConfigError(f"model.attention.{name} is for kind=gqa; with mla set model.attention.{name}={word}")
        if model.rope.fraction != 1:
            raise ConfigError("model.rope.fraction is for kind=gqa; with mla model.attention.qk_rope_head_dim tells it")
        if a.qk_rope_head_dim % 2:
            raise ConfigError(f"model.attention.qk_rope_head_dim={a.qk_rope_head_dim} must be even")
        if a.q_lora_rank is not None and a.q_lora_rank < 1:
            raise ConfigError(f"model.attention.q_lora_rank={a.q_lora_rank} must be at least 1, or null for none")
    if a.sliding_window is not None and a.sliding_window < 1:
        raise ConfigError(f"model.attention.sliding_window={a.sliding_window} must be at least 1, or null for none")
    for layer in a.sliding_layers or []:
        if not 0 <= layer < model.n_layers:
            raise ConfigError(
                f"model.attention.sliding_layers names layer {layer}; layers are 0 to {model.n_layers - 1}"
            )


def _check_attention_experts(a: AttentionConfig) -> None:
    """Every expert has as many heads as any other, all with the same grouping of queries around keys and values."""
    N = a.num_experts
    if a.shared_kv and N == 1:
        raise ConfigError(
            "model.attention.shared_kv=true is for experts that share keys and values; set model.attention.num_experts"
        )
    if N > 1 and a.qk_norm == "full":
        raise ConfigError(
            "model.attention.qk_norm=full is one norm over all heads, so experts would change each other's queries; "
            f"with model.attention.num_experts={N} use head or none"
        )
    each = a.n_heads // a.n_kv_heads if a.shared_kv else a.n_kv_heads
    if each % N:
        what = f"n_heads={a.n_heads} / n_kv_heads={a.n_kv_heads} = {each}" if a.shared_kv else f"n_kv_heads={each}"
        hint = " or ".join(f"model.attention.num_experts={n}" for n in near(N, divisors(each)))
        raise ConfigError(
            f"model.attention.num_experts={N} must divide {what}: heads count those of all experts; "
            f"nearest legal: {hint}"
        )


def _check_rope(model: ModelConfig) -> None:
    rope = model.rope
    if rope.scaling in ("llama3", "yarn") and rope.original_max_seq_len < 1:
        raise ConfigError(f"model.rope.scaling={rope.scaling} needs model.rope.original_max_seq_len")


def _check_block(model: ModelConfig) -> None:
    if model.parallel_block and model.norm_place == "post":
        raise ConfigError(
            "model.parallel_block=true needs model.norm_place=pre: attention and MLP read the same input through norms"
        )


def _check_fp8(cfg: Config) -> None:
    if not cfg.experts.fp8:
        return
    if cfg.train.precision == "float64":
        raise ConfigError(
            "experts.fp8=true: float64 has no FP8; set train.precision=bf16 or float32, or experts.fp8=false"
        )
    if cfg.experts.backend not in FP8_BACKENDS:
        raise ConfigError(
            f"experts.backend={cfg.experts.backend} has no FP8; set experts.backend=auto, or experts.fp8=false"
        )


def _check_moe(model: ModelConfig) -> None:
    moe = model.moe
    for name in PER_LAYER:
        value = getattr(moe, name)
        if isinstance(value, list) and len(value) != model.n_layers:
            raise ConfigError(
                f"model.moe.{name} has {len(value)} numbers for model.n_layers={model.n_layers} layers; "
                "give one number, or one per layer (those of dense layers are ignored)"
            )
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (number < 0 or (name == "capacity_factor" and number == 0)):
                raise ConfigError(f"model.moe.{name}={value} must not be {'0 or ' if number == 0 else ''}negative")
    if moe.first_dense > model.n_layers:
        raise ConfigError(f"model.moe.first_dense={moe.first_dense} is more than model.n_layers={model.n_layers}")
    for layer in model.moe_layers():
        top_k, experts = model.layer_value("top_k", layer), model.layer_value("num_experts", layer)
        if not 1 <= top_k <= experts:
            raise ConfigError(f"layer {layer}: model.moe.top_k={top_k} must be between 1 and num_experts={experts}")
        if model.layer_value("expert_dim", layer) < 1:
            raise ConfigError(f"layer {layer}: model.moe.expert_dim must be at least 1")
