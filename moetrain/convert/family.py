"""What all Hugging Face families share, and which of them fits a model.

A family is tables: which key of config.json is which of our settings, which values its class fixes, which tensor is
which of ours (``parts`` has those that many share). A new family is one new file in ``families/``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from moetrain.config.errors import ConvertError
from moetrain.config.registry import FAMILIES, ROUTERS
from moetrain.config.schema import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moetrain.convert.features import differences
from moetrain.convert.layout import Rule
from moetrain.convert.rope import rope_from_hf, rope_to_hf
from moetrain.model.attention import window_of
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
}

# what the class of a dense family implies: no layer has experts
NO_EXPERTS = {"moe.num_experts": 0}

# their keys that may have one value only, in every family
ALWAYS: dict[str, Any] = {"attention_dropout": 0.0}

# their hidden_act -> our activation, where MLPs have a gate
GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "relu": "reglu"}


# models published under a type and with code of their own, which compute the same as a class of transformers
SAME_AS = {"kimi_k2": "deepseek_v3"}

# classes that people will try, and what the model lacks for them
NOT_COVERED = {
    "gemma2": "two norms around each part of a block, and soft caps on scores and logits",
    "gemma3_text": "two norms around each part of a block, and two rotary bases",
    "longcat_flash": "zero experts, and two attentions in a layer with its experts beside them",
    "phimoe": "LayerNorm with biases, a bias on the head, and sparsemixer routing",
}


class Family:
    """One model class of transformers. Subclasses fill the tables; ``read`` and ``write`` do what tables cannot.

    name: ``model_type``. fields: our setting -> their key, beside COMMON. implied: our settings that the class fixes.
    fixed: their keys with the only value that is covered. activations: their hidden_act -> our activation.
    rules: our tensors as ``save_pretrained`` writes them.
    in_memory: the same tensors as ``state_dict()`` names them, where that differs.
    zeros: tensors of theirs, (E,) in each MoE layer, that must exist: zeros where we have none.
    ignored: their tensors that we have no use for (regular expressions); logged when met.
    last_choice: whether ``auto`` prefers any other class that computes the same, as this one covers plainer ones.
    partial_rotary: whether the class may rotate a part of each head only.
    stock: whether the class is one of transformers' own. files: what an export carries, where it is not.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    fields: ClassVar[dict[str, str]] = {}
    implied: ClassVar[dict[str, Any]] = {}
    fixed: ClassVar[dict[str, Any]] = {}
    activations: ClassVar[dict[str, str]] = GATED
    rules: ClassVar[tuple[Rule, ...]] = ()
    in_memory: ClassVar[tuple[Rule, ...]] = ()
    zeros: ClassVar[tuple[Rule, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()
    last_choice: ClassVar[bool] = False
    partial_rotary: ClassVar[bool] = False
    stock: ClassVar[bool] = True
    files: ClassVar[tuple[Path, ...]] = ()

    def from_hf_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Our config of their config.json. Raises ConvertError naming a setting that has no counterpart here."""
        hf = complete(self.name, config)
        for key, value in (ALWAYS | self.fixed).items():
            if hf.get(key, value) != value:
                raise ConvertError(f"config.json of {self.name}: {key}={hf[key]!r} is not covered, only {value!r} is")
        if hf["hidden_act"] not in self.activations:
            covered = " or ".join(map(repr, self.activations))
            raise ConvertError(
                f"config.json of {self.name}: hidden_act={hf['hidden_act']!r} is not covered, only {covered} is"
            )
        activation = self.activations[hf["hidden_act"]]
        flat: dict[str, Any] = {"activation": activation, "moe.activation": activation} | self.implied
        for ours, theirs in (COMMON | self.fields).items():
            if theirs not in hf and theirs != "head_dim":  # may be left to the rule below
                raise ConvertError(f"config.json of {self.name} has no {theirs}")
            flat[ours] = hf.get(theirs)
        flat |= rope_from_hf(hf, self.partial_rotary) | self.read(hf)
        if not flat.get("attention.head_dim"):
            flat["attention.head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
        return build_config(flat | {"family": self.name, "name": str(config.get("_name_or_path") or self.name)})

    def to_hf_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """Their config.json of ``cfg``, as near as the class comes; see ``refusals``."""
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        hf |= ALWAYS | self.fixed | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        hf |= {theirs: value_of(cfg, ours) for ours, theirs in (COMMON | self.fields).items()}
        named = {ours: theirs for theirs, ours in self.activations.items()}
        activation = cfg.moe.activation if cfg.moe_layers() else cfg.activation
        hf["hidden_act"] = named.get(activation, next(iter(self.activations)))
        hf["rope_parameters"] = rope_to_hf(cfg.rope, self.partial_rotary)
        return hf | self.write(cfg)

    @classmethod
    def is_dense(cls) -> bool:
        """Whether the class has no experts."""
        return cls.implied.get("moe.num_experts") == 0

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Our settings that need more than a key's value."""
        return {}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """Their keys that need more than a setting's value."""
        return {}

    def hollow(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes, by name, of their tensors that the class has for a part of no width, which ``cfg`` lacks."""
        return {}

    def refusals(self, cfg: ModelConfig) -> list[str]:
        """The features of ``cfg`` that this class lacks, as "model.path=value"; none if it computes the same.

        A model without experts is for the dense families: classes with experts cannot all do without.
        """
        if not cfg.moe_layers() and not self.is_dense():
            return ["model.moe.num_experts=0"]
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
    """The family called ``name`` (``model_type`` of config.json), or the one that computes the same.

    Raises ConvertError where the model lacks what the class needs, and ConfigError with the nearest known name.
    """
    if name in NOT_COVERED:
        raise ConvertError(f"Hugging Face models of type {name} are not covered: they need {NOT_COVERED[name]}")
    return FAMILIES.get(SAME_AS.get(name, name)).build()


def family_of(cfg: ModelConfig, has_bias: bool = False) -> Family:
    """The family that ``cfg`` is exported as: ``cfg.family``, or for ``auto`` the first whose class computes the same;
    where none of transformers' does, one that carries its own code. has_bias: whether selection biases go with it.

    Raises ConvertError that names the features which the chosen class does not have, or none.
    """
    if cfg.family != "auto":
        family = family_named(cfg.family)
        lacking = _lacking(family, cfg, has_bias)
        if lacking:
            raise ConvertError(f"model.family={cfg.family} has no {', '.join(lacking)}; try model.family=auto")
        return family
    lacking, family = _nearest(cfg, has_bias)
    if not lacking:
        return family
    carried = [family for family in map(family_named, FAMILIES.names()) if not family.stock]
    own = next((family for family in carried if not _lacking(family, cfg, has_bias)), None)
    if own is None:
        raise ConvertError(
            f"no Hugging Face class has this model; the nearest, {family.name}, lacks {', '.join(lacking)}"
        )
    return own


def lacking_features(cfg: ModelConfig, has_bias: bool = False) -> str:
    """Why ``cfg`` has no class of transformers, for a log line: what the nearest lacks, or that it was asked for."""
    lacking, family = _nearest(cfg, has_bias)
    if lacking:
        return f"no class of transformers has this model (the nearest, {family.name}, lacks {', '.join(lacking)})"
    return f"model.family={cfg.family}, though {family.name} of transformers computes the same"


def _lacking(family: Family, cfg: ModelConfig, has_bias: bool) -> list[str]:
    return family.refusals(cfg) + (["balance=[bias]"] if has_bias and not family.zeros else [])


def _nearest(cfg: ModelConfig, has_bias: bool) -> tuple[list[str], Family]:
    """The class of transformers that lacks the least of ``cfg``, and what that is. A model without experts is compared
    with dense classes, any other with those that have experts."""
    stock = [family for family in map(family_named, FAMILIES.names()) if family.stock]
    kin = [family for family in stock if family.is_dense() != bool(cfg.moe_layers())]
    tried = [(_lacking(family, cfg, has_bias), family) for family in kin]

    def distance(entry: tuple[list[str], Family]) -> tuple[bool, int, bool]:
        lacking, family = entry
        is_error = any(
            not feature.startswith(("model.", "balance=")) for feature in lacking
        )  # instead of a list of features
        return is_error, len(lacking), family.last_choice

    return min(tried, key=distance)


def complete(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the defaults of transformers' config class, and rotary settings in its newest form."""
    from transformers import AutoConfig

    known = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "model_type"}
    try:
        full = AutoConfig.for_model(model_type, **known)
    except Exception as error:  # its classes raise many kinds, over many lines
        why = " ".join(str(error).split())
        raise ConvertError(f"transformers refuses the config of {model_type}: {why[:200]}") from None
    full.standardize_rope_params()  # as its models do: an original length that stands beside the rotary settings counts
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


def experts_by_layer(n_layers: int, sparse: Iterable[int], experts: int) -> dict[str, Any]:
    """``moe.first_dense`` and ``moe.num_experts`` of a model whose layers ``sparse`` have ``experts`` experts."""
    sparse = sorted(sparse)
    first = sparse[0] if sparse else n_layers
    if sparse == list(range(first, n_layers)):
        return {"moe.first_dense": first, "moe.num_experts": experts}
    return {"moe.num_experts": [experts if i in sparse else 0 for i in range(n_layers)]}


def layers_from_qwen(hf: Mapping[str, Any]) -> dict[str, Any]:
    """``moe.first_dense`` and ``moe.num_experts`` of Qwen's ``mlp_only_layers`` and ``decoder_sparse_step``."""
    n, step = hf["num_hidden_layers"], hf["decoder_sparse_step"]
    return experts_by_layer(
        n, (i for i in range(step - 1, n, step) if i not in hf["mlp_only_layers"]), hf["num_experts"]
    )


def layers_to_qwen(cfg: ModelConfig) -> dict[str, Any]:
    """Qwen's keys of which layers have experts, and how many."""
    dense = [i for i in range(cfg.n_layers) if not cfg.is_moe(i)]
    return {"num_experts": value_of(cfg, "moe.num_experts"), "decoder_sparse_step": 1, "mlp_only_layers": dense}


def shared_to_count(cfg: ModelConfig) -> int:
    """How many experts of ``moe.expert_dim`` the shared ones are as wide as, rounded down."""
    return value_of(cfg, "moe.shared_dim") // value_of(cfg, "moe.expert_dim")


def windows_from_layer_types(hf: Mapping[str, Any]) -> dict[str, Any]:
    """``attention.sliding_window`` and ``sliding_layers`` of their ``layer_types``."""
    windowed = [i for i, kind in enumerate(hf["layer_types"]) if kind == "sliding_attention"]
    return {"attention.sliding_layers": windowed} if windowed else {"attention.sliding_window": None}


def windows_to_layer_types(cfg: ModelConfig) -> dict[str, Any]:
    """Their ``layer_types``: which layers attend within the window."""
    windows = [window_of(cfg, i) for i in range(cfg.n_layers)]
    return {"layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows]}
