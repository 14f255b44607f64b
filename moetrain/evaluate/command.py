"""``moetrain eval``: its words, what it measures, and the tables."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moetrain.config.errors import ConfigError, TrainError
from moetrain.config.words import one_of, path_and_words, whole
from moetrain.convert import command as convert
from moetrain.data.asked import domains_of
from moetrain.data.dataset import TokenData
from moetrain.evaluate.choices import Question, answer_all, read_questions
from moetrain.evaluate.generate import DTYPES
from moetrain.evaluate.loss import Loss, loss_by_domain
from moetrain.evaluate.opened import InMemory, open_model

HELP = """usage: moetrain eval PATH [data=DIR] [sequences=N] [seq_len=N] [dtype=NAME] [--json]
       moetrain eval PATH tasks=FILE.jsonl[,FILE.jsonl ...]
       moetrain eval PATH harness=TASK[,TASK ...]

Show how good a model is. PATH is a run (its newest whole checkpoint), a checkpoint of one, a Hugging Face folder, or a
file of 'moetrain convert to=safetensors'. docs/evaluate.md tells more.

  data=DIR         a folder of 'moetrain prepare': loss and perplexity on its held-out text, per domain (default: the
                   run's, unless there are tasks= or harness=)
  sequences=N      windows of held-out text a source at most; 0: all (default: the run's train.eval_sequences, or 0)
  seq_len=N        tokens of a window (default: the run's train.seq_len, or the model's max_seq_len up to 2048)
  tasks=FILES      multiple-choice questions, a JSON object a line: question, choices, answer
  harness=TASKS    tasks of lm-evaluation-harness, run by its own command on the Hugging Face form of the model
  dtype=NAME       to compute in: float32 (the default), bfloat16, float64"""

WORDS = ("data", "sequences", "seq_len", "tasks", "harness", "dtype")


@dataclass(frozen=True)
class Asked:
    """The words of the command line, as HELP explains them; -1 for a number that was not given."""

    path: str
    data: str | None
    sequences: int
    seq_len: int
    tasks: list[Path]
    harness: str | None
    dtype: str


def parse(words: Sequence[str]) -> Asked:
    """Read words like "runs/tiny", "tasks=x.jsonl". Raises ConfigError."""
    path, given = path_and_words("eval", words, WORDS)
    tasks = [Path(file) for file in given.get("tasks", "").split(",") if file]
    for file in tasks:
        if not file.is_file():
            raise ConfigError(f"eval: tasks={file}: there is no such file")
    return Asked(
        path,
        given.get("data"),
        whole("eval", given, "sequences", 0, least=0) if "sequences" in given else -1,
        whole("eval", given, "seq_len", 1) if "seq_len" in given else -1,
        tasks,
        given.get("harness"),
        one_of("eval", given, "dtype", DTYPES),
    )


def run(asked: Asked) -> dict[str, Any]:
    """What was found, as ``as_tables`` takes it. Raises a UserError."""
    if asked.harness is not None:
        refuse_no_harness()
    # files are read first, so that a mistake in the last costs no time
    questions = {file: read_questions(file) for file in asked.tasks}
    found: dict[str, Any] = {}
    if asked.data is not None or asked.tasks or asked.harness is None:
        found = measure(asked, questions)
    if asked.harness is not None:
        run_harness(asked.path, asked.harness, asked.dtype)
    return found


def measure(asked: Asked, questions: dict[Path, list[Question]]) -> dict[str, Any]:
    """Loss per domain and tasks, of one model in memory."""
    model = open_model(asked.path, getattr(torch, asked.dtype))
    found: dict[str, Any] = {"path": str(model.path)}
    if asked.data is not None or not asked.tasks:
        losses = held_out(model, asked)
        total = sum(losses.values(), Loss())
        found |= {"loss": {"all": _figures(total)} | {name: _figures(loss) for name, loss in losses.items()}}
    if questions:
        found["tasks"] = {str(file): asdict(answer_all(model, some)) for file, some in questions.items()}
    return found


def held_out(model: InMemory, asked: Asked) -> dict[str, Loss]:
    """Domain -> loss; see HELP for what is taken where."""
    cfg = model.run
    if asked.data is None and cfg is None:
        raise ConfigError(f"eval: '{asked.path}' is no run that has held-out text; give data=DIR or tasks=FILE.jsonl")
    longest = model.decoder.cfg.max_seq_len
    seq_len = asked.seq_len if asked.seq_len > 0 else cfg.train.seq_len if cfg else min(longest, 2048)
    if seq_len > longest:
        raise ConfigError(f"eval: seq_len={seq_len} is longer than the model's max_seq_len={longest}; set it to less")
    sequences = asked.sequences if asked.sequences >= 0 else cfg.train.eval_sequences if cfg else 0
    if asked.data is None and cfg is not None:
        data = TokenData.open(cfg.data.dir, model.decoder.cfg.vocab_size, domain_of=domains_of(cfg.data))
    else:
        data = TokenData.open(str(asked.data), model.decoder.cfg.vocab_size)
    return loss_by_domain(model, data, seq_len, sequences, cfg is not None and cfg.data.document_mask)


def refuse_no_harness() -> None:
    """Raise ConfigError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("eval: harness= needs lm-evaluation-harness, which is not installed: pip install lm_eval[hf]")


def run_harness(path: str, tasks: str, dtype: str) -> None:
    """Run ``tasks`` by lm-evaluation-harness's own command on ``path``, converted where it is no Hugging Face folder;
    it prints its table. Raises a UserError."""
    with tempfile.TemporaryDirectory(prefix="moetrain-eval-") as folder:
        exported = Path(path)
        if not (exported / "config.json").is_file():
            exported = Path(folder) / "hf"
            convert.run(convert.Asked("hf", path, exported))
        arguments = f"pretrained={exported},dtype={dtype},trust_remote_code=True"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", tasks]
        code = subprocess.run(command).returncode
    if code:
        raise TrainError(f"eval: lm-evaluation-harness ended with exit code {code}; its own lines above say why")


def as_tables(found: dict[str, Any]) -> list[Table]:
    """What ``run`` found, for the terminal."""
    tables = []
    if "loss" in found:
        table = Table("held out", box=None)
        for name in ("nats/token", "perplexity", "tokens"):
            table.add_column(name, justify="right")
        for name, f in found["loss"].items():
            table.add_row(name, f"{f['loss']:.4f}", f"{f['perplexity']:.2f}", f"{f['tokens']:,}")
        tables.append(table)
    if "tasks" in found:
        table = Table("task", box=None)
        for name in ("questions", "accuracy", "per character", "chance"):
            table.add_column(name, justify="right")
        for name, f in found["tasks"].items():
            acc, norm = (f"{f[k]:.4f} ± {f[k + '_stderr']:.4f}" for k in ("acc", "acc_norm"))
            table.add_row(name, f"{f['questions']:,}", acc, norm, f"{f['chance']:.4f}")
        tables.append(table)
    return tables


def _figures(loss: Loss) -> dict[str, Any]:
    # exp overflows above 709 nats, which only a broken model has
    perplexity = math.exp(loss.mean) if loss.mean < 700 else math.inf
    return {"loss": loss.mean, "perplexity": perplexity, "tokens": loss.tokens}
