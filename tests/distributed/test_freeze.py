"""Frozen parameters: the same bits after training as before it, under every mapping; all others as in one process.

float64, six steps, against the one-process run of the same config with the oracles, at 1e-9. Weight decay is on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain.config import Config
from moetrain.config.check import resolve_sizes
from moetrain.config.errors import ConfigError
from moetrain.parallel.freeze import frozen_sizes, is_frozen
from moetrain.train import parity
from moetrain.train.trainer import Trainer
from moetrain.train.whole import whole_weights
from tests.distributed.test_resume_elsewhere import resume, save_half_way
from tests.distributed.toy_run import SIGMOID, SOFTMAX, alone, load

# name -> what is frozen
CHOICES = {
    "shared and attention": ["layers.*.moe.shared.*", "layers.*.attention.*"],
    "first layers": ["embed.*", "layers.[01].*"],
    "experts and head": ["layers.*.moe.experts.*", "head.*", "norm.weight"],
    "all but shared": ["embed.*", "head.*", "*norm.*", "*.attention.*", "*.mlp.*", "*.router.*", "*.experts.*"],
    "a shared table": ["embed.*"],
}
COMMON = ["train.steps=6", "train.clip_norm=0.5", "optim.weight_decay=0.3", "schedule.warmup_steps=0"]
PP = "parallel.pp=2"
# what is frozen, ranks, mapping, and what the one-process run has as well
CASES: list[tuple[str, int, list[str], list[str]]] = [
    ("shared and attention", 4, ["parallel.dp_replicate=2", "parallel.ep=2", "train.micro_batch=1"], [*SOFTMAX]),
    ("shared and attention", 8, [PP, "parallel.tp=2", "parallel.ep=2", "parallel.etp=2", "train.micro_batch=1"],
     [*SIGMOID]),
    ("shared and attention", 2, [PP, "parallel.schedule=zbv_zero_bubble", "train.micro_batch=1"], [*SIGMOID]),
    ("first layers", 2, ["train.micro_batch=1", "train.recompute=full"], [*SOFTMAX]),
    ("first layers", 2, ["parallel.cp=2", "parallel.context=ring", "parallel.offload=all"], [*SOFTMAX]),
    ("first layers", 2, ["parallel.tp=2", "parallel.ep=2", "experts.overlap=true"], ["optim=muon", *SIGMOID]),
    ("experts and head", 4, ["parallel.ep=2", "train.micro_batch=1", "train.recompute=selective"],
     ["optim=muon", *SOFTMAX]),
    ("experts and head", 2, [PP, "parallel.schedule=gpipe", "train.micro_batch=2"], [*SOFTMAX]),
    ("experts and head", 2, [PP, "parallel.schedule=dualpipev", "train.micro_batch=1"], [*SOFTMAX]),
    ("all but shared", 2, [PP, "parallel.layout=[2,2]", "train.micro_batch=1"], [*SOFTMAX]),
    ("all but shared", 2, [PP, "parallel.schedule=interleaved_zero_bubble", "train.micro_batch=1"],
     [*SOFTMAX, "model.moe.first_dense=0"]),
    ("all but shared", 2, [PP, "parallel.schedule=interleaved_1f1b", "train.micro_batch=1"],
     [*SIGMOID, "model.moe.first_dense=0"]),
    ("a shared table", 2, [PP, "train.micro_batch=1"], [*SIGMOID, "model.tie_embeddings=true"]),
]  # fmt: skip


def at_start(cfg: Config) -> dict[str, Tensor]:
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    stateful = {key.removeprefix("state.").rpartition(".")[0] for key in trainer.engine.state({})["optim"]}
    names = dict(trainer.engine.model.named_parameters())
    assert stateful == {name for name in names if not is_frozen(name, cfg.train.freeze)}
    return {name: value.clone() for name, value in whole_weights(trainer.engine, trainer.dims)}


@pytest.mark.parametrize(("choice", "world", "mapping", "common"), CASES)
def test_frozen_stay_and_the_others_train_as_in_one_process(
    prepared: Path, choice: str, world: int, mapping: list[str], common: list[str]
) -> None:
    freeze = CHOICES[choice]
    settings = [*common, *COMMON, f"train.freeze={freeze}", "train.precision=float64"]
    cfg = load(prepared, [*settings, *mapping])
    one = alone(prepared, tuple(settings))
    mapped = run_ranks(world, parity.curve, cfg, timeout=300)
    found = parity.differences(mapped, one)
    assert found.within(1e-9), found
    [before] = run_ranks(1, at_start, load(prepared, settings))
    for name, value in mapped[0].weights.items():
        if name.endswith((".weight", ".w13", ".w2")):  # no buffer
            assert torch.equal(value, before[name]) == is_frozen(name, freeze), name


def test_patterns_that_cannot_be_meant_are_refused(prepared: Path) -> None:
    def refusal(world: int, *settings: str) -> str:
        cfg = load(prepared, list(settings))
        with pytest.raises(ConfigError) as error:
            frozen_sizes(cfg, resolve_sizes(cfg.parallel, world))
        return str(error.value)

    assert "'layers.*.moe.share.*' names no parameter; did you mean 'layers.*.moe.shared." in refusal(
        1, "train.freeze=[layers.*.moe.share.*]"
    )
    assert "freezes every parameter" in refusal(1, "train.freeze=['*']")
    assert "leaves pipeline stage 0 (layers 0-1) nothing to train" in refusal(
        2, PP, "parallel.layout=[2,2]", "train.freeze=['embed.*','layers.[01].*']"
    )
    cfg = load(prepared, ["train.freeze=[embed.*]"])
    assert frozen_sizes(cfg, resolve_sizes(cfg.parallel, 1)) == {"embed.weight": 300 * 24}


@pytest.mark.parametrize(("saved", "loaded"), [([], CHOICES["experts and head"]), (CHOICES["first layers"], [])])
def test_a_run_goes_on_with_more_or_less_frozen(prepared: Path, saved: list[str], loaded: list[str]) -> None:
    """State of what is frozen now is left aside; what is trained now and was not starts with none. In two mappings."""
    both = []
    run_ranks(1, save_half_way, load(prepared, [*SOFTMAX, "train.precision=float64", f"train.freeze={saved}"]))
    for world, mapping in ((1, ["train.micro_batch=8"]), (4, [PP, "parallel.ep=2", "train.micro_batch=1"])):
        cfg = load(prepared, [*SOFTMAX, "train.precision=float64", f"train.freeze={loaded}", *mapping])
        both.append(run_ranks(world, resume, cfg)[0])
    shutil.rmtree(prepared / "run")
    for one, other in zip(*both, strict=True):
        assert one.pop("loads") == other.pop("loads")
        assert one == pytest.approx(other, rel=1e-9)
