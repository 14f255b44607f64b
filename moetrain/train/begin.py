"""Where a run begins: at step 0, from weights that were given, or where it was left."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.checkpoint import layout, load
from moetrain.checkpoint.snapshot_find import Found
from moetrain.comm.ranks import RankError, Ranks
from moetrain.config.check_data import check_order
from moetrain.config.errors import CheckpointError
from moetrain.convert.features import differences
from moetrain.convert.open import check_init, open_weights
from moetrain.data.position import restore
from moetrain.train.preflight import asked_of

if TYPE_CHECKING:
    from moetrain.train.trainer import Trainer

log = logging.getLogger("moetrain")


def start(trainer: Trainer) -> None:
    """Begin at step 0, from the weights that ``init`` names if there are any. Collective. Raises a UserError."""
    cfg = trainer.cfg
    if cfg.init is None:
        return
    opened = open_weights(cfg.init, ranks=Ranks())
    check_init(cfg, opened)
    trainer.engine.load_weights(opened.source)
    if cfg.init_optimizer:
        state = trainer.engine.state(trainer.progress())
        load(opened.path, {"optim": state["optim"]})
        trainer.engine.load_state(state)
    log.info("%s from %s", "state     " if cfg.init_optimizer else "weights   ", opened.path)
    if unlike := differences(cfg.model, opened.model):
        log.warning("weights    of another model: here it has %s", ", ".join(unlike))


def resume(trainer: Trainer) -> None:
    """Continue from the newest snapshot that is whole, else from the newest whole checkpoint, or from the start when
    there is neither. Collective. Raises DataError when the data is not what it was, ConfigError for a schedule of its
    weights that is out of order."""
    found, progress = from_snapshot(trainer)
    progress = progress or from_checkpoint(trainer)
    if trainer.snapshots.kept is not None:  # not before: a resume that is refused leaves them for one that is not
        trainer.snapshots.kept.keep_only(found)
    if progress is None:
        log.info("no checkpoint in %s yet: starting from step 0", trainer.run_dir)
        start(trainer)
        return
    trainer.step, trainer.tokens, trainer.seconds = progress["step"], progress["tokens"], progress["seconds"]
    trainer.waited_s = progress.get("data_wait_s", 0.0)
    if "guard" in progress:
        trainer.guard.load_state(progress["guard"])
        trainer.events += trainer.guard.give_up_others(trainer.cfg.train.global_batch, trainer.step)
    if "data" in progress:
        samples = progress["data"]["samples"]
        check_order(trainer.cfg, trainer.step, samples)
        trainer.loader.begin(trainer.step, samples)
        trainer.asked = asked_of(trainer.cfg, trainer.data, trainer.step, samples)
        for line in restore(trainer.sampler, trainer.asked, progress["data"]):
            log.info("data       %s", line)
    for line in trainer.mixing.load_state(progress.get("mixer"), trainer.step):
        log.info("mixer      %s", line)


def from_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """Load the newest whole checkpoint; its progress, None without one."""
    newest = trainer.checkpointer.newest()
    if newest is None:
        return None
    state = trainer.engine.state(trainer.progress())
    load(newest, state)
    progress = trainer.engine.load_state(state)
    trainer.events.append({"event": "resumed", "step": progress["step"]})
    log.info("resumed from %s", newest)
    return progress


def from_snapshot(trainer: Trainer) -> tuple[Found | None, dict[str, Any] | None]:
    """Load the newest snapshot, if it is newer than all checkpoints; it and its progress, else None twice."""
    snapshots, folder = trainer.snapshots.kept, trainer.checkpointer.folder
    if snapshots is None:
        return None, None
    found = snapshots.find()
    progress = None
    if found is not None and not passed_over(found, folder):
        engine = trainer.engine
        engine.state(trainer.progress())  # makes the optimizer's state
        try:
            progress = snapshots.load(found, engine.tensors)
        except RankError as error:
            log.warning("snapshot of step %d is passed over: %s", found.step, error)
        else:
            engine.load_state(engine.state(progress))
            with suppress(CheckpointError):  # that none is whole is in the log, and no reason to lose this state too
                trainer.checkpointer.newest(verify=False)
            trainer.events.append({"event": "resumed", "step": found.step, "from": "snapshot"})
            log.info("resumed from the snapshot of step %d; newest checkpoint: %s", found.step,
                     trainer.checkpointer.last_good())  # fmt: skip
    return (found if progress else None), progress


def passed_over(found: Found, folder: Path) -> bool:
    """Whether a checkpoint is to be preferred: a newer one, or, when those that the snapshot followed have been taken
    away, any: whoever did that wants to go back. Collective."""
    newest = Ranks().first(lambda: max(layout.steps(folder), default=0))
    if newest < found.base:
        log.warning("snapshot of step %d is passed over: the checkpoint of step %d, which came before it, is gone",
                    found.step, found.base)  # fmt: skip
    return not found.base <= newest < found.step
