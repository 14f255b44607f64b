"""The proxy by merged models, against models that were really trained and against an average by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.cli import main
from moetrain.config import load
from moetrain.config.errors import DataError
from moetrain.convert.export import export_hf
from moetrain.convert.tensors import is_training_state
from moetrain.mixture.merged import MergedModels, check_one_start, read_weights
from moetrain.mixture.runs import read_runs

SMALL = [
    "model=tiny", "model.n_layers=1", "model.dim=32", "model.attention.n_heads=1", "model.attention.n_kv_heads=1",
    "model.moe.num_experts=2", "model.moe.expert_dim=32", "model.vocab_size=600", "data.tokenizer.vocab_size=600",
    "train.steps=4", "train.seq_len=32", "train.global_batch=4", "train.threads=1", "device=cpu", "data=own",
    "data.name=mine",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of two domains of different text."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, letters in (("left", "abcdef"), ("right", "uvwxyz")):
        lines = ["".join(rng.choice(list(letters), 12)) + " " + name for _ in range(1500)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return [*SMALL, "data.sources.left.paths=[left.txt]", "data.sources.right.paths=[right.txt]"]


def test_from_two_models_to_a_proposal(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real search: its CSV files hold the losses of averages; a second call trains and scores nothing again."""
    search = ["mixture", "search=s", "runs=12", "proxy=merged", "start=2", "draws=1000", "predictor=gp", *words]
    assert main(search) == 0
    first = json.loads(capfd.readouterr().out.splitlines()[-1])
    runs = read_runs("s", "train")
    assert (len(runs.weights), runs.domains, runs.targets) == (12, ["left", "right"], ["left", "right"])
    assert Path("s/mixture.png").read_bytes().startswith(b"\x89PNG")
    assert first["predicted_loss"] < first["predicted_loss_of_prior"] + 0.01
    preset = load(["data=own", "+mixture=best"], config_dirs=["s/presets"], kinds=False)
    assert {name: source.weight for name, source in preset.data.sources.items()} == first["weights"]

    folders = {name: Path(f"s/merged/only-{name}") for name in runs.domains}
    merged = MergedModels(load(words), folders, runs.targets)
    for number, folder in enumerate(folders.values()):  # a corner is the model that the trainer evaluated itself
        by_domain = json.loads((folder / "summary.json").read_text())["val_loss_by_domain"]
        assert merged.losses_of(np.eye(2)[number]) == pytest.approx(list(by_domain.values()), rel=1e-5)
    left, right = merged.weights.values()
    export_hf(merged.cfg.model, left, tmp_path / "left")  # the same from safetensors
    again = read_weights(merged.model, tmp_path / "left")
    assert all(torch.equal(again[name], value) for name, value in left.items() if not is_training_state(name))
    middle = {name: (left[name] + 3 * right[name]) / 4 for name in left if left[name].is_floating_point()}
    merged.losses_of(np.array([0.25, 0.75]))
    now = merged.model.state_dict()
    for name, value in middle.items():
        torch.testing.assert_close(now[name], value)
    lines = [json.loads(line) for line in Path("s/scores.jsonl").read_text().splitlines()]
    assert len(lines) == 12

    monkeypatch.setattr("subprocess.run", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr("moetrain.mixture.merged.held_out_losses", lambda *a: pytest.fail("scored again"))
    assert main(search) == 0
    second = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert second["weights"] == first["weights"]
    for change, message in (("start=1", "begun with start=2"), ("runs=13", "only further rounds"), ("seed=2", "begun")):
        name = change.split("=")[0]
        other = [word for word in search if not word.startswith(f"{name}=")]
        assert main([*other[:1], change, *other[1:]]) == 2
        assert re.search(message, capfd.readouterr().err)


def test_a_domain_that_is_used_up_alone_is_refused_before_anything_is_trained(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """On 2 steps of two domains and 2 alone: its cap of a hundredth is less than these 384 of the 512 tokens."""
    search = ["mixture", "search=s", "runs=12", "proxy=merged", "start=2", *words, "data.max_epochs=0.01"]
    assert main(search) == 2
    assert "a model on 'left' alone, on 384 tokens, and max_epochs ends it before that" in capfd.readouterr().err
    assert not Path("s").exists()


def test_models_of_different_starts_are_refused() -> None:
    """Independent weights, and the same weights with the experts in another order, of which averages mean nothing."""
    torch.manual_seed(0)
    start = {"embed.weight": torch.randn(50, 16), "layers.0.experts.w1_EDF": torch.randn(4, 16, 16)}
    near = {name: value + 0.3 * torch.randn_like(value) for name, value in start.items()}
    check_one_start({"a": start, "b": near})
    turned = near | {"layers.0.experts.w1_EDF": near["layers.0.experts.w1_EDF"].roll(1, 0)}
    other = {name: torch.randn_like(value) for name, value in start.items()}
    for models, what in (({"a": start, "b": turned}, "experts"), ({"a": start, "b": other}, "experts|weights")):
        with pytest.raises(DataError, match=f"do not come from one start .cosine of their ({what})"):
            check_one_start(models)
