"""Tokenizers: loading one, training one, and finding the token that ends a document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.config.errors import DataError
from moetrain.data.sources import resolve

EOS = "<|endoftext|>"
# End-of-document tokens of published tokenizers, looked for where no tokenizer_config.json says which it is.
KNOWN_EOS = (
    EOS,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|return|>",
    "<|im_end|>",
)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with what the shards need to know of it. ``vocab_size`` is the largest id plus one."""

    tokenizer: Tokenizer
    eos: str
    eos_id: int
    vocab_size: int

    def save(self, file: Path) -> None:
        """Write tokenizer.json. Raises OSError (the library's own method raises bare Exception)."""
        file.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens; text that spells a special token is text, not the token."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def load_tokenizer(path: str) -> LoadedTokenizer:
    """Tokenizer from a tokenizer.json or a Hugging Face folder that holds one. Raises DataError, also when no token
    ends a document."""
    file = Path(resolve(path))
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"no tokenizer at '{path}': expected a tokenizer.json, or a folder that holds one; correct "
            f"data.tokenizer.path"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"'{path}' is not a tokenizer.json that tokenizers can read: {str(error).splitlines()[0]}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return describe_tokenizer(
        tokenizer, f"tokenizer '{path}'", _configured_eos(file.with_name("tokenizer_config.json"))
    )


def describe_tokenizer(tokenizer: Tokenizer, what: str, named: str | None = None) -> LoadedTokenizer:
    """``tokenizer`` with its size and its end-of-document token: ``named``, or the first known one. Raises DataError
    when it has none."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    eos = next((token for token in ((named,) if named else KNOWN_EOS) if token in vocab), None)
    if eos is None and named:
        raise DataError(
            f"{what} has no token '{named}', which its tokenizer_config.json names as eos_token; correct that"
        )
    if eos is None:
        raise DataError(
            f"{what} has no token that ends a document; name one as eos_token in a tokenizer_config.json beside it"
        )
    return LoadedTokenizer(tokenizer, eos, vocab[eos], max(vocab.values()) + 1)


def _configured_eos(config: Path) -> str | None:
    """``eos_token`` of a Hugging Face tokenizer_config.json (a string, or an object with its content), if there is
    one."""
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError):
        raise DataError(f"'{config}' is not a JSON object; repair it or remove it") from None
    return eos.get("content") if isinstance(eos, dict) else eos


def train_tokenizer(texts: Iterator[str], vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation: any text round-trips, and no text is unknown. The same text gives
    the same tokenizer. ``special``: tokens beside the one that ends a document."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [EOS, *special]
    if vocab_size < len(alphabet) + len(tokens):
        names = EOS if not special else f"{EOS} and {len(special)} tokens of data.objective"
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size} has no room for the {len(alphabet)} bytes and {names}; use "
            f"{len(alphabet) + len(tokens)} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=tokens, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer
