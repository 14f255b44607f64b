"""Saving training state while training goes on."""

from __future__ import annotations

import logging
import shutil
import threading
import warnings
import zlib
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from moetrain.checkpoint import layout
from moetrain.checkpoint.layout import FileHash
from moetrain.checkpoint.load import damage, newest
from moetrain.checkpoint.state import to_cpu
from moetrain.checkpoint.writer import HashingWriter
from moetrain.comm.ranks import RankError, Ranks, lost_connection, one_line
from moetrain.config.errors import CheckpointError

# One process without a group is a normal case here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpointer:
    """Writes checkpoints of one run to a folder that all ranks share: step-N, each complete or absent (see ``layout``).

    A save that fails on any rank (disk full, say) fails on all of them: one line in the log says so, what was written
    of it is deleted, older checkpoints stay, and training goes on. ``failed`` lists the steps of these saves. After
    each save the older ones are read again; ``rotten`` lists those that have gone bad.

    folder: belongs to this run alone, since left-overs of a killed one are cleared here. keep: checkpoints to keep.
    asynchronous: write in a thread; ``save`` then only copies the state. timeout_s: how long ranks wait for each other.
    Collective, as are all methods but ``last_good`` and ``last_good_step``. Raises CheckpointError when the folder
    cannot be written.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool, timeout_s: float = 1800) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self.failed: list[int] = []
        self.rotten: list[int] = []
        self._whole: Path | None = None
        self._thread: threading.Thread | None = None
        # A group of its own: the thread's collectives run beside those of training.
        own = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if dist.is_initialized() else None
        self._ranks = Ranks(own)
        try:
            self._ranks.first(lambda: layout.tidy(folder))
        except RankError as error:
            raise CheckpointError(f"checkpoint folder {folder} cannot be written: {error}") from None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save ``state`` (of ``gather_state``) as the checkpoint of ``step``, in place of one that is already there.

        Waits for the save before it, then copies the state to host memory; training may change it on return.
        """
        self.wait()
        staged: dict[str, Any] | Exception
        try:
            staged = to_cpu(state)
            if self._ranks.rank != 0:
                staged.pop("train", None)  # equal on all ranks: the first one's is kept
        except Exception as error:  # out of memory: the others must hear of it, in the thread
            staged = error
        if self.asynchronous:
            # A daemon, so that a run that must end does not wait for a rank that is gone.
            self._thread = threading.Thread(target=self._save, args=(step, staged), daemon=True, name="checkpoint")
            self._thread.start()
        else:
            self._save(step, staged)

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def newest(self, verify: bool = True) -> Path | None:
        """The newest whole checkpoint of the folder, or None; see ``load.newest``."""
        self.wait()
        self._whole = newest(self.folder, verify, self._ranks)
        return self._whole

    def last_good(self) -> str:
        """Path of the newest checkpoint known to be whole, for messages; "none" when there is none."""
        return str(self._whole or "none")

    def last_good_step(self) -> int:
        """Its step; 0 when there is none."""
        return int(self._whole.name.removeprefix("step-")) if self._whole else 0

    def _save(self, step: int, staged: dict[str, Any] | Exception) -> None:
        temporary = layout.path_of(self.folder, step).with_suffix(".tmp")
        ranks = self._ranks
        try:
            self._write(temporary, step, staged)
            self._whole = ranks.first(lambda: layout.commit(self.folder, step))
        except Exception as error:
            self.failed.append(step)
            goes_on = "" if lost_connection(error) else "training goes on, "
            why = f"{one_line(error)}; {goes_on}last good checkpoint: {self.last_good()}"
            ranks.say(logging.ERROR, f"checkpoint of step {step} was not saved: {why}")
            with suppress(Exception):  # when a rank is gone, nobody can be waited for
                ranks.first(lambda: shutil.rmtree(temporary, ignore_errors=True))
            return
        ranks.say(logging.INFO, f"checkpoint of step {step} saved")
        try:
            proven = self._prove(step)
            ranks.first(lambda: self._prune(proven))
        except Exception as error:
            if not lost_connection(error):  # of a rank that is gone, training will hear
                ranks.say(logging.WARNING, f"old checkpoints in {self.folder} could not be deleted: {one_line(error)}")

    def _write(self, temporary: Path, step: int, staged: dict[str, Any] | Exception) -> None:
        """Write all of step-N.tmp and prove it: DCP's files, read back by their writers, then the manifest."""
        ranks = self._ranks
        ranks.each(lambda: _refuse(staged))
        need = sum(dict(ranks.gather(_size(staged))).values())  # stages of a pipeline have names of their own
        ranks.first(lambda: _make_room(temporary, need))
        writer = HashingWriter(temporary)
        try:
            dcp.save(staged, storage_writer=writer, process_group=ranks.group, no_dist=ranks.alone)
        except CheckpointException as error:
            raise _cause(error, writer, ranks) from None
        shares = ranks.each(lambda: _read_back(temporary, writer.hashes))
        files = {name: file_hash for share in shares for name, file_hash in share.items()}
        about = {"world_size": ranks.size, "torch": torch.__version__}
        ranks.first(lambda: _finish(temporary, step, files, about))

    def _prove(self, step: int) -> list[int]:
        """``step``, which has just been proved whole, and the newest before it that still are, ``keep`` between them.
        Each that has gone bad since is named, once: before it is needed, and while there is another."""
        ranks, proven = self._ranks, [step]
        for old in ranks.first(lambda: [s for s in layout.steps(self.folder) if s < step]):
            if len(proven) == self.keep:
                break
            path = layout.path_of(self.folder, old)
            problem = damage(path, True, ranks, fresh=True)
            if problem is None:
                proven.append(old)
            elif old not in self.rotten:
                self.rotten.append(old)
                others = f"newest that is whole: {layout.path_of(self.folder, step)}"
                ranks.say(logging.ERROR, f"checkpoint {path} has gone bad on its disk: {problem}; {others}")
        return proven

    def _prune(self, proven: list[int]) -> None:
        """Delete what is older than the ``keep`` checkpoints that are known to be whole; with fewer, nothing."""
        for old in [s for s in layout.steps(self.folder) if s < proven[-1] and len(proven) == self.keep]:
            layout.discard(layout.path_of(self.folder, old))


