"""Models that no class of transformers has: the export carries its own, and transformers computes the same with it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain.checkpoint.weights import Spec
from moetrain.config import load
from moetrain.config.errors import ConvertError
from moetrain.config.schema import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RopeConfig
from moetrain.convert.export import export_hf
from moetrain.convert.family import family_of, lacking_features
from moetrain.convert.features import features
from moetrain.convert.load import load_hf, read_hf_config
from moetrain.convert.remote import modeling_moetrain
from moetrain.convert.source import InOrder
from moetrain.model.decoder import Decoder
from moetrain.moe.routers.topk import TopKOptions
from tests.convert.test_round_trip import tensors_in, train_bpe

YARN = ["model.rope.scaling=yarn", "model.rope.factor=4", "model.rope.original_max_seq_len=16"]
LLAMA3 = ["model.rope.scaling=llama3", "model.rope.factor=4", "model.rope.original_max_seq_len=16"]
SMALL = ["model.vocab_size=320", "model.dim=32", "model.n_layers=4", "model.family=auto"]
# settings -> a feature that no class has, as it is named
MODELS: dict[str, tuple[list[str], str]] = {
    "shared, by layer": (
        ["model=tiny", "model.moe.shared_dim=24", "model.moe.top_k=[1,2,3,2]", "model.moe.expert_dim=[16,8,16,24]",
         "model.attention.qk_norm=full", "model.attention.clip_qkv=0.5", "model.tie_embeddings=true", *LLAMA3],
        "model.moe.top_k=[1, 2, 3, 2]",
    ),
    "latent, softmax in groups": (
        ["model=tiny-deepseek", "model.router.score=softmax", "model.router.group_score=max", "model.rope.mscale=1.0",
         "model.rope.mscale_all_dim=0.7", "model.attention.sliding_window=5", *YARN],
        "model.router.score=softmax",
    ),
    "clamped experts, sinks": (
        ["model=tiny-gpt-oss", "model.attention.qk_norm=head", "model.rope.interleaved=true", "model.moe.every=2",
         "model.dense_dim=40", "model.activation=swiglu_clamped", "model.attention.sliding_layers=[1]", *YARN,
         "model.rope.truncate=false", "model.rope.beta_slow=4"],
        "model.rope.interleaved=true",
    ),
    "sigmoid, gated shared": (
        ["model=tiny", "model/router=sigmoid_topk", "model.moe.shared_dim=24", "model.moe.shared_gate=true",
         "model.moe.first_dense=1", "model.attention.qkv_bias=true", "model.rope.scaling=linear",
         "model.rope.factor=2", "model.router.scale=1.7", "model.activation=geglu", "model.moe.activation=reglu"],
        "model.moe.shared_dim=24",
    ),
    "ternary experts": (
        ["model=tiny", "model.moe.ternary=true", "model.moe.shared_dim=24", "model.moe.bias=true",
         "model.router.renormalize=false", "model.moe.top_k=1"],
        "model.moe.ternary=true",
    ),
    "norms after, heads rotated in part, factors": (
        ["model=tiny", "model.moe.first_dense=1", "model.norm_place=post", "model.rope.fraction=0.5",
         "model.attention.scale=0.3", "model.embedding_multiplier=3", "model.residual_multiplier=0.4",
         "model.logits_divisor=2", "model.router.min_sum=0.9", "model.rope.interleaved=true",
         "model.norm_offset=0.5", "model.activation=gelu", "model.moe.activation=relu2"],
        "model.norm_place=post",
    ),
    "attention experts": (
        ["model=tiny", "model.attention.num_experts=2", "model.attention.qkv_bias=true", "model.attention.sinks=true",
         "model.attention.out_bias=true", "model.attention.sliding_window=5"],
        "model.attention.num_experts=2",
    ),
    "attention experts with shared keys in parallel blocks": (
        ["model=tiny", "model.attention.num_experts=3", "model.attention.shared_kv=true", "model.parallel_block=true",
         "model.moe.first_dense=1", "model.residual_multiplier=0.4"],
        "model.parallel_block=true",
    ),
}  # fmt: skip


def random_model(settings: list[str]) -> Decoder:
    cfg = load([*settings, *SMALL])
    torch.manual_seed(0)
    model = Decoder(cfg.model, {"bias": {}} if cfg.model.attention.kind == "mla" else {}, ExpertsConfig()).eval()
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, feature = MODELS[name]
    ours = random_model(settings)
    caplog.set_level(logging.WARNING, logger="moetrain")
    assert export_hf(ours.cfg, ours.state_dict(), tmp_path / "out", train_bpe()) == "moetrain"
    assert "no class of transformers has this model" in caplog.text and feature in caplog.text

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(theirs).__name__ == "MoetrainForCausalLM"
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(3))
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    logits, _ = ours(ids)
    loss = ours(ids, targets)[0] / 46
    result = theirs(ids, labels=ids)
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-4)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    result.loss.backward()
    for key, p in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(key).grad, p.grad, rtol=1e-3, atol=1e-5)


def test_a_selection_bias_that_no_class_has_goes_into_the_module(tmp_path: Path) -> None:
    cfg = load(["model=tiny", *SMALL]).model
    assert family_of(cfg).name == "qwen3_moe" and family_of(cfg, has_bias=True).name == "moetrain"
    with pytest.raises(ConvertError, match=r"qwen3_moe has no balance=\[bias\]; try model.family=auto"):
        family_of(replace(cfg, family="qwen3_moe"), has_bias=True)
    ours = Decoder(cfg, {"bias": {}}, ExpertsConfig()).eval()
    state = ours.state_dict()
    assert export_hf(cfg, state, tmp_path / "zero") == "qwen3_moe"
    torch.manual_seed(0)
    for t in state.values():
        t.normal_(0.0, 0.2)
    in_order = InOrder({name: Spec.of(t) for name, t in state.items()}, state.items())
    for i, source in enumerate((state, in_order)):
        assert export_hf(cfg, source, tmp_path / str(i)) == "moetrain"
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(i), trust_remote_code=True).eval()
        ids = torch.arange(24)[None]
        torch.testing.assert_close(theirs(ids).logits, ours(ids)[0], rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_part_of_a_step(tmp_path: Path) -> None:
    """transformers' Trainer leaves dividing by the labels of all micro-batches to a model that takes any keyword."""
    ours = random_model(MODELS["sigmoid, gated shared"][0])
    export_hf(ours.cfg, ours.state_dict(), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ids = torch.randint(0, 320, (4, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        parts = [theirs(part, labels=part, num_items_in_batch=44).loss.item() for part in ids.split(1)]
        assert sum(parts) == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-5)


def test_what_fine_tuning_asks_of_a_model(tmp_path: Path) -> None:
    """Embeddings as input, hidden states, gradient checkpointing that changes nothing, and room for more tokens, which
    is still there when it is saved and loaded by transformers, and here."""
    for name, settings in (("own", ["model.tie_embeddings=false"]), ("tied", ["model.tie_embeddings=true"])):
        ours = random_model([*MODELS["sigmoid, gated shared"][0], "model.embedding_multiplier=3", *settings])
        export_hf(ours.cfg, ours.state_dict(), tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, trust_remote_code=True, attn_implementation="sdpa"
        ).train()
        ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(3))
        plain = model(ids, labels=ids, output_hidden_states=True)
        plain.loss.backward()
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, plain.logits)
        assert plain.hidden_states[0].shape == plain.hidden_states[-1].shape and len(plain.hidden_states) == 5
        torch.testing.assert_close(F.linear(plain.hidden_states[-1], (model.head or model.embed).weight), plain.logits)
        assert model(ids).hidden_states is None
        loss, logits = model(ids, labels=ids, return_dict=False)
        assert torch.equal(loss, plain.loss) and torch.equal(logits, plain.logits)

        expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        calls: list[int] = []
        model.layers[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 2  # once more in backward
        for key, grad in expected.items():
            torch.testing.assert_close(model.get_parameter(key).grad, grad)

        model.eval().resize_token_embeddings(330)
        model.save_pretrained(tmp_path / "resized")
        logits = model(ids).logits
        assert logits.shape[-1] == 330
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "resized", trust_remote_code=True).eval()
        torch.testing.assert_close(again(ids).logits, logits)
        back = Decoder(read_hf_config(tmp_path / "resized"), {}, ExpertsConfig()).eval()
        load_hf(back, tmp_path / "resized")
        torch.testing.assert_close(back(ids)[0], logits, rtol=1e-4, atol=1e-4)


