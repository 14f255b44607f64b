"""How a run starts on this machine: its config, its directory, and its ranks, which start again when one is lost."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from moetrain_launch import local

from moetrain.config import Config, load, save
from moetrain.config.check_mapping import refuse_nodes
from moetrain.config.errors import ConfigError


def refuse_no_run(folder: Path, what: str = "--resume") -> None:
    """Raise ConfigError unless ``folder``, which was given to ``what``, is a run directory."""
    if not folder.is_dir():
        raise ConfigError(f"{what} {folder}: there is no such folder")
    if (folder / "sweep.yaml").is_file():
        raise ConfigError(f"{what} {folder}: this is a sweep; give one of its runs, or 'train -m --resume' for all")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{what} {folder}: not a run directory, it has no config.yaml")


def refuse_sweep(cfg: Config) -> None:
    """Raise ConfigError for settings of many runs, where one is to start."""
    if cfg.sweep.params:
        raise ConfigError(f"these settings are a sweep, over {', '.join(cfg.sweep.params)}; add -m to run it")


def load_run(overrides: Sequence[str], **how: Any) -> Config:
    """``config.load``, where ``init=PATH`` brings its model and tokenizer."""

    def start(path: str) -> dict[str, Any]:
        from moetrain.convert.open import brings

        return brings(path)

    return load(overrides, start=start, **how)


def asks(key: str, overrides: Sequence[str]) -> bool:
    """Whether the user gave the setting ``key``."""
    return any(word.lstrip("+").startswith(f"{key}=") for word in overrides)


def start_run(cfg: Config, resume: Path | None, asked: bool, show_traceback: bool) -> int:
    """Train ``cfg``, or go on with the run in ``resume``; its exit code. asked: the user gave ``run_dir``. Under a
    launcher this process is one rank of it; else it is the run, or starts the ranks of it."""
    refuse_sweep(cfg)
    if resume:
        cfg.run_dir = str(resume)
    elif goes_on(cfg):
        resume = Path(cfg.run_dir)
    if local.reports_for_me() or local.ENDS_WITH_PARENT in os.environ:
        local.end_with_parent()
    if not under_launcher():
        refuse_nodes(cfg)
        if not resume:
            cfg.run_dir = str(pick_run_dir(cfg, asked))
            resume = Path(cfg.run_dir) if goes_on(cfg) else None
        get_ready(cfg, bool(resume))
        if cfg.launch.ranks > 1:
            return start_ranks(cfg, resume, show_traceback)
    from moetrain.train import run

    run(cfg, resume=bool(resume))
    return 0


def under_launcher() -> bool:
    """Whether torchrun, srun or the like has started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def goes_on(cfg: Config) -> bool:
    """Whether a command without --resume means the run in ``cfg.run_dir``, which a signal stopped, or which torchrun or
    Slurm has started again. Only a run of the same config."""
    from moetrain.train.rundir import same_run, was_stopped

    again = any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    folder = Path(cfg.run_dir)
    return (again or was_stopped(folder)) and same_run(folder, cfg)


def pick_run_dir(cfg: Config, asked: bool) -> Path:
    """``cfg.run_dir``; where it is taken and was not asked for, the first of NAME-2, NAME-3 ... that is free, or holds
    this run, stopped by a signal."""
    wanted = Path(cfg.run_dir)
    if asked:
        return wanted
    number, folder = 1, wanted
    while (folder / "config.yaml").exists() or (folder / "sweep.yaml").exists():
        if goes_on(replace(cfg, run_dir=str(folder))):
            break
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def get_ready(cfg: Config, resume: bool) -> None:
    """What is better done once, before there are ranks: refuse a taken run directory, and a device or kernels that are
    not there; prepare and check the data."""
    from moetrain.data.prepare import prepare as prepare_data
    from moetrain.train.kernels import refuse_what_cannot_run
    from moetrain.train.preflight import began_with, preflight
    from moetrain.train.rundir import refuse_taken

    if not resume:
        refuse_taken(Path(cfg.run_dir))
    refuse_what_cannot_run(cfg)
    prepare_data(cfg.data, began=began_with(cfg) if resume else None)
    preflight(cfg, resume)


def start_ranks(cfg: Config, resume: Path | None, show_traceback: bool) -> int:
    """Run ``cfg`` on ``cfg.launch.ranks`` processes of this machine. Raises TrainError with the first rank's error."""
    ranks = cfg.launch.ranks
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = cfg.train.threads or (int(given) if given.isdigit() else 0) or max(1, local.cores() // ranks)
    with tempfile.TemporaryDirectory(prefix="moetrain-config-") as folder:
        config = Path(folder) / "config.yaml"
        save(cfg, config)
        for restart in range(cfg.faults.restarts + 1):
            command = [sys.executable, "-m", "moetrain.cli", "train", "--config", str(config)]
            command += ["--resume", str(resume)] if resume else []
            command += ["--traceback"] if show_traceback else []
            outcome = local.run_ranks(command, ranks, {"OMP_NUM_THREADS": str(threads)})
            if not may_go_on(outcome) or restart == cfg.faults.restarts:
                break
            print(f"moetrain: {outcome.message}; starting the ranks again, {restart + 1} of {cfg.faults.restarts}",
                  file=sys.stderr, flush=True)  # fmt: skip
            if (Path(cfg.run_dir) / "config.yaml").exists():
                resume = Path(cfg.run_dir)
    # Nobody goes on by itself, and ranks that were ended could not remove them. Those that end by an error have done
    # so, or have left them for who goes on: the last checkpoint was not saved, or this resume was refused.
    if may_go_on(outcome) or outcome.code > 128:
        from moetrain.train.snapshots import forget

        forget(Path(cfg.run_dir))
    if outcome.message:
        killed = outcome.code > 128 and "--resume" not in outcome.message
        again = f"; to go on: moetrain train --resume {quote(str(cfg.run_dir))}" if killed else ""
        print(f"moetrain: error: {outcome.message}{again}", file=sys.stderr)
    return outcome.code


def may_go_on(outcome: local.Outcome) -> bool:
    """Whether the ranks ended because one died or hung, and not by an error or because they were told to."""
    from moetrain.train.exit_codes import LOST

    told = outcome.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    return outcome.code == LOST or (outcome.code > 128 and not told)


def sweep(overrides: Sequence[str], config_dirs: Sequence[str], resume: Path | None) -> int:
    """The runs that ``overrides`` and the settings of ``sweep`` ask for, each in a directory of its own; or the rest
    of the sweep in ``resume``. What can be checked is checked before the first run starts."""
    from moetrain.sweep.drive import run_sweep
    from moetrain.sweep.plan import note_sweep, plan_sweep, read_sweep

    if resume:
        if config_dirs:
            raise ConfigError("-m --resume DIR has the presets that the sweep was started with; take out --config-dir")
        run_sweep(read_sweep(resume, overrides))
        return 0
    planned, cfg = plan_sweep(overrides, config_dirs)
    refuse_nodes(cfg)
    asked = asks("run_dir", overrides)
    if not asked:
        cfg.run_dir += "-sweep"
    planned.folder = pick_run_dir(cfg, asked)
    note_sweep(planned)
    run_sweep(planned)
    return 0
