"""What a prepare that was stopped has done: kept in the folder that it builds, so that the next call goes on.

A source is surveyed (read, hashed, filtered), then written. Of each, what is finished is kept in a file that is written
to the side, forced to disk and renamed: of a survey every file of the source that was read to its end, if a minute has
passed since the last. A source that is being written has a journal besides, which says how far its shards are on disk
for certain. What lies beyond that is cut off.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.manifest import SPLITS, DomainInfo, domain_info
from moetrain.data.shards import Shard, ShardWriter, shard_prefix
from moetrain.data.sources import SourceFile
from moetrain.data.split import HeldOut, Keys

FOLDER = ".progress"
RECIPE_FILE = "recipe"
TOKENIZER = "tokenizer.json"


@dataclass
class Survey:
    """What the first reading of a source found. ``digests``: of the files that were read, the first of the source.
    ``empty``: how many of them have no document. ``kept``: one byte a document, 1 where it is kept. ``removed``:
    documents by the reason why they are not. ``held_out``: None while files are left to read. ``keys``: of the kept
    documents, as long as they are needed."""

    digests: list[str] = field(default_factory=list)
    empty: int = 0
    replaced: int = 0
    kept: bytearray = field(default_factory=bytearray)
    removed: Counter[str] = field(default_factory=Counter)
    held_out: HeldOut | None = None
    keys: Keys = field(default_factory=Keys)


@dataclass(frozen=True)
class Written:
    """How far a source is written: items (documents, or parts of one that is cut) and bytes of its files that were
    read, documents and bytes of text of each split."""

    items: int = 0
    read: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


class Progress:
    """The progress that ``out`` holds of a data set with this ``recipe``; what is there of another one is removed."""

    def __init__(self, out: Path, recipe: str) -> None:
        self.out, self.folder = out, out / FOLDER
        try:
            known = (self.folder / RECIPE_FILE).read_text(encoding="utf-8")
        except (OSError, ValueError):
            known = ""
        if known != recipe:
            shutil.rmtree(out, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._keep(RECIPE_FILE, recipe.encode())

    def any(self) -> bool:
        """Whether anything has been kept."""
        return any(path.name != RECIPE_FILE for path in self.folder.glob("*"))

    # ---- surveys ---------------------------------------------------------------------------------------------------

    def survey(self, source: str, files: Sequence[SourceFile]) -> Survey | None:
        """The survey of a source that was kept, whole or of its first files, if these are still what they were by size
        and time."""
        try:
            with np.load(self.folder / f"{source}.survey.npz") as found:
                notes = json.loads(bytes(found["notes"]))
                stamps, held_out, keys = _stamps(files), None, Keys()
                if notes["files"] != (stamps if notes["whole"] else stamps[: len(notes["files"])]):
                    return None
                if notes["whole"]:
                    cut = None if notes["cut"] is None else (int(notes["cut"][0]), int(notes["cut"][1]))
                    held_out = HeldOut(frozenset(found["held_out"].tolist()), cut)
                keys.digests.extend(found["texts"].tobytes())
                keys.sizes.frombytes(found["sizes"].tobytes())
                return Survey(
                    digests=notes["digests"],
                    empty=notes["empty"],
                    replaced=notes["replaced"],
                    kept=bytearray(np.unpackbits(found["kept"], count=notes["documents"]).tobytes()),
                    removed=Counter(notes["removed"]),
                    held_out=held_out,
                    keys=keys,
                )
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def keep_survey(self, source: str, files: Sequence[SourceFile], survey: Survey) -> None:
        """Keep a survey of ``files``, all those of the source or the first ones."""
        held_out = survey.held_out
        notes = {
            "files": _stamps(files),
            "digests": survey.digests,
            "empty": survey.empty,
            "replaced": survey.replaced,
            "removed": dict(survey.removed),
            "documents": len(survey.kept),
            "whole": held_out is not None,
            "cut": held_out and held_out.cut,
        }
        temporary = self.folder / f"{source}.survey.tmp"
        with open(temporary, "wb") as file:
            np.savez(
                file,
                notes=np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8),
                kept=np.packbits(np.frombuffer(survey.kept, dtype=np.uint8)),
                held_out=np.asarray(sorted(held_out.whole) if held_out else [], dtype=np.int64),
                texts=np.frombuffer(bytes(survey.keys.digests), dtype=np.uint8),
                sizes=np.asarray(survey.keys.sizes, dtype=np.int64),
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / f"{source}.survey.npz")

    def forget_writing(self) -> None:
        """Forget all that follows from the surveys, since one of them is new."""
        for path in self.folder.iterdir():
            if path.name != RECIPE_FILE and not path.name.endswith(".survey.npz"):
                path.unlink()

    # ---- tokenizer -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that was trained, if it was kept."""
        path = self.folder / TOKENIZER
        return path if path.is_file() else None

    def keep_tokenizer(self, content: str) -> None:
        """Keep a trained tokenizer."""
        self._keep(TOKENIZER, content.encode("utf-8"))

    # ---- shards ----------------------------------------------------------------------------------------------------

    def info(self, source: str) -> DomainInfo | None:
        """What is known of a source whose shards are finished."""
        try:
            info = domain_info(json.loads((self.folder / f"{source}.info").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for split in SPLITS:
            shard = Shard(shard_prefix(self.out, source, split))
            if (shard.documents, len(shard.tokens)) != (info.split(split).documents, info.split(split).tokens):
                return None
        return info

    def keep_info(self, source: str, info: DomainInfo) -> None:
        """Keep what is known of a source whose shards are finished and on disk."""
        self._keep(f"{source}.info", json.dumps(asdict(info)).encode())

    def writers(self, source: str, dtype: np.dtype[Any]) -> tuple[dict[str, ShardWriter], Written]:
        """Writers of a source's shards that go on from its journal, and how far that goes; new ones where there is no
        usable journal."""
        prefixes = {split: shard_prefix(self.out, source, split) for split in SPLITS}
        try:
            written = Written(**json.loads((self.folder / f"{source}.journal").read_bytes()))
            lengths = {split: self._lengths(source, split)[: written.documents[split]] for split in SPLITS}
            if any(len(lengths[split]) != written.documents[split] for split in SPLITS):
                raise ValueError("lengths are missing")
            return {s: ShardWriter(prefixes[s], dtype, lengths[s].tolist()) for s in SPLITS}, written
        except (OSError, ValueError, KeyError, TypeError):
            for split in SPLITS:
                self._lengths_file(source, split).unlink(missing_ok=True)
            return {split: ShardWriter(prefixes[split], dtype) for split in SPLITS}, Written()

    def keep_written(self, source: str, writers: dict[str, ShardWriter], before: Written, now: Written) -> None:
        """Force what was written since ``before`` to disk, then say so in the journal."""
        for split, writer in writers.items():
            writer.flush()
            with open(self._lengths_file(source, split), "ab") as file:
                file.truncate(4 * before.documents[split])
                file.write(np.asarray(writer.lengths[before.documents[split] :], dtype="<i4").tobytes())
                file.flush()
                os.fsync(file.fileno())
        self._keep(f"{source}.journal", json.dumps(asdict(now)).encode())

    def _lengths_file(self, source: str, split: str) -> Path:
        return self.folder / f"{source}.{split}.lengths"

    def _lengths(self, source: str, split: str) -> np.ndarray:
        content = self._lengths_file(source, split).read_bytes()
        return np.frombuffer(content[: len(content) // 4 * 4], dtype="<i4")

    def _keep(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{name}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)


def remove_notes(out: Path) -> None:
    """Remove the notes of a data set that is whole."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _stamps(files: Sequence[SourceFile]) -> list[list[Any]]:
    return [[str(file.path), file.size, file.mtime_ns] for file in files]
