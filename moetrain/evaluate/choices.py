"""Multiple-choice tasks from a local file: the choice that a model finds likeliest after the question.

As lm-evaluation-harness scores them (its ``multiple_choice`` output type: ``acc`` and ``acc_norm``): a choice follows
the question after a space, its log-likelihood is the sum over its tokens, and the normalised one is divided by the
number of its characters. So the numbers are comparable with published ones where questions are worded alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.config.errors import DataError
from moetrain.data.tokenizer import LoadedTokenizer, ids_of
from moetrain.evaluate.opened import InMemory

IGNORE = -100


@dataclass(frozen=True)
class Question:
    """context: what is read before a choice. answer: number of the right choice."""

    context: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Share of ``questions`` answered rightly by log-likelihood, and by that per character, each with its standard
    error sqrt(p (1 - p) / (n - 1)). chance: what guessing gives on average."""

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    chance: float


def read_questions(file: Path) -> list[Question]:
    """The questions of a JSON-lines file; see docs/evaluate.md. Raises DataError that names the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028, which JSON allows
    except UnicodeDecodeError:
        raise DataError(f"'{file}' is not UTF-8 text; save it as UTF-8") from None
    found = [_question(line, f"'{file}' line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"'{file}' has no questions; give one JSON object a line")
    return found


def _question(line: str, where: str) -> Question:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object with question (or context), choices and answer")
    context, choices, answer = entry.get("question", entry.get("context")), entry.get("choices"), entry.get("answer")
    if not isinstance(context, str):
        raise DataError(f"{where}: question (or context) must be text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: choices must be a list of two or more texts that are not empty")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer must be the number of a choice, from 0 to {len(choices) - 1}, or its text; got {answer!r}"
        )
    return Question(context, choices, answer)


def encode(tokenizer: LoadedTokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Ids of the context and of a space and the choice after it. Spaces at the end of the context belong to the choice,
    and the choice gets what the whole text has beyond the context's tokens: lm-evaluation-harness's rule. An empty
    context is the token that ends documents."""
    stripped = context.rstrip()
    after = f"{context[len(stripped) :]} {choice}"
    if not stripped:
        return [tokenizer.eos_id], ids_of(tokenizer.tokenizer, [after])[0]
    before, all_of_it = ids_of(tokenizer.tokenizer, [stripped, stripped + after])
    return before, all_of_it[len(before) :]


@torch.no_grad()
def log_likelihoods(model: InMemory, question: Question) -> list[float]:
    """Log-probability of every choice after the context, in nats. What does not fit in max_seq_len is cut from the
    context's start. Raises DataError for a choice that alone is longer."""
    rows = [encode(model.tokenizer, question.context, choice) for choice in question.choices]
    room = model.decoder.cfg.max_seq_len
    if any(not 0 < len(choice) <= room for _, choice in rows):
        raise DataError(f"a choice of {question.context[-40:]!r} has no token, or more than max_seq_len={room}")
    inputs = [([*context, *choice][-(room + 1) :], len(choice)) for context, choice in rows]
    longest = max(len(ids) for ids, _ in inputs) - 1
    tokens_BS = torch.full((len(rows), longest), model.tokenizer.eos_id)
    targets_BS = torch.full((len(rows), longest), IGNORE)
    for row, (ids, n) in enumerate(inputs):
        end = len(ids) - 1
        tokens_BS[row, :end] = torch.tensor(ids[:-1])
        targets_BS[row, end - n : end] = torch.tensor(ids[-n:])
    loss_BS, _ = model.decoder(tokens_BS.to(model.device), targets_BS.to(model.device), reduction="none")
    return [-x for x in loss_BS.double().sum(1).tolist()]


def answer_all(model: InMemory, questions: Sequence[Question]) -> Accuracy:
    """Answer every question."""
    right = right_norm = 0
    for question in questions:
        scores = log_likelihoods(model, question)
        per_character = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
        right += scores.index(max(scores)) == question.answer
        right_norm += per_character.index(max(per_character)) == question.answer
    n = len(questions)
    chance = sum(1 / len(question.choices) for question in questions) / n
    return Accuracy(n, right / n, stderr(right, n), right_norm / n, stderr(right_norm, n), chance)


def stderr(right: int, n: int) -> float:
    """Standard error of the share right / n; 0 for one question."""
    p = right / n
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
