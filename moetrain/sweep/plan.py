"""``moetrain train -m``: runs one after the other, each a process and a run directory of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moetrain.config import Config, load, save
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError, TrainError
from moetrain.config.presets import expand_sweep
from moetrain.convert.open import brings

FILE = "sweep.yaml"
VERSION = 1


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    overrides: list[str]
    cfg: Config


def plan_sweep(overrides: Sequence[str], config_dirs: Sequence[str]) -> list[Job]:
    """A job for every combination of the sweeps in ``overrides``, all checked. Raises ConfigError."""
    return plan_jobs({f"{n:03d}": words for n, words in enumerate(expand_sweep(overrides, config_dirs))}, config_dirs)


def plan_jobs(runs: dict[str, list[str]], config_dirs: Sequence[str]) -> list[Job]:
    """A job for each of ``runs``: name -> words. Raises ConfigError for the first config that cannot run."""
    jobs = []
    for name, words in runs.items():
        cfg = load(words, config_dirs=config_dirs, check=lambda cfg: check_mapping(cfg, cfg.launch.ranks), start=brings)
        if cfg.dry_run:
            raise ConfigError("dry_run=true shows one mapping at a time; take out -m")
        jobs.append(Job(name, words, cfg))
    return jobs


def start_sweep(folder: Path, jobs: Sequence[Job], config_dirs: Sequence[str]) -> None:
    """Note the sweep in ``folder`` and run it. Raises ConfigError: there is one; TrainError: runs failed."""
    note_sweep(folder, jobs, config_dirs)
    run_sweep(folder, jobs)


def note_sweep(folder: Path, jobs: Sequence[Job], config_dirs: Sequence[str]) -> None:
    """Write ``sweep.yaml``. Raises ConfigError: there is one."""
    if (folder / FILE).exists():
        raise ConfigError(
            f"{folder} already holds a sweep; go on with it by 'moetrain train -m --resume {folder}', or choose "
            f"another run_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "sweep_version": VERSION,
        "config_dirs": [str(Path(one).resolve()) for one in config_dirs],
        "runs": {job.name: job.overrides for job in jobs},
    }
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(yaml.safe_dump(table, sort_keys=False))
    temporary.replace(folder / FILE)


def resume_sweep(folder: Path) -> None:
    """Go on with the sweep in ``folder``: runs that have ended are kept, one that was stopped goes on from its newest
    checkpoint, or anew where it has none. Raises ConfigError: no sweep; TrainError: runs failed, now or before."""
    try:
        table = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
        runs, config_dirs = dict(table["runs"]), list(table.get("config_dirs", []))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise ConfigError(f"-m --resume {folder}: not a sweep, it has no {FILE} that can be read") from None
    run_sweep(folder, plan_jobs(runs, config_dirs))


def run_sweep(folder: Path, jobs: Sequence[Job]) -> None:
    """Run the jobs that have not ended. A run that fails does not stop the others. Raises TrainError at the end."""
    failed = []
    for job in jobs:
        run = folder / job.name
        reason = exit_reason(run)
        if reason is None:
            print(f"sweep {folder}: run {job.name} of {len(jobs)}: {' '.join(job.overrides)}", flush=True)
            if run_job(run, job.cfg):
                failed.append(job.name)
        elif reason != "finished":
            failed.append(job.name)
    if failed:
        raise TrainError(f"{len(failed)} of {len(jobs)} runs of the sweep {folder} failed: {', '.join(failed)}")


def run_job(run: Path, cfg: Config) -> int:
    """Train in ``run``, or go on there; the exit code."""
    command = [sys.executable, "-m", "moetrain.cli", "train"]
    if (run / "config.yaml").is_file():
        return subprocess.run([*command, "--resume", str(run)]).returncode
    cfg.run_dir = str(run)
    with tempfile.TemporaryDirectory(prefix="moetrain-config-") as temporary:
        save(cfg, Path(temporary) / "config.yaml")
        return subprocess.run([*command, "--config", f"{temporary}/config.yaml"]).returncode


def exit_reason(run: Path) -> str | None:
    """Why the run in ``run`` ended; None where it has not."""
    try:
        return str(json.loads((run / "summary.json").read_text(encoding="utf-8"))["exit_reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
