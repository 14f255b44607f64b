"""Checkpoints of every kind of mapping are read by one process, tensor by tensor, and give what the ranks held; every
kind of mapping starts from the same weights, each rank reading its slices; every family goes through ranks and back."""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import cli, config
from moetrain.config.check import resolve_sizes
from moetrain.convert.family import family_named
from moetrain.convert.open import brings, open_weights
from moetrain.data.toy import toy_data
from moetrain.train.runtime import timeout_of_new_groups
from moetrain.train.trainer import Trainer
from moetrain.train.whole import whole_weights
from tests.convert.test_round_trip import STOCK, tensors_in
from tests.distributed.test_resume_elsewhere import ALL, HSDP, PIPELINE
from tests.distributed.toy_run import BASE, SIGMOID, SOFTMAX, load, one_step
from tests.model import hf_models

SPLIT = (4, ["parallel.etp=2", "parallel.dp_shard=2", "parallel.tp=2", "train.micro_batch=2"])
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
        (SPLIT, SIGMOID),
        (ZERO1, SOFTMAX),
        (ZERO3, SIGMOID),
    ],
    ids=["pp, tp, ep, etp, tied", "zero-bubble pipeline", "hsdp, ep 4", "edp, ep, etp", "zero 1", "zero 3, ep 2"],
)
def test_the_weights_of_a_sharded_checkpoint(
    prepared: Path, mapping: tuple[int, list[str]], choice: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those that are gathered, in stretches: on no device is there a whole tensor that is large."""
    world, settings = mapping
    limit, full_tensor = 4096, DTensor.full_tensor

    def small(value: DTensor) -> Tensor:
        assert value.nbytes <= limit
        return full_tensor(value)

    monkeypatch.setattr("moetrain.train.whole.STRETCH", limit)
    monkeypatch.setattr(DTensor, "full_tensor", small)
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


def written_slowly(cfg: config.Config) -> int:
    """How many weights come one by one to a first rank that takes longer over all of them than ranks wait."""
    with timeout_of_new_groups(timedelta(seconds=2)):
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    count = 0
    for _ in whole_weights(trainer.engine, trainer.dims):
        count += 1
        time.sleep(0.1 if dist.get_rank() == 0 else 0)
    return count


def test_an_export_may_take_longer_than_ranks_wait_for_each_other(prepared: Path) -> None:
    counts = run_ranks(4, written_slowly, load(prepared, [*SIGMOID, "parallel.pp=2", "train.micro_batch=1"]))
    assert counts == [counts[0]] * 4 and counts[0] > 40


# The toy run without its model, which is that of the weights.
RUN = [words for words in BASE if not words.startswith("model.")]
STARTS: dict[str, tuple[int, list[str]]] = {
    "tp": (2, ["parallel.tp=2", "train.micro_batch=8"]),
    "pp": (2, ["parallel.pp=2", "train.micro_batch=2"]),
    "ep": (2, ["parallel.ep=2", "train.micro_batch=4"]),
    "pp, tp, etp": (4, ["parallel.pp=2", "parallel.tp=2", "parallel.etp=2", "train.micro_batch=2"]),
    "zero 3": (2, ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.ep=2", "train.micro_batch=4"]),
}


def start(cfg: config.Config) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """The figures of the first step, and the tokens and targets of this rank in it."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    trainer.start()
    batches = [(batch.tokens_BS, batch.targets_BS) for batch in trainer.loader.step(0)]
    return one_step(trainer), batches


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("form", ["hf", "moetrain"])
def test_every_mapping_starts_from_the_same_weights(
    prepared: Path, name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the first step is transformers', and the same under every mapping: float64, 1e-9."""
    monkeypatch.setitem(hf_models.BASE, "vocab_size", 300)
    theirs = hf_models.make(name).eval()
    theirs.save_pretrained(tmp_path / "hf")
    if form == "moetrain":
        assert cli.main(["convert", "to=moetrain", f"from={tmp_path / 'hf'}", f"out={tmp_path / 'moetrain'}"]) == 0

    def run(settings: list[str]) -> config.Config:
        words = [*RUN, f"init={tmp_path / form}", f"run_dir={tmp_path / 'run'}", *settings]
        cfg = config.load([*words, "model.attention.backend=math"], start=brings)
        cfg.data = toy_data(prepared, cfg.data)
        return cfg

    one, batches = run_ranks(1, start, run(["train.precision=float64", "train.micro_batch=8"]))[0]
    ids, targets = batches[0]
    with torch.no_grad(), hf_models.float64_throughout():
        logits = theirs.double()(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long()).item()
    assert one["loss"] == pytest.approx(expected, rel=1e-6)  # their rotary tables are float32
    for mapping, (world, settings) in STARTS.items():
        deepspeed = "zero" in mapping
        precision = "float32" if deepspeed else "float64"
        for figures, _ in run_ranks(world, start, run([*settings, f"train.precision={precision}"]), timeout=300):
            for key in ("loss", "grad_norm"):
                assert figures[key] == pytest.approx(one[key], rel=1e-5 if deepspeed else 1e-9), (mapping, key)


# Four ranks each; the first has every way to split a weight, the second the most ranks for experts and for heads.
ROUND = {
    "pp, tp, etp": ["parallel.pp=2", "parallel.tp=2", "parallel.etp=2", "train.micro_batch=2"],
    "tp, ep": ["parallel.tp=2", "parallel.ep=2", "train.micro_batch=4"],
}


def save_at_once(cfgs: list[config.Config]) -> list[float]:
    """Start from the weights under each mapping, save them as they came, then step; the losses of the first step."""
    losses = []
    for cfg in cfgs:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
        trainer.start()
        trainer.checkpointer.save(trainer.step, trainer.engine.state({"step": trainer.step}))
        trainer.checkpointer.wait()
        losses.append(one_step(trainer)["loss"])
    return losses


@pytest.mark.parametrize("family", STOCK)
def test_every_family_comes_back_through_ranks_bit_for_bit(
    prepared: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face -> four ranks, each its slices -> their checkpoint -> Hugging Face; one loss for all mappings."""
    monkeypatch.setitem(hf_models.BASE, "vocab_size", 300)
    hf_models.make(family).save_pretrained(tmp_path / "in")
    words = [*RUN, f"init={tmp_path / 'in'}", "train.precision=float32"]
    words += ["balance=[bias]"] if family_named(family).zeros else []
    cfgs = []
    for i, settings in enumerate(ROUND.values()):
        dense = family_named(family).is_dense()
        settings = [word for word in settings if not (dense and word.startswith(("parallel.ep", "parallel.etp")))]
        cfg = config.load([*words, *settings, f"run_dir={tmp_path / str(i)}"], start=brings)
        cfg.data = toy_data(prepared, cfg.data)
        cfgs.append(cfg)
    losses = run_ranks(4, save_at_once, cfgs, timeout=300)[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    before = tensors_in(tmp_path / "in")
    for cfg in cfgs:
        config.save(cfg, Path(cfg.run_dir) / "config.yaml")
        out = Path(cfg.run_dir) / "hf"
        assert cli.main(["convert", "to=hf", f"from={cfg.run_dir}", f"out={out}"]) == 0
        after = tensors_in(out)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], t) for name, t in before.items())
