"""Checkpoints of every kind of mapping are read by one process, tensor by tensor, and give what the ranks held."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.convert.open import open_weights
from moetrain.train.engine import whole_weights
from moetrain.train.trainer import Trainer
from tests.distributed.test_resume_elsewhere import ALL, HSDP, PIPELINE
from tests.distributed.toy_run import SIGMOID, SOFTMAX, load, one_step

ZERO3 = (2, ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.ep=2", "train.micro_batch=2"])
ZERO1 = (2, ["parallel.engine=deepspeed", "parallel.zero=1", "train.micro_batch=2"])


def train_and_save(cfg: config.Config) -> dict[str, Tensor]:
    """Two steps and a checkpoint; on rank 0 what the model holds then."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    for _ in range(2):
        one_step(trainer)
    trainer.checkpointer.save(trainer.step, trainer.engine.state({"step": trainer.step}))
    trainer.checkpointer.wait()
    return {name: t.clone() for name, t in whole_weights(trainer.engine, trainer.dims)}


@pytest.mark.parametrize(
    ("mapping", "choice"),
    [
        (ALL, [*SIGMOID, "model.tie_embeddings=true"]),
        (PIPELINE, SOFTMAX),
        (HSDP, SIGMOID),
        (ZERO1, SOFTMAX),
        (ZERO3, SIGMOID),
    ],
    ids=["pp, tp, ep, etp, tied", "zero-bubble pipeline", "hsdp, ep 4", "zero 1", "zero 3, ep 2"],
)
def test_the_weights_of_a_sharded_checkpoint(prepared: Path, mapping: tuple[int, list[str]], choice: list[str]) -> None:
    world, settings = mapping
    cfg = load(prepared, [*choice, *settings, "train.precision=float32"])
    held = run_ranks(world, train_and_save, cfg, timeout=300)[0]
    config.save(cfg, Path(cfg.run_dir) / "config.yaml")
    opened = open_weights(Path(cfg.run_dir))
    kept = {name: t for name, t in held.items() if ".aux_loss." not in name}
    assert opened.source.specs.keys() == kept.keys()
    for name, whole in kept.items():
        assert torch.equal(opened.source.read(name), whole), name
        box = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in whole.shape)
        assert torch.equal(opened.source.read(name, box), whole[box]), name
    shutil.rmtree(prepared / "run")
