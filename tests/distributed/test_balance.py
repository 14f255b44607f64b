"""Auxiliary losses summed over ranks equal the one-process value, for each scope and the splits that it allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain.moe.balance import end_of_step
from moetrain.moe.routing import TokenContext
from tests.moe.toys import config, empty_carry, make_layer, tokens

B, S, STEPS = 4, 6, 2


def balance_of(scope: str) -> dict[str, Any]:
    return {"aux_loss": {"scope": scope}, "z_loss": {}, "bias": {}}


def on_rank(scope: str, split: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(aux_A per step, router gradient, loads, bias) of this rank's share: whole sequences, or a part of each."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    layer = make_layer(config(), balance_of(scope))
    layer.router.group = group
    if split == "within sequences":
        layer.router.sequence_group = group
    values = []
    for step in range(STEPS):
        x_BSD = tokens(B * S, seed=step).view(B, S, -1)
        share = x_BSD.chunk(world, dim=1 if split == "within sequences" else 0)[rank]
        context = TokenContext(seq_len=share.shape[1], step=step)
        _, carry = layer.router(share.flatten(0, 1), empty_carry(balance_of(scope)), context)
        carry.aux_A.sum().backward()
        values.append(carry.aux_A.detach())
        loads = end_of_step(layer, group, step).counts[""]
    return values, layer.router.weight.grad, loads, layer.router.balance["bias"].bias_E


@pytest.mark.parametrize("scope", ["sequence", "step", "micro_batch"])
@pytest.mark.parametrize(
    ("world", "split"), [(2, "by sequences"), (4, "by sequences"), (2, "within sequences"), (3, "within sequences")]
)
def test_shares_of_the_ranks_add_up_to_the_one_process_value(world: int, scope: str, split: str) -> None:
    """micro_batch and parts of sequences need their group for that; loads and the bias are the same on every rank."""
    expected = run_ranks(1, on_rank, scope, "by sequences")[0]
    results = run_ranks(world, on_rank, scope, split)
    for step in range(STEPS):
        total = sum(values[step] for values, *_ in results)
        torch.testing.assert_close(total, expected[0][step], rtol=1e-12, atol=0)
    gradient = sum(result[1] for result in results)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-12, atol=1e-12)
    for _, _, loads, bias in results:
        assert torch.equal(loads, expected[2]) and torch.equal(bias, expected[3])
