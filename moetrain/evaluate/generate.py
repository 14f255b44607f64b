"""``moetrain generate``: text from a model, token by token, with a cache of what it has read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.words import one_of, path_and_words, real, whole
from moetrain.data.tokenizer import ids_of
from moetrain.evaluate.opened import InMemory, open_model
from moetrain.model.cache import Cache
from moetrain.model.decoder import Decoder

HELP = """usage: moetrain generate PATH prompt=TEXT [max_tokens=N] [temperature=T] [top_p=P] [seed=N] [dtype=NAME]

Continue a text. PATH is a run (its newest whole checkpoint), a checkpoint of one, a Hugging Face folder, or a file of
'moetrain convert to=safetensors'. docs/evaluate.md tells more.

  prompt=TEXT      what is continued; nothing (prompt=): from the token that ends documents
  max_tokens=N     tokens at most (default: 48); the token that ends a document ends the text before
  temperature=T    of the softmax that tokens are drawn from (default: 0.8); 0: always the likeliest token
  top_p=P          draw from the likeliest tokens that together have probability P (default: 1, all)
  seed=N           of the draws (default: 0): the same seed gives the same text
  dtype=NAME       to compute in: float32 (the default), bfloat16, float64"""

WORDS = ("prompt", "max_tokens", "temperature", "top_p", "seed", "dtype")
DTYPES = ("float32", "bfloat16", "float64")


def run(words: Sequence[str]) -> str:
    """The text that the words of the command line ask for, prompt included. Raises a UserError."""
    path, given = path_and_words("generate", words, WORDS)
    if "prompt" not in given:
        raise ConfigError("generate needs prompt=; see 'moetrain generate --help'")
    max_tokens = whole("generate", given, "max_tokens", 48)
    temperature = real("generate", given, "temperature", 0.8, 0, 1e3)
    top_p = real("generate", given, "top_p", 1.0, 1e-6, 1)
    seed = whole("generate", given, "seed", 0, least=0)
    dtype = getattr(torch, one_of("generate", given, "dtype", DTYPES))
    model = open_model(path, dtype)
    prompt = given["prompt"]
    ids = [*_beginning(model), *ids_of(model.tokenizer.tokenizer, [prompt])[0]] or [model.tokenizer.eos_id]
    room = model.decoder.cfg.max_seq_len
    if len(ids) + max_tokens > room:
        raise ConfigError(
            f"generate: the prompt has {len(ids)} tokens, and with max_tokens={max_tokens} more it is longer than the "
            f"model's max_seq_len={room}; shorten the prompt or set max_tokens={max(room - len(ids), 0)} or less"
        )
    generator = torch.Generator().manual_seed(seed)
    found = list(tokens_after(model.decoder, ids, max_tokens, temperature, top_p, generator, model.tokenizer.eos_id))
    decode = model.tokenizer.tokenizer.decode
    return prompt + str(decode(ids + found))[len(decode(ids)) :]


def _beginning(model: InMemory) -> list[int]:
    """What the tokenizer of a model that was not trained here puts before every text, as transformers does: Llama's and
    Gemma's BOS. Documents that are prepared here have none, so the model of a run is not used to it."""
    if model.run is not None:
        return []
    around = model.tokenizer.tokenizer.encode("").ids
    return [i for i in around if i != model.tokenizer.eos_id]


def draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token, int64 (1,) on the CPU, from softmax(logits / temperature); 0: the likeliest.

    top_p: only from the likeliest tokens, as few as have this probability together (nucleus sampling, arXiv
    1904.09751, section 3.1).
    """
    logits_V = logits_V.cpu()
    if temperature == 0:
        return logits_V.argmax()[None]
    p_V = nucleus((logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)) / temperature).softmax(-1), top_p)
    return torch.multinomial(p_V, 1, generator=generator)


def nucleus(p_V: Tensor, top_p: float) -> Tensor:
    """``p_V``, 0 where a token is not among the likeliest that have probability ``top_p`` together; not normalised."""
    if top_p >= 1:
        return p_V
    sorted_V, order_V = p_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    kept_V = (before_V < top_p).index_fill(0, torch.tensor([0]), True)
    return torch.zeros_like(p_V).index_copy(0, order_V, sorted_V * kept_V)


def tokens_after(
    model: Decoder,
    ids: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Up to ``max_tokens`` tokens that follow ``ids``, each when it is drawn; not ``eos_id``, at which it ends."""
    device = next(model.parameters()).device
    with Cache(model) as cache:
        new_1S = torch.tensor([list(ids)], device=device)
        for _ in range(max_tokens):
            token = draw(cache.read(new_1S)[0, -1], temperature, top_p, generator)
            if int(token) == eos_id:
                return
            yield int(token)
            new_1S = token[None].to(device)
