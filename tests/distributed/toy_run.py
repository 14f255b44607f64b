"""A toy run on two tiny domains of text, which the distributed tests train under their mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.train.trainer import Trainer

STEPS = 20
BASE = [
    "model.vocab_size=300",
    "model.dim=24",
    "model.n_layers=2",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.attention.head_dim=8",
    "model.attention.backend=math",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.expert_dim=16",
    "model.moe.shared_dim=16",
    "model.dense_dim=32",
    "model.init_std=0.1",
    f"train.steps={STEPS}",
    "train.seq_len=16",
    "train.global_batch=8",
    "train.eval_sequences=4",
    "log.tensorboard=false",
    "log.progress=false",
    "optim.lr=0.003",
]
SOFTMAX = ["model/router=softmax_topk", "balance=[aux_loss,z_loss]", "balance.aux_loss.scope=step"]
SEQUENCE = ["model/router=softmax_topk", "balance=[aux_loss]", "balance.aux_loss.scope=sequence"]
SIGMOID = [
    "model/router=sigmoid_group",
    "model.router.n_groups=4",
    "model.router.topk_groups=2",
    "balance=[bias]",
    "balance.bias.rate=0.01",
]


def load(folder: Path, overrides: list[str]) -> config.Config:
    sources = [f"data.sources.{name}={{paths:['{folder / name}.txt']}}" for name in ("letters", "digits")]
    data = ["data=own", "data.name=toy", f"data.dir={folder / 'prepared'}", "data.tokenizer.vocab_size=300", *sources]
    return config.load([*BASE, *data, f"run_dir={folder / 'run'}", *overrides])


def one_step(trainer: Trainer) -> dict[str, Any]:
    """Losses, gradient norm and loads of the next step."""
    numbers = {k: v for k, v in trainer.train_step().items() if k == "grad_norm" or "loss" in k}
    return numbers | {"loads": [counts.tolist() for counts in trainer.last_loads.counts.values()]}


def train(cfg: config.Config, folder: Path) -> dict[str, Any]:
    """Curves of a run on this rank: what every rank reports must be the same."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), folder / "run")
    return {"rows": [one_step(trainer) for _ in range(STEPS)], "val_loss": trainer.evaluate().loss}
