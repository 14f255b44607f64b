"""Context parallel: the tokens of a sequence are split over the ranks of a group, and attention crosses them.

A sequence of N tokens is cut in 2*cp chunks of C tokens, and rank r of cp holds chunks r and 2*cp-1-r, its head and its
tail (as in Llama 3, arXiv 2407.21783, section 3.3.2): under a causal mask every rank then has the same work. Three ways
for attention to cross ranks, each a ``Core`` of the attention modules:

all_gather: every rank receives the keys and values that its queries see, and attends to them at once.
ring: it receives them one rank at a time, while it computes with those of the rank before (``parallel.ring``).
all_to_all: ranks trade heads for tokens, so that each sees whole sequences of a part of the heads (Ulysses, arXiv
    2309.14509).

The first two move only the chunks that a causal mask and a window leave visible, which is the least that they can.
Shapes: as in ``model.attention.kernels``; S = 2C is what this rank holds, N the whole sequence.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal

import torch
import torch.distributed as dist
from moe_kernels.uncompiled import uncompiled
from torch import Tensor

from moetrain.comm import all_to_all
from moetrain.config.errors import ConfigError
from moetrain.model.attention.gqa import GroupedQueryAttention
from moetrain.model.attention.kernels import Rule, attend, attend_masked
from moetrain.model.attention.mla import MultiHeadLatentAttention
from moetrain.model.decoder import Decoder
from moetrain.model.places import Places
from moetrain.parallel.chunks import Chunks, chunk_mask
from moetrain.parallel.ring import RingCore

Method = Literal["all_gather", "ring", "all_to_all"]


def split(model: Decoder, group: dist.ProcessGroup, method: Method) -> None:
    """Make ``model`` compute this rank's part of sequences that are split over ``group``, in place.

    Its forward then takes the tokens (and targets) that ``cut`` gives, with ``seq_len`` N and the documents of the
    whole sequences; the ranks' losses add up to that of the sequences. Before ``Block.compile_dense``. A group of one
    rank changes nothing.
    """
    if group.size() == 1:
        return
    core = CORES[method](group)
    for module in model.modules():
        if isinstance(module, (GroupedQueryAttention, MultiHeadLatentAttention)):
            module.core = core
    model.index_of = _IndexOf(group.size(), group.rank())


class _IndexOf:
    """``head_tail_index`` of a rank, the same tensor each time as long as the length stays."""

    def __init__(self, cp: int, rank: int) -> None:
        self.cp, self.rank = cp, rank
        self._kept: tuple[int, Tensor] | None = None

    def __call__(self, seq_len: int) -> Tensor:
        if self._kept is None or self._kept[0] != seq_len:
            self._kept = (seq_len, head_tail_index(seq_len, self.cp, self.rank))
        return self._kept[1]


def head_tail_index(seq_len: int, cp: int, rank: int) -> Tensor:
    """Where the tokens that ``rank`` of ``cp`` holds stand in a sequence of ``seq_len`` (N): int64 (N / cp,), on the
    CPU. Raises ConfigError when N does not divide into 2*cp chunks."""
    if seq_len % (2 * cp):
        nearest = max(1, round(seq_len / (2 * cp))) * 2 * cp
        raise ConfigError(
            f"sequences of {seq_len} tokens do not divide into 2 x parallel.cp={cp} chunks; nearest length: {nearest}"
        )
    index_cC = torch.arange(seq_len).view(2 * cp, -1)
    return torch.cat((index_cC[rank], index_cC[2 * cp - 1 - rank]))


def cut(batch_BN: Tensor, index_S: Tensor) -> Tensor:
    """The columns of ``batch_BN`` that this rank holds: (B, S). Two stretches of numbers that are known on the CPU: an
    index on its way to a GPU would wait for all that the GPU has to do."""
    stretches = [(int(part_C[0]), len(part_C)) for part_C in index_S.chunk(2)]
    return torch.cat([batch_BN.narrow(1, start, length) for start, length in stretches], dim=1)


class AllGatherCore:
    """Attention to keys and values that are gathered first. Holds all that its queries see: N keys without a window."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @uncompiled
    def __call__(self, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, rule: Rule) -> Tensor:
        """See ``kernels.attend``."""
        chunks = Chunks(self.group.size(), places.seq_len, places.effective(rule.window))
        rank, C = self.group.rank(), chunks.length
        kv_BSGw = torch.cat((k_BSGd, v_BSGv), dim=-1)
        kv_cX = kv_BSGw.unflatten(1, (2, C)).transpose(0, 1).flatten(1)
        seen_cX = _Gather.apply(kv_cX, chunks, self.group)
        held = chunks.needed(rank)
        seen_BKGw = seen_cX.view(len(held), len(kv_BSGw), C, *kv_BSGw.shape[2:]).transpose(0, 1).flatten(1, 2)
        k_BKGd, v_BKGv = seen_BKGw.split((k_BSGd.shape[-1], v_BSGv.shape[-1]), dim=-1)
        parts = []
        for q_BCHd, own in zip(q_BSHd.split(C, dim=1), chunks.held(rank), strict=True):
            # the chunks that one chunk sees are consecutive, so this is a slice
            first, last = chunks.seen_by(own)[0], own
            rows = slice(held.index(first) * C, (held.index(last) + 1) * C)
            key = ("gathered", own, chunks.window)
            if key not in places.kept:
                places.kept[key] = chunk_mask(places, C, chunks.window, own, range(first, last + 1))
            mask = places.kept[key]
            k, v = k_BKGd[:, rows], v_BKGv[:, rows]
            parts.append(attend_masked(q_BCHd, k, v, mask, rule))
        return torch.cat(parts, dim=1)


