"""Snapshots among nodes that are lost, change places, fill up or go bad. A node is a folder of its own here."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain.checkpoint import slots
from moetrain.checkpoint.slots import Folder, Slot, checksum
from moetrain.checkpoint.snapshot import Snapshots, neighbours
from moetrain.comm.ranks import RankError
from tests.checkpoint.saving import Lines

MAPPING = {"ep": 2}


def tensors(rank: int, step: int) -> dict[str, Tensor]:
    """All dtypes and shapes that a state has; each number depends on rank and step. Ranks hold more or less."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    odd = torch.randn(3 + rank, 7, generator=generator)
    return {
        "w": odd,
        "b": odd.bfloat16(),
        "t": odd.t(),
        "n": torch.tensor(float(step)),
        "none": odd[:0],
        "i": odd.long(),
    }


def take(root: Path, steps: list[int], nodes: str) -> str:
    """Snapshots of ``steps`` on ranks that live on these nodes, a letter each; why there are none any more."""
    snapshots = on(root, nodes)
    for step in steps:
        snapshots.take(step, tensors(dist.get_rank(), step), {"step": step}, base=1)
    snapshots.wait()
    snapshots.close(remove=False)
    return snapshots.off


def on(root: Path, nodes: str) -> Snapshots:
    own = root / nodes[dist.get_rank()]
    own.mkdir(exist_ok=True)
    return Snapshots("run", MAPPING, own)


def found(root: Path, nodes: str, world: int | None = None) -> tuple[int, list[str]]:
    """The step that ranks on these nodes find and load, and the log; every rank must get its own state."""

    def load() -> tuple[int, list[str]]:
        rank = dist.get_rank()
        with Lines() as lines:
            snapshots = on(root, nodes)
            best = snapshots.find()
            if best is None:
                return 0, lines
            into = {name: torch.full_like(value, 99) for name, value in tensors(rank, 0).items()}
            assert snapshots.load(best, lambda train: into) == {"step": best.step} and best.base == 1
        for name, value in tensors(rank, best.step).items():
            assert torch.equal(into[name], value), name
        return best.step, lines

    return run_ranks(world or len(nodes), load)[0]


def rows(root: Path) -> dict[str, int]:
    """node/file -> step, of all files."""
    files = {f"{path.parent.parent.name}/{path.name}": Slot(path).header() for path in root.glob("*/*/*-*-*")}
    return {name: header.step for name, header in files.items() if header is not None}


def test_a_lost_node_costs_nothing(tmp_path: Path) -> None:
    """Four ranks on two nodes: one is lost with all its memory, ranks change places, and a new node takes part."""
    assert run_ranks(4, take, tmp_path, [2, 4, 6], "aabb") == [""] * 4
    assert rows(tmp_path)["a/own-0-0"] == 6 and rows(tmp_path)["b/copy-0-0"] == 6 and rows(tmp_path)["a/own-0-1"] == 4
    assert found(tmp_path, "bbaa")[0] == 6
    for file in (tmp_path / "a").glob("*/*"):
        file.unlink()
    assert found(tmp_path, "aabb")[0] == 6
    assert found(tmp_path, "bbcc")[0] == 6
    # The run goes on there: the next snapshot is whole, and nothing is left of where ranks were before
    assert run_ranks(4, take, tmp_path, [8, 10], "ccbb") == [""] * 4
    assert found(tmp_path, "ccbb")[0] == 10
    kept = {(name[0], name.split("/")[1].rpartition("-")[0]) for name in rows(tmp_path)}
    assert kept == {("c", "own-0"), ("c", "own-1"), ("b", "own-2"), ("b", "own-3"),
                    ("b", "copy-0"), ("b", "copy-1"), ("c", "copy-2"), ("c", "copy-3")}  # fmt: skip


def test_what_is_not_whole_is_named_and_passed_over(tmp_path: Path) -> None:
    run_ranks(2, take, tmp_path, [2, 4], "ab")

    def spoil(file: str, how: Callable[[Tensor], Any]) -> tuple[int, list[str]]:
        slot = Slot(tmp_path / file[0] / f"moetrain-run/{file[2:]}")
        before = slot.bytes_N.clone()
        how(slot.bytes_N)
        try:
            return found(tmp_path, "ab")
        finally:
            slot.bytes_N.copy_(before)

    def flip(bytes_N: Tensor) -> None:
        bytes_N[slots.DATA + 5] ^= 16

    step, [line] = spoil("a/own-0-1", flip)
    assert (
        step == 4
        and line == f"WARNING snapshot of step 4: {tmp_path}/a/moetrain-run/own-0-1 of rank 0's node is damaged"
    )
    (tmp_path / "b/moetrain-run/copy-0-1").unlink()  # now it is the only one
    assert spoil("a/own-0-1", flip)[0] == 2
    assert spoil("a/own-0-1", lambda bytes_N: bytes_N[20].add_(1))[0] == 2  # its header
    assert spoil("a/own-0-1", lambda bytes_N: bytes_N[:64].zero_())[0] == 2  # as while it is written
    assert found(tmp_path, "ab") == (4, [])
    assert found(tmp_path, "a", world=1)[0] == 0


