"""What can be refused before a rank starts: data that does not fit the model, an export that no class could hold."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.checkpoint.layout import steps
from moetrain.config.check import resolve_sizes
from moetrain.config.errors import CheckpointError, DataError
from moetrain.config.schema import Config
from moetrain.convert.family import family_of
from moetrain.convert.open import check_init, has_optimizer, open_weights
from moetrain.data.asked import Asked, ask, domains_of
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Loader
from moetrain.data.manifest import Manifest
from moetrain.data.objectives import Objective, build_objective
from moetrain.data.packing import pack
from moetrain.data.position import refuse_other_order, saved_position
from moetrain.data.sampler import Sampler
from moetrain.mixture.online import build_mixer
from moetrain.parallel.freeze import frozen_sizes
from moetrain.parallel.mesh import ParallelDims


def preflight(cfg: Config, resume: bool = False) -> None:
    """Check prepared data and export of ``cfg``, and whether it can go on with the run in ``cfg.run_dir``. Collective.
    Raises a UserError for what could not work later."""
    data = open_data(cfg)
    sampler, _ = open_sampler(cfg, data)
    open_objective(cfg, data)
    saved = _saved(cfg) if resume else None
    if saved is not None:
        refuse_other_order(sampler, saved)
    if sampler.end is not None and sampler.end < cfg.train.global_batch:
        raise DataError(
            f"the data runs out after {sampler.end} samples, before one step of {cfg.train.global_batch}; raise "
            "max_epochs, give more text, or set data.exhausted=repeat"
        )
    build_mixer(cfg, sampler)
    world = dist.get_world_size() if dist.is_initialized() else cfg.launch.world
    frozen_sizes(cfg, resolve_sizes(cfg.parallel, world))
    if cfg.export.at_end:
        family_of(cfg.model, "bias" in cfg.balance)
    if cfg.init is not None and not (resume and steps(Path(cfg.run_dir) / "checkpoints")):
        opened = open_weights(cfg.init, verify=False)
        check_init(cfg, opened)
        if cfg.init_optimizer and not has_optimizer(opened):
            raise CheckpointError(f"init_optimizer=true, but {opened.path} has no optimizer state; take it out")


def began_with(cfg: Config) -> dict[str, str] | None:
    """Source -> SHA-256 of the training tokens that the run in ``cfg.run_dir`` began with; None where no checkpoint
    says so. Collective."""
    saved = _saved(cfg)
    return None if saved is None else {name: source["sha256"] for name, source in saved["sources"].items()}


def _saved(cfg: Config) -> dict[str, Any] | None:
    with suppress(CheckpointError):  # the resume itself looks for a whole one and says what is wrong
        return saved_position(Path(cfg.run_dir))
    return None


def open_data(cfg: Config) -> TokenData:
    """The run's prepared data. Raises DataError."""
    return TokenData.open(cfg.data.dir, vocab_size=cfg.model.vocab_size, domain_of=domains_of(cfg.data))


def refuse_replaced(data: TokenData, prepared: Manifest) -> None:
    """Raise DataError where ``data`` is not what was ``prepared`` for this run: a job with other settings may put its
    own in the same folder before this one has opened it."""
    if data.manifest.fingerprint != prepared.fingerprint:
        raise DataError(
            f"'{data.dir}' was replaced by another job, whose data settings differ, while this one started; give each "
            f"a data.dir of its own"
        )


def open_sampler(cfg: Config, data: TokenData) -> tuple[Sampler, Asked]:
    """The run's sampler over ``data``, and what the config asks of it. Raises DataError."""
    asked = asked_of(cfg, data)
    first, *schedule = asked.phases
    caps, exhausted = asked.max_epochs, asked.exhausted
    seq_len = cfg.train.seq_len
    sampler = Sampler(
        data,
        cfg.seed,
        first.weights,
        seq_len,
        windows=pack(data, seq_len) if cfg.data.packing == "best_fit" else None,
        schedule=schedule,
        max_epochs=caps,
        exhausted=exhausted,
    )
    return sampler, asked


def open_objective(cfg: Config, data: TokenData) -> Objective | None:
    """What rewrites the run's samples; None for next tokens. Raises DataError."""
    return build_objective(cfg.data, data.tokenizer(), data.eos_id, cfg.train.seq_len, cfg.seed)


def open_loader(cfg: Config, dims: ParallelDims, data: TokenData, sampler: Sampler, device: torch.device) -> Loader:
    """What brings this rank's batches, on pages that a GPU can copy from where there is one. Raises DataError."""
    objective, batch = open_objective(cfg, data), (cfg.train.global_batch, cfg.train.micro_batch)
    share, pin = (dims.data_rank, dims.data_size), device.type == "cuda"
    return Loader(data, sampler, *batch, *share, cfg.data.workers, cfg.data.document_mask, pin, objective)


def asked_of(cfg: Config, data: TokenData, step: int = 0, sample: int = 0) -> Asked:
    """What the config asks of the mixture, in a run whose step ``step`` begins with sample ``sample``."""
    return ask(cfg, {name: len(data.tokens(name)) for name in data.sources}, step, sample)
