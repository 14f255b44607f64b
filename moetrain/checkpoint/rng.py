"""Randomness that needs no saving."""

from __future__ import annotations

import hashlib
import random
import struct

import numpy
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on CPU and GPU, from the run's seed, the step and the rank.

    Called at the start of every step, it makes whatever a step draws a function of these three. So a checkpoint holds
    no generator states: the step is enough to continue with the same numbers, also on a rank that was not there before.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    words = struct.unpack("<4Q", digest)
    random.seed(words[0])
    numpy.random.seed([words[1] & 0xFFFFFFFF, words[1] >> 32])
    torch.manual_seed(words[2])
