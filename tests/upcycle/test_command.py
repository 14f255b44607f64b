"""The command: what it writes and says; what it refuses, in one line, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain import cli
from moetrain.config.registry import UPCYCLERS
from moetrain.data.sources import resolve
from tests.upcycle.theirs import read_parent, saved, tensors_of


def last_json(out: str) -> dict:
    return json.loads(out.strip().splitlines()[-1])


def test_a_folder_that_transformers_loads_and_the_losses(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moe"
    words = ["upcycle", "method=sparse", f"from={dense_folder}", f"out={out}", "num_experts=4", "tokens=600"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2 of 2 layers with 4 experts of width 40, top-2; step 0: the dense function" in said
    result = last_json(said)
    assert result["exact"] and result["loss_after"] == pytest.approx(result["losses_before"][0], rel=1e-5)
    assert not list(tmp_path.glob("*.upcycled")) and not list(tmp_path.glob("*.partial"))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.eos_token_id == 0
    assert (out / "tokenizer.json").read_bytes() == (dense_folder / "tokenizer.json").read_bytes()
    ids = tokenizer("the same text", return_tensors="pt")["input_ids"]
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, dense.float()(ids).logits, rtol=1e-4, atol=1e-4)


def test_without_a_tokenizer_the_loss_is_not_measured_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = saved("llama", tmp_path / "dense")
    assert cli.main(["upcycle", "method=sparse", f"from={dense}", f"out={tmp_path / 'moe'}"]) == 0
    assert "losses not measured: " in capsys.readouterr().out


def test_other_forms_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result in any form is the same model, and is a parent again; a tokenizer of data that happens to be prepared
    where the command runs is not taken for its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared" / "demo").mkdir(parents=True)
    shutil.copy(resolve("moetrain:data/demo/tokenizer.json"), tmp_path / "prepared" / "demo" / "tokenizer.json")
    dense = saved("mistral", tmp_path / "dense")
    for to, name in (("hf", "a"), ("moetrain", "b"), ("safetensors", "c.safetensors")):
        out = f"out={tmp_path / name}"
        assert cli.main(["upcycle", "method=drop", f"from={dense}", out, f"to={to}", "measure=false"]) == 0
    whole = [tensors_of(read_parent(tmp_path / name)) for name in ("a", "b", "c.safetensors")]
    for other in whole[1:]:
        assert other.keys() == whole[0].keys()
        assert all(torch.equal(other[name], t) for name, t in whole[0].items())
    again = [
        "upcycle",
        "method=grow",
        f"from={tmp_path / 'b'}",
        f"out={tmp_path / 'd'}",
        "copy_of=[1]",
        "measure=false",
    ]
    assert cli.main(again) == 0
    assert read_parent(tmp_path / "d").cfg.moe.num_experts == 9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("from={llama} out=new", "upcycle needs method="),
        ("method=sparse out=new", "upcycle needs from="),
        ("method=sparse from={llama}", "upcycle needs out="),
        ("method=sparce from={llama} out=new", "no upcycling method is called 'sparce'; did you mean 'sparse'?"),
        ("method=sparse from=nowhere out=new", "'nowhere': there is no such file or folder"),
        ("method=sparse from={empty} out=new", "holds no weights that are known here"),
        ("method=sparse from={llama} out={llama}", "is not empty"),
        ("method=sparse from={mixtral} out=new", "needs a dense model; {mixtral} has experts in layer 0"),
        ("method=sparse from={llama},{llama} out=new", "method=sparse takes one model in from=; got 2"),
        ("method=sparse from={llama} out=new num_experts=2 top_k=3", "top_k=3 is more than num_experts=2"),
        ("method=sparse from={llama} out=new num_expert=2", "has no setting 'num_expert'; did you mean 'num_experts'?"),
        ("method=sparse from={llama} out=new num_experts=many", 'num_experts takes int >= 1; got "many"'),
        ("method=sparse from={llama} out=new layers=[3]", "layers=[3]: the model has layers 0 to 2"),
        ("method=sparse from={llama} out=new router=zeros", "router takes one of"),
        ("method=sparse from={llama} out=new text=nowhere", "text=nowhere: there is no such file"),
        ("method=merge from={mixtral} out=new rank=0", "rank takes int >= 1 or null; got 0"),
        ("method=sparse from={llama} out=new seed=-1", "seed= takes a whole number of 0 or more; got '-1'"),
        ("method=sparse from={llama} out=new to=safetensors", "out=new must end in .safetensors"),
        ("method=sparse method=drop from={llama} out=new", "method= is given twice"),
        ("method=sparse from={damaged} out=new", "is cut short"),
        ("method=prune from={mixtral} out=new", "method=prune reads text to see what the parent does on it, but"),
        ("method=split by=activity from={llama} out=new", "{llama} has no tokenizer to read text with"),
        (
            "method=virtual_group from={llama} out=new granularity=16",
            "granularity=16 does not divide the dense width 40",
        ),
        ("method=btx from={llama},{mistral} out=new", "model.attention.sliding_window is [None, None, None] in"),
        ("method=sparse from={lacking} out=new", "tensor 'model.norm.weight' is missing"),
    ],
)
def test_bad_input_is_one_line(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {name: saved(name, tmp_path / name) for name in ("llama", "mistral", "mixtral") if f"{{{name}}}" in words}
    folders["empty"] = tmp_path / "empty"
    folders["empty"].mkdir()
    for name in ("damaged", "lacking"):
        if f"{{{name}}}" in words:
            folders[name] = harmed(name, saved("llama", tmp_path / name))
    capfd.readouterr()  # transformers' progress bars
    assert cli.main(["upcycle", *words.format(**folders).split()]) == 2
    error = capfd.readouterr().err.strip()
    assert says.format(**folders) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.upcycled"))


def test_parents_of_other_tokenizers(dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their shapes are the same where each was trained on data of its own, which had a tokenizer made for it. Words
    that were added to one of them, as those of a chat, are no other tokenizer."""
    other = tmp_path / "other"
    shutil.copytree(dense_folder, other)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(other)
    words = ["upcycle", "method=btx", f"from={dense_folder},{other}", "measure=false"]
    assert cli.main([*words, f"out={tmp_path / 'one'}"]) == 0
    file = other / "tokenizer.json"
    trained = json.loads(file.read_text(encoding="utf-8"))
    vocab = trained["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(trained), encoding="utf-8")
    assert cli.main([*words, f"out={tmp_path / 'two'}"]) == 2
    assert "parents must have the same tokenizer: that of" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def harmed(how: str, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    if how == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_help_lists_every_method_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["upcycle", "--help"]) == 0
    said = capsys.readouterr().out
    for name in UPCYCLERS.names():
        assert f"method={name}: " in said
    assert "num_experts      int >= 1 = 8: experts of a layer" in said


def test_out_may_be_a_link_to_a_folder_and_a_mounted_disk_is_refused_at_once(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither can be replaced by what was written beside it, which would show after all the work."""
    words = ["upcycle", "method=sparse", f"from={dense_folder}", "measure=false"]
    (tmp_path / "disk" / "moe").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/moe")
    assert cli.main([*words, f"out={tmp_path / 'link'}"]) == 0
    assert (tmp_path / "disk" / "moe" / "config.json").is_file() and (tmp_path / "link").is_symlink()

    out = tmp_path / "mounted"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    assert cli.main([*words, f"out={out}"]) == 2
    assert f"write to a folder in it, as {out / 'model'}" in capsys.readouterr().err


def test_of_a_large_text_only_the_beginning_is_read(dense_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "large.txt"
    text.write_text("the model reads the text\n" * 400)
    with text.open("r+b") as file:
        file.truncate(2**40)  # a hole that takes no room on the disk
    words = ["upcycle", "method=sparse", f"from={dense_folder}", f"out={tmp_path / 'moe'}", f"text={text}", "tokens=64"]
    assert cli.main(words) == 0
