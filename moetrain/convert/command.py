"""``moetrain convert``: weights from one form into another, part by part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.checkpoint.weights import Spec, blocks, write_weights
from moetrain.config import load, save
from moetrain.config.errors import ConfigError, ConvertError
from moetrain.config.schema_data import TokenizerConfig
from moetrain.config.words import one_of, read_words, required
from moetrain.convert.export import export_hf
from moetrain.convert.files import TensorWriter
from moetrain.convert.open import MODEL_ENTRY, Opened, model_entry, open_weights
from moetrain.convert.output import output, refuse_output, size
from moetrain.convert.source import Source
from moetrain.convert.tokenizer import tokenizer_at, write_tokenizer

HELP = """usage: moetrain convert to=hf from=RUN out=DIR [dtype=bfloat16] [layout=fused] [family=NAME] [tokenizer=PATH]
       moetrain convert to=moetrain from=HF_DIR out=DIR [dtype=...]
       moetrain convert to=safetensors from=RUN out=FILE.safetensors [dtype=...]

Turn weights of one form into another, part by part: a model never has to fit into memory. docs/convert.md tells more.

  from=PATH        a run directory (its newest whole checkpoint), a checkpoint RUN/checkpoints/step-N of any mapping, a
                   Hugging Face folder, or a file of to=safetensors
  to=hf            a Hugging Face folder: config.json, sharded safetensors with their index, tokenizer
  to=moetrain      a folder like a run's, with a checkpoint of weights alone: 'moetrain train init=DIR' starts from it
                   (and from all that from= takes)
  to=safetensors   one file with our names, the model's config in its header
  out=PATH         where to; it must not be there yet

  dtype=NAME       of the written floats: float32, bfloat16, float16, float64 (default: as they are)
  layout=NAME      to=hf: experts one by one (per_expert, the default) or those of a layer in one tensor (fused)
  family=NAME      to=hf: the class to write for (default: the config's model.family)
  tokenizer=PATH   a tokenizer.json or a folder with one (default: the run's, or the folder's)"""

TARGETS = ("hf", "moetrain", "safetensors")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WORDS = ("to", "from", "out", "dtype", "layout", "family", "tokenizer")
ONLY_HF = ("layout", "family")


@dataclass(frozen=True)
class Asked:
    """The words of the command line, as HELP explains them."""

    to: str
    source: str
    out: Path
    dtype: torch.dtype | None = None
    layout: str = "per_expert"
    family: str | None = None
    tokenizer: str | None = None


def parse(words: Sequence[str]) -> Asked:
    """Read words like "to=hf". Raises ConfigError for one that is unknown, missing, given twice, or out of place."""
    given = read_words("convert", words, WORDS)
    required("convert", given, "to", "from", "out")
    to = one_of("convert", given, "to", TARGETS)
    for name in ONLY_HF:
        if name in given and to != "hf":
            raise ConfigError(f"convert: {name}= goes with to=hf, not with to={to}")
    dtype = getattr(torch, one_of("convert", given, "dtype", DTYPES)) if "dtype" in given else None
    layout = one_of("convert", given, "layout", ("per_expert", "fused"))
    out = Path(given["out"])
    if to == "safetensors" and out.suffix != ".safetensors":
        raise ConfigError(f"convert to=safetensors writes one file, so out={out} must end in .safetensors")
    return Asked(to, given["from"], out, dtype, layout, given.get("family"), given.get("tokenizer"))


def run(asked: Asked) -> str:
    """Convert; returns a line that says what was written. Raises a UserError, before anything is written where it can
    be known then."""
    refuse_output(asked.out, 0)
    opened = open_weights(asked.source)
    tokenizer = opened.tokenizer if asked.tokenizer is None else tokenizer_at(asked.tokenizer)
    if asked.tokenizer is not None and tokenizer is None:
        raise ConvertError(f"tokenizer={asked.tokenizer}: no tokenizer.json is there")
    began = time.perf_counter()
    nbytes = sum(spec.nbytes for spec in _cast(opened.source, asked.dtype).values())
    if asked.to == "hf":
        opened.model.family = asked.family or opened.model.family
        layout = asked.layout
        what = export_hf(opened.model, opened.source, asked.out, tokenizer, asked.dtype, layout=layout)  # type: ignore[arg-type]
    elif asked.to == "moetrain":
        what = "checkpoint"
        write_checkpoint(opened, asked.out, tokenizer, asked.dtype)
    else:
        what = "file"
        write_file(opened, asked.out, asked.dtype)
    seconds = time.perf_counter() - began
    lacks = "" if tokenizer is not None or asked.to == "safetensors" else "; no tokenizer: none was found"
    return f"{what} {asked.out}: {size(nbytes)} from {opened.path}, {nbytes / 1e6 / seconds:,.0f} MB/s{lacks}"


def write_checkpoint(
    opened: Opened,
    out: Path,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    optimizer: Source | None = None,
) -> None:
    """Write folder ``out`` with checkpoints/step-0, a config.yaml whose ``init`` is this folder, and the tokenizer.
    Raises ConvertError; see ``output``."""
    specs = _cast(opened.source, dtype)
    with output(out, sum(spec.nbytes for spec in specs.values())) as partial:
        cfg = load(["balance=[bias]"] if opened.has_bias else [])
        cfg.model, cfg.init = opened.model, str(out.absolute())
        cfg.run_dir = f"runs/{cfg.model.name}"
        cfg.train.seq_len = min(cfg.train.seq_len, cfg.model.max_seq_len)
        cfg.data.tokenizer = TokenizerConfig(vocab_size=min(1024, cfg.model.vocab_size))
        if tokenizer is not None:
            write_tokenizer(tokenizer, cfg.model, partial)
            cfg.data.tokenizer.path = str(out.absolute())
        save(cfg, partial / "config.yaml")
        write_weights(
            partial / "checkpoints",
            specs,
            lambda name, box: opened.source.read(name, box).to(specs[name].dtype),
            None if optimizer is None else (optimizer.specs, optimizer.read),
        )


def write_file(opened: Opened, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write safetensors file ``out`` with our names. Raises ConvertError; see ``output``."""
    source, specs = opened.source, _cast(opened.source, dtype)
    about = {"format": "pt", MODEL_ENTRY: model_entry(opened.model)}
    with (
        output(out, sum(spec.nbytes for spec in specs.values()), folder=False) as partial,
        TensorWriter(partial, specs, about) as writer,
    ):
        for name, spec in specs.items():
            for box in blocks(name, spec):
                writer.write(name, source.read(name, box).to(spec.dtype), box[0].start if box else 0)


def _cast(source: Source, dtype: torch.dtype | None) -> dict[str, Spec]:
    return {
        name: Spec(spec.shape, dtype) if dtype is not None and spec.dtype.is_floating_point else spec
        for name, spec in source.specs.items()
    }
