"""The two grids of ranks: one for attention and the dense parts, one for the experts.

World = pp x dp_replicate x dp_shard x cp x tp = pp x edp x ep x etp, on the same ranks, each product written slowest
first. pp is slowest in both, so that the pipeline groups agree for every combination of the other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.config.sizes import Sizes
from moetrain.parallel.context import head_tail_index


@dataclass(frozen=True)
class ParallelDims:
    """One mapping, made real: its sizes and the process groups of both grids.

    dense: mesh (pp, dp_replicate, dp_shard, cp, tp); experts: mesh (pp, edp, ep, etp).
    weights: mesh (pp, dp_replicate, fsdp, tp) of the dense parameters, which are sharded over dp_shard x cp = fsdp: the
        ranks of one cp group hold different tokens, but want the same weights.
    data_group: ranks that between them read the global batch. sequence_group: ranks that each hold a part of the same
        sequences (cp x tp). stage_group: all ranks that hold the same layers and, between them, every token of a
        micro-batch.
    """

    sizes: Sizes
    dense: DeviceMesh
    weights: DeviceMesh
    experts: DeviceMesh
    data_group: dist.ProcessGroup
    sequence_group: dist.ProcessGroup
    stage_group: dist.ProcessGroup

    @classmethod
    def build(cls, sizes: Sizes, device_type: str) -> ParallelDims:
        """Make the process groups of ``sizes``. Collective: every rank of the world calls it."""
        s = sizes

        def mesh(**dims: int) -> DeviceMesh:
            return init_device_mesh(device_type, tuple(dims.values()), mesh_dim_names=tuple(dims))

        dense = mesh(pp=s.pp, dp_replicate=s.dp_replicate, dp_shard=s.dp_shard, cp=s.cp, tp=s.tp)
        weights = mesh(pp=s.pp, dp_replicate=s.dp_replicate, fsdp=s.dp_shard * s.cp, tp=s.tp)
        experts = mesh(pp=s.pp, edp=s.edp, ep=s.ep, etp=s.etp)
        data = dense["dp_replicate", "dp_shard"]._flatten("data")
        sequence = dense["cp", "tp"]._flatten("sequence")
        stage = experts["edp", "ep", "etp"]._flatten("stage")
        return cls(s, dense, weights, experts, data.get_group(), sequence.get_group(), stage.get_group())

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh over which dense parameters are sharded; 2-D (replicas, shards) for HSDP."""
        return self.weights["dp_replicate", "fsdp"] if self.sizes.dp_replicate > 1 else self.weights["fsdp"]

    def group(self, name: str) -> dist.ProcessGroup:
        """The group of this rank along one dimension of either grid: "pp", "cp", "tp", "ep", "edp", "etp" ..."""
        return (self.dense if name in self.dense.mesh_dim_names else self.experts)[name].get_group()  # type: ignore[operator]

    def rank(self, name: str) -> int:
        """This rank's place along one dimension of either grid."""
        return self.group(name).rank()

    def index_of(self, seq_len: int) -> Tensor:
        """Where the tokens stand in sequences of ``seq_len`` that this rank's cp group member holds: int64 (S,)."""
        if self.sizes.cp == 1:
            return torch.arange(seq_len)
        return head_tail_index(seq_len, self.sizes.cp, self.rank("cp"))

    def own_index(self, seq_len: int) -> Tensor:
        """The same of the tokens that this rank holds between blocks, where tensor parallelism splits them again."""
        index_S = self.index_of(seq_len)
        return index_S.chunk(self.sizes.tp)[self.rank("tp")] if self.sizes.tp > 1 else index_S

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads, from 0 to ``data_size`` - 1."""
        return self.data_group.rank()

    @property
    def data_size(self) -> int:
        """Number of shares of the global batch."""
        return self.sizes.data
