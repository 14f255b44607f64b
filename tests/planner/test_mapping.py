"""What `moetrain mapping` prints is what the meshes of a real run hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.config.sizes import DENSE_GRID, EXPERT_GRID, Sizes
from moetrain.parallel.mesh import ParallelDims
from moetrain.planner.mapping import KINDS, grid_of, groups, place

CASES = [
    Sizes(pp=2, dp_replicate=2, dp_shard=3, cp=2, tp=2, edp=3, ep=8, etp=1),
    Sizes(pp=3, dp_shard=4, cp=1, tp=4, edp=2, ep=4, etp=2),
    Sizes(dp_shard=2, tp=3, edp=1, ep=2, etp=3),
]


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[Sizes]:
    sizes: Sizes = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sizes.world)
    yield sizes
    dist.destroy_process_group()


@pytest.mark.parametrize("world", CASES, indirect=True)
def test_places_and_groups_are_those_of_the_meshes(world: Sizes) -> None:
    dims = ParallelDims.build(world, "cpu")
    for mesh, names in ((dims.dense.mesh, DENSE_GRID), (dims.experts.mesh, EXPERT_GRID)):
        for rank in range(world.world):
            [coordinates] = (mesh == rank).nonzero().tolist()
            assert place(rank, world, names) == dict(zip(names, coordinates, strict=True))
    for kind in groups(world, node=4):
        along, names = KINDS[kind.name][0], grid_of(KINDS[kind.name][0][0])
        mesh = dims.dense.mesh if names is DENSE_GRID else dims.experts.mesh
        others = [i for i, name in enumerate(names) if name not in along]
        order = [*others, *(names.index(name) for name in along)]
        assert kind.ranks == mesh.permute(order).reshape(-1, kind.size).tolist(), kind.name
        assert kind.nodes == max(len({rank // 4 for rank in group}) for group in kind.ranks)
        assert sorted(itertools.chain.from_iterable(kind.ranks)) == list(range(world.world))
    assert groups(world, 4)[-1].ranks[0] == dist.get_process_group_ranks(dims.stage_group)
