"""``moetrain train init=PATH``: the model, the tokenizer and the weights come from there, and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetrain import cli
from moetrain.config import Config, load, read
from moetrain.config.schema import ExpertsConfig
from moetrain.convert.export import export_hf
from moetrain.convert.load import load_hf
from moetrain.model.decoder import Decoder
from moetrain.train.preflight import open_data, open_sampler
from tests.convert.test_round_trip import train_bpe

QUICK = ["train.seq_len=32", "train.eval_sequences=2", "log.tensorboard=false", "log.progress=false"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("moetrain"), "handlers", [])
    yield


def a_model(preset: str, folder: str) -> Config:
    cfg = load([f"model={preset}", "model.vocab_size=300", "model.dim=48", "model.name=mine"])
    torch.manual_seed(1)
    balance = {"bias": {}} if "deepseek" in preset else {}
    model = Decoder(cfg.model, balance, ExpertsConfig())
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                t.normal_(0, 0.1 if "norm" not in name else 0.5)
    export_hf(cfg.model, model.state_dict(), folder, train_bpe())
    return cfg


def test_the_model_the_tokenizer_and_the_balance_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("moetrain.train.run", lambda cfg, resume: seen.append(cfg))
    monkeypatch.setattr("moetrain.start.get_ready", lambda cfg, resume: None)
    cfg = a_model("tiny-deepseek", "hf")
    assert cli.main(["convert", "to=moetrain", "from=hf", "out=mine"]) == 0
    for init in ("hf", "mine"):
        assert cli.main(["train", f"init={init}", "model.attention.backend=math", "seed=7"]) == 0
        got = seen.pop()
        assert (got.model.dim, got.model.vocab_size, got.model.family) == (48, 300, "deepseek_v3")
        assert got.model.moe == cfg.model.moe and got.model.attention.backend == "math" and got.seed == 7
        assert Path(got.data.tokenizer.path or "").resolve() == Path(init).resolve()
        assert list(got.balance) == ["bias"] and got.init == init
    assert cli.main(["train", "init=hf", "balance=deepseek_v3", "data.tokenizer.path=other"]) == 0
    got = seen.pop()
    assert list(got.balance) == ["bias", "aux_loss"] and got.data.tokenizer.path == "other"


def test_training_starts_there_and_resumes_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The first loss is that of the weights; once there is a checkpoint, they are not needed any more."""
    a_model("tiny", "hf")
    assert cli.main(["train", "init=hf", *QUICK, "run_dir=run", "train.steps=1"]) == 0, capsys.readouterr().err
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    cfg = read("run/config.yaml")
    model = Decoder(cfg.model, {}, ExpertsConfig())
    load_hf(model, "hf")
    sampler, _ = open_sampler(cfg, open_data(cfg))
    samples = torch.stack([torch.as_tensor(sampler[i][1].astype("int64")) for i in range(8)])
    with torch.no_grad():
        loss = model(samples[:, :-1], samples[:, 1:])[0].item() / samples[:, 1:].numel()
    assert first["loss"] == pytest.approx(loss, rel=1e-5)

    Path("hf/config.json").unlink()
    assert cli.main(["train", "--resume", "run", "train.steps=2"]) == 0
    assert cli.main(["train", "--config", "run/config.yaml", "run_dir=new"]) == 2
    assert "'hf' holds no weights" in capsys.readouterr().err


def test_weights_are_no_run_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    a_model("tiny", "hf")
    assert cli.main(["convert", "to=moetrain", "from=hf", "out=mine"]) == 0
    assert cli.main(["train", "--resume", "mine", "train.seq_len=32"]) == 2
    assert "holds weights alone, no training to go on with; start a run from them with init=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("init=hf model=tiny", "init=hf brings its model; take out model=..."),
        ("init=hf model/router=sigmoid_topk", "init=hf brings its model; take out model/router=..."),
        ("init=nowhere", "'nowhere': there is no such file or folder"),
        ("init=hf model.dim=64", "does not fit the model: embed.weight has shape"),
        ("-m init=hf seed=1,2 model=tiny", "init=hf brings its model"),
    ],
)
def test_what_cannot_start(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    a_model("tiny", "hf")
    assert cli.main(["train", *words.split()]) == 2
    err = capsys.readouterr().err
    assert says in err and err.strip().splitlines()[-1].startswith("moetrain: error: ")
