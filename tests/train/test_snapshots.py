"""A run of two ranks loses one between two checkpoints, again and again, and goes on from what shared memory kept: with
the same losses, bit for bit, as a run that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch import local
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.checkpoint import slots
from moetrain.checkpoint.snapshot_find import Found
from moetrain.config.check import resolve_sizes
from moetrain.config.errors import ConfigError
from moetrain.data.prepare import prepare
from moetrain.start import start_ranks
from moetrain.train.begin import passed_over
from moetrain.train.exit_codes import LOST
from moetrain.train.snapshots import forget, open_snapshots, run_key
from moetrain.train.trainer import Trainer
from tests.checkpoint.saving import Lines
from tests.distributed.toy_run import load

STEPS = 16
WORDS = [f"train.steps={STEPS}", "train.micro_batch=1", "checkpoint.every=10", "train.snapshot.every=2", "device=cpu"]


def live(cfg: config.Config, die_at: int, done: Path) -> None:
    """Go on, and end, or lose rank 1 in step ``die_at`` once what was saved before it is whole. Leaves the
    step where it began, and what was said then."""
    with Lines() as lines:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
        trainer.resume()
    first, step_of = trainer.step, trainer.engine.train_step
    if dist.get_rank() == 0:
        done.write_text(json.dumps([first, lines]))

    def train_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.step + 1 == die_at and trainer.snapshots.kept is not None:
            trainer.snapshots.kept.wait()
            trainer.checkpointer.wait()
            dist.barrier()
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return step_of(*args, **kwargs)

    engine: Any = trainer.engine
    engine.train_step = train_step
    trainer.fit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    prepare(load(folder, []).data)
    return folder


def curve(run_dir: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_a_lost_rank_costs_the_steps_since_the_snapshot(folder: Path) -> None:
    run_dir = folder / "faults"
    cfg = load(folder, [*WORDS, "parallel.ep=2", f"run_dir={run_dir}"])

    def lose(die_at: int) -> tuple[int, str]:
        (folder / "began").unlink(missing_ok=True)
        with pytest.raises((RuntimeError, FileNotFoundError)) as error:
            run_ranks(2, live, cfg, die_at, folder / "began")
        assert (folder / "began").exists(), error.value
        first, lines = json.loads((folder / "began").read_text())
        return first, "\n".join(lines)

    assert lose(6)[0] == 0
    kept = slots.SHARED / f"moetrain-{run_key(run_dir)}"
    assert {path.name for path in kept.iterdir()} == {
        "lock", *(f"{kind}-{rank}-{i}" for kind in ("own", "copy") for rank in (0, 1) for i in (0, 1))
    }  # fmt: skip

    for file in kept.glob("own-1-*"):  # as if its node were lost: the neighbour's copy is taken
        file.unlink()
    first, lines = lose(14)
    assert first == 4 and "resumed from the snapshot of step 4; newest checkpoint: none" in lines

    for kind in ("own", "copy"):  # one byte of rank 0's state of step 12, wherever it is
        damage(kept, kind, 0, 12)
    # That of step 10, all that is whole now, is no newer than the checkpoint
    run_ranks(2, live, cfg, -1, folder / "began")
    first, told = json.loads((folder / "began").read_text())
    lines = "\n".join(told)
    assert first == 10 and lines.count("is damaged") == 2 and "resumed from" in lines and "step-10" in lines
    assert not kept.exists(), "a run that has ended leaves nothing"
    straight = load(folder, [*WORDS, "parallel.ep=2", f"run_dir={folder / 'straight'}", "train.snapshot.every=0"])
    run_ranks(2, live, straight, -1, folder / "began")
    assert curve(run_dir) == curve(folder / "straight")


def test_experts_are_where_the_snapshot_had_them(folder: Path) -> None:
    """Homes change every second step: by number (fssdp), or among ranks that keep theirs (migrate)."""
    for placement in (["fssdp", "reshard_every=2"], ["migrate", "every=2"]):
        kind, often = placement
        words = [*WORDS, "parallel.ep=2", f"experts/placement={kind}", f"experts.placement.{often}"]
        cfg = load(folder, [*words, f"run_dir={folder / kind}"])
        with pytest.raises((RuntimeError, FileNotFoundError)):
            run_ranks(2, live, cfg, 9, folder / "began")
        run_ranks(2, live, cfg, -1, folder / "began")
        first, lines = json.loads((folder / "began").read_text())
        assert first == 8 and any("snapshot of step 8" in line for line in lines)
        run_ranks(2, live, load(folder, [*words, f"run_dir={folder / kind}-straight"]), -1, folder / "began")
        assert curve(folder / kind) == curve(folder / f"{kind}-straight")


def damage(kept: Path, kind: str, owner: int, step: int) -> None:
    for i in (0, 1):
        slot = slots.Slot(kept / f"{kind}-{owner}-{i}")
        header = slot.header()
        if header is not None and header.step == step:
            slot.data(header.size)[1234] ^= 1


def test_what_must_not_be_loaded(folder: Path) -> None:
    """In a copy of the run's folder, and with another world size; the checkpoint is taken."""
    run_dir = folder / "other"
    cfg = load(folder, [*WORDS, f"run_dir={run_dir}", "checkpoint.every=4"])
    with pytest.raises((RuntimeError, FileNotFoundError)):
        run_ranks(2, live, cfg, 7, folder / "began")
    shutil.copytree(run_dir, folder / "copied")

    def begin(cfg: config.Config) -> int:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
        trainer.resume()
        return trainer.step

    assert run_ranks(2, begin, load(folder, [*WORDS, f"run_dir={folder / 'copied'}"])) == [4, 4]
    assert run_ranks(1, begin, cfg) == [4]
    kept = slots.SHARED / f"moetrain-{run_key(run_dir)}"
    assert [path.name for path in kept.iterdir()] == ["lock"], "it can never be loaded again, so it is gone"
    lives = slots.Folder(run_key(run_dir))
    forget(run_dir)
    assert kept.exists(), "a second command on a run that lives was refused, and gives up"
    lives.leave(remove=False)
    forget(run_dir)
    assert not kept.exists()


