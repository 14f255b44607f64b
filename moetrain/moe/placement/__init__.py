"""Placement policies decide which ranks hold which experts. One file per kind; the arithmetic is in ``plan``.

A policy is a pure function of the loads of finished steps, so it needs no ranks: ``parallel.placement`` does what it
says, and a simulator can ask it the same. A new kind is one new file here and one preset in configs/experts/placement/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetrain.config.registry import PLACEMENTS
from moetrain.moe.options import as_options
from moetrain.moe.placement.plan import Homes, Loads, Placement, Topology, at_home


class Policy:
    """Base of all policies: every expert at home, and home is where it was. Built as ``Kind(options, topology)``.

    calibrates: whether ``calibrate`` may add copies. frees: whether copies are freed after forward and brought again
    in backward.
    """

    def __init__(self, options: Any, topology: Topology) -> None:
        self.options, self.topology = options, topology
        self.calibrates = self.frees = False

    def place(self, homes: Homes, loads: Loads) -> Placement:
        """The ranks that hold each expert of a layer in the next step, for which ``loads`` are predicted."""
        return at_home(homes)

    def calibrate(self, homes: Homes, placement: Placement, counts_RE: Sequence[Sequence[int]]) -> Placement:
        """``placement``, or one with more copies, once the real rows of each rank for each expert are known."""
        return placement

    def rehome(self, step: int, homes: list[Homes], loads_LE: Sequence[Loads]) -> list[Homes]:
        """The homes of all layers' experts after ``step`` finished steps, for which ``loads_LE`` are predicted."""
        return homes


def build_policy(options: Any, ranks: int) -> Policy:
    """The policy that ``options`` (a registered options object, or a mapping with its ``kind``) describe."""
    options = as_options(PLACEMENTS, options)
    policy: Policy = PLACEMENTS.entry_of(options).build(
        options, Topology(ranks, min(ranks, getattr(options, "node_size", ranks)))
    )
    return policy
