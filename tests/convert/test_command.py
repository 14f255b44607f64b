"""``moetrain convert``: every form into every other, streamed, and refusals of one line before anything is written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetrain import cli
from moetrain.checkpoint import Checkpointer
from moetrain.checkpoint.weights import SavedWeights, Spec, read_box
from moetrain.config import load, save
from moetrain.config.schema import ExpertsConfig
from moetrain.convert.files import TensorFile, TensorWriter
from moetrain.model.decoder import Decoder
from tests.convert.test_round_trip import tensors_in, train_bpe
from tests.model.hf_models import MODELS, make, tokens


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("moetrain"), "handlers", [])  # earlier ones write to captured streams
    yield


def convert(words: str) -> None:
    assert cli.main(["convert", *words.split()]) == 0


def a_run(folder: Path, settings: list[str], seed: int = 0) -> dict[str, Tensor]:
    """A run directory with a checkpoint of a random model, and what the model holds."""
    cfg = load(["model.vocab_size=320", "data.tokenizer.vocab_size=320", *settings])
    cfg.data.dir, cfg.data.tokenizer.path = str(folder / "prepared"), None
    torch.manual_seed(seed)
    model = Decoder(cfg.model, cfg.balance, ExpertsConfig())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("bias_E"):
                buffer.uniform_(-0.1, 0.1)
    checkpointer = Checkpointer(folder / "checkpoints", keep=2, asynchronous=False)
    checkpointer.save(3, {"model": dict(model.state_dict()), "optim": {}, "train": {"step": 3}})
    assert not checkpointer.failed
    save(cfg, folder / "config.yaml")
    (folder / "prepared").mkdir()
    train_bpe().save(str(folder / "prepared" / "tokenizer.json"))
    return {name: t.detach() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("preset", ["tiny", "tiny-deepseek", "tiny-gpt-oss", "tiny-qwen2"])
def test_a_run_becomes_what_its_own_export_is(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command reads files, the end of a run its live tensors; both give the same bytes. The logits of the result
    are those of the model; the fused layout is another spelling of it."""
    from moetrain.convert.export import export_hf

    held = a_run(Path("run"), [f"model={preset}", *(["balance=[bias,aux_loss]"] if "deepseek" in preset else [])])
    cfg = load([f"model={preset}", "model.vocab_size=320", "data.tokenizer.vocab_size=320"]).model
    export_hf(cfg, held, "export", train_bpe())
    convert("to=hf from=run out=hf")
    assert "from run/checkpoints/step-3" in capsys.readouterr().out
    for file in Path("export").iterdir():
        assert file.read_bytes() == (Path("hf") / file.name).read_bytes(), file.name

    convert("to=hf from=run/checkpoints/step-3 out=fused layout=fused")
    names = tensors_in(Path("fused")).keys()
    assert not any(".experts.0." in name for name in names)
    theirs, again = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in ("hf", "fused"))
    balance = {"bias": {}} if "deepseek" in preset else {}
    ours = Decoder(cfg, balance, ExpertsConfig())
    ours.load_state_dict({name: t for name, t in held.items() if ".aux_loss." not in name})
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids)[0], rtol=1e-4, atol=1e-4)
    for name, t in again.state_dict().items():
        assert torch.equal(t, theirs.state_dict()[name]), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["safetensors", "moetrain"])
def test_there_and_back(name: str, form: str) -> None:
    """transformers -> one file with our names, or a checkpoint -> transformers: bit for bit, in bfloat16."""
    make(name).to(torch.bfloat16).save_pretrained("in", max_shard_size="60KB")
    out = "deep/one.safetensors" if form == "safetensors" else "deep/one"
    convert(f"to={form} from=in out={out}")
    convert(f"to=hf from={out} out=out")
    before, after = tensors_in(Path("in")), tensors_in(Path("out"))
    assert before.keys() == after.keys()
    for key, t in before.items():
        assert torch.equal(after[key], t.to(after[key].dtype)), key
        assert after[key].dtype == (torch.float32 if "correction_bias" in key else torch.bfloat16)


def test_a_dtype_may_be_asked_for() -> None:
    held = a_run(Path("run"), ["model=tiny"])
    convert("to=safetensors from=run out=one.safetensors dtype=bfloat16")
    convert("to=hf from=run out=half dtype=float16")
    for name, t in load_file("one.safetensors").items():
        assert torch.equal(t, held[name].bfloat16()), name
    assert {t.dtype for t in tensors_in(Path("half")).values()} == {torch.float16}


