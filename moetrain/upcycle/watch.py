"""Parents at work on the calibration text: what their layers do there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.model.decoder import Decoder
from moetrain.moe.mlp import MLP
from moetrain.moe.routing import Rows
from moetrain.upcycle.measure import BATCH, build
from moetrain.upcycle.method import Context, Model

# Numbers that stand for what an inner dimension does over all tokens
WIDTH = 256
# Tokens of each batch on which all experts are compared
COMPARED = 128


@dataclass
class Usage:
    """A MoE layer at work. counts_E: how often each expert was chosen, float64. alike_EE: cosine of what ``usage``
    was told to compare, from -1 to 1."""

    counts_E: Tensor
    alike_EE: Tensor


@torch.no_grad()
def activity(parent: Model, context: Context) -> dict[int, Tensor]:
    """Dense layer -> how strongly each inner dimension responds to which tokens, (F, WIDTH) float32.

    A row stands for |activation| over all tokens of the text, through a random projection that keeps angles and
    lengths (Johnson and Lindenstrauss), so that memory does not depend on the text.
    """
    decoder = build(parent)
    generator = context.generator("projection")
    signs = torch.empty(0)
    found: dict[int, Tensor] = {}

    def watch(layer: int, h_NF: Tensor) -> None:
        found[layer] = found.get(layer, 0) + h_NF.abs().T @ signs

    _watch_activations(decoder, watch)
    for part in context.ids().split(BATCH):
        signs = torch.randint(0, 2, (part.numel(), WIDTH), generator=generator) * 2.0 - 1
        _run(decoder, part)
    return found


@torch.no_grad()
def mean_activity(parent: Model, context: Context) -> dict[int, Tensor]:
    """Dense layer -> mean |activation| of each inner dimension on each text, (texts, F) float32."""
    decoder = build(parent)
    texts = context.texts()
    sums: list[dict[int, Tensor]] = []  # of each text

    def watch(layer: int, h_NF: Tensor) -> None:
        sums[-1][layer] = sums[-1].get(layer, 0) + h_NF.abs().sum(0)

    _watch_activations(decoder, watch)
    for ids in texts:
        sums.append({})
        for part in ids.split(BATCH):
            _run(decoder, part)
    pairs = list(zip(sums, texts, strict=True))
    return {layer: torch.stack([of[layer] / ids.numel() for of, ids in pairs]) for layer in sums[0]}


@torch.no_grad()
def layer_inputs(parent: Model, context: Context) -> Iterator[tuple[int, MLP, Tensor]]:
    """The layers of a dense ``parent`` in order, each with its MLP and what goes into it over all tokens of the text,
    (N, D) float32."""
    decoder = build(parent)
    x_BSD = [decoder.embedded(part) for part in context.ids().split(BATCH)]
    places = decoder.places(x_BSD[0], x_BSD[0].shape[1])
    for name, block in _blocks(decoder):
        seen: list[Tensor] = []
        hook = block.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        x_BSD = [block(x, decoder.first_carry(x), places, 0)[0] for x in x_BSD]
        hook.remove()
        yield name, block.mlp, torch.cat(seen)


@torch.no_grad()
def usage(parent: Model, context: Context, compare: Literal["nothing", "logits", "outputs"]) -> dict[int, Usage]:
    """MoE layer -> how it is used, with its experts compared by their router logits over all tokens (MC-SMoE) or by
    their outputs on some of them, each expert given each token (Sub-MoE)."""
    decoder = build(parent)
    found: dict[int, Usage] = {}
    batches = 0

    def watch(layer: int, moe: Any, x_TD: Tensor, expert_A: Tensor) -> None:
        E = moe.router.n_experts
        mine = found.setdefault(layer, Usage(torch.zeros(E, dtype=torch.float64), torch.zeros(E, E)))
        mine.counts_E += torch.bincount(expert_A, minlength=E)
        if compare == "logits":
            logits_TE = F.linear(x_TD.float(), moe.router.weight.float(), getattr(moe.router, "bias", None))
            mine.alike_EE += logits_TE.T @ logits_TE
        elif compare == "outputs":
            x = x_TD[:COMPARED]
            index_R = torch.arange(len(x)).repeat(E)
            outputs = F.normalize(moe.experts(Rows(x, [len(x)] * E, index_R)).view(E, len(x), -1), dim=-1)
            mine.alike_EE += torch.einsum("etd,ftd->ef", outputs, outputs) / len(x)

    for name, block in _blocks(decoder):
        if block.moe is not None:
            block.moe.router.register_forward_hook(_routing_hook(partial(watch, name, block.moe)))
    for part in context.ids().split(BATCH):
        _run(decoder, part)
        batches += 1
    for mine in found.values():
        if compare == "logits":
            length_E = mine.alike_EE.diagonal().sqrt().clamp_min(1e-12)
            mine.alike_EE = mine.alike_EE / (length_E[:, None] * length_E)
        else:
            mine.alike_EE = mine.alike_EE / batches
    return found


def _blocks(decoder: Decoder) -> list[tuple[int, Any]]:
    return [(int(name), block) for name, block in decoder.layers.items()]


def _watch_activations(decoder: Decoder, watch: Callable[[int, Tensor], None]) -> None:
    """Have ``watch`` called with the number of a dense layer and what goes into its down projection, (N, F)."""
    for name, block in _blocks(decoder):
        if block.mlp is not None:
            see = partial(watch, name)
            block.mlp.w_down.register_forward_pre_hook(lambda _, args, see=see: see(args[0].flatten(0, -2)))


def _run(decoder: Decoder, ids_BS: Tensor) -> None:
    decoder(ids_BS, torch.full_like(ids_BS, -100))  # no position has a loss, so no logits are made


def _routing_hook(watch: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
    def hook(router: Any, args: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        watch(args[0], output[0].assignments()[1])

    return hook
