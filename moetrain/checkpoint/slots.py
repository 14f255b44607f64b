"""Files in a node's shared memory, each of which holds one rank's state of one step, whole or known not to be.

    moetrain-KEY/            one folder a run and node; KEY is of the run's id, so no other run's is ever taken
      lock                   held by every rank that lives; what nobody holds is left over
      own-R-0, own-R-1       state of rank R that it put there; one is whole while the other is written
      copy-R-0, copy-R-1     the same state, kept for a rank of another node where there is one

Shared memory outlives the process that wrote it, and ends with its node. A file is 128 bytes of header, the state's
bytes, and a description of them. The header is written last and has a checksum of its own, so that a kill at any moment
leaves a header that tells the truth, or none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHARED = Path("/dev/shm")
STALE_S = 900.0  # left-overs of a run that nobody has gone on with for so long are cleared by the next run of any kind
DATA = 128  # where the state's bytes begin, and what tensors are aligned to
CHUNK = 2**17  # words whose sum is one entry of a checksum
_HEADER = struct.Struct("<8s7qI")
_MAGIC = b"MOESNAP1"
assert _HEADER.size <= DATA


@dataclass(frozen=True)
class Header:
    """step: optimizer steps done. owner: the rank whose state it is. base: step of the newest checkpoint then, 0: none.
    mapping: a number of the mapping and the world size. size, about: bytes of the state and of its description.
    checksum: of both."""

    step: int
    owner: int
    base: int
    mapping: int
    size: int
    about: int
    checksum: int


class Slot:
    """One file. ``bytes_N``: all of it, uint8, shared with whoever else has it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_N = self._locked = torch.empty(0, dtype=torch.uint8)
        if path.exists():
            self._map()

    def reserve(self, size: int, about: int) -> None:
        """Have room for so many bytes of state and description. Raises OSError: without the memory now, the first write
        to it would end the process."""
        whole = DATA + _aligned(size) + about
        if len(self.bytes_N) < whole or not self.path.exists():
            whole += about + 2**12  # descriptions grow with the run
            try:
                with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, whole)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
            self._map()

    def lock(self) -> None:
        """Have GPUs write to it at full speed: lock its pages in memory, which takes a while, but once only. Where it
        fails, copies are as right, and slower."""
        if self._locked is self.bytes_N:
            return
        cuda, failed = torch.cuda.cudart(), 0
        if len(self._locked):  # it has grown
            failed = int(cuda.cudaHostUnregister(self._locked.data_ptr()))
        failed |= int(cuda.cudaHostRegister(self.bytes_N.data_ptr(), len(self.bytes_N), 1))  # 1: for all GPUs
        if failed:
            with suppress(RuntimeError):  # the next kernel raises the error: let it be this one
                torch.ones(1, device="cuda")
        self._locked = self.bytes_N

    def header(self) -> Header | None:
        """The header, None where there is none that holds."""
        if len(self.bytes_N) < DATA:
            return None
        raw = self.bytes_N[: _HEADER.size].numpy().tobytes()
        magic, *numbers, check = _HEADER.unpack(raw)
        header = Header(*numbers)
        fits = DATA + _aligned(header.size) + header.about <= len(self.bytes_N)
        return header if magic == _MAGIC and check == zlib.crc32(raw[:-4]) and fits else None

    def invalidate(self) -> None:
        """What is in it counts no more."""
        self.bytes_N[:DATA] = 0

    def seal(self, header: Header) -> None:
        """What is in it is whole."""
        raw = _HEADER.pack(_MAGIC, *astuple(header), 0)
        raw = raw[:-4] + struct.pack("<I", zlib.crc32(raw[:-4]))
        self.bytes_N[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    def data(self, size: int) -> Tensor:
        """The state's bytes."""
        return self.bytes_N[DATA : DATA + size]

    def about(self, size: int, about: int) -> Tensor:
        """The description's bytes."""
        return self.bytes_N[DATA + _aligned(size) :][:about]

    def payload(self, header: Header) -> Tensor:
        """State and description in one piece, as they are copied."""
        return self.bytes_N[DATA : DATA + _aligned(header.size) + header.about]

    def _map(self) -> None:
        with self.path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            view = mmap.mmap(file.fileno(), size) if size else bytearray()
            self.bytes_N = torch.frombuffer(view, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def checksum(bytes_N: Tensor) -> int:
    """CRC-32 of the sums of stretches of 64-bit words, modulo 2^64: as fast as memory is read, and any one word that
    differs changes it. In numpy, whose sums use one thread: those of torch would take cores from training."""
    raw = bytes_N.numpy()
    words = raw[: len(raw) // 8 * 8].view(np.int64)
    whole = len(words) // CHUNK * CHUNK
    with np.errstate(over="ignore"):
        sums = [*words[:whole].reshape(-1, CHUNK).sum(1), words[whole:].sum()]
    return zlib.crc32(raw[len(words) * 8 :].tobytes(), zlib.crc32(np.array(sums, dtype=np.int64).tobytes()))


class Folder:
    """The folder of one run on this node, made when it is first needed."""

    def __init__(self, key: str, root: Path = SHARED) -> None:
        self.root, self.path = root, root / f"moetrain-{key}"
        self._lock: int | None = None
        if self.path.is_dir():
            self.hold()

    def hold(self) -> None:
        """Be there, and keep other runs from clearing it. Raises OSError."""
        if self._lock is not None and self.path.exists():
            return
        self.path.mkdir(mode=0o700, exist_ok=True)
        if self.path.is_symlink() or self.path.stat().st_uid != os.geteuid():
            raise PermissionError(1, "belongs to another user", str(self.path))
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def files(self) -> list[str]:
        """Names of the slots that are there."""
        found = self.path.glob("*-*-[01]") if self.path.is_dir() else []
        return sorted(path.name for path in found)

    def size(self) -> int:
        """Bytes that they take."""
        return sum((self.path / name).stat().st_size for name in self.files())

    def touch(self) -> None:
        """Say that somebody still goes on with the run."""
        os.utime(self.path / "lock")

    def leave(self, remove: bool) -> None:
        """Let go; ``remove`` it, where it is not gone already."""
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear_others(self, age_s: float = STALE_S) -> None:
        """Remove what runs have left that ended, and that for ``age_s`` seconds nobody has gone on with."""
        for path in self.root.glob("moetrain-*"):
            with suppress(OSError):
                if path != self.path and time.time() - (path / "lock").stat().st_mtime >= age_s:
                    _remove_free(path)


def clear(key: str, root: Path = SHARED) -> None:
    """Remove what an ended run has left here; one that lives keeps what it has."""
    with suppress(OSError):
        _remove_free(root / f"moetrain-{key}")


def _remove_free(path: Path) -> None:
    lock = os.open(path / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def node_of(root: Path) -> str:
    """A name of the memory behind ``root``: ranks that get the same one see the same files."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {root.stat().st_dev} {root.resolve()}"


def room(root: Path) -> int:
    """Bytes that ``root`` may still take: of its file system, of the machine, and of the container's limit."""
    system = os.statvfs(root)
    free = [system.f_bavail * system.f_frsize]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max", or no such files
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _aligned(size: int) -> int:
    return -(-size // DATA) * DATA
