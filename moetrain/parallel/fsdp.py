"""FSDP2: dense parameters sharded over the data ranks, experts over the expert-data ranks; gradients are summed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moetrain.moe.experts import Experts


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Policy of ``train.precision``: bf16 computes in bfloat16 over float32 weights, with float32 gradient reductions.

    Inputs are not cast on the way in: token ids stay integers and the auxiliary losses in the carry stay float32.
    """
    if precision != "bf16":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def expert_placement(edp: int) -> Callable[[nn.Parameter], Shard]:
    """Which dimension of an expert parameter (e, ...) FSDP splits over ``edp`` ranks: the last one that divides.

    Dimension 0 already belongs to expert parallelism; splitting another keeps ranks with few experts evenly loaded.
    """

    def place(p: nn.Parameter) -> Shard:
        for dim in range(p.dim() - 1, 0, -1):
            if p.shape[dim] % edp == 0:
                return Shard(dim)
        raise ValueError(f"no dimension of expert parameter {tuple(p.shape)} divides by edp={edp}")

    return place


def shard(model: nn.Module, dense_mesh: DeviceMesh, expert_mesh: DeviceMesh, precision: str, reshard: bool) -> None:
    """Apply FSDP2 in place: experts over ``expert_mesh`` (1-D), blocks and root over ``dense_mesh`` (1-D or 2-D)."""
    policy = mixed_precision(precision)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    alone: set[nn.Parameter] = set()
    for own in experts:
        if expert_mesh.size() == 1:
            # Experts that no other rank holds have nothing to gather or to reduce. FSDP would still copy every weight
            # and gradient twice a step; the kernels take float32 weights under bfloat16 rows as they are.
            alone.update(own.parameters())
            continue
        fully_shard(
            own,
            mesh=expert_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=expert_placement(expert_mesh.size()),
        )
    for block in model.layers.values():  # type: ignore[union-attr, operator]
        fully_shard(block, mesh=dense_mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=alone)
    fully_shard(model, mesh=dense_mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=alone)
    for module in model.modules():
        # The loss is divided once by the global token count, so every reduction is a plain sum. Both setters act on one
        # module only; gloo has no scaled reduction, hence the forced sum.
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
