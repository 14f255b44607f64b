"""Every placement of experts trains as plain expert parallelism does: against one process, float64, 1e-9.

From loads that are balanced to one expert that every token wants (a selection bias that the test sets). The model has
two MoE layers, so that exchanges of one run beside the other's.
"""

from __future__ import annotations

import logging
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moetrain.checkpoint import layout
from moetrain.config import Config
from moetrain.config import load as load_config
from moetrain.config.check import check_mapping, resolve_sizes
from moetrain.config.errors import ConfigError
from moetrain.moe.dispatch.placed import PlacedDispatcher
from moetrain.moe.layer import MoELayer
from moetrain.moe.placement.copies import Copies
from moetrain.moe.placement.plan import Placement, Topology, at_home, ep_homes, held, routes
from moetrain.moe.routing import Memo, Routing
from moetrain.optim import offload, orthogonal
from moetrain.planner.stage_run import Live
from moetrain.train import parity
from moetrain.train.engine import TorchEngine
from moetrain.train.trainer import Trainer
from moetrain.train.whole import whole_weights
from tests.distributed.toy_run import BASE, SIGMOID, load, one_step

STEPS = 5
HALF = 3
SMALL = [*SIGMOID, "model.n_layers=3", "train.precision=float64", f"train.steps={STEPS}", "optim.lr=0.01"]
FSSDP = ["experts/placement=fssdp", "experts.placement.node_size=2"]
# Homes change after the second and the fourth step.
MOVING = [*FSSDP, "experts.placement.slots=1", "experts.placement.budget=4", "experts.placement.reshard_every=2"]
FREES = [*MOVING, "experts.placement.rematerialise=true"]
CALIBRATES = [*FSSDP, "experts.placement.slots=2", "experts.placement.budget=1", "experts.placement.calibrate=true"]


