"""Tensor parallelism with sequence parallelism: the ranks of tp hold parts of each layer's weights, and between layers
parts of each sequence.

Rank t of n holds the t-th stretch of the sequence. Where a layer's weights are split, the tokens of all ranks are
gathered at its entrance, and at its exit the ranks' contributions are summed while each keeps its own tokens. A
parameter is then either a part (a DTensor over tp, whose gradient is complete) or a copy (its gradient is that of this
rank's tokens or heads, and ``sum_copies`` adds them up).

Shapes: S tokens of a sequence between layers, N those of all tp ranks (S = N / n), v classes of the vocabulary here.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moe_kernels import VocabularyPart, linear, linear_cross_entropy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moetrain.comm.even import all_gather, all_gather_packed, all_reduce, reduce_scatter
from moetrain.config.errors import ConfigError
from moetrain.model.attention.gqa import GroupedQueryAttention
from moetrain.model.attention.mla import MultiHeadLatentAttention
from moetrain.model.block import Block
from moetrain.model.decoder import Decoder
from moetrain.model.norm import RMSNorm
from moetrain.model.vocabulary import Vocabulary
from moetrain.moe.experts import Experts
from moetrain.moe.linear import Linear, local_part
from moetrain.moe.mlp import MLP

TP = "tp"
EVERYTHING = slice(None)


def split(model: Decoder, tp_mesh: DeviceMesh) -> None:
    """Make ``model`` (whole, or a pipeline part; on any device, before FSDP) tensor parallel in place.

    tp_mesh: 1-D, named "tp". The model then takes and gives as before, but for x_BSD between its layers, whose S is
    split over tp: tokens and targets are those of all tp ranks, a loss is this rank's share. Routed experts are left to
    their own grid, and routers, which see this rank's tokens, are copies. Does nothing on one rank.
    Raises ConfigError where tp does not divide what it has to.
    """
    if tp_mesh.size() == 1:
        return
    for block in model.layers.values():
        assert isinstance(block, Block)
        if isinstance(block.attention, MultiHeadLatentAttention):
            _split_mla(block.attention, tp_mesh)
        else:
            assert isinstance(block.attention, GroupedQueryAttention)
            _split_gqa(block.attention, tp_mesh)
        for mlp in (block.mlp, None if block.moe is None else block.moe.shared):
            if mlp is not None:
                assert isinstance(mlp, MLP)
                _split_mlp(mlp, tp_mesh)
    for table in (model.embed, model.head):
        if table is not None:
            _split_parameter(table, "weight", tp_mesh, 0)
    model.vocabulary = SplitVocabulary(tp_mesh.get_group())


def copies(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a split model, before or after FSDP, whose gradients are partial over tp: all that are neither
    parts nor routed experts."""
    routed = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    return [p for p in model.parameters() if p not in routed and not _is_part(p)]


