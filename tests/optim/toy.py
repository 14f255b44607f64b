"""A toy with every kind of parameter that a mixture-of-experts decoder has, its sharding, and a loss for any mapping.

The loss is the squared distance of all parameters to targets that move with the step. It needs no forward pass, so its
value and gradient are the same numbers under every mapping; what differs is only where they live.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

D, F, E = 6, 4, 4


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(E, D))
        self.register_buffer("bias_E", torch.zeros(E))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.zeros(E, 2, F, D))
        self.w2 = nn.Parameter(torch.zeros(E, D, F))
        self.b2 = nn.Parameter(torch.zeros(E, D))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.wq = nn.Linear(D, 5)
        self.wo = nn.Linear(5, D, bias=False)
        self.shared_gate = nn.Linear(D, 1, bias=False)
        self.router = Router()
        self.experts = Experts()


class Toy(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(layers)})
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, 11, bias=False)


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Normal numbers that depend on the name alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)


def placed_as(value: Tensor, p: Tensor) -> Tensor:
    """The global ``value``, sharded like ``p``."""
    if not isinstance(p, DTensor):
        return value
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def toy(ep: int = 0, edp: int = 1, dtype: torch.dtype = torch.float64) -> Toy:
    """The toy with its initial values: whole (ep = 0), or experts over ep x edp and the rest over all ranks (FSDP2)."""
    model = Toy().to(dtype)
    if ep:
        shard(model, ep, edp)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(placed_as(drawn(name, p.shape).to(dtype), p))
    return model


def shard(model: Toy, ep: int, edp: int) -> None:
    dense = init_device_mesh("cpu", (edp * ep,), mesh_dim_names=("dp",))
    grid = init_device_mesh("cpu", (edp, ep), mesh_dim_names=("edp", "ep"))
    for block in model.layers.values():
        experts = block.experts
        for name, p in list(experts.named_parameters()):
            mine = p.detach().chunk(ep)[grid["ep"].get_local_rank()].clone()
            p = nn.Parameter(DTensor.from_local(mine, grid["ep"], [Shard(0)], run_check=False))
            experts.register_parameter(name, p)
        fully_shard(experts, mesh=grid["edp"], shard_placement_fn=lambda p: Shard(p.dim() - 1))
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense)


def loss_and_gradients(model: nn.Module, step: int) -> float:
    """Set every gradient of the loss at ``step``; return the loss. Collective."""
    total = 0.0
    for name, p in model.named_parameters():
        whole = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        gap = whole - drawn(f"{name}/{step}", p.shape).to(p.dtype)
        total += float((gap**2).sum())
        p.grad = placed_as(2 * gap, p)
    return total


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses before each of ``steps``."""
    losses = []
    for step in steps:
        losses.append(loss_and_gradients(model, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by name. Collective."""
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}