def build(cfg: Config, hot: bool) -> Trainer:
    """A trainer; hot: every token chooses expert 0 first, and none one of the last four."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    for layer in trainer.engine.model.modules():
        if isinstance(layer, MoELayer) and hot:
            router: Any = layer.router
            router.balance["bias"].bias_E[0] = 10.0
            router.balance["bias"].bias_E[4:] = -10.0
    return trainer


def seen(trainer: Trainer) -> dict[str, bool]:
    """What the plan in force has: copies; experts that moved from where plain ep has them; a rank without an expert of
    some layer."""
    assert isinstance(trainer.engine, TorchEngine)
    placement = trainer.engine.placement
    if placement is None:
        return {}
    layers = list(placement.copies.values())
    return {
        "copies": any(c.placement != at_home(c.homes) for c in layers),
        "moved": any(c.homes != ep_homes(len(c.homes), placement.ranks) for c in layers),
        "bare": any(len(set(c.homes)) < placement.ranks for c in layers),
    }


def curves(cfgs: list[Config], hot: bool) -> list[tuple[parity.Curve, dict[str, bool]]]:
    """Of each config, on this rank."""
    found = []
    for cfg in cfgs:
        trainer = build(cfg, hot)
        with pytest.MonkeyPatch.context() as patch:
            added: list[Any] = []
            add = Copies.add
            patch.setattr(Copies, "add", lambda *args, add=add, added=added: (added.append(1), add(*args)))
            rows = [one_step(trainer) for _ in range(STEPS)]
        loads = [row.pop("loads") for row in rows]
        weights = dict(whole_weights(trainer.engine, trainer.dims))
        curve = parity.Curve(rows, loads, trainer.evaluate().loss, weights)
        found.append((curve, {**seen(trainer), "added": bool(added)}))
    return found


def check(
    prepared: Path, world: int, hot: bool, variants: list[tuple[list[str], set[str]]], model: list[str]
) -> parity.Curve:
    """Assert that all variants (settings, what must be seen) give the curve of one process; that curve."""
    micro = max(1, 8 // world // 2)  # of a step; two where there can be
    common = [*SMALL, *model, f"parallel.ep={world}", f"train.micro_batch={micro}"]
    cfgs = [load(prepared, [*common, *settings]) for settings, _ in variants]
    [[(one, _)]] = run_ranks(1, curves, [parity.one_process(cfgs[0], world)], hot, timeout=300)
    ranks = run_ranks(world, curves, cfgs, hot, timeout=300)
    for i, (settings, must) in enumerate(variants):
        found = parity.differences([rank[i][0] for rank in ranks], one)
        assert found.within(1e-9), f"{settings}: {found}"
        assert must <= {what for what, true in ranks[0][i][1].items() if true}, settings
    return one


Variant = tuple[list[str], set[str]]
FSSDP_ON: list[tuple[int, bool, list[Variant]]] = [
    (2, False, [(FSSDP, {"copies"}), (MOVING, {"copies", "moved"})]),
    (2, True, [
        (FREES, {"copies", "moved"}),
        ([*FREES, "train.recompute=selective"], {"copies"}),
        ([*MOVING, "train.recompute=full"], {"copies"}),
        ([*CALIBRATES, "train.recompute=full"], {"copies", "added"}),
    ]),
    (4, True, [
        (MOVING, {"copies", "moved"}),
        ([*FREES, "train.recompute=full", "experts.overlap=true"], {"copies", "moved"}),
        ([*CALIBRATES, "experts.placement.rematerialise=true"], {"copies", "added"}),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("world", "hot", "variants"), FSSDP_ON, ids=["2 balanced", "2 hot", "4 hot"])
def test_fssdp_equals_one_process(prepared: Path, world: int, hot: bool, variants: list[Variant]) -> None:
    """Copies on all ranks or on some, homes that move, copies freed after forward, copies added by the real loads."""
    one = check(prepared, world, hot, variants, [])
    top = max(max(layer) for layer in one.loads[0])
    assert (top == 8 * 16) == hot, "a hot expert has a row of every token"


def test_fssdp_on_eight_ranks_of_which_some_own_no_expert_of_a_layer(prepared: Path) -> None:
    model = ["optim=muon", "model.moe.bias=true"]
    check(prepared, 8, True, [(MOVING, {"copies", "moved", "bare"})], model)


def room_for_a_move(cfg: Config) -> tuple[int, int]:
    """(bytes of experts and their state here, of all tensors at the worst moment of a move of every expert)."""
    trainer = build(cfg, False)
    one_step(trainer)
    assert isinstance(trainer.engine, TorchEngine) and trainer.engine.placement is not None
    placement, optimizer = trainer.engine.placement, trainer.engine.optimizer
    parameters = [p for layer in placement.layers.values() for p in layer.experts.parameters()]
    states = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, DTensor)]
    taken = sum(x.to_local().nbytes for x in (*parameters, *states))  # type: ignore[attr-defined]
    del parameters, states
    with Live(trainer.engine.model) as live:
        placement.move({name: copies.homes[::-1] for name, copies in placement.copies.items()}, optimizer)
    return taken, live.most


def test_experts_move_in_little_more_room_than_they_take(prepared: Path) -> None:
    cfg = load(prepared, [*SMALL, *MOVING, "model.n_layers=8", "parallel.ep=2"])
    for taken, most in run_ranks(2, room_for_a_move, cfg):
        assert most < 1.5 * taken


def updated_at_a_time() -> tuple[list[int], int]:
    """Numbers of parameters in the chunks of eight layers' experts, and of a batch; this rank owns one or three of
    each four experts."""
    mesh, numel = init_device_mesh("cpu", (2,)), 8 * 8
    offload.CHUNK_BYTES, orthogonal.BATCH_ELEMENTS = 4 * 4 * numel, 4 * numel
    local = torch.zeros(1 + 2 * dist.get_rank(), 8, 8)
    shape, stride = torch.Size([4, 8, 8]), (numel, 8, 1)
    p = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return [len(chunk) for chunk in offload._chunks([p] * 8)], orthogonal.at_once(p)


def test_ranks_with_unequal_experts_update_the_same_parameters_at_a_time() -> None:
    """Muon trades shards of dense matrices, so ranks must come to them together."""
    assert run_ranks(2, updated_at_a_time) == [([2, 2, 2, 2], 2)] * 2


def test_related_policies_equal_one_process(prepared: Path) -> None:
    """Shadows, static copies and migration, beside tensor and context parallel ranks, whose tokens differ as well."""
    variants = [
        (["experts/placement=shadow", "parallel.tp=2"], {"copies"}),
        (["experts/placement=static", "experts.placement.copies=3", "parallel.cp=2"], {"copies"}),
        (["experts/placement=migrate", "experts.placement.every=2", "train.micro_batch=2"], {"moved"}),
    ]
    check(prepared, 4, True, variants, [])


def layouts(placements: list[Placement], topology: Topology) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each placement, on this rank with tokens of its own: (choices of each expert, rows to each rank, rows of each
    expert held here)."""
    found, n = [], len(placements[0])
    for i, placement in enumerate(placements):
        generator = torch.Generator().manual_seed(100 * i + dist.get_rank())
        ids_TK = torch.rand(5 + 4 * dist.get_rank(), n, generator=generator).square().topk(3).indices
        routing = Routing(n, len(ids_TK), Memo(), ids_TK=ids_TK, weights_TK=torch.ones(ids_TK.shape))
        layout = PlacedDispatcher(n, dist.group.WORLD, placement, topology).layout(routing)
        found.append((torch.bincount(ids_TK.flatten(), minlength=n).tolist(), layout.send, layout.counts))
    return found


