"""``moetrain suggest``: a learning rate and a batch size from the Step Law (arXiv 2503.04715).

    lr = 1.79 N^-0.713 D^0.307        batch size in tokens = 0.58 D^0.571

N: parameters without the tables of embedding and head, D: tokens. Of an MoE model N counts all experts, not those that
a token meets: on the losses that the paper's authors released (16 cells of MoE models), the grid's point nearest to the
law is 0.16 % above the best with all of them, 1.00 % with the active ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.config.typed import to_dict
from moetrain.model.count import count_parameters

HELP = """usage: moetrain suggest model=NAME tokens=N [key=value ...] [--json]

Suggest a peak learning rate and a batch size by the Step Law, and the words that set them. Settings are those of
'moetrain train'; train.seq_len and train.micro_batch matter, as the batch is a whole number of sequences.

  tokens=N         tokens that the model is trained on: 20e9, 20B, 500M"""

DENSE_N, DENSE_D = (0.21e9, 1.07e9), (4e9, 100e9)
MOE_N, MOE_D = (2.1e9, 2.2e9), (2e9, 20e9)
FITTED = (
    "fitted on Llama-like dense models of 0.21 to 1.07 billion parameters and 4 to 100 billion tokens, checked by its "
    "authors on MoE models of 2.15 billion and 2 to 20 billion tokens; AdamW, sequences of 2048 tokens, a schedule "
    "that ends at a learning rate of 1e-5"
)


@dataclass(frozen=True)
class Suggestion:
    """lr, batch_tokens: what the law says. global_batch, steps: the nearest that a run can have. beyond: what of the
    run the law was not fitted on."""

    n: int
    tokens: float
    lr: float
    batch_tokens: float
    global_batch: int
    steps: int
    overrides: list[str]
    beyond: list[str]


def step_law(n: float, tokens: float) -> tuple[float, float]:
    """(peak learning rate, batch size in tokens) for N = ``n`` and D = ``tokens``; arXiv 2503.04715, equation 1."""
    return 1.79 * n**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def take_tokens(words: Sequence[str]) -> tuple[float, list[str]]:
    """The number that "tokens=20B" gives, and the other words. Raises ConfigError."""
    given = [word.removeprefix("tokens=") for word in words if word.startswith("tokens=")]
    if len(given) != 1:
        raise ConfigError("suggest needs tokens=N once, the tokens to train on: tokens=20e9 or tokens=20B")
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kKMBT]?)", given[0])
    number = 0.0 if found is None else float(found[1]) * 1000 ** " KMBT".index(found[2].upper() or " ")
    if number < 1:
        raise ConfigError(f"tokens takes a number of 1 or more, as 20e9 or 20B; got '{given[0]}'")
    return number, [word for word in words if not word.startswith("tokens=")]


def suggest(cfg: Config, tokens: float) -> Suggestion:
    """The Step Law's numbers for ``cfg``'s model."""
    counts = count_parameters(cfg.model)
    n = counts.total - counts.embedding - counts.head
    lr, batch_tokens = step_law(n, tokens)
    t = cfg.train
    global_batch = max(1, round(batch_tokens / (t.seq_len * t.micro_batch))) * t.micro_batch
    steps = max(1, round(tokens / (global_batch * t.seq_len)))
    overrides = [f"optim.lr={lr:.3g}", f"train.global_batch={global_batch}", f"train.steps={steps}"]
    if cfg.schedule.kind != "constant":
        overrides.append(f"schedule.final_ratio={min(1.0, 1e-5 / lr):.3g}")
    return Suggestion(n, tokens, lr, batch_tokens, global_batch, steps, overrides, _beyond(cfg, n, tokens))


def _beyond(cfg: Config, n: int, tokens: float) -> list[str]:
    is_moe = bool(cfg.model.moe_layers())
    (n_low, n_high), (d_low, d_high) = (MOE_N, MOE_D) if is_moe else (DENSE_N, DENSE_D)
    found = []
    if not n_low <= n <= n_high:
        found.append(f"the model's size ({n:.3g} parameters)")
    if not d_low <= tokens <= d_high:
        found.append(f"the number of tokens ({tokens:.3g})")
    if cfg.train.seq_len != 2048:
        found.append(f"train.seq_len={cfg.train.seq_len}")
    kind = to_dict(cfg)["optim"]["kind"]
    if kind != "adamw":
        found.append(f"optim={kind}, whose learning rates are others")
    return found


def as_json(s: Suggestion) -> dict[str, Any]:
    """All numbers."""
    return asdict(s) | {"fitted_on": FITTED}


def lines(s: Suggestion) -> list[str]:
    """What the command prints."""
    return [
        f"Step Law (arXiv 2503.04715) for N = {s.n:,} parameters without embedding and head, all experts counted, and "
        f"D = {s.tokens:,.0f} tokens:",
        f"  peak learning rate  {s.lr:.3g}",
        f"  batch size          {s.batch_tokens:,.0f} tokens",
        "words for 'moetrain train':",
        f"  {' '.join(s.overrides)}",
        f"The law was {FITTED}.",
        *([f"Outside of that range, so take it as a starting point: {'; '.join(s.beyond)}."] if s.beyond else []),
    ]