def _refuse(staged: dict[str, Any] | Exception) -> None:
    if isinstance(staged, Exception):
        raise staged


def _size(staged: Any) -> tuple[int, int]:
    """(hash of the names, bytes of their whole tensors): ranks with the same names write these once between them."""
    tensors = {f"{part}.{name}": value for part, values in staged.items() if isinstance(values, dict)
               for name, value in values.items() if isinstance(value, Tensor)}  # fmt: skip
    names = zlib.crc32(" ".join(sorted(tensors)).encode())
    return names, sum(value.numel() * value.element_size() for value in tensors.values())


def _make_room(path: Path, need: int) -> None:
    """Make ``path`` an empty folder. Raises OSError when the disk lacks the room for ``need`` bytes."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    free = shutil.disk_usage(path).free
    if free < need:
        raise OSError(f"it needs {need / 2**20:,.0f} MiB, and the disk has {free / 2**20:,.0f} MiB free")


def _cause(error: CheckpointException, writer: HashingWriter, ranks: Ranks) -> RankError:
    """What DCP's error, which all ranks got, is about. torch's serialiser hides OSErrors; the writer has them."""
    rank, (failure, _) = min(error.failures.items())
    told = ranks.gather(one_line(writer.error) if writer.error else None)
    rank, text = next(((r, t) for r, t in enumerate(told) if t), (rank, one_line(failure)))
    return RankError(text if ranks.alone else f"rank {rank}: {text}")


def _read_back(path: Path, written: dict[str, FileHash]) -> dict[str, FileHash]:
    for name, expected in written.items():
        layout.check_file(path, name, expected)
    return written


def _finish(path: Path, step: int, files: dict[str, FileHash], about: dict[str, Any]) -> None:
    for name, expected in files.items():
        if not (path / name).exists() or (path / name).stat().st_size != expected.size:
            raise OSError(f"{name}, which another rank wrote, is not in {path} as seen by rank 0: not a shared folder?")
    layout.write_manifest(path, step, files, about)
