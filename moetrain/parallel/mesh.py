"""The two grids of ranks: one for attention and the dense parts, one for the experts.

World = pp x dp_replicate x dp_shard x cp x tp = pp x edp x ep x etp, on the same ranks, each product written slowest
first. pp is slowest in both, so that the pipeline groups agree for every combination of the other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.config.check import Sizes


@dataclass(frozen=True)
class ParallelDims:
    """One mapping, made real: its sizes and the process groups of both grids.

    dense: mesh (pp, dp_replicate, dp_shard, cp, tp); experts: mesh (pp, edp, ep, etp).
    stage_group: all ranks that hold the same layers and, between them, every token of a micro-batch.
    """

    sizes: Sizes
    dense: DeviceMesh
    experts: DeviceMesh
    stage_group: dist.ProcessGroup

    @classmethod
    def build(cls, sizes: Sizes, device_type: str) -> ParallelDims:
        """Make the process groups of ``sizes``. Collective: every rank of the world calls it."""
        s = sizes
        dense_names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        dense = init_device_mesh(
            device_type, (s.pp, s.dp_replicate, s.dp_shard, s.cp, s.tp), mesh_dim_names=dense_names
        )
        experts = init_device_mesh(device_type, (s.pp, s.edp, s.ep, s.etp), mesh_dim_names=("pp", "edp", "ep", "etp"))
        stage = experts["edp", "ep", "etp"]._flatten("stage")
        return cls(s, dense, experts, stage.get_group())

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh over which dense parameters are sharded; 2-D (replicas, shards) for HSDP."""
        return self.dense["dp_replicate", "dp_shard"] if self.sizes.dp_replicate > 1 else self.dense["dp_shard"]

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads, from 0 to ``data_size`` - 1."""
        replica, shard = (self.dense[name].get_local_rank() for name in ("dp_replicate", "dp_shard"))
        return replica * self.sizes.dp_shard + shard

    @property
    def data_size(self) -> int:
        """Number of shares of the global batch."""
        return self.sizes.data
