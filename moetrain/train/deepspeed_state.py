"""DeepSpeed's training state in moetrain's form: whole tensors under global names, each rank holding its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from moetrain.parallel.fsdp import expert_placement
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.zero import is_expert

QUANTITIES = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """The float32 weights and AdamW's state behind ``model``, of which ZeRO's ``optimizer`` holds shards.

    model: with this rank's experts, after deepspeed.initialize. Makes the optimizer's state, so that it is there to be
    loaded into before the first step (ZeRO 1 and 2 would also link it too early, when the first group has one).
    """

    def __init__(self, model: nn.Module, optimizer: Any, dims: ParallelDims, stage: int) -> None:
        self.model, self.optimizer, self.dims, self.stage = model, optimizer, dims, stage
        for i, flat in enumerate(self._flat()):
            with self._in_memory(i):
                step = torch.zeros((), dtype=torch.float32, device=flat.device)
                zero = torch.zeros_like(flat, requires_grad=False)
                self.optimizer.optimizer.state[flat] = {"step": step, "exp_avg": zero, "exp_avg_sq": zero.clone()}
        if stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def weights(self, on_host: bool = False) -> dict[str, Tensor]:
        """Parameters, as DTensors, and persistent buffers by name. on_host: parameters in host memory."""
        from deepspeed.utils import safe_get_full_fp32_param

        model: dict[str, Tensor] = dict(self.model.state_dict())
        for name, p in self.model.named_parameters():
            model[name] = self._spread(safe_get_full_fp32_param(p), is_expert(p), on_host)
        return model

    @torch.no_grad()
    def gather(self, train: dict[str, Any]) -> dict[str, Any]:
        """What ``checkpoint.gather_state`` gives, under the same names; parameters as DTensors, in host memory: a GPU
        has no room for all of its state twice, and none at all for one that is offloaded."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optim: dict[str, Any] = {}
        steps = self._steps()
        for name, p in self.model.named_parameters():
            for key in QUANTITIES:
                optim[f"state.{name}.{key}"] = self._spread(safe_get_full_optimizer_state(p, key), is_expert(p), True)
            optim[f"state.{name}.step"] = steps[0].detach().cpu().clone()
        return {"model": self.weights(on_host=True), "optim": optim, "train": train}

    @torch.no_grad()
    def apply(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put a loaded ``state`` in place, as ``checkpoint.apply_state`` does; returns its "train" part."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.set_weights(state["model"])
        for name, p in self.model.named_parameters():
            for key in QUANTITIES:
                safe_set_full_optimizer_state(p, self._whole(state["optim"][f"state.{name}.{key}"]), key)
        step = max(float(value) for key, value in state["optim"].items() if key.endswith(".step"))
        for own in self._steps():
            own.fill_(step)
        for name, buffer in self.model.named_buffers():
            if name in state["model"]:
                buffer.copy_(state["model"][name])
        train: dict[str, Any] = state["train"]
        return train

    @torch.no_grad()
    def set_weights(self, values: dict[str, Tensor]) -> None:
        """Set every parameter to ``values``: DTensors of ``gather``, or plain tensors of this rank's shapes."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, p in self.model.named_parameters():
            safe_set_full_fp32_param(p, self._whole(values[name]))
        # The weights that forward uses are copies.
        if self.stage < 3:
            self.optimizer.update_lp_params()
        else:
            for i in range(len(self.optimizer.fp16_groups)):
                with self._in_memory(i):
                    self.optimizer._reassign_or_swap_out_partitioned_parameters(i)

    def _flat(self) -> list[Tensor]:
        """The flat float32 shards that the optimizer updates, one a group."""
        # ZeRO 1 and 2, ZeRO 1 in bfloat16, ZeRO 3: three classes, three names.
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        flat: list[Tensor] = next(getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name))
        return flat

    @contextmanager
    def _in_memory(self, group: int) -> Iterator[None]:
        """Shard ``group`` is in memory, and what is done to it goes back to where it came from (NVMe)."""
        swapped = self.stage == 3 and self.optimizer._swappable_optimizer_subgroup(group)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)

    def _steps(self) -> list[Tensor]:
        return [state["step"] for state in self.optimizer.optimizer.state.values()]

    def _spread(self, whole: Tensor, expert: bool, on_host: bool) -> DTensor:
        """The DTensor of which every rank keeps a share of ``whole``: its (e, ...) experts, or all of a parameter.

        The others' parts are freed, so a checkpoint takes no more memory than the sharded state does.
        """
        placements: list[Placement] = [Shard(0)]
        mesh, shape = self.dims.fsdp_mesh, list(whole.shape)
        if expert:
            mesh, edp = self.dims.experts["edp", "ep"], self.dims.sizes.edp
            shape[0] *= self.dims.sizes.ep
            placements = [expert_placement(edp)(whole), Shard(0)]  # type: ignore[arg-type]
        split = placements[0]
        assert isinstance(split, Shard)
        chunks = whole.chunk(mesh.size(0), dim=split.dim)
        mine = mesh.get_local_rank(0)
        local = chunks[mine].clone() if mine < len(chunks) else whole.narrow(split.dim, 0, 0).clone()
        stride = torch.empty(shape, device="meta").stride()
        spread = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
        return DTensor(local.cpu(), spread._spec, requires_grad=False) if on_host else spread

    def _whole(self, value: Tensor) -> Tensor:
        """What ``_spread`` was given; plain tensors as they are."""
        if not isinstance(value, DTensor):
            return value
        # To the device of its mesh, if it is in host memory
        value = DTensor.from_local(
            value.to_local(),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
        placements = [Replicate(), Shard(0)] if value.device_mesh.ndim == 2 else [Replicate()]
        return value.redistribute(placements=placements).to_local()
