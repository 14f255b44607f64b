"""The tokenizer that goes with weights: finding it, and writing it beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from moetrain.config.errors import ConvertError
from moetrain.config.schema import Config, ModelConfig
from moetrain.data.sources import resolve
from moetrain.data.tokenizer import KNOWN_EOS, load_tokenizer

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
# What goes with a tokenizer in a Hugging Face folder.
COMPANIONS = (
    CONFIG,
    GENERATION,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_at(path: Path | str) -> Path | None:
    """The tokenizer at ``path``, a tokenizer.json or a folder: the folder where it has the companions too, else the
    file; None: there is none."""
    path = Path(resolve(str(path)))
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        return None
    return file.parent if file.name == FILE and (file.parent / CONFIG).is_file() else file


def tokenizer_of(cfg: Config) -> Path | None:
    """The tokenizer of a run: the one that it was given, or that of its prepared data; None: neither is there."""
    given = cfg.data.tokenizer.path
    return (tokenizer_at(given) if given else None) or tokenizer_at(cfg.data.dir)


def write_tokenizer(
    tokenizer: Tokenizer | Path, model: ModelConfig, folder: Path, eos: str | None = None
) -> int | None:
    """Write tokenizer.json and its companions to ``folder``; those of a folder of ``tokenizer_at`` as they are there.

    eos: the token that ends a document; None: the one that is configured or known. Returns its id. Raises ConvertError
    for a token that is not there, and a tokenizer that is larger than the model's vocabulary.
    """
    if isinstance(tokenizer, Path) and tokenizer.is_dir():
        for name in (FILE, *COMPANIONS):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        loaded = load_tokenizer(str(tokenizer))
        _refuse_large(loaded.tokenizer, model)
        return loaded.eos_id
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(str(tokenizer)).tokenizer
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    eos = eos or next((token for token in KNOWN_EOS if token in vocab), None)
    if eos is not None and eos not in vocab:
        raise ConvertError(f"the tokenizer has no token {eos!r} to end a document with")
    _refuse_large(tokenizer, model)
    named = {} if eos is None else {"eos_token": eos}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model.max_seq_len, **named)
    fast.save_pretrained(folder)
    return None if eos is None else vocab[eos]


def _refuse_large(tokenizer: Tokenizer, model: ModelConfig) -> None:
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > model.vocab_size:
        raise ConvertError(f"the tokenizer has {size} tokens, but model.vocab_size={model.vocab_size}")
