"""Ring attention (arXiv 2310.01889): keys and values of one other rank at a time, under an online softmax.

In step s a rank computes with the chunks of the rank s places after it, while those of the next step are on their way.
They come straight from their owner, and their gradients go straight back to it: as many bytes a step as from hand to
hand, but a chunk never visits a rank that cannot see it. Each rank holds two blocks of keys and values, and the scores
of one chunk against one other; backward computes these again from the saved log-sum-exp (FlashAttention, arXiv
2205.14135).

Shapes: as in ``parallel.context``. Per chunk, queries are (B, G, X, d) with X = (H/G) * C: a group's heads one after
the other; keys are (B, G, C, d), values (B, G, C, v).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from moe_kernels.uncompiled import uncompiled
from torch import Tensor

from moetrain.model.attention.kernels import Rule
from moetrain.model.places import Places
from moetrain.parallel.chunks import Chunks, chunk_mask


class RingCore:
    """A ``Core`` for head-tail split sequences. Spells attention out: ``backend`` makes no difference. Factors of
    matrix products are in the inputs' dtype; sums and the softmax in float32, or float64 where the inputs are."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @uncompiled
    def __call__(self, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, rule: Rule) -> Tensor:
        """See ``kernels.attend``."""
        chunks = Chunks(self.group.size(), places.seq_len, places.effective(rule.window))
        B, _, G, d = k_BSGd.shape
        layout = _Layout(B, q_BSHd.shape[2], G, d, v_BSGv.shape[-1], chunks.length)
        kv_cX = torch.cat((layout.pack(k_BSGd), layout.pack(v_BSGv)), dim=1)
        ring = _Ring(self.group, chunks, places, layout, rule.scale)
        return _RingAttention.apply(q_BSHd, kv_cX, rule.sinks_H, ring)


@dataclass(frozen=True)
class _Layout:
    """Sizes of a rank's tensors, and their forms."""

    B: int
    H: int
    G: int
    d: int
    v: int
    C: int

    def pack(self, x_BSGd: Tensor) -> Tensor:
        """Keys or values as rows that can travel, a row per chunk: (2, B*G*C*d)."""
        return x_BSGd.unflatten(1, (2, self.C)).permute(1, 0, 3, 2, 4).reshape(2, -1)

    def unpack(self, kv_X: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a chunk's keys and values."""
        k, v = kv_X.split([self.B * self.G * self.C * width for width in (self.d, self.v)])
        return k.view(self.B, self.G, self.C, self.d), v.view(self.B, self.G, self.C, self.v)

    def queries(self, x_BSHd: Tensor) -> list[Tensor]:
        """Queries, or outputs or their gradients, of both chunks."""
        chunks = x_BSHd.unflatten(2, (self.G, -1)).split(self.C, dim=1)
        return [x.permute(0, 2, 3, 1, 4).reshape(self.B, self.G, -1, x.shape[-1]) for x in chunks]

    def tokens(self, chunks: list[Tensor]) -> Tensor:
        """Undo ``queries``: (B, S, H, d)."""
        parts = [x.unflatten(2, (-1, self.C)).permute(0, 3, 1, 2, 4).flatten(2, 3) for x in chunks]
        return torch.cat(parts, dim=1)

    def sinks(self, sinks_H: Tensor, dtype: torch.dtype) -> Tensor:
        """A sink for every query of a chunk: (B, G, X, 1)."""
        sinks = sinks_H.to(dtype).view(1, self.G, -1, 1, 1)
        return sinks.expand(self.B, -1, -1, self.C, -1).reshape(self.B, self.G, -1, 1)


@dataclass
class _Ring:
    """One call's part in the ring."""

    group: dist.ProcessGroup
    chunks: Chunks
    places: Places
    layout: _Layout
    scale: float

    def __post_init__(self) -> None:
        self.rank, self.cp = self.group.rank(), self.group.size()

    def start(self, step: int, rows: Tensor, *, back: bool = False) -> _Pending | None:
        """Begin what step ``step`` exchanges, or None where no rank has anything to send in it.

        rows: this rank's chunks, (2, X), of which the rank ``step`` places before gets what it needs; or, ``back``, the
        gradients of those that came from the rank ``step`` places after, which go back there.
        """
        if not any(self.chunks.slots((r + step) % self.cp, r) for r in range(self.cp)):
            return None
        after, before = (self.rank + step) % self.cp, (self.rank - step) % self.cp
        fetched, lent = self.chunks.slots(after, self.rank), self.chunks.slots(self.rank, before)
        sends, receives = [0] * self.cp, [0] * self.cp
        if back:
            sends[after], receives[before] = len(fetched), len(lent)
        else:
            rows = torch.stack([rows[slot] for slot in lent]) if lent else rows[:0]
            sends[before], receives[after] = len(lent), len(fetched)
        out = rows.new_empty(sum(receives), rows.shape[1])
        work = dist.all_to_all_single(out, rows, receives, sends, group=self.group, async_op=True)
        return _Pending(out, rows, work)

    def visible(self, step: int) -> list[int]:
        """Chunks that arrive in step ``step``, in the order of their rows."""
        source = (self.rank + step) % self.cp
        return [self.chunks.held(source)[slot] for slot in self.chunks.slots(source, self.rank)]

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """(own slot, row of the arrived) of the chunks that see each other in step ``step``. In step 0 a chunk comes
        to itself first, so that every query has seen a key before it meets keys that it may not see at all."""
        found = []
        for slot, own in enumerate(self.chunks.held(self.rank)):
            rows = [(chunk, row) for row, chunk in enumerate(self.visible(step)) if chunk in self.chunks.seen_by(own)]
            found += [(slot, row) for _, row in sorted(rows, reverse=True)]
        return found

    def scores(self, q: Tensor, k: Tensor, own: int, other: int) -> Tensor:
        """scale * q k^T of two chunks, (B, G, X, C), minus infinity where it is not seen."""
        scores = _product(q, k.transpose(-1, -2)) * self.scale
        mask = chunk_mask(self.places, self.layout.C, self.chunks.window, own, range(other, other + 1))
        if mask is None and own == other:
            mask = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool, device=scores.device).tril()
        if mask is None:
            return scores
        mask = mask if mask.dim() == 2 else mask.unsqueeze(2)
        return scores.unflatten(2, (-1, self.layout.C)).masked_fill(~mask, float("-inf")).flatten(2, 3)


