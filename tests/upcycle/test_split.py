"""A dense layer in parts: together they are the layer, each dimension in one of them; clusters are found again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.upcycle.cluster import balanced_clusters, equal_shares
from tests.model.hf_models import tokens
from tests.upcycle.theirs import apply, assert_same, exported, logits, saved, tensors_of


@pytest.mark.parametrize("name", ["llama", "arcee"])
@pytest.mark.parametrize("by", ["random", "order", "keys", "activity"])
def test_all_parts_with_even_weights_are_the_dense_function(by: str, name: str, tmp_path: Path) -> None:
    dense = saved(name, tmp_path / "dense")
    made = apply("split", [dense], ids=tokens(), by=by, num_experts=4, top_k=4, router="zero")
    assert made.exact and made.model.cfg.moe.expert_dim == 10
    assert_same(logits(exported(made, tmp_path / "out")), logits(dense))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def squared_relu(up: Tensor) -> Tensor:
    return up.clamp(min=0) ** 2


@pytest.mark.parametrize(("name", "act"), [("llama", swiglu), ("arcee", squared_relu)])
def test_a_router_of_keys_with_small_weights_is_a_hard_mask(
    name: str, act: Callable[..., Tensor], tmp_path: Path
) -> None:
    """EMoE: the parts whose mean value of gate (or of up, where there is none) is highest count in full. Reference: the
    dense layer with a mask, in closed form, on the first layer's own input."""
    dense = saved(name, tmp_path / "dense")
    made = apply("split", [dense], by="order", num_experts=5, top_k=2, router_std=1e-8)
    whole = tensors_of(apply("sparse", [dense], num_experts=1, top_k=1))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys, *more = whole["layers.0.moe.experts.w13"][0]
    down = whole["layers.0.moe.experts.w2"][0]
    chosen = (x @ keys.T).view(50, 5, 8).mean(2).topk(2).indices
    mask = torch.zeros(50, 5).scatter(1, chosen, 1.0).repeat_interleave(8, 1)
    expected = (act(*(x @ w.T for w in (keys, *more))) * mask) @ down.T

    router, w13, w2 = (tensors_of(made)[f"layers.0.moe.{n}"] for n in ("router.weight", "experts.w13", "experts.w2"))
    weights, ids = (x @ router.T).softmax(1).topk(2)
    weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros_like(expected)
    for k in range(2):
        for t in range(50):
            e = ids[t, k]
            out[t] += weights[t, k] * (w2[e] @ act(*(w @ x[t] for w in w13[e])))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_what_fires_together_shares_an_expert(tmp_path: Path) -> None:
    """Inner dimensions are made copies of four kinds in mixed order: they must be found by their activity alone."""
    dense = saved("llama", tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    tensors = load_file(dense / "model.safetensors")
    kind = torch.arange(40) % 4
    for layer in range(3):
        for name in ("gate_proj", "up_proj"):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            tensors[key] = tensors[key][kind].clone()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    for by in ("activity", "keys"):
        made = apply("split", [dense], ids=tokens(), by=by, num_experts=4, top_k=1)
        for layer in range(3):
            gate = tensors_of(made)[f"layers.{layer}.moe.experts.w13"][:, 0]
            assert all(torch.equal(expert, expert[:1].expand_as(expert)) for expert in gate)


def test_shares_are_equal_and_stable() -> None:
    score = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    cluster = equal_shares(score)
    assert torch.bincount(cluster).tolist() == [15] * 4
    mine = score.gather(1, cluster[:, None]).squeeze(1)
    worst = torch.stack([mine[cluster == k].min() for k in range(4)])
    assert not ((score > mine[:, None]) & (score > worst)).any()  # no pair prefers each other
    assert balanced_clusters(torch.randn(60, 3), 4, torch.Generator().manual_seed(0)).flatten().unique().numel() == 60


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_experts=7 does not divide the dense width 40"):
        apply("split", [saved("llama", tmp_path / "dense")], num_experts=7)
