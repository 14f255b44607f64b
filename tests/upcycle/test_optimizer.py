"""A dense run, upcycled with its optimizer's state: training goes on as if it had never been dense."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from moetrain import cli
from moetrain.checkpoint.weights import OPTIMIZER, SavedWeights

QUICK = [
    "train.global_batch=2",
    "train.micro_batch=2",
    "generate.prompts=[]",
    "train.seq_len=32",
    "train.eval_sequences=2",
    "log.tensorboard=false",
    "log.progress=false",
]
SMALL = ["model.moe.num_experts=0", "model.dim=32", "model.n_layers=2", "model.dense_dim=40", "export.at_end=false"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("moetrain"), "handlers", [])


def losses(run: str) -> list[float]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_moments_go_where_their_weights_go(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*QUICK, "data=demo", "train.steps=3", "balance=[]", "train.precision=float32"]
    assert cli.main(["train", *run, *SMALL, "run_dir=dense"]) == 0, capsys.readouterr().err
    frozen = [*run, *SMALL, "train.steps=1", "train.freeze=[embed.*]", "run_dir=frozen"]
    assert cli.main(["train", *frozen]) == 0, capsys.readouterr().err
    other = [*run, *SMALL, "train.steps=1", "optim=muon", "run_dir=muon"]
    assert cli.main(["train", *other]) == 0, capsys.readouterr().err
    words = ["upcycle", "from=dense", "to=moetrain", "num_experts=3", "measure=false"]
    assert cli.main([*words, "method=sparse", "out=moe", "optimizer=true"]) == 0, capsys.readouterr().err
    assert cli.main([*words, "method=sparse", "out=anew"]) == 0

    before = SavedWeights(next(Path("dense/checkpoints").glob("step-3")), OPTIMIZER)
    after = SavedWeights(Path("moe/checkpoints/step-0"), OPTIMIZER)
    for moment in ("exp_avg", "exp_avg_sq"):
        for layer in range(2):
            gate, up, down = (before.read(f"layers.{layer}.mlp.w_{p}.weight.{moment}") for p in ("gate", "up", "down"))
            for e in range(3):
                here = (slice(e, e + 1),)
                assert torch.equal(after.read(f"layers.{layer}.moe.experts.w13.{moment}", here)[0, 0], gate)
                assert torch.equal(after.read(f"layers.{layer}.moe.experts.w13.{moment}", here)[0, 1], up)
                assert torch.equal(after.read(f"layers.{layer}.moe.experts.w2.{moment}", here)[0], down)
            assert not after.read(f"layers.{layer}.moe.router.weight.{moment}").any()
        assert torch.equal(after.read(f"embed.weight.{moment}"), before.read(f"embed.weight.{moment}"))
    assert after.read("embed.weight.step") == 3 and after.read("layers.0.moe.router.weight.step") == 0

    for init, extra in (("moe", ["init_optimizer=true"]), ("anew", [])):
        assert cli.main(["train", f"init={init}", *run, *extra, f"run_dir=from-{init}", "export.at_end=false"]) == 0
    assert losses("from-moe")[0] == pytest.approx(losses("from-anew")[0], rel=1e-6)
    assert losses("from-moe")[1] != pytest.approx(losses("from-anew")[1], rel=1e-6)

    capsys.readouterr()
    sparse = ["upcycle", "method=sparse", "to=moetrain", "num_experts=3", "optimizer=true", "out=x"]
    refused = [
        ([*sparse, "from=frozen"], "has no state of embed.weight, which was not trained (train.freeze)"),
        ([*sparse, "from=muon"], "has another optimizer's"),
        ([*words, "method=drop", "out=x", "optimizer=true"], "method=drop does not carry optimizer state, sparse does"),
        (["upcycle", "method=sparse", "from=anew", "to=moetrain", "out=x"], "needs a dense model"),
        (["train", "init=anew", "init_optimizer=true", *run, "run_dir=x"], "has no optimizer state; take it out"),
        (["train", "init_optimizer=true", *run, "run_dir=x"], "init_optimizer=true goes with init=PATH, which is null"),
    ]
    for command, says in refused:
        assert cli.main(command) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and len(error.splitlines()) == 1 and not Path("x").exists()
