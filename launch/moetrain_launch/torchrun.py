"""On this machine, by torchrun: alone, or as one of several machines that meet at an address."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import NoReturn

from moetrain_launch.job import Job, LaunchError, Note, is_alive, write_note


def words(job: Job) -> list[str]:
    """The command line that starts this machine's ranks. Raises LaunchError: several nodes and no place to meet."""
    s = job.settings
    nodes = f"{s.nodes}" if s.min_nodes is None else f"{s.min_nodes}:{s.nodes}"
    if s.nodes == 1:
        meet = ["--standalone"]
    elif s.rendezvous is None:
        raise LaunchError(
            f"launch.nodes={s.nodes} needs launch.rendezvous=HOST:PORT of one of the machines; give the same on each"
        )
    else:
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={s.rendezvous}", f"--rdzv-id={job.name}"]
    if s.min_nodes is not None and s.min_nodes > s.nodes:
        raise LaunchError(f"launch.min_nodes={s.min_nodes} is more than launch.nodes={s.nodes}")
    restarts = f"--max-restarts={s.restarts}"
    agent = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={s.ranks}", *meet, restarts]
    return [job.python, *agent, "-m", *job.command]


def run(job: Job) -> NoReturn:
    """Become torchrun: this process ends with it. Leaves a note in the run directory."""
    command = words(job)
    write_note(job.run_dir, "local", str(os.getpid()), job.run_dir / "log.txt")
    # torchrun tells the ranks' address once; a machine that joins later would wait for it in vain, and end the others.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.update(job.settings.env)
    os.execvp(command[0], command)


def state(note: Note) -> str:
    """Whether the launch of ``note`` runs, as far as can be seen from this machine."""
    if note.host != socket.gethostname():
        return f"started on {note.host}; look there"
    return f"RUNNING as process {note.id} on {note.host}" if _is_ours(note) else f"ended on {note.host}"


def cancel(note: Note) -> str:
    """Tell torchrun to stop, which tells its ranks; what was done. Raises LaunchError: it runs elsewhere."""
    if note.host != socket.gethostname():
        raise LaunchError(f"the run was started on {note.host}; cancel it there")
    if not _is_ours(note):
        return "has ended already"
    os.kill(int(note.id), signal.SIGTERM)
    return f"process {note.id} was told to stop"


def _is_ours(note: Note) -> bool:
    """Whether process ``note.id`` is torchrun of this run still, and not another that was given its number since."""
    if not is_alive(int(note.id)):
        return False
    try:
        command = Path(f"/proc/{note.id}/cmdline").read_bytes().split(b"\0")
    except OSError:  # no /proc: a system other than Linux
        return True
    return str(Path(note.log).parent).encode() in command
