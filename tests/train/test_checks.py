"""What ranks compare, what they leave when one is lost, and a disk without room."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import nn

from moetrain.checkpoint import Checkpointer
from moetrain.comm.ranks import Ranks
from moetrain.config.errors import TrainError
from moetrain.train.replicas import Checks, checksum
from moetrain.train.stacks import Stacks
from tests.checkpoint.saving import Lines, state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_checksum_is_the_sum_of_the_bits(dtype: torch.dtype) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = values.view(torch.uint8).numpy().view(f"<i{values.element_size()}")
    with np.errstate(over="ignore"):
        assert checksum(values) == int(np.sum(raw, dtype=np.int64))


@pytest.mark.parametrize(("world", "named"), [(3, "rank 1 are"), (2, "rank 0, 1 are")])
def test_one_flipped_bit_names_its_rank(world: int, named: str) -> None:
    """With three copies it is known which one is wrong."""

    def compare() -> str:
        torch.manual_seed(0)
        model, checks = nn.Linear(8, 8), Checks()
        checks.run(model, 5, "none")  # alike
        if dist.get_rank() == 1:
            bits = model.weight.detach().view(torch.int32)
            bits[3, 4] ^= 1
        with pytest.raises(TrainError) as error:
            checks.run(model, 10, "step-5")
        return str(error.value)

    for line in run_ranks(world, compare):
        assert named in line and "after step 10: weight;" in line and line.endswith("step-5")


def test_looks_at_each_checksum_but_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that one rank alone has, as FSDP makes them: asking every rank for every shard took minutes on a
    thousand ranks."""
    looks = 0

    class Counted(dict[Any, int]):
        def __contains__(self, key: object) -> bool:
            nonlocal looks
            looks += 1
            return super().__contains__(key)

    def gather(self: Ranks, value: Any) -> list[Any]:
        return [(*value[:2], Counted({("weight", (rank,), (1,)): 1})) for rank in range(100)]

    monkeypatch.setattr(Ranks, "gather", gather)
    Checks().run(nn.Linear(1, 1), 1, "none")
    assert looks <= 3 * 100


def test_a_clock_that_jumps_is_one_warning() -> None:
    def jump() -> list[str]:
        checks, real = Checks(), time.time
        if dist.get_rank() == 1:
            time.time = lambda: real() + 3600  # type: ignore[method-assign]
        with Lines() as lines:
            checks.run(nn.Linear(1, 1, bias=False).requires_grad_(False).apply(zero), 1, "none")
            checks.run(nn.Linear(1, 1, bias=False).requires_grad_(False).apply(zero), 2, "none")
        return lines

    def zero(module: nn.Module) -> None:
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]

    lines, silent = run_ranks(2, jump)
    assert sum("the clock of rank 1 has jumped by +3600 s" in line for line in lines) == 1
    assert not silent


def test_stacks_say_where_threads_stood(tmp_path: Path) -> None:
    def a_place_to_stand(stacks: Stacks) -> None:
        stacks.write("rank 1 hangs")

    stacks = Stacks(tmp_path / "stacks", 0)
    stacks.error = ValueError("connection closed")
    a_place_to_stand(stacks)
    text = (tmp_path / "stacks/rank-0.txt").read_text()
    assert text.startswith("rank 1 hangs\n") and "ValueError: connection closed" in text
    assert "in a_place_to_stand" in text
    Stacks(Path("/proc/nowhere/stacks"), 0).write("no disk")  # no error: the run ends for another reason


def test_no_room_on_the_disk_is_known_before_a_byte_is_written(tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")

    def save() -> Any:
        checkpointer = Checkpointer(tmp_path, keep=2, asynchronous=True)
        checkpointer.save(1, state(1))
        checkpointer.wait()
        shutil.disk_usage = lambda path: usage(2**20, 2**20 - 1000, 1000)  # type: ignore[assignment]
        with Lines() as lines:
            checkpointer.save(2, state(2))
            checkpointer.wait()
        return checkpointer.failed, checkpointer.last_good(), [line for line in lines if "not saved" in line]

    failed, good, lines = run_ranks(2, save)[0]
    assert failed == [2] and good.endswith("step-1")
    [line] = lines
    assert "it needs 0 MiB, and the disk has 0 MiB free" in line
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
