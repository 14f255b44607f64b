"""A small copy of a run: the same kinds, flags and ratios, sizes that a laptop steps in no time. No torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from moetrain.config.advice import setting
from moetrain.config.registry import MIXERS
from moetrain.config.schema import Config, ModelConfig
from moetrain.config.sizes import Sizes, divisors

VOCAB = 320  # what the toy text's tokenizer needs, and no less
PER_LAYER = ("num_experts", "top_k", "expert_dim", "shared_dim", "capacity_factor")


def shrink(cfg: Config, sizes: Sizes) -> Config:
    """A copy of ``cfg`` (checked, with its registries' options) with a small model and batch that fit ``sizes``.

    What a mapping could get wrong stays: kinds of attention, router, balance and dispatcher, biases, norms, windows,
    dense layers before MoE layers, many or few experts, the number of micro-batches (up to two per stage). Weights are
    drawn wide and the learning rate is high, so that 20 steps change something.
    """
    small = copy.deepcopy(cfg)
    small.mixer = MIXERS.get("none").options()  # it knows the domains of the text, and decides after many steps
    small.experts.fp8 = False  # rows that share a scale follow the mapping: no two mappings round alike
    _batch(small, cfg, sizes)
    _layers(small.model, cfg, sizes)
    _layout(small, sizes)
    _attention(small.model, cfg, sizes)
    _moe(small.model, sizes)
    model, tp = small.model, sizes.tp
    # expert_shards wants the width and what etp leaves of it to divide by edp
    model.dim = math.lcm(32, sizes.edp * sizes.etp)
    model.dense_dim = math.lcm(48, tp)
    model.vocab_size = math.lcm(VOCAB, tp)
    model.max_seq_len = max(cfg.model.max_seq_len, small.train.seq_len)
    model.init_std = max(model.init_std, 0.1)
    small.optim.lr = max(small.optim.lr, 0.003)
    small.schedule.warmup_steps = min(small.schedule.warmup_steps, 2)
    return small


def _batch(small: Config, cfg: Config, sizes: Sizes) -> None:
    t = small.train
    count, most = sizes.micro_batches(cfg), max(4, 2 * sizes.stages)
    if count > most:
        count = most // sizes.pp * sizes.pp  # whole rounds of the ranks suit every schedule
    t.micro_batch = min(t.micro_batch, 2)
    t.global_batch = count * t.micro_batch * sizes.data
    t.seq_len = math.lcm(16, 2 * sizes.cp * sizes.tp)
    t.eval_sequences = 4


def _layers(model: ModelConfig, cfg: Config, sizes: Sizes) -> None:
    """One dense layer before the MoE layers if there are any, one whole period, and a layer for every stage."""
    moe = model.moe
    dense = min(moe.first_dense, 1)
    n = max(sizes.stages, dense + max(2, moe.every))
    cut = moe.first_dense - dense  # leading layers that are left out
    n = min(n, model.n_layers - cut) if model.n_layers - cut >= sizes.stages else sizes.stages
    kept = [min(cut + i, model.n_layers - 1) for i in range(n)]
    for name in PER_LAYER:
        value = getattr(moe, name)
        if isinstance(value, list):
            setattr(moe, name, [value[layer] for layer in kept])
    if model.attention.sliding_layers is not None:
        windowed = model.attention.sliding_layers
        model.attention.sliding_layers = [i for i, layer in enumerate(kept) if layer in windowed]
    moe.first_dense, model.n_layers = dense, n


def _layout(small: Config, sizes: Sizes) -> None:
    """One layer for each stage, and what is left for the one that has most."""
    layout = small.parallel.layout
    if layout is not None:
        longest, extra = layout.index(max(layout)), small.model.n_layers - sizes.stages
        small.parallel.layout = [1 + (extra if stage == longest else 0) for stage in range(sizes.stages)]


def _attention(model: ModelConfig, cfg: Config, sizes: Sizes) -> None:
    a = model.attention
    group = a.n_heads // a.n_kv_heads if a.kind == "gqa" else 1
    a.n_heads = math.lcm(4, a.num_experts, sizes.tp * (sizes.cp if cfg.parallel.context == "all_to_all" else 1))
    if a.kind == "gqa":
        fits = [kv for kv in divisors(a.n_heads) if max(kv, sizes.tp) % min(kv, sizes.tp) == 0]
        fits = [kv for kv in fits if (a.n_heads // kv if a.shared_kv else kv) % a.num_experts == 0]
        a.n_kv_heads = min(fits, key=lambda kv: abs(kv - a.n_heads / group))
        a.head_dim = 8 if 8 * model.rope.fraction % 2 == 0 else a.head_dim
    else:
        a.q_lora_rank = None if a.q_lora_rank is None else 16
        a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim = 16, 8, 8, 8
    if a.sliding_window is not None:
        a.sliding_window = min(a.sliding_window, 6)


def _moe(model: ModelConfig, sizes: Sizes) -> None:
    moe = model.moe
    groups = getattr(model.router, "n_groups", 1)
    unit = math.lcm(sizes.ep, groups)

    def each(value: Any, change: Any) -> Any:
        return [change(v) for v in value] if isinstance(value, list) else change(value)

    # at most 16 experts where that divides by ep and holds two of each group
    moe.num_experts = each(
        moe.num_experts, lambda n: min(n, math.ceil(max(16 if n > 16 else n, 2 * groups) / unit) * unit)
    )
    fewest = min((n for n in _values(moe.num_experts) if n), default=1)
    most = max(1, fewest // groups * getattr(model.router, "topk_groups", 1) // 2)
    moe.top_k = each(moe.top_k, lambda k: min(k, 4, most))
    moe.expert_dim = each(moe.expert_dim, lambda n: math.lcm(16, sizes.edp * sizes.etp))
    moe.shared_dim = each(moe.shared_dim, lambda n: math.lcm(16, sizes.tp) if n else 0)


def _values(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list) else [value]


def shrunken(cfg: Config, small: Config) -> str:
    """What became smaller, for the terminal: "61 layers -> 4, width 7168 -> 32 ..."."""
    names = {
        "layers": "model.n_layers",
        "width": "model.dim",
        "heads": "model.attention.n_heads",
        "experts": "model.moe.num_experts",
        "per token": "model.moe.top_k",
        "expert width": "model.moe.expert_dim",
        "sequence": "train.seq_len",
        "global batch": "train.global_batch",
    }
    pairs = {what: (setting(cfg, key), setting(small, key)) for what, key in names.items()}
    return ", ".join(f"{what} {old} -> {new}" for what, (old, new) in pairs.items() if old != new)
