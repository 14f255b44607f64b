"""Finding the newest whole checkpoint, and loading one under whatever mapping is in force."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moetrain.checkpoint import layout
from moetrain.checkpoint.layout import DamagedError, FileHash
from moetrain.checkpoint.state import decode
from moetrain.comm.ranks import RankError, Ranks, one_line
from moetrain.config.errors import CheckpointError

SHOWN = 3


def newest(folder: Path, verify: bool = True, ranks: Ranks | None = None) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None when it has none. Collective, and the same on all ranks.

    verify: read every file, the ranks sharing the work, and compare its hash with the manifest; False only asks for the
    manifest. Each damaged checkpoint is named in one log line, and the one before it is taken. Changes nothing on disk.
    Raises CheckpointError when there are checkpoints but none is whole: starting over would be a surprise.
    """
    ranks = ranks or Ranks()
    try:
        steps = ranks.first(lambda: layout.steps(folder))
    except RankError as error:
        raise CheckpointError(f"checkpoints in {folder} cannot be listed: {error}") from None
    for step in steps:
        path = layout.path_of(folder, step)
        problem = damage(path, verify, ranks)
        if problem is None:
            return path
        ranks.say(logging.WARNING, f"checkpoint {path} is damaged and is passed over: {problem}")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {folder} is whole; restore one from a copy, or move them away"
        )
    return None


def damage(path: Path, verify: bool, ranks: Ranks, fresh: bool = False) -> str | None:
    """What is wrong with checkpoint ``path``, or None when it is whole. fresh: files are read from the disk, also those
    that memory still has. Collective."""
    try:
        files = ranks.first(lambda: layout.read_manifest(path))
        if verify:
            ranks.each(lambda: _check_share(path, files, ranks, fresh))
    except RankError as error:
        return str(error)
    return None


def load(path: Path, state: dict[str, Any]) -> None:
    """Load checkpoint ``path`` into ``state``, which ``gather_state`` built under the mapping in force, in place.

    Sections that ``state`` lacks are not read (evaluation needs no "optim"). Collective. Hashes are not checked here:
    ``newest`` does. Raises CheckpointError when the checkpoint is of another model or optimizer, naming the first
    differences, or cannot be read.
    """
    ranks = Ranks()
    reader = FileSystemReader(path)
    try:
        metadata = ranks.each(lambda: _metadata(reader))[ranks.rank]
    except RankError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    if state.get("optim") and not any(key.startswith("optim.") for key in metadata.state_dict_metadata):
        what = f"checkpoint {path} holds weights alone, no training to go on with"
        raise CheckpointError(f"{what}; start a run from them with init={path}")
    target: dict[str, Any] = {section: dict(values) if section != "train" else b"" for section, values in state.items()}
    _drop_never_stepped(target, metadata)
    _refuse_other_model(path, target, metadata, ranks)
    try:
        dcp.load(target, storage_reader=reader, no_dist=ranks.alone)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"checkpoint {path} cannot be read: rank {rank}: {one_line(cause)}") from None
    for section, values in target.items():
        if section == "train":
            state["train"] = decode(values)
        else:
            state[section].update(values)


def _check_share(path: Path, files: dict[str, FileHash], ranks: Ranks, fresh: bool) -> None:
    by_size = sorted(files, key=lambda name: (-files[name].size, name))
    for name in by_size[ranks.rank :: ranks.size]:
        layout.check_file(path, name, files[name], fresh)


def _metadata(reader: FileSystemReader) -> Metadata:
    try:
        return reader.read_metadata()
    except OSError:
        raise
    except Exception as error:  # unpickling damaged bytes raises anything
        raise DamagedError(f".metadata is damaged ({type(error).__name__})") from None


def _drop_never_stepped(target: dict[str, Any], metadata: Metadata) -> None:
    """Leave out optimizer state of parameters that the checkpoint has, but whose state it lacks altogether.

    An optimizer makes a parameter's state at its first gradient, so such a one never had any, and zero is its state.
    """
    saved = metadata.state_dict_metadata
    if not any(key.startswith("optim.") for key in saved):
        return
    stepped = {key.rpartition(".")[0] for key in saved if key.startswith("optim.")}
    for key in list(target.get("optim", {})):
        parameter = key.removeprefix("state.").rpartition(".")[0]
        if f"optim.state.{parameter}" not in stepped and f"model.{parameter}" in saved:
            del target["optim"][key]


def _refuse_other_model(path: Path, target: dict[str, Any], metadata: Metadata, ranks: Ranks) -> None:
    saved = metadata.state_dict_metadata
    flat: dict[str, Any] = {}
    for section, values in target.items():
        flat |= {f"{section}.{key}": v for key, v in values.items()} if isinstance(values, dict) else {section: values}
    problems = [p for p in (_difference(key, value, saved.get(key)) for key, value in flat.items()) if p]
    # What no rank asks for: stages of a pipeline each have part of the names. A parameter that is frozen here has no
    # state in the optimizer, whatever the checkpoint has of it.
    names = sorted(key for key in saved if key.split(".")[0] in target)
    trained = {key.rpartition(".")[0] for key in flat if key.startswith("optim.")}
    frozen = [key.startswith("optim.") and key.rpartition(".")[0] not in trained for key in names]
    claimed = torch.tensor([[key in flat for key in names], [not f for f in frozen]], dtype=torch.uint8)
    if not ranks.alone and names:
        dist.all_reduce(claimed, op=dist.ReduceOp.MAX)
    for key, is_asked, is_trained in zip(names, *claimed.tolist(), strict=True):
        problems += [f"{key} is not in this model"] if is_trained and not is_asked else []
    everywhere = list(dict.fromkeys(p for found in ranks.gather(problems[: SHOWN + 1]) for p in found))
    if everywhere:
        more = "; and more" if len(everywhere) > SHOWN else ""
        raise CheckpointError(
            f"checkpoint {path} is of another model or optimizer: {'; '.join(everywhere[:SHOWN])}{more}"
        )


def _difference(key: str, value: Any, saved: object) -> str | None:
    if saved is None:
        return f"it lacks {key}"
    if isinstance(value, Tensor) and isinstance(saved, TensorStorageMetadata) and saved.size != value.shape:
        return f"{key} has shape {tuple(saved.size)} there and {tuple(value.shape)} here"
    return None
