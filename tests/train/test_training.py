"""Training on one rank: what options may change, and what they must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from tokenizers.processors import TemplateProcessing
from torch import nn

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.data.prepare import prepare
from moetrain.train.generate import generate
from moetrain.train.step import clip_gradients, norms_of_parts
from moetrain.train.trainer import Trainer

TINY = [
    "experiment=demo",
    "parallel.ep=1",
    "model.dim=32",
    "model.n_layers=2",
    "model.moe.expert_dim=32",
    "train.seq_len=32",
    "train.global_batch=8",
    "train.micro_batch=8",
    "train.steps=12",
    "train.eval_sequences=4",
    "schedule.warmup_steps=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    prepare(load(folder).data, progress=False)
    return folder


def load(folder: Path, *overrides: str) -> config.Config:
    return config.load([*TINY, f"data.dir={folder / 'prepared'}", f"run_dir={folder / 'run'}", *overrides])


def build(cfg: config.Config) -> Trainer:
    return Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))


def losses(cfg: config.Config) -> list[float]:
    trainer = build(cfg)
    return [trainer.train_step()["loss"] for _ in range(cfg.train.steps)]


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[float]:
    return run_ranks(1, losses, load(folder))[0]


def test_the_loss_falls(reference: list[float]) -> None:
    assert reference[-1] < reference[0] - 0.2


def test_bf16_follows_float32(folder: Path, reference: list[float]) -> None:
    """float32 weights and reductions keep bf16 within its own rounding (2^-8) of the curve."""
    assert run_ranks(1, losses, load(folder, "train.precision=bf16"))[0] == pytest.approx(reference, rel=2**-8)


def test_experts_in_fp8_follow_float32(folder: Path, reference: list[float]) -> None:
    """Each number is rounded to 4 bits, a loss is the mean of very many: far within the 0.25% that DeepSeek-V3 found
    (arXiv 2412.19437, section 3.3), and not the same."""
    for precision in ("float32", "bf16"):
        curve = run_ranks(1, losses, load(folder, "experts.fp8=true", f"train.precision={precision}"))[0]
        assert curve == pytest.approx(reference, rel=0.0005), precision
        assert curve != pytest.approx(reference, rel=1e-6), precision


def test_compile_changes_nothing_but_rounding(folder: Path, reference: list[float]) -> None:
    curve = run_ranks(1, losses, load(folder, "train.compile=true"), timeout=300)[0]
    assert curve == pytest.approx(reference, rel=1e-4)


def test_capacity_drops_are_counted(folder: Path) -> None:
    def dropped(cfg: config.Config) -> Any:
        trainer = build(cfg)
        trainer.train_step()
        return trainer.last_loads.dropped, {k: v.tolist() for k, v in trainer.last_loads.counts.items()}

    cfg = load(folder, "model.moe.capacity_factor=1.0")
    got, counts = run_ranks(1, dropped, cfg)[0]
    tokens, k, experts = 8 * 32, 2, 8
    for name, load_E in counts.items():
        assert got[name] == sum(max(0, n - tokens * k // experts) for n in load_E)
        assert got[name] > 0


def test_generation_is_the_same_on_every_rank(folder: Path) -> None:
    def text(cfg: config.Config) -> str:
        trainer = build(cfg)
        return generate(trainer.engine, trainer.data, "It was", 6, 0.8, seed=3)

    two = run_ranks(2, text, load(folder, "parallel.ep=2", "train.micro_batch=4"))
    assert two[0] == two[1] and two[0].startswith("It was") and len(two[0]) > len("It was")
    assert run_ranks(1, text, load(folder))[0] == two[0]


def test_a_sample_is_read_as_the_text_of_the_data_is(folder: Path) -> None:
    """What a tokenizer would put around a prompt never stood in the data; no prompt is the start of a document."""

    def texts(cfg: config.Config) -> list[str]:
        trainer = build(cfg)
        told = [generate(trainer.engine, trainer.data, prompt, 6, 0, seed=3) for prompt in ("It was", "")]
        tokenizer = trainer.data.tokenizer()
        eos = tokenizer.id_to_token(trainer.data.eos_id)
        around = TemplateProcessing(single=f"{eos} $A {eos}", special_tokens=[(eos, trainer.data.eos_id)])
        tokenizer.post_processor = around
        trainer.data.tokenizer = lambda: tokenizer  # type: ignore[method-assign]
        return [*told, *(generate(trainer.engine, trainer.data, prompt, 6, 0, seed=3) for prompt in ("It was", ""))]

    prompted, alone, *around = run_ranks(1, texts, load(folder))[0]
    assert around == [prompted, alone] and prompted.startswith("It was")


@pytest.mark.parametrize("size", [0, 5, 2**14, 2**22 + 3])
def test_the_norm_of_a_gradient_is_as_exact_as_its_dtype_and_the_same_for_any_number_of_threads(size: int) -> None:
    """torch's own, of a tensor of millions of numbers in float32, is not: one sum loses what is small beside it.

    Threads not in a forked rank: where another test of this process has used some, OpenMP waits for them in a fork."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.empty(size))
    layer.weight.grad = grad = torch.randn(size, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(norms_of_parts([grad]).square().sum().sqrt().item())
    torch.set_num_threads(before)
    [one, two, five] = found
    [of_a_model] = run_ranks(1, lambda: clip_gradients(layer, 0.0, 1))
    assert one == two == five == pytest.approx(grad.double().norm().item(), rel=2e-6)
    assert of_a_model == pytest.approx(one, rel=2e-6)
