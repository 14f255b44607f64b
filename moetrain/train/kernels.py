"""Which kernels a run gets; asked before there is any work, and again for what the run says."""

from __future__ import annotations

import torch
from moe_kernels import choose_backend

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.model.attention.kernels import PACKED, choose
from moetrain.model.attention.packed import Setting
from moetrain.train.runtime import refuse_no_gpu

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


def refuse_what_cannot_run(cfg: Config) -> None:
    """Raise ConfigError for a device or for kernels that were asked for and cannot run. What takes a GPU to tell is
    left to the ranks: a process that starts them must take no memory of it."""
    refuse_no_gpu(cfg.device)
    if cfg.device == "cpu" or not torch.cuda.is_available():
        attention_kernel(cfg, torch.device("cpu"))
        if cfg.model.moe_layers():
            expert_kernels(cfg, torch.device("cpu"))


def attention_kernel(cfg: Config, device: torch.device) -> tuple[str, str] | None:
    """(name, why) of the attention kernel, where there is a choice: on CUDA with documents or a window, or asked for.
    Raises ConfigError when it was asked for and cannot run."""
    a, split = cfg.model.attention, cfg.parallel.cp != 1 and cfg.parallel.context != "all_to_all"
    masked = cfg.data.document_mask or a.sliding_window is not None or cfg.data.objective == "ul2"
    if split or not (a.backend in PACKED or (a.backend == "auto" and device.type == "cuda" and masked)):
        return None
    mla = a.kind == "mla"
    widths = (a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim) if mla else (a.head_dim, a.head_dim)
    prefix = cfg.data.objective == "ul2"
    return choose(a.backend, Setting(device, DTYPES[cfg.train.precision], *widths, a.sinks, prefix, split))


def expert_kernels(cfg: Config, device: torch.device) -> tuple[str, str]:
    """(name, why) of the expert kernels that the run uses. Raises ConfigError when the ones asked for cannot run."""
    dtype = DTYPES[cfg.train.precision]
    width = cfg.model.layer_value("expert_dim", cfg.model.moe_layers()[0])
    try:
        moe, e = cfg.model.moe, cfg.experts
        return choose_backend(e.backend, device, dtype, cfg.model.dim, width, moe.activation, moe.bias, e.fp8)
    except ValueError as error:
        raise ConfigError(f"experts.backend={cfg.experts.backend}: {error}") from None