def test_routers_compute_in_float32_under_autocast(tmp_path: Path) -> None:
    """As with the Trainer's ``bf16=True``: rounded scores would choose other experts than training did."""
    ours = random_model(MODELS["sigmoid, gated shared"][0])
    export_hf(ours.cfg, ours.state_dict(), tmp_path / "out")
    router = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).layers[1].moe.router
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    expected = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        weights_TK, ids_TK = router(x_TD)
    assert torch.equal(ids_TK, expected[1]) and torch.equal(weights_TK, expected[0])


def test_layers_may_be_on_several_devices(tmp_path: Path) -> None:
    """As ``device_map`` puts them, where hooks move the tensors that modules are called with, and nothing else."""
    ours = random_model(["model=tiny", "model.moe.num_experts=0", "model.dense_dim=40", "model.attention.sinks=true"])
    export_hf(ours.cfg, ours.state_dict(), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for module in (*theirs.layers[2:], theirs.norm, theirs.head):
        module.to("meta")
        module.register_forward_pre_hook(
            lambda _, args: tuple(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args)
        )
    labels = torch.arange(8)[None]
    assert theirs(labels, labels=labels).logits.device.type == "meta"


def test_no_setting_of_a_model_is_unknown_to_the_module_or_to_the_comparison_of_classes() -> None:
    """A setting that either leaves out would change what the model computes, and nobody would be told."""
    settings = {"": ModelConfig, "attention.": AttentionConfig, "rope.": RopeConfig, "moe.": MoEConfig}
    paths = [prefix + f.name for prefix, kind in settings.items() for f in fields(kind)]
    paths += [f"router.{f.name}" for f in fields(TopKOptions)]
    # names, groups, and what acts in training or in the choice of a kernel alone
    aside = {"name", "family", "max_seq_len", "init_std", "attention", "rope", "moe", "router", "attention.backend"}
    aside |= {"moe.capacity_factor", "moe.drop_policy", "router.force_balance"}
    source = Path(modeling_moetrain.__file__).read_text(encoding="utf-8")
    assert [path for path in paths if path not in aside and f'"{path.rpartition(".")[2]}"' not in source] == []

    known: set[str] = set()
    for name in ("tiny", "tiny-deepseek", "tiny-gpt-oss", "tiny-qwen2"):
        for scaling in ("none", "linear", "llama3", "yarn"):
            model = load([f"model={name}", "model.moe.first_dense=1"]).model
            model.rope.scaling = scaling  # type: ignore[assignment]
            known |= features(model).keys()
    # in terms of others: which layers have experts, and how far each attends
    known |= {"moe.first_dense", "moe.every", "attention.sliding_layers", "router.topk_groups", "router.group_score"}
    assert [path for path in paths if path not in aside and path not in known] == []


@pytest.mark.parametrize("name", MODELS)
def test_it_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    ours = random_model(MODELS[name][0])
    balance = {"bias": {}} if ours.cfg.attention.kind == "mla" else {}
    export_hf(ours.cfg, ours.state_dict(), tmp_path / "out", dtype=torch.bfloat16)
    cfg = read_hf_config(tmp_path / "out")
    again = Decoder(cfg, balance, ExpertsConfig())
    load_hf(again, tmp_path / "out")
    for key, t in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], t if key.endswith("bias_E") else t.bfloat16().float()), key
    export_hf(cfg, again.state_dict(), tmp_path / "again", dtype=torch.bfloat16)
    before, after = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(after[key], t) for key, t in before.items())
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    kept = [p.dtype for key, p in half.named_parameters() if key.endswith("selection_bias")]
    assert set(kept) <= {torch.float32} and half(torch.arange(8)[None]).logits.dtype == torch.bfloat16


