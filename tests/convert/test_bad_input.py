"""Checkpoints from elsewhere that are not what they seem: one line that says what and where, and nothing written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain import cli
from tests.model.hf_models import make

INDEX = Path("in/model.safetensors.index.json")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("moetrain"), "handlers", [])
    yield


def refused(capsys: pytest.CaptureFixture[str], words: str = "to=moetrain from=in out=out") -> str:
    capsys.readouterr()
    assert cli.main(["convert", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moetrain: error: ") and err.count("\n") == 1 and len(err) < 450
    assert not list(Path(".").glob("out*"))
    return err


def saved(name: str = "qwen3_moe", **how: Any) -> None:
    make(name).save_pretrained("in", **how)


def in_file(change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file("in/model.safetensors")
    change(tensors)
    save_file(tensors, "in/model.safetensors", metadata={"format": "pt"})


def in_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_file_that_was_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    """Anywhere: in the header's length, in the header, in the last tensor. Nothing of the tensors is read to see it."""
    saved()
    file = Path("in/model.safetensors")
    data = file.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        err = refused(capsys)
        assert "in/model.safetensors" in err and ("cut short" if size > 10_000 else "damaged") in err
    file.write_bytes(b"\x10" + data[1:9] + b"x" * (len(data) - 9))
    assert "is damaged or no safetensors file" in refused(capsys)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"shape":[32]', b'"shape":null')
    file.write_bytes(data[:8] + header[:length] + data[8 + length :])
    assert "its header does not describe tensor" in refused(capsys)


def test_an_index_that_names_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    saved(max_shard_size="60KB")
    index = json.loads(INDEX.read_text())
    first, *others = sorted(set(index["weight_map"].values()))
    Path("in", first).rename("kept")
    assert f"names '{first}', which is missing" in refused(capsys)
    Path("kept").rename(Path("in", first))
    in_json(INDEX, weight_map=index["weight_map"] | {"model.ghost": first})
    assert "names tensor 'model.ghost', which its file does not hold" in refused(capsys)
    INDEX.write_text("{}")
    assert "index.json' is damaged" in refused(capsys)
    INDEX.unlink()  # all files are read then
    Path("in/copy.safetensors").write_bytes(Path("in", first).read_bytes())
    assert "both hold tensor" in refused(capsys)
    for file in (first, *others, "copy.safetensors"):
        Path("in", file).unlink()
    Path("in/pytorch_model.bin").touch()
    assert "*.bin files are not read: save them as safetensors" in refused(capsys)


def test_the_same_weights_in_another_format_beside_them() -> None:
    """As Mistral publishes; transformers reads model.safetensors too."""
    saved()
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, "in/consolidated.safetensors")
    assert cli.main(["convert", "to=hf", "from=in", "out=out"]) == 0
    assert load_file("out/model.safetensors").keys() == load_file("in/model.safetensors").keys()


def test_a_model_type_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    saved()
    in_json(Path("in/config.json"), model_type="qwen3_mo")
    assert "no model family is called 'qwen3_mo'; did you mean 'qwen3_moe'?" in refused(capsys)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"moe_intermediate_size": 25}, "experts.0.down_proj.weight' has shape (32, 24); the model needs (32, 25)"),
        ({"num_hidden_layers": 2}, "covers tensor 'model.layers.2."),
        ({"num_hidden_layers": 4}, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_experts": 5, "num_local_experts": 5}, "covers tensor 'model.layers.0.mlp.experts.5."),
        ({"num_key_value_heads": 1}, "k_proj.weight' has shape (20, 32); the model needs (10, 32)"),
        ({"attention_bias": True}, "q_proj.bias' is missing"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from the embedding"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json' describes no qwen3_moe model: integer division"),
        ({"decoder_sparse_step": 0}, "config.json' describes no qwen3_moe model: range()"),
        ({"num_experts_per_tok": 7}, "qwen3_moe model: layer 0: model.moe.top_k=7 must be between 1 and num_experts=6"),
        ({"model_type": ["qwen3_moe"]}, "config.json' has no model_type"),
    ],
)
def test_a_config_that_contradicts_the_weights(
    changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved()
    in_json(Path("in/config.json"), **changes)
    assert says in refused(capsys)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_lora_rank": 0}, "needs model.attention.kv_lora_rank of at least 1"),
        ({"n_group": 3}, "layer 1: model.router.n_groups=3 must divide model.moe.num_experts=8"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, "1 groups of 2 experts cannot give model.moe.top_k=3"),
    ],
)
def test_numbers_that_no_weights_contradict(
    changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("deepseek_v3")
    in_json(Path("in/config.json"), **changes)
    assert says in refused(capsys)


def test_vocabulary_padding(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows beyond vocab_size would be lost or trained in silence; the message says how to keep them."""
    saved()

    def pad(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat((tensors[name], torch.zeros(3, 32)))

    in_file(pad)
    err = refused(capsys)
    assert (
        'vocabulary padding, 3 rows more than vocab_size=61; to keep them, set "vocab_size": 64 in config.json' in err
    )
    in_json(Path("in/config.json"), vocab_size=64)
    assert cli.main(["convert", "to=hf", "from=in", "out=out"]) == 0
    assert load_file("out/model.safetensors")["lm_head.weight"].shape == (64, 32)


def test_tied_embeddings_that_are_stored_twice(capsys: pytest.CaptureFixture[str]) -> None:
    saved("mixtral-window-tied")
    in_file(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert cli.main(["convert", "to=hf", "from=in", "out=equal"]) == 0
    assert "lm_head.weight" not in load_file("equal/model.safetensors")
    in_file(lambda t: t["lm_head.weight"][-1, -1].add_(1))
    assert "'lm_head.weight' differs from the embedding, but model.tie_embeddings=true" in refused(capsys)


def test_dtypes_that_are_not_numbers_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Integers are no weights, and what is quantised in a way that is not read has to be dequantised first."""
    saved()
    in_file(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    assert "'model.norm.weight' holds int8, not floating-point numbers" in refused(capsys)
    saved()
    for method in ("fp8", "compressed-tensors"):
        in_json(Path("in/config.json"), quantization_config={"quant_method": method})
        assert f"'in' is quantised ({method})" in refused(capsys)
