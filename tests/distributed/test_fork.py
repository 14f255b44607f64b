"""The harness itself: results in rank order, the first failure's traceback, and no hang."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), total


def _rank_1_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the culprit")
    dist.all_reduce(torch.ones(1))


def _rank_0_is_killed() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _rank_0_hangs() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(3, _sum_of_ranks, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.item() == 33 for _, total in results)


def test_the_rank_that_failed_first_is_named_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*the culprit"):
        run_ranks(2, _rank_1_fails)


def test_a_rank_that_was_killed_is_named() -> None:
    """As the kernel does where memory runs out."""
    with pytest.raises(RuntimeError, match="rank 0 of 2 died of SIGKILL"):
        run_ranks(2, _rank_0_is_killed)


def test_a_hanging_rank_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="did not finish"):
        run_ranks(2, _rank_0_hangs, timeout=1)
    assert time.monotonic() - start < 10
