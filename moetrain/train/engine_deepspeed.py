"""DeepSpeed as the engine: ZeRO 1, 2 and 3 over all ranks, with expert parallelism, offload to CPU and NVMe.

The model, its initial weights, the data, the loss and the meaning of a checkpoint are those of the torch engine.
"""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.convert.source import Source, fill
from moetrain.data.loader import Batch
from moetrain.model.decoder import Decoder
from moetrain.moe.balance import aux_coefs, end_of_step
from moetrain.moe.routing import Carry
from moetrain.optim.groups import decay_groups, trainable
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.run import Inputs, LossScale, local_inputs, sum_dtype
from moetrain.parallel.zero import build_zero, import_deepspeed, is_expert, share_gathers
from moetrain.train.deepspeed_nvme import get_file_access_ready
from moetrain.train.deepspeed_state import ZeroState
from moetrain.train.step import Accept, Gradient, StepFigures, both_finite, count_tokens, forget_loads, inputs_of

# Elements that are reduced in one go; DeepSpeed's own choice of 5e8 takes 4 GB of buffers.
BUCKET = 2**26


class DeepSpeedEngine:
    """The ``Engine`` of ``parallel.engine=deepspeed``. Its optimizer is AdamW: ``config.check_deepspeed``."""

    def __init__(self, cfg: Config, dims: ParallelDims, device: torch.device) -> None:
        self.cfg, self.dims, self.device = cfg, dims, device
        deepspeed = import_deepspeed(device)
        if cfg.parallel.nvme is not None:
            get_file_access_ready(cfg.parallel.nvme)
        self.model: Decoder = build_zero(cfg, dims, device)
        weights = {}
        if cfg.train.precision == "bf16":
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        optimizer = _optimizer(cfg.optim, self.model)
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        with redirect_stdout(io.StringIO()):  # memory reports that no setting turns off
            self.engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=settings(cfg, dims, self.model), dist_init_required=False
            )
        if cfg.parallel.zero == 3:
            share_gathers(self.model)
        self.zero_state = ZeroState(self.model, self.engine.optimizer, dims, cfg.parallel.zero)
        if weights:  # the optimizer's copy was made from bfloat16
            self.zero_state.set_weights(weights)

    def train_step(
        self, batches: list[Batch], step: int, lr_factor: float, accept: Accept = both_finite
    ) -> StepFigures:
        """See ``Engine``. ``accept`` is only told: DeepSpeed updates by a finite gradient, and by no other."""
        for group, peak in zip(self.engine.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * lr_factor
        inputs = [inputs_of(batch, self.device) for batch in batches]
        targets, tokens = count_tokens(inputs, self.dims)
        scale = LossScale(targets, tokens, aux_coefs(self.cfg.balance, step))
        sums = torch.zeros(1 + len(scale.coefs), dtype=sum_dtype(self.device), device=self.device)
        for i, batch in enumerate(inputs):
            if i > 0:
                self.engine.step()  # no update yet: counts the micro-batch before
            loss, carry = self._forward(batch, step)
            # Every reduction is a mean over all ranks, also that of experts; the loss is a sum of shares.
            self.engine.backward(scale.total(loss, carry.aux_A) * dist.get_world_size(), scale_wrt_gas=False)
            sums[0] += loss.detach()
            sums[1:] += carry.aux_A.detach()
        dist.all_reduce(sums)
        loss_sum, *aux_sums = sums.tolist()
        aux = {name: value / tokens for name, value in zip(self.model.aux_names, aux_sums, strict=True)}
        grad_norm = math.nan
        if math.isfinite(loss_sum):
            self.engine.step()  # updates nothing when the norm is not finite
            grad_norm = float(self.engine.get_global_grad_norm())
        known = math.isfinite(grad_norm)
        accept(loss_sum / max(targets, 1), grad_norm)
        loads = end_of_step(self.model, self.dims.stage_group, step) if known else forget_loads(self.model)
        return StepFigures(loss_sum / max(targets, 1), aux, tokens, targets, grad_norm, loads)

    @torch.no_grad()
    def loss(self, batch: Batch, step: int) -> Tensor:
        """See ``Engine``."""
        loss: Tensor = self._forward(inputs_of(batch, self.device), step)[0]
        return loss

    def gradient(self, batches: list[Batch], step: int) -> Gradient:
        """See ``Engine``."""
        raise ConfigError("parallel.engine=deepspeed keeps no gradients that could be compared; use torch")

    @torch.no_grad()
    def next_logits(self, tokens_1N: Tensor, last: int) -> Tensor:
        """See ``Engine``."""
        logits_V: Tensor = self.engine(tokens_1N)[0][0, last].float()
        return logits_V

    def weights(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        return self.zero_state.weights()

    def load_weights(self, source: Source) -> None:
        """See ``Engine``."""
        weights = self.weights()
        fill(weights, source)
        self.zero_state.set_weights(weights)

    def state(self, progress: dict[str, Any]) -> dict[str, Any]:
        """See ``Engine``. Copies, in float32, each rank's share of the whole."""
        return self.zero_state.gather(progress)

    def load_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See ``Engine``."""
        return self.zero_state.apply(state)

    def progress(self, progress: dict[str, Any]) -> dict[str, Any]:
        """See ``Engine``."""
        return progress

    def tensors(self, progress: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """See ``Engine``. None: what DeepSpeed gives are copies."""
        raise ConfigError("parallel.engine=deepspeed takes no snapshots; use torch, or train.snapshot.every=0")

    def _forward(self, batch: Inputs, step: int) -> tuple[Tensor, Carry]:
        tokens, arguments = local_inputs(self.model, batch)
        return self.engine(tokens, step=step, **arguments)


def settings(cfg: Config, dims: ParallelDims, model: Decoder) -> dict[str, Any]:
    """DeepSpeed's config of a run of ``model``. What is not said here is its default."""
    p, t = cfg.parallel, cfg.train
    zero: dict[str, Any] = {
        "stage": p.zero,
        "contiguous_gradients": True,  # without these two ZeRO 1 reduces experts wrongly, in silence
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if p.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0
    host: dict[str, Any] = {"device": "cpu", "pin_memory": dims.experts.device_type == "cuda"}
    if p.nvme is not None:
        host = {"device": "nvme", "nvme_path": p.nvme}
    if p.offload != "none":
        zero["offload_optimizer"] = host
    if p.offload == "all":
        zero["offload_param"] = dict(host)
    if p.offload == "all" and p.nvme is not None:
        largest = max(w.numel() for w in model.parameters())
        # Buffers that just hold a parameter (1e8 elements if left out), and no parameter kept in memory (1e9 elements).
        zero["offload_param"] |= {"buffer_size": largest, "max_in_cpu": 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": t.micro_batch,
        "gradient_accumulation_steps": t.global_batch // t.micro_batch // dims.data_size,
        "gradient_clipping": t.clip_norm,  # 0: never; left out, it would be 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW is as fast on CPU as DeepSpeed's, which is compiled for minutes at its first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if t.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _optimizer(options: Any, model: Decoder) -> torch.optim.AdamW:
    """torch's AdamW over the groups of ``optim.groups``, those of experts apart, as ZeRO wants them."""
    groups = []
    for group in decay_groups(trainable(model), options.weight_decay, options.decay_embedding):
        experts = [p for p in group["params"] if is_expert(p)]
        others = [p for p in group["params"] if not is_expert(p)]
        groups += [{**group, "params": others}] if others else []
        groups += [{**group, "params": experts, "moe": True, "name": experts[0].group_name}] if experts else []
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)
