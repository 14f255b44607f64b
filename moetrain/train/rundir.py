"""The run directory: who may write there, and what is in it. Its layout is documented in docs/run-directory.md."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from moetrain.comm.ranks import Ranks
from moetrain.config import read, save, to_dict
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config

STOPPED = "stopped"  # a file that a signal left: whoever gives the same command means to go on


def claim(cfg: Config, resume: bool) -> Path:
    """Make ``cfg.run_dir`` ready for this run and return it; collective, done by rank 0 for all.

    Raises ConfigError when it already holds a run that is not being resumed, or cannot be written.
    """
    return Ranks().first(lambda: _claim(Path(cfg.run_dir), cfg, resume))


def refuse_taken(run_dir: Path) -> None:
    """Raise ConfigError when ``run_dir`` already holds a run, or a sweep. One that was refused before its first step,
    by its data say, has no more than a config there: the corrected command takes its place."""
    if (run_dir / "metrics.jsonl").exists() or any((run_dir / "checkpoints").glob("*")):
        raise ConfigError(
            f"{run_dir} already holds a run; continue it with --resume {quote(str(run_dir))}, or choose another run_dir"
        )
    if (run_dir / "sweep.yaml").exists():
        raise ConfigError(f"{run_dir} holds a sweep; choose another run_dir")


def was_stopped(run_dir: Path) -> bool:
    """Whether a signal stopped the run in ``run_dir`` before its end."""
    return (run_dir / STOPPED).exists()


def same_run(run_dir: Path, cfg: Config) -> bool:
    """Whether ``run_dir`` holds a run of ``cfg``."""
    config = run_dir / "config.yaml"
    return config.exists() and to_dict(read(config)) == to_dict(cfg)


def _claim(run_dir: Path, cfg: Config, resume: bool) -> Path:
    if not resume:
        refuse_taken(run_dir)
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        keep_config(run_dir, cfg)
        (run_dir / STOPPED).unlink(missing_ok=True)
        (run_dir / "summary.json").unlink(missing_ok=True)  # of an earlier end: who looks must not take it for this one
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error.strerror}; choose another run_dir") from error
    return run_dir


def holds(run_dir: Path, cfg: Config) -> bool:
    """Whether ``run_dir`` holds ``cfg``, begun or not."""
    config = run_dir / "config.yaml"
    return config.exists() and to_dict(read(config)) == to_dict(cfg)


def keep_config(run_dir: Path, cfg: Config) -> None:
    """Write ``config.yaml``; one that says otherwise stays beside it under another name. Raises OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "config.yaml"
    if config.exists() and not holds(run_dir, cfg):
        n = len(list(run_dir.glob("config-before-resume-*.yaml"))) + 1
        before = run_dir / f"config-before-resume-{n}.yaml"
        save(read(config), before)  # a copy: where the next cannot be written, the run still has its config
    save(cfg, config)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, whole or not at all. Collective."""

    def write() -> None:
        temporary = run_dir / "summary.json.tmp"
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
        temporary.replace(run_dir / "summary.json")

    Ranks().first(write)
