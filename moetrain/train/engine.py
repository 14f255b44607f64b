"""What runs a step. The trainer knows an engine by this interface; ``parallel.engine`` chooses one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.checkpoint import apply_state, gather_state
from moetrain.config.schema import Config
from moetrain.convert.source import Source, fill
from moetrain.data.loader import IGNORE, Batch
from moetrain.moe.balance import aux_coefs, aux_names
from moetrain.optim import build_optimizer
from moetrain.optim.offload import keep_state_on_host
from moetrain.parallel import tensor
from moetrain.parallel.apply import build_parallel
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.placement import build_placement
from moetrain.parallel.run import Inputs, LossScale
from moetrain.train.step import (
    Accept,
    Gradient,
    StepFigures,
    all_loads,
    both_finite,
    clip_gradients,
    count_tokens,
    forget_loads,
    inputs_of,
    local_gradients,
)


class Engine(Protocol):
    """A model in training. All methods are collective."""

    @property
    def model(self) -> nn.Module:
        """This rank's parameters and buffers under the names of the whole model."""
        ...

    def train_step(
        self, batches: list[Batch], step: int, lr_factor: float, accept: Accept = both_finite
    ) -> StepFigures:
        """Forward and backward of every micro-batch, clip, update where ``accept`` says so, close the step. Without the
        update everything is as it was before."""
        ...

    def loss(self, batch: Batch, step: int) -> Tensor:
        """This rank's share of the summed loss of ``batch``, a scalar; over all ranks of the world shares add up."""
        ...

    def gradient(self, batches: list[Batch], step: int) -> Gradient:
        """Gradient of the mean loss over ``batches`` (as many on every rank), without auxiliary terms, unclipped.
        Between steps only; leaves everything as it was. Raises ConfigError where the engine keeps no gradients."""
        ...

    def next_logits(self, tokens_1N: Tensor, last: int) -> Tensor:
        """Logits (V,) after position ``last`` of one sequence, the same on every rank."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, as a checkpoint holds them; DTensors where they are split."""
        ...

    def load_weights(self, source: Source) -> None:
        """Replace the weights by those of ``source``, of which this rank reads its slices."""
        ...

    def state(self, progress: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; see ``checkpoint.gather_state``."""
        ...

    def load_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put a loaded ``state`` in place; its progress."""
        ...

    def progress(self, progress: dict[str, Any]) -> dict[str, Any]:
        """``progress`` as ``state`` has it: with what the engine itself needs to go on, beside tensors."""
        ...

    def tensors(self, progress: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """What a snapshot holds: all tensors of ``state`` by name, the live ones, found in little time. progress: that
        of a snapshot, whose tensors they shall take. Collective then."""
        ...


def build_engine(cfg: Config, dims: ParallelDims, device: torch.device) -> Engine:
    """The engine that ``cfg.parallel.engine`` names."""
    if cfg.parallel.engine == "deepspeed":
        from moetrain.train.engine_deepspeed import DeepSpeedEngine  # imports what is not always installed

        return DeepSpeedEngine(cfg, dims, device)
    return TorchEngine(cfg, dims, device)


class TorchEngine:
    """FSDP2, tensor, context, pipeline and expert parallelism on torch alone."""

    def __init__(self, cfg: Config, dims: ParallelDims, device: torch.device) -> None:
        self.cfg, self.dims, self.device = cfg, dims, device
        self.runner = build_parallel(cfg, dims, device)
        self.model = self.runner.model
        self.optimizer = build_optimizer(cfg.optim, self.model)
        if cfg.parallel.offload == "optimizer":
            keep_state_on_host(self.optimizer)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.aux_names = aux_names(cfg.balance)
        self.copies = tensor.copies(self.model) if dims.sizes.tp > 1 else []
        self.placement = build_placement(cfg, self.model, dims)

    def train_step(
        self, batches: list[Batch], step: int, lr_factor: float, accept: Accept = both_finite
    ) -> StepFigures:
        inputs = [inputs_of(batch, self.device) for batch in batches]
        targets, tokens = count_tokens(inputs, self.dims)
        sums = self._backward(inputs, LossScale(targets, tokens, aux_coefs(self.cfg.balance, step)), step)
        dist.all_reduce(sums)
        grad_norm = clip_gradients(self.model, self.cfg.train.clip_norm, self.dims.stage_group.size())
        loss, *terms = sums.tolist()
        aux = {name: value / tokens for name, value in zip(self.aux_names, terms, strict=True)}
        accepted = accept(loss / max(targets, 1), grad_norm)
        if accepted:
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
                group["lr"] = peak * lr_factor
            self.optimizer.step()
            self.runner.weights_updated()
        self.optimizer.zero_grad(set_to_none=True)
        loads = all_loads(self.model, self.cfg.model, self.dims, step) if accepted else forget_loads(self.model)
        if self.placement is not None and accepted:
            self.placement.end_step(step + 1, loads, self.optimizer)
        return StepFigures(loss / max(targets, 1), aux, tokens, targets, grad_norm, loads)

    def loss(self, batch: Batch, step: int) -> Tensor:
        return self.runner.loss(inputs_of(batch, self.device), step)

    def gradient(self, batches: list[Batch], step: int) -> Gradient:
        """See ``Engine``."""
        inputs = [inputs_of(batch, self.device) for batch in batches]
        # A pipeline's schedule is made for a step's number of micro-batches.
        padding = Inputs(*(None if x is None else x.clone() for x in inputs[0]))  # type: ignore[arg-type]
        padding.targets_BN.fill_(IGNORE)
        wanted = self.cfg.train.global_batch // (self.cfg.train.micro_batch * self.dims.data_size)
        if self.dims.sizes.pp > 1:
            inputs += [padding] * (wanted - len(inputs))
        targets, tokens = count_tokens(inputs, self.dims)
        self._backward(inputs, LossScale(targets, tokens, [0.0] * len(self.aux_names)), step)
        found = Gradient(local_gradients(self.model, self.dims.stage_group.size()))
        self.optimizer.zero_grad(set_to_none=True)
        forget_loads(self.model)
        return found

    def next_logits(self, tokens_1N: Tensor, last: int) -> Tensor:
        sizes = self.dims.sizes
        # Every rank holds as many tokens as the others, and context parallel ones an even number of chunks.
        missing = -tokens_1N.shape[1] % (sizes.tp * (2 * sizes.cp if sizes.cp > 1 else 1))
        padded = torch.cat([tokens_1N, tokens_1N.new_zeros(1, missing)], dim=1)
        logits = self.runner.logits(padded)
        found = torch.full((self.cfg.model.vocab_size,), float("-inf"), device=self.device)
        here = (self.dims.index_of(padded.shape[1]) == last).nonzero()[:, 0]
        if logits is not None and len(here):
            found = logits[0, int(here[0])].float()
        # Those who have it all have the same; the others have nothing.
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found

    def _backward(self, inputs: list[Inputs], scale: LossScale, step: int) -> Tensor:
        """Whole gradients in place; this rank's share of the sums, see ``Runner.forward_backward``."""
        sums = self.runner.forward_backward(inputs, scale, step)
        self.runner.gradients_in_place()
        if self.copies:
            tensor.sum_copies(self.copies, self.dims.group("tp"))
        return sums

    def weights(self) -> dict[str, Tensor]:
        weights = self.model.state_dict()
        return weights if self.placement is None else self.placement.as_ep(weights)

    def load_weights(self, source: Source) -> None:
        if self.placement is not None:
            self.placement.to_ep(self.optimizer)
        fill(self.weights(), source)
        self.runner.weights_updated()

    def state(self, progress: dict[str, Any]) -> dict[str, Any]:
        state = gather_state(self.model, self.optimizer, self.progress(progress))
        if self.placement is None:
            return state
        return {**state, **{part: self.placement.as_ep(state[part], on_host=True) for part in ("model", "optim")}}

    def load_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if self.placement is not None:
            self.placement.to_ep(self.optimizer)
        progress = apply_state(self.model, self.optimizer, state)
        if self.placement is not None:
            self.placement.load_state(progress.get("placement"), self.optimizer)
        self.runner.weights_updated()
        return progress

    def progress(self, progress: dict[str, Any]) -> dict[str, Any]:
        return progress if self.placement is None else {**progress, "placement": self.placement.state()}

    def tensors(self, progress: dict[str, Any] | None = None) -> dict[str, Tensor]:
        if progress is not None and self.placement is not None:
            self.placement.load_state(progress.get("placement"), self.optimizer)
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            found |= {f"optim.{name}.{key}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return found
