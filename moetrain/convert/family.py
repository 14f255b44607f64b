"""What all Hugging Face families share, and which of them fits a model.

A family is tables: which key of config.json is which of our settings, which values its class fixes, which tensor is
which of ours. A new family is one new file in ``families/``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from moetrain.config.errors import ConvertError
from moetrain.config.registry import FAMILIES, ROUTERS
from moetrain.config.schema import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moetrain.convert.features import differences
from moetrain.convert.layout import Rule, rule
from moetrain.convert.rope import rope_from_hf, rope_to_hf
from moetrain.moe.options import as_options

# our setting -> their key, in every family
COMMON = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "attention.n_heads": "num_attention_heads",
    "moe.top_k": "num_experts_per_tok",
}

# their keys that may have one value only, in every family
ALWAYS: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0}

# our tensor -> theirs, in every family
TRUNK = (
    rule("embed.weight", "model.embed_tokens.weight"),
    rule("norm.weight", "model.norm.weight"),
    rule("head.weight", "lm_head.weight"),
    rule("layers.{l}.attention_norm.weight", "model.layers.{l}.input_layernorm.weight"),
    rule("layers.{l}.mlp_norm.weight", "model.layers.{l}.post_attention_layernorm.weight"),
    rule("layers.{l}.attention.wo.weight", "model.layers.{l}.self_attn.o_proj.weight"),
)

GQA = (
    *(
        rule(f"layers.{{l}}.attention.w{p}.{kind}", f"model.layers.{{l}}.self_attn.{p}_proj.{kind}")
        for p in "qkv"
        for kind in ("weight", "bias")
    ),
    rule("layers.{l}.attention.wo.bias", "model.layers.{l}.self_attn.o_proj.bias"),
    rule("layers.{l}.attention.q_norm.weight", "model.layers.{l}.self_attn.q_norm.weight"),
    rule("layers.{l}.attention.k_norm.weight", "model.layers.{l}.self_attn.k_norm.weight"),
)

DENSE = tuple(
    rule(f"layers.{{l}}.mlp.w_{p}.weight", f"model.layers.{{l}}.mlp.{p}_proj.weight") for p in ("gate", "up", "down")
)

_EXPERT = "model.layers.{l}.mlp.experts.{e}."
EXPERTS = (
    rule("layers.{l}.moe.router.weight", "model.layers.{l}.mlp.gate.weight"),
    rule("layers.{l}.moe.experts.w13", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    rule("layers.{l}.moe.experts.w2", _EXPERT + "down_proj.weight"),
)

# transformers keeps the experts of a layer in two tensors in memory; ``state_dict()`` of its models has these names
FUSED = (
    rule("layers.{l}.moe.router.weight", "model.layers.{l}.mlp.gate.weight"),
    rule("layers.{l}.moe.experts.w13", "model.layers.{l}.mlp.experts.gate_up_proj", rearrange="e p f d -> e (p f) d"),
    rule("layers.{l}.moe.experts.w2", "model.layers.{l}.mlp.experts.down_proj"),
)


class Family:
    """One model class of transformers. Subclasses fill the tables; ``read`` and ``write`` do what tables cannot.

    name: ``model_type``. fields: our setting -> their key, beside COMMON. implied: our settings that the class fixes.
    fixed: their keys with the only value that is covered. rules: our tensors as ``save_pretrained`` writes them.
    in_memory: the same tensors as ``state_dict()`` names them, where that differs.
    zeros: tensors of theirs, (E,) in each MoE layer, that must exist: zeros where we have none.
    ignored: their tensors that we have no use for (regular expressions); logged when met.
    stock: whether the class is one of transformers' own. files: what an export carries, where it is not.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    fields: ClassVar[dict[str, str]] = {}
    implied: ClassVar[dict[str, Any]] = {}
    fixed: ClassVar[dict[str, Any]] = {}
    rules: ClassVar[tuple[Rule, ...]] = ()
    in_memory: ClassVar[tuple[Rule, ...]] = ()
    zeros: ClassVar[tuple[Rule, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()
    stock: ClassVar[bool] = True
    files: ClassVar[tuple[Path, ...]] = ()

    def from_hf_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Our config of their config.json. Raises ConvertError naming a setting that has no counterpart here."""
        hf = complete(self.name, config)
        for key, value in (ALWAYS | self.fixed).items():
            if hf.get(key, value) != value:
                raise ConvertError(f"config.json of {self.name}: {key}={hf[key]!r} is not covered, only {value!r} is")
        flat: dict[str, Any] = dict(self.implied)
        for ours, theirs in (COMMON | self.fields).items():
            if theirs not in hf and theirs != "head_dim":  # may be left to the rule below
                raise ConvertError(f"config.json of {self.name} has no {theirs}")
            flat[ours] = hf.get(theirs)
        flat |= rope_from_hf(hf) | self.read(hf)
        if not flat.get("attention.head_dim"):
            flat["attention.head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
        return build_config(flat | {"family": self.name, "name": str(config.get("_name_or_path") or self.name)})

    def to_hf_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """Their config.json of ``cfg``, as near as the class comes; see ``refusals``."""
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        hf |= ALWAYS | self.fixed | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        hf |= {theirs: value_of(cfg, ours) for ours, theirs in (COMMON | self.fields).items()}
        hf["rope_parameters"] = rope_to_hf(cfg.rope)
        return hf | self.write(cfg)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Our settings that need more than a key's value."""
        return {}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """Their keys that need more than a setting's value."""
        return {}

    def refusals(self, cfg: ModelConfig) -> list[str]:
        """The features of ``cfg`` that this class lacks, as "model.path=value"; none if it computes the same."""
        try:
            return differences(cfg, self.from_hf_config(self.to_hf_config(cfg)))
        except ConvertError as error:
            return [str(error)]


F = TypeVar("F", bound=type[Family])


def register(family: F) -> F:
    """Class decorator: make a Family known under its name. Families have no settings, so it is its own options."""
    FAMILIES.register(family.name, family)(family)
    return family


def family_named(name: str) -> Family:
    """The family called ``name`` (``model_type`` of config.json). Raises ConfigError with the nearest known one."""
    return FAMILIES.get(name).build()


def family_of(cfg: ModelConfig) -> Family:
    """The family that ``cfg`` is exported as: ``cfg.family``, or for ``auto`` the first whose class computes the same;
    where none of transformers' does, one that carries its own code.

    Raises ConvertError that names the features which the chosen class does not have, or none.
    """
    if cfg.family != "auto":
        family = family_named(cfg.family)
        lacking = family.refusals(cfg)
        if lacking:
            raise ConvertError(f"model.family={cfg.family} has no {', '.join(lacking)}; try model.family=auto")
        return family
    families = list(map(family_named, FAMILIES.names()))
    tried = [(family.refusals(cfg), family) for family in families if family.stock]
    lacking, family = min(tried, key=lambda entry: len(entry[0]))
    if not lacking:
        return family
    own = next((family for family in families if not family.stock and not family.refusals(cfg)), None)
    if own is None:
        raise ConvertError(
            f"no Hugging Face class has this model; the nearest, {family.name}, lacks {', '.join(lacking)}"
        )
    return own


def lacking_features(cfg: ModelConfig) -> str:
    """Which features of ``cfg`` the class of transformers that comes nearest lacks, in words for a log line."""
    stock = [family for family in map(family_named, FAMILIES.names()) if family.stock]
    lacking, family = min(((family.refusals(cfg), family) for family in stock), key=lambda entry: len(entry[0]))
    return f"the nearest, {family.name}, lacks {', '.join(lacking)}" if lacking else f"but {family.name} has it"


def complete(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the defaults of transformers' config class, and rotary settings in its newest form."""
    from transformers import AutoConfig

    known = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "model_type"}
    try:
        full = AutoConfig.for_model(model_type, **known)
    except Exception as error:  # its classes raise many kinds, over many lines
        why = " ".join(str(error).split())
        raise ConvertError(f"transformers refuses the config of {model_type}: {why[:200]}") from None
    hf = full.to_dict()
    # a class may keep a setting under another name than checkpoints do
    return hf | {alias: hf[name] for alias, name in full.attribute_map.items() if name in hf}


def value_of(cfg: ModelConfig, path: str) -> Any:
    """The setting at ``path``; a number of the MoE layers is that of the first, of which ``refusals`` sees the rest."""
    group, _, name = path.rpartition(".")
    if group == "router":
        return getattr(as_options(ROUTERS, cfg.router), name, None)
    if group == "moe":
        layers = cfg.moe_layers()
        return cfg.layer_value(name, layers[0] if layers else 0)
    return getattr(getattr(cfg, group) if group else cfg, name)


def build_config(flat: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig of "path" -> value. Raises ConvertError for a value that no model can have."""
    groups: dict[str, dict[str, Any]] = {"": {}, "attention": {}, "rope": {}, "moe": {}, "router": {}}
    for path, value in flat.items():
        group, _, name = path.rpartition(".")
        groups[group][name] = value
    try:
        return ModelConfig(
            **groups[""],
            attention=AttentionConfig(**groups["attention"]),
            rope=RopeConfig(**groups["rope"]),
            moe=MoEConfig(**groups["moe"]),
            router=as_options(ROUTERS, {"kind": "topk", **groups["router"]}),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConvertError(f"config.json: our {where} cannot be {first['input']!r}: {first['msg']}") from None


def layers_from_qwen(hf: Mapping[str, Any]) -> dict[str, Any]:
    """``moe.first_dense`` and ``moe.num_experts`` of Qwen's ``mlp_only_layers`` and ``decoder_sparse_step``."""
    n, experts, step = hf["num_hidden_layers"], hf["num_experts"], hf["decoder_sparse_step"]
    dense = {i for i in range(n) if i in hf["mlp_only_layers"] or (i + 1) % step}
    first = next((i for i in range(n) if i not in dense), n)
    if dense == set(range(first)):
        return {"moe.first_dense": first, "moe.num_experts": experts}
    return {"moe.num_experts": [0 if i in dense else experts for i in range(n)]}


def layers_to_qwen(cfg: ModelConfig) -> dict[str, Any]:
    """Qwen's keys of which layers have experts, and how many."""
    dense = [i for i in range(cfg.n_layers) if not cfg.is_moe(i)]
    return {"num_experts": value_of(cfg, "moe.num_experts"), "decoder_sparse_step": 1, "mlp_only_layers": dense}
