"""Mappings: sizes resolve to two grids over the same ranks, or are refused with the rule and a choice that works."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.check import Sizes, check_mapping, resolve_sizes
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moetrain.config.sizes import DENSE_GRID

size = st.sampled_from([-1, 1, 1, 1, 2, 3, 4, 6, 8])


def solutions(asked: dict[str, int], world: int) -> set[tuple[int, ...]]:
    """Brute force: every way to fill in the -1 of ``asked`` so that the product is ``world``."""
    options = [range(1, world + 1) if n == -1 else [n] for n in asked.values()]
    return {sizes for sizes in itertools.product(*options) if math.prod(sizes) == world}


@settings(max_examples=300, deadline=None)
@given(
    dense_sizes=st.tuples(*[size] * len(DENSE_GRID)),
    expert_sizes=st.tuples(size, size),
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24]),
)
def test_sizes_resolve_or_are_refused(dense_sizes: tuple[int, ...], expert_sizes: tuple[int, int], world: int) -> None:
    """Against brute force: legal sizes give the only filling; illegal ones a refusal whose advice is legal."""
    dense = dict(zip(DENSE_GRID, dense_sizes, strict=True))
    experts = dict(zip(("ep", "etp"), expert_sizes, strict=True))
    parallel = ParallelConfig(**dense, **experts)
    try:
        sizes = resolve_sizes(parallel, world)
    except ConfigError as error:
        message = str(error)
    else:
        got = tuple(getattr(sizes, name) for name in DENSE_GRID)
        assert {got} == solutions(dense, world)
        assert sizes.pp * sizes.edp * sizes.ep * sizes.etp == sizes.world == world
        assert all(n == -1 or getattr(sizes, name) == n for name, n in experts.items())
        return
    assert "\n" not in message
    if "only one of" in message:
        assert dense_sizes.count(-1) > 1 or expert_sizes == (-1, -1)
        return
    fillings = solutions(dense, world)
    if fillings:  # then it is the experts that do not fit
        stage = world // next(iter(fillings))[0]
        assert all(math.prod(sizes) != stage for sizes in solutions({"edp": -1, **experts}, stage))
    assert re.search(r"must (equal|divide) the world size", message)
    for name, number in re.findall(r"parallel\.(\w+)=(\d+)", message):
        advised = dataclasses.replace(parallel, **{name: int(number)})
        if name in DENSE_GRID:
            assert solutions({n: getattr(advised, n) for n in DENSE_GRID}, world), message
        else:
            resolve_sizes(advised, world)


@pytest.mark.parametrize("bad", [0, -2, -7])
def test_sizes_below_one_are_refused_by_name(bad: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.ep={bad}: a size is at least 1"):
        resolve_sizes(ParallelConfig(ep=bad), 4)


def test_hsdp_with_experts_over_all_ranks() -> None:
    """The example of the docs: 2 replicas of 4 shards; experts over 4 ranks, so 2 copies of each are sharded by edp."""
    got = resolve_sizes(ParallelConfig(dp_replicate=2, ep=4), 8)
    assert got == Sizes(dp_replicate=2, dp_shard=4, ep=4, edp=2)
    assert (got.world, got.data) == (8, 8)


def mapping(world: int, *, experts: int | list[int] = 8, batch: tuple[int, int] = (16, 2), **parallel: int) -> Sizes:
    model = ModelConfig(n_layers=4, moe=MoEConfig(num_experts=experts))
    train = TrainConfig(global_batch=batch[0], micro_batch=batch[1])
    return check_mapping(Config(model=model, train=train, parallel=ParallelConfig(**parallel)), world)


def test_experts_must_split_evenly_in_every_layer() -> None:
    assert mapping(4, experts=[4, 8, 12, 8], ep=4).ep == 4
    with pytest.raises(ConfigError, match=r"ep=4 must divide model.moe.num_experts=6.*nearest legal: parallel.ep=2"):
        mapping(4, experts=[4, 6, 12, 8], ep=4)


def test_layers_without_experts_do_not_restrict_ep() -> None:
    assert mapping(4, experts=[0, 8, 0, 8], ep=4).ep == 4


def test_the_global_batch_is_whole_micro_batches_on_every_rank() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=16 must be a multiple of train.micro_batch=6") as error:
        mapping(4, batch=(16, 6))
    assert "train.global_batch=24 or train.micro_batch=4" in str(error.value)
    mapping(4, batch=(24, 6))
    mapping(4, batch=(16, 4))
