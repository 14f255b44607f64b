"""What is launched, and the note of it that stays in the run directory."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrain_launch.settings import LaunchConfig

REQUEUE = 85  # exit code of ranks that were told to stop, have saved, and ask to go on
CANNOT_RUN = 2  # exit code for a config or data that cannot run: to try again is no use
KLOG = re.compile(r"[IWEF]\d{4} [\d:.]+ ")  # the beginning of lines that kubectl logs before it says what is wrong


class LaunchError(ValueError):
    """A job that cannot be started, found or stopped: one line that says what to do."""


@dataclass(frozen=True)
class Job:
    """One run to start. run_dir: absolute. command: what every rank runs, as words after ``python -m``; the same words
    start the run and go on with it."""

    run_dir: Path
    command: tuple[str, ...]
    settings: LaunchConfig

    @property
    def name(self) -> str:
        """Name for schedulers, made of the run directory's: lower case, digits and dashes, as Kubernetes wants it."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.run_dir.name.lower()).strip("-")
        plain = plain if plain[:1].isalpha() else f"run-{plain}"
        return plain[:50].rstrip("-")

    @property
    def python(self) -> str:
        """The interpreter of the ranks."""
        return self.settings.python or ("python" if self.settings.container else sys.executable)


@dataclass(frozen=True)
class Note:
    """Where a run was started: ``launch*.json`` of a run directory. id: Slurm's job, or the process on ``host``."""

    kind: str
    id: str
    host: str
    log: str
    version: int = 1


def write_note(run_dir: Path, kind: str, id: str, log: Path) -> None:
    """Write the note, whole or not at all; of local launches there is one per machine. Raises OSError."""
    host = socket.gethostname()
    file = run_dir / (f"launch-{host}.json" if kind == "local" else "launch.json")
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(Note(kind, id, host, str(log)))) + "\n")
    temporary.replace(file)


def notes(run_dir: Path) -> list[Note]:
    """The notes in ``run_dir``. Raises LaunchError: there are none, or one cannot be read."""
    if not run_dir.is_dir():
        raise LaunchError(f"{run_dir}: there is no such folder")
    found = []
    for file in sorted(run_dir.glob("launch*.json")):
        try:
            found.append(Note(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            raise LaunchError(f"{file} cannot be read; take it away, and use the scheduler's own commands") from None
    if not found:
        raise LaunchError(f"{run_dir} was not started by 'moetrain launch': it has no launch.json")
    return found


def ask(words: Sequence[str], absent: str, text: str | None = None) -> str:
    """Run a scheduler's command; what it prints. text: its standard input.

    Raises LaunchError: ``absent`` when there is no such program, or the last line of what it says when it fails.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise LaunchError(f"{words[0]} was not found on this machine; {absent}") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{words[0]} gave no answer for 60 s; is the scheduler up?") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        said = [line for line in said if not KLOG.match(line)] or said
        raise LaunchError(f"{words[0]} refused: {' '.join(said[-3:])}")
    return done.stdout


def is_alive(pid: int) -> bool:
    """Whether there is a process ``pid`` on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
