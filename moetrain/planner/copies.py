"""What copies of experts (``experts/placement=fssdp``) take: bytes on the fullest rank, and seconds."""

from __future__ import annotations

import numpy as np

from moetrain.planner import links
from moetrain.planner.candidates import RECOMPUTE, Mappings, Numbers
from moetrain.planner.cluster import Cluster
from moetrain.planner.memory import Run
from moetrain.planner.placed import FSSDP
from moetrain.planner.rates import Constants
from moetrain.planner.shape import ExpertShape, ModelShape


def copies_bytes(shape: ModelShape, m: Mappings, run: Run) -> Numbers:
    """A layer's experts and copies, side by side in the weights' own width, as they travel; and what one layer needs
    while copies or gradients travel. Where kernels turn weights into 16 bits for backward, those of copies, too (those
    of the own experts are activations)."""
    placed, layers = run.placed, _experts(shape)
    if placed is None or not layers:
        return np.zeros(len(m))
    one = sum(x.numel / x.count for x in layers) / len(layers)
    narrow = run.narrow if run.narrow < run.wide and run.rounds else 0
    again = np.where(m.recompute == RECOMPUTE.index("none"), narrow, 0)
    size = one * (run.wide * (placed.held + placed.passing) + again * placed.copies)
    return np.where(m.placement == FSSDP, size, 0.0)


def copies_seconds(
    x: ExpertShape, m: Mappings, dense: Numbers, run: Run, cluster: Cluster, c: Constants
) -> tuple[Numbers, Numbers]:
    """(exposed, hidden) seconds in which a layer's copies come and their gradients go home. They hide behind the
    layer's attention and dense MLP forward, which take ``dense`` seconds, and backward, as ``replay`` has it."""
    placed = run.placed
    if placed is None:
        return np.zeros(len(m)), np.zeros(len(m))
    there = links.straight(placed.near, placed.far, x.numel / x.count * run.wide, cluster, c)
    back = there * (2 if placed.frees else 1)
    behind = 0 * dense if cluster.kind == "cpu" else dense
    exposed = np.maximum(0.0, there - behind) + np.maximum(0.0, back - 2 * behind)
    has = m.placement == FSSDP
    return np.where(has, exposed, 0.0), np.where(has, there + back - exposed, 0.0)


def moved_seconds(shape: ModelShape, m: Mappings, run: Run, cluster: Cluster, c: Constants) -> Numbers:
    """Seconds of a step in which experts change home, with weights and two states of the optimizer."""
    placed = run.placed
    if placed is None:
        return np.zeros(len(m))
    near, far = placed.moved_near, placed.moved_far
    sizes = (3.0 * run.wide * x.numel / x.count for x in _experts(shape))
    return np.where(m.placement == FSSDP, sum(links.straight(near, far, size, cluster, c) for size in sizes), 0.0)


def _experts(shape: ModelShape) -> list[ExpertShape]:
    return [x for x in (shape.kinds[k].experts for k in shape.layers) if x is not None]