def test_a_snapshot_of_another_model_changes_nothing(tmp_path: Path) -> None:
    """One rank sees the difference; all refuse. Optimizer state that never was is the only thing that may be absent."""
    run_ranks(2, take, tmp_path, [2], "aa")

    def load(rank_1_has: dict[str, Tensor]) -> str:
        snapshots = on(tmp_path, "aa")
        best = snapshots.find()
        assert best is not None
        into = {name: torch.zeros_like(value) for name, value in tensors(dist.get_rank(), 0).items()}
        into |= rank_1_has if dist.get_rank() == 1 else {}
        try:
            snapshots.load(best, lambda train: into)
        except RankError as error:
            assert not any(value.any() for value in into.values())
            return str(error)
        return ""

    what = "rank 1: it is of another model or optimizer: "
    assert run_ranks(2, load, {"optim.never": torch.zeros(3)}) == ["", ""]
    assert run_ranks(2, load, {"more": torch.zeros(3)}) == [f"{what}more"] * 2
    assert run_ranks(2, load, {"w": torch.zeros(3, 7)}) == [f"{what}w"] * 2
    assert run_ranks(2, load, {"b": torch.zeros(4, 7)}) == [f"{what}b"] * 2


def test_a_full_node_stops_snapshots_on_all_ranks_with_one_line(tmp_path: Path) -> None:
    def fill() -> tuple[str, list[str]]:
        def full(*_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        snapshots = on(tmp_path, "ab")
        if dist.get_rank() == 1:
            os.posix_fallocate = full
        with Lines() as lines:
            for step in (2, 4):
                snapshots.take(step, tensors(dist.get_rank(), step), {}, 0)
            snapshots.wait()
        return snapshots.off, lines

    (off, lines), (other, silent) = run_ranks(2, fill)
    assert off == other == "No space left on device"
    assert lines == [f"WARNING snapshots  none from here on: {off}"] and silent == []


@pytest.mark.parametrize(
    ("nodes", "apart"),
    [
        ("aabb", 4),
        ("abab", 4),
        ("aaaabbbb", 8),
        ("abcabc", 6),
        ("aab", 2),
        ("aaab", 2),
        ("aa", 0),
        ("a", 0),
        ("aabbc", 5),
    ],
)
def test_neighbours_are_on_other_nodes_where_that_can_be(nodes: str, apart: int) -> None:
    keeper = neighbours(list(nodes))
    assert sorted(keeper) == list(range(len(nodes)))
    assert sum(nodes[rank] != nodes[other] for rank, other in enumerate(keeper)) == apart
    assert len(nodes) == 1 or all(rank != other for rank, other in enumerate(keeper))


def test_left_overs_are_cleared_but_nothing_of_a_run_that_lives(tmp_path: Path) -> None:
    lives, ended, recent, next_run = (Folder(name, tmp_path) for name in ("lives", "ended", "recent", "next"))
    for folder in (lives, ended, recent, next_run):
        folder.hold()
        os.utime(folder.path / "lock", (0, 0) if folder is not recent else None)
    for folder in (ended, recent):
        folder.leave(remove=False)
    next_run.clear_others()
    assert {path.name for path in tmp_path.iterdir()} == {"moetrain-lives", "moetrain-recent", "moetrain-next"}


def test_pages_are_locked_once_for_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that shows without a GPU: what is registered with CUDA, and that it is let go when the file grows."""
    held: dict[int, int] = {}

    class Cuda:
        def cudaHostRegister(self, at: int, size: int, flags: int) -> int:
            assert at not in held
            held[at] = size
            return 0

        def cudaHostUnregister(self, at: int) -> int:
            del held[at]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cuda)
    slot = Slot(tmp_path / "own-0-0")
    for size in (1000, 900, 100_000):
        slot.reserve(size, 10)
        slot.lock()
        assert held == {slot.bytes_N.data_ptr(): len(slot.bytes_N)}


def test_checksums_see_every_word_and_the_order_of_stretches() -> None:
    values = torch.randint(256, (8 * slots.CHUNK * 3 + 5,), dtype=torch.uint8)
    first = checksum(values)
    for place in (0, 8 * slots.CHUNK, 8 * slots.CHUNK * 2 + 77, len(values) - 1):
        values[place] ^= 128
        assert checksum(values) != first
        values[place] ^= 128
    swapped = torch.cat(
        [values[8 * slots.CHUNK : 16 * slots.CHUNK], values[: 8 * slots.CHUNK], values[16 * slots.CHUNK :]]
    )
    assert checksum(values) == first != checksum(swapped)
