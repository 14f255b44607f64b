"""Where tensors come from: anything that knows their names and shapes beforehand, and gives them part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.checkpoint.weights import Box, Spec
from moetrain.config.errors import ConvertError


class Source(Protocol):
    """Tensors by name. ``specs`` has the shape and dtype of each, in the order in which they are best read."""

    specs: dict[str, Spec]

    def read(self, name: str, box: Box = ()) -> Tensor:
        """Part ``box`` of tensor ``name`` (all of it: ``()``)."""
        ...


class Held:
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.specs = {name: Spec.of(t) for name, t in tensors.items()}

    def read(self, name: str, box: Box = ()) -> Tensor:
        """See ``Source``; a view."""
        return self.tensors[name].detach()[box]


class InOrder:
    """Whole tensors that come one after the other, as those gathered from ranks do; read in the order of ``specs``."""

    def __init__(self, specs: dict[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.specs = specs
        self._rest = iter(tensors)
        self._name, self._tensor = "", torch.empty(0)

    def read(self, name: str, box: Box = ()) -> Tensor:
        """See ``Source``; a view."""
        while self._name != name:
            try:
                self._name, self._tensor = next(self._rest)
            except StopIteration:
                raise ConvertError(f"our tensor '{name}' was not given") from None
        return self._tensor[box]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._rest

    def drain(self) -> None:
        """Run through the rest: where gathering is collective, every rank takes part to the end."""
        for _ in self:
            pass


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], source: Source) -> None:
    """Fill ``targets``, of which this rank may hold slices (DTensors), reading no more of ``source`` than these.

    Not collective. What the source lacks stays as it is; shapes must be the same, and values are cast.
    """
    for name, target in targets.items():
        if name not in source.specs:
            continue
        local, box = target, tuple(slice(0, n) for n in target.shape)
        if isinstance(target, DTensor):
            local = target.to_local()
            sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        if local.numel():
            local.copy_(source.read(name, box))
