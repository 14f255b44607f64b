"""A run as a Kubernetes manifest: a PyTorchJob of Kubeflow's training operator, or a plain Indexed Job.

One pod is one node; torchrun in it starts the ranks. The run directory lies on a persistent volume claim, so that a pod
that is started again goes on from the newest checkpoint. The config travels in the manifest, as a ConfigMap.
"""

from __future__ import annotations

import json
import shlex
from pathlib import PurePosixPath
from typing import Any

import yaml

from moetrain_launch import kubernetes_schema
from moetrain_launch.job import Job, LaunchError, ask

ABSENT = "write the manifest with --print and apply it where kubectl is, or use launch=local"
CONFIG = "/etc/moetrain/config.yaml"
PORT = 29400

RUN_DIR = "moetrain-run-dir"  # an annotation: names are made of the last folder alone
OVER = ("Complete", "Succeeded", "Failed")  # conditions of a job that has ended

# A pod may be the first to see the run directory; rename is what makes the config whole for all of them. A run may
# write its config anew, so what it was launched with is kept beside it.
SCRIPT = """\
set -eu
mkdir -p {run_dir}
if [ ! -f {run_dir}/config.yaml ]; then
  for name in launched.yaml config.yaml; do
    cp {config} {run_dir}/$name.$HOSTNAME
    mv {run_dir}/$name.$HOSTNAME {run_dir}/$name
  done
elif [ -f {run_dir}/launched.yaml ] && [ "$(cat {config})" != "$(cat {run_dir}/launched.yaml)" ]; then
  echo {run_dir} holds a run that was launched with other settings, see its launched.yaml. Choose another run_dir >&2
  exit 2
fi
exec {python} -m torch.distributed.run --nnodes={nodes} --nproc-per-node={ranks} --node-rank={node} \\
  --master-addr={address} --master-port={port} -m {command}
"""


def manifest(job: Job, config: str) -> list[dict[str, Any]]:
    """The objects to apply, checked against the schema. config: text of the run's ``config.yaml``.

    Raises LaunchError: no image, no claim that holds the run directory, or a value that Kubernetes would refuse.
    """
    s, k = job.settings, job.settings.kubernetes
    if s.container is None:
        raise LaunchError("launch.container is missing; Kubernetes needs an image")
    if not any(PurePosixPath(job.run_dir).is_relative_to(mount) for mount in k.claims.values()):
        raise LaunchError(
            f"run_dir {job.run_dir} lies on no claim, so it would be lost with the pod; mount one that holds it, as "
            f"launch.kubernetes.claims={{data: /data}} run_dir=/data/runs/a"
        )
    of_config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job, f"{job.name}-config"),
                 "data": {"config.yaml": config}}  # fmt: skip
    objects = [of_config, *(_pytorch_job(job) if k.form == "pytorchjob" else _indexed_job(job))]
    for one in objects:
        kubernetes_schema.check(one)
    return objects


def as_yaml(objects: list[dict[str, Any]]) -> str:
    """The manifest as one file, to be read: text with line breaks as a block, every part written whole."""
    return yaml.dump_all(objects, Dumper=_Readable, sort_keys=False, width=110)


