"""Muon (https://kellerjordan.github.io/posts/muon/, arXiv 2502.16982) for the hidden matrices, AdamW for the rest."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from moetrain.config.fields import STRICT
from moetrain.config.registry import OPTIMIZERS
from moetrain.optim.groups import decay_groups, role_of, trainable
from moetrain.optim.optimizers.adamw import fused
from moetrain.optim.orthogonal import at_once, newton_schulz, orthogonalize


@dataclass(config=STRICT)
class MuonOptions:
    """Options of Muon and of the AdamW beside it."""

    lr: float = Field(default=1e-3, gt=0, description="peak learning rate of the hidden matrices")
    adamw_lr: float | None = Field(default=None, gt=0, description="peak learning rate of the rest; null: lr")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of the gradient's running mean, matrices")
    nesterov: bool = Field(default=True, description="look one gradient ahead of the running mean")
    adjust_lr: Literal["original", "match_rms_adamw"] = Field(
        default="match_rms_adamw",
        description="scale of an update (A, B): sqrt(max(1, A/B)), or 0.2 sqrt(max(A, B)), about as long as AdamW's",
    )
    ns_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="dtype of the orthogonalisation; auto: bfloat16 on a GPU, the weight's on CPU"
    )
    weight_decay: float = Field(default=0.1, ge=0, description="decay of matrices per step, times the learning rate")
    decay_embedding: bool = Field(default=True, description="whether the embedding decays too")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="adamw: decay of the gradient's running mean")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="adamw: decay of the squared gradient's running mean")
    eps: float = Field(default=1e-8, ge=0, description="adamw: added to the root of the squared gradient's mean")


@OPTIMIZERS.register("muon", MuonOptions)
def build_muon(options: MuonOptions, model: nn.Module) -> Muon:
    """Muon for ``model``'s hidden matrices, each slice [.., F, D] of an expert weight being one; AdamW for the rest.

    The rest: embedding, head, router, and vectors (norms, biases). Parameters are plain tensors, or DTensors of
    any mix of meshes.
    """
    o, parameters = options, trainable(model)
    matrices = [p for fqn, p in parameters.items() if role_of(fqn, p) == "matrix"]
    rest = {fqn: p for fqn, p in parameters.items() if role_of(fqn, p) != "matrix"}
    muon = {"algorithm": "muon", "lr": o.lr, "weight_decay": o.weight_decay, "momentum": o.momentum,
            "nesterov": o.nesterov, "adjust_lr": o.adjust_lr, "ns_dtype": o.ns_dtype}  # fmt: skip
    others = decay_groups(
        rest, o.weight_decay, o.decay_embedding, algorithm="adamw", lr=o.adamw_lr or o.lr,
        betas=(o.beta1, o.beta2), eps=o.eps, fused=fused(model),
    )  # fmt: skip
    return Muon(([{"params": matrices, **muon}] if matrices else []) + others)


class Muon(torch.optim.Optimizer):
    """Both algorithms in one optimizer: a group's ``algorithm`` is "muon" or "adamw".

    State of a parameter: ``momentum_buffer``, or ``step``, ``exp_avg`` and ``exp_avg_sq`` as in torch.optim.AdamW. It
    is sharded as the parameter is, so DCP saves and reshards it like any other.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over the meshes of sharded matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "adamw":
                self._adamw(group, parameters)
                continue
            for alike in _alike(parameters):
                n = at_once(alike[0])
                for i in range(0, len(alike), n):
                    self._muon(group, alike[i : i + n])
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """torch.optim.Muon's update. parameters: equal in shape, dtype and sharding."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        first = parameters[0]
        grads = _local([p.grad for p in parameters])
        means = _local([self.state[p]["momentum_buffer"] for p in parameters])
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, means, group["momentum"]) if group["nesterov"] else means
        compute = functools.partial(newton_schulz, dtype=_ns_dtype(group["ns_dtype"], first))
        directions = orthogonalize(updates, first, compute)
        a, b = first.shape[-2:]
        scale = math.sqrt(max(1, a / b)) if group["adjust_lr"] == "original" else 0.2 * math.sqrt(max(a, b))
        weights = _local(parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, [d.to(first.dtype) for d in directions], alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """torch's fused AdamW, on the local shards: it is elementwise."""
        for p in parameters:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        adamw(
            _local(parameters),
            _local([p.grad for p in parameters]),
            _local([s["exp_avg"] for s in states]),
            _local([s["exp_avg_sq"] for s in states]),
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """``parameters`` grouped by shape, dtype and sharding, in an order that is the same on all ranks."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        sharding = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        here = p.to_local().shape if isinstance(p, DTensor) else p.shape  # ranks may own unequal numbers of experts
        groups[p.shape, here, p.dtype, sharding].append(p)
    return list(groups.values())


def _ns_dtype(name: str, p: Tensor) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if p.device.type == "cuda" else p.dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _local(tensors: list[Any]) -> list[Tensor]:
    """The part that this rank holds: for a DTensor a view of its shard, so that writing to it writes the DTensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
