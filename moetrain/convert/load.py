"""Hugging Face checkpoint -> our model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.config.errors import ConvertError
from moetrain.config.schema import ModelConfig
from moetrain.convert.family import Family, family_named, family_of
from moetrain.convert.layout import Piece
from moetrain.convert.tensors import SELECTION_BIAS, is_training_state, pieces_in_memory, pieces_of
from moetrain.model.decoder import Decoder

log = logging.getLogger("moetrain")

TIED_HEAD = "lm_head.weight"


def read_hf_config(folder: Path | str) -> ModelConfig:
    """Our config of the checkpoint in ``folder``.

    Raises ConvertError (no config.json, or settings that are not covered) and ConfigError (a family that is not known).
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read '{file}': {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConvertError(f"'{file}' has no model_type; is '{folder}' a Hugging Face model folder?")
    return family_named(config["model_type"]).from_hf_config(config)


@torch.no_grad()
def load_hf(model: Decoder, source: Path | str | Mapping[str, Tensor]) -> None:
    """Fill ``model`` (on its device, not yet made parallel) from ``source``, one tensor at a time.

    source: a folder of safetensors, or a mapping of names as in ``save_pretrained`` or ``state_dict()``. Values are
    cast to the model's dtype. Raises ConvertError naming the tensor that is missing, of another shape or unknown.
    """
    family = family_of(model.cfg)
    targets = {fqn: t for fqn, t in model.state_dict().items() if not is_training_state(fqn)}
    if any(isinstance(t, DTensor) or t.is_meta for t in targets.values()):
        raise ConvertError("load_hf fills whole tensors with storage; call it before the model is made parallel")
    places = _places(family, targets)
    filled = dict.fromkeys(targets, 0)
    ignored, tied_head = [], None
    for name, theirs in _tensors(source):
        if name in places:
            filled[places[name].ours] += _copy(places[name], targets, theirs)
        elif name == TIED_HEAD and model.cfg.tie_embeddings:
            tied_head = theirs
        elif _is_ignored(family, model.cfg, name):
            ignored.append(name)
        elif not (_is_zero_bias(family, name) and not theirs.any()):
            hint = "; it needs the balance method 'bias' (balance=[bias])" if _is_zero_bias(family, name) else ""
            raise ConvertError(f"no rule of family {family.name} covers tensor '{name}' of the checkpoint{hint}")
    for fqn, ours in targets.items():
        if filled[fqn] != ours.numel() and not fqn.endswith(SELECTION_BIAS):
            _report_missing(family, fqn, tuple(ours.shape), filled[fqn], source)
    table = model.embed.weight if model.embed is not None else None
    if tied_head is not None and (table is None or not torch.equal(tied_head.to(table), table)):
        raise ConvertError(f"tensor '{TIED_HEAD}' differs from the embedding, but model.tie_embeddings=true")
    if ignored:
        log.info("not imported: %d tensors that the model has no part for, from %s", len(ignored), ignored[0])


def _places(family: Family, targets: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Their name -> where it goes, for both namings."""
    places = {}
    for fqn, ours in targets.items():
        shape = tuple(ours.shape)
        covered = [] if fqn.endswith(SELECTION_BIAS) and not family.zeros else pieces_of(family, fqn, shape)
        for piece in [*pieces_in_memory(family, fqn, shape), *covered]:
            places[piece.hf] = piece
    return places


def _copy(piece: Piece, targets: Mapping[str, Tensor], theirs: Tensor) -> int:
    """Write their tensor where it belongs; returns its number of elements."""
    ours = targets[piece.ours]
    expected = piece.hf_shape(tuple(ours.shape))
    if tuple(theirs.shape) != expected:
        raise ConvertError(f"tensor '{piece.hf}' has shape {tuple(theirs.shape)}; the model needs {expected}")
    piece.copy_to(ours, theirs)
    return theirs.numel()


def _is_ignored(family: Family, cfg: ModelConfig, name: str) -> bool:
    return any(re.fullmatch(pattern.format(n_layers=cfg.n_layers), name) for pattern in family.ignored)


def _is_zero_bias(family: Family, name: str) -> bool:
    """Whether their tensor says nothing while it is zero."""
    ours = {rule.ours for rule in family.zeros}
    named = [rule.theirs[0] for rule in (*family.zeros, *family.in_memory) if rule.ours in ours]
    patterns = [re.escape(name).replace(r"\{l\}", r"\d+") for name in named]
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _report_missing(
    family: Family, fqn: str, shape: tuple[int, ...], filled: int, source: Path | str | Mapping[str, Tensor]
) -> None:
    present = {name for name, _ in _tensors(source, names_only=True)}
    if filled > torch.Size(shape).numel():
        raise ConvertError(f"the checkpoint holds our tensor '{fqn}' twice, in one piece and in parts")
    absent = next(p.hf for p in pieces_of(family, fqn, shape) if p.hf not in present)
    raise ConvertError(f"tensor '{absent}' is missing from the checkpoint; the model needs it for '{fqn}'")


def _tensors(source: Path | str | Mapping[str, Tensor], names_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    if isinstance(source, Mapping):
        yield from source.items()
        return
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise ConvertError(f"no *.safetensors in '{source}'")
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  # not a mapping
                    yield name, torch.empty(0) if names_only else shard.get_tensor(name)
        except SafetensorError as error:
            raise ConvertError(f"'{file}' is damaged: {error}") from None
