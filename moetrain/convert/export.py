"""Our model -> Hugging Face checkpoint, which transformers loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moetrain.checkpoint.weights import Spec, blocks
from moetrain.config.errors import ConvertError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.convert.family import Family, family_of, lacking_features
from moetrain.convert.features import TRAINING_ONLY
from moetrain.convert.files import INDEX, TensorWriter
from moetrain.convert.layout import Piece
from moetrain.convert.output import output
from moetrain.convert.source import Held, InOrder, Source
from moetrain.convert.tensors import SELECTION_BIAS, is_training_state, pieces_in_memory, pieces_of
from moetrain.convert.tokenizer import GENERATION, write_tokenizer
from moetrain.model.decoder import Decoder
from moetrain.moe.options import as_options

log = logging.getLogger("moetrain")

Layout = Literal["per_expert", "fused"]


def export_hf(
    cfg: ModelConfig,
    tensors: Source | Mapping[str, Tensor],
    out: Path | str,
    tokenizer: Tokenizer | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    layout: Layout = "per_expert",
    eos_token: str | None = None,
    max_shard_bytes: int = 5 * 1000**3,
) -> str:
    """Write folder ``out``: config.json, generation_config.json, safetensors (an index if several), tokenizer files.

    tensors: our parameters and persistent buffers; read once, in order, part by part, and written at once. tokenizer:
    the files of a folder are copied. dtype: of the written floats; None: as they are. layout: the experts one by one,
    as ``save_pretrained`` writes them, or those of a layer in one tensor, as transformers holds them ("fused").
    eos_token: the token that ends a document; None: the tokenizer's known one. The folder appears when it is whole, or
    not at all. Returns the family's name. Raises ConvertError: no class fits, a tensor that no rule covers, a tensor
    that is missing, ``out`` holds files already, or the disk has no room.
    """
    source = Held(tensors) if isinstance(tensors, Mapping) else tensors
    has_bias = _has_bias(source)
    family = family_of(cfg, has_bias)
    _note_training_only(cfg)
    if not family.stock:
        why = lacking_features(cfg, has_bias)
        log.warning("%s: the export carries its own class, which is loaded with trust_remote_code=True", why)
    plan = _plan(family, cfg, source.specs, dtype, layout)
    with output(Path(out), sum(spec.nbytes for spec in plan.specs.values())) as partial:
        eos_id = None if tokenizer is None else write_tokenizer(tokenizer, cfg, partial, eos_token)
        _write_shards(plan, source, partial, max_shard_bytes)
        for file in family.files:
            shutil.copyfile(file, partial / file.name)
        _write_configs(family, cfg, plan.main_dtype, eos_id, partial)
    return family.name


def _has_bias(source: Source) -> bool:
    """Whether there are selection biases that say something. Those that come one after the other can be read once
    only, so they are taken to."""
    names = [name for name in source.specs if name.endswith(SELECTION_BIAS)]
    return bool(names) and (isinstance(source, InOrder) or any(bool(source.read(name).any()) for name in names))


def _note_training_only(cfg: ModelConfig) -> None:
    """Log what the exported model does not do, though training did."""
    options = as_options(ROUTERS, cfg.router)
    used = [f"model.router.{name}" for name in sorted(TRAINING_ONLY) if getattr(options, name, False)]
    if cfg.moe.capacity_factor is not None:
        used.append("model.moe.capacity_factor")
    if used:
        log.warning("%s acts in training only: the Hugging Face model routes without it", ", ".join(used))


@dataclass(frozen=True)
class _Plan:
    """What is to be written. specs: of all their tensors. pieces: which of them our tensors become. zeros: those of
    them that we have none of."""

    specs: dict[str, Spec]
    pieces: dict[str, list[Piece]]
    zeros: list[str]

    @property
    def main_dtype(self) -> str:
        """The dtype of most elements."""
        elements: Counter[torch.dtype] = Counter()
        for spec in self.specs.values():
            elements[spec.dtype] += prod(spec.shape)
        return str(elements.most_common(1)[0][0]).removeprefix("torch.")


def _plan(
    family: Family, cfg: ModelConfig, ours: Mapping[str, Spec], dtype: torch.dtype | None, layout: Layout
) -> _Plan:
    """Every tensor of the class, with its shape and dtype; a selection bias stays float32."""
    plan = _Plan({}, {}, [])
    for fqn, spec in ours.items():
        if is_training_state(fqn):
            continue
        is_bias = fqn.endswith(SELECTION_BIAS)
        if is_bias and not family.zeros:  # it is zero
            continue
        plan.pieces[fqn] = _pieces(family, fqn, spec.shape, layout)
        keep = spec.dtype
        if keep.is_floating_point:
            keep = torch.float32 if is_bias else dtype or keep
        plan.specs.update((piece.hf, Spec(piece.hf_shape(spec.shape), keep)) for piece in plan.pieces[fqn])
    for rule in family.zeros:
        for layer in cfg.moe_layers():
            fqn, shape = rule.ours.format(l=layer), (cfg.layer_value("num_experts", layer),)
            if fqn not in plan.pieces:
                for piece in _pieces(family, fqn, shape, layout):
                    plan.specs[piece.hf] = Spec(piece.hf_shape(shape), torch.float32)
                    plan.zeros.append(piece.hf)
    with torch.device("meta"):
        model = Decoder(cfg, {}, ExpertsConfig())
    for fqn, _ in model.named_parameters():
        if fqn not in ours:
            raise ConvertError(f"our tensor '{fqn}' was not given, so it cannot be written")
    for name, needed in family.hollow(cfg).items():
        plan.specs[name] = Spec(needed, next(iter(plan.specs.values())).dtype)
        plan.zeros.append(name)
    return plan


def _pieces(family: Family, fqn: str, shape: tuple[int, ...], layout: Layout) -> list[Piece]:
    """What our tensor ``fqn`` becomes in ``layout``. Raises ConvertError when no rule covers it."""
    in_memory = pieces_in_memory(family, fqn, shape) if layout == "fused" else []
    return in_memory or pieces_of(family, fqn, shape)


def _converted(plan: _Plan, source: Source) -> Iterator[tuple[str, Tensor, int]]:
    """(their name, rows of their tensor, first row), part by part."""
    for fqn, spec in source.specs.items():
        pieces = plan.pieces.get(fqn, [])
        by_row = (
            bool(pieces) and not pieces[0].index and (pieces[0].rearrange is None or pieces[0].rearrange.keeps_first)
        )
        if by_row:
            first_row = pieces[0].first_row(spec.shape)
            for box in blocks(fqn, spec):
                yield pieces[0].hf, pieces[0].to_hf(source.read(fqn, box)), first_row + (box[0].start if box else 0)
        else:
            for first, together in groupby(pieces, key=lambda piece: piece.index[:1]):
                part = source.read(fqn, tuple(slice(i, i + 1) for i in first))
                for piece in together:
                    inside = replace(piece, index=(0,) * len(first) + piece.index[1:])
                    yield piece.hf, inside.to_hf(part), 0
    for name in plan.zeros:
        yield name, torch.zeros(plan.specs[name].shape), 0


def _write_shards(plan: _Plan, source: Source, folder: Path, limit: int) -> None:
    """Files of at most ``limit`` bytes (or one tensor), with an index if there are several."""
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in plan.specs.items():
        if shards[-1] and filled + spec.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    weight_map: dict[str, str] = {}
    with ExitStack() as stack:
        writers: dict[str, TensorWriter] = {}
        for i, specs in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            writer = stack.enter_context(TensorWriter(folder / file, specs, {"format": "pt"}))
            writers |= dict.fromkeys(specs, writer)
            weight_map |= dict.fromkeys(specs, file)
        for name, part, row in _converted(plan, source):
            writers[name].write(name, part.to(plan.specs[name].dtype), row)
    if len(shards) > 1:
        metadata = {
            "total_size": sum(spec.nbytes for spec in plan.specs.values()),
            "total_parameters": sum(prod(spec.shape) for spec in plan.specs.values()),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)


def _write_configs(family: Family, cfg: ModelConfig, dtype: str, eos_id: int | None, folder: Path) -> None:
    import transformers

    about: dict[str, Any] = {"transformers_version": transformers.__version__}
    if eos_id is not None:
        about["eos_token_id"] = eos_id
    if not (folder / GENERATION).exists():  # else it came with the tokenizer
        _write_json(folder / GENERATION, about)
    _write_json(folder / "config.json", family.to_hf_config(cfg) | about | {"dtype": dtype, "use_cache": True})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
