"""What an upcycling method is: models in, one model out, every tensor made when it is asked for.

A method is a file in ``methods/`` with a function registered in ``UPCYCLERS``:

    @UPCYCLERS.register("name", Options)
    def name(options: Options, parents: Sequence[Model], context: Context) -> Upcycled

It checks its input and returns at once; work is done as the parts of the result are read, in any order and each as
often as wanted, experts one by one. So a model never is in memory as a whole, and a rank can ask for its own experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from moe_kernels import ACTIVATIONS
from torch import Tensor

from moetrain.checkpoint.weights import Box, Spec, whole_box
from moetrain.config.errors import ConfigError
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.config.sizes import divisors, near
from moetrain.convert.features import features
from moetrain.convert.open import specs_of
from moetrain.convert.source import Source


@dataclass(frozen=True)
class Model:
    """A model: its config and its tensors, by our names. ``where``: what messages call it."""

    cfg: ModelConfig
    source: Source
    where: str = "the parent"

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.source.read(name)

    def entry(self, name: str, i: int) -> Tensor:
        """Entry ``i`` of its first dimension: one expert's part."""
        return self.source.read(name, (slice(i, i + 1),))[0]


@dataclass(frozen=True)
class Upcycled:
    """What a method made. ``exact``: whether theory says that it computes what its parent does. ``note``: what it
    preserves, or what it does not, in a few words. moments: from a parent whose tensors are a quantity of the
    optimizer's (a moment of each parameter) the same of the result; None: the method does not say what becomes of them.
    settings: those that the method's own recipe trains it with, as words of ``moetrain train``. figures: what the
    method measured while it made the tensors, by name; called when they have been made.
    """

    model: Model
    exact: bool
    note: str
    moments: Callable[[Model], Model] | None = None
    settings: str = ""
    figures: Callable[[], dict[str, float]] = dict


class Made:
    """A ``Source`` of tensors that are made when they are asked for, and not kept. read: name -> what makes a part."""

    def __init__(self, specs: dict[str, Spec], makers: dict[str, Callable[[Box], Tensor]]) -> None:
        self.specs = specs
        self._makers = makers

    def read(self, name: str, box: Box = ()) -> Tensor:
        """See ``Source``."""
        return self._makers[name](whole_box(self.specs[name].shape, box))


def _no_texts() -> list[Tensor]:
    raise ConfigError(
        "this method reads text to see which experts are used; give text=FILE and a parent with tokenizer"
    )


@dataclass(frozen=True)
class Context:
    """What a method gets beside its options. seed: of everything random. texts: gives the ids (B, S) of each
    calibration text, all of one shape, for methods that watch their parent at work; raises ConfigError where there is
    none."""

    seed: int = 0
    texts: Callable[[], list[Tensor]] = field(default=_no_texts)

    def ids(self) -> Tensor:
        """The ids of all texts, one after the other: (B, S)."""
        return torch.cat(self.texts())

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


def check_divides(name: str, parts: int, total: int, what: str) -> None:
    """Raise ConfigError where option ``name`` cannot cut ``total``, which is called ``what``, into ``parts``."""
    if total % parts:
        hint = " or ".join(f"{name}={n}" for n in near(parts, divisors(total)))
        raise ConfigError(f"{name}={parts} does not divide {what}; set {hint}")


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
    moe = MoEConfig(num_experts=number, top_k=top_k, expert_dim=expert_dim, activation=cfg.activation)
    return replace(cfg, family="auto", moe=moe, router={"kind": "topk", "renormalize": renormalize})


def ffn_names(parent: Model, layer: int) -> list[str]:
    """Names of a dense layer's gate (F, D), unless its activation is plain, up (F, D) and down (D, F)."""
    inputs = ("gate", "up")[-ACTIVATIONS[parent.cfg.activation].matrices :]
    return [f"layers.{layer}.mlp.w_{part}.weight" for part in (*inputs, "down")]


