"""BAM (arXiv 2408.08274): Branch-Train-MiX in which attention becomes experts as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.checkpoint.weights import Box
from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.config.schema import ModelConfig
from moetrain.convert.open import specs_of
from moetrain.upcycle.method import (
    Context,
    Made,
    Model,
    Upcycled,
    assemble,
    averaged,
    check_dense,
    check_same,
    dense_layer,
    several_parents,
    with_experts,
)
from moetrain.upcycle.routers import RouterStart, new_router

KEYS_AND_VALUES = ("wk.weight", "wk.bias", "wv.weight", "wv.bias")


@dataclass(config=STRICT)
class BamOptions(RouterStart):
    """BAM: experts of each dense parent's MLPs and attention, everything else averaged."""

    top_k: Positive = Field(default=2, description="MLP experts per token; attention experts all work on every token")
    shared_kv: bool = Field(
        default=False, description="attention experts share keys and values, the means of the parents'"
    )


@UPCYCLERS.register("bam", BamOptions)
def bam(options: BamOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """N dense models that were trained on from one -> expert e has the MLPs and the attention of parent e; all other
    tensors are means, norms of queries and keys and the bias of attention's output among them.

    top_k: the paper's 1 would, with weights that sum to 1 as they do here, teach the router nothing by the loss.
    """
    several_parents(parents, "bam")
    for parent in parents:
        check_dense(parent, "bam")
    check_same(parents)
    N, first = len(parents), parents[0].cfg
    _check_attention(parents[0])
    a, shared = first.attention, options.shared_kv
    kv_heads = a.n_kv_heads if shared else N * a.n_kv_heads
    attention = replace(a, n_heads=N * a.n_heads, n_kv_heads=kv_heads, num_experts=N, shared_kv=shared)
    cfg = replace(with_experts(first, N, options.top_k, first.dense_dim), attention=attention)

    def router(layer: int, part: str = "moe") -> Tensor:
        return new_router(options, N, parents[0], layer, context, part)

    model = assemble(
        _with_attention_experts(parents, cfg, lambda layer: router(layer, "attention")),
        cfg,
        router=router,
        expert=lambda layer, e, part: dense_layer(parents[e], layer, part),
    )
    return Upcycled(
        model, False, "each parent's MLPs and attention as experts, and the mean of all else: no parent's function"
    )


def _check_attention(parent: Model) -> None:
    a = parent.cfg.attention
    is_no_expert = {"kind": a.kind == "mla", "qk_norm": a.qk_norm == "full", "num_experts": a.num_experts > 1}
    for name in (name for name, so in is_no_expert.items() if so):
        raise ConfigError(
            f"method=bam cannot make an attention expert of model.attention.{name}={getattr(a, name)}, which "
            f"{parent.where} has; method=btx averages attention"
        )


def _with_attention_experts(parents: Sequence[Model], cfg: ModelConfig, router: Callable[[int], Tensor]) -> Model:
    """The mean of ``parents`` with their heads side by side, as ``cfg`` has them. router: layer -> (N, D)."""
    mean, a, shapes = averaged(parents).source, cfg.attention, specs_of(cfg, {})
    specs = dict(mean.specs)
    makers: dict[str, Callable[[Box], Tensor]] = {name: partial(mean.read, name) for name in specs}
    groups = a.n_kv_heads if a.shared_kv else 1
    for layer in range(cfg.n_layers):
        here = f"layers.{layer}.attention."
        for part in ("wq.weight", "wq.bias", "wo.weight", "sinks", *(() if a.shared_kv else KEYS_AND_VALUES)):
            if here + part in specs:
                makers[here + part] = partial(_side_by_side, parents, here + part, int(part == "wo.weight"), groups)
                specs[here + part] = replace(specs[here + part], shape=shapes[here + part].shape)
        name = here + "router.weight"
        makers[name] = partial(_part, router, layer)
        specs[name] = replace(shapes[name], dtype=specs[here + "wq.weight"].dtype)
    return Model(cfg, Made(specs, makers), "the mean of the parents")


def _part(router: Callable[[int], Tensor], layer: int, box: Box) -> Tensor:
    return router(layer)[box]


def _side_by_side(parents: Sequence[Model], name: str, dim: int, groups: int, box: Box) -> Tensor:
    """Part ``box`` of the parents' tensors, joined along ``dim``: cut in ``groups`` each, the parents' first groups,
    then their second ones. Only what lies in the part is read."""
    spec = parents[0].source.specs[name]
    length = spec.shape[dim] // groups
    pieces = []
    for i in range(box[dim].start // length, -(-box[dim].stop // length)):
        group, parent = divmod(i, len(parents))
        start, stop = max(box[dim].start, i * length), min(box[dim].stop, (i + 1) * length)
        shift = group * length - i * length
        own = (*box[:dim], slice(start + shift, stop + shift), *box[dim + 1 :])
        pieces.append(parents[parent].source.read(name, own).to(spec.dtype))
    return torch.cat(pieces, dim)
