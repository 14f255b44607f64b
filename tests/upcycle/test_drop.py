"""Drop-Upcycling: a share of each expert starts anew, with the statistics of what it replaces; the rest is a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.convert.source import Held
from moetrain.upcycle.method import Model
from tests.upcycle.theirs import apply, assert_same, exported, logits, saved


def test_nothing_dropped_is_the_dense_function(tmp_path: Path) -> None:
    dense = saved("mistral", tmp_path / "dense")
    made = apply("drop", [dense], ratio=0.0)
    assert made.exact
    assert_same(logits(exported(made, tmp_path / "out")), logits(dense))


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_one_set_of_dimensions_of_each_expert_starts_anew(ratio: float, activation: str) -> None:
    F, D, E = 400, 64, 4
    generator = torch.Generator().manual_seed(0)
    parts = {"gate": (F, D, 0.1), "up": (F, D, -0.3), "down": (D, F, 0.2)}
    if activation == "relu2":
        del parts["gate"]
    tensors = {}
    for name, (rows, columns, mean) in parts.items():
        weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 0.05 + mean
        tensors[f"layers.0.mlp.w_{name}.weight"] = weight
    cfg = ModelConfig(dim=D, n_layers=1, dense_dim=F, activation=activation, moe=MoEConfig(num_experts=0))
    dense = Model(cfg, Held(tensors))
    made = apply("drop", [dense], num_experts=E, ratio=ratio)
    w13, w2 = (made.model.read(f"layers.0.moe.experts.{name}") for name in ("w13", "w2"))
    sets = []
    for e in range(E):
        mine, old = (*w13[e], w2[e].T), list(tensors.values())
        changed = [(new != was).any(1) for new, was in zip(mine, (*old[:-1], old[-1].T), strict=True)]
        assert all(torch.equal(c, changed[0]) for c in changed) and changed[0].sum() == round(ratio * F)
        sets.append(changed[0])
        for weights, (_, _, mean) in zip((w[changed[0]] for w in mine), parts.values(), strict=True):
            assert weights.mean().item() == pytest.approx(mean, abs=0.005)
            assert weights.std().item() == pytest.approx(0.05, rel=0.05)
    assert ratio == 1 or not torch.equal(sets[0], sets[1])