def keys_name(parent: Model, layer: int) -> str:
    """Name of the matrix (F, D) whose rows say what an inner dimension of a dense layer responds to: gate, or up."""
    return ffn_names(parent, layer)[0]


def moe_names(layer: int) -> tuple[str, str, str]:
    """Names of a MoE layer's router (E, D), w13 (E, n, F, D) and w2 (E, D, F)."""
    return tuple(f"layers.{layer}.moe.{part}" for part in ("router.weight", "experts.w13", "experts.w2"))  # type: ignore[return-value]


def dense_layer(parent: Model, layer: int, part: int) -> Tensor:
    """An expert's tensor of a dense layer. part 0: gate and up (2, F, D), or up (1, F, D); part 1: down (D, F)."""
    *inputs, down = ffn_names(parent, layer)
    return parent.read(down) if part else torch.stack([parent.read(name) for name in inputs])


def scaled(t: Tensor, factor: float) -> Tensor:
    """``t`` times ``factor``, rounded once to the dtype of ``t``."""
    return t if factor == 1 else (t.to(torch.float64) * factor).to(t.dtype)


def averaged(parents: Sequence[Model]) -> Model:
    """The mean of ``parents``, which have the same names and shapes; each tensor is rounded once."""

    def mean(name: str, box: Box) -> Tensor:
        first, *others = (parent.source.read(name, box) for parent in parents)
        total = first.to(torch.float64)
        for other in others:
            total = total + other
        return (total / len(parents)).to(first.dtype)

    specs = parents[0].source.specs
    return Model(parents[0].cfg, Made(specs, {name: partial(mean, name) for name in specs}), "the mean of the parents")


def shared_names(parent: Model, layer: int) -> list[str]:
    """Names of a MoE layer's shared expert, as ``ffn_names``."""
    return [name.replace(".mlp.", ".moe.shared.") for name in ffn_names(parent, layer)]


def assemble(
    parent: Model,
    cfg: ModelConfig,
    router: Callable[[int], Tensor],
    expert: Callable[[int, int, int], Tensor],
    shared: Callable[[int, int], Tensor] | None = None,
) -> Model:
    """The model ``cfg``, all of which is dense ``parent``'s but for the layers with experts.

    router: layer -> (E, D). expert: (layer, e, part) -> part of expert e, as ``dense_layer``'s. shared: (layer, part)
    -> part of the shared expert, in the order of ``ffn_names``.
    """

    def experts(layer: int, part: int, box: Box) -> Tensor:
        return stacked(lambda e: expert(layer, e, part), box)

    def row(layer: int, box: Box) -> Tensor:
        return router(layer)[box]

    def beside(layer: int, part: int, box: Box) -> Tensor:
        assert shared is not None
        return shared(layer, part)[box]

    specs = specs_of(cfg, {})
    makers: dict[str, Callable[[Box], Tensor]] = {}
    for name in specs:
        makers[name] = partial(parent.source.read, name)
        if name in parent.source.specs:
            specs[name] = parent.source.specs[name]
    for layer in cfg.moe_layers():
        theirs = shared_names(parent, layer)
        dtype = parent.source.specs[keys_name(parent, layer)].dtype
        made = [partial(row, layer), *(partial(experts, layer, part) for part in (0, 1))]
        made += [partial(beside, layer, part) for part in range(len(theirs))]
        for name, make in zip((*moe_names(layer), *theirs), made, strict=True):
            if name in specs:
                specs[name], makers[name] = replace(specs[name], dtype=dtype), make
    return Model(cfg, Made(specs, makers), "the result")


def stacked(entry: Callable[[int], Tensor], box: Box) -> Tensor:
    """Part ``box`` (with all its slices) of the tensor whose entries ``entry`` makes; no others are made."""
    return torch.stack([entry(i) for i in range(box[0].start, box[0].stop)])[(slice(None), *box[1:])]
