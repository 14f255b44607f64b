"""Uneven collectives equal slicing and adding in one process, forward and backward, with empty ranks too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain.comm import all_gather_ints, all_gather_v, all_to_all, reduce_scatter_v

D = 3
# Row (r, s): rows that rank r sends to rank s.
SPLITS = {
    2: [[2, 3], [0, 4]],
    3: [[1, 0, 2], [0, 0, 0], [5, 0, 1]],
}
SIZES = {2: [4, 1], 3: [2, 0, 3]}


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _all_to_all(splits: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    x = values(sum(splits[rank]), D, seed=rank).requires_grad_()
    receive = [row[rank] for row in splits]
    out = all_to_all(x, receive, splits[rank], group)
    out.backward(10.0 * values(*out.shape, seed=100 + rank))
    ids = torch.arange(len(x)) + 1000 * rank
    assert x.grad is not None
    return out.detach(), x.grad, all_to_all(ids, receive, splits[rank], group)


@pytest.mark.parametrize("world", SPLITS)
def test_all_to_all_moves_rows_and_their_gradients_back(world: int) -> None:
    splits = SPLITS[world]
    results = run_ranks(world, _all_to_all, splits)
    sent = [values(sum(splits[r]), D, seed=r).split(splits[r]) for r in range(world)]
    upstream = []
    for rank, (out, _, ids) in enumerate(results):
        assert torch.equal(out, torch.cat([sent[source][rank] for source in range(world)]))
        expected_ids = [torch.arange(sum(splits[r])).split(splits[r])[rank] + 1000 * r for r in range(world)]
        assert torch.equal(ids, torch.cat(expected_ids)), "integers travel exactly"
        upstream.append((10.0 * values(*out.shape, seed=100 + rank)).split([row[rank] for row in splits]))
    for rank, (_, grad, _) in enumerate(results):
        assert torch.equal(grad, torch.cat([upstream[target][rank] for target in range(world)]))


def _gather_and_scatter(sizes: list[int]) -> tuple[Tensor, ...]:
    rank, group = dist.get_rank(), dist.group.WORLD
    x = values(sizes[rank], D, seed=rank).requires_grad_()
    everyone = all_gather_v(x, sizes, group)
    everyone.backward(values(sum(sizes), D, seed=100 + rank))
    y = values(sum(sizes), D, seed=200 + rank).requires_grad_()
    own = reduce_scatter_v(y, sizes, group)
    own.backward(values(sizes[rank], D, seed=300 + rank))
    assert x.grad is not None and y.grad is not None
    return everyone.detach(), x.grad, own.detach(), y.grad


@pytest.mark.parametrize("world", SIZES)
def test_all_gather_v_and_reduce_scatter_v_are_each_others_backward(world: int) -> None:
    sizes = SIZES[world]
    results = run_ranks(world, _gather_and_scatter, sizes)
    gathered = torch.cat([values(sizes[r], D, seed=r) for r in range(world)])
    gathered_grad = sum(values(sum(sizes), D, seed=100 + r) for r in range(world)).split(sizes)  # type: ignore[union-attr]
    summed = sum(values(sum(sizes), D, seed=200 + r) for r in range(world)).split(sizes)  # type: ignore[union-attr]
    summed_grad = torch.cat([values(sizes[r], D, seed=300 + r) for r in range(world)])
    for rank, (everyone, x_grad, own, y_grad) in enumerate(results):
        assert torch.equal(everyone, gathered) and torch.equal(y_grad, summed_grad)
        torch.testing.assert_close(x_grad, gathered_grad[rank], rtol=0, atol=1e-14)
        torch.testing.assert_close(own, summed[rank], rtol=0, atol=1e-14)


def _ints_and_errors() -> tuple[list[list[int]], str]:
    rank, group = dist.get_rank(), dist.group.WORLD
    numbers = all_gather_ints([rank, 10 * rank], group, torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        all_to_all(torch.ones(3, D), [1, 1], [1, 1], group)
    return numbers, str(error.value)


def test_integers_are_gathered_and_wrong_splits_refused_before_anything_is_sent() -> None:
    for numbers, message in run_ranks(2, _ints_and_errors):
        assert numbers == [[0, 0], [1, 10]]
        assert message == "all_to_all got 3 rows to send but splits for 2"
