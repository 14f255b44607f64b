"""A save that fails costs a log line: all ranks go on, what was saved before stays, and the next save works."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.checkpoint import Checkpointer
from moetrain.checkpoint import checkpointer as module
from moetrain.comm.ranks import Ranks
from moetrain.config.errors import CheckpointError
from tests.checkpoint.saving import Lines, assert_holds, state

Result = tuple[list[int], str, list[str]]


def save_three(folder: Path, fail: Any, restore: Any) -> Result:
    """Steps 1, 2 and 3, of which ``fail`` makes the second fail."""
    with Lines() as lines:
        checkpointer = Checkpointer(folder, 2, True)
        checkpointer.save(1, state(1))
        checkpointer.wait()
        fail()
        checkpointer.save(2, state(2))
        checkpointer.wait()
        assert sorted(p.name for p in folder.iterdir() if p.name.startswith("step")) == ["step-1"]
        assert checkpointer.last_good() == str(folder / "step-1")
        if dist.is_initialized():
            dist.barrier()
        restore()
        checkpointer.save(3, state(3))
        checkpointer.wait()
        path = checkpointer.newest()
    assert path is not None and assert_holds(path) == (3, 0)
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith("step")) == ["step-1", "step-3"]
    return checkpointer.failed, checkpointer.last_good(), [line for line in lines if line.startswith("ERROR")]


def check(results: list[Result], folder: Path, reason: str) -> None:
    for rank, (failed, last, errors) in enumerate(results):
        assert failed == [2] and last == str(folder / "step-3")
        assert len(errors) == (1 if rank == 0 else 0)
    line = results[0][2][0]
    assert "checkpoint of step 2 was not saved" in line and "\n" not in line
    assert reason in line or "and the disk has 0 MiB free" in line
    assert f"last good checkpoint: {folder / 'step-1'}" in line


def test_one_rank_of_two_may_not_write_more(tmp_path: Path) -> None:
    """The kernel refuses rank 1's writes beyond 2 KB: a file size limit, as a quota would."""

    def run() -> Result:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        mine = dist.get_rank() == 1
        return save_three(
            tmp_path,
            lambda: mine and resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1])),
            lambda: mine and resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )

    check(run_ranks(2, run), tmp_path, f"rank 1: {os.strerror(errno.EFBIG)}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("free", [0, 1, 3, 4])
def test_disk_full(world: int, free: int, small_disk: Path) -> None:
    """A real file system with 0 to 4 free pages of 4 KB when the second save begins."""
    folder, filler = small_disk / "checkpoints", small_disk / "filler"

    def fill() -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096 * free))
        if dist.is_initialized():
            dist.barrier()

    def run() -> Result:
        return save_three(folder, fill, lambda: filler.unlink(missing_ok=True))

    check([run()] if world == 1 else run_ranks(world, run), folder, os.strerror(errno.ENOSPC))


def test_a_rank_without_memory_for_the_copy(tmp_path: Path) -> None:
    def run() -> Result:
        copy = module.to_cpu

        def full(_: object) -> None:
            raise MemoryError("no room for the copy")

        def fail() -> None:
            if dist.get_rank() == 1:
                module.to_cpu = full  # type: ignore[assignment]

        return save_three(tmp_path, fail, lambda: setattr(module, "to_cpu", copy))

    check(run_ranks(2, run), tmp_path, "rank 1: no room for the copy")


def test_a_disk_that_does_not_keep_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is read back before an old one is deleted."""
    checkpointer = Checkpointer(tmp_path, 1, False)
    checkpointer.save(1, state(1))
    save = module.dcp.save

    def save_and_rot(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        file = tmp_path / "step-2.tmp" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[1234] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(module.dcp, "save", save_and_rot)
    with Lines() as lines:
        checkpointer.save(2, state(2))
    assert checkpointer.failed == [2] and "__0_0.distcp was altered" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_keep_last(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 2, True)
    for step in (1, 2, 10, 9, 11):
        checkpointer.save(step, state(step))
    assert checkpointer.newest() == tmp_path / "step-11"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("[gloo/pair.cc:537] Connection reset by peer", "INFO checkpoint of step 1 saved"),
        ("no such luck", "WARNING old checkpoints in {} could not be deleted: no such luck"),
    ],
    ids=["a rank is lost", "something else"],
)
def test_what_goes_wrong_while_old_checkpoints_are_deleted(
    error: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new checkpoint is whole by then. Of a lost rank training will hear; no traceback comes from the thread."""
    checkpointer = Checkpointer(tmp_path, 1, False)
    monkeypatch.setattr(checkpointer, "_prune", lambda step: monkeypatch.setattr(Ranks, "gather", broken))

    def broken(self: Ranks, value: object) -> None:
        raise RuntimeError(error)

    with Lines() as lines:
        checkpointer.save(1, state(1))
    assert lines[-1] == said.format(tmp_path)
    assert checkpointer.failed == [] and checkpointer.last_good() == str(tmp_path / "step-1")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints", 1, True)


def test_a_save_in_the_background_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is on the first GPU until it says otherwise: all ranks of a node would make themselves at home there."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("the thread that writes asked for a stream")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    checkpointer = Checkpointer(tmp_path, 2, True)
    checkpointer.save(1, state(1))
    checkpointer.wait()
    assert checkpointer.failed == []
