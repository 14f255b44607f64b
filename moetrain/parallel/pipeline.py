"""Pipeline parallelism: stages of the decoder on different ranks, run by torch.distributed.pipelining's schedules.

What crosses from stage to stage is the residual stream and the sums of the auxiliary terms, in a flat tuple whose
shapes are declared beforehand; so no stage is run only to learn shapes. The last stage makes the loss from what
arrives, and the schedule adds nothing to it: gradients are sums, as without a pipeline.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from moe_kernels import late_weight_gradients
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor

from moetrain.config.schema import Config
from moetrain.config.sizes import ZERO_BUBBLE
from moetrain.model.decoder import Decoder
from moetrain.moe.routing import Carry
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.run import Inputs, LossScale, local_inputs, sum_dtype
from moetrain.parallel.stages import Stage

logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)

SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


class StagePart(Decoder):
    """A decoder's layers of one stage, called with the flat tuple that the stage before returned."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *sums: Tensor,
        targets_BS: Tensor | None = None,
        document_BN: Tensor | None = None,
        prefix_BN: Tensor | None = None,
        seq_len: int,
        step: int = 0,
    ) -> tuple[Tensor, ...]:
        """(tokens_BS) or (x_BSD, aux_A) -> (x_BSD, aux_A), or from the last stage (output, aux_A), with the output a
        loss (1,) or, without targets, logits. aux_A is left out where no balance method has a term."""
        if self.first:
            x = self.embedded(x)
        carry = self.first_carry(x) if not sums else Carry(sums[0])
        x, carry = self.forward_layers(x, carry, self.places(x, seq_len, document_BN, prefix_BN=prefix_BN), step)
        if self.last:
            x = self.output(x, targets_BS)
            x = x if targets_BS is None else torch.stack([x])
        # A copy: schedules detach the last stage's outputs in place, which an input handed on as it is forbids.
        return (x, carry.aux_A.clone()) if self.aux_names else (x,)


