"""safetensors files, read and written part by part: 8 bytes of header length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moetrain.checkpoint.weights import Box, Spec, read_box
from moetrain.comm.ranks import one_line
from moetrain.config.errors import ConvertError

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """One safetensors file. Opening reads the header alone, and holds the file's size to it.

    specs: name -> shape and dtype. metadata: its text entries. Raises ConvertError for a file that is cut short or
    damaged, or holds a dtype that is not covered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._starts: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = _read_header(file, size)
        except (OSError, ValueError, struct.error) as error:
            raise ConvertError(f"'{path}' is damaged or no safetensors file: {one_line(error)}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        data = header.pop("")
        for name, entry in header.items():
            try:
                dtype, shape, (start, end) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
            except (KeyError, TypeError, ValueError):
                raise ConvertError(f"'{path}' is damaged: its header does not describe tensor '{name}'") from None
            if dtype not in DTYPES:
                raise ConvertError(f"'{path}': tensor '{name}' has dtype {dtype}, which is not covered")
            self.specs[name] = Spec(shape, DTYPES[dtype])
            self._starts[name] = data + start
            if end - start != self.specs[name].nbytes:
                raise ConvertError(f"'{path}' is damaged: tensor '{name}' has {end - start} bytes for its shape")
            if data + end > size:
                raise ConvertError(
                    f"'{path}' is cut short: it has {size:,} bytes, and tensor '{name}' ends at {data + end:,}; "
                    "get the file again"
                )

    def read(self, name: str, box: Box = ()) -> Tensor:
        """Part ``box`` of tensor ``name``."""
        try:
            with self.path.open("rb") as file:
                return read_box(file, self._starts[name], self.specs[name], box)
        except (OSError, EOFError) as error:
            raise ConvertError(f"'{self.path}' cannot be read: {one_line(error)}") from None


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The JSON header; under "" where the tensors' bytes begin."""
    start = file.read(8)
    if len(start) < 8 or struct.unpack("<Q", start)[0] + 8 > size:
        raise ValueError(f"its {size:,} bytes end before its header does")
    (length,) = struct.unpack("<Q", start)
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header | {"": 8 + length}


class TensorFolder:
    """The safetensors of a Hugging Face folder: those that its index names; without an index model.safetensors, which
    may have the same weights in another format beside it (Mistral's consolidated.safetensors), or all.

    specs: name -> shape and dtype, of all files. Raises ConvertError for an index that names a file or a tensor which
    is not there, a tensor that is in two files, and damaged files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = _indexed(folder)
        if names is None:
            single = folder / SINGLE
            paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        else:
            paths = sorted({folder / file for file in names.values()})
        if not paths:
            others = "; *.bin files are not read: save them as safetensors" if list(folder.glob("*.bin")) else ""
            raise ConvertError(f"no *.safetensors in '{folder}'{others}")
        for path in paths:
            if not path.is_file():
                raise ConvertError(f"'{folder / INDEX}' names '{path.name}', which is missing; get the file")
        self._files: dict[str, TensorFile] = {}
        for file in map(TensorFile, paths):
            twice = next((name for name in file.specs if name in self._files), None)
            if twice is not None:
                raise ConvertError(f"'{file.path}' and '{self._files[twice].path}' both hold tensor '{twice}'")
            self._files |= dict.fromkeys(file.specs, file)
        absent = next((name for name in names or () if name not in self._files), None)
        if absent is not None:
            raise ConvertError(f"'{folder / INDEX}' names tensor '{absent}', which its file does not hold")
        self.specs = {name: file.specs[name] for name, file in self._files.items()}

    def read(self, name: str, box: Box = ()) -> Tensor:
        """Part ``box`` of tensor ``name``."""
        return self._files[name].read(name, box)


def _indexed(folder: Path) -> dict[str, str] | None:
    """``weight_map`` of the folder's index: tensor -> file. None: it has no index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"'{path}' is damaged: {one_line(error)}") from None


class TensorWriter:
    """A new safetensors file of tensors known by ``specs`` beforehand, each written when it is there, in any order.

    The space is taken at once, so a disk that is too full says so at the start. Raises OSError.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.specs = dict(specs)
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._starts, end = {}, 0
        # Wide numbers first, so that all are aligned.
        for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
            spec = specs[name]
            self._starts[name] = end
            offsets = [end, end := end + spec.nbytes]
            header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("w+b")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._data = 8 + len(text)
        os.posix_fallocate(self._file.fileno(), 0, self._data + end)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write ``tensor``, the rows of ``name`` from ``row`` on (all of it, where it is whole)."""
        spec = self.specs[name]
        assert tensor.dtype == spec.dtype and tuple(tensor.shape[1:]) == spec.shape[1:], name
        skipped = row * prod(spec.shape[1:]) * spec.dtype.itemsize
        self._file.seek(self._data + self._starts[name] + skipped)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
