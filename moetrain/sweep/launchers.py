"""Where the runs of a sweep start: processes of this machine, or jobs through submitit; and how many at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moetrain_launch import array, local
from moetrain_launch.job import Job, LaunchError, notes, write_note

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.sweep.plan import Sweep

T = TypeVar("T")
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

    def __init__(self, command: list[str], output: Path | None) -> None:
        log = None if output is None else output.open("ab")
        try:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
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
    """A run as a job of submitit."""

    def __init__(self, job: Any, outlives: bool) -> None:
        self._job, self.outlives = job, outlives

    def poll(self) -> int | None:
        """See Handle. The job's own code is not known: 1 for any that failed."""
        if not self._job.done():
            return None
        return 0 if self._job.exception() is None else 1

    def stop(self, at_once: bool = False) -> None:
        """See Handle. Slurm gives a cancelled job its KillWait to save; a job without Slurm ends at once."""
        self._job.cancel(check=False)


class Launcher:
    """Starts the runs of one sweep. Raises ConfigError where the jobs that it asks for cannot be had here."""

    def __init__(self, sweep: Sweep, cfg: Config) -> None:
        self.sweep, self.kind = sweep, sweep.settings.launcher
        self._executor: Any = None
        if os.getpid() != 1:  # the parent of lost processes would look lost itself
            os.environ[local.ENDS_WITH_PARENT] = "1"
        if self.kind in ("slurm", "submitit_local"):
            try:
                job = Job(sweep.folder.resolve(), (), cfg.launch)
                self._executor = array.executor_of(job.run_dir, job, local=self.kind == "submitit_local")
            except LaunchError as error:
                raise ConfigError(f"sweep.launcher={self.kind}: {error}") from error

    def start(self, run: Path) -> Handle:
        """Start the run in ``run``, or go on with it, or find the Slurm job of it that is still at work."""
        if self._executor is None:
            output = run / "output.txt" if self.sweep.settings.jobs > 1 else None
            return Process([sys.executable, *PROGRAM, str(run)], output)
        slurm = self.kind == "slurm"
        job = self._at_work(run) if slurm else None
        if job is None:
            python = self._executor.python if slurm else sys.executable
            try:
                with array.refusals():
                    job = self._executor.submit(array.Run([python, *PROGRAM, str(run.resolve())]))
            except LaunchError as error:
                raise ConfigError(f"{run}: {error}") from error
            if slurm:
                write_note(run, "slurm", str(job.job_id), job.paths.stdout)
        return Submitted(job, outlives=slurm)

    def _at_work(self, run: Path) -> Any:
        import submitit

        try:
            [note] = [note for note in notes(run) if note.kind == "slurm"]
        except (LaunchError, ValueError):
            return None
        job: Any = submitit.SlurmJob(self._executor.folder, note.id)
        return None if job.done(force_check=True) else job


def at_a_time(jobs: int, one: Callable[[T], None], things: Iterator[T]) -> None:
    """Call ``one`` for each of ``things``, ``jobs`` at a time; the next is taken when there is room for it."""
    if jobs == 1:
        for thing in things:
            one(thing)
        return
    from joblib import Parallel, delayed

    Parallel(jobs, backend="threading", batch_size=1, pre_dispatch="n_jobs")(delayed(one)(thing) for thing in things)
