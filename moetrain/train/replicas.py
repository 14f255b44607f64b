"""Do ranks that should hold the same weights hold the same? A faulty chip shows here long before in the loss."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.comm.ranks import Ranks
from moetrain.config.errors import TrainError

log = logging.getLogger("moetrain")

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
JUMP_S = 5.0  # clocks that are so far apart, or that jump so far, are worth a warning
SHOWN = 3


def checksum(values: Tensor) -> int:
    """Sum of the bits of ``values`` as integers, modulo 2^64: any one value that differs changes it."""
    return int(values.detach().contiguous().view(BITS[values.element_size()]).sum(dtype=torch.int64))


def checksums(model: nn.Module) -> dict[tuple[Any, ...], int]:
    """(name, place of the shard in the whole, its shape) -> checksum, of all weights that this rank holds."""
    found: dict[tuple[Any, ...], int] = {}
    for name, value in model.named_parameters():
        local, offset = value.detach(), (0,) * value.ndim
        if isinstance(value, DTensor):
            local = value.to_local().detach()
            offset = tuple(compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)[1])
        if local.numel():
            found[name, offset, tuple(local.shape)] = checksum(local)
    return found


class Checks:
    """What ranks compare every so many steps: weights that several of them hold, and their clocks.

    weights: False where names do not tell which part of a weight a rank holds (DeepSpeed's experts).
    """

    def __init__(self, weights: bool = True) -> None:
        self._weights = weights
        self._ahead_s = time.time() - time.monotonic()

    def run(self, model: nn.Module, step: int, last_good: str) -> None:
        """Compare. Collective. Raises TrainError that names the ranks whose weights differ from most others'."""
        ahead_s = time.time() - time.monotonic()
        jump_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        ranks = Ranks()
        told = ranks.gather((time.time(), jump_s, checksums(model) if self._weights else {}))
        _compare_clocks([clock for clock, _, _ in told], [jump for _, jump, _ in told], ranks)
        holders: dict[tuple[Any, ...], dict[int, int]] = defaultdict(dict)  # part of a weight -> rank -> checksum
        for rank, (_, _, sums) in enumerate(told):
            for key, value in sums.items():
                holders[key][rank] = value
        odd: dict[int, list[str]] = defaultdict(list)  # rank -> names
        for key, held in holders.items():
            usual, votes = Counter(held.values()).most_common(1)[0]
            if votes < len(held):
                # Of two that differ nobody knows which one is right
                for rank in [r for r in held if held[r] != usual or votes * 2 <= len(held)]:
                    odd[rank].append(key[0])
        if odd:
            names = list(dict.fromkeys(name for found in odd.values() for name in found))
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            who = ", ".join(str(rank) for rank in sorted(odd))
            raise TrainError(
                f"the weights on rank {who} are not those on the ranks that should hold the same, after step {step}: "
                f"{', '.join(names[:SHOWN])}{more}; take its machine out, and go on from the last good checkpoint: "
                f"{last_good}"
            )


def _compare_clocks(clocks: list[float], jumps: list[float], ranks: Ranks) -> None:
    for rank, jump in enumerate(jumps):
        if abs(jump) > JUMP_S:
            ranks.say(logging.WARNING, f"the clock of rank {rank} has jumped by {jump:+.0f} s; times in logs are off")
    middle = sorted(clocks)[len(clocks) // 2]
    apart = {rank: clock - middle for rank, clock in enumerate(clocks) if abs(clock - middle) > JUMP_S}
    if apart:
        far = ", ".join(f"rank {rank} by {seconds:+.0f} s" for rank, seconds in apart.items())
        ranks.say(logging.WARNING, f"clocks are apart: {far}; times in logs cannot be compared")
