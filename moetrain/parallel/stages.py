"""Which layers each stage of a pipeline holds. Which rank holds a stage: ``Sizes.rank_of_stage``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetrain.config.schema import Config, ExpertsConfig, ModelConfig
from moetrain.config.sizes import Sizes
from moetrain.model.attention import window_of
from moetrain.model.block import Block
from moetrain.model.count import mean_seen


@dataclass(frozen=True)
class Stage:
    """Stage ``index`` of ``total``, with the numbers of its layers. The first has the embedding, the last the head."""

    index: int
    total: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.index == self.total - 1


def all_stages(cfg: Config, sizes: Sizes) -> list[Stage]:
    """The stages of ``cfg``, in order: as ``parallel.layout`` says, or split by cost."""
    counts = cfg.parallel.layout
    if counts is None:
        costs = [layer_cost(cfg.model, layer, cfg.train.seq_len) for layer in range(cfg.model.n_layers)]
        head = 2.0 * cfg.model.dim * cfg.model.vocab_size
        counts = split_by_cost(costs, sizes.stages, last=head)
    ends = list(itertools.accumulate(counts))
    return [Stage(i, sizes.stages, range(end - n, end)) for i, (end, n) in enumerate(zip(ends, counts, strict=True))]


def layer_cost(model: ModelConfig, layer: int, seq_len: int) -> float:
    """Forward FLOPs per token of one decoder layer: 2 per weight that a token meets, and attention's scores."""
    with torch.device("meta"):
        block = Block(model, layer, {}, ExpertsConfig())
    met = 0.0
    for name, p in block.named_parameters():
        share = 1.0
        if ".experts." in name:
            share = model.layer_value("top_k", layer) / model.layer_value("num_experts", layer)
        met += p.numel() * share
    a = model.attention
    widths = 2 * a.head_dim if a.kind == "gqa" else a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    return 2.0 * met + 2.0 * a.n_heads * widths * mean_seen(seq_len, window_of(model, layer))


def split_by_cost(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Layers of each of ``stages`` consecutive groups, at least one each, such that the dearest group costs least.

    first, last: what the first and the last group cost beside their layers. Among equals, the later groups are larger,
    since the first ones hold the most micro-batches at a time. Raises ValueError where there are too few layers.
    """
    n = len(costs)
    if stages > n:
        raise ValueError(f"{n} layers cannot fill {stages} stages")
    sums = [0.0, *itertools.accumulate(costs)]

    def cost(start: int, end: int, stage: int) -> float:
        return sums[end] - sums[start] + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)

    # best[s][end]: the least possible dearest group when the first s + 1 groups hold layers 0 .. end - 1, and where the
    # last of these groups starts.
    best: list[dict[int, tuple[float, int]]] = [{end: (cost(0, end, 0), 0) for end in range(1, n - stages + 2)}]
    for stage in range(1, stages):
        row = {}
        for end in range(stage + 1, n - stages + stage + 2):
            row[end] = min(
                (max(best[-1][start][0], cost(start, end, stage)), start)
                for start in range(stage, end)
                if start in best[-1]
            )
        best.append(row)
    counts, end = [], n
    for stage in range(stages - 1, -1, -1):
        start = best[stage][end][1]
        counts.append(end - start)
        end = start
    return counts[::-1]
