"""What ranks agree on."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.comm.ranks import RankError, Ranks
from moetrain.config.errors import DataError


def test_work_of_the_first_rank_may_take_longer_than_a_collective() -> None:
    """As preparing data does when a launcher has started all ranks: the others neither give up nor go on before it, and
    meet its error."""

    def body() -> tuple[int, list[str]]:
        ranks, said = Ranks(dist.new_group(backend="gloo", timeout=timedelta(seconds=1))), []

        def work(error: Exception | None = None) -> int:
            time.sleep(2)
            if error is not None:
                raise error
            return dist.get_rank() + 7

        for error in (DataError("no text"), OSError("broken")):
            with pytest.raises((DataError, RankError)) as caught:
                ranks.first_for_long(partial(work, error), every_s=0.2)
            said.append(f"{type(caught.value).__name__}: {caught.value}")
        return ranks.first_for_long(work, every_s=0.2), said

    expected = (7, ["DataError: no text", "RankError: broken"])
    assert run_ranks(3, body) == [expected] * 3


def test_what_is_large_goes_to_the_first_rank_alone() -> None:
    found = run_ranks(3, lambda: Ranks().gather_first("x" * dist.get_rank()))
    assert found == [["", "x", "xx"], [], []]
