"""Randomness that needs no saving."""

from __future__ import annotations

import hashlib
import random

import numpy
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators (CPU and this rank's GPU) from the run's seed, the step and the rank.

    Called at the start of every step, it makes whatever a step draws a function of these three. So a checkpoint holds
    no generator states: the step is enough to continue with the same numbers, also on a rank that was not there before.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    random.seed(number)
    numpy.random.seed([number & 0xFFFFFFFF, number >> 32])
    torch.manual_seed(number)
