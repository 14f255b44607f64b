"""Every check of a config that needs no device and no torch. A refusal says the rule, the sizes and what would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config, ModelConfig, ParallelConfig

PER_LAYER = ("num_experts", "top_k", "expert_dim", "shared_dim", "capacity_factor")
DENSE_GRID = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_GRID = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True)
class Sizes:
    """One mapping: the sizes of both grids over the same ranks, all known.

    world = pp x dp_replicate x dp_shard x cp x tp = pp x edp x ep x etp, each written slowest first.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    edp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data(self) -> int:
        """Shares that the global batch is cut into; ranks along cp and tp and the stages of pp work on one share."""
        return self.dp_replicate * self.dp_shard


def resolve_sizes(parallel: ParallelConfig, world: int) -> Sizes:
    """The mapping of ``parallel`` on ``world`` ranks, with -1 and edp inferred.

    Raises ConfigError with the rule that broke, the sizes and the nearest legal ones, where no mapping fits.
    """
    if world < 1:
        raise ConfigError(f"a world of {world} ranks is impossible")
    for name in (*DENSE_GRID, "ep", "etp"):
        size = getattr(parallel, name)
        if size < 1 and size != -1:
            raise ConfigError(f"parallel.{name}={size}: a size is at least 1, or -1 to infer it")
    dense = _infer({name: getattr(parallel, name) for name in DENSE_GRID}, world, f"world size {world}")
    stage = world // dense["pp"]
    what = f"world size {world}" if dense["pp"] == 1 else f"world size {world} / pp {dense['pp']} = {stage}"
    edp = 1 if -1 in (parallel.ep, parallel.etp) else -1
    experts = _infer({"edp": edp, "ep": parallel.ep, "etp": parallel.etp}, stage, what)
    return Sizes(**dense, **experts)


def check_mapping(cfg: Config, world: int) -> Sizes:
    """The mapping of ``cfg`` on ``world`` ranks, checked against the model and the batch. Raises ConfigError."""
    sizes = resolve_sizes(cfg.parallel, world)
    stage = world // sizes.pp
    counts = {cfg.model.layer_value("num_experts", layer) for layer in cfg.model.moe_layers()}
    for count in sorted(counts):
        if count % sizes.ep:
            legal = [n for n in _divisors(stage) if all(c % n == 0 for c in counts)]
            raise ConfigError(
                f"parallel.ep={sizes.ep} must divide model.moe.num_experts={count}, since every rank owns as many "
                f"experts as the others; {_nearest('parallel.ep', sizes.ep, legal)}"
            )
    for layer in cfg.model.moe_layers():
        width = cfg.model.layer_value("expert_dim", layer)
        uneven = [cfg.model.dim % sizes.edp, width % sizes.edp]
        if all(uneven) or (cfg.model.moe.bias and any(uneven)):
            raise ConfigError(
                f"each expert is sharded over edp={sizes.edp} ranks (world / pp / ep / etp), which does not divide "
                f"model.dim={cfg.model.dim} and layer {layer}'s expert_dim={width}; raise parallel.ep"
            )
    _check_batch(cfg, sizes)
    return sizes


def check_config(cfg: Config) -> None:
    """Every check that needs no number of ranks. Raises ConfigError for the first rule that is broken."""
    _check_attention(cfg.model)
    _check_rope(cfg.model)
    _check_moe(cfg.model)
    train, model, tokenizer = cfg.train, cfg.model, cfg.data.tokenizer
    if train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={train.seq_len} is longer than model.max_seq_len={model.max_seq_len}; "
            "lower the one or raise the other"
        )
    if train.global_batch % train.micro_batch:
        raise ConfigError(_batch_message(cfg, 1))
    if tokenizer.path is None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size={tokenizer.vocab_size} is larger than model.vocab_size={model.vocab_size}; "
            "the embedding needs a row for every token"
        )
    weights = {name: source.weight for name, source in cfg.data.sources.items() if source.weight is not None}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"data.sources.{name}.weight={weight} must be a share of 0 or more")


