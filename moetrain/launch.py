"""``moetrain launch``: from a config to a started run, and what there is to know of it afterwards.

Training is imported where a run is started, and with it torch: to ask after one should take no time.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain_launch import array, kubernetes, slurm, torchrun
from moetrain_launch.job import Job, LaunchError, Note, notes

from moetrain.config import Config
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.files import as_text, save

WAYS: dict[str, Any] = {
    "local": torchrun,
    "slurm": slurm,
    "array": array,
}  # those that leave a note in the run directory
NEXT = "config-next.yaml"  # in the run directory: what ranks that go on with the run are to change in it
OVER = ("ended", "look there", *slurm.ENDED)  # in what ``state`` says


def check_nodes(cfg: Config) -> None:
    """Check the mapping on every number of nodes that the run may get. Raises ConfigError."""
    launch = cfg.launch
    for nodes in range(launch.nodes, min(launch.nodes, launch.min_nodes or launch.nodes) - 1, -1):
        try:
            check_mapping(cfg, nodes * launch.ranks)
        except ConfigError as error:
            fewer = f"with launch.min_nodes={launch.min_nodes}, on {nodes} nodes: " if nodes < launch.nodes else ""
            raise ConfigError(f"{fewer}{error}") from None


def job_of(cfg: Config, resume: bool = False) -> Job:
    """``cfg`` as a job. Its run directory becomes absolute, in ``cfg`` too: ranks may start in another folder.

    resume: a run is there whose config may be another. It stays until the ranks have found that they can go on with the
    new one, which they are given beside it.
    """
    away = cfg.launch.kind == "kubernetes"
    run_dir = Path(cfg.run_dir) if away else Path(cfg.run_dir).resolve()
    cfg.run_dir = str(run_dir)
    words = ["moetrain.cli", "train", "--resume", str(run_dir)]
    if resume:
        from moetrain.train.rundir import holds

        words += [] if holds(run_dir, cfg) else ["--config", kubernetes.CONFIG if away else str(run_dir / NEXT)]
    return Job(run_dir, tuple(words), cfg.launch)


def target(cfg: Config) -> str:
    """The name by which ``status``, ``logs`` and ``cancel`` know the run of ``cfg``."""
    if cfg.launch.kind == "kubernetes":
        return f"k8s:{cfg.launch.kubernetes.namespace}/{job_of(cfg).name}"
    return cfg.run_dir


def show(cfg: Config, resume: bool) -> str:
    """What ``start`` would submit or run; nothing is written. Raises LaunchError."""
    job = job_of(cfg, resume)
    if cfg.launch.kind == "slurm":
        return slurm.script(job)
    if cfg.launch.kind == "kubernetes":
        return kubernetes.as_yaml(kubernetes.manifest(job, as_text(cfg)))
    return shlex.join(torchrun.words(job)) + "\n"


def start(cfg: Config, resume: bool) -> str:
    """Start ``cfg``, or go on with it; what was started. By torchrun, this process becomes the run.

    The same words again go on with the same run. Raises LaunchError, ConfigError: the run directory holds another run,
    runs already, or cannot be written.
    """
    from moetrain.train.rundir import holds, keep_config, refuse_taken

    job = job_of(cfg, resume)
    if cfg.launch.kind == "kubernetes":
        return kubernetes.submit(job, as_text(cfg))
    show(cfg, resume)  # raises for what cannot be submitted, before anything is written
    if cfg.launch.kind == "slurm":
        slurm.refuse_partition(cfg.launch.slurm.partition)
    if not resume and not holds(job.run_dir, cfg):
        refuse_taken(job.run_dir)
    if cfg.launch.kind == "slurm" or cfg.launch.nodes == 1:  # else another machine's launcher may have begun
        refuse_running(job.run_dir)
    try:
        if "--config" in job.command:
            save(cfg, job.run_dir / NEXT)
        else:
            keep_config(job.run_dir, cfg)
        if cfg.launch.kind == "local":
            torchrun.run(job)
        return f"job {slurm.submit(job)}, log {slurm.log_of(job.run_dir)}"
    except OSError as error:
        raise ConfigError(
            f"run_dir {job.run_dir} cannot be written: {error.strerror}; choose another run_dir"
        ) from error


def start_sweep(overrides: Sequence[str], config_dirs: Sequence[str]) -> str:
    """Start a run for every combination of the sweeps in ``overrides``, as one Slurm array; what was started.

    ``moetrain train -m --resume DIR`` later runs what is left of it. Raises LaunchError, ConfigError.
    """
    from moetrain.sweep.plan import note_sweep, plan_sweep
    from moetrain.train.rundir import keep_config

    sweep, cfg = plan_sweep(overrides, config_dirs)
    if cfg.launch.kind != "slurm":
        raise ConfigError("launch -m is for launch=slurm; on this machine use 'moetrain train -m'")
    if sweep.adaptive or sweep.settings.prune != "none":
        raise ConfigError("launch -m submits all runs at once; to choose or stop them by those before, use 'moetrain "
                          "train -m sweep.launcher=slurm' on a login node")  # fmt: skip
    slurm.refuse_partition(cfg.launch.slurm.partition)
    folder = sweep.folder = sweep.folder.resolve()
    configs = [sweep.config(name) for name in sweep.runs]
    jobs = [job_of(cfg) for cfg in configs]
    array.executor_of(folder, jobs[0])  # raises for what cannot be submitted, before anything is written
    note_sweep(sweep)
    for cfg, job in zip(configs, jobs, strict=True):
        keep_config(job.run_dir, cfg)
    see = f"moetrain launch status {shlex.quote(str(folder))}"
    return f"array {array.submit(folder, jobs)} of {len(jobs)} runs; see '{see}'"


def refuse_running(run_dir: Path) -> None:
    """Raise LaunchError when ``run_dir`` is being trained in, as far as its notes tell."""
    if not list(run_dir.glob("launch*.json")):
        return
    for note in notes(run_dir):
        state = WAYS[note.kind].state(note)
        if not any(word in state for word in OVER):
            raise LaunchError(
                f"{run_dir} is at work already: {state}; see 'moetrain launch status {shlex.quote(str(run_dir))}'"
            )


def status(target: str) -> str:
    """Where the run stands: its job, its last step, its end. target: a run directory, or k8s:NAMESPACE/NAME."""
    if target.startswith("k8s:"):
        return kubernetes.state(target)
    run_dir, runs = Path(target), runs_of(Path(target))
    if not runs:
        return "\n".join([*(WAYS[note.kind].state(note) for note in notes(run_dir)), progress(run_dir)])
    lines = [WAYS[note.kind].state(note) for note in notes(run_dir)] if noted(run_dir) else []
    for run in runs:
        states = [WAYS[note.kind].state(note) for note in notes(run)] if noted(run) else []
        lines.append(f"{run.name}: {'; '.join([*states, progress(run)])}")
    return "\n".join(lines)


def noted(run_dir: Path) -> bool:
    """Whether ``run_dir`` has a note of a launch."""
    return any(run_dir.glob("launch*.json"))


def runs_of(folder: Path) -> list[Path]:
    """The run directories of the sweep in ``folder``; none where it holds a single run."""
    return sorted(file.parent for file in folder.glob("*/config.yaml"))


def progress(run_dir: Path) -> str:
    """The last step in ``metrics.jsonl``, or how the run ended; a last line that is cut off is passed over."""
    try:
        reason = json.loads((run_dir / "summary.json").read_text())["exit_reason"]
        ended = f"; {reason}"
    except (OSError, ValueError, KeyError, TypeError):
        ended = ""
    for line in reversed(last_lines(run_dir / "metrics.jsonl")):
        try:
            row = json.loads(line)
            loss = "loss bad" if row["loss"] is None else f"loss {row['loss']:.4f}"
            return f"step {row['step']}, {loss}{ended}"
        except (ValueError, KeyError, TypeError):
            continue
    return f"no step yet{ended}"


def last_lines(file: Path) -> list[bytes]:
    """Lines of the last MiB of a file that may have gigabytes; none where there is no such file."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, file.stat().st_size - 2**20))
            return lines.read().splitlines()
    except OSError:
        return []


