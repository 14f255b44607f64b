"""Loss on held-out text of a run and of its export, against transformers on the same windows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moetrain import cli
from moetrain.data.dataset import TokenData
from tests.convert.test_command import a_run


def test_loss_per_domain_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in (("prose", "the text is real and the model reads it. "), ("code", "if x: return the(text)\n")):
        lines = [json.dumps({"text": words * (3 + i % 5) + str(i)}) for i in range(60)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    a_run(Path("run"), ["model=tiny", "model.dim=32", "model.n_layers=2", "train.seq_len=24"])
    made = ["data=own", *(f"data.sources.{name}.paths=[{name}.jsonl]" for name in ("prose", "code"))]
    made += ["data.dir=prepared", "data.tokenizer.path=run/prepared/tokenizer.json"]
    assert cli.main(["prepare", *made, "model.vocab_size=320"]) == 0
    assert cli.main(["convert", "to=hf", "from=run", "out=hf"]) == 0
    found = []
    for path in ("run", "hf"):
        capsys.readouterr()
        assert cli.main(["eval", path, "data=prepared", "seq_len=24", "sequences=0", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    theirs, data = AutoModelForCausalLM.from_pretrained("hf").eval(), TokenData.open("prepared")
    sums, counts = 0.0, 0
    for name in ("prose", "code"):
        tokens = torch.from_numpy(np.array(data.tokens(name, "val")[:], dtype=np.int64))
        total = 0.0
        for window in (tokens[i : i + 25] for i in range(0, len(tokens) - 1, 24)):
            with torch.no_grad():
                total += float(cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="sum"))
        for mine in found:
            assert mine[name]["tokens"] == len(tokens) - 1
            assert mine[name]["loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
        sums, counts = sums + total, counts + len(tokens) - 1
    assert found[0]["all"]["perplexity"] == pytest.approx(math.exp(sums / counts), rel=1e-4)


def test_document_masks_are_those_of_the_run_on_other_data_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(
        Path("run"), ["model=tiny", "model.dim=32", "model.n_layers=2", "train.seq_len=64", "data.document_mask=true"]
    )
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": f"the text is real {i}"}) for i in range(80)))
    words = ["data=own", "data.sources.text.paths=[text.jsonl]", "data.tokenizer.path=tokenizer.json"]
    Path("run/prepared/tokenizer.json").rename("tokenizer.json")
    Path("run/prepared").rmdir()
    for folder in ("run/prepared", "other"):
        assert cli.main(["prepare", *words, f"data.dir={folder}", "model.vocab_size=320"]) == 0
    found = []
    for data in ([], ["data=other"]):
        capsys.readouterr()
        assert cli.main(["eval", "run", *data, "sequences=0", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"]["all"])
    assert found[0] == found[1]
