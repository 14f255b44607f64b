"""Shared experts computed while rows travel: the same bits, and really under way in the meantime, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor, nn

from tests.distributed.moe_ranks import Result, Spread, compare, make, on_rank, run_layer, split_layer
from tests.moe.toys import tokens

SIZES = [5, 0, 3, 8]
SPREADS = [
    Spread({"kind": "all_to_all"}, 4),
    Spread({"kind": "all_gather"}, 4),
    Spread({"kind": "two_step", "node_size": 2}, 4),
    Spread({"kind": "all_to_all"}, 2, 2),
    Spread({"kind": "two_step", "node_size": 1}, 2, 2),
    Spread({"kind": "local"}, 1, 4),
]


def numbers(result: Result) -> list[Tensor]:
    return [result.out, result.x_grad, result.router_grad, *result.shared_grads, *result.grads.values()]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("spread", SPREADS, ids=lambda s: f"{s.dispatch['kind']} {s.ep}x{s.etp}")
def test_overlap_changes_no_bit(spread: Spread, recompute: str) -> None:
    spread = replace(spread, recompute=recompute, dtype=torch.float32)
    plain = run_ranks(4, on_rank, spread, "biases", SIZES)
    overlapped = run_ranks(4, on_rank, replace(spread, overlap=True), "biases", SIZES)
    for (one, _), (other, _) in zip(plain, overlapped, strict=True):
        for a, b in zip(numbers(one), numbers(other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_overlap_with_dropped_tokens_equals_one_process(recompute: str) -> None:
    compare(Spread({"kind": "all_to_all"}, 4, 1, recompute, overlap=True), "drops", [9, 0, 16, 5])


class Logged:
    """A collective's work that tells when it is waited for."""

    def __init__(self, work: Any, name: str, log: list[str]) -> None:
        self.work, self.name, self.log = work, name, log

    def wait(self) -> None:
        self.log.append(f"{self.name} arrives")
        self.work.wait()


class Marked(nn.Module):
    """A module that tells when it runs, forward and backward."""

    def __init__(self, inner: nn.Module, log: list[str]) -> None:
        super().__init__()
        self.inner, self.log, self.recompute = inner, log, False

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("shared experts")
        out = self.inner(x)
        out.register_hook(lambda g: self.log.append("shared experts' backward begins"))
        self.inner.w_gate.weight.register_hook(lambda g: self.log.append("and ends"))
        return out


def _order(overlap: bool) -> list[str]:
    log: list[str] = []
    layer = make("dropless")
    split_layer(layer, Spread({"kind": "all_to_all"}, 2, overlap=overlap))
    layer.shared = Marked(layer.shared, log)
    original, names = dist.all_to_all_single, iter(["counts", "rows", "outputs", "their gradients", "rows' gradients"])

    def logging(*args: Any, **kwargs: Any) -> Logged:
        name = next(names)
        log.append(f"{name} leave")
        return Logged(original(*args, **kwargs), name, log)

    dist.all_to_all_single = logging
    run_layer(layer, tokens(6), tokens(6, seed=1), dist.group.WORLD, "none")
    return [line for line in log if "rows" not in line and "counts" not in line]


def test_shared_experts_run_between_departure_and_arrival() -> None:
    there = ["outputs leave", "shared experts", "outputs arrives"]
    back = ["their gradients leave", "shared experts' backward begins", "and ends", "their gradients arrives"]
    assert run_ranks(2, _order, True) == [there + back] * 2
    one_by_one = ["outputs leave", "outputs arrives", "shared experts"]
    back = ["shared experts' backward begins", "and ends", "their gradients leave", "their gradients arrives"]
    assert run_ranks(2, _order, False) == [one_by_one + back] * 2
