"""A model as the planner sees it: the matrices of each kind of layer, and how ranks may split them. No torch.

Matrices are (out, in). split: the dimension that tensor parallelism splits, 0 or 1; None: every tp rank has a copy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

from moetrain.config.schema import PLAIN, ModelConfig

# Widths of the inner activations that autograd keeps of an expert, in units of its inner width, where torch's own
# operators compute them: what its input matrices give, each factor, and the product.
KEPT = {"gpt_oss": 7, "swiglu_clamped": 7, "relu2": 3, "gelu": 2}


@dataclass(frozen=True)
class Matrix:
    """A parameter: a matrix, or with ``inputs`` 0 a vector."""

    outputs: int
    inputs: int
    split: int | None = None

    @property
    def numel(self) -> int:
        """Its numbers."""
        return self.outputs * max(1, self.inputs)


@dataclass(frozen=True)
class ExpertShape:
    """Routed experts of a layer. dim: width of the rows that travel (the model's, or a latent's). parts: input matrices
    of an expert, 2 for gated activations. bias: whether they have biases. kept: see KEPT."""

    count: int
    top_k: int
    inner: int
    dim: int
    parts: int = 2
    bias: bool = False
    capacity: float | None = None
    kept: int = 4

    @property
    def numel(self) -> int:
        """Numbers of all experts together."""
        bias = self.parts * self.inner + self.dim if self.bias else 0
        return self.count * ((self.parts + 1) * self.inner * self.dim + bias)


@dataclass(frozen=True)
class LayerShape:
    """One kind of layer. attention, mlp: matrices and vectors, mlp being the dense MLP or the shared experts (with the
    router in ``router``). qk, v: widths of a head's query and value; heads 0: no attention.

    scan: FLOPs per token, forward, of a mixer that is no product (Mamba-2's scan), on ``scan_width`` numbers.
    norm_heads: RMSNorm over each
    head of queries and keys. mla: whether latents are kept as well.
    """

    attention: tuple[Matrix, ...] = ()
    mlp: tuple[Matrix, ...] = ()
    router: tuple[Matrix, ...] = ()
    norms: tuple[Matrix, ...] = ()
    heads: int = 0
    kv_heads: int = 0
    qk: int = 0
    v: int = 0
    window: int | None = None
    experts: ExpertShape | None = None
    mlp_inner: int = 0
    mlp_parts: int = 2
    norm_heads: bool = False
    sinks: bool = False
    shared_gate: bool = False
    ranks: tuple[int, int] = (0, 0)  # MLA: of the query's and the key/value's latent (with the rotated key part)
    rope: int = 0  # MLA: width of the rotated key part
    scan: float = 0.0
    scan_width: int = 0

    @property
    def dense(self) -> tuple[Matrix, ...]:
        """All parameters but the routed experts'."""
        return (*self.attention, *self.mlp, *self.router, *self.norms)


@dataclass(frozen=True)
class ModelShape:
    """kinds: the distinct layers. layers: the kind of each layer, in order. tail: kind and head computations beside the
    model's own, of multi-token prediction (one more layer of the last kind, and one more head)."""

    name: str
    dim: int
    vocab: int
    kinds: tuple[LayerShape, ...]
    layers: tuple[int, ...]
    tied: bool = False
    mtp: int = 0
    extra: tuple[Matrix, ...] = field(default=())  # matrices of the prediction layers that no other layer has

    def count(self) -> int:
        """Numbers of parameters, without multi-token prediction."""
        layers = sum(layer_numel(self.kinds[k]) for k in self.layers)
        return layers + self.vocab * self.dim * (1 if self.tied else 2) + self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of a token of one training step: 3 x forward, causal attention counted as half of the square."""
        kinds = [self.kinds[k] for k in self.layers] + [self.kinds[self.layers[-1]]] * self.mtp
        layers = sum(layer_flops(kind, seq_len) for kind in kinds)
        heads = 2.0 * self.vocab * self.dim * (1 + self.mtp)
        return 3.0 * (layers + heads + self.mtp * sum(2.0 * m.numel for m in self.extra))


def layer_numel(kind: LayerShape) -> int:
    """Parameters of a layer."""
    return sum(m.numel for m in kind.dense) + (kind.experts.numel if kind.experts else 0)


def layer_flops(kind: LayerShape, seq_len: int) -> float:
    """Forward FLOPs per token: 2 for each number of a matrix that it meets, attention's scores, a scan."""
    products = 2.0 * sum(m.numel for m in (*kind.attention, *kind.mlp, *kind.router) if m.inputs)
    if kind.experts:
        e = kind.experts
        products += 2.0 * e.top_k * (e.parts + 1) * e.inner * e.dim
    return products + 2.0 * kind.heads * (kind.qk + kind.v) * mean_seen(seq_len, kind.window) + kind.scan


def mean_seen(seq_len: int, window: int | None) -> float:
    """Mean number of positions that a token attends to, itself included (``model.count.mean_seen``)."""
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


@functools.lru_cache(maxsize=64)
def _cached(kinds: tuple[LayerShape, ...]) -> tuple[tuple[LayerShape, ...], tuple[int, ...]]:
    distinct = tuple(dict.fromkeys(kinds))
    place = {kind: i for i, kind in enumerate(distinct)}
    return distinct, tuple(place[kind] for kind in kinds)


def shape_of(cfg: ModelConfig) -> ModelShape:
    """The shape of a model that moetrain trains; it has as many parameters as the built one (tested)."""
    kinds, layers = _cached(tuple(_layer(cfg, i) for i in range(cfg.n_layers)))
    return ModelShape(cfg.name, cfg.dim, cfg.vocab_size, kinds, layers, cfg.tie_embeddings)


def with_mtp(shape: ModelShape, layers: int = 1) -> ModelShape:
    """``shape`` with ``layers`` of multi-token prediction (arXiv 2412.19437, 2.2), which moetrain lacks."""
    return replace(shape, mtp=layers, extra=(Matrix(shape.dim, 2 * shape.dim),))


def _layer(cfg: ModelConfig, i: int) -> LayerShape:
    a, D = cfg.attention, cfg.dim
    windowed = a.sliding_window is not None and (a.sliding_layers is None or i in a.sliding_layers)
    norms = [Matrix(D, 0)] * 2
    moe = cfg.is_moe(i)
    router: list[Matrix] = []
    experts, inner, activation = None, cfg.dense_dim, cfg.activation
    if moe:
        count, inner = cfg.layer_value("num_experts", i), cfg.layer_value("shared_dim", i)
        router.append(Matrix(count, D))
        options = cfg.router if isinstance(cfg.router, dict) else vars(cfg.router)
        if options.get("logits_bias"):
            router.append(Matrix(count, 0))
        parts = 1 if cfg.moe.activation in PLAIN else 2
        experts = ExpertShape(
            count, cfg.layer_value("top_k", i), cfg.layer_value("expert_dim", i), D, parts, cfg.moe.bias,
            cfg.layer_value("capacity_factor", i), KEPT.get(cfg.moe.activation, 4),
        )  # fmt: skip
    parts = 1 if activation in PLAIN else 2
    mlp = [Matrix(inner, D, 0)] * parts + [Matrix(D, inner, 1)] if inner else []
    if moe and cfg.moe.shared_gate and inner:
        router.append(Matrix(1, D))
    make = _mla if a.kind == "mla" else _gqa
    attention, more, widths, ranks = make(cfg)
    return LayerShape(
        attention=tuple(attention), mlp=tuple(mlp), router=tuple(router), norms=(*norms, *more),
        heads=a.n_heads, kv_heads=a.n_kv_heads if a.kind == "gqa" else a.n_heads, qk=widths[0], v=widths[1],
        window=a.sliding_window if windowed else None, experts=experts, mlp_inner=inner, mlp_parts=parts,
        norm_heads=a.kind == "gqa" and a.qk_norm != "none", ranks=ranks, sinks=a.sinks,
        shared_gate=moe and cfg.moe.shared_gate and inner > 0,
        rope=a.qk_rope_head_dim if a.kind == "mla" else 0,
    )  # fmt: skip


def _gqa(cfg: ModelConfig) -> tuple[list[Matrix], list[Matrix], tuple[int, int], tuple[int, int]]:
    a, D = cfg.attention, cfg.dim
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    found = [Matrix(q, D, 0), Matrix(kv, D, 0), Matrix(kv, D, 0), Matrix(D, q, 1)]
    more = [Matrix(n, 0, 0) for n in (q, kv, kv)] if a.qkv_bias else []
    more += [Matrix(D, 0)] if a.out_bias else []
    more += [Matrix(a.n_heads, 0, 0)] if a.sinks else []
    more += [Matrix(a.head_dim, 0)] * 2 if a.qk_norm == "head" else []
    more += [Matrix(q, 0, 0), Matrix(kv, 0, 0)] if a.qk_norm == "full" else []
    found += [Matrix(a.num_experts, D)] if a.num_experts > 1 else []
    return found, more, (a.head_dim, a.head_dim), (0, 0)


def _mla(cfg: ModelConfig) -> tuple[list[Matrix], list[Matrix], tuple[int, int], tuple[int, int]]:
    a, D, H = cfg.attention, cfg.dim, cfg.attention.n_heads
    qk, r, more = a.qk_nope_head_dim + a.qk_rope_head_dim, a.q_lora_rank, [Matrix(a.kv_lora_rank, 0)]
    found = [Matrix(H * qk, D, 0)] if r is None else [Matrix(r, D), Matrix(H * qk, r, 0)]
    more += [] if r is None else [Matrix(r, 0)]
    found += [
        Matrix(a.kv_lora_rank + a.qk_rope_head_dim, D),
        Matrix(H * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, 0),
        Matrix(D, H * a.v_head_dim, 1),
    ]
    return found, more, (qk, a.v_head_dim), (r or 0, a.kv_lora_rank + a.qk_rope_head_dim)
