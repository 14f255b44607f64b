"""Loading a config: what is refused and in what words, what composes, and that a saved config comes back the same."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moetrain.config import Config, load, read, save, schema, to_dict
from moetrain.config import registry as registries
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.presets import Presets, expand_sweep
from moetrain.config.typed import fields_of, registry_of

REFUSED = [
    # misspelt keys, named with the nearest known one
    ("train.stepz=3", "train.stepz is not a setting; did you mean train.steps?"),
    ("steps=3", "steps is not a setting; did you mean train.steps?"),
    ("lr=0.1", "lr is not a setting; did you mean optim.lr?"),
    ("optim.learning_rate=0.1", "optim.learning_rate is not a setting"),
    ("optim.weight_decy=0.1", "did you mean optim.weight_decay?"),
    ("model.moe.num_expert=4", "did you mean model.moe.num_experts?"),
    ("data.sources.novels.wieght=1", "did you mean data.sources.novels.weight?"),
    ("balance.aux_los.coef=0.1", "balance.aux_los: no balance method is called 'aux_los'; did you mean 'aux_loss'?"),
    ("balance.aux_loss.coeff=0.1", "did you mean balance.aux_loss.coef?"),
    ("optim.kind=adamv", "optim.kind=adamv: no optimizer is called 'adamv'; did you mean 'adamw'?"),
    # misspelt presets
    ("model=mixtral-8x7", "no preset of model is called 'mixtral-8x7'; did you mean 'mixtral-8x7b'?"),
    ("experiment=dmo", "no preset of experiment is called 'dmo'; did you mean 'demo'?"),
    ("modle=tiny", "modle is not a setting; did you mean model?"),
    ("model/ruoter=softmax_topk", "no group of presets is called 'model/ruoter'; did you mean 'model/router'?"),
    ("balance=[aux_loss,zloss]", "no preset of balance is called 'zloss'; did you mean 'z_loss'?"),
    # values of the wrong type or size
    ("train.steps=abc", 'train.steps takes int >= 1; got "abc"'),
    ("train.steps=0", "train.steps takes int >= 1; got 0"),
    ("train.steps=1.5", "train.steps takes int >= 1; got 1.5"),
    ("train.steps=true", "train.steps takes int >= 1; got true"),
    ("train.compile=1", "train.compile takes true or false; got 1"),
    ("launch.env={A:1}", "launch.env.A takes text; got 1"),
    ("launch.kubernetes.rdma={rdma/ib:0}", "launch.kubernetes.rdma.rdma/ib takes int >= 1; got 0"),
    ("train=5", "train takes a group of settings; got 5"),
    ("train.steps.x=1", 'train.steps takes int >= 1; got {"x": 1}'),
    ("model.attention.kind=mha", 'model.attention.kind takes one of gqa, mla; got "mha"'),
    ("model.moe.num_experts=[8,8,x,8]", "model.moe.num_experts takes int or list of int"),
    ("data.sources.novels.paths=novels.txt", 'data.sources.novels.paths takes list of text; got "novels.txt"'),
    ("optim.lr=fast", 'optim.lr takes float > 0; got "fast"'),
    ("optim.lr=nan", "optim.lr takes float > 0; got NaN"),
    ("run_dir=2024", "run_dir takes text; got 2024; digits that are text need quotes"),
    ("optim=null", "optim takes the name of a preset"),
    ("model.router=softmax_topk", "choose a preset with model/router=NAME"),
    # words that cannot be read
    ("train.steps", "'train.steps' is not an override; write key=value"),
    ("=3", "'=3' is not an override"),
    ("train.steps=[1,", "cannot read 'train.steps=[1,'"),
    ("train.steps=1,2", "'train.steps=1,2' is a sweep over several values; add -m to run it"),
    ("~train.nothing", "~train.nothing: there is no such setting to remove"),
    ("run_dir=${model.nme}", "run_dir: Interpolation key 'model.nme' not found"),
    # rules between settings
    ("model.moe.top_k=9", "layer 0: model.moe.top_k=9 must be between 1 and num_experts=8"),
    ("model.moe.num_experts=[8,8]", "model.moe.num_experts has 2 numbers for model.n_layers=4 layers"),
    ("model.moe.capacity_factor=0", "model.moe.capacity_factor=0.0 must not be 0 or negative"),
    ("model.attention.n_kv_heads=4", "n_kv_heads=4 must divide n_heads=6; nearest legal: model.attention.n_kv_heads=3"),
    (
        "model.attention.num_experts=3",
        "num_experts=3 must divide n_kv_heads=2: heads count those of all experts; "
        "nearest legal: model.attention.num_experts=2",
    ),
    ("model.attention.num_experts=2 model.attention.shared_kv=true", "must divide n_heads=6 / n_kv_heads=2 = 3: heads"),
    ("model.attention.shared_kv=true", "shared_kv=true is for experts that share keys and values; set"),
    ("model.attention.num_experts=2 model.attention.qk_norm=full", "qk_norm=full is one norm over all heads"),
    ("model=tiny-deepseek model.attention.num_experts=2", "num_experts is for kind=gqa; with mla set "),
    ("model.parallel_block=true model.norm_place=post", "model.parallel_block=true needs model.norm_place=pre"),
    ("model.attention.kind=mla", "model.attention.kind=mla needs model.attention.kv_lora_rank"),
    ("model.rope.fraction=0.4", "head_dim=32 times model.rope.fraction=0.4 must be even"),
    ("model=tiny-deepseek model.rope.fraction=0.5", "model.rope.fraction is for kind=gqa"),
    ("model.rope.scaling=yarn", "model.rope.scaling=yarn needs model.rope.original_max_seq_len"),
    ("experts.fp8=true train.precision=float64", "experts.fp8=true: float64 has no FP8; set train.precision=bf16"),
    ("experts.fp8=true experts.backend=grouped_mm", "experts.backend=grouped_mm has no FP8; set experts.backend=auto"),
    ("experts.fp8=yes", "experts.fp8 takes true or false"),
    ("train.seq_len=65536", "train.seq_len=65536 is longer than model.max_seq_len=1024"),
    ("train.global_batch=7", "train.global_batch=7 must be a multiple of train.micro_batch=4"),
    ("model.vocab_size=100 data.tokenizer.path=null", "is larger than model.vocab_size=100"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[word for word, _ in REFUSED])
def test_wrong_settings_are_refused_in_one_line(words: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(words.split())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def preset_files() -> Iterator[tuple[str, str]]:
    for group, names in Presets.find().groups().items():
        for name in names:
            yield group, name


@pytest.mark.parametrize(("group", "name"), list(preset_files()))
def test_every_preset_loads(group: str, name: str) -> None:
    """Each file that ships passes the schema and all checks; an experiment also fits the ranks that it asks for."""
    # A router with groups of experts needs a model that has as many; DeepEP moves bfloat16 only.
    # A tokenizer that is trained here has the size that its data asks for.
    needs = {
        "sigmoid_group": ["model=deepseek-v3"],
        "deep_ep": ["train.precision=bf16"],
        "domains": ["model.vocab_size=8192"],
    }
    cfg = load([*needs.get(name, []), f"{group}={name}"])
    if group == "experiment":
        check_mapping(cfg, cfg.launch.ranks)
    if group == "model":
        assert cfg.model.name == name


def test_settings_reach_their_fields() -> None:
    cfg = load(["train.steps=1e3", "optim.lr=2e-4", "run_dir=/tmp/a b", "model.moe.top_k=[1,1,2,2]", "seed=7"])
    assert (cfg.train.steps, cfg.optim.lr, cfg.run_dir, cfg.seed) == (1000, 2e-4, "/tmp/a b", 7)
    assert isinstance(cfg.train.steps, int)
    assert [cfg.model.layer_value("top_k", layer) for layer in range(4)] == [1, 1, 2, 2]


def test_presets_of_lists_and_nested_groups() -> None:
    """Balance methods are a list of presets; a schedule keeps its integer steps; a method can be taken out."""
    cfg = load(["balance=[aux_loss,z_loss]", "balance.aux_loss.coef={0:0.1,100:0}"])
    assert set(cfg.balance) == {"aux_loss", "z_loss"}
    assert cfg.balance["aux_loss"].coef == {0: 0.1, 100: 0.0}
    assert load(["balance=[]"]).balance == {}
    assert set(load(["balance=[aux_loss,z_loss]", "~balance.z_loss"]).balance) == {"aux_loss"}


def test_interpolations_are_resolved() -> None:
    cfg = load(["model.name=mine", "data.name=books"])
    assert cfg.run_dir == "runs/mine"
    assert cfg.data.dir == "prepared/books"


def test_every_registered_kind_has_described_options() -> None:
    """What --help promises: each option of each kind, and each field of the schema, has a default and a description."""
    kinds = [registries.ROUTERS, registries.BALANCE, registries.DISPATCHERS, registries.OPTIMIZERS, registries.MIXERS]
    groups = [value for value in vars(schema).values() if hasattr(value, "__pydantic_fields__")]
    for cls in [kind.get(name).options for kind in kinds for name in kind.names()] + groups:
        assert cls.__doc__
        for name, field in fields_of(cls).items():
            assert field.description, f"{cls.__name__}.{name} has no description"
            assert not field.is_required(), f"{cls.__name__}.{name} has no default"


def test_a_saved_config_comes_back_the_same(tmp_path: Path) -> None:
    """YAML round trip of a config with schedules, lists and every registry; text edited by hand stays readable."""
    words = ["balance=[aux_loss,bias]", "balance.aux_loss.coef={0:1e-2,50:1e-3}", "model.moe.num_experts=[8,8,4,8]"]
    cfg = load([*words, "optim=muon", "optim.lr=1e-5", "data.sources.x.paths=['a b.txt']"])
    save(cfg, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == cfg
    plain = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert plain.pop("config_version") == 1
    assert plain == to_dict(cfg)
    assert (plain["optim"]["kind"], plain["run_dir"]) == ("muon", "runs/tiny")
    assert load(["train.steps=5"], base=tmp_path / "config.yaml") == dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, steps=5)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("a: [1, ", "is not a config"),
        ("- 1\n- 2\n", "is not a saved config"),
        ("seed: 1\n", "has no config_version"),
        ("config_version: 99\nseed: 1\n", "has config_version 99"),
        ("config_version: 1\nsede: 1\n", "did you mean seed?"),
        ("\x00\xff", "config"),
    ],
)
def test_a_file_that_is_no_saved_config_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read(tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["${SLURM_TMPDIR}/a", "a${x}b$y", "\\${x}", "\\\\${x}\\"])
def test_text_that_looks_like_an_interpolation_comes_back_from_a_saved_config(tmp_path: Path, text: str) -> None:
    """Lines of a shell have braces; in a word they are escaped, and the run starts from the saved config."""
    cfg = load([])
    cfg.launch.setup = [text]
    cfg.launch.env = {"A": text}
    save(cfg, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == cfg
    word = "launch.setup=['\\${SLURM_TMPDIR}/a']"
    assert load([word], base=tmp_path / "config.yaml").launch.setup == ["${SLURM_TMPDIR}/a"]


def test_presets_cannot_be_chosen_over_a_saved_config(tmp_path: Path) -> None:
    save(load([]), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="chooses a preset"):
        load(["model=tiny"], base=tmp_path / "config.yaml")


def test_presets_of_the_user(tmp_path: Path) -> None:
    """A folder given with --config-dir holds more presets, laid out like configs/; its name may be any."""
    for name in (".", "it's über, (a)=[b]"):
        (tmp_path / name / "experiment").mkdir(parents=True)
        (tmp_path / name / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 77\n")
        assert load(["experiment=mine"], config_dirs=[tmp_path / name]).train.steps == 77
    with pytest.raises(ConfigError, match="no preset of experiment is called 'mine'"):
        load(["experiment=mine"])
    with pytest.raises(ConfigError, match="is not a folder"):
        load([], config_dirs=[tmp_path / "nowhere"])


def test_sweeps_expand_by_hydras_grammar() -> None:
    """Every combination, the last key fastest; brute force by hand."""
    got = list(expand_sweep(["seed=0", "optim.lr=0.001,0.002", "train.steps=range(1,4)"]))
    assert got == [["seed=0", f"optim.lr={lr}", f"train.steps={n}"] for lr in ("0.001", "0.002") for n in (1, 2, 3)]
    tiny = [words[0] for words in expand_sweep(["model=glob(tiny*)"])]
    assert "model=tiny" in tiny and all(word.startswith("model=tiny") for word in tiny)


def test_sizes_are_checked_before_torch_is_imported() -> None:
    """A mapping that cannot run is refused without the seconds that importing torch takes."""
    code = """
import sys
from moetrain.config import load
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
try:
    load(["parallel.ep=3"], check=lambda cfg: check_mapping(cfg, 4))
except ConfigError as error:
    print(error)
print("torch" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "ep 3 x etp 1 = 3 must divide the world size 4" in done.stdout
    assert done.stdout.endswith("False\n")


def test_kind_fields_hold_options_after_loading() -> None:
    cfg = load([])
    assert registry_of(fields_of(Config)["optim"]) is registries.OPTIMIZERS
    assert registries.OPTIMIZERS.entry_of(cfg.optim).name == "adamw"
    assert registries.ROUTERS.entry_of(cfg.model.router).name == to_dict(cfg)["model"]["router"]["kind"]
