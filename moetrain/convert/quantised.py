"""Checkpoints that are published quantised, read as the bfloat16 numbers that they stand for: FP8 with a scale for each
block of a matrix (DeepSeek-V3, arXiv 2412.19437), and GPT-OSS's experts in MXFP4 (OCP Microscaling, version 1.0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint.weights import Box, Spec, whole_box
from moetrain.config.errors import ConvertError
from moetrain.convert.files import TensorFolder
from moetrain.convert.source import Source

# the numbers of FP4 (E2M1), and the two of each byte: its low bits come first
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4 = torch.cat((_FP4, -_FP4))
_PAIRS = torch.stack((_FP4.repeat(16), _FP4.repeat_interleave(16)), dim=1)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``. Raises ConvertError: there is none, or it is not that of a model."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read '{file}': {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConvertError(f"'{file}' has no model_type; is '{folder}' a Hugging Face model folder?")
    return config


def tensors_of(folder: Path) -> Source:
    """The safetensors of a Hugging Face folder; where its config.json says that they are quantised, see
    ``Dequantised``. Raises ConvertError."""
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    refuse_unread(folder, config)
    how = config.get("quantization_config")
    return Dequantised(TensorFolder(folder), how.get("weight_block_size") or ()) if how else TensorFolder(folder)


def refuse_unread(folder: Path, config: dict[str, Any]) -> None:
    """Raise ConvertError for a checkpoint that is quantised in a way that is not read."""
    how = config.get("quantization_config")
    if not how:
        return
    method = how.get("quant_method") if isinstance(how, dict) else how
    block = how.get("weight_block_size") if isinstance(how, dict) else None
    in_blocks = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if method != "mxfp4" and not (method == "fp8" and in_blocks):
        raise ConvertError(
            f"'{folder}' is quantised ({method}); only mxfp4, and fp8 with weight_block_size, are read: save it "
            "dequantised first, and without quantization_config in config.json"
        )


class Dequantised:
    """``stored``, with each matrix that has scales beside it as one of bfloat16, and without the scales.

    block: rows and columns of a matrix in FP8 that share a scale, of which those at its end may have fewer.
    Raises ConvertError naming a tensor whose scales are missing or of another shape.
    """

    def __init__(self, stored: Source, block: tuple[int, int] | tuple[()]) -> None:
        self.stored, self.block = stored, block
        self.specs: dict[str, Spec] = {}
        self._parts: dict[str, tuple[str, str]] = {}  # our name -> its tensors of numbers and of scales
        for name, spec in stored.specs.items():
            if spec.dtype == torch.float8_e4m3fn:
                blocks = tuple(-(-n // size) for n, size in zip(spec.shape[-2:], block, strict=False))
                self._add(name, spec.shape, (name, f"{name}_scale_inv"), (*spec.shape[:-2], *blocks))
            elif name.endswith("_blocks") and len(spec.shape) == 4 and spec.dtype == torch.uint8:
                base, (experts, out, groups, size) = name.removesuffix("_blocks"), spec.shape
                self._add(base, (experts, groups * size * 2, out), (name, f"{base}_scales"), spec.shape[:-1])
            else:
                self.specs[name] = spec
        for _, scales in self._parts.values():
            self.specs.pop(scales, None)

    def _add(self, name: str, shape: tuple[int, ...], parts: tuple[str, str], needed: tuple[int, ...]) -> None:
        found = self.stored.specs.get(parts[1])
        if found is None or found.shape != needed:
            what = "is missing" if found is None else f"has shape {found.shape}"
            raise ConvertError(f"tensor '{parts[0]}' is quantised, and '{parts[1]}' {what}; its scales are {needed}")
        self.specs[name], self._parts[name] = Spec(shape, torch.bfloat16), parts

    def read(self, name: str, box: Box = ()) -> Tensor:
        """See ``Source``. Reads the numbers in ``box`` and their scales alone; in MXFP4, the experts in it."""
        if name not in self._parts:
            return self.stored.read(name, box)
        box = whole_box(self.specs[name].shape, box)
        return self._from_fp8(name, box) if self._parts[name][0] == name else self._from_mxfp4(name, box)

    def _from_fp8(self, name: str, box: Box) -> Tensor:
        numbers, scales = self._parts[name]
        cut = list(zip((-2, -1), box[-2:], self.block, strict=True))
        blocks = [slice(s.start // size, -(-s.stop // size)) for _, s, size in cut]
        factors = self.stored.read(scales, (*box[:-2], *blocks)).float()
        for dim, s, size in cut:
            factors = factors.repeat_interleave(size, dim).narrow(dim, s.start % size, s.stop - s.start)
        return (self.stored.read(numbers, box).float() * factors).bfloat16()

    def _from_mxfp4(self, name: str, box: Box) -> Tensor:
        """Their matrices are stored with the summed dimension last, 32 numbers sharing a power of two."""
        numbers, scales = self._parts[name]
        whole = torch.empty([s.stop - s.start for s in box], dtype=torch.bfloat16)
        for i, part in enumerate(whole):
            expert = (slice(box[0].start + i, box[0].start + i + 1),)
            pairs = _PAIRS[self.stored.read(numbers, expert)[0].int()].flatten(-2)
            exponents = self.stored.read(scales, expert)[0].int().unsqueeze(-1) - 127
            part.copy_(torch.ldexp(pairs, exponents).flatten(1).t()[box[1:]])
        return whole
