"""Sparse collectives equal a dense reference on any placement, forward and backward, and move the fewest bytes."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain.comm.sparse import Atoms, sparse_all_gather, sparse_reduce_scatter, start_sparse_all_gather
from tests.distributed.moe_ranks import watching

Layer = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # homes, wanted
SHAPES = [(2, 3), (), (4,)]


def layers(world: int, draw: random.Random) -> list[Layer]:
    """One to three layers: any home, any wish; a rank may have no expert at all, and an expert no wish."""
    found = []
    for _ in range(draw.randint(1, 3)):
        some = draw.sample(range(world), draw.randint(1, world))
        homes = tuple(draw.choice(some) for _ in range(draw.randint(1, 6)))
        wanted = tuple(tuple(sorted(draw.sample(range(world), draw.randint(0, world)))) for _ in homes)
        found.append((homes, wanted))
    return found


def whole(i: int, n: int, salt: int) -> Tensor:
    """All experts' rows of layer i."""
    return torch.randn(n, *SHAPES[i], generator=torch.Generator().manual_seed(100 * salt + i), dtype=torch.float64)


def rows(x: Tensor, which: list[int]) -> Tensor:
    return x[torch.tensor(which, dtype=torch.int64)]


def at_home(layer: Layer, rank: int) -> list[int]:
    return [e for e, home in enumerate(layer[0]) if home == rank]


def held(layer: Layer, rank: int) -> list[int]:
    return [e for e, ranks in enumerate(layer[1]) if rank in ranks]


def _check(cases: list[list[Layer]]) -> None:
    """On each rank. The reference has all experts and all ranks' gradients in one place."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for case in cases:
        xs = [rows(whole(i, len(layer[0]), 0), at_home(layer, rank)).requires_grad_() for i, layer in enumerate(case)]
        atoms = [Atoms(x, *layer) for x, layer in zip(xs, case, strict=True)]
        with watching() as sent:
            pending = start_sparse_all_gather(atoms, group)
            outs = pending.wait()
            upstream = [rows(whole(i, len(layer[0]), 1 + rank), held(layer, rank)) for i, layer in enumerate(case)]
            torch.autograd.backward(outs, upstream)
        there = back = 0
        for i, (layer, x, out) in enumerate(zip(case, xs, outs, strict=True)):
            assert torch.equal(out, rows(whole(i, len(layer[0]), 0), held(layer, rank)))
            total = torch.zeros(len(layer[0]), *SHAPES[i], dtype=torch.float64)
            for r in range(world):
                for e in held(layer, r):
                    total[e] += whole(i, len(layer[0]), 1 + r)[e]
            want = rows(total, at_home(layer, rank))
            assert x.grad is not None
            torch.testing.assert_close(x.grad, want, rtol=0, atol=1e-14)
            size = 8 * torch.Size(SHAPES[i]).numel()
            there += size * sum(r != rank for e in at_home(layer, rank) for r in layer[1][e])
            back += size * sum(layer[0][e] != rank for e in held(layer, rank))
        if world > 1:
            assert len(sent) == 2, "one exchange for all layers, and one for their gradients"
            assert [sum(s.bytes_to.values()) for s in sent] == [there, back], "each copy once, what stays not at all"
            assert all(s.bytes_to[rank] == 0 for s in sent)
        _check_reduce(case, rank, world)


def _check_reduce(case: list[Layer], rank: int, world: int) -> None:
    held_rows = [Atoms(rows(whole(i, len(l[0]), 1 + rank), held(l, rank)), *l) for i, l in enumerate(case)]  # noqa: E741
    for a in held_rows:
        a.x.requires_grad_()
    sums = sparse_reduce_scatter(held_rows, dist.group.WORLD)
    torch.autograd.backward(sums, [rows(whole(i, len(l[0]), 0), at_home(l, rank)) for i, l in enumerate(case)])  # noqa: E741
    for i, (layer, a, mine) in enumerate(zip(case, held_rows, sums, strict=True)):
        want = [sum((whole(i, len(layer[0]), 1 + r)[e] for r in layer[1][e]), torch.zeros(SHAPES[i]))
                for e in at_home(layer, rank)]  # fmt: skip
        for got, expected in zip(mine, want, strict=True):
            torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-14)
        assert a.x.grad is not None
        assert torch.equal(a.x.grad, rows(whole(i, len(layer[0]), 0), held(layer, rank)))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_any_placement_equals_the_dense_reference(world: int, seed: int) -> None:
    """Thirty placements an example, so that ranks are forked a few times only."""
    draw = random.Random(seed)
    run_ranks(world, _check, [layers(world, draw) for _ in range(30)])


def _refusals() -> list[str]:
    group, messages = dist.group.WORLD, []
    layer: Layer = ((0, 1), ((0, 1), (1,)))
    wrong = [
        [Atoms(torch.ones(2, 3), *layer)],
        [Atoms(torch.ones(1, 3), *layer), Atoms(torch.ones(1, 3).double(), *layer)],
    ]
    for atoms in wrong:
        with pytest.raises(ValueError) as error:
            sparse_all_gather(atoms, group)
        messages.append(str(error.value))
    return messages


def test_wrong_rows_and_mixed_dtypes_are_refused_before_anything_is_sent() -> None:
    for rows_message, dtype_message in run_ranks(2, _refusals):
        assert rows_message == "tensor 0 has 2 rows, but this rank has 1 of its experts"
        assert dtype_message.startswith("one exchange moves one dtype, but tensor 1 is torch.float64")


def _made_by_a_second_exchange() -> int:
    """Tensors made of numbers of this process, each of which would go to a GPU and wait for it."""
    x = torch.randn(4 // dist.get_world_size(), 3, requires_grad=True)
    atoms = [Atoms(x, (0, 0, 1, 1), ((0, 1), (0,), (1,), (0, 1)))]

    def exchange() -> None:
        sparse_all_gather(atoms, dist.group.WORLD)[0].sum().backward()

    exchange()
    with patch("torch.tensor", wraps=torch.tensor) as made:
        exchange()
    return made.call_count


def test_an_exchange_that_was_made_before_waits_for_no_gpu() -> None:
    assert run_ranks(2, _made_by_a_second_exchange) == [0, 0]
