"""Hashing rows into buckets, and the maps between rows and buckets: against loops over rows, in float64."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moetrain.moe.dispatch.buckets import (
    Buckets,
    bucket_rows,
    centre,
    copy_to_rows,
    hash_rows,
    mean_rows,
    one_each,
    rotations,
)

E, D, R = 3, 6, 40
EXPERT_R = torch.arange(R) * E // R  # in order


def rows(seed: int = 0) -> Tensor:
    return torch.randn(R, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_expert(x: Tensor) -> list[Tensor]:
    return [x[e == EXPERT_R] for e in range(E)]


def rotation(hashes: int, axes: int, step: int = 0, layer: int = 0) -> Tensor:
    return rotations(D, hashes, axes, step, layer).double()


def members(buckets: Buckets) -> list[list[int]]:
    """The rows of each bucket, in order of bucket."""
    found: dict[int, list[int]] = defaultdict(list)
    for row, bucket in enumerate(buckets.order.token_R.tolist()):
        found[bucket].append(row)
    return [found[bucket] for bucket in range(len(buckets.expert_J))]


def test_a_hash_is_the_nearest_of_the_turned_axes() -> None:
    """By its definition: of the directions +-q_a the one with the least angle; scale does not matter."""
    turned, x = rotation(4, 3), rows()
    for h in range(4):
        directions = torch.cat([turned[h], -turned[h]])
        nearest = torch.cdist(torch.nn.functional.normalize(x), directions).argmin(1)
        assert torch.equal(hash_rows(x, turned)[:, h], nearest)
    assert torch.equal(hash_rows(7.5 * x, turned), hash_rows(x, turned))


def test_rotations_are_orthonormal_and_follow_step_and_layer() -> None:
    a = rotations(D, 5, 4, step=3, layer=1)
    torch.testing.assert_close(a @ a.mT, torch.eye(4).expand(5, 4, 4))
    assert torch.equal(a, rotations(D, 5, 4, step=3, layer=1))
    assert not torch.allclose(a, rotations(D, 5, 4, step=4, layer=1))
    assert not torch.allclose(a, rotations(D, 5, 4, step=3, layer=2))
    assert rotations(D, 5, 100, step=0, layer=0).shape == (5, D, D), "there are no more axes than dimensions"


@pytest.mark.parametrize(("hashes", "axes"), [(1, 1), (2, 2), (3, 6), (40, 6)])
def test_a_bucket_holds_the_rows_of_one_expert_that_agree_in_all_hashes(hashes: int, axes: int) -> None:
    """40 hashes of 12 directions are more keys than int64 can tell apart."""
    x, turned = rows(), rotation(hashes, axes)
    buckets = bucket_rows(x, EXPERT_R, E, turned)
    hashed = hash_rows(torch.cat([part - part.mean(0) for part in by_expert(x)]), turned).tolist()
    expected: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row in range(R):
        expected[(int(EXPERT_R[row]), *hashed[row])].append(row)
    found = members(buckets)
    assert sorted(found) == sorted(expected.values())
    assert buckets.counts_J.tolist() == [len(b) for b in found]
    assert buckets.expert_J.tolist() == [int(EXPERT_R[b[0]]) for b in found] == sorted(buckets.expert_J.tolist())
    assert buckets.alone_R.tolist() == [len(found[int(buckets.order.token_R[row])]) == 1 for row in range(R)]


def test_what_all_rows_of_an_expert_have_in_common_does_not_matter() -> None:
    x, turned = rows(), rotation(3, 2)
    common = 50 * torch.randn(E, D, dtype=torch.float64)
    assert members(bucket_rows(x + common[EXPERT_R], EXPERT_R, E, turned)) == members(
        bucket_rows(x, EXPERT_R, E, turned)
    )


def test_more_hashes_split_buckets_and_never_join_them() -> None:
    x, turned = rows(), rotation(6, 1)
    sizes = []
    coarse: list[list[int]] = [list(range(R))]
    for hashes in range(1, 7):
        fine = members(bucket_rows(x, EXPERT_R, E, turned[:hashes]))
        assert all(any(set(b) <= set(c) for c in coarse) for b in fine)
        coarse = fine
        sizes.append(len(fine))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_alone_and_moves_no_other(bad: float) -> None:
    x, turned = rows(), rotation(2, 1)
    x[5, 2] = x[6, 0] = x[30] = bad
    buckets = bucket_rows(x, EXPERT_R, E, turned)
    found = members(buckets)
    assert [5] in found and [6] in found and [30] in found
    good = [row for row in range(R) if row not in (5, 6, 30)]
    alone = bucket_rows(x[good], EXPERT_R[good], E, turned)
    assert sorted([good[i] for i in b] for b in members(alone)) == sorted(b for b in found if b[0] in good)
    mean = mean_rows(x, buckets)
    assert torch.equal(copy_to_rows(mean, buckets)[[5, 6, 30]].nan_to_num(9, 8, 7), x[[5, 6, 30]].nan_to_num(9, 8, 7))
    left = centre(x, mean, buckets)
    assert (left[[5, 6, 30]] == 0).all() and left.isfinite().all()


@pytest.mark.parametrize("n_rows", [R, 1, 0])
def test_means_copies_and_distances_against_loops_and_finite_differences(n_rows: int) -> None:
    x = rows()[:n_rows].requires_grad_()
    buckets = bucket_rows(x.detach(), EXPERT_R[:n_rows], E, rotation(2, 1))
    found = members(buckets)
    mean = mean_rows(x, buckets)
    for j, bucket in enumerate(found):
        torch.testing.assert_close(mean[j], x[bucket].mean(0))
        assert all(torch.equal(copy_to_rows(mean, buckets)[row], mean[j]) for row in bucket)
        torch.testing.assert_close(centre(x, mean, buckets)[bucket], x[bucket] - x[bucket].mean(0))
    if n_rows:
        assert gradcheck(lambda x: mean_rows(x, buckets), x)
        assert gradcheck(lambda y: copy_to_rows(y, buckets), mean.detach().requires_grad_())
        assert gradcheck(lambda x: centre(x, mean_rows(x, buckets), buckets), x)


def test_rows_alone_come_through_bit_for_bit() -> None:
    x = rows().requires_grad_()
    buckets = one_each(EXPERT_R)
    mean = mean_rows(x, buckets)
    assert torch.equal(copy_to_rows(mean, buckets), x) and (centre(x, mean, buckets) == 0).all()