def test_rows_go_where_the_plan_says() -> None:
    """So what a simulator counts by ``plan.routes`` is what ranks send; also to a rank that holds nothing."""
    topology, draw = Topology(4, 2), random.Random(0)
    placements: list[Placement] = [
        tuple(tuple(sorted(draw.sample(range(4), draw.randint(1, 4)))) for _ in range(6)) for _ in range(8)
    ]
    placements.append(((0, 1), (1,), (0,), (0, 1), (1,), (0, 1)))
    ranks = run_ranks(4, layouts, placements, topology)
    for i, placement in enumerate(placements):
        sent = routes([rank[i][0] for rank in ranks], placement, topology)
        for rank in range(4):
            assert ranks[rank][i][1] == [sum(rows) for rows in sent[rank]]
            assert ranks[rank][i][2] == [sum(of[rank][e] for of in sent) for e in held(placement, rank)]


def save_half_way(cfg: Config) -> list[dict[str, Any]]:
    """Three steps, a checkpoint, and the two that must follow it. It is written while the next step moves homes."""
    trainer = build(cfg, False)
    for _ in range(HALF):
        one_step(trainer)
    moved, write = threading.Event(), trainer.checkpointer._write

    def write_later(*args: Any) -> None:
        assert moved.wait(60)
        write(*args)

    trainer.checkpointer._write = write_later  # type: ignore[method-assign]
    homes = homes_of(trainer)
    progress = {"step": trainer.step, "tokens": trainer.tokens, "seconds": 0.0}
    trainer.checkpointer.save(trainer.step, trainer.engine.state(progress))
    rows = [one_step(trainer)]
    assert homes is None or homes_of(trainer) != homes
    moved.set()
    trainer.checkpointer.wait()
    assert not trainer.checkpointer.failed
    return [*rows, one_step(trainer), summed(trainer)]


def resume(cfg: Config) -> list[dict[str, Any]]:
    trainer = build(cfg, False)
    trainer.resume()
    return [one_step(trainer), one_step(trainer), summed(trainer)]


def homes_of(trainer: Trainer) -> list[Any] | None:
    assert isinstance(trainer.engine, TorchEngine)
    placement = trainer.engine.placement
    return None if placement is None else [c.homes for c in placement.copies.values()]


def summed(trainer: Trainer) -> dict[str, float]:
    """A sum over every weight."""
    return {name: float(value.sum()) for name, value in whole_weights(trainer.engine, trainer.dims)}


