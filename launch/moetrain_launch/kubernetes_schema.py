"""The part of the Kubernetes API that the manifests use, so that they are checked before a cluster sees them.

Written from the public reference: kubernetes.io/docs/reference/kubernetes-api (v1 ConfigMap, Service and pod templates;
batch/v1 Job) and the training operator's API reference (kubeflow.org/v1 PyTorchJob). Unknown fields are refused, as
``kubectl apply --validate=strict`` does; fields that the manifests have no use for are left out.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from moetrain_launch.job import LaunchError

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]  # RFC 1123
ServiceName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]  # RFC 1035
Subdomain = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
LabelKey = Annotated[str, Field(pattern=r"^([-.a-z0-9]{1,253}/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?$")]
EnvName = Annotated[str, Field(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")]


def _quantity(value: int | str) -> int | str:
    """resource.Quantity: a number with a binary or decimal suffix, or an exponent."""
    if isinstance(value, str) and not re.fullmatch(
        r"[+]?(\d+(\.\d*)?|\.\d+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?\d+))?", value
    ):
        raise ValueError("not a quantity, as 500Gi")
    return value


Quantity = Annotated[int | str, AfterValidator(_quantity)]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^:]*$")]
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ObjectMeta(Part):
    name: Subdomain
    namespace: Label
    labels: dict[LabelKey, LabelValue] = {}
    annotations: dict[LabelKey, str] = {}


class PodMeta(Part):
    labels: dict[LabelKey, LabelValue] = {}


class EnvVar(Part):
    name: EnvName
    value: str


class VolumeMount(Part):
    name: Label
    mountPath: AbsolutePath


class ResourceRequirements(Part):
    limits: dict[LabelKey, Quantity] = {}


class Capabilities(Part):
    add: list[Annotated[str, Field(pattern=r"^[A-Z_]+$")]]


class SecurityContext(Part):
    capabilities: Capabilities


class Container(Part):
    name: Label
    image: Annotated[str, Field(pattern=r"^\S+$")]
    command: list[str]
    env: list[EnvVar] = []
    volumeMounts: list[VolumeMount] = []
    resources: ResourceRequirements | None = None
    securityContext: SecurityContext | None = None


class PersistentVolumeClaimVolumeSource(Part):
    claimName: Subdomain


class ConfigMapVolumeSource(Part):
    name: Subdomain


class EmptyDirVolumeSource(Part):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None


class Volume(Part):
    name: Label
    persistentVolumeClaim: PersistentVolumeClaimVolumeSource | None = None
    configMap: ConfigMapVolumeSource | None = None
    emptyDir: EmptyDirVolumeSource | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Volume:
        if sum(source is not None for source in (self.persistentVolumeClaim, self.configMap, self.emptyDir)) != 1:
            raise ValueError("a volume has one source")
        return self


class PodSpec(Part):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    subdomain: Label | None = None
    terminationGracePeriodSeconds: Count | None = None
    nodeSelector: dict[LabelKey, LabelValue] = {}
    serviceAccountName: Subdomain | None = None

    @model_validator(mode="after")
    def _names(self) -> PodSpec:
        names = [volume.name for volume in self.volumes]
        mounts = [mount for container in self.containers for mount in container.volumeMounts]
        if len(set(names)) != len(names) or len({mount.mountPath for mount in mounts}) != len(mounts):
            raise ValueError("volume names and mount paths must differ")
        if absent := {mount.name for mount in mounts} - set(names):
            raise ValueError(f"mounts of volumes that there are not: {sorted(absent)}")
        return self


class PodTemplateSpec(Part):
    metadata: PodMeta
    spec: PodSpec


class ConfigMap(Part):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: ObjectMeta
    data: dict[Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")], str]

    @model_validator(mode="after")
    def _size(self) -> ConfigMap:
        if sum(len(text.encode()) for text in self.data.values()) > 2**20:
            raise ValueError("a ConfigMap holds 1 MiB")
        return self


class ServicePort(Part):
    name: Label
    port: Port


class ServiceSpec(Part):
    clusterIP: Literal["None"]
    publishNotReadyAddresses: bool
    selector: dict[LabelKey, LabelValue]
    ports: list[ServicePort]


class ServiceMeta(ObjectMeta):
    name: ServiceName


class Service(Part):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: ServiceMeta
    spec: ServiceSpec


class PodFailurePolicyOnPodConditionsPattern(Part):
    type: str
    status: Literal["True", "False", "Unknown"]


class PodFailurePolicyRule(Part):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onPodConditions: list[PodFailurePolicyOnPodConditionsPattern]


class PodFailurePolicy(Part):
    rules: Annotated[list[PodFailurePolicyRule], Field(max_length=20)]


class JobSpec(Part):
    completions: Count
    parallelism: Count
    completionMode: Literal["Indexed", "NonIndexed"]
    backoffLimit: Count
    podFailurePolicy: PodFailurePolicy | None = None
    template: PodTemplateSpec

    @model_validator(mode="after")
    def _policies(self) -> JobSpec:
        if self.template.spec.restartPolicy not in ("Never", "OnFailure"):
            raise ValueError("the pods of a job have restartPolicy Never or OnFailure")
        if self.podFailurePolicy is not None and self.template.spec.restartPolicy != "Never":
            raise ValueError("podFailurePolicy needs restartPolicy Never")
        return self


class Job(Part):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: ServiceMeta  # its pods are hosts NAME-0, NAME-1 ...
    spec: JobSpec


class ReplicaSpec(Part):
    replicas: Count
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: PodTemplateSpec

    @model_validator(mode="after")
    def _container(self) -> ReplicaSpec:
        if "pytorch" not in [container.name for container in self.template.spec.containers]:
            raise ValueError("the operator needs a container called pytorch")
        return self


class RunPolicy(Part):
    backoffLimit: Count
    cleanPodPolicy: Literal["All", "Running", "None"]


class PyTorchJobSpec(Part):
    runPolicy: RunPolicy
    pytorchReplicaSpecs: dict[Literal["Master", "Worker"], ReplicaSpec]


class PyTorchJob(Part):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: ServiceMeta  # its pods are hosts NAME-master-0, NAME-worker-0 ...
    spec: PyTorchJobSpec


KINDS: dict[str, type[Part]] = {"ConfigMap": ConfigMap, "Service": Service, "Job": Job, "PyTorchJob": PyTorchJob}


def check(manifest: dict[str, Any]) -> None:
    """Raise LaunchError, with the path in the manifest, unless the API would take it."""
    kind = manifest.get("kind", "")
    if kind not in KINDS:
        raise LaunchError(f"the manifest has kind {kind!r}; known: {', '.join(KINDS)}")
    try:
        KINDS[kind].model_validate(manifest)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where, why = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        raise LaunchError(f"Kubernetes would refuse {kind} at {where}: {why}; got {problem['input']!r:.60}") from None
