"""What weights look like: sizes, norms and outliers of each part, and how alike the experts of a layer are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint.weights import BLOCK, Box, Spec, blocks
from moetrain.convert.family import family_of
from moetrain.convert.open import Opened
from moetrain.convert.source import Source
from moetrain.model.count import count_parameters

FEW = 2**18

# part -> what its tensors' names match; the first that matches
PARTS = {
    "embedding": r"embed\.",
    "head": r"head\.",
    "router": r".*\.moe\.router\.",
    "attention router": r".*\.attention\.router\.",
    "experts": r".*\.moe\.experts\.",
    "shared experts": r".*\.moe\.shared\.",
    "dense mlp": r".*\.mlp\.",
    "norms": r".*norm\.weight|norm\.",
    "attention": r".*\.attention\.",
}


@dataclass
class Figures:
    """Figures of some tensors together. largest: the largest magnitude, in ``of``. nonfinite: elements not finite."""

    parameters: int = 0
    nbytes: int = 0
    squares: float = 0.0
    largest: float = 0.0
    of: str = ""
    nonfinite: int = 0
    dtypes: set[str] = field(default_factory=set)

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.squares / max(1, self.parameters))

    @property
    def outlier(self) -> float:
        """How many times the rms the largest magnitude is."""
        return self.largest / self.rms if self.rms else 0.0

    def add(self, name: str, part: Tensor) -> None:
        """Count ``part``, some of tensor ``name``."""
        self.parameters += part.numel()
        self.nbytes += part.nbytes
        self.dtypes.add(str(part.dtype).removeprefix("torch."))
        for some in part.detach().reshape(-1).split(FEW):  # what is made of them stays in the processor's cache
            wide = some.float()
            squares = float(wide.dot(wide))
            if not math.isfinite(squares):
                finite = wide.isfinite()
                self.nonfinite += int((~finite).sum())
                wide = wide[finite]
                squares = float(wide.double().square().sum())  # which may be finite where float32 has no such number
            self.squares += squares
            if wide.numel():
                low, high = wide.aminmax()
                self._widen(max(float(high), -float(low)), name)

    def merge(self, other: Figures) -> None:
        """Count what ``other`` has counted."""
        self.parameters += other.parameters
        self.nbytes += other.nbytes
        self.squares += other.squares
        self.nonfinite += other.nonfinite
        self.dtypes |= other.dtypes
        self._widen(other.largest, other.of)

    def _widen(self, largest: float, of: str) -> None:
        if largest > self.largest or not self.of:
            self.largest, self.of = largest, of


@dataclass(frozen=True)
class ExpertFigures:
    """One MoE layer. cosine_mean, cosine_max: over pairs of experts (all their weights as one vector); pair: the most
    alike. norms, router_norms: of each expert, and of each expert's row of the router."""

    layer: int
    cosine_mean: float
    cosine_max: float
    pair: tuple[int, int]
    norms: list[float]
    router_norms: list[float]


@dataclass(frozen=True)
class Look:
    """parts: by name, without those that the model has not. layers: (layer, part) -> figures."""

    family: str
    path: str
    shape: dict[str, Any]
    total: int
    active: int
    parts: dict[str, Figures]
    layers: dict[tuple[int, str], Figures]
    experts: list[ExpertFigures]


def look(opened: Opened) -> Look:
    """Read all of ``opened`` once, and its experts and routers once more, part by part."""
    layers: dict[tuple[int, str], Figures] = {}
    for name, spec in opened.source.specs.items():
        found = layers.setdefault((_layer_of(name), part_of(name)), Figures())
        for box in blocks(name, spec):
            found.add(name, opened.source.read(name, box))
    parts: dict[str, Figures] = {}
    for part in PARTS:
        for (_, theirs), figures in layers.items():
            if theirs == part:
                parts.setdefault(part, Figures()).merge(figures)
    m, counts = opened.model, count_parameters(opened.model)
    a = m.attention
    shape: dict[str, Any] = {"layers": m.n_layers, "width": m.dim, "vocabulary": m.vocab_size, "attention": a.kind,
                             "heads": a.n_heads, "tied": m.tie_embeddings}  # fmt: skip
    if a.kind == "gqa":
        shape |= {"key/value heads": a.n_kv_heads, "head width": a.head_dim}
    if a.num_experts > 1:
        shape["attention experts"] = a.num_experts
    if m.moe_layers():
        shape |= {"MoE layers": len(m.moe_layers()), "experts": m.moe.num_experts, "top k": m.moe.top_k,
                  "expert width": m.moe.expert_dim, "shared width": m.moe.shared_dim}  # fmt: skip
    if m.moe.ternary and m.moe_layers():
        shape["experts compute"] = "ternary"
    if len(m.moe_layers()) < m.n_layers:
        shape["dense width"] = m.dense_dim
    experts = [expert_figures(opened.source, layer) for layer in m.moe_layers()]
    family = opened.model.family if opened.model.family != "auto" else family_of(opened.model, opened.has_bias).name
    return Look(family, str(opened.path), shape, counts.total, counts.active, parts, layers, experts)


def part_of(name: str) -> str:
    """The part of the model that tensor ``name`` belongs to."""
    return next(part for part, pattern in PARTS.items() if re.match(pattern, name))


def _layer_of(name: str) -> int:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def expert_figures(source: Source, layer: int) -> ExpertFigures:
    """How alike the experts of ``layer`` are. Their products are summed over columns, so that a few columns of all
    experts are in memory at a time."""
    prefix = f"layers.{layer}.moe."
    names = [name for name in source.specs if name.startswith(prefix + "experts.")]
    gram_EE: Tensor | float = 0.0
    for name in names:
        for box in _columns(source.specs[name]):
            x = source.read(name, box).flatten(1).float()
            gram_EE = gram_EE + (x @ x.T).double()
    assert isinstance(gram_EE, Tensor)
    norms_E = gram_EE.diagonal().clamp(min=0).sqrt()
    cosine_EE = gram_EE / (norms_E[:, None] * norms_E[None, :]).clamp(min=1e-300)
    E = len(cosine_EE)
    pairs = torch.ones(E, E, dtype=torch.bool).triu(1)
    others = cosine_EE.masked_fill(~pairs, float("nan"))
    mean = float(others.nanmean()) if E > 1 else 1.0
    place = int(others.nan_to_num(-2.0).argmax())
    pair = (place // E, place % E)
    router = source.read(f"{prefix}router.weight").float().norm(dim=1)
    largest = float(cosine_EE[pair]) if E > 1 else 1.0
    return ExpertFigures(layer, mean, largest, pair, norms_E.tolist(), router.tolist())


def _columns(spec: Spec) -> Iterator[Box]:
    """Boxes of all experts of a tensor (E, ...), each of some of the last dimension but one, and of one before it."""
    E, *middle, last = spec.shape
    if not middle:
        yield (slice(0, E),)
        return
    *outer, rows = middle
    step = max(1, BLOCK // (E * last * 4))
    for i in range(math.prod(outer)):
        for start in range(0, rows, step):
            inner = slice(start, min(start + step, rows))
            yield (slice(0, E), *(slice(i, i + 1) for _ in outer), inner)
