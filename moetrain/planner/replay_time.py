"""How long computation and exchanges of expert parallel ranks take on a described cluster: rates and latencies alone.

An exchange takes as long as its busiest network card, or its busiest rank inside a node, whichever is longer, at the
share ``LINKS`` of a link's rate that exchanges reach. Exchanges do not slow each other down. A card serves
``node / cards`` consecutive ranks and both directions at once.
"""

from __future__ import annotations

import numpy as np

from moetrain.moe.placement.plan import Homes, Placement
from moetrain.planner.cluster import Cluster

# Share of a link's rate that exchanges reach (DeepEP reports 0.8 to 0.97 of NVLink's, 0.8 to 1 of InfiniBand's).
LINKS = 0.8


class Clock:
    """``ranks`` consecutive GPUs of ``cluster``. efficiency: share of the peak that matrix products reach."""

    def __init__(self, cluster: Cluster, ranks: int, precision: str, efficiency: float) -> None:
        self.cluster, self.ranks = cluster, ranks
        self.rate = cluster.peak(precision) * efficiency
        r = np.arange(ranks)
        self.domain_R = r // cluster.domain
        gpus = cluster.node // (cluster.cards or cluster.node)  # behind one card
        self.card_R = r // gpus
        self.card_rate = cluster.network_gb_s * 1e9 * gpus * LINKS
        self.link_rate = cluster.link_gb_s * 1e9 * LINKS
        self.apart_RR = self.domain_R[:, None] != self.domain_R[None]
        self.ports = min(cluster.domain, ranks) // gpus or 1  # cards of a domain

    @property
    def domain_rate(self) -> float:
        """Bytes per second into or out of a domain, over all its cards; inside one where all ranks share it."""
        return self.card_rate * self.ports if self.apart_RR.any() else self.link_rate

    def compute(self, flops: float) -> float:
        """Seconds of matrix products."""
        return flops / self.rate

    def memory(self, n_bytes: float) -> float:
        """Seconds to read or write so much of a GPU's own memory."""
        return n_bytes / (self.cluster.memory_gb_s * 1e9)

    def exchange(self, bytes_RR: np.ndarray) -> float:
        """Seconds of an all-to-all in which rank r sends ``bytes_RR[r, s]`` bytes to rank s. What a rank keeps is
        free."""
        away_RR = np.where(self.apart_RR, bytes_RR, 0)
        near_RR = np.where(self.apart_RR, 0, bytes_RR)
        near_RR = near_RR - np.diag(np.diag(near_RR))
        network = max(_busiest(away_RR.sum(1), self.card_R), _busiest(away_RR.sum(0), self.card_R)) / self.card_rate
        link = max(near_RR.sum(1).max(), near_RR.sum(0).max()) / self.link_rate
        return float(max(network, link)) + self._latency(bool(away_RR.any()), bool(near_RR.any()))

    def broadcast(self, homes: Homes, placement: Placement, expert_bytes: int) -> float:
        """Seconds to bring experts from home to all ranks that hold them, or the sum of their gradients back, by
        pipelined broadcasts (NCCL's; Hecate's way): an expert enters each domain once, and leaves each at most once."""
        into = np.zeros(int(self.domain_R[-1]) + 1)
        near_R = np.zeros(self.ranks)
        for home, ranks in zip(homes, placement, strict=True):
            for domain in {int(self.domain_R[r]) for r in ranks} - {int(self.domain_R[home])}:
                into[domain] += 1
            near_R[[r for r in ranks if r != home]] += 1
        network = into.max() * expert_bytes / (self.card_rate * self.ports)
        link = near_R.max() * expert_bytes / self.link_rate
        return float(max(network, link)) + self._latency(bool(into.any()), bool(near_R.any()))

    def direct(self, homes: Homes, placement: Placement, expert_bytes: int) -> float:
        """The same, sent from home to each rank: as few bytes in all, but a hot expert's home sends them all
        (moetrain's ``comm.sparse``)."""
        return self.exchange(copies_sent(homes, placement, self.ranks) * expert_bytes)

    def _latency(self, away: bool, near: bool) -> float:
        return 1e-6 * (self.cluster.network_us if away else self.cluster.link_us if near else 0.0)


def copies_sent(homes: Homes, placement: Placement, ranks: int) -> np.ndarray:
    """Experts that rank r sends to rank s to make ``placement``, int64 (R, R)."""
    sent_RR = np.zeros((ranks, ranks), dtype=np.int64)
    for home, held in zip(homes, placement, strict=True):
        for rank in held:
            sent_RR[home, rank] += rank != home
    return sent_RR


def _busiest(bytes_R: np.ndarray, card_R: np.ndarray) -> float:
    return float(np.bincount(card_R, weights=bytes_R).max())
