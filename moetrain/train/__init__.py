"""Training: ``run`` is what every rank of ``moetrain train`` calls."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from shlex import quote

import torch.distributed as dist

from moetrain.config.check import resolve_sizes
from moetrain.config.errors import TrainError
from moetrain.config.schema import Config
from moetrain.data.prepare import prepare_once
from moetrain.train import runtime
from moetrain.train.announce import announce
from moetrain.train.finish import finish, stopped
from moetrain.train.lock import locked
from moetrain.train.preflight import began_with, preflight, refuse_replaced
from moetrain.train.rundir import STOPPED, claim
from moetrain.train.signals import Requeue, Signals, listening
from moetrain.train.trainer import Trainer
from moetrain.train.watch import watched

log = logging.getLogger("moetrain")


def run(cfg: Config, resume: bool = False) -> None:
    """Train ``cfg`` on this rank, in the process group of the launcher's environment, or alone where there is none.

    resume: continue the run in ``cfg.run_dir`` from its newest whole checkpoint.
    Raises a UserError (config, data, checkpoint, training), which most often every rank sees alike; LostRank when
    another rank died, hangs or failed by itself; Requeue when a signal stopped the run.
    """
    try:
        with listening() as signals:
            _run(cfg, resume, signals)
    except Requeue:
        if (Path(cfg.run_dir) / "config.yaml").exists():
            (Path(cfg.run_dir) / STOPPED).touch()
        raise


def _run(cfg: Config, resume: bool, signals: Signals) -> None:
    device = runtime.pick_device(cfg.device)
    runtime.set_up_torch(cfg, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    timeout_s = cfg.parallel.timeout_s
    with (
        runtime.process_group(device, timeout_s),
        watched(timeout_s, cfg.run_dir) as watch,
        locked(Path(cfg.run_dir)),
    ):
        sizes = resolve_sizes(cfg.parallel, dist.get_world_size())
        run_dir = Path(cfg.run_dir) if resume else claim(cfg, resume)
        runtime.set_up_log(run_dir, dist.get_rank())
        prepared = prepare_once(cfg.data, began_with(cfg) if resume else None)
        preflight(cfg, resume)
        trainer = Trainer(cfg, sizes, run_dir)
        refuse_replaced(trainer.data, prepared)
        watch.step, watch.last_good = lambda: trainer.step, trainer.checkpointer.last_good
        if resume:
            trainer.resume()
            claim(cfg, resume)  # not before: what is refused leaves the run's config as it is
        else:
            trainer.start()
        announce(trainer)
        trainer.guard.told = lambda: signals.number
        signals.ready = True
        try:
            evaluation = trainer.fit()
            if evaluation is not None:
                finish(trainer, evaluation)
        except TrainError as error:
            stopped(trainer, error)
            trainer.snapshots.forget()
            raise
        except KeyboardInterrupt:
            # The other ranks, who were told as well, do so too. Alone, Ctrl-C again ends this; several ranks are ended
            # by the process that started them, after half a minute.
            trainer.checkpointer.wait()
            trainer.snapshots.forget()
            good, again = trainer.checkpointer.last_good(), f"moetrain train --resume {quote(str(run_dir))}"
            log.info("stopped    by Ctrl-C after step %d; last good checkpoint: %s; to go on: %s",
                     trainer.step, good, again)  # fmt: skip
            raise
        if evaluation is not None and trainer.step in trainer.checkpointer.failed:
            good = trainer.checkpointer.last_good()
            raise TrainError(
                f"training finished, but its last checkpoint was not saved (last good: {good}); free disk space, "
                f"then run 'moetrain train --resume {quote(str(run_dir))}'"
            )
    if evaluation is None:
        by, good = signal.Signals(trainer.guard.stop).name, trainer.checkpointer.last_good()
        raise Requeue(f"stopped by {by} after step {trainer.step}; last good checkpoint: {good}; the same command goes "
                      f"on, and so does: moetrain train --resume {quote(str(run_dir))}")  # fmt: skip
