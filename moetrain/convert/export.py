"""Our model -> Hugging Face checkpoint, which transformers loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetrain.config.errors import ConvertError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.convert.family import Family, family_of
from moetrain.convert.features import TRAINING_ONLY
from moetrain.convert.tensors import SELECTION_BIAS, is_training_state, pieces_of
from moetrain.data.tokenizer import KNOWN_EOS
from moetrain.model.decoder import Decoder
from moetrain.moe.options import as_options

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("moetrain")


def export_hf(
    cfg: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    out: Path | str,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    *,
    eos_token: str | None = None,
    max_shard_bytes: int = 5 * 1000**3,
) -> str:
    """Write folder ``out``: config.json, generation_config.json, safetensors (an index if several), tokenizer files.

    tensors: our parameters and persistent buffers by name, whole, one at a time. dtype: of the written floats; None: as
    they are. eos_token: the token that ends a document; None: the tokenizer's known one. The folder appears when it is
    whole, or not at all. Returns the family's name. Raises ConvertError: no class fits, a tensor that no rule covers, a
    tensor that is missing, or ``out`` holds files already.
    """
    out = Path(out)
    family = family_of(cfg)
    _note_training_only(cfg)
    if out.exists() and any(out.iterdir()):
        raise ConvertError(f"'{out}' is not empty; export to another folder or remove it first")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        main_dtype = _write_shards(_converted(family, cfg, items, dtype), partial, max_shard_bytes)
        eos_id = _write_tokenizer(tokenizer, eos_token, cfg, partial)
        _write_configs(family, cfg, main_dtype, eos_id, partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return family.name


def _note_training_only(cfg: ModelConfig) -> None:
    """Log what the exported model does not do, though training did."""
    options = as_options(ROUTERS, cfg.router)
    used = [f"model.router.{name}" for name in sorted(TRAINING_ONLY) if getattr(options, name, False)]
    if cfg.moe.capacity_factor is not None:
        used.append("model.moe.capacity_factor")
    if used:
        log.warning("%s acts in training only: the Hugging Face model routes without it", ", ".join(used))


def _converted(
    family: Family, cfg: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Their name and tensor, for every tensor of the class; a selection bias stays float32."""
    seen = set()
    for fqn, whole in tensors:
        if is_training_state(fqn):
            continue
        is_bias = fqn.endswith(SELECTION_BIAS)
        if is_bias and not family.zeros and not whole.any():
            continue
        for piece in pieces_of(family, fqn, tuple(whole.shape)):
            seen.add(piece.hf)
            theirs = piece.to_hf(whole.detach())
            keep = torch.float32 if is_bias else dtype or theirs.dtype
            yield piece.hf, theirs.to(keep) if theirs.is_floating_point() else theirs
    for rule in family.zeros:
        for layer in cfg.moe_layers():
            shape = (cfg.layer_value("num_experts", layer),)
            for piece in rule.pieces(rule.ours.format(l=layer), shape):
                if piece.hf not in seen:
                    seen.add(piece.hf)
                    yield piece.hf, torch.zeros(piece.hf_shape(shape))
    _check_complete(family, cfg, seen)


def _check_complete(family: Family, cfg: ModelConfig, seen: set[str]) -> None:
    with torch.device("meta"):
        model = Decoder(cfg, {}, ExpertsConfig())
    for fqn, p in model.named_parameters():
        for piece in pieces_of(family, fqn, tuple(p.shape)):
            if piece.hf not in seen:
                raise ConvertError(f"our tensor '{fqn}' was not given, so '{piece.hf}' cannot be written")


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> str:
    """Files of at most ``limit`` bytes (or one tensor), with an index if there are several. Returns the main dtype."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0
    elements: Counter[torch.dtype] = Counter()

    def flush() -> None:
        if held:
            save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name, t in tensors:
        if size and size + t.nbytes > limit:
            flush()
            size = 0
        held[name] = t.to("cpu").contiguous().clone()
        size, total = size + t.nbytes, total + t.nbytes
        elements[t.dtype] += t.numel()
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": total, "total_parameters": elements.total()}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    return str(elements.most_common(1)[0][0]).removeprefix("torch.")


def _write_configs(family: Family, cfg: ModelConfig, dtype: str, eos_id: int | None, folder: Path) -> None:
    import transformers

    about: dict[str, Any] = {"transformers_version": transformers.__version__}
    if eos_id is not None:
        about["eos_token_id"] = eos_id
    _write_json(folder / "generation_config.json", about)
    _write_json(folder / "config.json", family.to_hf_config(cfg) | about | {"dtype": dtype, "use_cache": True})


def _write_tokenizer(tokenizer: Tokenizer | None, eos: str | None, cfg: ModelConfig, folder: Path) -> int | None:
    """tokenizer.json and its companions. Returns the id of the token that ends a document."""
    if tokenizer is None:
        return None
    from transformers import PreTrainedTokenizerFast

    vocab = tokenizer.get_vocab(with_added_tokens=True)
    eos = eos or next((token for token in KNOWN_EOS if token in vocab), None)
    if eos is not None and eos not in vocab:
        raise ConvertError(f"the tokenizer has no token {eos!r} to end a document with")
    if max(vocab.values()) >= cfg.vocab_size:
        raise ConvertError(f"the tokenizer has {max(vocab.values()) + 1} tokens, but model.vocab_size={cfg.vocab_size}")
    named = {} if eos is None else {"eos_token": eos}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=cfg.max_seq_len, **named)
    fast.save_pretrained(folder)
    return None if eos is None else vocab[eos]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
