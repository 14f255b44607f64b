"""What one rank does alone may take longer than the others' collectives wait."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import NoReturn

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.comm.ranks import Ranks
from moetrain.config.errors import DataError


def test_long_work_of_the_first_rank_is_waited_for() -> None:
    def long() -> list[str]:
        ranks = Ranks(dist.new_group(backend="gloo", timeout=timedelta(seconds=3)))

        def work() -> str:
            time.sleep(5)
            return "done"

        def fail() -> NoReturn:
            raise DataError("the text is gone")

        found = [ranks.first_for_long(work), ranks.first_for_long(lambda: "again")]
        with pytest.raises(DataError, match="the text is gone"):
            ranks.first_for_long(fail)
        return found

    assert run_ranks(2, long) == [["done", "again"]] * 2
