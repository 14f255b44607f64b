"""Rows that point in similar directions share a bucket: cross-polytope hashing, and the mean of each bucket.

Cross-polytope hash (Andoni et al., arXiv 1509.02897): turn a vector at random and say which of the 2n directions
+-e_1 .. +-e_n is nearest, which is the sign and the place of the largest coordinate. Here n coordinates of a turned
vector are kept (``axes``; 1 is the hash by the side of a plane), and a bucket holds the rows of one expert for which
several such hashes all agree. LSH-MoE (arXiv 2411.08446) leaves open how hashes combine and how many coordinates they
keep. What is hashed is a row minus the mean of its expert's rows here: activations have a large part in common, which
would send most rows to a few buckets, and ever more as a run goes wrong.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.permute import RowOrder, gather_rows, inverse, sum_rows

# The largest number of keys that int64 can tell apart.
MOST_KEYS = 2**63 - 1


@dataclass(frozen=True)
class Buckets:
    """How R rows belong to J buckets, which are in order of expert.

    order: of the rows, with buckets in the place of its tokens. expert_J, counts_J: the expert of each bucket, and how
    many rows it has. alone_R: whether a row is the only one of its bucket.
    """

    order: RowOrder
    expert_J: Tensor
    counts_J: Tensor
    alone_R: Tensor


def rotations(dim: int, hashes: int, axes: int, step: int, layer: int) -> Tensor:
    """``axes`` orthonormal rows of a random rotation for each hash, float32 (hashes, axes, dim), from (step, layer)
    alone. More axes than ``dim`` has are cut."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"lsh/{step}/{layer}".encode()))
    normal = torch.randn(hashes, dim, min(axes, dim), generator=generator)
    return torch.linalg.qr(normal).Q.mT.contiguous()


def hash_rows(x_RD: Tensor, rotation_HAD: Tensor) -> Tensor:
    """The hashes of each row, int64 (R, H), from 0 to 2A - 1: coordinate a gives a, or A + a where it is negative."""
    H, A, D = rotation_HAD.shape
    at_RHA = (x_RD.to(rotation_HAD.dtype) @ rotation_HAD.view(H * A, D).T).view(-1, H, A)
    place_RH = at_RHA.abs().argmax(dim=2)
    sign_RH = at_RHA.gather(2, place_RH[:, :, None])[:, :, 0] < 0
    return place_RH + A * sign_RH


def bucket_rows(x_RD: Tensor, expert_R: Tensor, n_experts: int, rotation_HAD: Tensor) -> Buckets:
    """The buckets of rows in order of expert. A row that is not finite has one of its own, it harms no other."""
    finite_R = x_RD.isfinite().all(dim=1)
    own_R = torch.arange(1, len(x_RD) + 1, device=x_RD.device).masked_fill(finite_R, 0)
    hash_RH = hash_rows(_from_experts_mean(x_RD, expert_R, n_experts, finite_R), rotation_HAD)
    key_R, keys = expert_R, n_experts
    for digit_R, base in [(own_R, len(x_RD) + 1), *((h, 2 * rotation_HAD.shape[1]) for h in hash_RH.T)]:
        if keys > MOST_KEYS // base:  # number those in use anew, in the same order
            key_R = torch.unique(key_R, return_inverse=True)[1]
            keys = len(x_RD)
        key_R, keys = key_R * base + digit_R, keys * base
    _, bucket_R, counts_J = torch.unique(key_R, return_inverse=True, return_counts=True)
    return _buckets(bucket_R, counts_J, expert_R)


def _from_experts_mean(x_RD: Tensor, expert_R: Tensor, n_experts: int, finite_R: Tensor) -> Tensor:
    """The finite rows minus their mean over each expert; others 0."""
    R, E = (torch.arange(n, device=x_RD.device) for n in (len(x_RD), n_experts + 1))
    order = RowOrder(assignment_R=R, row_A=R, token_R=expert_R, start=torch.searchsorted(expert_R, E))
    x_RD = x_RD.masked_fill(~finite_R[:, None], 0).to(torch.promote_types(x_RD.dtype, torch.float32))
    n_E1 = sum_rows(finite_R[:, None].to(x_RD.dtype), order).clamp(min=1)
    return x_RD - gather_rows(sum_rows(x_RD, order) / n_E1, order)


def one_each(expert_R: Tensor) -> Buckets:
    """Every row in a bucket of its own: nothing is compressed."""
    R = torch.arange(len(expert_R), device=expert_R.device)
    return _buckets(R, torch.ones_like(R), expert_R)


def _buckets(bucket_R: Tensor, counts_J: Tensor, expert_R: Tensor) -> Buckets:
    row_A = bucket_R.argsort(stable=True)
    start = F.pad(counts_J.cumsum(0), (1, 0))
    return Buckets(
        order=RowOrder(assignment_R=inverse(row_A), row_A=row_A, token_R=bucket_R, start=start),
        expert_J=expert_R.index_select(0, row_A.index_select(0, start[:-1])),
        counts_J=counts_J,
        alone_R=counts_J.index_select(0, bucket_R) == 1,
    )


def mean_rows(x_RD: Tensor, buckets: Buckets) -> Tensor:
    """mean_JD: the mean of each bucket; exactly the row where it is alone. Backward gives each row 1/n of the gradient
    of its bucket's mean."""
    return sum_rows(x_RD, buckets.order) / buckets.counts_J[:, None].to(x_RD.dtype)


def copy_to_rows(y_JD: Tensor, buckets: Buckets) -> Tensor:
    """y_RD: what its bucket has. Backward sums the gradients of a bucket's rows."""
    return gather_rows(y_JD, buckets.order)


def centre(x_RD: Tensor, mean_JD: Tensor, buckets: Buckets) -> Tensor:
    """x_RD minus mean_JD, the means of its buckets; exactly 0 for a row alone, finite or not.

    A symmetric map of x_RD, so its backward is itself, all through x_RD: mean_JD gets no gradient.
    """
    return _Centre.apply(x_RD, mean_JD, buckets)


class _Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, mean_JD: Tensor, buckets: Buckets) -> Tensor:
        ctx.buckets = buckets
        return _from_mean(x_RD, mean_JD, buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _from_mean(grads[0], mean_rows(grads[0], ctx.buckets), ctx.buckets), None, None


def _from_mean(x_RD: Tensor, mean_JD: Tensor, buckets: Buckets) -> Tensor:
    return (x_RD - copy_to_rows(mean_JD, buckets)).masked_fill_(buckets.alone_R[:, None], 0)