def test_any_part_of_a_tensor_can_be_read(tmp_path: Path) -> None:
    """From the middle of files, along every dimension, against slicing of the whole."""
    whole = torch.randn(5, 3, 4, 6).bfloat16()
    save_file({"before": torch.ones(3), "x": whole}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    boxes = [(), (slice(2, 4),), (slice(1, 2), slice(0, 2)), (slice(0, 5), slice(1, 2), slice(1, 3), slice(2, 5)),
             (slice(4, 5), slice(2, 3), slice(3, 4), slice(5, 6))]  # fmt: skip
    for box in boxes:
        assert torch.equal(file.read("x", box), whole[box])
    held = a_run(Path("run"), ["model=tiny"])
    saved = SavedWeights(Path("run/checkpoints/step-3"))
    w13 = held["layers.1.moe.experts.w13"]
    for box in [(), (slice(3, 4),), (slice(2, 6), slice(1, 2)), (slice(0, 8), slice(0, 2), slice(5, 9))]:
        assert torch.equal(saved.read("layers.1.moe.experts.w13", box), w13[box])


def test_files_written_row_by_row_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12).view(4, 3).to(torch.bfloat16), "b": torch.randn(5), "c": torch.tensor(2.0),
               "e": torch.empty(0, 3)}  # fmt: skip
    with TensorWriter(tmp_path / "x.safetensors", {n: Spec.of(t) for n, t in tensors.items()}, {"k": "v"}) as writer:
        for row in (2, 0):
            writer.write("a", tensors["a"][row : row + 2], row)
        for name in ("c", "b", "e"):
            writer.write(name, tensors[name])
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"k": "v"}
    with pytest.raises(EOFError), (tmp_path / "x.safetensors").open("rb") as raw:
        read_box(raw, 10, Spec((1000,), torch.float32))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("to=hf from=run", "convert needs out="),
        ("to=hff from=run out=x", "to=hff is not known; did you mean 'hf'?"),
        ("to=hf from=run out=x dtyp=float32", "convert takes no dtyp=; did you mean 'dtype'?"),
        ("to=hf from=run out=x dtype=int8", "dtype=int8 is not known"),
        ("to=hf to=hf from=run out=x", "to= is given twice"),
        ("to=hf from=run out=x layout=", "layout= is not known; known: per_expert, fused"),
        ("to=safetensors from=run out=x", "must end in .safetensors"),
        ("to=safetensors from=run out=x.safetensors layout=fused", "layout= goes with to=hf"),
        ("to=hf from=nowhere out=x", "'nowhere': there is no such file or folder"),
        ("to=hf from=empty out=x", "'empty' holds no weights that are known here"),
        ("to=hf from=young out=x", "run 'young' has no checkpoint yet"),
        ("to=hf from=run out=full", "'full' is not empty"),
        ("to=safetensors from=run out=full/there.safetensors", "is there already"),
        ("to=hf from=run out=full/there.safetensors/x", "there.safetensors' is a file, not a folder"),
        ("to=hf from=full/there.safetensors out=x", "has no moetrain_model in its header"),
        ("to=hf from=run out=x family=olmoe", "model.family=olmoe has no model.attention.qk_norm=head"),
        ("to=hf from=run out=x tokenizer=empty", "tokenizer=empty: no tokenizer.json is there"),
        ("to=hf from=lone/step-3 out=x", "has no config"),
    ],
)
def test_wrong_words_and_paths(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(Path("run"), ["model=tiny"])
    shutil.copytree("run/checkpoints/step-3", "lone/step-3")
    for folder in ("empty", "full", "young/checkpoints"):
        Path(folder).mkdir(parents=True)
    shutil.copy("run/config.yaml", "young/config.yaml")
    save_file({"x": torch.ones(1)}, "full/there.safetensors")
    before = sorted(Path(".").rglob("*"))
    assert cli.main(["convert", *words.split()]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("moetrain: error: ") and err.count("\n") == 1
    assert sorted(Path(".").rglob("*")) == before


def test_a_damaged_checkpoint_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    a_run(Path("run"), ["model=tiny"])
    file = next(Path("run/checkpoints/step-3").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert cli.main(["convert", "to=hf", "from=run", "out=x"]) == 2
    assert "none of the 1 checkpoints in run/checkpoints is whole" in capsys.readouterr().err
    assert cli.main(["convert", "to=hf", "from=run/checkpoints/step-3", "out=x"]) == 2
    assert "was altered" in capsys.readouterr().err and not Path("x").exists()


def test_not_enough_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(Path("run"), ["model=tiny"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 5_000_000}))
    for words in (
        "to=hf from=run out=far/x",
        "to=safetensors from=run out=x.safetensors",
        "to=moetrain from=run out=x",
    ):
        assert cli.main(["convert", *words.split()]) == 2
        assert "MB, and the disk of" in capsys.readouterr().err
    assert not Path("far").exists() and not list(Path(".").glob("x*"))
