"""FSDP2: dense parameters sharded over the data ranks, experts over the expert-data ranks; gradients are summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moetrain.model.decoder import Decoder
from moetrain.moe.experts import Experts


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Policy of ``train.precision``: bf16 computes in bfloat16 over float32 weights, with float32 gradient reductions.

    Inputs are not cast on the way in: token ids stay integers and the auxiliary losses in the carry stay float32.
    """
    if precision != "bf16":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def expert_placement(edp: int) -> Callable[[nn.Parameter], Shard]:
    """Which dimension of an expert parameter (e, ...) FSDP splits over ``edp`` ranks: the last one that divides and is
    whole, else one that expert tensor parallelism splits already.

    Dimension 0 belongs to expert parallelism; splitting another keeps ranks with few experts evenly loaded.
    """

    def place(p: nn.Parameter) -> Shard:
        parts = {0: 1}
        if isinstance(p, DTensor):
            parts = {s.dim: p.device_mesh.size(i) for i, s in enumerate(p.placements)}  # type: ignore[attr-defined]
        dims = range(p.dim() - 1, 0, -1)
        for dim in (*(d for d in dims if d not in parts), *(d for d in dims if d in parts)):
            if p.shape[dim] % (edp * parts.get(dim, 1)) == 0:
                return Shard(dim)
        raise ValueError(f"no dimension of expert parameter {tuple(p.shape)} divides by edp={edp}")

    return place


def shard(
    model: Decoder,
    dense_mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    precision: str,
    *,
    reshard: bool = True,
    prefetch: int = 1,
    offload: bool = False,
) -> None:
    """Apply FSDP2 in place: experts over ``expert_mesh`` (1-D), blocks and root over ``dense_mesh`` (1-D or 2-D).

    reshard: free gathered parameters after forward. prefetch: blocks that are gathered ahead. offload: parameters,
    gradients and so the optimizer's state live in host memory.
    """
    device_type = dense_mesh.device_type
    settings: dict[str, Any] = {"mp_policy": mixed_precision(precision)}
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device_type == "cuda")
    blocks: list[nn.Module] = list(model.layers.values())
    alone = left_alone(model, expert_mesh.size(), offload)
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        if alone.issuperset(experts.parameters()):
            continue
        place = expert_placement(expert_mesh.size())
        fully_shard(experts, mesh=expert_mesh, reshard_after_forward=reshard, shard_placement_fn=place, **settings)
    for block in blocks:
        fully_shard(block, mesh=dense_mesh, reshard_after_forward=reshard, ignored_params=alone, **settings)
    fully_shard(model, mesh=dense_mesh, reshard_after_forward=False, ignored_params=alone, **settings)
    for module in model.modules():
        # The loss is divided once by the global token count, so every reduction is a plain sum. Both setters act on one
        # module only; gloo has no scaled reduction, hence the forced sum.
        if isinstance(module, FSDPModule):
            if dense_mesh.size() > 1 or expert_mesh.size() > 1:  # one rank would divide by 1, in a pass of its own
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _prefetch(blocks, prefetch)


def left_alone(model: nn.Module, edp: int, offload: bool) -> set[nn.Parameter]:
    """Parameters that ``shard`` leaves to themselves: experts that no other rank holds.

    They have nothing to gather or to reduce. FSDP would still copy every weight and gradient twice a step; the kernels
    take float32 weights under bfloat16 rows as they are.
    """
    if edp > 1 or offload:
        return set()
    return {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}


def _prefetch(blocks: list[nn.Module], ahead: int) -> None:
    """While a block computes, gather the parameters of its experts and of the ``ahead`` blocks that run after it."""

    def modules(block: nn.Module) -> list[FSDPModule]:
        return [module for module in block.modules() if isinstance(module, FSDPModule)]

    for i, block in enumerate(blocks if ahead else []):
        assert isinstance(block, FSDPModule)
        own = modules(block)[1:]
        block.set_modules_to_forward_prefetch([*own, *(m for b in blocks[i + 1 : i + 1 + ahead] for m in modules(b))])
        # Without the block's own experts: this runs again when the gradient of the block's carry
        # arrives, after the experts' backward, and would gather them for nothing.
        before = blocks[max(0, i - ahead) : i][::-1]
        block.set_modules_to_backward_prefetch([m for b in before for m in modules(b)])
