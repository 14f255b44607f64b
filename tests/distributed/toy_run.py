"""A toy run on two tiny domains of text, which the distributed tests train under their mappings."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.data.toy import toy_data
from moetrain.train import parity
from moetrain.train.parity import Curve
from moetrain.train.trainer import Trainer

STEPS = 20
BASE = [
    "model.vocab_size=300",
    "model.dim=24",
    "model.n_layers=4",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.attention.head_dim=8",
    "model.attention.backend=math",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.expert_dim=16",
    "model.moe.shared_dim=16",
    "model.moe.first_dense=1",
    "model.dense_dim=32",
    "model.init_std=0.1",
    f"train.steps={STEPS}",
    "train.seq_len=16",
    "train.global_batch=8",
    "train.eval_sequences=4",
    "log.tensorboard=false",
    "log.progress=false",
    "optim.lr=0.003",
    "schedule.warmup_steps=2",
]
SOFTMAX = ["model/router=softmax_topk", "balance=[aux_loss,z_loss]", "balance.aux_loss.scope=step"]
SIGMOID = [
    "model/router=sigmoid_group",
    "model.router.n_groups=4",
    "model.router.topk_groups=2",
    "balance=[bias]",
    "balance.bias.rate=0.01",
]


def load(folder: Path, overrides: list[str]) -> config.Config:
    """The toy run with ``overrides``, on the prepared text in ``folder``."""
    cfg = config.load([*BASE, f"run_dir={folder / 'run'}", *overrides])
    cfg.data = toy_data(folder, cfg.data.document_mask)
    return cfg


def one_step(trainer: Trainer) -> dict[str, Any]:
    """Losses, gradient norm and loads of the next step."""
    row, loads = parity.one_step(trainer)
    return {**row, "loads": loads}


@functools.cache
def alone(folder: Path, overrides: tuple[str, ...]) -> Curve:
    """The curve of one process, with the oracles: made once for each choice of settings."""
    return run_ranks(1, parity.curve, parity.one_process(load(folder, list(overrides)), 1), timeout=300)[0]
