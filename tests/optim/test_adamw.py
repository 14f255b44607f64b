"""AdamW: fused, over any mix of meshes, and with the decay on the parameters that should have it."""

from __future__ import annotations

import pytest
import torch
from moetrain_launch.fork import run_ranks
from torch import Tensor, nn

from moetrain.config.errors import ConfigError
from moetrain.optim import build_optimizer
from moetrain.optim.optimizers.adamw import AdamWOptions
from tests.optim.toy import loss_and_gradients, toy, train, values


@pytest.mark.parametrize("decay_embedding", [True, False])
def test_weights_decay_and_vectors_do_not(decay_embedding: bool) -> None:
    """With zero gradients a step is the decay alone: weights shrink by exactly 1 - lr * weight_decay."""
    model = toy()
    before = values(model)
    options = AdamWOptions(lr=0.5, weight_decay=0.2, decay_embedding=decay_embedding)
    optimizer = build_optimizer(options, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, after in values(model).items():
        vector = "norm" in name or name.endswith(("bias", "b2")) or (name == "embed.weight" and not decay_embedding)
        torch.testing.assert_close(after, before[name] * (1.0 if vector else 0.9), rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize(("ep", "edp"), [(2, 1), (1, 2), (2, 2)])
def test_sharded_over_two_meshes_equals_the_formula_on_whole_tensors(ep: int, edp: int) -> None:
    def run() -> tuple[list[float], dict[str, Tensor]]:
        model = toy(ep, edp)
        optimizer = build_optimizer(AdamWOptions(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1), model)
        return train(model, optimizer, range(5)), values(model)

    # AdamW as in its paper (algorithm 2), step by step on whole float64 tensors
    model = toy()
    parameters = dict(model.named_parameters())
    m = {n: torch.zeros_like(p) for n, p in parameters.items()}
    v = {n: torch.zeros_like(p) for n, p in parameters.items()}
    losses = []
    for t in range(1, 6):
        losses.append(loss_and_gradients(model, t - 1))
        for n, p in parameters.items():
            assert p.grad is not None
            m[n] = 0.8 * m[n] + 0.2 * p.grad
            v[n] = 0.9 * v[n] + 0.1 * p.grad**2
            decay = 0.0 if "norm" in n or n.endswith(("bias", "b2")) else 0.1
            step = m[n] / (1 - 0.8**t) / ((v[n] / (1 - 0.9**t)).sqrt() + 1e-6) + decay * p.detach()
            p.data -= 0.02 * step
    for sharded_losses, sharded in run_ranks(ep * edp, run):
        assert sharded_losses == pytest.approx(losses, rel=1e-12)
        for name, value in values(model).items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_frozen_parameters_are_left_out_and_a_frozen_model_is_refused() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(AdamWOptions(), model)
    assert [p.shape for g in optimizer.param_groups for p in g["params"]] == [(2, 3)]
    model.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(AdamWOptions(), model)