class _Readable(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Readable.add_representer(str, _Readable.represent_str)


def submit(job: Job, config: str) -> str:
    """Apply the manifest; the name by which ``status``, ``logs`` and ``cancel`` know it. A job of the same run that has
    ended makes room, as Kubernetes starts none again. Raises LaunchError: it has not, or is that of another run."""
    objects = manifest(job, config)
    target = f"k8s:{job.settings.kubernetes.namespace}/{job.name}"
    one = [objects[-1]["kind"].lower(), job.name, "-n", job.settings.kubernetes.namespace]
    found = ask(["kubectl", "get", *one, "--ignore-not-found", "-o", "json"], ABSENT)
    if found.strip():
        there = json.loads(found)
        other = there["metadata"].get("annotations", {}).get(RUN_DIR, str(job.run_dir))
        if other != str(job.run_dir):
            raise LaunchError(
                f"{target} is the job of another run, {other}, and names are made of the last folder; choose another "
                f"for run_dir, or do away with that job: moetrain launch cancel {target}"
            )
        conditions = there.get("status", {}).get("conditions") or []
        if not any(c["type"] in OVER and c["status"] == "True" for c in conditions):
            raise LaunchError(f"{target} is at work already; see 'moetrain launch status {target}'")
        ask(["kubectl", "delete", *one, "--timeout=50s"], ABSENT)
    ask(["kubectl", "apply", "-f", "-"], ABSENT, as_yaml(objects))
    return target


def state(target: str) -> str:
    """How many pods of ``target`` ("k8s:NAMESPACE/NAME") are in which phase. Raises LaunchError."""
    namespace, name = _parts(target)
    found = json.loads(
        ask(["kubectl", "get", "pods", "-n", namespace, "-l", f"moetrain-run={name}", "-o", "json"], ABSENT)
    )
    if not found["items"]:
        raise LaunchError(f"{target}: there are no pods of it; see 'kubectl get jobs,pytorchjobs -n {namespace}'")
    phases = [pod["status"].get("phase", "Unknown") for pod in found["items"]]
    counts = ", ".join(f"{phases.count(phase)} {phase}" for phase in sorted(set(phases)))
    restarts = sum(s["restartCount"] for pod in found["items"] for s in pod["status"].get("containerStatuses", []))
    return f"{name}: pods {counts}" + (f"; containers restarted {restarts} times" if restarts else "")


def logs(target: str, lines: int, follow: bool) -> list[str]:
    """The command that shows the logs of ``target``."""
    namespace, name = _parts(target)
    words = ["kubectl", "logs", "-n", namespace, "-l", f"moetrain-run={name}", "--prefix", f"--tail={lines}"]
    return words + (["--follow"] if follow else [])


def cancel(target: str) -> str:
    """Delete what ``submit`` made, but nothing on the volume. Raises LaunchError."""
    namespace, name = _parts(target)
    label = f"moetrain-run={name}"
    kinds = ask(["kubectl", "api-resources", "--api-group=kubeflow.org", "-o", "name"], ABSENT)
    what = "jobs,services,configmaps" + (",pytorchjobs" if "pytorchjobs" in kinds else "")
    ask(["kubectl", "delete", what, "-n", namespace, "-l", label, "--wait=false"], ABSENT)
    return f"{target} was deleted; its run directory stays"


def _parts(target: str) -> tuple[str, str]:
    namespace, _, name = target.removeprefix("k8s:").partition("/")
    if not namespace or not name:
        raise LaunchError(f"{target} is no job of Kubernetes; write k8s:NAMESPACE/NAME")
    return namespace, name


def _metadata(job: Job, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": job.settings.kubernetes.namespace, "labels": {"moetrain-run": job.name},
            "annotations": {RUN_DIR: str(job.run_dir)}}  # fmt: skip


def _pytorch_job(job: Job) -> list[dict[str, Any]]:
    """The operator sets MASTER_ADDR and RANK, the number of the pod."""
    pod = _pod(job, node="$RANK", address="$MASTER_ADDR", port="$MASTER_PORT")
    replicas = {"Master": 1, "Worker": job.settings.nodes - 1}
    specs = {
        name: {"replicas": count, "restartPolicy": "OnFailure", "template": pod}
        for name, count in replicas.items()
        if count
    }
    policy = {"backoffLimit": job.settings.restarts, "cleanPodPolicy": "Running"}
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(job, job.name),
             "spec": {"runPolicy": policy, "pytorchReplicaSpecs": specs}}]  # fmt: skip


def _indexed_job(job: Job) -> list[dict[str, Any]]:
    """Pods have stable names NAME-0, NAME-1 ... under a headless service of the same name. An evicted pod is started
    again without being counted as a failure."""
    nodes = job.settings.nodes
    pod = _pod(job, node="$JOB_COMPLETION_INDEX", address=f"{job.name}-0.{job.name}", port=str(PORT))
    pod["spec"] |= {"restartPolicy": "Never", "subdomain": job.name}
    ports = [{"name": "rendezvous", "port": PORT}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(job, job.name),
               "spec": {"clusterIP": "None", "publishNotReadyAddresses": True,
                        "selector": {"moetrain-run": job.name}, "ports": ports}}  # fmt: skip
    ignore = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    spec = {
        "completions": nodes,
        "parallelism": nodes,
        "completionMode": "Indexed",
        "backoffLimit": job.settings.restarts * nodes,
        "podFailurePolicy": {"rules": [ignore]},
        "template": pod,
    }
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job, job.name), "spec": spec}]


def _pod(job: Job, node: str, address: str, port: str) -> dict[str, Any]:
    """The template of a pod, which is one node. node, address, port: as its shell finds them."""
    s, k = job.settings, job.settings.kubernetes
    script = SCRIPT.format(run_dir=shlex.quote(str(job.run_dir)), config=CONFIG, python=shlex.quote(job.python),
                           nodes=s.nodes, ranks=s.ranks, node=node, address=address, port=port,
                           command=shlex.join(job.command))  # fmt: skip
    limits: dict[str, Any] = {"nvidia.com/gpu": s.gpus} if s.gpus else {}
    limits |= {"cpu": s.cpus * s.ranks} if s.cpus else {}
    limits |= {"memory": k.memory} if k.memory else {}
    limits |= k.rdma
    mounts = [{"name": f"claim-{claim}", "mountPath": path} for claim, path in k.claims.items()]
    volumes: list[dict[str, Any]] = [
        {"name": f"claim-{claim}", "persistentVolumeClaim": {"claimName": claim}} for claim in k.claims
    ]
    mounts += [
        {"name": "config", "mountPath": str(PurePosixPath(CONFIG).parent)},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes += [{"name": "config", "configMap": {"name": f"{job.name}-config"}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": k.shm}}]  # fmt: skip
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": s.container,
        "command": ["bash", "-c", script],
        "env": [{"name": name, "value": value} for name, value in sorted(s.env.items())],
        "volumeMounts": mounts,
    }
    if limits:
        container["resources"] = {"limits": limits}
    if k.rdma:  # a network card reads and writes memory that is locked, of which a container may lock 64 KiB
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": k.grace_s, "containers": [container], "volumes": volumes
    }  # fmt: skip
    if k.node_selector:
        spec["nodeSelector"] = k.node_selector
    if k.service_account:
        spec["serviceAccountName"] = k.service_account
    return {"metadata": {"labels": {"moetrain-run": job.name}}, "spec": spec}
