"""The weights of a checkpoint, read and written part by part by one process: never a whole model in memory."""

from __future__ import annotations

import io
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemReader, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moetrain.checkpoint import layout
from moetrain.checkpoint.layout import DamagedError
from moetrain.checkpoint.writer import HashingWriter
from moetrain.comm.ranks import one_line
from moetrain.config.errors import CheckpointError, UserError

MODEL = "model."
OPTIMIZER = "optim.state."
# Bytes that are read and written in one go.
BLOCK = 2**26
# One slice per dimension, with start and stop; those left out at the end are whole.
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Of a tensor, which may be on the meta device or a DTensor."""
        return cls(tuple(tensor.shape), tensor.dtype)


def whole_box(shape: tuple[int, ...], box: Box = ()) -> Box:
    """``box`` with a slice for every dimension of ``shape``."""
    return (*box, *(slice(0, n) for n in shape[len(box) :]))


def read_box(file: BinaryIO, start: int, spec: Spec, box: Box = ()) -> Tensor:
    """Part ``box`` of the tensor whose bytes, contiguous, begin at ``start`` of ``file``. Raises OSError, EOFError.

    A stretch of the file goes straight into the result; of other parts only the pages that hold them are read.
    """
    box = whole_box(spec.shape, box)
    sizes = tuple(s.stop - s.start for s in box)
    inner = next((i for i, n in enumerate(sizes) if n != 1), len(sizes))
    if sizes[inner + 1 :] == spec.shape[inner + 1 :]:
        strides = [prod(spec.shape[i + 1 :]) for i in range(len(box))]
        first = sum(s.start * stride for s, stride in zip(box, strides, strict=True))
        part = torch.empty(sizes, dtype=spec.dtype)
        file.seek(start + first * spec.dtype.itemsize)
        if part.numel() and file.readinto(part.view(-1).view(torch.uint8).numpy()) != part.nbytes:  # type: ignore[attr-defined]
            raise EOFError("the file ends before its tensors do")
        return part
    mapped = np.memmap(file, np.uint8, mode="c", offset=start, shape=(spec.nbytes,))
    return torch.from_numpy(mapped).view(spec.dtype).view(spec.shape)[box].clone()


class SavedWeights:
    """Parameters and persistent buffers of checkpoint ``path`` (a step-N folder), saved under any mapping.

    section: what their names begin with there; with OPTIMIZER they are "<parameter>.<quantity>", its optimizer's state.
    specs: our name -> shape and dtype. trained: whether a run saved it (``write_weights`` keeps no progress). Raises
    CheckpointError when the checkpoint cannot be read; that its files are what they were is for ``load.newest`` or
    ``load.damage`` to say.
    """

    def __init__(self, path: Path, section: str = MODEL) -> None:
        self.path, self.section = path, section
        try:
            metadata = FileSystemReader(path).read_metadata()
        except Exception as error:  # unpickling damaged bytes raises anything
            raise CheckpointError(f"checkpoint {path} cannot be read: .metadata: {one_line(error)}") from None
        self._places = metadata.storage_data
        self.trained = "train" in metadata.state_dict_metadata
        self._tensors = {
            name.removeprefix(section): saved
            for name, saved in metadata.state_dict_metadata.items()
            if name.startswith(section) and isinstance(saved, TensorStorageMetadata)
        }
        self.specs = {name: Spec(tuple(t.size), t.properties.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, box: Box = ()) -> Tensor:
        """Part ``box`` of tensor ``name``; of a chunk that the saving ranks wrote, no more is read than that takes."""
        spec = self.specs[name]
        box = whole_box(spec.shape, box)
        found: Tensor | None = None
        for i, chunk in enumerate(self._tensors[name].chunks):
            theirs = [slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, theirs, strict=True)]
            if any(s.stop <= s.start for s in both):
                continue
            inside = tuple(slice(s.start - t.start, s.stop - t.start) for s, t in zip(both, theirs, strict=True))
            part = self._read_chunk(name, chunk, i, inside)
            if both == list(box):
                return part
            if found is None:
                found = torch.empty([s.stop - s.start for s in box], dtype=spec.dtype)
            found[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(both, box, strict=True))] = part
        return torch.empty([s.stop - s.start for s in box], dtype=spec.dtype) if found is None else found

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata, number: int, box: Box) -> Tensor:
        place = self._places[MetadataIndex(self.section + name, chunk.offsets, number)]
        spec = Spec(tuple(chunk.sizes), self.specs[name].dtype)
        try:
            with (self.path / place.relative_path).open("rb") as file:
                start = _data_of(file, place.offset, place.length, spec)
                if start is not None:
                    return read_box(file, start, spec, box)
                file.seek(place.offset)
                return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)[box].clone()  # type: ignore[no-any-return]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, struct.error) as error:
            raise CheckpointError(
                f"checkpoint {self.path} cannot be read: {name} in {place.relative_path}: {one_line(error)}"
            ) from None


def _data_of(file: BinaryIO, offset: int, length: int, spec: Spec) -> int | None:
    """Where in ``file`` the bytes of a tensor begin that torch.save wrote at ``offset``; None: not in plain order."""
    window = _Window(file, offset, length)
    saved = torch.load(window, map_location="meta", weights_only=True)  # type: ignore[arg-type]
    if Spec.of(saved) != spec or not saved.is_contiguous() or saved.storage_offset():
        return None
    window.seek(0)
    with zipfile.ZipFile(window) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    # A zip file says in front of every record how long its name and its extra field are.
    file.seek(offset + record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return int(offset + record.header_offset + 30 + name_length + extra_length)


class _Window(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.start + self.at)
        data = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


Read = Callable[[str, Box], Tensor]


def write_weights(
    folder: Path, specs: Mapping[str, Spec], read: Read, optimizer: tuple[Mapping[str, Spec], Read] | None = None
) -> Path:
    """Write step-0 in ``folder``: a checkpoint of weights alone, which ``read(name, box)`` gives part by part.

    optimizer: the same of "<parameter>.<quantity>", where optimizer state goes with them.
    Experts are chunks of their own, so that a rank which reads some of them reads no others. The checkpoint appears
    when it is whole, with its manifest. Returns its path. Raises CheckpointError when it cannot be written.
    """
    final = layout.path_of(folder, 0)
    temporary = final.with_suffix(".tmp")
    writer = HashingWriter(temporary)
    state = {"model": _shapes(specs)}
    reads = {MODEL: read}
    if optimizer is not None:
        state["optim"] = {f"state.{name}": t for name, t in _shapes(optimizer[0]).items()}
        reads[OPTIMIZER] = optimizer[1]
    try:
        layout.tidy(folder)
        temporary.mkdir()
        dcp.save(state, storage_writer=writer, planner=_PartByPart(reads), no_dist=True)
        for name, written in writer.hashes.items():
            layout.check_file(temporary, name, written)
        layout.write_manifest(temporary, 0, writer.hashes, {"world_size": 1, "torch": torch.__version__})
        return layout.commit(folder, 0)
    except (CheckpointException, DamagedError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = writer.error or next(iter(error.failures.values()))[0]
        if isinstance(cause, UserError):
            raise cause from None
        raise CheckpointError(f"checkpoint {final} was not written: {one_line(cause)}") from None


def _shapes(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    return {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in specs.items()}


class _PartByPart(DefaultSavePlanner):
    """Plans by shapes alone, and reads each part when its turn to be written comes. reads: section -> its ``Read``."""

    def __init__(self, reads: Mapping[str, Read]) -> None:
        super().__init__()
        self.reads = reads

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, meta in self.state_dict.items():
            properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=meta.dtype))
            for box in blocks(name, Spec.of(meta)):
                offsets = torch.Size(s.start for s in box)
                chunk = ChunkStorageMetadata(offsets, torch.Size(s.stop - s.start for s in box))
                data = TensorWriteData(chunk, properties, meta.shape)
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None and write_item.tensor_data.chunk is not None
        chunk = write_item.tensor_data.chunk
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        section = next(section for section in self.reads if write_item.index.fqn.startswith(section))
        return self.reads[section](write_item.index.fqn.removeprefix(section), box).contiguous()


def blocks(name: str, spec: Spec) -> Iterator[Box]:
    """The parts in which tensor ``name`` is best passed on: expert by expert, all else in stretches of rows."""
    if not spec.shape:
        yield ()
        return
    rows = 1 if ".experts." in name else max(1, BLOCK * spec.shape[0] // max(1, spec.nbytes))
    for start in range(0, spec.shape[0], rows):
        yield whole_box(spec.shape, (slice(start, min(start + rows, spec.shape[0])),))
