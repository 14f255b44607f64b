"""``moetrain inspect``: its numbers against those computed at once from whole tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moetrain import cli
from moetrain.checkpoint import weights
from moetrain.convert import look as looking
from tests.convert.test_command import a_run, convert
from tests.model.hf_models import make


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("moetrain"), "handlers", [])
    yield


def numbers(path: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["inspect", path, "--json", "plot=none"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_similarity_norms_and_outliers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run, of its Hugging Face form and of one file the same; with blocks so small that all is in many."""
    held = a_run(Path("run"), ["model=tiny"])
    convert("to=hf from=run out=hf")
    convert("to=safetensors from=run out=one.safetensors")
    whole = numbers("run", capsys)
    for module in (weights, looking):
        monkeypatch.setattr(module, "BLOCK", 20_000)
    for path in ("run", "hf", "one.safetensors"):
        found = numbers(path, capsys)
        assert found["family"] == "qwen3_moe"
        for key in ("total", "active"):
            assert found[key] == whole[key]
        layer = found["experts"][2]
        x = torch.cat([held[f"layers.2.moe.experts.{name}"].flatten(1) for name in ("w13", "w2")], 1).double()
        cosine = F.cosine_similarity(x[:, None], x[None], dim=-1)
        pairs = cosine[~torch.eye(len(x), dtype=torch.bool)]
        assert layer["cosine_mean"] == pytest.approx(float(pairs.mean()), abs=1e-6)
        assert layer["cosine_max"] == pytest.approx(float(pairs.max()), abs=1e-6)
        assert float(cosine[tuple(layer["pair"])]) == pytest.approx(float(pairs.max()))
        assert layer["norms"] == pytest.approx(x.norm(dim=1).tolist(), rel=1e-5)
        router = held["layers.2.moe.router.weight"]
        assert layer["router_norms"] == pytest.approx(router.norm(dim=1).tolist(), rel=1e-5)
        experts = torch.cat([t.flatten() for name, t in held.items() if ".experts." in name])
        part = found["parts"]["experts"]
        assert part["parameters"] == experts.numel()
        assert part["rms"] == pytest.approx(float(experts.square().mean().sqrt()), rel=1e-5)
        assert part["outlier"] == pytest.approx(float(experts.abs().max() / experts.square().mean().sqrt()), rel=1e-5)
        assert sum(p["parameters"] for p in found["parts"].values()) == found["total"]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_copies_and_broken_numbers_are_seen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As right after upcycling: one expert is another's copy. And a number that is not finite."""
    theirs = make(name)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "layers.2" in key and ".experts." in key:
                p[4] = p[1]
        theirs.get_parameter("model.norm.weight")[0] = float("nan")
    theirs.save_pretrained("in")
    assert cli.main(["inspect", "in"]) == 0
    out = capsys.readouterr().out
    assert name in out and "NOT FINITE: norms: 1 elements" in out and "+1.0000" in out and "1, 4" in out
    assert Path("inspect.png").stat().st_size > 10_000
    found = numbers("in", capsys)
    assert found["experts"][-1]["pair"] == [1, 4] and found["experts"][-1]["cosine_max"] == pytest.approx(1, abs=1e-6)
    assert found["experts"][0]["cosine_max"] < 0.5 and found["parts"]["norms"]["nonfinite"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("a b", "inspect takes one path"),
        ("in plot=x.txt", "give a name that ends in .png"),
        ("in plot=no/x.png", "there is no folder no"),
        ("nowhere", "there is no such file or folder"),
    ],
)
def test_wrong_words(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", *words.split()]) == 2
    assert says in capsys.readouterr().err
