"""What cannot be converted is refused in one line that names the tensor or the setting; nothing goes unsaid."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import load
from moetrain.config.errors import ConfigError, ConvertError
from moetrain.config.registry import FAMILIES
from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.convert.export import export_hf
from moetrain.convert.family import family_named, family_of, lacking_features
from moetrain.convert.load import load_hf, read_hf_config
from moetrain.model.decoder import Decoder
from tests.convert.test_round_trip import train_bpe
from tests.model.hf_models import MODELS, make

State = dict[str, Tensor]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def ours_of(name: str, balance: dict[str, Any] | None = None) -> tuple[Decoder, State]:
    theirs = make(name)
    cfg = family_named(MODELS[name][0]).from_hf_config(theirs.config.to_dict())
    return Decoder(cfg, balance or {}, ExpertsConfig()), dict(theirs.state_dict())


def at(state: State, part: str) -> str:
    """The name of one tensor of ``state``."""
    return next(name for name in state if part in name)


def drop(state: State) -> str:
    name = at(state, "layers.1.self_attn.o_proj.weight")
    del state[name]
    return f"'{name}' is missing"


def add(state: State) -> str:
    state["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.ones(4)
    return "covers tensor 'model.layers.0.self_attn.rotary_emb.cos_cached'"


def another_layer(state: State) -> str:
    state["model.layers.7.self_attn.o_proj.weight"] = torch.ones(32, 32)
    return "covers tensor 'model.layers.7.self_attn.o_proj.weight'"


def widen(state: State) -> str:
    state["model.norm.weight"] = torch.ones(33)
    return r"'model.norm.weight' has shape \(33,\); the model needs \(32,\)"


def turn(state: State) -> str:
    name = at(state, "layers.1.self_attn.o_proj.weight")
    state[name] = torch.ones(5, *state[name].shape)
    return f"'{name}' has shape .*; the model needs"


@pytest.mark.parametrize("harm", [drop, add, another_layer, widen, turn])
@pytest.mark.parametrize("name", [name for name in FAMILIES.names() if family_named(name).stock])
def test_in_every_family_a_tensor_without_a_place_or_a_place_without_a_tensor(
    name: str, harm: Callable[[State], str]
) -> None:
    ours, state = ours_of(name, {"bias": {}} if family_named(name).zeros else {})
    expected = harm(state)
    with pytest.raises(ConvertError, match=expected) as error:
        load_hf(ours, state)
    one_line(error)


def test_rotary_frequencies_of_old_checkpoints_follow_from_the_config(caplog: pytest.LogCaptureFixture) -> None:
    """Llama 2 is published with them; transformers leaves them aside, too."""
    ours, state = ours_of("llama")
    caplog.set_level(logging.INFO, logger="moetrain")
    load_hf(ours, state | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)})
    assert "not imported: 3 tensors" in caplog.text


def experts(state: State) -> str:
    state.pop("model.layers.1.mlp.experts.down_proj")
    return "model.layers.1.mlp.experts.0.down_proj.weight.* is missing"


def one_expert(state: State) -> str:
    whole = state.pop("model.layers.1.mlp.experts.down_proj")
    state |= {f"model.layers.1.mlp.experts.{e}.down_proj.weight": w for e, w in enumerate(whole) if e != 3}
    return "model.layers.1.mlp.experts.3.down_proj.weight.* is missing"


def twice(state: State) -> str:
    state["model.layers.1.mlp.experts.3.down_proj.weight"] = state["model.layers.1.mlp.experts.down_proj"][3]
    return "holds our tensor 'layers.1.moe.experts.w2' twice"


@pytest.mark.parametrize("harm", [experts, one_expert, twice])
def test_experts_that_are_missing_or_there_twice(harm: Callable[[State], str]) -> None:
    ours, state = ours_of("qwen3_moe")
    expected = harm(state)
    with pytest.raises(ConvertError, match=expected) as error:
        load_hf(ours, state)
    one_line(error)


def test_a_selection_bias_needs_the_method_that_holds_it(caplog: pytest.LogCaptureFixture) -> None:
    ours, state = ours_of("deepseek_v3")
    with pytest.raises(ConvertError, match=r"mlp.gate.e_score_correction_bias' .*balance=\[bias\]"):
        load_hf(ours, state)
    zeroed = {key: torch.zeros_like(t) if key.endswith("correction_bias") else t for key, t in state.items()}
    caplog.set_level(logging.INFO, logger="moetrain")
    load_hf(ours, zeroed | {"model.layers.3.eh_proj.weight": torch.ones(2, 2)})  # multi-token prediction
    assert "not imported: 1 tensors that the model has no part for, from model.layers.3.eh_proj.weight" in caplog.text


def test_a_tied_head_that_differs_is_refused() -> None:
    ours, state = ours_of("mixtral-window-tied")
    head = state.pop("lm_head.weight")
    load_hf(ours, {"lm_head.weight": head} | state)  # first, as in a sorted file
    with pytest.raises(ConvertError, match=r"lm_head.weight.*tie_embeddings"):
        load_hf(ours, {"lm_head.weight": torch.ones(61, 32)} | state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.moe.shared_dim=64"], "model.moe.shared_dim=64"),
        (["model.moe.top_k=[1,2,2,2]"], "model.moe.top_k=[1, 2, 2, 2]"),
        (["model/router=sigmoid_topk", "model.family=qwen3_moe"], "model.router.score=sigmoid"),
        (["model.attention.sinks=true", "model.moe.every=2"], "model.attention.sinks=true"),
        (["model.family=mixtral"], "model.attention.qk_norm=head"),
        (["model.family=qwen3"], "model.moe.num_experts=8"),
        (["model.family=qwen3_moe", "model.moe.num_experts=0"], "model.moe.num_experts=0"),
        (["model.moe.num_experts=0", "model.attention.sinks=true"], "model.attention.sinks=true"),
        (["model.family=olmoe", "model.tie_embeddings=true"], "model.attention.qk_norm=head"),
    ],
)
def test_the_feature_that_no_class_has_is_named(settings: list[str], words: str) -> None:
    cfg = load(["model=tiny", *settings]).model
    if cfg.family == "auto":  # exported with code of its own
        assert family_of(cfg).name == "moetrain" and words in lacking_features(cfg)
        return
    with pytest.raises(ConvertError) as error:
        family_of(cfg)
    assert words in one_line(error)


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mixtral'"):
        family_of(load(["model=tiny", "model.family=mixtrall"]).model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not covered, only 'silu' or 'gelu_pytorch_tanh' or 'relu' is"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"model_type": "mixtrall"}, "did you mean 'mixtral'"),
        ({"num_hidden_layers": 0}, "n_layers cannot be 0"),
        ({"hidden_size": "wide"}, "transformers refuses the config of mixtral"),
        ({"model_type": "bert"}, "no model family is called 'bert'"),
        ({"model_type": "phimoe"}, "type phimoe are not covered: they need LayerNorm with biases"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types",
        ),
        ({"model_type": "longcat_flash"}, "need zero experts, and two attentions"),
    ],
)
def test_a_config_that_is_not_covered(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = make("mixtral").config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConvertError, ConfigError)) as error:
        read_hf_config(tmp_path)
    assert words in one_line(error)


def exported(cfg: ModelConfig, out: Path, **changes: Any) -> None:
    model = Decoder(cfg, changes.pop("balance", {}), ExpertsConfig())
    state = model.state_dict() | changes.pop("state", {})
    for name in changes.pop("without", []):
        del state[name]
    export_hf(cfg, state, out, **changes)


def test_exports_that_cannot_be_whole_leave_nothing(tmp_path: Path) -> None:
    cfg = load(["model=tiny"]).model
    cfg.vocab_size = 64
    for changes, words in (
        ({"without": ["layers.2.attention.wo.weight"]}, "'layers.2.attention.wo.weight' was not given"),
        ({"state": {"layers.0.extra.weight": torch.ones(2)}}, "covers our tensor 'layers.0.extra.weight'"),
        ({"tokenizer": train_bpe()}, "model.vocab_size=64"),
        ({"tokenizer": train_bpe(), "eos_token": "</nope>"}, "no token '</nope>'"),
    ):
        with pytest.raises(ConvertError) as error:
            exported(cfg, tmp_path / "out", **changes)
        assert words in one_line(error)
        assert list(tmp_path.iterdir()) == []
    exported(cfg, tmp_path / "out", balance={"bias": {}})  # a bias of zero changes nothing
    with pytest.raises(ConvertError, match="is not empty"):
        exported(cfg, tmp_path / "out")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    cfg = load(["model=tiny"]).model
    cfg.vocab_size = 64
    exported(cfg, tmp_path / "out")
    model = Decoder(cfg, {}, ExpertsConfig())
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConvertError, match=r"model.safetensors' is damaged"):
        load_hf(model, tmp_path / "out")
    with pytest.raises(ConvertError, match=r"no \*.safetensors"):
        load_hf(model, tmp_path)
    with pytest.raises(ConvertError, match=r"cannot read .*config.json"):
        read_hf_config(tmp_path / "nowhere")
