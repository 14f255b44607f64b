"""A recomputed layer routes, drops, counts and lays out once, and has the same gradients."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrain.moe.balance import end_of_step
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.routers import topk
from moetrain.moe.routing import TokenContext
from tests.moe.toys import config, empty_carry, make_layer, tokens

S = 10
BALANCE: dict[str, Any] = {"aux_loss": {"scope": "sequence"}, "z_loss": {}, "bias": {}}
CAPACITY = {"capacity_factor": 0.8, "drop_policy": "random"}


def step(layer: Any, recompute: str) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """(gradients, loads, dropped) of one step of two micro-batches."""
    gradients = []
    layer.experts.recompute = layer.shared.recompute = recompute == "experts"
    for seed in (0, 1):
        x = tokens(3 * S, seed=seed).requires_grad_()
        context = TokenContext(seq_len=S)
        if recompute == "layer":
            out, carry = checkpoint(
                layer, x, empty_carry(BALANCE), context, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out, carry = layer(x, empty_carry(BALANCE), context)
        (out.square().sum() + carry.aux_A.sum()).backward()
        gradients.append(x.grad)
    gradients += [p.grad for p in layer.parameters()]
    loads = end_of_step(layer, None, 0)
    return gradients, loads.counts[""], loads.dropped[""]


@pytest.mark.parametrize("moe", [{}, CAPACITY], ids=["dropless", "random drops"])
@pytest.mark.parametrize("recompute", ["layer", "experts"])
def test_recompute_repeats_no_decision(recompute: str, moe: dict[str, Any]) -> None:
    cfg = config(shared_dim=6, shared_gate=True, **moe)
    expected = step(make_layer(cfg, BALANCE), "none")
    with (
        patch.object(topk, "router_topk", side_effect=topk.router_topk) as choose,
        patch.object(LocalDispatcher, "layout", autospec=True, side_effect=LocalDispatcher.layout) as layout,
    ):
        got = step(make_layer(cfg, BALANCE), recompute)
    chosen = [call for call in choose.call_args_list if call.kwargs["ids_TK"] is None]
    assert len(chosen) == layout.call_count == 2, "once per micro-batch"
    for ours, theirs in zip(got[0], expected[0], strict=True):
        assert torch.equal(ours, theirs), "the same bits"
    assert torch.equal(got[1], expected[1]) and int(got[1].sum()) == 2 * 3 * S * 2
    assert got[2] == expected[2] and (got[2] > 0) == bool(moe)
