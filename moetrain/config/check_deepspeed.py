"""What ``parallel.engine=deepspeed`` cannot do, refused by name before anything starts."""

from __future__ import annotations

from importlib import metadata

from moetrain.config.errors import ConfigError
from moetrain.config.registry import OPTIMIZERS
from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes

# The engine uses private parts of it, so one minor version; as in pyproject.toml.
VERSION = "0.19"
TORCH = "or use parallel.engine=torch"


def check_deepspeed(cfg: Config, sizes: Sizes) -> None:
    """Refuse what DeepSpeed cannot do in ``cfg`` on the mapping ``sizes``. Raises ConfigError.

    With the torch engine: refuses the settings that only DeepSpeed has.
    """
    p = cfg.parallel
    if p.engine != "deepspeed":
        if p.nvme is not None:
            raise ConfigError(f"parallel.nvme={p.nvme} needs parallel.engine=deepspeed and parallel.zero=3")
        return
    _check_sizes(sizes)
    _check_offload(cfg)
    # before the registries are read, a choice is still a mapping
    optimizer = cfg.optim.get("kind") if isinstance(cfg.optim, dict) else OPTIMIZERS.entry_of(cfg.optim).name
    if optimizer != "adamw":
        raise ConfigError(
            f"optim={optimizer}: parallel.engine=deepspeed updates flat shards of the weights, which suits adamw only; "
            f"set optim=adamw, {TORCH}"
        )
    if cfg.train.precision == "float64":
        raise ConfigError(
            "train.precision=float64: DeepSpeed keeps weights and optimizer state in float32; "
            f"set train.precision=float32, {TORCH}"
        )
    if p.reshard_after_forward is not None:
        raise ConfigError(
            "parallel.reshard_after_forward is for parallel.engine=torch; with deepspeed parallel.zero says what is "
            f"sharded when; set parallel.reshard_after_forward=null, {TORCH}"
        )
    if cfg.train.freeze:
        raise ConfigError(
            f"train.freeze={cfg.train.freeze}: parallel.engine=deepspeed trains every parameter, since "
            f"checkpoints are made of what ZeRO's optimizer holds; set train.freeze=[], {TORCH}"
        )
    if cfg.train.compile:
        raise ConfigError(f"train.compile=true is for parallel.engine=torch; set train.compile=false, {TORCH}")
    _check_installed()


def _check_sizes(sizes: Sizes) -> None:
    names = {"pp": "pipeline", "cp": "context", "tp": "tensor", "etp": "expert tensor"}
    for name, what in names.items():
        size = getattr(sizes, name)
        if size > 1:
            raise ConfigError(
                f"parallel.{name}={size}: parallel.engine=deepspeed has no {what} parallelism; "
                f"set parallel.{name}=1, {TORCH}"
            )
    if sizes.dp_replicate > 1:
        raise ConfigError(
            f"parallel.dp_replicate={sizes.dp_replicate}: parallel.engine=deepspeed shards over all ranks; "
            f"set parallel.dp_replicate=1, {TORCH}"
        )


def _check_offload(cfg: Config) -> None:
    p = cfg.parallel
    if p.offload == "all" and p.zero < 3:
        raise ConfigError(
            f"parallel.offload=all: DeepSpeed offloads parameters only with parallel.zero=3, not {p.zero}; "
            "set parallel.zero=3 or parallel.offload=optimizer"
        )
    if p.nvme is not None and p.zero < 3:
        raise ConfigError(
            f"parallel.nvme={p.nvme}: with parallel.zero={p.zero} DeepSpeed would write nothing there, without a word; "
            "set parallel.zero=3 or parallel.nvme=null"
        )
    if p.nvme is not None and p.offload == "none":
        raise ConfigError(
            f"parallel.nvme={p.nvme} says where offloaded state goes, but parallel.offload=none; "
            "set parallel.offload=optimizer or all, or parallel.nvme=null"
        )
    if p.nvme is not None and p.offload == "all" and cfg.train.precision != "bf16":
        raise ConfigError(
            f"parallel.offload=all with parallel.nvme={p.nvme}: DeepSpeed keeps parameters in files as bfloat16 only; "
            "set train.precision=bf16, parallel.offload=optimizer, or parallel.nvme=null"
        )


def _check_installed() -> None:
    install = f"pip install 'deepspeed=={VERSION}.*'"
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise ConfigError(f"parallel.engine=deepspeed: DeepSpeed is not installed; {install}, {TORCH}") from None
    if not found.startswith(f"{VERSION}."):
        raise ConfigError(
            f"parallel.engine=deepspeed: DeepSpeed {found} is installed, and {VERSION} is needed; {install}, {TORCH}"
        )
