"""Proof that a mapping changes nothing: its curves beside those of one process, on a small copy of the model.

The one process computes with the oracles: experts in a loop, attention written out.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moetrain.config.check import check_config, check_mapping, resolve_sizes
from moetrain.config.errors import ConfigError, TrainError
from moetrain.config.registry import DISPATCHERS, PLACEMENTS
from moetrain.config.schema import Config, ParallelConfig
from moetrain.config.shrink import shrink, shrunken
from moetrain.data.prepare import prepare
from moetrain.data.toy import toy_data
from moetrain.moe.dispatch.lsh import LshOptions
from moetrain.train import runtime
from moetrain.train.trainer import Trainer
from moetrain.train.whole import whole_weights

# Largest relative difference by precision. In bf16 sums are rounded in another order: noise, which grows from step to
# step as it does between two orders of one process.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Curve:
    """One run. rows: figures of each step by name, "grad_norm" and all that have "loss" in their name. loads: rows of
    each expert, by step and MoE layer. weights: whole, after the last step, by name, on the first rank."""

    rows: list[dict[str, float]]
    loads: list[list[list[int]]]
    val_loss: float
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Differences:
    """Largest relative differences of two curves, over all steps and ranks. aux_rel: of auxiliary losses. weights_rel:
    of any weight, relative to the largest of its tensor. loads_equal: every count of every expert."""

    loss_rel: float
    aux_rel: float
    grad_norm_rel: float
    val_loss_rel: float
    weights_rel: float
    loads_equal: bool

    def within(self, tolerance: float, exact: bool = True) -> bool:
        """Whether nothing differs by more than ``tolerance`` (weights: 100 times that). exact: loads are equal."""
        figures = (self.loss_rel, self.aux_rel, self.grad_norm_rel, self.val_loss_rel, self.weights_rel / 100)
        return max(figures) <= tolerance and (self.loads_equal or not exact)


def of_small_copy(cfg: Config, world: int, steps: int, own_precision: bool, console: Console) -> dict[str, Any]:
    """Prove ``cfg`` on ``world`` ranks by ``steps`` steps of a small copy, and show both curves; ``summary``'s figures.

    own_precision: in that of ``cfg``; else in the most exact one that the engine has. Raises TrainError, ConfigError.
    """
    small = shrink(cfg, resolve_sizes(cfg.parallel, world))
    small.train.steps = steps
    if not own_precision:
        small.train.precision = "float32" if cfg.parallel.engine == "deepspeed" else "float64"
    logging.getLogger("moetrain").setLevel(logging.WARNING)
    print(f"a small copy of {cfg.model.name} on {world} ranks: {shrunken(cfg, small)}", flush=True)
    if any(small.model.layer_value("capacity_factor", layer) is not None for layer in small.model.moe_layers()):
        print("model.moe.capacity_factor drops rows rank by rank: the losses will differ; prove the mapping with null")
    mapped, alone = prove(small, world)
    console.print(as_table(mapped[0], alone))
    return summary(differences(mapped, alone), small, world)


def prove(small: Config, world: int, timeout: float = 900) -> tuple[list[Curve], Curve]:
    """(curves of all ranks of ``small`` on ``world`` ranks, curve of one process). Raises TrainError.

    small: a config whose model a CPU steps quickly. Trains on toy text for ``train.steps`` steps on this machine's CPU.
    """
    if isinstance(small.dispatch, LshOptions):
        raise ConfigError(
            "dispatch=lsh changes the function with the mapping; prove the mapping with dispatch=all_to_all"
        )
    with tempfile.TemporaryDirectory(prefix="moetrain-parity-") as folder:
        small = copy.deepcopy(small)
        small.data = toy_data(Path(folder), small.data)
        small.run_dir, small.device = str(Path(folder) / "run"), "cpu"
        check_config(small)
        check_mapping(small, world)
        prepare(small.data)
        try:
            mapped = run_ranks(world, curve, small, timeout=timeout)
            [alone] = run_ranks(1, curve, one_process(small, world), timeout=timeout)
        except (RuntimeError, TimeoutError) as error:
            text = str(error).strip()
            raise TrainError(f"{text.splitlines()[0]} {text.splitlines()[-1]}") from error
    return mapped, alone


def one_process(cfg: Config, world: int) -> Config:
    """``cfg`` for one process and the oracles, with the whole batch at once; in as many micro-batches as under ``cfg``
    where their number matters (a balance loss of scope micro_batch)."""
    alone = copy.deepcopy(cfg)
    p, t = alone.parallel, alone.train
    counts = any(getattr(options, "scope", "") == "micro_batch" for options in cfg.balance.values())
    n = resolve_sizes(p, world).micro_batches(cfg) if counts else 1
    t.micro_batch, t.recompute, t.compile = t.global_batch // n, "none", False
    alone.parallel = ParallelConfig()
    if p.engine == "deepspeed":
        t.precision = "float64"  # the torch engine at its most exact
    alone.experts.backend, alone.experts.overlap = "loop", False
    alone.model.attention.backend = "math"
    alone.dispatch = DISPATCHERS.get("auto").options()
    alone.experts.placement = PLACEMENTS.get("ep").options()
    return alone


def curve(cfg: Config) -> Curve:
    """Train ``cfg`` for ``train.steps`` steps on this rank of a process group that there is. Collective."""
    runtime.quiet()
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    rows, loads = [], []
    for _ in range(cfg.train.steps):
        row, counts = one_step(trainer)
        rows.append(row)
        loads.append(counts)
    val_loss = trainer.evaluate().loss
    weights = dict(whole_weights(trainer.engine, trainer.dims))
    return Curve(rows, loads, val_loss, weights)


def one_step(trainer: Trainer) -> tuple[dict[str, float], list[list[int]]]:
    """(losses and gradient norm, loads by MoE layer) of the next step."""
    figures = trainer.train_step()
    row = {k: v for k, v in figures.items() if k == "grad_norm" or "loss" in k}
    return row, [counts.tolist() for counts in trainer.last_loads.counts.values()]


def differences(mapped: Sequence[Curve], alone: Curve) -> Differences:
    """How the curves of all ranks differ from that of one process."""
    losses, aux, norms = [0.0], [0.0], [0.0]
    for rank in mapped:
        for got, want in zip(rank.rows, alone.rows, strict=True):
            for key in want:
                kind = {"loss": losses, "grad_norm": norms}.get(key, aux)
                kind.append(relative(got[key], want[key]))
    weights = [0.0, *_of_weights(mapped[0].weights, alone.weights)]
    return Differences(
        max(losses),
        max(aux),
        max(norms),
        max(relative(rank.val_loss, alone.val_loss) for rank in mapped),
        max(weights),
        all(rank.loads == alone.loads for rank in mapped),
    )


def relative(got: float, want: float) -> float:
    """|got - want| / |want|; infinite where one is not a number or both signs of zero do not meet."""
    if got == want:
        return 0.0
    difference = abs(got - want) / abs(want) if want else math.inf
    return difference if math.isfinite(difference) else math.inf


def _of_weights(got: dict[str, Tensor], want: dict[str, Tensor]) -> Iterator[float]:
    if got.keys() != want.keys():
        yield math.inf
        return
    for name, b in want.items():
        a, b = got[name].double(), b.double()
        if a.shape != b.shape:
            yield math.inf
        elif a.numel():
            yield float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def as_table(mapped: Curve, alone: Curve) -> Table:
    """Both curves, step by step."""
    table = Table(box=None, pad_edge=False)
    for title in ("step", "loss", "one process", "difference", "gradient norm", "one process", "difference", "loads"):
        table.add_column(title, justify="right")
    steps = zip(mapped.rows, alone.rows, mapped.loads, alone.loads, strict=True)
    for step, (got, want, loads, expected) in enumerate(steps, 1):
        cells = [str(step)]
        for key in ("loss", "grad_norm"):
            cells += [f"{got[key]:.9f}", f"{want[key]:.9f}", f"{relative(got[key], want[key]):.1e}"]
        table.add_row(*cells, "equal" if loads == expected else "differ")
    return table


def summary(found: Differences, cfg: Config, world: int) -> dict[str, Any]:
    """``found`` for the last line of ``moetrain parity``; null where a figure is no number, which is never within."""
    tolerance = TOLERANCE[cfg.train.precision]
    ok = found.within(tolerance, exact=cfg.train.precision != "bf16")
    return {
        **{name: value if math.isfinite(value) else None for name, value in asdict(found).items()},
        "tolerance": tolerance,
        "precision": cfg.train.precision,
        "steps": cfg.train.steps,
        "world": world,
        "within": ok,
    }