@torch.no_grad()
def sum_copies(params: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum the gradients of ``params`` (``copies``) over tp: once per step, after the last backward.

    After FSDP's reduction too. One collective for each dtype; every rank of the group calls with the same parameters,
    sharded alike.
    """
    grads: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for p in params:
        grad = local_part(p.grad)
        if grad is not None:
            grads[grad.dtype].append(grad)
    for parts in grads.values() if group.size() > 1 else ():
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=group)
        sums = [s.view_as(part) for s, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        torch._foreach_copy_(parts, sums)


class SplitVocabulary(Vocabulary):
    """Every rank of ``group`` holds V/n rows of the tables. Full logits are made for generation only."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def embed(self, tokens_BS: Tensor, w_VD: Tensor) -> Tensor:
        """tokens (B, N), w (v, D) -> this rank's x_BSD. Raises IndexError for unknown tokens (on CPU only)."""
        v, n = len(w_VD), self.group.size()
        if tokens_BS.device.type == "cpu" and ((tokens_BS < 0) | (tokens_BS >= n * v)).any():
            raise IndexError(f"tokens must be below {n * v}, the size of the vocabulary; they reach {tokens_BS.max()}")
        row_BN = tokens_BS - self.group.rank() * v
        is_here_BN = (row_BN >= 0) & (row_BN < v)
        x = F.embedding(row_BN.where(is_here_BN, 0), w_VD).masked_fill(~is_here_BN.unsqueeze(-1), 0)
        return reduce_scatter(x, self.group, dim=1)

    def logits(self, h_BSD: Tensor, w_VD: Tensor) -> Tensor:
        """h (B, S, D), w (v, D) -> (B, N, V), on every rank. Gradients from above are summed over the ranks, so each
        may differentiate its own share of a loss only."""
        h_BND = all_gather(h_BSD, self.group, dim=1)
        return all_gather(linear(h_BND, w_VD), self.group, dim=2)

    def loss(self, h_BSD: Tensor, w_VD: Tensor, targets_BS: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
        """h (B, S, D), w (v, D), targets (B, N): the losses of this rank's tokens, summed or (B, S)."""
        rank, n = self.group.rank(), self.group.size()
        B, S = h_BSD.shape[:2]
        own_BnS = torch.zeros(B, n, S, dtype=torch.bool, device=h_BSD.device)
        own_BnS[:, rank] = True
        part = VocabularyPart(
            first=rank * len(w_VD), classes=n * len(w_VD), own_T=own_BnS.flatten(), gather=self._gather
        )
        h_TD = all_gather(h_BSD, self.group, dim=1).flatten(0, 1)
        loss = linear_cross_entropy(h_TD, w_VD, targets_BS.flatten(), reduction=reduction, part=part)
        return loss if reduction == "sum" else loss.view_as(own_BnS)[:, rank]

    def _gather(self, x: Tensor) -> Tensor:
        return all_gather(x.unsqueeze(0), self.group)


class _PartLinear(Linear):
    """A whole Linear, of which this rank uses the output rows ``rows``."""

    def __init__(self, whole: Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight, self.bias = whole.weight, whole.bias
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight[self.rows], None if self.bias is None else self.bias[self.rows])


class _ExitLinear(Linear):
    """A Linear split over its inputs, of which this rank has some: what the ranks make of them is summed, each keeps
    its own tokens (a stretch of ``dim``), and the bias, a copy, is added to these."""

    def __init__(self, whole: Linear, mesh: DeviceMesh, dim: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight, self.bias = whole.weight, whole.bias
        self.group, self.dim = mesh.get_group(), dim
        _split_parameter(self, "weight", mesh, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in / n), all tokens -> (..., out), this rank's tokens."""
        weight = local_part(self.weight)
        assert weight is not None
        y = reduce_scatter(linear(x, weight), self.group, self.dim)
        return y if self.bias is None else y + self.bias


class _SplitRMSNorm(RMSNorm):
    """RMSNorm over features that are split over ``group``. rows: those of the (part of the) weight for this rank's.

    Where several ranks hold the same features (shared key heads), all hold equally many copies, so the mean is right.
    """

    def __init__(self, whole: RMSNorm, group: dist.ProcessGroup, rows: slice) -> None:
        nn.Module.__init__(self)
        self.eps, self.offset, self.weight = whole.eps, whole.offset, whole.weight
        self.group, self.rows = group, rows

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features here) -> the same shape. Statistics of half-precision inputs are taken in float32."""
        weight = local_part(self.weight)
        assert weight is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = all_reduce(wide.square().sum(dim=-1, keepdim=True), self.group)
        mean = squares / (x.shape[-1] * self.group.size())
        scale = weight[self.rows].to(wide.dtype) + self.offset
        return (wide * (mean + self.eps).rsqrt() * scale).to(x.dtype)


def _split_gqa(attention: GroupedQueryAttention, mesh: DeviceMesh) -> None:
    """Query heads over the ranks, key/value heads with them; where these are fewer than ranks, their projections are
    copies, of which each rank uses the one head that its query heads need. So is a router of attention experts, of
    whose weights a rank uses those of its heads."""
    n, d = mesh.size(), attention.head_dim
    heads, kv_heads = len(attention.wq.weight) // d, len(attention.wk.weight) // d
    _check_heads(heads, n)
    for name in ("weight", "bias"):
        _split_parameter(attention.wq, name, mesh, 0)
    rows = EVERYTHING
    if kv_heads % n == 0:
        for projection in (attention.wk, attention.wv):
            for name in ("weight", "bias"):
                _split_parameter(projection, name, mesh, 0)
    elif n % kv_heads == 0:
        head = mesh.get_local_rank() * kv_heads // n
        rows = slice(head * d, (head + 1) * d)
        attention.wk, attention.wv = _PartLinear(attention.wk, rows), _PartLinear(attention.wv, rows)
    else:
        raise ConfigError(
            f"parallel.tp={n} must divide model.attention.n_kv_heads={kv_heads} or be a multiple of it, so that every "
            "rank's query heads need equally many key/value heads"
        )
    if attention.qk_norm == "full":
        _split_parameter(attention.q_norm, "weight", mesh, 0)
        attention.q_norm = _SplitRMSNorm(attention.q_norm, mesh.get_group(), EVERYTHING)
        if rows == EVERYTHING:
            _split_parameter(attention.k_norm, "weight", mesh, 0)
        attention.k_norm = _SplitRMSNorm(attention.k_norm, mesh.get_group(), rows)
    _split_parameter(attention, "sinks", mesh, 0)
    own = heads // n
    attention.own_heads = slice(mesh.get_local_rank() * own, (mesh.get_local_rank() + 1) * own)
    _open(attention, "wo", mesh, dim=1)


def _split_mla(attention: MultiHeadLatentAttention, mesh: DeviceMesh) -> None:
    """Heads over the ranks. Latents are made by copies, each rank for its own tokens, and then gathered: they are
    narrower than x."""
    _check_heads(attention.n_heads, mesh.size())
    for projection in (attention.wq_b if attention.has_q_latent else attention.wq, attention.wkv_b):
        _split_parameter(projection, "weight", mesh, 0)
    _open(attention, "wo", mesh, dim=1)


def _split_mlp(mlp: MLP, mesh: DeviceMesh) -> None:
    """Inner features over the ranks. Tokens are gathered in any order: nothing depends on it."""
    for projection in (mlp.w_gate, mlp.w_up):
        if projection is not None:
            _split_parameter(projection, "weight", mesh, 0)
    _open(mlp, "w_down", mesh, dim=0)


def _open(module: nn.Module, exit_name: str, mesh: DeviceMesh, dim: int) -> None:
    """Gather tokens (dimension ``dim``) at the module's entrance, and scatter them at the Linear ``exit_name``."""
    group = mesh.get_group()
    module.gather = functools.partial(_gather, group=group, dim=dim)  # type: ignore[assignment]
    setattr(module, exit_name, _ExitLinear(getattr(module, exit_name), mesh, dim))


def _gather(*xs: Tensor, group: dist.ProcessGroup, dim: int) -> tuple[Tensor, ...]:
    return all_gather_packed(xs, group, dim)


def _split_parameter(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    """Replace a parameter, if there is one, by a DTensor of which this rank keeps its n-th along ``dim``."""
    whole = getattr(module, name)
    if whole is None:
        return
    n = mesh.size()
    if whole.shape[dim] % n:
        raise ConfigError(
            f"parallel.tp={n} must divide every dimension that it splits, but a {type(module).__name__} has a "
            f"{name} of shape {tuple(whole.shape)}, to be split along dimension {dim}"
        )
    local = whole.detach().chunk(n, dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    part = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _is_part(p: nn.Parameter) -> bool:
    return isinstance(p, DTensor) and TP in (p.device_mesh.mesh_dim_names or ())


def _check_heads(heads: int, n: int) -> None:
    if heads % n:
        raise ConfigError(f"parallel.tp={n} must divide model.attention.n_heads={heads}")
