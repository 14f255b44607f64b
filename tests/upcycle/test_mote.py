"""MoTE: the dense layer stays as it is, and ternary experts stand beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moetrain import cli
from moetrain.convert.open import open_weights
from moetrain.upcycle.measure import build, loss
from tests.model.hf_models import tokens
from tests.upcycle.theirs import apply, assert_same, exported, logits, read_parent, saved, tensors_of


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
def test_without_a_share_of_the_ternary_experts_it_is_the_dense_function(name: str, tmp_path: Path) -> None:
    dense = saved(name, tmp_path / "dense")
    made = apply("mote", [dense], num_experts=3, scale=0)
    assert made.exact and made.settings == "train.freeze=[layers.*.moe.shared.*]"
    with torch.no_grad():
        before, after = (build(model, torch.float64) for model in (read_parent(dense), made.model))
        assert_same(after(tokens())[0], before(tokens())[0])
    out = exported(made, tmp_path / "out")
    assert '"model_type": "moetrain"' in (out / "config.json").read_text()
    torch.testing.assert_close(logits(out), logits(dense), rtol=1e-4, atol=1e-6)  # its rotations are float32


def test_the_experts_are_the_rounded_dense_layer(tmp_path: Path) -> None:
    """The first layer's output against its formula, and the loss of the whole here against transformers."""
    parent = read_parent(saved("llama", tmp_path / "dense"))
    made = apply("mote", [parent], num_experts=2, scale=0.5)
    assert not made.exact
    whole = tensors_of(made)
    gate, up, down = (parent.read(f"layers.0.mlp.w_{part}.weight") for part in ("gate", "up", "down"))
    x = torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def signs(w: torch.Tensor) -> torch.Tensor:
        s = w.abs().mean()
        return s * ((w > s / 2).double() - (w < -s / 2).double())

    weight = (x @ whole["layers.0.moe.router.weight"].T).softmax(1).amax(1, keepdim=True)
    expected = mlp(gate, up, down) + weight * 0.5 * mlp(signs(gate), signs(up), signs(down))
    decoder = build(made.model, torch.float64)
    seen: list[torch.Tensor] = []
    moe = decoder.layers["0"].moe
    moe.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    moe.register_forward_pre_hook(lambda _, args: (x, *args[1:]))
    with pytest.raises(RuntimeError):  # the block wants as many tokens as went in
        decoder(tokens())
    assert_same(seen[0].detach(), expected)

    out = exported(made, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert loss(made.model, tokens()) == pytest.approx(float(theirs(tokens(), labels=tokens()).loss), rel=1e-5)


def test_the_command_says_how_it_is_trained(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moe"
    assert cli.main(["upcycle", "method=mote", f"from={dense_folder}", f"out={out}", "tokens=300"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 layers with 4 ternary experts of width 40 beside a shared one of 40, top-1" in said
    assert f"moetrain train init={out} train.freeze=[layers.*.moe.shared.*]" in said
    result = json.loads(said.strip().splitlines()[-1])
    assert result["form"] == "moetrain" and result["loss_after"] != result["losses_before"][0]
    assert open_weights(out).model.moe.ternary
    capsys.readouterr()
    assert cli.main(["inspect", str(out), "plot=none"]) == 0
    assert "ternary" in capsys.readouterr().out
