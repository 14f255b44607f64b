"""A real training run is killed at random, again and again, on one and on two ranks: every step trains on the samples
that the undisturbed run trains on, and a change of the weights at a resume holds from there on."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.checkpoint.layout import steps
from moetrain.cli import main
from moetrain.config import save
from moetrain.config.check import resolve_sizes
from moetrain.config.schema_data import DataConfig, MixtureStepConfig
from moetrain.data.loader import Batch, Loader
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import prepare, prepare_once
from moetrain.data.toy import toy_data
from moetrain.train import run as run_training
from moetrain.train.preflight import open_data, open_sampler
from moetrain.train.trainer import Trainer

STEPS = 40
TINY = ["model.vocab_size=300", "model.dim=16", "model.n_layers=1", "model.attention.n_heads=1",
        "model.attention.n_kv_heads=1", "model.attention.head_dim=8", "model.moe.num_experts=2", "model.moe.top_k=1",
        "model.moe.expert_dim=8", "train.seq_len=16", "train.global_batch=16", f"train.steps={STEPS}",
        "train.eval_sequences=2", "log.tensorboard=false", "log.progress=false", "checkpoint.every=3"]  # fmt: skip


def load(folder: Path, micro_batch: int, letters: float = 0.7) -> config.Config:
    """Letters in their second epoch from step 20 on; a schedule; digits run out."""
    cfg = config.load([*TINY, f"run_dir={folder / 'run'}", f"train.micro_batch={micro_batch}"])
    cfg.data = toy_data(folder)
    cfg.data.sources["letters"].weight = letters
    cfg.data.sources["digits"].max_epochs = 0.5
    cfg.data.schedule = [MixtureStepConfig(weights={"letters": 0.5}, from_step=12)]
    return cfg


class Recorded(Loader):
    """Appends the samples of each step to a file, in a line; kills its process a moment after ``die_in`` steps."""

    file: Path
    die_in: int
    moment: float

    def step(self, step: int) -> list[Batch]:
        batches = super().step(step)
        samples = [self.sampler.locate(i) for batch in batches for i in batch.sample_ids]
        line = [step, [[s.source, s.epoch, s.window] for s in samples]]
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.die_in -= 1
        if self.die_in == 0:
            threading.Timer(self.moment, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return batches


def train(cfg: config.Config, record: Path, die_in: int = -1, moment: float = 0.0) -> None:
    """Resume or begin, and train to the end, or to death a moment after so many steps."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    trainer.loader.__class__ = Recorded
    recorded: Any = trainer.loader
    recorded.file, recorded.die_in, recorded.moment = record / f"rank-{dist.get_rank()}", die_in, moment
    trainer.resume()
    trainer.fit()


def seen(record: Path) -> dict[int, list[list[list[tuple[str, int, int]]]]]:
    """Step -> what each rank trained on, for each time that it was run."""
    found: dict[int, list[list[list[tuple[str, int, int]]]]] = defaultdict(list)
    for file in sorted(record.glob("rank-*")):
        for line in file.read_text().splitlines():
            if line.endswith("]]]"):
                step, samples = json.loads(line)
                found[step].append([tuple(sample) for sample in samples])  # type: ignore[arg-type]
    return found


def test_killed_at_random_and_resumed_on_other_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load(tmp_path, 8)
    prepare(cfg.data, progress=False)
    sampler, _ = open_sampler(cfg, open_data(cfg))
    expected = {s: sorted((x.source, x.epoch, x.window) for x in map(sampler.locate, range(16 * s, 16 * s + 16)))
                for s in range(STEPS)}  # fmt: skip
    assert [phase.why for phase in sampler.history] == ["config", "schedule", "exhausted digits"]
    assert any(epoch for step in expected.values() for _, epoch, _ in step)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    rng, ran = random.Random(seed), []
    for life in range(40):
        record, world = tmp_path / f"life-{life}", rng.choice([1, 2])
        record.mkdir()
        die_in, moment = (rng.randint(1, 12), rng.uniform(0, 0.05)) if life < 3 else (-1, 0.0)
        try:
            run_ranks(world, train, load(tmp_path, rng.choice([4, 8])), record, die_in, moment)
        except (RuntimeError, FileNotFoundError):  # a lost peer, no result
            assert die_in > 0
        for step, parts in seen(record).items():
            if len(parts) == world:
                assert sorted(x for part in parts for x in part) == expected[step], f"step {step} of life {life}"
                ran.append(step)
        if steps(tmp_path / "run" / "checkpoints")[:1] == [STEPS]:
            break
    assert set(ran) == set(range(STEPS))

    # More steps, with other weights: from there on they hold
    cfg = load(tmp_path, 8, letters=0.25)
    cfg.data.sources["digits"].max_epochs = None
    cfg.train.steps = STEPS + 5
    save(cfg, tmp_path / "run" / "config.yaml")
    last = tmp_path / "last"
    last.mkdir()
    run_ranks(1, train, cfg, last)
    after = [x for step, parts in sorted(seen(last).items()) for x in parts[0] if step >= STEPS]
    assert abs(sum(source == "letters" for source, *_ in after) - 0.25 * 80) < 2
    before = {x for step in expected.values() for x in step}
    assert len(before) == 16 * STEPS and not before & set(after)

    capsys.readouterr()
    assert main(["data", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in shown]
    assert [row[3] for row in rows if row and row[0].isdigit()] == ["config", "schedule", "exhausted", "user"]
    assert ["40", "640", "10,240", "user", "digits", "75%,", "letters", "25%"] in rows
    got = {row[0]: int(row[-1]) for row in rows if row and row[0] in ("letters", "digits")}
    assert got["letters"] == sum(source == "letters" for source, *_ in [*before, *after])


def test_data_that_another_job_replaces_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs of a sweep with other data settings and the same folder: none trains on what the other has prepared."""
    cfg, other = load(tmp_path, 8), load(tmp_path, 8)
    other.data.val_fraction = 0.2

    def prepare_twice(data: DataConfig, began: None) -> Manifest:
        mine = prepare_once(data)
        prepare(other.data, progress=False)
        return mine

    def body() -> None:
        dist.destroy_process_group()  # a run makes its own
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        run_training(cfg)

    monkeypatch.setattr("moetrain.train.prepare_once", prepare_twice)
    with pytest.raises(RuntimeError, match=r"DataError: '.*' was replaced by another job"):
        run_ranks(1, body)
