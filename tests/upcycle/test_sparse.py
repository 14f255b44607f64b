"""Sparse upcycling: in transformers the MoE computes what the dense model did, whatever its router says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.upcycle.theirs import apply, assert_same, exported, logits, saved, tensors_of


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama", "mixtral"),
        ("mistral", "mixtral"),
        ("qwen2", "qwen2_moe"),
        ("qwen3", "qwen3_moe"),
        ("qwen3-biases-windows", "qwen3_moe"),
        ("olmo2", "flex_olmo"),
        ("granite", "granitemoe"),
        ("llama-biases-llama3-geglu", "granitemoe"),
        ("mistral-full-reglu", "mixtral"),
        ("gemma", "moetrain"),
        ("arcee", "moetrain"),
        ("arcee-gelu-yarn", "moetrain"),
    ],
)
def test_copies_compute_the_dense_function(name: str, family: str, tmp_path: Path) -> None:
    dense = saved(name, tmp_path / "dense")
    made = apply("sparse", [dense], num_experts=4, top_k=2)
    out = exported(made, tmp_path / "out")
    assert made.exact and f'"model_type": "{family}"' in (out / "config.json").read_text()
    assert_same(logits(out), logits(dense))
    router = tensors_of(made)["layers.0.moe.router.weight"]
    assert router.shape == (4, 32) and 0.015 < router.std() < 0.025  # random with init_std


def test_only_some_layers_and_a_router_of_zeros(tmp_path: Path) -> None:
    dense = saved("qwen3", tmp_path / "dense")
    made = apply("sparse", [dense], num_experts=4, top_k=3, layers=[1], router="zero")
    assert made.model.cfg.moe_layers() == [1] and "layers.0.mlp.w_up.weight" in tensors_of(made)
    assert not tensors_of(made)["layers.1.moe.router.weight"].any()
    assert_same(logits(exported(made, tmp_path / "out")), logits(dense))


def test_noise_is_on_its_share_of_every_copy_and_no_two_copies_agree(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    made = apply("sparse", [dense], num_experts=3, noise=0.02, noise_share=0.25)
    assert not made.exact
    plain = tensors_of(apply("sparse", [dense], num_experts=3))
    for name in ("layers.1.moe.experts.w13", "layers.1.moe.experts.w2"):
        added = tensors_of(made)[name] - plain[name]
        hit = added != 0
        assert hit.double().mean().item() == pytest.approx(0.25, abs=0.02)
        assert added[hit].std().item() == pytest.approx(0.02, rel=0.05)
        assert not torch.equal(added[0], added[1]) and not torch.equal(added[1], added[2])


@pytest.mark.parametrize(("name", "matrices"), [("llama", 2), ("arcee", 1)])
@pytest.mark.parametrize("method", ["sparse", "drop", "diversify", "split", "virtual_group", "mote"])
def test_a_part_is_the_same_whenever_and_whoever_asks_for_it(
    method: str, name: str, matrices: int, tmp_path: Path
) -> None:
    """So ranks can each ask for their own experts, and for slices of them, in any order."""
    dense = saved(name, tmp_path / "dense")
    options = {"noise": 0.1} if method == "sparse" else {}
    whole = tensors_of(apply(method, [dense], num_experts=8, **options))
    source = apply(method, [dense], num_experts=8, **options).model.source
    for name in reversed(list(whole)):
        parts = [source.read(name, (slice(i, i + 1),)) for i in range(len(whole[name]))]
        assert torch.equal(torch.cat(parts), whole[name])
        assert source.specs[name].shape == whole[name].shape and source.specs[name].dtype == whole[name].dtype
    box = (slice(2, 5), slice(matrices - 1, matrices), slice(3, 5))
    assert torch.equal(source.read("layers.1.moe.experts.w13", box), whole["layers.1.moe.experts.w13"][box])
