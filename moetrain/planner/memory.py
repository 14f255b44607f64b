"""Bytes on a rank, by formula, for many mappings at once; the same columns as a dry run's (``planner.dry_run``).

Weights, gradients and optimizer state are exact. Activations follow what autograd saves in moetrain's own modules, with
fused attention and norms, term by term, and are within 5% of a dry run, which counts saved tensors; the total is within
2%, but for a few (tested).
Letters: T tokens of a micro-batch on this rank between blocks, N those of all tp ranks, R rows of this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from moe_kernels.fp8 import TILE
from moe_kernels.loss import CHUNK_LOGITS_GPU, CHUNK_TOKENS
from moe_kernels.loss_softmax import BLOCK_LOGITS_GPU

from moetrain.planner.candidates import DISPATCH, PRECISION, RECOMPUTE, Mappings, Numbers
from moetrain.planner.placed import LSH, Placed
from moetrain.planner.shape import LayerShape, Matrix, ModelShape

SELECTIVE, FULL = RECOMPUTE.index("selective"), RECOMPUTE.index("full")
LOCAL, ALL_GATHER, TWO_STEP = (DISPATCH.index(name) for name in ("local", "all_gather", "two_step"))
WEIGHING = (LOCAL, ALL_GATHER, TWO_STEP)  # weights are applied by the experts, not when rows come back


@dataclass(frozen=True)
class Run:
    """What is common to all mappings of a search. wide: bytes of a weight (4, or 8 in float64); narrow: of a number
    that is computed with. skew: rows of the fullest rank over the mean. lean: whether the experts' kernels keep their
    input and what the first matrices give, and compute the rest again (the CPU's, Triton's, SonicMoE's; not
    grouped_mm). rounds: whether these kernels keep wider weights rounded for backward (all but the CPU's). chunk,
    block: logits that exist at a time, and that a softmax works on. shards: what data parallel ranks split, as in
    ``rates.Stack``: "optimizer" is Megatron's distributed optimizer, with 16-bit weights and 32-bit gradients whole on
    every rank. placed: what experts/placement=fssdp does where a mapping has it. sent: share of the rows that
    dispatch=lsh sends."""

    seq_len: int
    global_batch: int
    wide: int = 4
    narrow: int = 2
    optimizer: str = "adamw"
    prefetch: int = 1
    skew: Any = 1.0
    lean: bool = False
    rounds: bool = True
    chunk: int = CHUNK_LOGITS_GPU
    block: int = BLOCK_LOGITS_GPU
    shards: str = "all"
    placed: Placed | None = None
    sent: float = 1.0


@dataclass(frozen=True)
class Shards:
    """Of one layer, or of the ends of the model. own: numbers that this rank keeps. tensors: parameters. vectors,
    of_adam: numbers and parameters that AdamW updates under Muon. gathered: numbers of the whole units that FSDP
    gathers."""

    own: Numbers
    tensors: Numbers
    vectors: Numbers
    of_adam: Numbers
    gathered: Numbers


def matrices(parts: tuple[Matrix, ...], m: Mappings, kv_heads: int = 0) -> Shards:
    """Dense parameters: split over tp, then by FSDP along the first dimension, of which the first rank has most."""
    fsdp = m.dp * m.cp
    own = np.zeros(len(m))
    vectors = np.zeros(len(m))
    gathered = np.zeros(len(m))
    for p in parts:
        tp = m.tp
        if kv_heads and p.split == 0 and p.outputs % kv_heads == 0:
            tp = np.where(kv_heads % m.tp == 0, m.tp, 1)
        rows = p.outputs / (tp if p.split == 0 else 1)
        across = max(1, p.inputs) / (tp if p.split == 1 else 1)
        mine = np.ceil(rows / fsdp) * across
        own += mine
        gathered += mine * fsdp
        if not p.inputs:
            vectors += mine
    counts = (np.full(len(m), float(n)) for n in (len(parts), sum(not p.inputs for p in parts)))
    tensors, of_adam = counts
    return Shards(own, tensors, vectors, of_adam, gathered)


def layer_shards(kind: LayerShape, m: Mappings) -> tuple[Shards, Shards]:
    """(dense parameters, routed experts) of a layer."""
    kv = [p for p in kind.attention[1:3] if kind.ranks == (0, 0)]
    kv_widths = {p.outputs for p in kv}
    is_kv = [p for p in kind.dense if kv and p.split == 0 and p.outputs in kv_widths and p not in kind.mlp]
    rest = [p for p in kind.dense if p not in is_kv]
    a, b = matrices(tuple(rest), m), matrices(tuple(is_kv), m, kind.kv_heads)
    gates = matrices(tuple(p for p in kind.router if p.inputs), m)  # which Muon leaves to AdamW
    vectors, of_adam = a.vectors + b.vectors + gates.own, a.of_adam + b.of_adam + gates.tensors
    dense = Shards(a.own + b.own, a.tensors + b.tensors, vectors, of_adam, a.gathered + b.gathered)
    zero = np.zeros(len(m))
    if kind.experts is None:
        return dense, Shards(zero, zero, zero, zero, zero)
    e = kind.experts
    here = e.numel / (m.ep * m.etp)
    alone = (m.edp == 1) & (m.offload != 2)
    vectors = e.count * (e.parts * e.inner + e.dim) / (m.ep * m.etp * m.edp) if e.bias else zero
    tensors = zero + (4.0 if e.bias else 2.0)
    return dense, Shards(here / m.edp, tensors, vectors, tensors - 2.0, np.where(alone, 0.0, here))


def state_bytes(run: Run, shards: Shards) -> tuple[Numbers, Numbers, Numbers]:
    """(weights, gradients, optimizer) of ``shards``."""
    weights = run.wide * shards.own
    if run.optimizer == "muon":  # a momentum for matrices, AdamW for the rest
        states = run.wide * (shards.own + shards.vectors) + 4 * shards.of_adam
    else:
        states = 2 * run.wide * shards.own + 4 * shards.tensors  # and the step, a float32 of each parameter
    return weights, weights, states


def kept_bytes(kind: LayerShape, m: Mappings, run: Run, dim: int) -> tuple[Numbers, Numbers]:
    """(bytes that backward needs of one layer and micro-batch, bytes beside them while the layer is computed)."""
    e, T = float(run.narrow), m.tokens(run.seq_len)
    N, x = T * m.tp, T * dim * e
    before = _attention_kept(kind, m, run, dim) + 2 * (x + 4 * T)  # with inputs and factors of both norms
    inner = mlp = np.zeros(len(m))
    if kind.mlp:
        mlp = N * dim * e  # its input, of all tp ranks
        inner = _mlp_inside(kind, m, run) + kind.shared_gate * T * (dim + 1) * e  # and what a gate scales
    outer = experts_inner = np.zeros(len(m))
    if kind.experts is not None:
        outer, selective_input, experts_inner = _experts_kept(kind, m, run)
        inner = inner + experts_inner
        # What goes into the experts is kept where their inside is not; a local dispatcher's is the shared MLP's, too.
        mlp = mlp + np.where(m.recompute == SELECTIVE, selective_input, 0.0)
    elif kind.mlp:
        mlp = np.where((m.recompute == SELECTIVE) & (m.tp > 1), x, mlp)  # tokens are gathered again
    plain = before + mlp + outer + inner
    kept = np.select([m.recompute == FULL, m.recompute == SELECTIVE], [x, plain - inner], plain)
    # Of a block that is computed again its inside lives once more; of any block the gradients that are under way.
    again = np.select([m.recompute == FULL, m.recompute == SELECTIVE], [plain - x, inner], 0.0)
    later = np.where(m.recompute == SELECTIVE, experts_inner, 0.0)  # when their turn comes
    return kept, again + _under_way(kind, m, run, dim, later) + x


def _mlp_inside(kind: LayerShape, m: Mappings, run: Run) -> Numbers:
    """What a dense MLP or shared experts keep between their matrices."""
    inside: Numbers = m.tokens(run.seq_len) * kind.mlp_inner * run.narrow * (4 if kind.mlp_parts == 2 else 2)
    return inside


def _under_way(kind: LayerShape, m: Mappings, run: Run, dim: int, later: Numbers) -> Numbers:
    """The most that gradients take at a time while a block runs backward, beside what it keeps less what is done with;
    those of its weights, too, of which the experts' are far larger than the rows where few tokens meet many experts.
    later: what is not there before the experts run backward."""
    e, N = float(run.narrow), m.tokens(run.seq_len) * m.tp
    inner = N * kind.mlp_inner / m.tp * e
    largest = max((p.numel for p in kind.mlp), default=0) / m.tp * e
    most: Numbers = np.maximum(3 * N * dim * e, np.maximum(inner + largest, 2 * inner))
    if kind.experts is None:
        return most
    x = kind.experts
    rows = _rows(kind, m, run) * x.dim * e
    fused = np.isin(m.dispatch, WEIGHING)
    # Before the experts run backward, shared ones are done, and rows that came back were multiplied by their weights.
    back = m.tokens(run.seq_len) * x.top_k * min(1.0, x.capacity or 1.0) * x.dim * e
    shared = _mlp_inside(kind, m, run)
    done = shared + np.where(fused, 0.0, back)
    # Combine runs backward when shared experts are done. In forward they run beside the experts' rows, as these came
    # and as they go back, which is more where their inside is kept.
    forward = np.where(m.recompute == SELECTIVE, 0.0, 2 * rows + N * x.dim * e if run.lean else 3 * rows)
    most = np.maximum(most, np.where(fused, rows, np.maximum(forward, 3 * rows - shared))) - later
    return np.maximum(most, _experts_under_way(kind, m, run) - done)


def _experts_under_way(kind: LayerShape, m: Mappings, run: Run) -> Numbers:
    """The most that the experts' own backward has at a time, by the kernels that make it."""
    assert kind.experts is not None
    x, R, e = kind.experts, _rows(kind, m, run), float(run.narrow)
    rows, hidden = R * x.dim * e, R * x.inner / m.etp * e
    alone = (m.edp == 1) & (m.offload != 2)
    weights = x.numel / (m.ep * m.etp) * np.where(alone, run.wide, run.narrow)
    if run.lean:  # Triton's has inner activations of all experts beside gradients, those of their rows or of weights
        inner = run.rounds * (x.parts + 1) * hidden
        # What is rounded: gradients, the first matrices, and all rows turned, in whole tiles for each expert.
        turned = (R + x.count / m.ep * TILE) * ((x.parts + 1) * x.inner / m.etp + x.dim)
        eight = 0.5 * ((x.parts + 2) * hidden + rows) + x.parts / (x.parts + 1) * x.numel / (m.ep * m.etp) + turned
        last = np.where(_in_fp8(m, run), run.rounds * rows + weights + eight, np.maximum(run.rounds * rows, weights))
        held = _held(kind, m, run) * x.dim * e
        return np.where(m.dispatch == LOCAL, held, rows) + held + inner + last
    if run.narrow >= 4:  # expert by expert, then put together, with those of the second matrices there already
        stacked = (2 * x.parts + 1) / (x.parts + 1) * weights - x.kept * hidden - rows
        return np.maximum(stacked, 2 * hidden * m.ep / x.count + rows)
    # Those of the first matrices, rounded beside what waits for them; or of the activations, with the second's done.
    first = x.parts / (x.parts + 1) * weights * np.where(alone, 1.5, 1.0) + 2 * rows + (x.parts - x.kept) * hidden
    second = 2 * hidden + rows - np.where(alone, weights / (x.parts + 1) / 2, 0.0)
    # Rows by their weights: two gradients and one that came, float32.
    weighed = np.where(np.isin(m.dispatch, WEIGHING), 12.0 * R * x.dim, 0.0)
    return np.maximum(np.maximum(first, second), weighed)


def _rows(kind: LayerShape, m: Mappings, run: Run) -> Numbers:
    """R: rows of the experts here, after etp ranks have gathered each other's."""
    assert kind.experts is not None
    factor = kind.experts.capacity
    share = (1.0 if factor is None else min(1.0, factor)) * np.where(m.dispatch == LSH, run.sent, 1.0)
    rows: Numbers = m.tokens(run.seq_len) * kind.experts.top_k * share * m.etp * run.skew
    return rows


def _held(kind: LayerShape, m: Mappings, run: Run) -> Numbers:
    """N: rows or tokens that the experts are given."""
    assert kind.experts is not None
    x, T = kind.experts, m.tokens(run.seq_len) * m.etp
    missed = np.ones(len(m))  # share of the tokens with no expert on a rank, where experts are drawn evenly
    for i in range(x.top_k):
        missed *= np.maximum(0, x.count - x.count / m.ep - i) / (x.count - i)
    tokens = [T, T * m.ep, T * m.ep * (1 - missed)]
    return np.select([m.dispatch == place for place in WEIGHING], tokens, _rows(kind, m, run))


def _attention_kept(kind: LayerShape, m: Mappings, run: Run, dim: int) -> Numbers:
    """Input, queries, keys, values before and after norm and rotation, output, and a factor for each head and query."""
    e, T = float(run.narrow), m.tokens(run.seq_len)
    N = T * m.tp
    if not kind.heads:
        return T * dim * e
    H = kind.heads / m.tp
    G = np.maximum(1.0, kind.kv_heads / m.tp)
    out = N * H * kind.v * e + 4 * N * H
    if kind.ranks != (0, 0):
        latents = (T + N) * sum(kind.ranks) * e + 8 * T
        parts = (
            max(p.outputs for p in kind.attention if p.inputs == kind.ranks[1] - kind.rope) / m.tp
        )  # keys and values
        return T * dim * e + latents + N * (2 * H * kind.qk + parts) * e + out + _context_kept(kind, m, run, N, H, H)
    core = N * (H * kind.qk + G * (kind.qk + kind.v)) * e + out
    if kind.sinks or (kind.window or run.seq_len) < run.seq_len:  # a mask; heads are copied, a sink is one more key
        core = N * H * (2 * kind.qk + kind.v + 16 * kind.sinks) * e + run.seq_len**2 * e + out
    if kind.norm_heads:
        core = core + N * (H + G) * (kind.qk * e + 4)
    return N * dim * e + core + _context_kept(kind, m, run, N, H, G)


def _context_kept(kind: LayerShape, m: Mappings, run: Run, N: Numbers, H: Numbers, G: Numbers) -> Numbers:
    """What context parallelism adds: keys and values of the tokens that this rank's queries see, by ``context``."""
    e = float(run.narrow)
    kv = G * (kind.qk + kind.v) * e
    whole = N * m.cp
    mask = run.seq_len / (2 * m.cp) * run.seq_len * e
    copies = np.where(H != G, whole * H * (kind.qk + kind.v) * e, 0.0)
    gathered = (whole - N) * kv + copies + mask + N * H * kind.v * e
    ring = 0.0 * N + N * kv
    traded = 0.0 * N + N * H * kind.v * e
    return np.where(m.cp > 1, np.select([m.context == 0, m.context == 1], [gathered, ring], traded), 0.0)


def _experts_kept(kind: LayerShape, m: Mappings, run: Run) -> tuple[Numbers, Numbers, Numbers]:
    """(what router, dispatch and combine keep; the experts' input, if their inside is not kept; that inside)."""
    assert kind.experts is not None
    x, e, T = kind.experts, float(run.narrow), m.tokens(run.seq_len)
    R = _rows(kind, m, run)
    sent = T * x.top_k * min(1.0, x.capacity or 1.0)
    wide_copy = 4 * (T * x.dim + x.dim * x.count) if run.narrow < 4 else 0.0
    outer = wide_copy + 4 * T * x.count + T * (12 * x.top_k + 4)
    fused_weights = np.isin(m.dispatch, WEIGHING)
    outer = outer + np.where(fused_weights, 0.0, sent * (x.dim * e + 4))
    given = _held(kind, m, run) * x.dim * e + R * 8 + np.where(fused_weights, 4 * R, 0.0)
    eight = _in_fp8(m, run)  # the input in a byte a number, with scales; weights as they are
    alone = run.rounds & (m.edp == 1) & (m.offload != 2) & (run.narrow < run.wide) & ~eight
    rounded = np.where(alone, x.numel / (m.ep * m.etp) * e, 0.0)
    if run.lean:
        less = np.where(eight, _held(kind, m, run) * (x.dim * (e - 1) - 4 * -(-x.dim // TILE)), 0.0)
        # What is kept to be computed again is wide, and stays while it is.
        again = np.where(m.recompute == SELECTIVE, np.where(eight, given - less, 0.0), given - less)
        return outer, given, again + R * x.inner / m.etp * x.parts * e + rounded
    inside = R * (x.dim + x.inner / m.etp * x.kept) * e + 8 * R * (1 + x.bias)
    inside = inside + np.where(fused_weights, R * (x.dim * e + 4), 0.0)
    return outer, given, inside + rounded


def _in_fp8(m: Mappings, run: Run) -> Numbers:
    """Where moetrain's kernels make the experts' products in FP8."""
    eight: Numbers = (m.precision == PRECISION.index("fp8")) & run.lean & run.rounds & (run.shards == "all")
    return eight


def ends_bytes(shape: ModelShape, m: Mappings, run: Run) -> tuple[Numbers, Numbers]:
    """Kept bytes of one micro-batch at (the embedding, the final norm with head and loss)."""
    T, e = m.tokens(run.seq_len), float(run.narrow)
    first = 8 * T * m.tp
    head = shape.vocab / m.tp * shape.dim * 4.0
    last = T * shape.dim * e + 4 * T + T * m.tp * shape.dim * e + head
    return first + 0.0, last


def head_bytes(shape: ModelShape, m: Mappings, run: Run) -> Numbers:
    """Bytes at the worst moment of the head and the loss beside what they keep: the logits of a chunk of tokens, with
    the product that is added to the weights' gradient, or, where tp splits them, with their softmax."""
    columns, tokens = shape.vocab / m.tp, m.tokens(run.seq_len) * m.tp
    rows = np.maximum(CHUNK_TOKENS, run.chunk // columns)
    logits = np.minimum(rows, tokens) * columns * run.narrow
    product = columns * shape.dim * run.narrow * (run.narrow < 4)
    # With logits that are no float32 blocks of them are: where they are read, less the largest, and the gradient.
    block = 4.0 * (3 if run.narrow < 4 else 1) * run.block
    first = np.minimum(block, 12.0 * np.minimum(rows, tokens) * columns) - columns * shape.dim * 4.0  # no gradient yet
    later = np.minimum(block, 12.0 * np.clip(tokens - rows, 0, rows) * columns)
    softmax = np.where(m.tp > 1, np.maximum(first, later), 0.0)
    return logits + np.maximum(product, softmax) + tokens * shape.dim * run.narrow
