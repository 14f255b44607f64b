"""The models of published pretraining runs, as the planner's shapes; the name in a table's row finds them."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

from moetrain.config import load
from moetrain.planner.shape import ExpertShape, LayerShape, Matrix, ModelShape, shape_of


def preset(name: str) -> ModelShape:
    """Of a model that ships with moetrain."""
    return shape_of(load([f"model={name}"], kinds=False).model)


def layer(D: int, heads: int, kv: int, d: int, inner: int = 0, experts: ExpertShape | None = None) -> LayerShape:
    """Grouped-query attention with a gated MLP (or shared experts), and experts."""
    attention = (Matrix(heads * d, D, 0), Matrix(kv * d, D, 0), Matrix(kv * d, D, 0), Matrix(D, heads * d, 1))
    mlp = (Matrix(inner, D, 0), Matrix(inner, D, 0), Matrix(D, inner, 1)) if inner else ()
    router = (Matrix(experts.count, D),) if experts else ()
    return LayerShape(
        attention, mlp, router, (Matrix(D, 0),) * 2, heads, kv, d, d, experts=experts, mlp_inner=inner
    )  # fmt: skip


def even(name: str, D: int, vocab: int, layers: int, kind: LayerShape) -> ModelShape:
    """A model whose layers are all alike."""
    return ModelShape(name, D, vocab, (kind,), (0,) * layers)


def nemotron(
    name: str, D: int, layers: tuple[int, int, int], heads: int, experts: ExpertShape, shared: int
) -> ModelShape:
    """A hybrid of Mamba-2, MoE and attention layers (arXiv 2512.20848): so many of each. heads: of Mamba."""
    inner, groups, state = heads * 64, 8, 128
    mamba = LayerShape(
        attention=(Matrix(2 * inner + 2 * groups * state + heads, D, 0), Matrix(D, inner, 1)),
        norms=(Matrix(D, 0),), scan=6.0 * inner * state, scan_width=2 * inner + 2 * groups * state,
    )  # fmt: skip
    latent = (Matrix(experts.dim, D), Matrix(D, experts.dim)) if experts.dim != D else ()
    moe = LayerShape(
        mlp=(Matrix(shared, D, 0), Matrix(D, shared, 1)), router=(Matrix(experts.count, D), *latent),
        norms=(Matrix(D, 0),), experts=experts, mlp_inner=shared, mlp_parts=1,
    )  # fmt: skip
    attention = replace(layer(D, 32, 2, 128), norms=(Matrix(D, 0),))
    kinds = (mamba, moe, attention)
    return ModelShape(name, D, 131072, kinds, tuple(k for k, n in enumerate(layers) for _ in range(n)))


def moe(count: int, top_k: int, inner: int, D: int, parts: int = 2, capacity: float | None = None) -> ExpertShape:
    """Routed experts."""
    return ExpertShape(count, top_k, inner, D, parts, capacity=capacity)


def kimi() -> ModelShape:
    """Kimi K2 (arXiv 2507.20534): DeepSeek-V3 with 384 experts, 64 heads and one dense layer."""
    words = ["model=deepseek-v3", "model.moe.num_experts=384", "model.attention.n_heads=64", "model.moe.first_dense=1",
             "model.vocab_size=163840", "model.router.n_groups=1", "model.router.topk_groups=1"]  # fmt: skip
    return shape_of(load(words, kinds=False).model)


def qwen3_next() -> ModelShape:
    """Qwen3-Next 80B-A3B (its config.json): three layers with gated DeltaNet to one with gated attention; without its
    prediction layer. scan: the state of a head read, corrected and written for each token."""
    D, experts = 2048, moe(512, 10, 512, 2048)
    plain = layer(D, 16, 2, 256, 512, experts)
    gated = replace(plain, attention=(Matrix(2 * 16 * 256, D, 0), *plain.attention[1:]))
    delta = replace(
        plain, attention=(Matrix(2 * 2048 + 2 * 4096 + 64, D, 0), Matrix(D, 4096, 1)), heads=0, kv_heads=0, qk=0, v=0,
        scan=6.0 * 32 * 128 * 128,
    )  # fmt: skip
    return ModelShape("qwen3-next", D, 151936, (delta, gated), (0, 0, 0, 1) * 12)


def deepseek_v4_flash() -> ModelShape:
    """DeepSeek-V4-Flash (transformers' deepseek_v4, whose defaults are its): one key for all heads, of the last 128
    tokens and of stretches of 128 (or of 4, of which an indexer picks 512), hyper-connections of 4 streams, and one
    prediction layer.

    window: one in which a token sees as many keys, at 4096 tokens. scan: the indexer's scores; scan_width: the streams.
    """
    D, heads, d, S = 4096, 64, 512, 4096
    plain = layer(D, heads, 1, d, 2048, moe(256, 6, 2048, D))
    streams = (Matrix(24, 4 * D),) * 2
    own = (
        Matrix(1024, D),
        Matrix(heads * d, 1024, 0),
        Matrix(d, D),
        Matrix(8 * 1024, heads * d // 8),
        Matrix(D, 8 * 1024),
    )

    def kind(stretch: int, most: int, width: int, indexer: tuple[Matrix, ...], scores: float) -> LayerShape:
        stretches = S / stretch / 2 if most * stretch >= S else most - most**2 * stretch / (2 * S)
        seen = 128 - 128**2 / (2 * S) + stretches
        window = S * (1 - (1 - 2 * seen / S) ** 0.5)
        compressor = (Matrix(width, D), Matrix(width, D))
        return replace(
            plain,
            attention=(*own, *compressor, *indexer, *streams),
            window=round(window),
            scan=scores,
            scan_width=4 * D,
        )

    heavy = kind(128, S, d, (), 0.0)
    indexer = (Matrix(256, D), Matrix(256, D), Matrix(64 * 128, 1024), Matrix(64, D))
    sparse = kind(4, 512, 2 * d, indexer, 2.0 * 64 * 128 * S / 4 / 2)
    order = (0, 0, *(0, 1) * 20, 0)
    return ModelShape("deepseek-v4-flash", D, 129280, (heavy, sparse), order, mtp=1, extra=(Matrix(D, 2 * D),))


def internal_352b() -> ModelShape:
    """The model of MegaScale-MoE's table 3 (arXiv 2505.11432), of which layers, width, inner width, experts and top-k
    are told. A shared expert as wide as the others and grouped keys are inferred: with them there are 352B parameters,
    without them 343B; and a token takes the 282 GFLOP that its MFU and tokens per second imply (284, else 221 to 230).
    """
    return even("352b", 4096, 131072, 60, layer(4096, 32, 8, 128, 14336, moe(32, 3, 14336, 4096)))


def moonlight() -> ModelShape:
    """Moonlight 16B-A3B (arXiv 2502.16982): a DeepSeek-V3 of 27 layers without a latent for queries."""
    words = ["model=deepseek-v3", "model.n_layers=27", "model.dim=2048", "model.attention.n_heads=16",
             "model.attention.q_lora_rank=null", "model.moe.num_experts=64", "model.moe.top_k=6",
             "model.moe.expert_dim=1408",
             "model.moe.shared_dim=2816", "model.dense_dim=11264", "model.moe.first_dense=1", "model.vocab_size=163840",
             "model.router.n_groups=1", "model.router.topk_groups=1"]  # fmt: skip
    return shape_of(load(words, kinds=False).model)


# Those that ship with moetrain.
PRESETS = {
    "deepseek v3": "deepseek-v3",
    "qwen3 235b": "qwen3-235b-a22b",
    "qwen3 30b a3b": "qwen3-30b-a3b",
    "gpt oss 120b": "gpt-oss-120b",
    "mixtral 8x22b": "mixtral-8x22b",
    "qwen2 57b a14b": "qwen2-57b-a14b",
}
MODELS: dict[str, Any] = {
    **{name: functools.partial(preset, of) for name, of in PRESETS.items()},
    "kimi k2": kimi,
    "deepseek v4 flash": deepseek_v4_flash,
    "qwen3 next 80b a3b": qwen3_next,
    "moonlight 16b a3b": moonlight,
    "mixtral 8x22b g8t8": lambda: even("g8t8", 6144, 32768, 56, layer(6144, 48, 8, 128, 0, moe(64, 8, 2048, 6144))),
    "llama3 8x70b": lambda: even("8x70b", 8192, 128256, 80, layer(8192, 64, 8, 128, 0, moe(8, 2, 28672, 8192))),
    "internal 352b": internal_352b,
    "llama3 70b dense": lambda: even("llama3-70b", 8192, 128256, 80, layer(8192, 64, 8, 128, 28672)),
    "llama3 405b dense": lambda: even("llama3-405b", 16384, 128256, 126, layer(16384, 128, 8, 128, 53248)),
    "nemotron 3 nano": lambda: nemotron("nano", 2688, (23, 23, 6), 64, moe(128, 6, 1856, 2688, 1), 3712),
    "nemotron 3 super": lambda: replace(
        nemotron("super", 4096, (40, 40, 8), 128, moe(512, 22, 2688, 1024, 1), 5376),
        layers=(0,) * 40 + (2,) * 8 + (1,) * 40, mtp=2
    ),
}  # fmt: skip


@functools.cache
def model(name: str) -> ModelShape:
    """An entry of MODELS."""
    made: ModelShape = MODELS[name]()
    return made


def shape_named(text: str) -> tuple[str, ModelShape] | None:
    """The model that ``text`` names."""
    plain = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip().replace("deepseekv", "deepseek v")
    for name in sorted(MODELS, key=len, reverse=True):
        if plain.startswith(name):
            return name, model(name)
    return None
