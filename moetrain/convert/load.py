"""Hugging Face checkpoint -> our model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.weights import Box, Spec, whole_box
from moetrain.comm.ranks import one_line
from moetrain.config.check import check_model
from moetrain.config.errors import ConvertError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import Config, ModelConfig
from moetrain.convert.family import Family, family_named, family_of
from moetrain.convert.layout import Piece
from moetrain.convert.quantised import read_config, refuse_unread, tensors_of
from moetrain.convert.source import Held, Source
from moetrain.convert.tensors import SELECTION_BIAS, is_training_state, pieces_in_memory, pieces_of
from moetrain.model.decoder import Decoder
from moetrain.moe.options import as_options

log = logging.getLogger("moetrain")

TIED_HEAD = "lm_head.weight"
ROWS = 8192
# Checkpoints of old releases (Llama 2) hold them, though they follow from config.json.
FREQUENCIES = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def read_hf_config(folder: Path | str) -> ModelConfig:
    """Our config of the checkpoint in ``folder``.

    Raises ConvertError (no config.json, or settings that are not covered or contradict each other) and ConfigError (a
    family that is not known).
    """
    folder = Path(folder)
    config = read_config(folder)
    refuse_unread(folder, config)
    family = family_named(config["model_type"])
    try:
        model = family.from_hf_config(config)
        _check_model(model)
        return model
    except ConvertError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of the rules above, and of Python
        raise ConvertError(f"'{folder / 'config.json'}' describes no {family.name} model: {one_line(error)}") from None


def _check_model(model: ModelConfig) -> None:
    """Raise ConfigError for numbers that no run could have."""
    check_model(model)
    whole = Config()
    whole.model = model
    if check_router := getattr(as_options(ROUTERS, model.router), "check", None):
        check_router(whole)


@torch.no_grad()
def load_hf(model: Decoder, source: Path | str | Mapping[str, Tensor]) -> None:
    """Fill ``model`` (on its device, not yet made parallel) from ``source``, one tensor at a time.

    source: a folder of safetensors, or a mapping of names as in ``save_pretrained`` or ``state_dict()``. Values are
    cast to the model's dtype. Raises ConvertError naming the tensor that is missing, of another shape or unknown.
    """
    targets = model.state_dict()
    if any(isinstance(t, DTensor) or t.is_meta for t in targets.values()):
        raise ConvertError("load_hf fills whole tensors with storage; call it before the model is made parallel")
    theirs: Source = Held(source) if isinstance(source, Mapping) else tensors_of(Path(source))
    imported = Imported(model.cfg, theirs, {name: Spec.of(t) for name, t in targets.items()})
    for fqn, pieces in imported.pieces.items():
        for piece in pieces:
            piece.copy_to(targets[fqn], theirs.read(piece.hf))


class Imported:
    """``theirs``, tensors of a Hugging Face checkpoint, as a ``Source`` under our names.

    cfg: the model, whose family's rules hold. ours: the tensors that it has. All names and shapes are compared here,
    before anything is read. A selection bias that the checkpoint lacks is left out of ``specs``.
    Raises ConvertError naming the tensor that is missing, of another shape or unknown, or a tied head that differs.
    """

    def __init__(self, cfg: ModelConfig, theirs: Source, ours: Mapping[str, Spec]) -> None:
        self.theirs = theirs
        self.pieces: dict[str, list[Piece]] = {}
        family = family_of(cfg)
        ours = {name: spec for name, spec in ours.items() if not is_training_state(name)}
        places, hollow = _places(family, ours), family.hollow(cfg)
        ignored = []
        for name, spec in theirs.specs.items():
            if name in places:
                if not spec.dtype.is_floating_point:
                    kind = str(spec.dtype).removeprefix("torch.")
                    raise ConvertError(f"tensor '{name}' holds {kind}, not floating-point numbers; dequantise it first")
                for piece in places[name]:
                    _check_shape(piece, ours[piece.ours].shape, spec.shape)
                    self.pieces.setdefault(piece.ours, []).append(piece)
            elif _is_ignored(family, cfg, name) or spec.shape == hollow.get(name):
                ignored.append(name)
            elif not (name == TIED_HEAD and cfg.tie_embeddings):
                _refuse_unknown(family, name, theirs)
        self.pieces = {fqn: self.pieces[fqn] for fqn in ours if fqn in self.pieces}
        for fqn, spec in ours.items():
            if fqn in self.pieces or not fqn.endswith(SELECTION_BIAS):
                _check_covered(family, fqn, spec.shape, self.pieces.get(fqn, []), theirs)
        if cfg.tie_embeddings and TIED_HEAD in theirs.specs and "embed.weight" in self.pieces:
            _check_tied(theirs, self.pieces["embed.weight"][0].hf)
        if ignored:
            log.info("not imported: %d tensors that the model has no part for, from %s", len(ignored), ignored[0])
        self.specs = {fqn: Spec(ours[fqn].shape, theirs.specs[p[0].hf].dtype) for fqn, p in self.pieces.items()}

    def read(self, name: str, box: Box = ()) -> Tensor:
        """See ``Source``. Reads the experts in ``box`` alone; of rearranged tensors, all of these experts."""
        spec, pieces = self.specs[name], self.pieces[name]
        box = whole_box(spec.shape, box)
        if not pieces[0].index:
            return self._part(pieces[0], spec.shape, box)
        whole = torch.empty([s.stop - s.start for s in box], dtype=spec.dtype)
        for piece in pieces:
            n = len(piece.index)
            if all(s.start <= i < s.stop for i, s in zip(piece.index, box, strict=False)):
                place = tuple(i - s.start for i, s in zip(piece.index, box, strict=False))
                whole[place] = self._part(piece, spec.shape[n:], box[n:])
        return whole

    def _part(self, piece: Piece, shape: tuple[int, ...], box: Box) -> Tensor:
        """Part ``box`` of what ``piece`` holds, which is ours of ``shape``."""
        if piece.rearrange is None:
            first = piece.first_row(shape)
            rows = [slice(s.start + first, s.stop + first) for s in box[:1]]
            return self.theirs.read(piece.hf, (*rows, *box[1:]))
        if not piece.rearrange.keeps_first:
            return piece.rearrange.to_ours(self.theirs.read(piece.hf), shape)[box]
        some = self.theirs.read(piece.hf, box[:1])
        return piece.rearrange.to_ours(some, (some.shape[0], *shape[1:]))[(slice(None), *box[1:])]


def _places(family: Family, ours: Mapping[str, Spec]) -> dict[str, list[Piece]]:
    """Their name -> where it goes, for both namings."""
    places: dict[str, list[Piece]] = {}
    for fqn, spec in ours.items():
        covered = [] if fqn.endswith(SELECTION_BIAS) and not family.zeros else pieces_of(family, fqn, spec.shape)
        for piece in [*pieces_in_memory(family, fqn, spec.shape), *covered]:
            mine = places.setdefault(piece.hf, [])
            if piece not in mine:
                mine.append(piece)
    return places


def _check_shape(piece: Piece, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    expected = piece.hf_shape(ours)
    if theirs == expected:
        return
    padding = ""
    if piece.ours in ("embed.weight", "head.weight") and theirs[0] > expected[0] and theirs[1:] == expected[1:]:
        padding = (
            f": vocabulary padding, {theirs[0] - expected[0]} rows more than vocab_size={expected[0]}; to keep them, "
            f'set "vocab_size": {theirs[0]} in config.json'
        )
    raise ConvertError(f"tensor '{piece.hf}' has shape {theirs}; the model needs {expected}{padding}")


def _check_covered(family: Family, fqn: str, shape: tuple[int, ...], pieces: list[Piece], theirs: Source) -> None:
    """Raise ConvertError unless ``pieces`` are all of our tensor ``fqn``, once."""
    filled = sum(torch.Size(theirs.specs[piece.hf].shape).numel() // piece.stretch[1] for piece in pieces)
    if filled > torch.Size(shape).numel():
        raise ConvertError(f"the checkpoint holds our tensor '{fqn}' twice, in one piece and in parts")
    if filled < torch.Size(shape).numel():
        absent = next(p.hf for p in pieces_of(family, fqn, shape) if p.hf not in theirs.specs)
        raise ConvertError(f"tensor '{absent}' is missing from the checkpoint; the model needs it for '{fqn}'")


def _check_tied(theirs: Source, table: str) -> None:
    """Raise ConvertError unless the head, which shares the embedding's table, is the same where it is stored too."""
    rows, head_rows = theirs.specs[table].shape[0], theirs.specs[TIED_HEAD].shape[0]
    boxes = [(slice(i, min(i + ROWS, rows)),) for i in range(0, rows, ROWS)]
    if rows != head_rows or any(not torch.equal(theirs.read(table, b), theirs.read(TIED_HEAD, b)) for b in boxes):
        raise ConvertError(f"tensor '{TIED_HEAD}' differs from the embedding, but model.tie_embeddings=true")


def _refuse_unknown(family: Family, name: str, theirs: Source) -> None:
    """Raise ConvertError about their tensor ``name``, unless it says nothing: a selection bias of zeros."""
    is_bias = is_zero_bias(family, name)
    if not is_bias or theirs.read(name).any():
        hint = "; it needs the balance method 'bias' (balance=[bias])" if is_bias else ""
        raise ConvertError(f"no rule of family {family.name} covers tensor '{name}' of the checkpoint{hint}")


def _is_ignored(family: Family, cfg: ModelConfig, name: str) -> bool:
    patterns = [pattern.format(n_layers=cfg.n_layers) for pattern in family.ignored]
    return any(re.fullmatch(pattern, name) for pattern in (FREQUENCIES, *patterns))


def is_zero_bias(family: Family, name: str) -> bool:
    """Whether their tensor says nothing while it is zero."""
    ours = {rule.ours for rule in family.zeros}
    named = [rule.theirs[0] for rule in (*family.zeros, *family.in_memory) if rule.ours in ours]
    patterns = [re.escape(name).replace(r"\{l\}", r"\d+") for name in named]
    return any(re.fullmatch(pattern, name) for pattern in patterns)
