"""``moetrain upcycle``: read parents, apply a method, write the result, say what changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moetrain.config.errors import ConfigError, DataError
from moetrain.config.registry import UPCYCLERS
from moetrain.convert.command import write_checkpoint, write_file
from moetrain.convert.export import export_hf
from moetrain.convert.family import family_of
from moetrain.convert.open import Opened, open_weights
from moetrain.convert.output import refuse_output
from moetrain.convert.source import Source
from moetrain.data.sources import resolve
from moetrain.data.tokenizer import ids_of, load_tokenizer
from moetrain.upcycle.measure import loss
from moetrain.upcycle.method import Context, Model, Upcycled
from moetrain.upcycle.optimizer import carried
from moetrain.upcycle.words import Asked

PROSE = "moetrain:data/demo/docs.txt"
SEQ_LEN = 512


def run(asked: Asked, say: Callable[[str], None] = print) -> None:
    """Do what ``asked`` says. Every check comes first; ``out`` appears whole or not at all. Raises a UserError."""
    refuse_output(asked.out, 0)
    opened = [open_weights(path) for path in asked.parents]
    parents = [Model(one.model, one.source, path) for one, path in zip(opened, asked.parents, strict=True)]
    context = Context(asked.seed, cache(lambda: calibration_ids(opened[0], asked)))
    made = UPCYCLERS.get(asked.method).build(asked.options, parents, context)
    if len(opened) > 1:
        _check_tokenizers(opened)
    if asked.to == "hf":
        family_of(made.model.cfg)  # raises where no class has the result
    optimizer = carried(made, opened[0], asked.method) if asked.optimizer else None
    refuse_output(asked.out, sum(spec.nbytes for spec in made.model.source.specs.values()))
    unmeasured = "measure=false" if not asked.measure else _why_no_text(opened[0])
    before = [] if unmeasured else [loss(parent, context.ids()) for parent in parents]
    form = write(made.model, asked, opened[0].tokenizer, optimizer)
    say(f"{asked.out}: {form}, {_shape(made.model)}; step 0: {made.note}")
    if made.settings:
        say(f"to train it as the method does: moetrain train init={asked.out} {made.settings}")
    figures = made.figures()
    if figures:
        say("on text held out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if unmeasured:
        say(f"losses not measured: {unmeasured}")
        return
    written = open_weights(asked.out)
    after = loss(Model(written.model, written.source), context.ids())
    for parent, value in zip(parents, before, strict=True):
        say(f"loss {value:.4f} of {parent.where}, {after - value:+.4f} by upcycling")
    say(json.dumps(_report(asked, made, form, before, after) | figures))


def _check_tokenizers(opened: list[Opened]) -> None:
    """Raise ConfigError where parents have tokenizers of different words; tokens that were added later may differ."""
    known = [one for one in opened if one.tokenizer is not None]
    words = [load_tokenizer(str(one.tokenizer)).tokenizer.get_vocab(with_added_tokens=False) for one in known]
    for other, theirs in zip(known[1:], words[1:], strict=False):
        if theirs != words[0]:
            raise ConfigError(
                f"parents must have the same tokenizer: that of {other.path} has other words than that of "
                f"{known[0].path}; train them on data of one (data.tokenizer.path=)"
            )


def write(model: Model, asked: Asked, tokenizer: Path | None, optimizer: Source | None) -> str:
    """Write ``model``, and its optimizer's state if there is any; say in which form. Raises a UserError."""
    if asked.to == "hf":
        return export_hf(model.cfg, model.source, asked.out, tokenizer)
    opened = Opened(asked.out, model.cfg, model.source, tokenizer)
    if asked.to == "moetrain":
        write_checkpoint(opened, asked.out, tokenizer, optimizer=optimizer)
    else:
        write_file(opened, asked.out)
    return asked.to


def calibration_ids(opened: Opened, asked: Asked) -> list[Tensor]:
    """Ids (B, S) of each text, equally many, in rows of at most ``SEQ_LEN``; at most ``asked.tokens`` of all together.
    Raises a UserError."""
    why = _why_no_text(opened)
    if why or opened.tokenizer is None:
        raise ConfigError(f"method={asked.method} reads text to see what the parent does on it, but {why}")
    tokenizer = load_tokenizer(str(opened.tokenizer)).tokenizer
    files = asked.texts or (Path(resolve(PROSE)),)
    most = asked.tokens // len(files)
    if most < 2:
        raise ConfigError(f"tokens={asked.tokens} is too few for {len(files)} files of text; each needs 2 or more")
    found = []
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                text = lines.read(16 * most)  # a token is seldom longer than 16 characters
        except UnicodeDecodeError:
            raise DataError(f"text={file} is not UTF-8 text") from None
        (numbers,) = ids_of(tokenizer, [text])
        ids = torch.tensor(numbers[:most])
        if len(ids) < 2:
            raise DataError(f"text={file} has fewer than 2 tokens")
        if int(ids.max()) >= opened.model.vocab_size:
            raise DataError(f"the tokenizer of {opened.path} has ids beyond vocab_size={opened.model.vocab_size}")
        found.append(ids)
    shortest = min(map(len, found))
    rows = -(-shortest // min(SEQ_LEN, opened.model.max_seq_len))
    return [ids[: shortest // rows * rows].view(rows, -1) for ids in found]


def _why_no_text(opened: Opened) -> str:
    return f"{opened.path} has no tokenizer to read text with" if opened.tokenizer is None else ""


def _shape(model: Model) -> str:
    cfg = model.cfg
    layer = cfg.moe_layers()[0]
    experts, top_k, width = (cfg.layer_value(name, layer) for name in ("num_experts", "top_k", "expert_dim"))
    shared = cfg.layer_value("shared_dim", layer)
    kind = "ternary experts" if cfg.moe.ternary else "experts"
    beside = f" beside a shared one of {shared}" if shared else ""
    layers = f"{len(cfg.moe_layers())} of {cfg.n_layers} layers"
    shape = f"{layers} with {experts} {kind} of width {width}{beside}, top-{top_k}"
    N = cfg.attention.num_experts
    return shape if N == 1 else f"{shape}, and {N} attention experts in all"


def _report(asked: Asked, made: Upcycled, form: str, before: list[float], after: float) -> dict[str, object]:
    return {
        "method": asked.method,
        "out": str(asked.out),
        "form": form,
        "exact": made.exact,
        "step_0": made.note,
        "settings": made.settings,
        "losses_before": before,
        "loss_after": after,
    }
