"""How one of our tensors appears in a Hugging Face checkpoint: whole, rearranged, or cut into one tensor per expert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Rearrange:
    """A permutation and merging of dimensions, ``"e p f d -> e d (f p)"``: ours on the left, theirs on the right."""

    pattern: str

    def _parse(self) -> tuple[list[str], list[list[str]]]:
        ours, theirs = self.pattern.split("->")
        groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", theirs)]
        return ours.split(), groups

    def to_hf(self, t: Tensor) -> Tensor:
        """Ours to theirs."""
        names, groups = self._parse()
        size = dict(zip(names, t.shape, strict=True))
        order = [names.index(name) for group in groups for name in group]
        return t.permute(order).reshape([prod(size[name] for name in group) for group in groups])

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of our ``shape``."""
        names, groups = self._parse()
        size = dict(zip(names, shape, strict=True))
        return tuple(prod(size[name] for name in group) for group in groups)

    def to_ours(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Theirs to our ``shape``."""
        names, groups = self._parse()
        size = dict(zip(names, shape, strict=True))
        flat = [name for group in groups for name in group]
        return t.reshape([size[name] for name in flat]).permute([flat.index(name) for name in names])

    @property
    def keeps_first(self) -> bool:
        """Whether the first dimension is the same on both sides, so that a slice along it is one there too."""
        names, groups = self._parse()
        return groups[0] == names[:1]


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor: ``ours[index]``, rearranged if it has to be. Or, not rearranged, a stretch of its rows:
    number i of n that are as long."""

    hf: str
    ours: str
    index: tuple[int, ...]
    rearrange: Rearrange | None = None
    stretch: tuple[int, int] = (0, 1)

    def to_hf(self, whole: Tensor) -> Tensor:
        """Their tensor from our whole one; contiguous, of its own storage where it is a part."""
        part = whole[self.index] if self.index else whole
        return (self.rearrange.to_hf(part) if self.rearrange else part).contiguous()

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of their tensor, given the ``shape`` of our whole one."""
        rest = tuple(shape[len(self.index) :])
        if self.rearrange:
            return self.rearrange.hf_shape(rest)
        return (rest[0] * self.stretch[1], *rest[1:]) if rest else rest

    def first_row(self, shape: tuple[int, ...]) -> int:
        """Row of their tensor where ``ours[index]``, of ``shape``, begins."""
        return self.stretch[0] * shape[0] if shape else 0

    def copy_to(self, whole: Tensor, theirs: Tensor) -> None:
        """Write their tensor into its place in our whole one."""
        part = whole[self.index] if self.index else whole
        if self.stretch != (0, 1):
            theirs = theirs.chunk(self.stretch[1])[self.stretch[0]]
        part.copy_(self.rearrange.to_ours(theirs, tuple(part.shape)) if self.rearrange else theirs)


@dataclass(frozen=True)
class Rule:
    """Our tensor ``ours`` is their ``theirs``. ``{l}`` stands for the layer, ``{e}`` for the expert (our dimension 0).

    With ``{e}``, each expert is a tensor of theirs; with several ``theirs``, so is each slice of our next dimension
    (gate and up of ``w13``). rearrange: pattern of what remains after that cutting. stretch: see ``Piece``.
    """

    ours: str
    theirs: tuple[str, ...]
    rearrange: str | None = None
    stretch: tuple[int, int] = (0, 1)

    def match(self, fqn: str) -> int | None:
        """Layer of our tensor ``fqn`` (-1 for one outside the layers), or None if the rule is not about it."""
        found = re.fullmatch(re.escape(self.ours).replace(r"\{l\}", r"(\d+)"), fqn)
        return None if found is None else int(found[1]) if found.re.groups else -1

    def pieces(self, fqn: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """The tensors that our ``fqn`` of ``shape`` is in their checkpoint."""
        layer = self.match(fqn)
        per_expert = "{e}" in self.theirs[0]
        experts = range(shape[0]) if per_expert else [None]
        parts = range(len(self.theirs)) if len(self.theirs) > 1 else [None]
        rearrange = Rearrange(self.rearrange) if self.rearrange else None
        for e, p in product(experts, parts):
            index = tuple(i for i in (e, p) if i is not None)
            yield Piece(self.theirs[p or 0].format(l=layer, e=e), fqn, index, rearrange, self.stretch)


def rule(ours: str, *theirs: str, rearrange: str | None = None, stretch: tuple[int, int] = (0, 1)) -> Rule:
    """Shorthand for a Rule."""
    return Rule(ours, theirs, rearrange, stretch)