def _check_attention(model: ModelConfig) -> None:
    a = model.attention
    if a.kind == "gqa":
        if a.n_heads % a.n_kv_heads:
            hint = _nearest("model.attention.n_kv_heads", a.n_kv_heads, _divisors(a.n_heads))
            raise ConfigError(f"model.attention.n_kv_heads={a.n_kv_heads} must divide n_heads={a.n_heads}; {hint}")
        if a.head_dim % 2:
            raise ConfigError(f"model.attention.head_dim={a.head_dim} must be even: rotary positions turn pairs")
    else:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(a, name) < 1:
                raise ConfigError(f"model.attention.kind=mla needs model.attention.{name} of at least 1")
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


def _check_rope(model: ModelConfig) -> None:
    rope = model.rope
    if rope.scaling in ("llama3", "yarn") and rope.original_max_seq_len < 1:
        raise ConfigError(f"model.rope.scaling={rope.scaling} needs model.rope.original_max_seq_len")


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


def _check_batch(cfg: Config, sizes: Sizes) -> None:
    if cfg.train.global_batch % (cfg.train.micro_batch * sizes.data):
        raise ConfigError(_batch_message(cfg, sizes.data))


def _batch_message(cfg: Config, data: int) -> str:
    batch, micro = cfg.train.global_batch, cfg.train.micro_batch
    step = micro * data
    legal = [n for n in (batch // step * step, -(-batch // step) * step) if n > 0]
    choices = _nearest("train.global_batch", batch, legal)
    smaller = [n for n in _divisors(batch // data) if n <= micro] if batch % data == 0 else []
    if smaller:
        choices += f" or train.micro_batch={smaller[-1]}"
    ranks = f" x {data} data-parallel ranks = {step}" if data > 1 else ""
    return f"train.global_batch={batch} must be a multiple of train.micro_batch={micro}{ranks}; {choices}"


def _infer(sizes: dict[str, int], total: int, what: str) -> dict[str, int]:
    """``sizes`` with its one -1 filled in, such that their product is ``total``, which the message calls ``what``."""
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ConfigError(
            f"parallel: only one of {', '.join(sizes)} can be inferred, but {' and '.join(unknown)} are -1"
        )
    known = {name: size for name, size in sizes.items() if size != -1}
    product = math.prod(known.values())
    if total % product or (not unknown and product != total):
        shown = " x ".join(f"{name} {size}" for name, size in known.items())
        raise ConfigError(
            f"parallel: {shown} = {product} must {'divide' if unknown else 'equal'} the {what} (launch.ranks, or the "
            f"ranks that a launcher started); {_single_changes(known, total, bool(unknown))}"
        )
    return {name: total // product if size == -1 else size for name, size in sizes.items()}


def _single_changes(known: dict[str, int], total: int, divides: bool) -> str:
    """The nearest legal choices: one size changed, or another number of ranks."""
    product = math.prod(known.values())
    changes = []
    for name, size in known.items():
        if name == "edp" or (size == 1 and name != "dp_shard"):
            continue
        rest = product // size
        legal = [n for n in _divisors(total) if (total % (rest * n) == 0 if divides else rest * n == total)]
        changes += [f"parallel.{name}={n}" for n in _near(size, legal)]
    ranks = f"a multiple of {product} ranks" if divides else f"a world of {product}"
    return f"nearest legal: {', '.join([*changes, ranks])}"


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _near(size: int, legal: Sequence[int]) -> list[int]:
    """The nearest legal number below ``size`` and the nearest above, where they exist."""
    below, above = [n for n in legal if n < size], [n for n in legal if n > size]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _nearest(key: str, size: int, legal: Sequence[int]) -> str:
    near = _near(size, legal)
    return f"nearest legal: {' or '.join(f'{key}={n}' for n in near)}" if near else f"no other {key} is legal"
