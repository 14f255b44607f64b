"""Checkpoints as published, FP8 in blocks and MXFP4: the numbers that transformers makes of them, part by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from moetrain import cli
from moetrain.config.errors import ConvertError
from moetrain.convert.open import open_weights
from moetrain.convert.quantised import Dequantised
from moetrain.convert.source import Held
from tests.model.hf_models import BASE, MODELS, make, tokens


def quantise(folder: Path, tensors: dict[str, Tensor], **how: Any) -> None:
    """Put ``tensors`` into the checkpoint in ``folder``, and ``how`` into its config."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))


def same_there_and_here(folder: Path, **how: Any) -> None:
    """transformers' own dequantisation of ``folder``, and ours exported, are the same tensors and logits."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).eval()
    assert cli.main(["convert", "to=hf", f"from={folder}", "out=out"]) == 0
    ours = AutoModelForCausalLM.from_pretrained("out").eval()
    assert ours.dtype == torch.bfloat16 and not hasattr(ours.config, "quantization_config")
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert [name for name, t in ours.state_dict().items() if not torch.equal(t, state[name])] == []
    assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def test_fp8_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # dequantising needs nothing of the package that transformers asks for
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    make("deepseek_v3", torch.bfloat16).save_pretrained("in")  # type: ignore[operator]
    tensors = load_file("in/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("proj.weight") or name.endswith("with_mqa.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(rows // 4, columns // 4, generator=generator) / 50
    quantise(Path("in"), tensors, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[4, 4])
    same_there_and_here(Path("in"), quantization_config=FineGrainedFP8Config(weight_block_size=(4, 4), dequantize=True))

    config = json.loads(Path("in/config.json").read_text())  # Kimi K2 is published so, under a name of its own
    Path("in/config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    assert cli.main(["convert", "to=hf", "from=in", "out=kimi"]) == 0
    assert json.loads(Path("kimi/config.json").read_text())["model_type"] == "deepseek_v3"
    assert Path("kimi/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = AutoConfig.for_model("gpt_oss", **(BASE | MODELS["gpt_oss"][1] | {"intermediate_size": 64}))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("in")
    tensors = load_file("in/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inner, outer = tensors.pop(name).shape
        size = (experts, outer, inner // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*size, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 125, size, generator=generator, dtype=torch.uint8)
    quantise(Path("in"), tensors, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    same_there_and_here(Path("in"), quantization_config=Mxfp4Config(dequantize=True))
    whole = open_weights("in").source
    name, box = "layers.1.moe.experts.w13", (slice(2, 5), slice(1, 2), slice(3, 40), slice(5, 31))  # as a rank's slice
    assert torch.equal(whole.read(name, box), whole.read(name)[box])


def test_slices_do_not_have_to_begin_where_blocks_do() -> None:
    numbers = torch.arange(-100.0, 100.0).view(10, 20).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [0.5, 0.25, 0.125]])  # 4 rows and 8 columns, or fewer
    expected = torch.stack([torch.stack([numbers[i, j].float() * scales[i // 4, j // 8] for j in range(20)])
                            for i in range(10)])  # fmt: skip
    read = Dequantised(Held({"w": numbers, "w_scale_inv": scales}), (4, 8)).read
    assert torch.equal(read("w").float(), expected)
    for rows in (slice(0, 4), slice(3, 9), slice(9, 10), slice(5, 5)):
        for columns in (slice(0, 20), slice(7, 17), slice(16, 20)):
            assert torch.equal(read("w", (rows, columns)).float(), expected[rows, columns])


def test_scales_that_are_missing_or_of_another_shape() -> None:
    numbers = torch.zeros(10, 20, dtype=torch.float8_e4m3fn)
    with pytest.raises(ConvertError, match=r"'w' is quantised, and 'w_scale_inv' is missing; its scales are \(3, 3\)"):
        Dequantised(Held({"w": numbers}), (4, 8))
    with pytest.raises(ConvertError, match=r"'w_scale_inv' has shape \(2, 3\); its scales are \(3, 3\)"):
        Dequantised(Held({"w": numbers, "w_scale_inv": torch.ones(2, 3)}), (4, 8))
