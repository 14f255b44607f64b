"""A run as a Slurm job: one batch file, which ``--print`` shows and sbatch gets. One task is one rank.

The job goes back to the queue by itself: when it is preempted (Slurm does that), when its time is nearly up (the ranks
get SIGUSR1, save, and leave with exit code 85), and a few times when ranks fail. It starts with the same words each
time, and the run goes on from its newest checkpoint. A job that was cancelled is not put back.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from moetrain_launch.job import CANNOT_RUN, REQUEUE, Job, LaunchError, Note, ask, write_note
from moetrain_launch.settings import SlurmConfig

# States that are left only by a new start. A preempted job shows PREEMPTED until it is back in the queue.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
WEEK = 7 * 24 * 60  # minutes
ABSENT = "run this on a login node of the cluster, write the file with --print and submit it there, or use launch=local"

BODY = """\
# A job that is being preempted or cancelled sends SIGTERM to this shell as well; it stays until the ranks have saved.
trap : TERM USR1
{environment}{setup}set -u
# Ranks meet at the first node. Its address as Slurm knows it: a node's name need not resolve.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE={world} LOCAL_WORLD_SIZE={ranks}
echo "start ${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"

# One task is one rank. A rank that is lost is noticed by the others, which end by themselves and say why.
srun {srun} \\
  bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank \\
  {command}
code=$?