def test_checkpoints_go_on_bit_for_bit_and_to_and_from_plain_ep(prepared: Path) -> None:
    """Also one that was being written while experts changed their homes."""
    common = [*SMALL, "train.micro_batch=1", "checkpoint.asynchronous=true"]
    fssdp = load(prepared, [*common, "parallel.ep=4", *MOVING])
    ep = load(prepared, [*common, "parallel.ep=2"])
    for saved_by, saved_on, others in ((fssdp, 4, [(ep, 2)]), (ep, 2, [(fssdp, 4)])):
        expected = run_ranks(saved_on, save_half_way, saved_by, timeout=300)
        assert layout.steps(Path(saved_by.run_dir) / "checkpoints") == [HALF]
        assert run_ranks(saved_on, resume, saved_by, timeout=300)[0] == expected[0], "bit for bit"
        for other, world in others:
            for got, want in zip(run_ranks(world, resume, other, timeout=300)[0], expected[0], strict=True):
                assert got.pop("loads", None) == want.pop("loads", None)
                assert got == pytest.approx(want, rel=1e-9)
        shutil.rmtree(prepared / "run")


REFUSED = [
    (4, ["parallel.ep=2"], "gives each expert to one rank, but parallel.ep=2 shards it over edp=2 ranks (world / pp / "
     "ep / etp); nearest legal: parallel.ep=4 or experts.placement.kind=ep"),
    (4, ["parallel.ep=2", "parallel.etp=2"], "moves whole experts, not parallel.etp=2; nearest legal: "),
    (4, ["parallel.ep=2", "parallel.pp=2"], "does not run in a pipeline, parallel.pp=2; nearest legal: "),
    (2, ["parallel.ep=2", "parallel.offload=all"], "keeps weights on the device, not parallel.offload=all; nearest "
     "legal: parallel.offload=none or parallel.offload=optimizer or experts.placement.kind=ep"),
    (2, ["parallel.ep=2", "dispatch=two_step", "dispatch.node_size=2"], "sends rows by all-to-all, not by "
     "dispatch.kind=two_step; nearest legal: dispatch.kind=auto or dispatch.kind=all_to_all or "),
    (2, ["parallel.ep=2", "parallel.engine=deepspeed"], "is for parallel.engine=torch; nearest legal: "),
    (2, ["parallel.ep=2", "experts/placement=static", "experts.placement.copies=3"], "experts.placement.copies=3 is "
     "more than parallel.ep=2 ranks: a rank holds an expert once; nearest legal: experts.placement.copies=2"),
    (2, ["parallel.ep=2", "experts.placement.slots=-1"], "experts.placement.slots"),
    (2, ["parallel.ep=2", "experts.placement.budget=0"], "experts.placement.budget"),
    (2, ["parallel.ep=2", "experts.placement.kind=fsdp"], "did you mean 'fssdp'?"),
    (2, ["parallel.ep=2", "experts.placement=fssdp"], "choose a preset with experts/placement=NAME"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "settings", "message"), REFUSED, ids=[" ".join(s) for _, s, _ in REFUSED])
def test_what_cannot_be_placed_is_refused(world: int, settings: list[str], message: str) -> None:
    words = [*BASE, "experts/placement=fssdp", *settings]
    if "experts/placement=static" in settings:
        words.remove("experts/placement=fssdp")
    with pytest.raises(ConfigError) as error:
        load_config(words, check=lambda cfg: check_mapping(cfg, world))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_loaded_is_refused_as_well() -> None:
    """As where a model is built from Python: its options no longer tell their kind, so nothing can be tried."""
    cfg = load_config([*BASE, "experts/placement=fssdp", "parallel.ep=2", "parallel.offload=all"])
    with pytest.raises(ConfigError, match=r"not parallel.offload=all; change parallel.offload or experts.placement"):
        check_mapping(cfg, 2)


def no_slots(cfg: Config) -> tuple[dict[str, bool], int]:
    with capture("moetrain") as lines:
        trainer = build(cfg, True)
        for _ in range(2):
            one_step(trainer)
    return seen(trainer), sum("no slots for copies" in line for line in lines)


def test_without_a_slot_all_is_plain_ep_and_said_once(prepared: Path) -> None:
    cfg = load(prepared, [*SMALL, *FSSDP, "experts.placement.slots=0", "parallel.ep=2", "train.micro_batch=1"])
    for what, said in run_ranks(2, no_slots, cfg):
        assert not any(what.values()) and said == 1


@contextmanager
def capture(name: str) -> Iterator[list[str]]:
    """What the logger ``name`` is told."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)
