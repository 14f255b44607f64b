"""What a log step reports: speed, memory, and how evenly the experts are loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moetrain.config.schema import Config
from moetrain.moe.balance import Loads
from moetrain.moe.dispatch.lsh import LshDispatcher, LshOptions
from moetrain.moe.layer import MoELayer
from moetrain.train.runtime import memory_gib


def load_metrics(loads: Loads) -> dict[str, Any]:
    """Expert load of one step. Lists have one entry per MoE layer, in order.

    load_max_over_mean_by_layer: rows of the fullest expert over the mean (1: balanced);
    load_entropy_by_layer: entropy of the load divided by log E (1: balanced);
    dead_experts_by_layer: experts without a single row; dropped_share_by_layer: assignments dropped by capacity.
    dropped_by_position: the same by eighths of the sequence, mean over the layers that have a capacity.
    """
    ratio, entropy, dead, dropped = [], [], [], []
    for name, counts in loads.counts.items():
        total = int(counts.sum())
        share = counts.double() / max(total, 1)
        ratio.append(float(share.max() * len(counts)))
        entropy.append(float(torch.special.entr(share).sum()) / math.log(len(counts)) if len(counts) > 1 else 1.0)
        dead.append(int((counts == 0).sum()))
        dropped.append(loads.dropped[name] / max(total, 1))
    if not ratio:
        return {}
    by_position = position_metrics(loads)
    return {
        "load_max_over_mean": max(ratio),
        "dead_experts": sum(dead),
        "dropped_share": sum(dropped) / len(dropped),
        "load_max_over_mean_by_layer": ratio,
        "load_entropy_by_layer": entropy,
        "dead_experts_by_layer": dead,
        "dropped_share_by_layer": dropped,
        **by_position,
    }


def position_metrics(loads: Loads) -> dict[str, list[float]]:
    """``dropped_by_position``; nothing without a capacity."""
    shares = []
    for name, dropped_P in loads.dropped_P.items():
        shares.append(dropped_P.double() * len(dropped_P) / max(int(loads.counts[name].sum()), 1))
    return {"dropped_by_position": torch.stack(shares).mean(0).tolist()} if shares else {}


def compression_metrics(model: nn.Module, cfg: Config) -> dict[str, Any]:
    """What dispatch=lsh did in the training steps since it was last asked, one number per MoE layer in order; nothing
    with another dispatcher. Collective.

    lsh_sent_share_by_layer: means that travelled over rows; lsh_error_by_layer: root of the mean square of a row's
    distance from the mean that stood for it, over that of the rows. lsh_sent_share: of all layers together.
    """
    layers = cfg.model.moe_layers()
    if not isinstance(cfg.dispatch, LshOptions) or not layers:
        return {}
    totals_L4 = torch.zeros(len(layers), 4, dtype=torch.float64, device=next(model.parameters()).device)
    dispatchers = {id(m.dispatcher): m.dispatcher for m in model.modules() if isinstance(m, MoELayer)}
    for dispatcher in dispatchers.values():
        assert isinstance(dispatcher, LshDispatcher)
        for layer, sums in dispatcher.tally.items():
            totals_L4[layers.index(layer)] += sums.to(totals_L4.device)  # parameters may be in host memory
        dispatcher.tally.clear()
    dist.all_reduce(totals_L4)
    rows, sent, error2, norm2 = totals_L4.cpu().clamp(min=0).unbind(1)
    return {
        "lsh_sent_share": float(sent.sum() / rows.sum().clamp(min=1)),
        "lsh_sent_share_by_layer": (sent / rows.clamp(min=1)).tolist(),
        "lsh_error_by_layer": (error2 / norm2.clamp(min=1e-30)).sqrt().tolist(),
    }


def number(value: float) -> float | None:
    """``value`` as JSON can hold it: None for what is not finite."""
    return value if math.isfinite(value) else None


class Meter:
    """Speed of the training steps between two log steps (evaluation and saving left out), and memory of this rank."""

    def __init__(self, device: torch.device, flops_per_token: float, peak_tflops: float | None, world: int) -> None:
        self._device, self._flops, self._peak, self._world = device, flops_per_token, peak_tflops, world
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step: the tokens of its global batch, and how long it took."""
        self._tokens += tokens
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """tokens_per_s (all ranks together), tflops_per_rank, memory_gib (peak so far), and mfu, the share of the
        device's peak, where that is known."""
        rate = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        tflops = rate * self._flops / self._world / 1e12
        out = {"tokens_per_s": rate, "tflops_per_rank": tflops, "memory_gib": memory_gib(self._device)}
        if self._peak is not None:
            out["mfu"] = tflops / self._peak
        return out