# Still RUNNING: nobody has cancelled the job, and Slurm is not already putting it back. {requeue}: the ranks were told
# to stop, have saved, and ask to go on. {cannot_run}: the config or the data cannot run; to try again is no use.
# A controller that has much to do gives no answer at times, so it is asked again.
ask() {{ "$@" || {{ sleep 10; "$@"; }} || {{ sleep 30; "$@"; }}; }}
state=$(ask squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ]; then
  if [ $code -eq {requeue} ] ||
    {{ [ $code -ne 0 ] && [ $code -ne {cannot_run} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; }}; then
    echo "exit code $code: back to the queue"
    ask scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit $code
"""


def script(job: Job) -> str:
    """The batch file. Raises LaunchError for settings that Slurm would misread."""
    s = job.settings
    limit(s.slurm)
    gpus = f"--gpus-per-node={s.gpus}" if s.gpus else None
    cpus = f"--cpus-per-task={s.cpus}" if s.cpus else None
    asked = {
        "partition": s.slurm.partition,
        "account": s.slurm.account,
        "qos": s.slurm.qos,
        "constraint": s.slurm.constraint,
        "reservation": s.slurm.reservation,
        "mem": s.slurm.mem,
    }
    options = [
        f"--job-name={job.name}",
        f"--nodes={s.nodes}",
        f"--ntasks-per-node={s.ranks}",
        *filter(None, (gpus, cpus)),
        f"--time={s.slurm.time}",
        f"--chdir={Path.cwd()}",
        *(f"--{name}={value}" for name, value in asked.items() if value is not None),
        *([f"--signal=USR1@{s.slurm.signal_s}"] if s.slurm.signal_s else []),
        "--requeue",
        f"--output={log_of(job.run_dir)}",
        "--open-mode=append",
        *s.slurm.extra,
    ]
    for option in options:
        if re.search(r"[\n\r]", option):
            raise LaunchError(f"launch.slurm: {option!r} has a line break")
    step = [f"--nodes={s.nodes}", f"--ntasks={s.world}", *filter(None, (cpus,)), "--kill-on-bad-exit=0", "--wait=120"]
    command = [job.python, "-m", *job.command]
    if s.container and s.slurm.container_with == "pyxis":
        step.append(f"--container-image={s.container}")
        step.append(f"--container-mounts={','.join([*s.mounts, str(job.run_dir.parent)])}")
    elif s.container:
        binds = ",".join([*s.mounts, str(job.run_dir.parent)])
        command = ["apptainer", "exec", *(["--nv"] if s.gpus else []), "--bind", binds, s.container, *command]
    body = BODY.format(
        environment="".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(s.env.items())),
        setup="".join(f"{line}\n" for line in s.setup),
        world=s.world,
        ranks=s.ranks,
        srun=shlex.join(step),
        command=shlex.join(command),
        requeue=REQUEUE,
        cannot_run=CANNOT_RUN,
        restarts=s.restarts,
    )
    head = f"#!/bin/bash\n# {job.run_dir.name}: {s.nodes} nodes x {s.ranks} ranks. Written by 'moetrain launch'.\n"
    return head + "".join(f"#SBATCH {shlex.quote(option)}\n" for option in options) + body


def limit(s: SlurmConfig) -> float:
    """The time limit in minutes. Raises LaunchError: it cannot be read, or the signal would not come before it."""
    if s.signal_s >= minutes(s.time) * 60:
        raise LaunchError(
            f"launch.slurm.signal_s={s.signal_s} is not before the limit launch.slurm.time={s.time}; "
            f"ask for more time, or for a later signal"
        )
    return minutes(s.time)


def minutes(time: int | str) -> float:
    """Slurm's time limit in minutes: 30, "30", "30:00", "12:00:00", "2-00", "2-00:00", "2-00:00:00".

    Raises LaunchError, for a number of over a week, too: YAML makes 43200 of 12:00:00 without quotes.
    """
    if isinstance(time, int):
        if time > WEEK:
            raise LaunchError(
                f"launch.slurm.time={time} is {time / 1440:.4g} days in minutes; in a file put a time like 12:00:00 in "
                f"quotes, or YAML makes a number of it; for more than a week write days as 8-00:00:00"
            )
        return float(time)
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if time.lower() in ("infinite", "unlimited"):
        return float("inf")
    if not found:
        raise LaunchError(f"launch.slurm.time={time} is not a time limit; write 30 (minutes), 12:00:00 or 2-00:00:00")
    days, a, b, c = (None if part is None else int(part) for part in found.groups())
    if days is not None:  # hours[:minutes[:seconds]]
        return days * 1440 + (a or 0) * 60 + (b or 0) + (c or 0) / 60
    if c is not None:  # hours:minutes:seconds
        return (a or 0) * 60 + (b or 0) + c / 60
    return (a or 0) + (b or 0) / 60  # minutes[:seconds]


def log_of(run_dir: Path) -> Path:
    """What the job and its ranks print, over all its starts."""
    return run_dir / "slurm.log"


def submit(job: Job) -> str:
    """Submit the job; its number. Leaves the batch file and a note in the run directory.

    Raises LaunchError: no sbatch here, or what it says. Partitions are looked at before: ``refuse_partition``.
    """
    text = script(job)
    file = job.run_dir / "job.sbatch"
    file.write_text(text)
    number = ask(["sbatch", "--parsable", str(file)], ABSENT).strip().split(";")[0]
    write_note(job.run_dir, "slurm", number, log_of(job.run_dir))
    return number


def refuse_partition(name: str | None) -> None:
    """Raise LaunchError for a partition that the cluster does not have. Several may be named, by commas."""
    known = sorted(set(ask(["sinfo", "--noheader", "--format=%R"], ABSENT).split()))
    for one in (name or "").split(","):
        if one and one not in known:
            raise LaunchError(
                f"launch.slurm.partition={one}: the cluster has no such partition; it has {', '.join(known)}"
            )


def fields(number: str) -> dict[str, str]:
    """What the controller knows of a job, by name; empty when it has forgotten it (after MinJobAge)."""
    try:
        text = ask(["scontrol", "show", "job", "--oneliner", number], ABSENT)
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(re.findall(r"(\w+)=(\S+)", text.splitlines()[0]))


def has_ended(number: str) -> bool:
    """Whether the job has ended, or is so long over that the controller has forgotten it. Raises LaunchError."""
    return fields(number).get("JobState", ENDED[0]) in ENDED


def state(note: Note) -> str:
    """The job's state in one line."""
    known = fields(note.id)
    if not known:
        return f"job {note.id} has ended; Slurm keeps no more of it than 'sacct -j {note.id}'"
    line = f"job {note.id} {known['JobState']}"
    if known["JobState"] == "PENDING":
        line += f" ({known['Reason']})"
    elif known["JobState"] == "RUNNING":
        line += f" on {known['NodeList']}, {known['RunTime']} of {known['TimeLimit']}"
    restarts = int(known.get("Restarts", "0"))
    return line + (f", restarted {restarts} times" if restarts else "")


def cancel(note: Note) -> str:
    """Cancel the job for good; what was done. Ranks get SIGTERM, and the cluster's KillWait to save."""
    if has_ended(note.id):
        return f"job {note.id} has ended already"
    ask(["scontrol", "update", f"JobId={note.id}", "Requeue=0"], ABSENT)
    ask(["scancel", note.id], ABSENT)
    return f"job {note.id} was cancelled"
