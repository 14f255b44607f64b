"""Killed at any instant, the folder yields a whole checkpoint that loads and equals what was saved."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.checkpoint import Checkpointer
from tests.checkpoint.saving import assert_holds, state


def fork(body: Callable[[], object]) -> int:
    """Run ``body`` in a child that leads a process group of its own; its id."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            body()
        finally:
            os._exit(0)
    os.setpgid(child, child)
    return child


def test_killed_before_every_file_operation_of_a_save_in_turn(tmp_path: Path) -> None:
    """A save in place of a whole checkpoint of the same step, with keep=1, so that it also deletes the one before."""
    before = tmp_path / "before"
    checkpointer = Checkpointer(before, 2, False)
    checkpointer.save(1, state(1))
    checkpointer.save(2, state(2, mark=0))
    folder = tmp_path / "checkpoints"

    def save_and_die(nth: int) -> None:
        left = nth

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
                if str(folder) not in str(arguments[0]) and not isinstance(arguments[0], int):
                    return
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        checkpointer = Checkpointer(folder, 1, False)
        sys.addaudithook(count)
        checkpointer.save(2, state(2, mark=1))

    marks = []
    for nth in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        _, status = os.waitpid(fork(lambda nth=nth: save_and_die(nth)), 0)
        resumed = Checkpointer(folder, 1, False)
        path = resumed.newest()
        assert path is not None
        marks.append(assert_holds(path)[1])
        assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.old"))
        if not os.WIFSIGNALED(status):
            break
    assert len(marks) > 20, "the save was never killed: no file operation was seen"
    assert os.WEXITSTATUS(status) == 0
    # Old content up to one moment, new content from there on
    assert marks == sorted(marks) and marks[0] == 0 and marks[-1] == 1


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random(world: int, tmp_path: Path) -> None:
    """All ranks at once, while they save as fast as they can in the background."""

    def save_for_ever() -> None:
        checkpointer = Checkpointer(tmp_path, 2, True)
        path = checkpointer.newest()
        step = int(path.name.removeprefix("step-")) if path else 0
        while True:
            step += 1
            checkpointer.save(step, state(step))

    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    reached = 0
    for _ in range(6):
        child = fork(save_for_ever if world == 1 else lambda: run_ranks(world, save_for_ever))
        end = time.monotonic() + 20
        while not (tmp_path / f"step-{reached + 1}").exists() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = Checkpointer(tmp_path, 2, True).newest()
        assert path is not None
        step, _ = assert_holds(path)
        assert step > reached
        reached = step
        assert steps_in(tmp_path)[-1] == step  # kills may have come before the oldest was deleted, each time
    undisturbed = Checkpointer(tmp_path, 2, True)
    undisturbed.save(reached + 1, state(reached + 1))
    undisturbed.wait()
    assert steps_in(tmp_path) == [reached, reached + 1]
