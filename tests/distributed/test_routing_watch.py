"""What an evaluation says of the routers: against their own formula, and the same whatever ranks hold the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.moe.layer import MoELayer
from moetrain.report.read import Run, read_run
from moetrain.train import step
from moetrain.train.metrics import load_metrics
from moetrain.train.routing import RoutingWatch
from moetrain.train.trainer import Trainer
from tests.distributed.toy_run import load


def watched(folder: Path, name: str, world: int, *overrides: str) -> Run:
    """The run directory of 2 steps, evaluated after each."""

    def work(cfg: config.Config) -> None:
        run_dir = Path(cfg.run_dir)
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), run_dir)
        trainer.fit()

    settings = ["train.steps=2", "train.eval_every=1", "train.precision=float64", "checkpoint.at_end=false"]
    cfg = load(folder, [*settings, f"run_dir={folder / name}", *overrides])
    run_ranks(world, work, cfg)
    return read_run(folder / name)


@pytest.fixture(scope="module")
def alone(prepared: Path) -> Run:
    return watched(prepared, "alone", 1)


@pytest.mark.parametrize(
    ("world", "mapping"),
    [
        (2, ["parallel.ep=2"]),
        (4, ["parallel.tp=2", "parallel.cp=2", "parallel.ep=4"]),
        (4, ["parallel.pp=2", "parallel.tp=2", "train.micro_batch=2"]),
    ],
    ids=["ep", "tp-cp", "pp-tp"],
)
def test_no_mapping_changes_it(prepared: Path, alone: Run, world: int, mapping: list[str]) -> None:
    run = watched(prepared, "-".join(mapping).replace("=", ""), world, *mapping)
    assert [r.step for r in run.routing] == [1, 2]
    for mine, theirs in zip(run.routing, alone.routing, strict=True):
        assert mine.layers == theirs.layers == [1, 2, 3] and mine.domains == theirs.domains
        assert (mine.counts_LGE == theirs.counts_LGE).all()
        assert (mine.token_T == theirs.token_T).all() and (mine.ids_LTK == theirs.ids_LTK).all()
    for n in range(3):
        key = f"router_entropy_by_layer/{n}"
        assert run.series(key)[1] == pytest.approx(alone.series(key)[1], rel=1e-9)
    assert run.loads == alone.loads
    assert run.series("read_by_domain/a") == alone.series("read_by_domain/a")


def test_it_counts_every_held_out_token_and_keeps_a_sample(alone: Run) -> None:
    """Choices of a layer: top_k = 2 of each target; the sample has all tokens here, for they are few."""
    routing = alone.routing[-1]
    assert (routing.counts_LGE.sum((1, 2)) == 2 * len(routing.token_T)).all()
    for n in range(3):
        assert (np.bincount(routing.ids_LTK[n].ravel(), minlength=8) == routing.counts_LGE[n].sum(0)).all()
    assert sum(sum(row["counts"]["layers.1.moe"]) for row in alone.loads) == 2 * 2 * 8 * 16


def test_what_is_counted_on_the_accelerator_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With parallel.offload=all parameters are in host memory and loads are not. The meta device is the accelerator."""
    model, dims = torch.nn.Linear(2, 2), MagicMock()
    dims.dense.device_type, dims.sizes.pp = "meta", 2
    data = MagicMock(domains=["a"], sources=["a"])
    watch = RoutingWatch(model, ModelConfig(n_layers=1), data, dims, 8)
    assert watch.counts_LGE.is_meta and watch.entropy_L.is_meta and watch.tokens_L.is_meta
    summed: list[torch.Tensor] = []
    monkeypatch.setattr(step.dist, "all_reduce", lambda total, group: summed.append(total))
    step.all_loads(model, ModelConfig(n_layers=2, moe=MoEConfig(num_experts=0)), dims, 0)
    assert [total.is_meta for total in summed] == [True]


def test_entropy_is_that_of_the_probabilities(prepared: Path) -> None:
    """Against softmax and logarithms in numpy, of the vectors that went into each router."""

    def work(cfg: config.Config) -> tuple[list[float], list[float]]:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, 1), Path(cfg.run_dir))
        seen: dict[int, list[float]] = {}
        watch = RoutingWatch(trainer.engine.model, cfg.model, trainer.data, trainer.dims, cfg.train.seq_len)

        def look(router: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().double()[watch.valid_T].numpy()
            logits = x @ router.weight.detach().double().clone().numpy().T
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            seen.setdefault(router.layer, []).extend((-(p * np.log(p)).sum(1) / np.log(8)).tolist())

        for module in trainer.engine.model.modules():
            if isinstance(module, MoELayer):
                module.router.register_forward_pre_hook(look)
        with watch.on():
            trainer.evaluate(watch=watch)
        Path(cfg.run_dir).mkdir(exist_ok=True)
        found = watch.collect(0, Path(cfg.run_dir))["router_entropy_by_layer"]
        return found, [float(torch.tensor(values).double().mean()) for _, values in sorted(seen.items())]

    cfg = load(prepared, ["train.precision=float64", f"run_dir={prepared / 'entropy'}"])
    found, expected = run_ranks(1, work, cfg)[0]
    assert found == pytest.approx(expected, rel=1e-6) and min(found) > 0.5 and max(found) < 1


@pytest.mark.parametrize(("world", "words"), [(2, ["parallel.pp=2"]), (4, ["parallel.tp=2", "parallel.cp=2"])])
def test_drops_by_position_add_up_under_every_split(world: int, words: list[str], prepared: Path) -> None:
    """Early tokens are kept first, on each rank: of a rank's stretch the first half, wherever it stands."""
    words = [*words, "model.moe.capacity_factor=0.5", "model.moe.drop_policy=position", "train.micro_batch=1"]
    cfg = load(prepared, [*words, "train.global_batch=4", f"run_dir={prepared / f'drops-{world}'}"])

    def step() -> dict[str, Any]:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, world), Path(cfg.run_dir))
        trainer.train_step()
        return load_metrics(trainer.last_loads)

    found = run_ranks(world, step)
    assert all(other == found[0] for other in found)
    by_position = found[0]["dropped_by_position"]
    assert np.mean(by_position) == pytest.approx(found[0]["dropped_share"]) and found[0]["dropped_share"] > 0.3
    # Of eighths 0 to 7, cp=2 gives 0, 1, 6, 7 to one rank and 2 to 5 to the other; tp=2 halves each of these.
    first, last = ([0, 2, 4, 6], [1, 3, 5, 7]) if world == 4 else ([0, 1], [6, 7])
    assert sum(by_position[i] for i in first) < sum(by_position[i] for i in last)