class _Gather(torch.autograd.Function):
    """Chunks (2, X) of this rank -> (c, X), the chunks that it needs of all ranks, in order. Backward sends the
    gradients back and sums them in rank order, in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, own_cX: Tensor, chunks: Chunks, group: dist.ProcessGroup) -> Tensor:
        sends = [chunks.slots(group.rank(), to) for to in range(chunks.cp)]
        receives = [chunks.slots(source, group.rank()) for source in range(chunks.cp)]
        sent = torch.stack([own_cX[slot] for slots in sends for slot in slots])
        got = all_to_all(sent, [len(s) for s in receives], [len(s) for s in sends], group)
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        arrived = [chunks.held(source)[slot] for source, slots in enumerate(receives) for slot in slots]
        ctx.place = [sorted(arrived).index(chunk) for chunk in arrived]  # of each arrival, in the order of chunks
        return torch.stack([got[arrived.index(chunk)] for chunk in sorted(arrived)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        back = torch.stack([grads[0][i] for i in ctx.place])
        got = all_to_all(back, [len(s) for s in ctx.sends], [len(s) for s in ctx.receives], ctx.group)
        total = got.new_zeros(2, got.shape[1], dtype=torch.promote_types(got.dtype, torch.float32))
        for slot, grad in zip(itertools.chain(*ctx.sends), got, strict=True):
            total[slot] += grad
        return total.to(got.dtype), None, None


class AllToAllCore:
    """Attention over whole sequences for H / cp of the heads.

    A key/value head travels once to each rank that gets a query head of its group: none is copied where cp divides
    their number, and nowhere are more copies made than ranks need. Raises ConfigError when cp does not divide the
    query heads that this rank has.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @uncompiled
    def __call__(self, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, rule: Rule) -> Tensor:
        """See ``kernels.attend``."""
        cp, rank = self.group.size(), self.group.rank()
        (B, S, H, d), G, v_dim = q_BSHd.shape, k_BSGd.shape[2], v_BSGv.shape[-1]
        if H % cp:
            raise ConfigError(
                f"parallel.context=all_to_all gives each of parallel.cp={cp} ranks a part of the {H} query heads that "
                "a tensor parallel rank has, and they do not divide; use a cp that does, or context=ring or all_gather"
            )
        h = H // cp
        kv_heads = [range(r * h * G // H, ((r + 1) * h - 1) * G // H + 1) for r in range(cp)]
        sends = [
            torch.cat(
                (
                    q_BSHd[:, :, r * h : (r + 1) * h].flatten(),
                    k_BSGd[:, :, kv.start : kv.stop].flatten(),
                    v_BSGv[:, :, kv.start : kv.stop].flatten(),
                )
            )
            for r, kv in enumerate(kv_heads)
        ]
        g = len(kv_heads[rank])
        sizes = [B * S * n for n in (h * d, g * d, g * v_dim)]
        got = all_to_all(torch.cat(sends), [sum(sizes)] * cp, [len(x) for x in sends], self.group)
        q, k, v = got.view(cp, -1).split(sizes, dim=1)
        q_BNhd = _in_order(q.reshape(cp, B, S, h, d))
        k_BNgd = _in_order(k.reshape(cp, B, S, g, d))
        v_BNgv = _in_order(v.reshape(cp, B, S, g, v_dim))
        kv_of_h = [head * G // H - kv_heads[rank].start for head in range(rank * h, (rank + 1) * h)]
        if h % g or kv_of_h != [i * g // h for i in range(h)]:  # parts of groups: attention is told each head's own
            kv_index_h = _index(tuple(kv_of_h), q_BSHd.device)
            k_BNgd, v_BNgv = k_BNgd.index_select(2, kv_index_h), v_BNgv.index_select(2, kv_index_h)
        sinks_h = None if rule.sinks_H is None else rule.sinks_H[rank * h : (rank + 1) * h]
        out_BNhv = attend(q_BNhd, k_BNgd, v_BNgv, places.whole(), rule._replace(sinks_H=sinks_h))
        back = _by_rank(out_BNhv, cp).flatten()
        got = all_to_all(back, [B * S * h * v_dim] * cp, [B * S * h * v_dim] * cp, self.group)
        return got.view(cp, B, S, h, v_dim).permute(1, 2, 0, 3, 4).reshape(B, S, H, v_dim)


@functools.lru_cache(maxsize=64)  # a copy to a GPU waits for it
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _in_order(parts: Tensor) -> Tensor:
    """What each rank holds, (cp, B, S, ...) -> whole sequences (B, N, ...)."""
    heads, tails = parts.chunk(2, dim=2)
    return torch.cat((heads, tails.flip(0))).transpose(0, 1).flatten(1, 2)


def _by_rank(x_BN: Tensor, cp: int) -> Tensor:
    """Undo ``_in_order``: (B, N, ...) -> (cp, B, S, ...)."""
    chunks = x_BN.unflatten(1, (2 * cp, -1)).transpose(0, 1)
    return torch.cat((chunks[:cp], chunks[cp:].flip(0)), dim=2)


CORES: dict[str, type[AllGatherCore] | type[RingCore] | type[AllToAllCore]] = {
    "all_gather": AllGatherCore,
    "ring": RingCore,
    "all_to_all": AllToAllCore,
}
