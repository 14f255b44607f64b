"""A small copy of any preset keeps what a mapping could get wrong, and fits every mapping that the large one fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.config import load
from moetrain.config.check import check_config, check_mapping, resolve_sizes
from moetrain.config.shrink import shrink

PRESETS = sorted(file.stem for file in Path("configs/model").glob("*.yaml"))
MAPPINGS = [
    (1, ["train.global_batch=64", "train.micro_batch=1"]),
    (8, ["parallel.tp=2", "parallel.ep=4", "parallel.etp=2"]),
    (8, ["parallel.cp=2", "parallel.tp=2", "parallel.ep=8"]),
    (4, ["parallel.cp=2", "parallel.context=all_to_all", "parallel.ep=4"]),
    (8, ["parallel.pp=2", "parallel.schedule=zbv_zero_bubble", "parallel.dp_replicate=2", "parallel.ep=2"]),
    (8, ["parallel.pp=4", "parallel.ep=2", "train.global_batch=32", "train.micro_batch=1"]),
    (4, ["parallel.pp=2", "parallel.schedule=interleaved_1f1b", "train.global_batch=48", "train.micro_batch=1"]),
    (3, ["parallel.pp=3", "parallel.layout=null"]),
]


def test_an_explicit_layout_keeps_its_longest_stage() -> None:
    words = ["model=deepseek-v3", "parallel.pp=2", "parallel.layout=[25,36]", "balance=[bias]", "train.micro_batch=1"]
    cfg = load(words, check=lambda cfg: check_mapping(cfg, 2))
    small = shrink(cfg, resolve_sizes(cfg.parallel, 2))
    check_mapping(small, 2)
    assert small.parallel.layout == [1, 2] and cfg.parallel.layout == [25, 36]


@pytest.mark.parametrize(("world", "mapping"), MAPPINGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_small_copy_of_every_preset_fits(preset: str, world: int, mapping: list[str]) -> None:
    batch = ["train.global_batch=48", "train.micro_batch=2"]
    cfg = load([f"model={preset}", *batch, *mapping], check=lambda cfg: check_mapping(cfg, world))
    sizes = resolve_sizes(cfg.parallel, world)
    small = shrink(cfg, sizes)
    check_config(small)
    assert check_mapping(small, world) == sizes
    small.model.router.check(small)

    a, b = cfg.model, small.model
    assert b.n_layers <= max(8, sizes.stages) and b.dim <= 96 and b.vocab_size <= 2000
    assert small.train.global_batch * small.train.seq_len <= 2048
    for name in ("kind", "qk_norm", "sinks", "qkv_bias", "out_bias", "clip_qkv"):
        assert getattr(a.attention, name) == getattr(b.attention, name)
    assert (a.attention.q_lora_rank is None) == (b.attention.q_lora_rank is None)
    assert (a.attention.n_kv_heads < a.attention.n_heads) >= (b.attention.n_kv_heads < b.attention.n_heads)
    assert (a.moe.first_dense > 0) == (b.moe.first_dense > 0)
    assert b.moe_layers()
    layer = b.moe_layers()[0]
    assert 1 <= b.layer_value("top_k", layer) < b.layer_value("num_experts", layer)
    assert (a.layer_value("shared_dim", a.moe_layers()[0]) > 0) == (b.layer_value("shared_dim", layer) > 0)
    if a.attention.sliding_layers is not None and sizes.stages > 1:
        assert 0 < len(b.attention.sliding_layers or []) < b.n_layers


@pytest.mark.parametrize(("world", "mapping"), MAPPINGS)
@pytest.mark.parametrize("shared", ["false", "true"])
def test_attention_experts_stay_as_many(shared: str, world: int, mapping: list[str]) -> None:
    heads = [f"model.attention.{name}" for name in ("n_heads=24", "n_kv_heads=6", "num_experts=3", "qk_norm=head")]
    heads = [word if shared == "false" else word.replace("n_kv_heads=6", "n_kv_heads=2") for word in heads]
    words = [*heads, f"model.attention.shared_kv={shared}", "train.global_batch=48", "train.micro_batch=2", *mapping]
    cfg = load(["model=olmoe-1b-7b", *words], check=lambda cfg: check_mapping(cfg, world))
    small = shrink(cfg, resolve_sizes(cfg.parallel, world))
    check_config(small)
    check_mapping(small, world)
    assert small.model.attention.num_experts == 3
