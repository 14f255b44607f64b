"""``experts/placement=fssdp`` under an uneven load: how far it evens out the ranks, and what its copies weigh and cost.

Experts are placed by the policy that training uses (``moe.placement``), with homes planned already. Under a Zipf law
loads stand still, so what is predicted comes true; a line of a trace is placed by the line before it. Copies travel as
training sends them, straight from home to each rank (``comm.sparse``), in the width of the weights.
Shapes: N samples, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain.config.check_placement import placement_kind
from moetrain.config.errors import ConfigError
from moetrain.config.registry import PLACEMENTS
from moetrain.config.schema import Config
from moetrain.moe.options import as_options
from moetrain.moe.placement import build_policy
from moetrain.moe.placement.plan import Homes, Placement, Topology, ep_homes, serving
from moetrain.planner.candidates import DISPATCH, PLACEMENT, Mappings, Numbers
from moetrain.planner.loads import Load
from moetrain.planner.replay_time import copies_sent

FSSDP, LSH = PLACEMENT.index("fssdp"), DISPATCH.index("lsh")
LAYERS = 192  # that are placed, of all samples together: so many samples as that takes
# Settings of the policy, as pairs, so that what they lead to can be remembered.
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Placed:
    """What becomes of a load. rows, travel: of a layer's fullest rank, over the mean: computed, and sent or received
    over the slowest links; means of layers and samples. fullest_N: rows of all layers on the fullest rank, over the
    mean.

    near, far: experts that the busiest rank of a layer sends or receives, inside its domain and beyond; moved_near,
    moved_far: of those that change home, for each step. held, copies: experts that the fullest rank keeps side by side
    in all layers until backward, and the copies among them. passing: the most that one layer needs in addition.
    """

    rows: float
    travel: float
    fullest_N: Numbers
    near: float
    far: float
    moved_near: float
    moved_far: float
    held: float
    copies: float
    passing: float
    frees: bool


def fssdp_options(cfg: Config, domain: int) -> Options:
    """The settings of ``cfg``, or where it has another placement the preset's with domains as nodes. Raises ConfigError
    for those that cannot be planned."""
    chosen = cfg.experts.placement if placement_kind(cfg) == "fssdp" else {"kind": "fssdp", "node_size": domain}
    options = as_options(PLACEMENTS, chosen)
    if options.slots == 0:
        raise ConfigError("experts.placement.slots=0 leaves no place for copies: give 1 or more, or placement=ep")
    if options.calibrate:
        raise ConfigError(
            "experts.placement.calibrate=true adds copies by loads that a plan does not know; take it out"
        )
    return tuple(sorted(dataclasses.asdict(options).items()))


@functools.lru_cache(maxsize=8)
def place(load: Load, ranks: int, domain: int, options: Options) -> Placed:
    """Experts of ``load`` on ``ranks`` ranks, which divide their number; ``domain`` of them share fast links."""
    policy = build_policy({"kind": "fssdp", **dict(options)}, ranks)
    every = dict(options)["reshard_every"] or 1
    N, L, E = load.share_NLE.shape
    near_RR = np.arange(ranks)[:, None] // domain == np.arange(ranks) // domain
    far_RR = ~near_RR
    slow_RR = far_RR if far_RR.any() else ~np.eye(ranks, dtype=bool)
    plain: Homes = ep_homes(E, ranks)
    first = 0 if load.steady or N == 1 else 1
    samples = np.unique(np.linspace(first, N - 1, min(N - first, max(1, -(-LAYERS // L)))).astype(int))
    rows_NLR = np.zeros((len(samples), L, ranks))
    found: dict[str, list[float]] = {name: [] for name in ("travel", "near", "far", "moved_near", "moved_far")}
    kept = []
    for i, n in enumerate(samples):
        known_LE = load.share_NLE[n - first].tolist()
        homes = policy.rehome(0, [plain] * L, known_LE)
        own_LR, out_LR, in_LR = (np.zeros((L, ranks)) for _ in range(3))
        for layer in range(L):
            placement = policy.place(homes[layer], known_LE[layer])
            sent_RR = rows_sent(load.share_NLE[n, layer], placement, policy.topology)
            copies_RR = copies_sent(homes[layer], placement, ranks)
            moved_RR = copies_sent(plain, tuple((home,) for home in homes[layer]), ranks)
            rows_NLR[i, layer] = sent_RR.sum(0) * ranks
            found["travel"].append(_busiest(sent_RR, slow_RR) / (slow_RR.sum(1).max() / ranks**2))
            for name, x_RR in (("", copies_RR), ("moved_", moved_RR / every)):
                found[name + "near"].append(_busiest(x_RR, near_RR))
                found[name + "far"].append(_busiest(x_RR, far_RR))
            own_LR[layer] = np.bincount(homes[layer], minlength=ranks)
            out_LR[layer], in_LR[layer] = copies_RR.sum(1), copies_RR.sum(0)
        kept.append(_kept(own_LR, out_LR, in_LR, policy.frees))
    held, copies, passing = max(kept, key=lambda x: x[0] + x[2])
    return Placed(
        rows=float(rows_NLR.max(2).mean()), fullest_N=rows_NLR.mean(1).max(1), frees=policy.frees,
        held=held, copies=copies, passing=passing, **{name: float(np.mean(values)) for name, values in found.items()},
    )  # fmt: skip


def rows_sent(share_E: Numbers, placement: Placement, topology: Topology) -> Numbers:
    """Share of all rows that each rank sends to each rank (R, R), what stays included: ``plan.routes`` where all ranks'
    tokens choose alike and rows can be divided."""
    R = topology.ranks
    sent_RR = np.zeros((R, R))
    one = [e for e, ranks in enumerate(placement) if len(ranks) == 1]
    sent_RR += np.bincount([placement[e][0] for e in one], share_E[one], R) / R
    for e, ranks in enumerate(placement):
        if len(ranks) == R:
            np.fill_diagonal(sent_RR, sent_RR.diagonal() + share_E[e] / R)
        elif len(ranks) > 1:
            for source in range(R):
                (those,) = serving((ranks,), source, topology)
                sent_RR[source, list(those)] += share_E[e] / R / len(those)
    return sent_RR


def _busiest(x_RR: Numbers, where_RR: Numbers) -> float:
    there_RR = np.where(where_RR & ~np.eye(len(x_RR), dtype=bool), x_RR, 0)
    return float(max(there_RR.sum(0).max(), there_RR.sum(1).max()))


def _kept(own_LR: Numbers, out_LR: Numbers, in_LR: Numbers, frees: bool) -> tuple[float, float, float]:
    """(held, copies, passing) of the rank with most. own, out, in: experts at home, sent and received as copies."""
    held_LR = own_LR + in_LR
    # Forward, before a layer's are side by side: what is sent, laid out twice, and what comes. Backward: gradients of
    # all, what comes home, and what is sent, laid out twice, or the sums at home.
    forward_LR = 2 * out_LR + in_LR - held_LR
    backward_LR = held_LR + out_LR + np.maximum(2 * in_LR, own_LR)
    passing_LR = np.maximum(forward_LR, backward_LR)
    if frees:  # after forward; in backward a layer's come while those of the layer after it are there
        both = min(2, len(own_LR))
        all_R, copies_R, most_R = both * held_LR.max(0), both * in_LR.max(0), both * held_LR.max(0) + passing_LR.max(0)
    else:  # in backward those of the layers after it have gone
        all_R, copies_R, most_R = held_LR.sum(0), in_LR.sum(0), (held_LR.cumsum(0) + passing_LR).max(0)
    held = float(all_R.max())
    return held, float(copies_R[most_R.argmax()]), float(most_R.max()) - held


@dataclass(frozen=True)
class Uneven:
    """Of each mapping: rows that the fullest rank computes, and sends or receives, over the mean, in time; and that it
    holds, in the median of the samples."""

    rows: Any = 1.0
    travel: Any = 1.0
    held: Any = 1.0


def uneven(m: Mappings, load: Load | None, placed: Placed | None) -> Uneven:
    """What ``load`` does to ``m``. placed: where experts of those with fssdp are."""
    rows, held = np.ones(len(m)), np.ones(len(m))
    if load is not None:
        for ep in np.unique(m.ep):
            rows[m.ep == ep] = load.slowest(int(ep))
            held[m.ep == ep] = np.median(load.fullest(int(ep)))
    travel = rows
    if placed is not None:
        there = m.placement == FSSDP
        rows, travel = np.where(there, placed.rows, rows), np.where(there, placed.travel, travel)
        held = np.where(there, np.median(placed.fullest_N), held)
    return Uneven(rows, travel, held)