def cancel(target: str) -> str:
    """Stop the run for good: what was done. Raises LaunchError."""
    if target.startswith("k8s:"):
        return kubernetes.cancel(target)
    run_dir = Path(target)
    places = [run_dir] if noted(run_dir) else [run for run in runs_of(run_dir) if noted(run)] or [run_dir]
    return "\n".join(WAYS[note.kind].cancel(note) for place in places for note in notes(place))


def logs(target: str, lines: int, follow: bool) -> None:
    """Print the last ``lines`` lines of the log, and with ``follow`` what is added until the run ends."""
    if target.startswith("k8s:"):
        command = kubernetes.logs(target, lines, follow)
        try:
            os.execvp(command[0], command)
        except FileNotFoundError:
            raise LaunchError(f"kubectl was not found on this machine; {kubernetes.ABSENT}") from None
    note = notes(Path(target))[0]
    if note.kind == "array":
        raise LaunchError(f"{target} is a sweep: each run has its own log.txt, and Slurm's are in {note.log}")
    try:
        with open(note.log, errors="replace") as file:
            sys.stdout.writelines(deque(file, maxlen=max(0, lines)))
            while follow:
                sys.stdout.flush()
                over = all(_is_over(one) for one in notes(Path(target)))  # of several machines, this one's may be any
                sys.stdout.writelines(file)
                if over:
                    return
                time.sleep(1)
    except FileNotFoundError:
        raise LaunchError(f"{note.log} is not there yet; the run has not begun: see 'moetrain launch status'") from None


def _is_over(note: Note) -> bool:
    return any(word in WAYS[note.kind].state(note) for word in OVER)
