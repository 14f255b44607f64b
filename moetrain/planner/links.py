"""Seconds that collectives take, by where the ranks of a group are. Ranks are numbered one machine after another.

A dispatcher's cost is an entry of ``DISPATCH_COST``: a new dispatcher adds one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moetrain.planner.candidates import Numbers
from moetrain.planner.cluster import Cluster
from moetrain.planner.rates import Constants


@dataclass(frozen=True)
class Group:
    """size: ranks of a group. stride: between one and the next."""

    size: Numbers
    stride: Numbers

    def inside(self, domain: int) -> Numbers:
        """Ranks of the group that share a domain of fast links."""
        return np.clip(domain // np.maximum(1, self.stride), 1, self.size)


def ring(volume: Numbers, group: Group, cluster: Cluster, c: Constants, calls: int = 1) -> Numbers:
    """An all-gather or reduce-scatter of ``volume`` bytes (the whole tensor). Between domains each rank has its own way
    out, and those of one domain share what has to cross. calls: that the volume is split into, which counts where their
    start was measured (``ring_us``); on a GPU one is queued behind the other."""
    inside = group.inside(cluster.domain)
    crosses = group.size > inside
    fast = 1e9 * (cluster.link_gb_s * c.plain if cluster.ring_gb_s is None else cluster.ring_gb_s)
    slow = cluster.network_gb_s * 1e9 * c.network
    speed = np.where(crosses, np.minimum(fast, slow * inside), fast)
    start = cluster.link_us if cluster.ring_us is None else cluster.ring_us * calls
    latency = np.where(crosses, cluster.network_us, start) * 1e-6
    n = group.size
    return np.where(n > 1, volume * (n - 1) / n / speed + latency * np.log2(np.maximum(n, 2)), 0.0)


@dataclass(frozen=True)
class Sent:
    """What a dispatch sends. tokens: of this rank. top_k: rows of each. width: bytes of a row. group: the ep ranks."""

    tokens: Numbers
    top_k: int
    width: float
    group: Group


def copies(sent: Sent, cluster: Cluster, c: Constants) -> Numbers:
    """All-to-all: each of a token's rows travels by itself."""
    inside, n = sent.group.inside(cluster.domain), sent.group.size
    rows = sent.tokens * sent.top_k * sent.width
    fast = rows * (inside - 1) / n / (cluster.link_gb_s * 1e9 * c.plain)
    slow = rows * (n - inside) / n / (cluster.network_gb_s * 1e9 * c.network)
    return np.where(n > 1, np.maximum(fast, slow) + _latency(sent.group, inside, cluster), 0.0)


def once(sent: Sent, cluster: Cluster, c: Constants) -> Numbers:
    """A token crosses once to each domain, and once to each rank in it, that has one of its experts (DeepEP, HybridEP;
    experts drawn evenly)."""
    inside, n = sent.group.inside(cluster.domain), sent.group.size
    domains = np.maximum(1.0, n / inside)
    token = sent.tokens * sent.width
    to_domains = (domains - 1) * (1 - (1 - 1 / domains) ** sent.top_k)
    to_ranks = (inside - 1) * domains * (1 - (1 - 1 / n) ** sent.top_k)
    fast = token * to_ranks / (cluster.link_gb_s * 1e9 * c.link)
    slow = token * to_domains / (cluster.network_gb_s * 1e9 * c.network)
    return np.where(n > 1, np.maximum(fast, slow) + _latency(sent.group, inside, cluster), 0.0)


def gathered(sent: Sent, cluster: Cluster, c: Constants) -> Numbers:
    """All-gather: every token goes to every rank of the group."""
    return ring(sent.tokens * sent.width * sent.group.size, sent.group, cluster, c)


def straight(near: float, far: float, size: float, cluster: Cluster, c: Constants) -> float:
    """Experts of ``size`` bytes sent from home to each rank that gets a copy, or their gradients back. near, far: those
    of the busiest rank, inside its domain and beyond."""
    fast = near * size / (cluster.link_gb_s * 1e9 * c.plain)
    slow = far * size / (cluster.network_gb_s * 1e9 * c.network)
    return max(fast, slow) + (cluster.network_us if far else cluster.link_us if near else 0.0) * 1e-6


def nowhere(sent: Sent, cluster: Cluster, c: Constants) -> Numbers:
    """Local: nothing is sent."""
    return np.zeros_like(sent.tokens)


def _latency(group: Group, inside: Numbers, cluster: Cluster) -> Numbers:
    return np.where(group.size > inside, cluster.network_us, cluster.link_us) * 1e-6 * 4


# By name of candidates.DISPATCH. One way; dispatch and combine each cost it, forward and backward.
DISPATCH_COST: dict[str, Callable[[Sent, Cluster, Constants], Numbers]] = {
    "local": nowhere,
    "all_to_all": copies,
    "all_gather": gathered,
    "two_step": once,
    "lsh": copies,
}
