"""Many runs as one Slurm array, through submitit: each a task on one node, so many of them at a time.

A run whose time is nearly up is told to save, and its task goes back to the queue; submitit does that.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrain_launch import slurm
from moetrain_launch.job import Job, LaunchError, Note, ask, write_note
from moetrain_launch.settings import SlurmConfig


def ignore_warning() -> None:
    """In a child, before it becomes the run: SIGUSR2, submitit's signal ahead of the time limit, is not for it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Run:
    """What a task does: one command, which goes on where it was when it is run again."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.pid = 0

    def __call__(self) -> None:
        """Raises CalledProcessError when the run fails; submitit keeps it.

        Slurm's signal goes to all processes of the task, and would end the run: it ignores it.
        """
        with subprocess.Popen(self.command, preexec_fn=ignore_warning) as process:
            self.pid = process.pid
            code = process.wait()
        if code:
            raise subprocess.CalledProcessError(code, self.command)

    def checkpoint(self) -> Any:
        """Called by submitit ahead of the time limit, in a signal's handler: let the run save, and ask to go on.

        The wait leaves the child's end to be seen by ``__call__``, in whose own wait this runs.
        """
        from submitit.core.utils import DelayedSubmission

        if self.pid:
            os.kill(self.pid, signal.SIGUSR1)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Run(self.command))


def submit(folder: Path, jobs: Sequence[Job]) -> str:
    """Submit ``jobs``, all with the settings of the first, as one array; its number. Leaves a note in ``folder``.

    Raises LaunchError: no submitit, no sbatch, or what they say.
    """
    executor = executor_of(folder, jobs[0])
    with refusals(), executor.batch():
        made = [executor.submit(Run([job.python, "-m", *job.command])) for job in jobs]
    number = str(made[0].job_id).split("_")[0]
    write_note(folder, "array", number, folder / "submitit")
    return number


def executor_of(folder: Path, job: Job, local: bool = False) -> Any:
    """submitit's executor for jobs like ``job``, with its files in ``folder/submitit``; local: one that makes processes
    of this machine. Raises LaunchError: no submitit, no sbatch, settings that such jobs cannot have."""
    s = job.settings
    try:
        import submitit
    except ImportError:
        raise LaunchError("launch -m needs submitit, which is not installed here: pip install submitit") from None
    if s.nodes > 1 or s.container:
        raise LaunchError("launch -m starts runs of one node each, without a container; launch others one by one")
    limit = slurm.limit(s.slurm)
    if limit == math.inf:
        raise LaunchError(
            f"launch -m needs a time limit, not launch.slurm.time={s.slurm.time}; write one, as 2-00:00:00"
        )
    setup = [*(f"export {name}={shlex.quote(value)}" for name, value in sorted(s.env.items())), *s.setup]
    if local:
        executor: Any = submitit.LocalExecutor(folder=folder / "submitit", python=shlex.quote(job.python))
        executor.update_parameters(timeout_min=math.ceil(limit), signal_delay_s=s.slurm.signal_s, setup=setup)
        return executor
    slurm.refuse_partition(s.slurm.partition)
    executor = submitit.SlurmExecutor(folder=folder / "submitit", python=shlex.quote(job.python), max_num_timeout=10**6)
    asked = {
        "partition": s.slurm.partition, "account": s.slurm.account, "qos": s.slurm.qos, "mem": s.slurm.mem,
        "constraint": s.slurm.constraint, "cpus_per_task": s.cpus * s.ranks or None, "gpus_per_node": s.gpus or None,
    }  # fmt: skip
    executor.update_parameters(
        job_name=folder.name,
        nodes=1,
        ntasks_per_node=1,
        time=math.ceil(limit),
        signal_delay_s=s.slurm.signal_s,
        array_parallelism=s.at_once,
        setup=setup,
        additional_parameters=further(s.slurm),
        srun_args=[f"--cpus-per-task={s.cpus * s.ranks}"] if s.cpus else [],  # since 22.05 srun does not take sbatch's
        **{name: value for name, value in asked.items() if value is not None},
    )
    return executor


def further(s: SlurmConfig) -> dict[str, Any]:
    """Options of sbatch that submitit knows nothing of. Raises LaunchError for one that it cannot write."""
    found: dict[str, Any] = {"requeue": True} | ({"reservation": s.reservation} if s.reservation else {})
    for option in s.extra:
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name):
            raise LaunchError(f"launch.slurm.extra: launch -m takes options as --name or --name=value; got '{option}'")
        found[name[2:]] = value if equals else True
    return found


@contextmanager
def refusals() -> Iterator[None]:
    """Turns sbatch's refusal in the body into LaunchError."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        raise LaunchError(f"sbatch refused: {str(error).splitlines()[-1]}") from None


def state(note: Note) -> str:
    """How many tasks are in which state."""
    try:
        text = ask(["scontrol", "show", "job", "--oneliner", note.id], slurm.ABSENT)
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return f"job {note.id} has ended; Slurm keeps no more of it than 'sacct -j {note.id}'"
        raise
    states = re.findall(r"JobState=(\S+)", text)
    return f"array {note.id}: " + ", ".join(f"{states.count(one)} {one}" for one in sorted(set(states)))


def cancel(note: Note) -> str:
    """Cancel what is left of the array."""
    ask(["scancel", note.id], slurm.ABSENT)
    return f"array {note.id} was cancelled"
