"""Where the runs of a sweep start: processes of this machine, or jobs through submitit; and how many at a time."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moetrain_launch import array, local, slurm
from moetrain_launch.job import Job, LaunchError, Note, notes, write_note

from moetrain.config import read
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.sweep.chooser import FULL
from moetrain.sweep.plan import Sweep, exit_reason

T = TypeVar("T")
ASK_S = 5.0  # between two questions to Slurm about a job
PROGRAM = ("-m", "moetrain.cli", "train", "--resume")  # what Python runs; the run directory follows


class Handle(Protocol):
    """A run at work. outlives: whether it goes on when the process that started it ends."""

    outlives: bool

    def poll(self) -> int | None:
        """Its exit code; None while it is at work."""

    def stop(self, at_once: bool = False) -> None:
        """Tell it to save and end."""


class Process:
    """A run as a process of this machine, in a session of its own, so that Ctrl-C meets only the sweep."""

    outlives = False

    def __init__(self, command: list[str], output: Path | None, env: dict[str, str]) -> None:
        log = None if output is None else output.open("ab")
        try:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **env}
            )
        finally:
            if log is not None:
                log.close()

    def poll(self) -> int | None:
        """See Handle."""
        return self._process.poll()

    def stop(self, at_once: bool = False) -> None:
        """See Handle."""
        self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)


class Submitted:
    """A run as a job of submitit that is a process of this machine."""

    outlives = False

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        """See Handle. The job's own code is not known: 1 for any that failed."""
        if not self._job.done():
            return None
        return 0 if self._job.exception() is None else 1

    def stop(self, at_once: bool = False) -> None:
        """See Handle. It ends at once."""
        self._job.cancel(check=False)


class SlurmJob:
    """A run as a Slurm job. Whether it has ended is the controller's word: submitit asks the accounts, which many
    clusters do not keep, and takes a run that is preempted, and will start again, for one that failed."""

    outlives = True

    def __init__(self, run: Path, number: str) -> None:
        self._run, self._number, self._next, self._over = run, number, 0.0, False

    def poll(self) -> int | None:
        """See Handle. The job's own code is not known: 1 for any whose run is not at its end."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + ASK_S
            with suppress(LaunchError):  # the controller is away for a while
                self._over = slurm.has_ended(self._number)
        if exit_reason(self._run) in FULL:
            return 0
        return 1 if self._over else None

    def stop(self, at_once: bool = False) -> None:
        """See Handle. Slurm gives a cancelled job its KillWait to save."""
        with suppress(LaunchError):
            slurm.cancel(Note("slurm", self._number, "", ""))


class Launcher:
    """Starts the runs of one sweep. Raises ConfigError where the jobs that it asks for cannot be had here."""

    def __init__(self, sweep: Sweep, cfg: Config) -> None:
        self.sweep, self.kind = sweep, sweep.settings.launcher
        self._executor: Any = None
        self._submitting = threading.Lock()
        self._places, self._thread = itertools.count(), threading.local()
        self._gpus = [] if self.kind != "joblib" or cfg.device == "cpu" else gpus_here()
        if os.getpid() != 1:  # the parent of lost processes would look lost itself
            os.environ[local.ENDS_WITH_PARENT] = "1"
        if self.kind in ("slurm", "submitit_local"):
            try:
                job = Job(sweep.folder.resolve(), (), cfg.launch)
                self._executor, self._python = array.executor_of(job.run_dir, job, self.kind != "slurm"), job.python
            except LaunchError as error:
                raise ConfigError(f"sweep.launcher={self.kind}: {error}") from error

    def start(self, run: Path) -> Handle:
        """Start the run in ``run``, or go on with it, or find the Slurm job of it that is still at work."""
        if self._executor is None:
            output = run / "output.txt" if self.sweep.settings.jobs > 1 else None
            return Process([sys.executable, *PROGRAM, str(run)], output, self._share(run))
        try:
            if self.kind == "submitit_local":
                return Submitted(self._submit(run, sys.executable))
            number = at_work(run)
            if number is None:
                job = self._submit(run, self._python)
                number = str(job.job_id)
                write_note(run, "slurm", number, job.paths.stderr)
        except LaunchError as error:
            raise ConfigError(str(error)) from error
        return SlurmJob(run, number)

    def _share(self, run: Path) -> dict[str, str]:
        """The environment in which ``run`` sees only its share of the GPUs, or else all would take the first: those of
        its place, of which each thread that starts runs has one."""
        ranks = read(run / "config.yaml").launch.ranks if self._gpus else 1
        if self.sweep.settings.jobs == 1 or len(self._gpus) < ranks:
            return {}
        if not hasattr(self._thread, "place"):
            self._thread.place = next(self._places)
        first = self._thread.place * ranks
        mine = [self._gpus[(first + i) % len(self._gpus)] for i in range(ranks)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}

    def _submit(self, run: Path, python: str) -> Any:
        with self._submitting, array.refusals():
            if self.kind == "slurm":
                self._executor.update_parameters(job_name=f"{self.sweep.folder.resolve().name}-{run.name}")
            return self._executor.submit(array.Run([python, *PROGRAM, str(run.resolve())]))


def gpus_here() -> list[str]:
    """The GPUs of this machine that a run may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:count]
    return named if named != [""] and len(named) == count else [str(i) for i in range(count)]


def at_work(run: Path) -> str | None:
    """The number of the Slurm job of ``run`` that has not ended. Raises LaunchError: Slurm does not say."""
    found = notes(run) if (run / "launch.json").is_file() else []
    return next((note.id for note in found if note.kind == "slurm" and not slurm.has_ended(note.id)), None)


def at_a_time(jobs: int, one: Callable[[T], None], things: Iterator[T]) -> None:
    """Call ``one`` for each of ``things``, ``jobs`` at a time; the next is taken when there is room for it."""
    if jobs == 1:
        for thing in things:
            one(thing)
        return
    from joblib import Parallel, delayed

    Parallel(jobs, backend="threading", batch_size=1, pre_dispatch="n_jobs")(delayed(one)(thing) for thing in things)
