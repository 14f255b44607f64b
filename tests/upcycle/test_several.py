"""Several dense models become one: each parent's MLP is an expert, and what lies around them is one model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moetrain.config.errors import ConfigError
from tests.upcycle.theirs import apply, assert_same, exported, logits, saved, tensors_of


@pytest.mark.parametrize("name", ["llama", "arcee"])
def test_btx_of_one_model_thrice_is_that_model(name: str, tmp_path: Path) -> None:
    dense = saved(name, tmp_path / "dense")
    made = apply("btx", [dense] * 3)
    assert_same(logits(exported(made, tmp_path / "out")), logits(dense))


def test_btx_takes_experts_from_each_and_the_mean_of_the_rest(tmp_path: Path) -> None:
    folders = [saved("llama", tmp_path / str(seed), seed) for seed in range(3)]
    theirs = [load_file(folder / "model.safetensors") for folder in folders]
    out = load_file(exported(apply("btx", folders), tmp_path / "out") / "model.safetensors")
    for layer in range(3):
        for e in range(3):
            for ours, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                expert = out.pop(f"model.layers.{layer}.block_sparse_moe.experts.{e}.{ours}.weight")
                assert torch.equal(expert, theirs[e][f"model.layers.{layer}.mlp.{name}.weight"])
        out.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    for name, value in out.items():
        assert_same(value, sum(t[name] for t in theirs) / 3)  # type: ignore[arg-type]


def test_parents_of_different_shapes_are_refused_with_the_field_and_both_values(tmp_path: Path) -> None:
    folders = [saved("llama", tmp_path / "a"), saved("llama-tied", tmp_path / "b")]
    with pytest.raises(ConfigError, match=r"same shapes: model.tie_embeddings is False in .*a and True in .*b"):
        apply("btx", folders)
    folders[1] = saved("mistral-full-reglu", tmp_path / "c")
    with pytest.raises(ConfigError, match=r"same shapes: model.activation is swiglu in .*a and reglu in .*c"):
        apply("btx", folders)
    with pytest.raises(ConfigError, match="takes two models or more"):
        apply("btx", folders[:1])


def test_flexmore_keeps_what_the_rank_allows(tmp_path: Path) -> None:
    folders = [saved("llama", tmp_path / str(seed), seed) for seed in range(2)]
    base, other = (load_file(folder / "model.safetensors") for folder in folders)
    name = "model.layers.1.mlp.up_proj.weight"
    for rank in (3, 32):
        made = apply("flexmore", folders, rank=rank)
        experts = tensors_of(made)["layers.1.moe.experts.w13"][:, 1]
        assert torch.equal(experts[0], base[name])
        singular = torch.linalg.svdvals(other[name] - base[name])
        missing = torch.linalg.svdvals(other[name] - experts[1])
        torch.testing.assert_close(missing[: 32 - rank], singular[rank:], rtol=1e-9, atol=1e-9)  # Eckart and Young
        assert_same(tensors_of(made)["embed.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["qwen3", "arcee"])
def test_flexmore_of_a_base_with_itself_is_the_base(name: str, tmp_path: Path) -> None:
    dense = saved(name, tmp_path / "dense")
    assert_same(logits(exported(apply("flexmore", [dense, dense], rank=2), tmp_path / "out")), logits(dense))


def test_diversify_masks_each_copy_otherwise(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    assert_same(logits(exported(apply("diversify", [dense], mask=0.0), tmp_path / "out")), logits(dense))
    made = apply("diversify", [dense], mask=0.2, num_experts=3)
    whole = tensors_of(apply("sparse", [dense], num_experts=1, top_k=1))
    for name in ("layers.0.moe.experts.w13", "layers.0.moe.experts.w2"):
        experts, copy = tensors_of(made)[name], whole[name]
        zero = experts == 0
        assert torch.equal(experts, torch.where(zero, 0.0, copy.expand_as(experts)))
        assert zero.double().mean().item() == pytest.approx(0.2, abs=0.02)
        assert not torch.equal(zero[0], zero[1])
