"""The end of a run: what was learned beside what simple models know, samples, the export and its proof, the summary."""

from __future__ import annotations

import logging
import shutil
from shlex import quote
from typing import Any

import torch

from moetrain.comm.ranks import RankError, Ranks
from moetrain.config.errors import ConvertError, TrainError
from moetrain.convert.export import export_hf
from moetrain.convert.tokenizer import tokenizer_of
from moetrain.data.baselines import Baselines, baselines
from moetrain.data.loader import validation_batches
from moetrain.train.evaluate import Evaluation
from moetrain.train.generate import generate
from moetrain.train.metrics import load_metrics
from moetrain.train.rundir import write_summary
from moetrain.train.trainer import Trainer
from moetrain.train.whole import whole_weights

log = logging.getLogger("moetrain")

SUMMARY_VERSION = 1


def finish(trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """Report, sample, export as the config asks; write and return the summary. Collective."""
    cfg = trainer.cfg
    known = baselines(trainer.data, cfg.train.seq_len, cfg.train.eval_sequences)
    report(trainer, evaluation, known)
    for i, prompt in enumerate(cfg.generate.prompts):
        g = cfg.generate
        text = generate(trainer.engine, trainer.data, prompt, g.max_tokens, g.temperature, cfg.seed + i)
        log.info("sample     %r", text)
    summary = {
        **so_far(trainer, "finished" if trainer.step >= cfg.train.steps else "the data has run out"),
        **evaluation.metrics(),
        "val_tokens": evaluation.tokens,
        "unigram_nats": known.unigram,
        "bigram_nats": known.bigram,
    }
    write_summary(trainer.run_dir, summary)  # also where the export fails, as on a full disk
    if cfg.export.at_end:
        write_summary(trainer.run_dir, summary | export(trainer, evaluation))
    log.info("done       %s", trainer.run_dir)
    return summary


def stopped(trainer: Trainer, error: TrainError) -> None:
    """Write the summary of a run that had to stop. Collective."""
    write_summary(trainer.run_dir, so_far(trainer, str(error)))


def so_far(trainer: Trainer, exit_reason: str) -> dict[str, Any]:
    """The part of the summary that every run has."""
    return {
        "version": SUMMARY_VERSION,
        "exit_reason": exit_reason,
        "params_total": trainer.parameters.total,
        "params_active": trainer.parameters.active,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 3),
        "data_wait_s": round(trainer.waited_s, 3),
        "data_wait_share": round(trainer.waited_s / max(trainer.seconds, 1e-9), 6),
    }


def report(trainer: Trainer, evaluation: Evaluation, known: Baselines) -> None:
    """Log the held-out loss beside the baselines, per domain, and how the experts were used in the last step."""
    verdict = (
        "below both baselines" if evaluation.loss < min(known.unigram, known.bigram) else "NOT below both baselines"
    )
    log.info("held out   %.4f nats/token on %d tokens; unigram %.4f, bigram %.4f: %s",
             evaluation.loss, evaluation.tokens, known.unigram, known.bigram, verdict)  # fmt: skip
    for name, loss in evaluation.by_domain.items():
        log.info("  %-14s %.4f   (unigram %.4f, bigram %.4f)", name, loss,
                 known.by_domain[name].unigram, known.by_domain[name].bigram)  # fmt: skip
    share = trainer.waited_s / max(trainer.seconds, 1e-9)
    log.info("data wait  %.3g%% of the training time was waiting for data", 100 * share)
    loads = load_metrics(trainer.last_loads)
    if loads:
        per_layer = zip(loads["load_max_over_mean_by_layer"], loads["load_entropy_by_layer"], strict=True)
        log.info("experts    last step: %d dead; by MoE layer max/mean (entropy): %s", loads["dead_experts"],
                 ", ".join(f"{ratio:.2f} ({entropy:.2f})" for ratio, entropy in per_layer))  # fmt: skip


def export(trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """Write ``export/`` in Hugging Face form and, if asked, prove that transformers computes the same held-out loss.
    Raises RankError; then what an earlier end of this run has exported is still there."""
    out = trainer.run_dir / "export"
    new = out.with_name("export.new")
    dtype = getattr(torch, trainer.cfg.export.dtype)
    whole = whole_weights(trainer.engine, trainer.dims)
    cfg = trainer.cfg

    def write() -> None:
        try:
            shutil.rmtree(new, ignore_errors=True)
            export_hf(cfg.model, whole, new, tokenizer_of(cfg), dtype)
            shutil.rmtree(out, ignore_errors=True)  # of an earlier end of this run, before it was resumed
            new.rename(out)
        finally:
            whole.drain()

    ranks = Ranks()
    try:
        ranks.each(write if ranks.rank == 0 else whole.drain)
    except (ConvertError, RankError) as error:
        raise RankError(
            f"training has finished, but its export was not written: {error}; to try again: moetrain train --resume "
            f"{quote(str(trainer.run_dir))}"
        ) from None
    log.info("exported   %s", out)
    return {"export": str(out)} | (verify(trainer, evaluation) if trainer.cfg.export.verify else {})


def verify(trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """Load ``export/`` with transformers on rank 0 and compare its loss on the same held-out text. Collective."""
    if trainer.cfg.data.document_mask:  # transformers sees windows whole
        evaluation = trainer.evaluate(document_mask=False)
    loss = Ranks().first_for_long(lambda: transformers_loss(trainer))
    log.info("verified   transformers on the export: %.6f nats/token, here %.6f (difference %.1e)",
             loss, evaluation.loss, abs(loss - evaluation.loss))  # fmt: skip
    return {"export_val_loss": loss}


@torch.no_grad()
def transformers_loss(trainer: Trainer) -> float:
    """Held-out loss in nats per token of transformers' own model, loaded from ``export/``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    t, data = trainer.cfg.train, trainer.data
    folder = trainer.run_dir / "export"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    total, count = 0.0, 0
    for source in data.sources:
        for batch in validation_batches(data, source, t.seq_len, t.micro_batch, t.eval_sequences, 0, 1):
            logits = model(batch.tokens_BS).logits.flatten(0, 1).float()
            total += float(torch.nn.functional.cross_entropy(logits, batch.targets_BS.flatten(), reduction="sum"))
            count += int((batch.targets_BS >= 0).sum())
    return total / max(count, 1)
