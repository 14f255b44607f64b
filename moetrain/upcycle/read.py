"""A Hugging Face folder as a model whose tensors have our names and are read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.config.errors import ConvertError
from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.convert.family import family_of
from moetrain.convert.layout import Piece
from moetrain.convert.load import TIED_HEAD, read_hf_config
from moetrain.convert.tensors import SELECTION_BIAS, pieces_in_memory, pieces_of
from moetrain.model.decoder import Decoder
from moetrain.upcycle.method import Model


def read_parent(folder: Path) -> Model:
    """The model in ``folder``. Raises ConvertError: no such folder, a damaged file, a tensor missing or unknown."""
    if not folder.is_dir():
        raise ConvertError(f"from={folder}: there is no such folder")
    cfg = read_hf_config(folder)
    return Model(cfg, FolderTensors(cfg, folder), str(folder))


class FolderTensors(Mapping[str, Tensor]):
    """The safetensors in ``folder`` by our names, in the dtype that they have there. All names are checked at once."""

    def __init__(self, cfg: ModelConfig, folder: Path) -> None:
        self.folder = folder
        self._files = _open(folder)
        family = family_of(cfg)
        balance: dict[str, Any] = {"bias": {}} if family.zeros and cfg.moe_layers() else {}
        with torch.device("meta"):
            ours = Decoder(cfg, balance, ExpertsConfig()).state_dict()
        self._shapes = {name: tuple(t.shape) for name, t in ours.items()}
        self._pieces: dict[str, list[Piece]] = {}
        for name, shape in self._shapes.items():
            pieces = pieces_in_memory(family, name, shape)
            if not pieces or pieces[0].hf not in self._files:
                pieces = pieces_of(family, name, shape)
            if name.endswith(SELECTION_BIAS) and pieces[0].hf not in self._files:
                continue
            self._pieces[name] = pieces
        needed = {piece.hf for pieces in self._pieces.values() for piece in pieces}
        for name in needed - self._files.keys():
            raise ConvertError(f"tensor '{name}' is missing from '{folder}'")
        for name in self._files.keys() - needed:
            extra = any(re.fullmatch(pattern.format(n_layers=cfg.n_layers), name) for pattern in family.ignored)
            if not extra and not (name == TIED_HEAD and cfg.tie_embeddings):
                raise ConvertError(f"no rule of family {family.name} covers tensor '{name}' of '{folder}'")

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        ours: Tensor | None = None
        for piece in self._pieces[name]:
            theirs = self._files[piece.hf].get_tensor(piece.hf)
            if tuple(theirs.shape) != piece.hf_shape(shape):
                where = f"tensor '{piece.hf}' of '{self.folder}'"
                raise ConvertError(f"{where} has shape {tuple(theirs.shape)}; config.json says {piece.hf_shape(shape)}")
            if ours is None:
                ours = torch.empty(shape, dtype=theirs.dtype)
            piece.copy_to(ours, theirs)
        assert ours is not None
        return ours

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def _open(folder: Path) -> dict[str, Any]:
    """Their tensors' names -> the open file that has each."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConvertError(f"no *.safetensors in '{folder}'")
    found: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ConvertError(f"'{file}' is damaged: {error}") from None
        found |= dict.fromkeys(handle.keys(), handle)
    return found
