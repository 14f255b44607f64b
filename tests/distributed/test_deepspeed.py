"""DeepSpeed as the engine: the same loss as one process of the torch engine, and checkpoints that go either way.

float32: loss, auxiliary losses and gradient norm of 20 steps within 1e-5 relative of the float64 run of one process,
expert loads exactly equal. DeepSpeed's float32 masters allow no more; what is reached is 3e-7.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.config.check_deepspeed import check_deepspeed
from moetrain.config.errors import ConfigError
from moetrain.train import parity
from moetrain.train.engine_deepspeed import DeepSpeedEngine
from moetrain.train.trainer import Trainer
from tests.distributed import toy_run
from tests.distributed.test_resume_elsewhere import resume, save_half_way
from tests.distributed.toy_run import STEPS, alone, check_float32, curve_of, load, one_step

# One dense layer and two of experts.
SIGMOID, SOFTMAX = ([*choice, "model.n_layers=3"] for choice in (toy_run.SIGMOID, toy_run.SOFTMAX))


def ds(zero: int, *overrides: str) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.zero={zero}", *overrides]


# name, world, overrides: what the table of mappings does not have, clipping and 4 data ranks
EP, EDP = "parallel.ep=2", "train.micro_batch=1"
CLIP = ["train.clip_norm=0.3", "optim.eps=0.01"]  # without a large eps AdamW does not care how long a gradient is
CASES: list[tuple[str, int, list[str]]] = [
    ("zero 2, ep 2, accumulate 2, clip", 2, ds(2, EP, "train.micro_batch=2", *CLIP)),
    ("zero 2, dp 2, no clip", 2, ds(2, "train.micro_batch=2", "train.clip_norm=0")),
    ("zero 1, edp 2 x ep 2, accumulate 2, clip", 4, ds(1, EP, EDP, *CLIP)),
    ("zero 2, edp 2 x ep 2, offload", 4, ds(2, EP, EDP, "parallel.offload=optimizer")),
    ("zero 3, edp 2 x ep 2, offload all, clip", 4, ds(3, EP, EDP, "parallel.offload=all", *CLIP)),
    ("zero 3, ep 4", 4, ds(3, "parallel.ep=4", "train.micro_batch=2", "train.recompute=selective")),
]
NAMES = [name for name, _, _ in CASES]


def train(cfg: config.Config) -> list[dict[str, Any]]:
    """Losses, gradient norms and loads of 20 steps."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    assert isinstance(trainer.engine, DeepSpeedEngine) == (cfg.parallel.engine == "deepspeed")
    return [one_step(trainer) for _ in range(STEPS)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_the_same_loss(prepared: Path, number: int) -> None:
    """Softmax routing with auxiliary losses and sigmoid routing with the bias take turns."""
    _, world, overrides = CASES[number]
    common = [*(SOFTMAX, SIGMOID)[number % 2], "model.n_layers=2"]
    optimizer = [o for o in overrides if o.startswith(("train.clip_norm", "optim."))]
    one = alone(prepared, (*common, *optimizer, "train.precision=float64"))
    check_float32(run_ranks(world, parity.curve, load(prepared, [*common, *overrides]), timeout=120), one)


@pytest.mark.parametrize("zero", [1, 3])
def test_samples_are_the_same_on_every_rank(prepared: Path, zero: int) -> None:
    cfg = load(prepared, [*SIGMOID, *ds(zero, EP, "train.micro_batch=4")])
    one, other = run_ranks(2, logits, cfg)
    assert one == other


def logits(cfg: config.Config) -> list[float]:
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    trainer.train_step()
    found: list[float] = trainer.engine.next_logits(torch.arange(8)[None], 7).tolist()
    return found


def test_bf16_equals_the_torch_engine(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same casts: float32 weights, bfloat16 computation. The first steps are equal, until a sum in another order
    rounds to a neighbour; rounded master weights are 1e-3 off from the second step on. Without the compiled kernels,
    which give float32 weights gradients that were never rounded: DeepSpeed's experts have bfloat16 weights."""
    monkeypatch.setenv("MOE_KERNELS_NATIVE", "0")
    common = [*SIGMOID, "model.n_layers=2", "train.precision=bf16", EP, EDP, "schedule.warmup_steps=0"]
    want = run_ranks(2, train, load(prepared, common), timeout=300)[0]
    for zero in (1, 2, 3):
        got = run_ranks(2, train, load(prepared, [*common, *ds(zero)]), timeout=300)[0]
        for step in range(STEPS):
            tolerance = 1e-5 if step < 8 else 2e-2
            assert got[step]["loss"] == pytest.approx(want[step]["loss"], rel=tolerance), step


@pytest.mark.parametrize(("zero", "world"), [(1, 2), (2, 4), (3, 4)])
def test_checkpoint_goes_on_under_torch(prepared: Path, zero: int, world: int) -> None:
    """DeepSpeed saves; the torch engine resumes on one rank, and on two with ep 2."""
    cfg = load(prepared, [*SIGMOID, *ds(zero, EP, "train.micro_batch=2")])
    expected = run_ranks(world, save_half_way, cfg, timeout=300)[0]
    for ranks, mapping in ((1, ["train.micro_batch=8"]), (2, [EP, "train.micro_batch=4"])):
        check_float32(
            [curve_of(rows) for rows in run_ranks(ranks, resume, load(prepared, [*SIGMOID, *mapping]), timeout=300)],
            curve_of(expected),
        )
    shutil.rmtree(prepared / "run")


def test_checkpoint_of_torch_goes_on_under_deepspeed(prepared: Path) -> None:
    """The torch engine saves on edp 2 x ep 2; DeepSpeed resumes on other sizes at every stage."""
    cfg = load(prepared, [*SIGMOID, EP, "train.micro_batch=2"])
    expected = run_ranks(4, save_half_way, cfg, timeout=300)[0]
    for world, overrides in (
        (2, ds(1, EP, "train.micro_batch=4")),
        (2, ds(2, "train.micro_batch=2", "parallel.offload=optimizer")),
        (4, ds(3, EP, "train.micro_batch=2")),
        (1, ds(3, "train.micro_batch=8")),
        (4, ds(2, "parallel.ep=4", "train.micro_batch=1")),
    ):
        check_float32(
            [curve_of(rows) for rows in run_ranks(world, resume, load(prepared, [*SIGMOID, *overrides]), timeout=300)],
            curve_of(expected),
        )
    shutil.rmtree(prepared / "run")


@pytest.mark.parametrize("zero", [1, 3])
def test_checkpoint_of_bf16_keeps_float32_weights(prepared: Path, zero: int) -> None:
    """Resumed by the same engine: bit for bit, which bfloat16 weights in the checkpoint would not be."""
    cfg = load(prepared, [*SOFTMAX, *ds(zero, EP, "train.micro_batch=2", "train.precision=bf16")])
    expected = run_ranks(2, save_half_way, cfg)[0]
    assert run_ranks(2, resume, cfg)[0] == expected
    shutil.rmtree(prepared / "run")


def poisoned(cfg: config.Config, loss_too: bool) -> tuple[float, float, bool]:
    """(loss, gradient norm, whether the state is as before) of a step with an infinite gradient, or loss as well."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    engine = trainer.engine
    trainer.train_step()
    before = flat(engine.state({}))
    forward = engine.model.output

    def output(x_BSD: Tensor, *args: Any) -> Tensor:
        if loss_too:
            return forward(x_BSD * math.inf, *args)
        x_BSD.register_hook(lambda grad: grad * math.inf)
        return forward(x_BSD, *args)

    engine.model.output = output  # type: ignore[method-assign, assignment]
    figures = engine.train_step(trainer.loader.step(1), 1, 1.0)
    after = flat(engine.state({}))
    return figures.loss, figures.grad_norm, all(torch.equal(before[key], after[key]) for key in before)


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    parts = {**state["model"], **{f"optim.{key}": value for key, value in state["optim"].items()}}
    return {k: (v.to_local() if isinstance(v, DTensor) else v).clone() for k, v in parts.items() if "counts" not in k}


@pytest.mark.parametrize(("zero", "precision"), [(1, "float32"), (1, "bf16"), (2, "bf16"), (3, "float32")])
def test_a_bad_step_leaves_everything_alone(prepared: Path, zero: int, precision: str) -> None:
    cfg = load(prepared, [*SIGMOID, *ds(zero, EP, "train.micro_batch=4", f"train.precision={precision}")])
    for loss_too in (False, True):
        for loss, norm, unchanged in run_ranks(2, poisoned, cfg, loss_too):
            assert math.isfinite(loss) is not loss_too
            assert not math.isfinite(norm)
            assert unchanged


@pytest.mark.parametrize(
    ("overrides", "world", "says"),
    [
        (["parallel.pp=2"], 2, "parallel.pp=2"),
        (["parallel.tp=2"], 2, "parallel.tp=2"),
        (["parallel.cp=2"], 2, "parallel.cp=2"),
        (["parallel.etp=2"], 2, "parallel.etp=2"),
        (["parallel.dp_replicate=2"], 2, "parallel.dp_replicate=2"),
        (["optim=muon"], 1, "optim=muon"),
        (["train.precision=float64"], 1, "train.precision=float64"),
        (["train.compile=true"], 1, "train.compile=true"),
        (["train.freeze=[embed.*]"], 1, "parallel.engine=deepspeed trains every parameter"),
        (["parallel.offload=all"], 1, "parallel.zero=3"),
        (["parallel.nvme=/disk", "parallel.offload=optimizer", "parallel.zero=2"], 1, "parallel.nvme=/disk"),
        (["parallel.nvme=/disk", "parallel.zero=3"], 1, "parallel.offload=none"),
        (["parallel.nvme=/disk", "parallel.zero=3", "parallel.offload=all"], 1, "train.precision=bf16"),
        (["parallel.engine=torch", "parallel.nvme=/disk"], 1, "parallel.engine=deepspeed"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(overrides: list[str], world: int, says: str) -> None:
    cfg = config.load(["experiment=demo", "parallel.ep=1", "parallel.engine=deepspeed", *overrides])
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")) as caught:
        check_deepspeed(cfg, resolve_sizes(cfg.parallel, world))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [None, "0.18.4"])
def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def find(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    cfg = config.load(["experiment=demo", "parallel.ep=1", "parallel.engine=deepspeed"])
    check_deepspeed(cfg, resolve_sizes(cfg.parallel, 1))
    monkeypatch.setattr(metadata, "version", find)
    with pytest.raises(ConfigError, match=r"pip install 'deepspeed==0\.19\.\*'"):
        check_deepspeed(cfg, resolve_sizes(cfg.parallel, 1))


@pytest.fixture(autouse=True)
def no_extension_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DeepSpeed compiles extensions at their first use, for minutes; none may be needed here."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    yield
    assert not (tmp_path / "extensions").exists()
