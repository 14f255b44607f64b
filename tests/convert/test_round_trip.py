"""transformers -> moetrain -> transformers gives back every tensor bit for bit, as a checkpoint that runs there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain.config import load
from moetrain.config.registry import FAMILIES
from moetrain.config.schema import ExpertsConfig
from moetrain.convert.export import export_hf
from moetrain.convert.family import family_named, family_of
from moetrain.convert.load import load_hf, read_hf_config
from moetrain.convert.open import open_weights
from moetrain.model.decoder import Decoder
from moetrain.moe.balance import end_of_step
from tests.model.hf_models import MODELS, make, tokens


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make(name).to(dtype)
    theirs.save_pretrained(tmp_path / "in")
    cfg = read_hf_config(tmp_path / "in")
    has_bias = bool(family_named(cfg.family).zeros)
    balance = {"bias": {}, "aux_loss": {"scope": "step"}} if has_bias else {"aux_loss": {}}
    ours = Decoder(cfg, balance, ExpertsConfig())  # float32: holds bfloat16 exactly
    load_hf(ours, tmp_path / "in")
    from_memory = Decoder(cfg, balance, ExpertsConfig())
    load_hf(from_memory, theirs.state_dict())  # the other layout of the experts
    assert all(torch.equal(t, ours.state_dict()[fqn]) for fqn, t in from_memory.state_dict().items())
    assert export_hf(cfg, ours.state_dict(), tmp_path / "out", dtype=dtype, max_shard_bytes=40_000) == cfg.family

    before, after = tensors_in(tmp_path / "in"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        # transformers reads a selection bias as float32 always, so it is written so
        same_dtype = before[key].dtype if "e_score_correction_bias" not in key else torch.float32
        assert after[key].dtype == same_dtype and torch.equal(after[key], before[key].to(same_dtype)), key
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == after.keys()
    for file in set(index.values()):
        held = load_file(tmp_path / "out" / file).values()
        assert len(held) == 1 or sum(t.nbytes for t in held) <= 40_000

    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("in", "out"))
    with torch.no_grad():
        # the same weights, but not at the same addresses, which the last bits of a CPU product can depend on
        torch.testing.assert_close(again(tokens()).logits, first(tokens()).logits, rtol=1e-5, atol=1e-5)


STOCK = [name for name in FAMILIES.names() if family_named(name).stock]
MOE = [name for name in STOCK if not family_named(name).is_dense()]
BIASED = [name for name in MOE if family_named(name).zeros]


def test_a_shared_expert_of_no_width_is_there_and_comes_back(tmp_path: Path) -> None:
    """As Qwen2-MoE has it where there is none: what Qwen2 is upcycled to."""
    cfg = load(["model=tiny-qwen2", "model.moe.shared_dim=0", "model.vocab_size=61"]).model
    ours = Decoder(cfg, {}, ExpertsConfig()).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    assert export_hf(cfg, ours.state_dict(), tmp_path / "out") == "qwen2_moe"
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens())[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        theirs.model.layers[-1].mlp.shared_expert_gate.weight.fill_(1.0)  # it weighs nothing
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        back = open_weights(tmp_path / folder)
        assert all(torch.equal(back.source.read(key), t) for key, t in ours.state_dict().items())


@pytest.mark.parametrize(("name", "has_bias"), [(name, False) for name in MOE] + [(name, True) for name in BIASED])
def test_transformers_reads_the_other_layout_of_the_experts_too(name: str, has_bias: bool, tmp_path: Path) -> None:
    """Fused, as its models hold them in memory; a bias for choosing experts that we have none of is zero there."""
    theirs = make(name)
    cfg = family_named(name).from_hf_config(theirs.config.to_dict())
    state = theirs.state_dict()
    if not has_bias:
        state = {key: torch.zeros_like(t) if "e_score_correction_bias" in key else t for key, t in state.items()}
    ours = Decoder(cfg, {"bias": {}} if has_bias else {}, ExpertsConfig())
    load_hf(ours, state)
    export_hf(cfg, ours.state_dict(), tmp_path / "out", layout="fused")
    assert tensors_in(tmp_path / "out").keys() == state.keys() - ({"lm_head.weight"} if cfg.tie_embeddings else set())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(t, state[key]) for key, t in again.state_dict().items())
    back = open_weights(tmp_path / "out")
    assert back.has_bias == has_bias
    assert all(torch.equal(back.source.read(key), t) for key, t in ours.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_from_their_weights_and_back_give_the_same_loss(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "in")
    cfg = read_hf_config(tmp_path / "in")
    ours = Decoder(cfg, {"bias": {"rate": 0.1}} if family_named(cfg.family).zeros else {}, ExpertsConfig())
    load_hf(ours, tmp_path / "in")
    ids, optimizer, losses = tokens(), torch.optim.AdamW(ours.parameters(), lr=3e-3), []
    targets = torch.cat((ids[:, 1:], torch.full((len(ids), 1), -100)), 1)
    for step in range(11):
        optimizer.zero_grad()
        loss = ours(ids, targets, step=step)[0] / (targets >= 0).sum()
        losses.append(loss.item())
        if step < 10:
            loss.backward()
            optimizer.step()
            end_of_step(ours, None, step)
    assert losses[-1] < losses[0] - 0.3
    export_hf(cfg, ours.state_dict(), tmp_path / "out")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids, labels=ids).loss.item()
    assert theirs == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("tiny", "qwen3_moe"),
        ("tiny-deepseek", "deepseek_v3"),
        ("tiny-gpt-oss", "gpt_oss"),
        ("tiny-qwen2", "qwen2_moe"),
        ("mixtral-8x7b", "mixtral"),
        ("olmoe-1b-7b", "olmoe"),
        ("deepseek-v3", "deepseek_v3"),
        ("gpt-oss-120b", "gpt_oss"),
    ],
)
def test_auto_finds_the_class_with_the_features_of_the_model(preset: str, family: str) -> None:
    cfg = load([f"model={preset}", "model.family=auto"]).model
    assert family_of(cfg).name == family


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        (["qk_norm=head"], "qwen3"),
        ([], "llama"),
        (["sliding_window=8"], "mistral"),
        (["sliding_window=8", "sliding_layers=[1]", "qkv_bias=true"], "qwen2"),
    ],
)
def test_auto_finds_a_dense_class_for_a_model_without_experts(settings: list[str], family: str) -> None:
    attention = [f"model.attention.{setting}" for setting in ["qk_norm=none", *settings]]
    assert family_of(load(["model=tiny", "model.moe.num_experts=0", *attention]).model).name == family


@pytest.mark.parametrize("name", MODELS)
def test_auto_finds_the_class_that_a_model_came_from(name: str) -> None:
    family = MODELS[name][0]
    cfg = family_named(family).from_hf_config(make(name).config.to_dict())
    cfg.family = "auto"
    assert family_of(cfg).name == (
        "llama" if name == "mistral-full-reglu" else family
    )  # without a window they are the same


def train_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the model reads the text, and the text is real"] * 3, trainer=trainer)
    return tokenizer


FULL = "tiny-gpt-oss model.attention.sliding_window=null model.attention.sliding_layers=null"


@pytest.mark.parametrize("settings", ["tiny", "tiny-deepseek", "tiny-gpt-oss", FULL, "tiny-qwen2"])
def test_an_exported_run_gives_the_same_loss_in_transformers(settings: str, tmp_path: Path) -> None:
    cfg = load(f"model={settings}".split()).model
    cfg.vocab_size, cfg.n_layers = 320, 2
    if cfg.attention.sliding_layers:
        cfg.attention.sliding_layers = [0]
    torch.manual_seed(0)
    ours = Decoder(cfg, {"aux_loss": {}}, ExpertsConfig())
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.1)
    tokenizer = train_bpe()
    assert export_hf(cfg, ours.state_dict(), tmp_path / "export", tokenizer) != "moetrain"

    text = "the text is real — and ünïcode"
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = torch.tensor([their_tokenizer(text)["input_ids"]])
    assert ids[0].tolist() == tokenizer.encode(text).ids
    assert their_tokenizer.decode(ids[0]) == text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.config.eos_token_id == their_tokenizer.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
        targets = torch.cat((ids[:, 1:], torch.tensor([[-100]])), 1)
        mean = ours(ids, targets)[0].item() / (ids.numel() - 1)
    assert mean == pytest.approx(loss, rel=1e-5)