def test_a_snapshot_outlives_damaged_checkpoints_and_a_refused_resume(folder: Path) -> None:
    run_dir = folder / "damaged"
    words = [*WORDS, f"run_dir={run_dir}", "checkpoint.every=4"]
    with pytest.raises((RuntimeError, FileNotFoundError)):
        run_ranks(2, live, load(folder, words), 7, folder / "began")

    def begin(*changes: str) -> int:
        cfg = load(folder, [*words, *changes])
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
        trainer.resume()
        return trainer.step

    with pytest.raises(RuntimeError, match="is of another model or optimizer"):
        run_ranks(2, begin, "model.n_layers=5")
    (run_dir / "checkpoints/step-4/manifest.json").write_text("{}")
    assert run_ranks(2, begin) == [6, 6]


@pytest.mark.parametrize(("code", "kept"), [(1, True), (2, True), (LOST, False), (128 + signal.SIGKILL, False)])
def test_whose_snapshots_are_removed_with_the_ranks(
    code: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that end by themselves remove them or mean to keep them: the last checkpoint was not saved, a resume was
    refused. Those that were lost, for good, leave them."""
    monkeypatch.setattr(local, "run_ranks", lambda *_: local.Outcome(code, "so it ended"))
    cfg = load(tmp_path, ["launch.ranks=2", "faults.restarts=0"])
    Path(cfg.run_dir).mkdir()
    folder = slots.Folder(run_key(Path(cfg.run_dir)))
    folder.hold()
    folder.leave(remove=False)
    try:
        assert start_ranks(cfg, None, False) == code
        assert folder.path.exists() == kept
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def test_checkpoints_that_were_taken_away_mean_to_go_back(tmp_path: Path) -> None:
    """A snapshot of step 6, when step 4 was the newest checkpoint."""

    def passed(*steps: int) -> bool:
        for path in tmp_path.iterdir():
            path.rmdir()
        for step in steps:
            (tmp_path / f"step-{step}").mkdir()
        with Lines() as lines:
            answer = passed_over(Found(6, 4, []), tmp_path)
        assert len(lines) == (max(steps, default=0) < 4)
        return answer

    assert not passed(2, 4) and not passed(4) and not passed(5)
    assert passed(2) and passed()  # step 4 is gone
    assert passed(4, 6) and passed(8)  # newer ones


def test_memory_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, a run is refused before it starts; unasked, it goes without, and says so."""
    monkeypatch.setattr("moetrain.train.snapshots.room", lambda root: 2**17)

    def plan(*words: str) -> str:
        cfg = load(folder, [*WORDS, f"run_dir={folder / 'small'}", *words])
        Path(cfg.run_dir).mkdir(exist_ok=True)

        class Engine:
            model = torch.nn.Linear(100, 100)

        with Lines() as lines:
            engine: Any = Engine()
            plan = open_snapshots(cfg, resolve_sizes(cfg.parallel, 2), Path(cfg.run_dir), engine)
        assert plan.kept is None and not lines
        return plan.describe()

    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            plan()
        return str(error.value)

    [line, _] = run_ranks(2, refused)
    assert line.startswith("train.snapshot.every=2 needs 0.000903 GiB of a node that has 0.000122 GiB free in /dev/shm")
    unasked: Callable[[], str] = lambda: plan("train.snapshot.every=null")  # noqa: E731
    assert "none: they need 0.000903 GiB" in run_ranks(2, unasked)[0]
