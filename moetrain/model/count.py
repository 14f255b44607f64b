"""Parameters and floating-point operations of a model, from its build on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.model.attention import window_of
from moetrain.model.decoder import Decoder


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    total: all. active: those that one token meets, which is all but the routed experts that it is not sent to.
    embedding: those of the input table, in both, which cost no arithmetic; 0 when the head shares them.
    head: those of the output table. matmul: active ones that multiply a token's activations: 2 FLOPs each, forward.
    Published counts differ in what they leave out: "non-embedding" is total - embedding - head.
    """

    total: int
    active: int
    embedding: int
    head: int
    matmul: int


def count_parameters(cfg: ModelConfig) -> Counts:
    """Counts of ``cfg``. Takes no memory for weights."""
    with torch.device("meta"):
        model = Decoder(cfg, {}, ExpertsConfig())
    total = active = matmul = 0
    for fqn, p in model.named_parameters():
        met = p.numel()
        if ".experts." in fqn:
            layer = int(fqn.split(".")[1])
            met = met * cfg.layer_value("top_k", layer) // cfg.layer_value("num_experts", layer)
        total += p.numel()
        active += met
        is_matrix = p.dim() >= 2 and not fqn.endswith((".b13", ".b2"))
        matmul += met if is_matrix else 0
    assert model.embed is not None
    table = model.embed.weight.numel()
    embedding, head = (0, table) if model.head is None else (table, model.head.weight.numel())
    return Counts(total, active, embedding, head, matmul - embedding)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of one training step on sequences of ``seq_len`` tokens: 3 x forward, as backward costs two.

    Forward: 2 per active weight of a matrix product, and 2 x heads x (query width + value width) for every position
    attended to, causally (half of the square) and within the window. Recomputation, norms, softmax and the optimizer
    are not counted: the "model FLOPs" of published throughputs (PaLM, arXiv 2204.02311, appendix B; Megatron-Core).
    """
    a = cfg.attention
    widths = 2 * a.head_dim if a.kind == "gqa" else a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    seen = sum(mean_seen(seq_len, window_of(cfg, layer)) for layer in range(cfg.n_layers))
    return 3.0 * (2.0 * count_parameters(cfg).matmul + 2.0 * a.n_heads * widths * seen)


def mean_seen(seq_len: int, window: int | None) -> float:
    """Mean number of positions that a token attends to, itself included."""
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