def test_it_stands_on_its_own(tmp_path: Path) -> None:
    """In a process that cannot import moetrain: it loads, generates, and padding on the left changes nothing."""
    ours = random_model(MODELS["sigmoid, gated shared"][0])
    export_hf(ours.cfg, ours.state_dict(), tmp_path / "out", train_bpe())
    code = f"""
import sys, json, torch
sys.modules["moetrain"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "out")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(5, 12)[None]
padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
mask = (torch.arange(10) > 2).long()[None]
plain, pad = model(ids).logits, model(padded, attention_mask=mask).logits[:, 3:]
out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(json.dumps([float((plain - pad).abs().max()), out[0].tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    difference, generated = json.loads(done.stdout.splitlines()[-1])
    assert difference < 1e-4
    ids = list(range(5, 12))
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(ours(torch.tensor([ids]))[0][0, -1].argmax()))
    assert generated == ids[: len(generated)] and len(generated) > 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the text")["input_ids"]


def test_it_can_be_asked_for_and_has_to_be_whole(tmp_path: Path) -> None:
    cfg = load(["model=tiny", "model.family=moetrain"]).model
    assert family_of(cfg).name == "moetrain"
    assert lacking_features(cfg) == "model.family=moetrain, though qwen3_moe of transformers computes the same"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moetrain"}))
    with pytest.raises(ConvertError, match="no entry 'moetrain'"):
        read_hf_config(tmp_path)