class LateStage(PipelineStage):
    """A stage of a zero-bubble schedule: the gradients of matrices come in a step of their own (DeepSeek's DualPipe
    does it so as well), for which the layers' backward passes leave them (``late_weight_gradients``).

    torch would look for them in the graph instead, and go through a recomputed block once for each group of weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.left: list[Callable[[], None]] = []
        super().__init__(*args, **kwargs | {"dw_builder": self._take})
        states: list[Any] = [m._get_fsdp_state() for m in self.submod.modules() if isinstance(m, FSDPModule)]
        # torch 2.11 has one group of parameters in a module
        groups = [getattr(s, "_fsdp_param_groups", None) or [getattr(s, "_fsdp_param_group", None)] for s in states]
        self.sharded: list[Any] = [p for g in itertools.chain(*groups) if g is not None for p in g.fsdp_params]

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the schedule."""
        with late_weight_gradients():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Called by the schedule."""
        with late_weight_gradients(None if full_backward else self.left):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def _take(self) -> Callable[[], None]:
        """What makes the gradients that the last backward pass has left."""
        left, self.left = self.left, []
        return functools.partial(self._run, left)

    def _run(self, left: list[Callable[[], None]]) -> None:
        left.reverse()
        while left:
            left.pop()()
        # FSDP adds gradients up in the dtype of its reductions, and looks for them after a backward pass only.
        for p in self.sharded:
            if hasattr(p, "_unsharded_param"):
                p.accumulate_unsharded_grad_if_needed()
                p.to_accumulated_grad_if_needed()


class Held(nn.Module):
    """All that one rank holds of the model, whatever stages it is in, under the names of the whole model. Never run."""

    def __init__(self, parts: Sequence[StagePart]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: block for part in parts for name, block in part.layers.items()})
        for part in parts:
            if part.first:
                self.embed = part.embed
            if part.last:
                self.norm, self.head = part.norm, part.head


class Pipeline:
    """This rank's stages and the schedule that runs them; a ``Runner``.

    parts: the stages ``mine``, made parallel, in ascending order. A table that embedding and head share is trained on
    the first stage; the last one has a copy, whose gradient travels there and whose weights come back.
    """

    def __init__(
        self, parts: Sequence[StagePart], mine: Sequence[Stage], cfg: Config, dims: ParallelDims, device: torch.device
    ) -> None:
        self.parts, self.stages, self.device = list(parts), list(mine), device
        self.model: nn.Module = Held(parts)
        self.group = dims.group("pp")
        total = mine[0].total
        self.holders = [dims.sizes.rank_of_stage(i, cfg.parallel.schedule) for i in range(total)]
        self.dtype = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}[cfg.train.precision]
        self.tied = cfg.model.tie_embeddings
        self.dim, self.tp = cfg.model.dim, dims.sizes.tp
        self.scale = LossScale(1, 1, [])
        self.sums: Tensor | None = None
        t, s = cfg.train, dims.sizes
        self.n_micro = t.global_batch // (t.micro_batch * s.data)
        shape = (t.micro_batch, t.seq_len // s.cp)
        self.kind = LateStage if cfg.parallel.schedule in ZERO_BUBBLE else PipelineStage
        built = [self._stage(part, stage, shape) for part, stage in zip(parts, mine, strict=True)]
        make = SCHEDULES[cfg.parallel.schedule]
        one = issubclass(make, schedules.PipelineScheduleSingle)
        self.schedule = make(built[0] if one else built, self.n_micro, loss_fn=self._loss, scale_grads=False)

    def forward_backward(self, batches: list[Inputs], scale: LossScale, step: int) -> Tensor:
        self.scale = scale
        self.sums = torch.zeros(1 + len(scale.coefs), dtype=sum_dtype(self.device), device=self.device)
        fields = zip(*batches, strict=True)  # all the tokens, all the targets, ...
        whole = Inputs(*(None if parts[0] is None else torch.cat(parts) for parts in fields))  # type: ignore[arg-type]
        tokens, arguments = local_inputs(self.parts[0], whole)
        first = (tokens,) if self.stages[0].first else ()
        target = arguments["targets_BS"] if self.stages[-1].last else None
        self.schedule.step(*first, target=target, return_outputs=False, step=step, **arguments)
        return self.sums

    @torch.no_grad()
    def loss(self, batch: Inputs, step: int) -> Tensor:
        tokens, arguments = local_inputs(self.parts[0], batch)
        out = self._forward(tokens, step=step, **arguments)
        return torch.zeros((), dtype=self.dtype, device=self.device) if out is None else out[0]

    @torch.no_grad()
    def logits(self, tokens_BN: Tensor) -> Tensor | None:
        tokens, arguments = local_inputs(self.parts[0], Inputs(tokens_BN, tokens_BN))
        return self._forward(tokens, seq_len=arguments["seq_len"])

    def gradients_in_place(self) -> None:
        for theirs, mine in self._tied():
            if not all(p.requires_grad for p in (theirs, mine) if p is not None):
                continue
            grads = [None if p is None or p.grad is None else _local(p.grad) for p in (theirs, mine)]
            received = self._pass_on(grads[0], None if mine is None else torch.empty_like(_local(mine)), from_last=True)
            if mine is not None and received is not None:
                assert grads[1] is not None
                grads[1].add_(received)
            if theirs is not None:
                theirs.grad = None

    @torch.no_grad()
    def weights_updated(self) -> None:
        for theirs, mine in self._tied():
            sent = None if mine is None else _local(mine)
            received = self._pass_on(sent, None if theirs is None else _local(theirs), from_last=False)
            if theirs is not None and received is not None and received is not _local(theirs):
                _local(theirs).copy_(received)

    def _stage(self, part: StagePart, stage: Stage, shape: tuple[int, int]) -> PipelineStage:
        batch, tokens = shape

        def passed(grad: bool) -> tuple[Tensor, ...]:
            x = torch.empty(batch, tokens // self.tp, self.dim, dtype=self.dtype, device="meta", requires_grad=grad)
            return (x, *self._sums_like(part, "meta", grad))

        loss = torch.empty(1, dtype=torch.promote_types(self.dtype, torch.float32), device="meta")
        return self.kind(
            part,
            stage.index,
            stage.total,
            self.device,
            input_args=torch.empty(shape, dtype=torch.int64, device="meta") if stage.first else passed(True),
            output_args=(loss, *self._sums_like(part, "meta", True)) if stage.last else passed(True),
            group=self.group,
        )

    def _sums_like(self, part: StagePart, device: Any, grad: bool) -> tuple[Tensor, ...]:
        n = len(part.aux_names)
        dtype = torch.promote_types(self.dtype, torch.float32)
        return (torch.empty(n, dtype=dtype, device=device, requires_grad=grad),) if n else ()

    def _loss(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """Of one micro-batch, on the last stage."""
        loss, aux_A = output[0][0], output[1] if len(output) > 1 else None
        assert self.sums is not None
        self.sums[0] += loss.detach()
        if aux_A is not None:
            self.sums[1:] += aux_A.detach()
        return self.scale.total(loss, aux_A)

    def _forward(self, tokens: Tensor, **arguments: Any) -> Tensor | None:
        """One micro-batch through all stages, without gradient; what the last one makes, None on ranks without it."""
        me = self.group.rank()
        parts = {stage.index: part for stage, part in zip(self.stages, self.parts, strict=True)}
        passed: tuple[Tensor, ...] = (tokens,)
        for index, holder in enumerate(self.holders):
            before = self.holders[index - 1] if index else holder
            if holder == me:
                if before != me:
                    passed = self._receive(tokens, parts[index], before)
                passed = parts[index](*passed, **arguments)
            elif before == me and index:
                for x in passed:
                    dist.send(x.contiguous(), group=self.group, group_dst=holder)
        return passed[0] if self.stages[-1].last else None

    def _receive(self, tokens: Tensor, part: StagePart, source: int) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        x = torch.empty(batch, length // self.tp, self.dim, dtype=self.dtype, device=self.device)
        values = (x, *self._sums_like(part, self.device, False))
        for value in values:
            dist.recv(value, group=self.group, group_src=source)
        return values

    def _tied(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """[(the last stage's copy, the first stage's table)] as far as they are here; [] where neither is."""
        if not self.tied:
            return []
        first = next((p.embed.weight for p in self.parts if p.first and p.embed is not None), None)
        last = next((p.embed.weight for p in self.parts if p.last and p.embed is not None), None)
        return [] if first is None and last is None else [(last, first)]

    def _pass_on(self, sent: Tensor | None, buffer: Tensor | None, from_last: bool) -> Tensor | None:
        """Between the ranks of the last and the first stage: what was sent, on the rank that receives."""
        first, last = self.holders[0], self.holders[-1]
        source, target = (last, first) if from_last else (first, last)
        if source == target:
            return sent
        if self.group.rank() == source:
            assert sent is not None
            dist.send(sent.contiguous(), group=self.group, group_dst=target)
            return None
        assert buffer is not None
        dist.recv(buffer, group=self.group, group_src=source)
        return buffer


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
