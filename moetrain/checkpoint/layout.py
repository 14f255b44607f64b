"""The checkpoints folder: names, manifests, and what a killed run may have left there.

    step-N/       whole: DCP's files and manifest.json, which lists them all with size and SHA-256
    step-N.tmp/   being written. The manifest comes last, so one that has it is whole and lacks only its name
    step-N.old/   being deleted

A folder gets its name step-N by one rename, once all its bytes are on the disk: a kill leaves it complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class FileHash:
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


class DamagedError(Exception):
    """A checkpoint that is not whole; the text says what is wrong with it, without naming the checkpoint."""


def path_of(folder: Path, step: int) -> Path:
    """Where the whole checkpoint of ``step`` lies."""
    return folder / f"step-{step}"


def steps(folder: Path) -> list[int]:
    """Steps that have a step-N folder, newest first."""
    found = [_STEP.fullmatch(p.name) for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted((int(match[1]) for match in found if match), reverse=True)


def hash_file(path: Path, fresh: bool = False) -> FileHash:
    """Size and hash of the file; ``fresh``: as the disk has it now, not as memory still has it. Raises OSError."""
    with path.open("rb") as file:
        if fresh and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileHash(os.fstat(file.fileno()).st_size, digest)


def write_manifest(path: Path, step: int, files: dict[str, FileHash], about: dict[str, Any]) -> None:
    """Write ``path/manifest.json``, whole or not at all. about: further entries, for people."""
    content: dict[str, Any] = {"format": FORMAT, "step": step, **about}
    content["files"] = {name: {"bytes": f.size, "sha256": f.sha256} for name, f in sorted(files.items())}
    content["sha256"] = _self_hash(content)
    temporary = path / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path / MANIFEST)
    sync(path)


def read_manifest(path: Path) -> dict[str, FileHash]:
    """The files that checkpoint ``path`` must have. Raises DamagedError."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        said = content.pop("sha256")
        files = {name: FileHash(f["bytes"], f["sha256"]) for name, f in content["files"].items()}
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{MANIFEST} cannot be read") from None
    if said != _self_hash(content):
        raise DamagedError(f"{MANIFEST} was altered")
    if content["format"] != FORMAT:
        raise DamagedError(f"it has format {content['format']}, and this moetrain reads format {FORMAT}")
    match = _STEP.fullmatch(path.name)
    if match and int(match[1]) != content["step"]:
        raise DamagedError(f"{MANIFEST} is of step {content['step']}")
    return files


def check_file(path: Path, name: str, expected: FileHash, fresh: bool = False) -> None:
    """Raise DamagedError unless file ``name`` of checkpoint ``path`` has the expected content. fresh: see hash_file."""
    try:
        actual = hash_file(path / name, fresh)
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing") from None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
    if actual.size != expected.size:
        raise DamagedError(f"{name} has {actual.size} bytes, not {expected.size}")
    if actual.sha256 != expected.sha256:
        raise DamagedError(f"{name} was altered: its hash differs from the manifest's")


def commit(folder: Path, step: int) -> Path:
    """Give the finished step-N.tmp its name, in place of any step-N that is there; return its path."""
    final = path_of(folder, step)
    old = _set_aside(final) if final.exists() else None
    final.with_suffix(".tmp").rename(final)
    sync(folder)
    if old is not None:
        with suppress(OSError):  # ``tidy`` will try again
            _remove(old)
    return final


def discard(path: Path) -> None:
    """Delete the checkpoint ``path``; a kill on the way leaves no step-N that lacks files. Raises OSError."""
    _remove(_set_aside(path))


def tidy(folder: Path) -> None:
    """Make ``folder``, and clear what a killed run left. Only the run that writes there may do this. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [*folder.glob("step-*.old"), *folder.glob("step-*.tmp")]
    for path in sorted(left):
        final = path.with_suffix("")
        if path.suffix == ".tmp" and (path / MANIFEST).exists() and not final.exists():
            path.rename(final)  # killed between the manifest and the rename
            continue
        with suppress(OSError):  # as on NFS, while a process has a file of it open: nobody takes it for a checkpoint
            _remove(path)
    sync(folder)


def sync(path: Path) -> None:
    """Put the bytes of file ``path``, or the names in that folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path) -> Path:
    old = path.with_suffix(".old")
    if old.exists():
        _remove(old)
    return path.rename(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _self_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
