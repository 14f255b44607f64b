"""Clusters of equal size: k-means whose every cluster takes as many points as any other."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_clusters(x_ND: Tensor, k: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Numbers of the points of each of ``k`` clusters, ascending, int64 (k, N/k); k divides N.

    Lloyd's k-means from random points, with the assignment of ``equal_shares`` in place of the nearest centre.
    """
    x_ND = x_ND.to(torch.float32)
    centers_KD = x_ND[torch.randperm(len(x_ND), generator=generator)[:k]]
    cluster_N = torch.full((len(x_ND),), -1)
    for _ in range(iterations):
        score_NK = x_ND @ centers_KD.T - centers_KD.square().sum(1) / 2
        before, cluster_N = cluster_N, equal_shares(score_NK)
        if torch.equal(before, cluster_N):
            break
        centers_KD = torch.zeros_like(centers_KD).index_add_(0, cluster_N, x_ND) * (k / len(x_ND))
    return torch.stack([torch.nonzero(cluster_N == i).flatten() for i in range(k)])


def equal_shares(score_NK: Tensor) -> Tensor:
    """A cluster for each point, int64 (N,), N/K points each, so that no point and cluster prefer each other to what
    they have (deferred acceptance of Gale and Shapley). score_NK: how much they like each other."""
    score_NK = score_NK.clone()
    N, K = score_NK.shape
    while True:
        cluster_N = score_NK.argmax(1)
        mine_N = score_NK.gather(1, cluster_N[:, None]).squeeze(1)
        refused = [torch.nonzero(cluster_N == i).flatten() for i in range(K)]
        refused = [points[mine_N[points].argsort(descending=True, stable=True)[N // K :]] for points in refused]
        if not any(len(points) for points in refused):
            return cluster_N
        for i, points in enumerate(refused):
            score_NK[points, i] = float("-inf")
