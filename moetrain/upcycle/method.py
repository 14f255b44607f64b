"""What an upcycling method is: models in, one model out, every tensor made when it is asked for.

A method is a file in ``methods/`` with a function registered in ``UPCYCLERS``:

    @UPCYCLERS.register("name", Options)
    def name(options: Options, parents: Sequence[Model], context: Context) -> Upcycled

It checks its input and returns at once; work is done as the tensors of the result are read, one by one, in any order
and each as often as wanted. So a model never is in memory as a whole, and a rank can ask for its own tensors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.convert.features import features

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model: its config and its tensors, by our names. ``where``: what messages call it."""

    cfg: ModelConfig
    tensors: Tensors
    where: str = "the parent"


@dataclass(frozen=True)
class Upcycled:
    """What a method made. ``exact``: whether theory says that it computes what its parent does. ``note``: what it
    preserves, or what it does not, in a few words."""

    model: Model
    exact: bool
    note: str


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for, and not kept. ``makers``: name -> what makes the tensor."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _no_ids() -> Tensor:
    raise ConfigError(
        "this method reads text to see which experts are used; give text=FILE and a parent with tokenizer"
    )


@dataclass(frozen=True)
class Context:
    """What a method gets beside its options. seed: of everything random. ids: gives the ids (B, S) of the calibration
    text, for methods that watch their parent at work; raises ConfigError where there is none."""

    seed: int = 0
    ids: Callable[[], Tensor] = field(default=_no_ids)

    def generator(self, *what: object) -> torch.Generator:
        """A generator for one purpose, named by ``what``: so that no tensor depends on which others were made."""
        digest = hashlib.sha256(repr((self.seed, *what)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def one_parent(parents: Sequence[Model], method: str) -> Model:
    """The only one of ``parents``. Raises ConfigError."""
    if len(parents) != 1:
        raise ConfigError(f"method={method} takes one model in from=; got {len(parents)}")
    return parents[0]


def several_parents(parents: Sequence[Model], method: str) -> None:
    """Raise ConfigError for fewer than two ``parents``."""
    if len(parents) < 2:
        raise ConfigError(f"method={method} takes two models or more, as from=DIR,DIR; got {len(parents)}")


def check_dense(parent: Model, method: str) -> None:
    """Raise ConfigError unless ``parent`` has no experts."""
    layers = parent.cfg.moe_layers()
    if layers:
        raise ConfigError(f"method={method} needs a dense model; {parent.where} has experts in layer {layers[0]}")


def check_sparse(parent: Model, method: str) -> None:
    """Raise ConfigError unless ``parent`` has experts, the same number and width in all layers that have any."""
    cfg = parent.cfg
    if not cfg.moe_layers():
        raise ConfigError(f"method={method} needs a model with experts; {parent.where} is dense")
    for name in ("num_experts", "expert_dim", "top_k"):
        values = sorted({cfg.layer_value(name, layer) for layer in cfg.moe_layers()})
        if len(values) > 1:
            raise ConfigError(f"method={method} needs the same {name} in every layer; {parent.where} has {values}")


def check_same(parents: Sequence[Model]) -> None:
    """Raise ConfigError unless all ``parents`` are the same model but for their values; names the first difference."""
    first = features(parents[0].cfg)
    for other in parents[1:]:
        theirs = features(other.cfg)
        for name in dict.fromkeys([*first, *theirs]):
            if first.get(name) != theirs.get(name):
                raise ConfigError(
                    f"parents must have the same shapes: model.{name} is {first.get(name)} in {parents[0].where} and "
                    f"{theirs.get(name)} in {other.where}"
                )


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raise ConfigError where a token cannot have as many experts as it needs."""
    if top_k > num_experts:
        raise ConfigError(f"top_k={top_k} is more than num_experts={num_experts}; lower top_k")


def with_experts(
    cfg: ModelConfig,
    num_experts: int,
    top_k: int,
    expert_dim: int,
    *,
    layers: Sequence[int] | None = None,
    renormalize: bool = True,
) -> ModelConfig:
    """Dense ``cfg`` with experts in ``layers`` (None: all), routed by a softmax over all experts of which the top_k
    count, divided by their sum if ``renormalize``. Raises ConfigError for layers that there are not."""
    check_top_k(num_experts, top_k)
    number: int | list[int] = num_experts
    if layers is not None:
        if not layers or min(layers) < 0 or max(layers) >= cfg.n_layers:
            raise ConfigError(f"layers={list(layers)}: the model has layers 0 to {cfg.n_layers - 1}; name some of them")
        number = [num_experts if layer in layers else 0 for layer in range(cfg.n_layers)]
    moe = MoEConfig(num_experts=number, top_k=top_k, expert_dim=expert_dim)
    return replace(cfg, family="auto", moe=moe, router={"kind": "topk", "renormalize": renormalize})


def ffn_names(layer: int) -> tuple[str, str, str]:
    """Names of a dense layer's gate (F, D), up (F, D) and down (D, F)."""
    return tuple(f"layers.{layer}.mlp.w_{part}.weight" for part in ("gate", "up", "down"))  # type: ignore[return-value]


def moe_names(layer: int) -> tuple[str, str, str]:
    """Names of a MoE layer's router (E, D), w13 (E, 2, F, D) and w2 (E, D, F)."""
    return tuple(f"layers.{layer}.moe.{part}" for part in ("router.weight", "experts.w13", "experts.w2"))  # type: ignore[return-value]


def dense_layer(parent: Model, layer: int) -> tuple[Tensor, Tensor]:
    """A dense layer's gate and up in one tensor (2, F, D), and down (D, F): an expert's tensors."""
    gate, up, down = ffn_names(layer)
    return torch.stack((parent.tensors[gate], parent.tensors[up])), parent.tensors[down]


def scaled(t: Tensor, factor: float) -> Tensor:
    """``t`` times ``factor``, rounded once to the dtype of ``t``."""
    return t if factor == 1 else (t.to(torch.float64) * factor).to(t.dtype)


def averaged(parents: Sequence[Model]) -> Model:
    """The mean of ``parents``, which have the same names and shapes; each tensor is rounded once."""

    def mean(name: str) -> Tensor:
        first, *others = (parent.tensors[name] for parent in parents)
        total = first.to(torch.float64)
        for other in others:
            total = total + other
        return (total / len(parents)).to(first.dtype)

    names = parents[0].tensors
    return Model(parents[0].cfg, Lazy({name: partial(mean, name) for name in names}), "the mean of the parents")


LayerTensor = Callable[[int], Tensor]


def assemble(parent: Model, cfg: ModelConfig, router: LayerTensor, w13: LayerTensor, w2: LayerTensor) -> Model:
    """The model ``cfg`` whose experts are made by these functions of the layer's number, and all else is ``parent``'s.

    router: (E, D), w13: (E, 2, F, D), w2: (E, D, F).
    """
    layers = cfg.moe_layers()
    mine = tuple(f"layers.{layer}.{part}." for layer in layers for part in ("mlp", "moe"))
    makers = {name: partial(parent.tensors.__getitem__, name) for name in parent.tensors if not name.startswith(mine)}
    for layer in layers:
        for name, make in zip(moe_names(layer), (router, w13, w2), strict=True):
            makers[name] = partial(make, layer)
    return Model(cfg, Lazy(makers), "the result")
