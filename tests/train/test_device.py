"""Which GPU a rank takes, on machines that have other numbers of them than there are ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moetrain.config.errors import ConfigError
from moetrain.parallel.zero import import_deepspeed
from moetrain.train.runtime import ALLOCATOR, pick_device, threads

TORCHRUN = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {**TORCHRUN, "SLURM_LOCALID": "1"}


def pick(monkeypatch: pytest.MonkeyPatch, gpus: int, environment: dict[str, str]) -> torch.device:
    for name in SRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ALLOCATOR:
        if name not in environment:
            monkeypatch.setenv(name, "")  # so that what is set meanwhile goes again
            monkeypatch.delenv(name)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    device = pick_device("auto")
    assert taken == [device]
    return device


def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_slurm_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1: every task sees one GPU, its own."""
    assert pick(monkeypatch, 4, {}) == torch.device("cuda", 0)
    assert pick(monkeypatch, 2, TORCHRUN) == pick(monkeypatch, 8, SRUN) == torch.device("cuda", 1)
    assert pick(monkeypatch, 1, SRUN) == torch.device("cuda", 0)


def test_deepspeed_takes_that_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by LOCAL_RANK."""
    for name, value in {**SRUN, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    package = SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={}), init_distributed=lambda **_: None)
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    import_deepspeed(torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "1"
    import_deepspeed(pick(monkeypatch, 1, SRUN))
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_more_ranks_than_gpus_are_refused_on_every_rank(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^2 ranks on a machine where torch sees 1 GPU.*launch\.ranks=1.*device=cpu"):
        pick(monkeypatch, 1, {**TORCHRUN, "LOCAL_RANK": rank})


def test_segments_of_memory_grow_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pick(monkeypatch, 1, {})
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ALLOCATOR:
        pick(monkeypatch, 1, {name: "max_split_size_mb:128"})
        assert [other for other in ALLOCATOR if other in os.environ] == [name]
        assert os.environ[name] == "max_split_size_mb:128"


def test_torch_reads_how_to_give_out_memory_no_sooner_than_it_is_asked_for_some() -> None:
    code = (
        "import os, torch, moetrain.train; os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:True'; "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "expandable_segments:True"


def test_threads_are_a_share_of_the_cores_that_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job on 8 of 64 cores has 2 for each of 4 ranks; where Slurm gives each rank cores of its own, all of these."""
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert (threads(4), threads(16)) == (2, 1)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert threads(8) == 8
