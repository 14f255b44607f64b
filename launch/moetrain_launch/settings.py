"""The settings of a launch: where a run starts, on how many machines, and what the scheduler there is asked for.

They are the group ``launch`` of the config; a cluster's own are best kept as a preset (docs/cluster.md).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


@dataclass(config=STRICT)
class SlurmConfig:
    """What sbatch is asked for."""

    partition: str | None = Field(default=None, description="partition; null: the cluster's default")
    account: str | None = Field(default=None, description="account that pays for the job; null: your default")
    qos: str | None = Field(default=None, description="quality of service; null: your default")
    constraint: str | None = Field(default=None, description="node features to ask for, as 'h100&ib'")
    reservation: str | None = Field(default=None, description="reservation to run in")
    time: int | str = Field(
        default="24:00:00", description="time limit of one start: 30 (minutes), 12:00:00 or 2-00:00:00"
    )
    mem: str | None = Field(default=None, description="memory per node, as 500G; null: what the partition gives")
    signal_s: NonNegative = Field(
        default=180, description="seconds before the limit at which ranks get SIGUSR1, save and go back to the queue"
    )
    container_with: Literal["pyxis", "apptainer"] = Field(
        default="pyxis", description="what runs launch.container: srun's Pyxis plugin, or apptainer"
    )
    extra: list[str] = Field(default_factory=list, description="further options of sbatch, as ['--exclusive']")


@dataclass(config=STRICT)
class KubernetesConfig:
    """What the manifest says."""

    form: Literal["pytorchjob", "job"] = Field(
        default="pytorchjob", description="PyTorchJob (Kubeflow's training operator), or a plain Indexed Job"
    )
    namespace: str = Field(default="default", description="namespace")
    claims: dict[str, str] = Field(
        default_factory=dict,
        description="persistent volume claims and where they are mounted: one of them holds run_dir, as {data: /data}",
    )
    memory: str | None = Field(default=None, description="memory per pod, as 500Gi; null: no limit")
    shm: str = Field(default="16Gi", description="size of /dev/shm, through which NCCL and data workers share memory")
    rdma: dict[str, Positive] = Field(
        default_factory=dict,
        description="RDMA devices per pod, as {rdma/hca: 8} or {vpc.amazonaws.com/efa: 4}; pods may then lock memory",
    )
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that nodes must have")
    service_account: str | None = Field(default=None, description="service account of the pods")
    grace_s: Positive = Field(default=120, description="seconds that an evicted pod has to save")


@dataclass(config=STRICT)
class LaunchConfig:
    """How 'moetrain launch' starts a run; 'moetrain train' reads only the numbers of nodes and ranks."""

    kind: Literal["local", "slurm", "kubernetes"] = Field(
        default="local", description="torchrun on this machine, a Slurm job, or a Kubernetes job"
    )
    ranks: Positive = Field(
        default=1,
        description="processes per node; those of this machine (torchrun) when not already started by a launcher",
    )
    nodes: Positive = Field(default=1, description="machines")
    min_nodes: Positive | None = Field(
        default=None, description="local: go on with as few machines as this (elastic); null: all of them are needed"
    )
    rendezvous: str | None = Field(
        default=None, description="local, several nodes: HOST:PORT of one of them, the same on all"
    )
    restarts: NonNegative = Field(default=3, description="times that a run whose ranks failed is started again")
    gpus: NonNegative = Field(default=0, description="GPUs to ask for, per node")
    cpus: NonNegative = Field(default=0, description="CPU cores to ask for, per rank; 0: the scheduler's default")
    at_once: Positive = Field(default=16, description="slurm, launch -m: runs of a sweep at work at a time")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the ranks, as {NCCL_DEBUG: WARN}")
    setup: list[str] = Field(default_factory=list, description="slurm: shell lines before the ranks, as module load")
    container: str | None = Field(default=None, description="image to run in")
    mounts: list[str] = Field(default_factory=list, description="slurm: folders to mount in the container, as /data")
    python: str | None = Field(
        default=None, description="Python of the ranks; null: the one that launches, or 'python' in a container"
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig, description="Slurm")
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig, description="Kubernetes")

    @property
    def world(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks
