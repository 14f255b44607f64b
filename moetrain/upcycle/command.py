"""``moetrain upcycle``: read parents, apply a method, write the result, say what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moetrain.config.errors import ConfigError, ConvertError
from moetrain.config.registry import UPCYCLERS
from moetrain.convert.export import export_hf
from moetrain.convert.family import family_of
from moetrain.data.sources import resolve
from moetrain.data.tokenizer import ids_of, load_tokenizer
from moetrain.upcycle.measure import loss
from moetrain.upcycle.method import Context, Model, Upcycled
from moetrain.upcycle.read import read_parent
from moetrain.upcycle.words import Asked

PROSE = "moetrain:data/demo/docs.txt"
SEQ_LEN = 512
# Of a model folder, what is no weight and no config: copied from the first parent as it is
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


def run(asked: Asked, say: Callable[[str], None] = print) -> None:
    """Do what ``asked`` says. Every check comes first; ``out`` appears whole or not at all. Raises ConfigError,
    ConvertError and DataError."""
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise ConvertError(f"out={asked.out} is not empty; choose another folder or remove it first")
    parents = [read_parent(folder) for folder in asked.parents]
    ids = cache(lambda: calibration_ids(parents[0].cfg.vocab_size, asked))
    made = UPCYCLERS.get(asked.method).build(asked.options, parents, Context(asked.seed, ids))
    family = family_of(made.model.cfg).name
    no_text = _why_no_text(asked)
    before = [loss(parent, ids()) for parent in parents] if asked.measure and not no_text else []
    write(made.model, asked)
    say(f"{asked.out}: {family}, {_shape(made.model)}; step 0 keeps {made.note}")
    if not asked.measure or no_text:
        say(f"losses not measured: {no_text or 'measure=false'}")
        return
    after = loss(read_parent(asked.out), ids())
    for parent, value in zip(parents, before, strict=True):
        say(f"loss {value:.4f} of {parent.where}, {after - value:+.4f} by upcycling")
    say(json.dumps(_report(asked, made, family, before, after)))


def calibration_ids(vocab_size: int, asked: Asked) -> Tensor:
    """Ids (B, S) of the text, at most ``asked.tokens`` of them, in rows of ``SEQ_LEN``. Raises ConfigError."""
    why = _why_no_text(asked)
    if why:
        raise ConfigError(f"method={asked.method} reads text to see which experts are used: {why}")
    text = (asked.text or Path(resolve(PROSE))).read_text(encoding="utf-8")
    # a token is seldom longer than 16 characters
    (found,) = ids_of(load_tokenizer(str(asked.parents[0])).tokenizer, [text[: 16 * asked.tokens]])
    ids = torch.tensor(found[: asked.tokens])
    if len(ids) < 2 or int(ids.max()) >= vocab_size:
        what = "has fewer than 2 tokens" if len(ids) < 2 else f"has ids beyond vocab_size={vocab_size}"
        raise ConfigError(f"the text {what}; give another text=FILE")
    rows = max(1, len(ids) // SEQ_LEN)
    return ids[: len(ids) // rows * rows].view(rows, -1)


def write(model: Model, asked: Asked) -> None:
    """Export to ``asked.out``, with the first parent's tokenizer and generation config as they are."""
    parent = asked.parents[0]
    staged = asked.out.with_name(asked.out.name + ".upcycled")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        export_hf(model.cfg, model.tensors, staged)
        for name in TOKENIZER_FILES:
            if (parent / name).is_file():
                shutil.copy(parent / name, staged / name)
        _keep_special_ids(parent / "config.json", staged / "config.json")
        if asked.out.exists():
            asked.out.rmdir()
        staged.rename(asked.out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _keep_special_ids(theirs: Path, ours: Path) -> None:
    """Which tokens begin and end a text is said in config.json, too."""
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (theirs, ours))
    new |= {key: old[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in old}
    ours.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def _why_no_text(asked: Asked) -> str:
    file = asked.parents[0] / "tokenizer.json"
    return "" if file.is_file() else f"there is no '{file}' to read the text with"


def _shape(model: Model) -> str:
    cfg = model.cfg
    layer = cfg.moe_layers()[0]
    experts, top_k, width = (cfg.layer_value(name, layer) for name in ("num_experts", "top_k", "expert_dim"))
    return f"{len(cfg.moe_layers())} of {cfg.n_layers} layers with {experts} experts of width {width}, top-{top_k}"


def _report(asked: Asked, made: Upcycled, family: str, before: list[float], after: float) -> dict[str, object]:
    return {
        "method": asked.method,
        "out": str(asked.out),
        "family": family,
        "exact": made.exact,
        "keeps": made.note,
        "losses_before": before,
        "loss_after": after,
    }