@dataclass
class _Pending:
    out: Tensor
    sent: Tensor  # must live until it has been sent
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b (B, G, ..., ...) in float32 or wider, of factors in b's dtype."""
    a = a.to(b.dtype)
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        # Tensor cores add such products up in float32; this leaves the sum so.
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    wide = _wide(a.dtype)
    return a.to(wide) @ b.to(wide)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHd: Tensor, kv_cX: Tensor, sinks_H: Tensor | None, ring: _Ring) -> Tensor:
        layout, wide = ring.layout, _wide(q_BSHd.dtype)
        held = ring.chunks.held(ring.rank)
        q = layout.queries(q_BSHd)
        # running maximum, sum and weighted values of every query, of the keys met so far
        if sinks_H is None:
            top = [x.new_full((*x.shape[:3], 1), float("-inf"), dtype=wide) for x in q]
            total = [torch.zeros_like(x) for x in top]
        else:  # the sink is met first, and brings no value
            top = [layout.sinks(sinks_H, wide)] * 2
            total = [torch.ones_like(x) for x in top]
        acc = [x.new_zeros(*x.shape[:3], layout.v, dtype=wide) for x in q]
        pending: _Pending | None = None
        for step in range(ring.cp):
            block = kv_cX if step == 0 else pending.wait() if pending else kv_cX[:0]
            pending = ring.start(step + 1, kv_cX) if step + 1 < ring.cp else None
            arrived = ring.visible(step)
            for slot, row in ring.pairs(step):
                k, v = layout.unpack(block[row])
                scores = ring.scores(q[slot], k, held[slot], arrived[row])
                now = torch.maximum(top[slot], scores.amax(-1, keepdim=True))
                shrink, weights = (top[slot] - now).exp(), (scores - now).exp()
                total[slot] = total[slot] * shrink + weights.sum(-1, keepdim=True)
                acc[slot] = acc[slot] * shrink + _product(weights, v)
                top[slot] = now
        out_BSHv = layout.tokens([a / t for a, t in zip(acc, total, strict=True)]).to(q_BSHd.dtype)
        lse = [m + t.log() for m, t in zip(top, total, strict=True)]
        ctx.ring = ring
        ctx.save_for_backward(q_BSHd, kv_cX, sinks_H, out_BSHv, *lse)
        return out_BSHv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        ring: _Ring = ctx.ring
        layout = ring.layout
        q_BSHd, kv_cX, sinks_H, out_BSHv, *lse = ctx.saved_tensors
        wide = _wide(q_BSHd.dtype)
        held = ring.chunks.held(ring.rank)
        q, dout, out = (layout.queries(x) for x in (q_BSHd, grads[0], out_BSHv))
        delta = [(do.to(wide) * o).sum(-1, keepdim=True) for do, o in zip(dout, out, strict=True)]
        dq = [torch.zeros_like(x, dtype=wide) for x in q]
        dkv_cX = torch.zeros_like(kv_cX, dtype=wide)
        pending: _Pending | None = None
        returning: _Pending | None = None
        for step in range(ring.cp):
            block = kv_cX if step == 0 else pending.wait() if pending else kv_cX[:0]
            pending = ring.start(step + 1, kv_cX) if step + 1 < ring.cp else None
            arrived = ring.visible(step)
            dblock = dkv_cX if step == 0 else torch.zeros_like(block, dtype=wide)
            for slot, row in ring.pairs(step):
                k, v = layout.unpack(block[row])
                dk, dv = layout.unpack(dblock[row])  # views: adding to them adds to dblock
                probs = (ring.scores(q[slot], k, held[slot], arrived[row]) - lse[slot]).exp()
                dv += _product(probs.transpose(-1, -2), dout[slot])
                dscores = probs * (_product(dout[slot], v.transpose(-1, -2)) - delta[slot]) * ring.scale
                dq[slot] += _product(dscores, k)
                dk += _product(dscores.transpose(-1, -2), q[slot])
            _add_returned(ring, dkv_cX, step - 1, returning)
            returning = ring.start(step, dblock.to(kv_cX.dtype), back=True) if step else None
        _add_returned(ring, dkv_cX, ring.cp - 1, returning)
        dsinks_H = None
        if sinks_H is not None:
            sinks = layout.sinks(sinks_H, wide)
            per_chunk = [-((sinks - s).exp() * d) for s, d in zip(lse, delta, strict=True)]
            dsinks_H = sum(x.unflatten(2, (-1, layout.C)).sum((0, 3, 4)).flatten() for x in per_chunk).to(sinks_H.dtype)
        return layout.tokens(dq).to(q_BSHd.dtype), dkv_cX.to(kv_cX.dtype), dsinks_H, None


def _add_returned(ring: _Ring, dkv_cX: Tensor, step: int, returning: _Pending | None) -> None:
    """Add the gradients that came back from the rank that this rank's chunks were lent to in step ``step``."""
    if returning is None:
        return
    lent = ring.chunks.slots(ring.rank, (ring.rank - step) % ring.cp)
    for slot, grad in zip(lent, returning.wait(), strict=True):
        dkv_cX[slot] += grad
