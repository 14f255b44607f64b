"""What a cluster can do: the numbers of one GPU and of the links between GPUs, from ``configs/cluster/NAME.yaml``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT
from moetrain.config.presets import config_root, nearest
from moetrain.config.typed import fields_of, validate

Precision = Literal["float32", "bf16", "fp8", "fp4"]
# (least, most) that a number of any accelerator or CPU so far can be; outside it is a slip of the pen or of units.
Rate = Annotated[float, Field(ge=1e-3, le=1e5)]  # 10^12 operations/s, or 10^9 bytes/s
Latency = Annotated[float, Field(ge=0.01, le=1e5)]  # microseconds


@dataclass(config=STRICT)
class Cluster:
    """One kind of GPU (or CPU rank) and its links. Rates without sparsity; bytes one way, for each GPU."""

    name: str = Field(description="what it is called")
    device: str = Field(description="the accelerator, in words")
    node: int = Field(ge=1, le=4096, description="GPUs in a machine")
    domain: int = Field(ge=1, le=65536, description="GPUs that the fast links join: a node's, or 72 of an NVL72")
    memory_gib: float = Field(ge=0.25, le=4096, description="memory of a GPU that a program can have, in GiB")
    tflops: dict[Precision, Rate] = Field(description="10^12 operations a second by precision, without sparsity")
    memory_gb_s: Rate = Field(description="bandwidth of its memory, 10^9 bytes/s")
    link_gb_s: Rate = Field(description="bandwidth inside a domain, one way, 10^9 bytes/s")
    link_us: Latency = Field(description="latency inside a domain, microseconds")
    network_gb_s: Rate = Field(description="bandwidth between domains for each GPU, one way, 10^9 bytes/s")
    network_us: Latency = Field(description="latency between domains, microseconds")
    host_gb_s: Rate = Field(description="bandwidth to host memory for each GPU, one way, 10^9 bytes/s")
    host_gib: float = Field(ge=1, le=65536, description="host memory of a machine, GiB")
    kind: Literal["gpu", "cpu"] = Field(default="gpu", description="what computes: a CPU hides no communication")
    cards: int | None = Field(
        default=None, ge=1, description="network cards of a machine, which its GPUs share evenly; null: one for each"
    )
    launch_us: Latency | None = Field(default=None, description="time to start one operation; null: the stack's")
    ring_gb_s: Rate | None = Field(
        default=None,
        description="what all-gathers and reduce-scatters reach in a domain, where measured: gloo's are slow",
    )
    ring_us: Latency | None = Field(default=None, description="the start of one of them, microseconds; null: link_us")
    sustained: float = Field(
        default=1.0, gt=0.2, le=1, description="share of tflops that the best of large products was measured to reach"
    )
    exponentials: Rate | None = Field(
        default=None, description="10^12 exponentials a second, which may bound attention; null: they never do"
    )
    price: float | None = Field(default=None, gt=0, le=1e4, description="money for one GPU-hour; null: not known")

    def peak(self, precision: str) -> float:
        """Operations per second in ``precision``; where it has no units for it, those of the next wider one."""
        order = ("fp4", "fp8", "bf16", "float32")
        wider = order[order.index(precision) :]
        return 1e12 * next(self.tflops[p] for p in wider if p in self.tflops)  # type: ignore[index]

    def lasting(self, precision: str) -> float:
        """``peak`` as far as products were measured to reach it; power and operands keep them from more."""
        return self.sustained * self.peak(precision)


def names() -> list[str]:
    """The clusters that ship with moetrain."""
    return sorted(file.stem for file in (config_root() / "cluster").glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """The cluster ``name``: one that ships with moetrain, or the path of a .yaml file. Raises ConfigError."""
    if name.endswith((".yaml", ".yml")):
        return read_cluster(Path(name))
    if name not in names():
        raise ConfigError(f"no cluster is called '{name}'; {nearest(name, names())}; or give the path of a .yaml file")
    return read_cluster(config_root() / "cluster" / f"{name}.yaml")


def read_cluster(file: Path) -> Cluster:
    """The cluster in ``file``, checked. Raises ConfigError with what is missing, unknown or cannot be."""
    try:
        tree: Any = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cluster file {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster file {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"cluster file {file} holds no settings; see configs/cluster/h100.yaml")
    known = fields_of(Cluster)
    for name in tree:
        if name not in known:
            raise ConfigError(f"cluster file {file}: {name} is not a setting; {nearest(str(name), list(known))}")
    for name, field in known.items():
        if field.is_required() and name not in tree:
            raise ConfigError(f"cluster file {file}: {name} is missing ({field.description})")
    try:
        cluster = validate(Cluster, tree)
    except ConfigError as error:
        raise ConfigError(f"cluster file {file}: {error}") from None
    for why in _absurd(cluster):
        raise ConfigError(f"cluster file {file}: {why}")
    return cluster


def _absurd(c: Cluster) -> list[str]:
    """What no machine has, though each number alone could be."""
    found = []
    if "float32" not in c.tflops and "bf16" not in c.tflops:
        found.append("tflops needs a number for bf16 or float32, e.g. tflops: {bf16: 989.5}")
    rates = [(p, c.tflops[p]) for p in ("float32", "bf16", "fp8", "fp4") if p in c.tflops]  # type: ignore[index]
    for (wide, slow), (narrow, fast) in itertools.pairwise(rates):
        if fast < slow:
            found.append(f"tflops.{narrow}={fast:g} is below tflops.{wide}={slow:g}; narrower numbers are no slower")
    if c.domain % c.node and c.node % c.domain:
        found.append(f"domain={c.domain} must be a multiple of node={c.node}, or divide it")
    if c.cards is not None and c.node % c.cards:
        found.append(f"cards={c.cards} must divide node={c.node}, so that each serves as many GPUs")
    if c.network_gb_s > 4 * c.link_gb_s:
        found.append(
            f"network_gb_s={c.network_gb_s:g} is over 4 x link_gb_s={c.link_gb_s:g}; are they exchanged, or in Gb/s?"
        )
    if c.link_gb_s > c.memory_gb_s:
        found.append(f"link_gb_s={c.link_gb_s:g} is above memory_gb_s={c.memory_gb_s:g}, which feeds it")
    if c.tflops.get("bf16", 0) * 1e3 > 5e3 * c.memory_gb_s:
        found.append(f"tflops.bf16={c.tflops['bf16']:g} with memory_gb_s={c.memory_gb_s:g}: is one in other units?")
    return found
