"""DCP's file writer, which also keeps the hash of what it was given to write.

Hashing on the way to the disk, and again when reading back, tells whether the disk has what memory had.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from moetrain.checkpoint.layout import FileHash


class HashingWriter(FileSystemWriter):
    """Writes one file per rank to folder ``path``, synced to the disk.

    ``hashes``: name of each file that this rank wrote -> what it was given. ``error``: the first OSError that a write
    met; torch's serialiser turns some of them into errors of its own.
    """

    def __init__(self, path: Path) -> None:
        # More writing threads than one would lose the exceptions of all but the first. All that is written is in host
        # memory: copying ahead would only wait for the GPU that a thread starts on, the first, and take memory of it.
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.files = _HashingFiles()
        self.fs = self.files

    @property
    def hashes(self) -> dict[str, FileHash]:
        return {path.name: file_hash for path, file_hash in self.files.hashes.items()}

    @property
    def error(self) -> OSError | None:
        return self.files.errors[0] if self.files.errors else None


class _HashingFiles(FileSystem):
    def __init__(self) -> None:
        self.hashes: dict[Path, FileHash] = {}
        self.errors: list[OSError] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            raise ValueError(f"HashingWriter writes whole files only, not in mode {mode}")
        try:
            with open(path, "wb") as raw:
                stream = _HashingStream(raw, self.errors)
                yield stream
        except OSError as error:
            self.errors.append(error)
            raise
        self.hashes[Path(path)] = FileHash(stream.size, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.hashes[Path(new_path)] = self.hashes.pop(Path(path))


class _HashingStream(io.IOBase):
    """A file that is only appended to."""

    def __init__(self, raw: io.BufferedWriter, errors: list[OSError]) -> None:
        self.raw = raw
        self.errors = errors
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        try:
            written = self.raw.write(data)
        except OSError as error:
            self.errors.append(error)
            raise
        self.digest.update(data)
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def fileno(self) -> int:
        self.raw.flush()
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self.raw.close()
