"""Losses of a mixture without training on it: the average of models that were each trained on one domain.

Scalable Data Ablations (arXiv 2410.15661) averages models trained on partitions of the data from a shared start; here
the average is weighted by the mixture. It says something only while the models are near each other: they must come
from one start, or expert i of one would be averaged with an unrelated expert i of another.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moetrain.checkpoint.load import load, newest
from moetrain.config.errors import DataError
from moetrain.config.schema import Config
from moetrain.convert.load import load_hf
from moetrain.data.asked import domains_of
from moetrain.data.dataset import TokenData
from moetrain.data.loader import validation_batches
from moetrain.model.decoder import Decoder

logger = logging.getLogger("moetrain")

# Cosine of the weights of two models: near 1 after one start (0.8 and more in the demo), near 0 without.
LEAST_COSINE = 0.2


class MergedModels:
    """A ``Runner`` (moetrain.mixture.iterate) over one trained model per domain, all of them in memory.

    cfg: of the model, the data and the evaluation. folders: domain -> run directory with a checkpoint, or a folder of
    safetensors in Hugging Face form. scores: file that remembers losses, so that a second search need not compute them.
    Raises DataError for a folder without weights and for models that do not share their start; CheckpointError or
    ConvertError for weights of another model.
    """

    def __init__(self, cfg: Config, folders: dict[str, Path], targets: list[str], scores: Path | None = None) -> None:
        self.cfg, self.targets, self.scores = cfg, targets, scores
        self.domains = list(folders)
        self.data = TokenData.open(cfg.data.dir, vocab_size=cfg.model.vocab_size, domain_of=domains_of(cfg.data))
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu")
        self.model = Decoder(cfg.model, cfg.balance, cfg.experts).eval()
        self.weights = {domain: read_weights(self.model, folder) for domain, folder in folders.items()}
        check_one_start(self.weights)
        self.model.to(self.device)
        self.known = read_scores(scores)

    def run(self, x_ND: np.ndarray, round_: int) -> np.ndarray:
        return np.array([self.losses_of(row) for row in x_ND])

    def losses_of(self, weights_D: np.ndarray) -> list[float]:
        """(M,) held-out losses in nats per token of the average with these weights."""
        key = " ".join(f"{weight:.6f}" for weight in weights_D)
        if key not in self.known:
            self.model.load_state_dict(average(list(self.weights.values()), weights_D.tolist()))
            found = held_out_losses(self.model, self.data, self.cfg, self.device)
            self.known[key] = [found[target] for target in self.targets]
            if self.scores is not None:
                with self.scores.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"weights": key, "losses": self.known[key]}) + "\n")
        return self.known[key]


def read_weights(model: Decoder, folder: Path) -> dict[str, Tensor]:
    """A copy of the weights in ``folder``, by the names of ``model``, which they also fill."""
    if any(folder.glob("*.safetensors")):
        load_hf(model, folder)
    else:
        path = newest(folder / "checkpoints")
        if path is None:
            raise DataError(f"{folder}: no model; give a run directory with a checkpoint, or a folder of safetensors")
        load(path, {"model": model.state_dict()})
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def average(models: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Each tensor averaged over ``models`` with ``shares``, which sum to 1. Whole numbers are those of the first."""
    merged = {}
    for name, first in models[0].items():
        merged[name] = first
        if first.is_floating_point():
            merged[name] = sum(  # type: ignore[assignment]
                model[name].double() * share for model, share in zip(models, shares, strict=True)
            ).to(first.dtype)  # type: ignore[union-attr]
    return merged


def check_one_start(models: dict[str, dict[str, Tensor]]) -> None:
    """Raise DataError where two models do not come from one start, by their experts or by all else."""
    (first, one), *others = models.items()
    for name, other in others:
        for what, of_experts in (("experts", True), ("weights", False)):
            keys = [key for key, value in one.items() if value.dim() > 1 and (".experts." in key) == of_experts]
            dots = [[float((a[key].double() * b[key].double()).sum()) for key in keys]
                    for a, b in ((one, other), (one, one), (other, other))]  # fmt: skip
            product, a, b = (sum(row) for row in dots)
            cosine = product / (a * b) ** 0.5 if a * b else 1.0
            if cosine < LEAST_COSINE:
                raise DataError(
                    f"the models of '{first}' and '{name}' do not come from one start (cosine of their {what}: "
                    f"{cosine:.2f}), so their average means nothing; train them from one checkpoint"
                )


@torch.no_grad()
def held_out_losses(model: Decoder, data: TokenData, cfg: Config, device: torch.device) -> dict[str, float]:
    """Mean loss in nats per token of each domain's held-out text, on what ``moetrain train`` evaluates."""
    t = cfg.train
    totals, counts = dict.fromkeys(data.domains, 0.0), dict.fromkeys(data.domains, 0)
    for source in data.sources:
        for batch in validation_batches(
            data, source, t.seq_len, t.micro_batch, t.eval_sequences, 0, 1, cfg.data.document_mask
        ):
            document = None if batch.document_BS is None else batch.document_BS.to(device)
            loss, _ = model(batch.tokens_BS.to(device), batch.targets_BS.to(device), document_BN=document)
            totals[data.domain_of[source]] += float(loss)
            counts[data.domain_of[source]] += int((batch.targets_BS >= 0).sum())
    return {domain: total / max(counts[domain], 1) for domain, total in totals.items()}


def read_scores(file: Path | None) -> dict[str, list[float]]:
    """What was scored before; a line that was cut off by a kill is left out."""
    known = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else []:
        try:
            entry = json.loads(line)
            known[entry["weights"]] = entry["losses"]
        except (ValueError, KeyError):
            continue
    return known
