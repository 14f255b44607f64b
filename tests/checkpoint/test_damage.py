"""Damage on disk is found, named, and passed over: torch's own loader accepts most flipped bits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.checkpoint import Checkpointer, layout, newest
from moetrain.comm.ranks import Ranks
from moetrain.config.errors import CheckpointError
from tests.checkpoint.saving import Lines, assert_holds, state

FILES = [".metadata", "__0_0.distcp", "manifest.json"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    checkpointer = Checkpointer(folder, 2, False)
    checkpointer.save(3, state(3))
    checkpointer.save(5, state(5))
    return folder


@pytest.fixture
def folder(two_checkpoints: Path, tmp_path: Path) -> Path:
    shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_whole_folders(folder: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in (folder / "step-5").iterdir()) == FILES
    with Lines() as lines:
        path = newest(folder)
    assert path == folder / "step-5" and lines == []
    assert_holds(path)
    assert newest(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert newest(tmp_path / "empty") is None


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(folder: Path, name: str) -> None:
    file = folder / "step-5" / name
    bits = 8 * file.stat().st_size
    for bit in {0, bits // 2, bits - 1, *range(7, bits, max(1, bits // 40))}:
        flip(file, bit)
        with Lines() as lines:
            assert newest(folder) == folder / "step-3", f"bit {bit}"
        assert len(lines) == 1 and "step-5 is damaged" in lines[0] and name in lines[0]
        flip(file, bit)
    assert newest(folder) == folder / "step-5"


def truncate(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "__0_0.distcp has"),
    "a file is gone": (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "renamed by hand": (lambda p: p.rename(p.with_name("step-7")), "manifest.json is of step 5"),
    "empty folder": (lambda p: [f.unlink() for f in p.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_other_damage_is_named(folder: Path, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(folder / "step-5")
    with Lines() as lines:
        path = newest(folder)
    assert path == folder / "step-3"
    assert_holds(path)
    assert len(lines) == 1 and words in lines[0]


def test_ranks_share_the_reading_and_agree(folder: Path) -> None:
    def look() -> tuple[str, list[str]]:
        with Lines() as lines:
            path = newest(folder)
        return str(path), lines

    flip(folder / "step-5" / ".metadata", 99)  # the smaller file: rank 1 reads it
    for rank, (path, lines) in enumerate(run_ranks(2, look)):
        assert path == str(folder / "step-3")
        assert len(lines) == (1 if rank == 0 else 0)
        assert rank > 0 or ".metadata was altered" in lines[0]


def test_when_none_is_whole_nothing_starts_over_in_silence(folder: Path) -> None:
    flip(folder / "step-5" / ".metadata", 99)
    (folder / "step-3" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is whole"):
        newest(folder)


def test_the_damaged_one_does_not_push_out_the_whole_ones(folder: Path) -> None:
    """Resumed from step 3 since step 5 is damaged: the next save counts what is whole, and replaces step 5 in time."""
    truncate(folder / "step-5")
    checkpointer = Checkpointer(folder, 1, False)
    with Lines():
        assert checkpointer.newest() == folder / "step-3"
        checkpointer.save(4, state(4))
        assert checkpointer.newest() == folder / "step-4"
        checkpointer.save(5, state(5))
    assert checkpointer.newest() == folder / "step-5"
    assert [p.name for p in folder.iterdir()] == ["step-5"]


def test_a_checkpoint_that_rots_is_named_before_it_is_needed(tmp_path: Path) -> None:
    """And it takes no place among those that are kept: the last whole one before it stays."""

    def rot() -> tuple[list[int], list[list[int]], list[str]]:
        checkpointer, kept = Checkpointer(tmp_path, keep=2, asynchronous=True), []
        with Lines() as lines:
            for step in (1, 2, 3, 4, 5):
                checkpointer.save(step, state(step))
                checkpointer.wait()
                if step == 2 and dist.get_rank() == 0:
                    flip(tmp_path / "step-2/__1_0.distcp", 5000)
                kept.append(Ranks().first(lambda: layout.steps(tmp_path)))
        return checkpointer.rotten, kept, [line for line in lines if line.startswith("ERROR")]

    rotten, kept, [line] = run_ranks(2, rot)[0]
    assert rotten == [2] and kept == [[1], [2, 1], [3, 2, 1], [4, 3], [5, 4]]
    assert f"checkpoint {tmp_path / 'step-2'} has gone bad on its disk: " in line and "__1_0.distcp was altered" in line
    assert line.endswith(f"newest that is whole: {tmp_path / 'step-3'}")


def test_left_overs_that_cannot_be_deleted_keep_no_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the folder of a file that is deleted while a process has it open."""

    def busy(path: Path, *arguments: Any, **how: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    for name in ("step-2.old", "step-4.tmp"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        checkpointer = Checkpointer(tmp_path, 2, False)
    assert checkpointer.newest() is None
    checkpointer.save(4, state(4))
    assert checkpointer.last_good_step() == 4 and not checkpointer.failed
