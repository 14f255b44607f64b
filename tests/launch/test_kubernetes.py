"""Kubernetes manifests: what they say, and that the schema they are checked against is the API's.

The schema in the tree is written by hand; it is compared, field by field, with the classes that the Kubernetes project
and Kubeflow generate from their own API definitions. There is no cluster here; kubectl is stood in for by a script.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from moetrain_launch import kubernetes, kubernetes_schema
from moetrain_launch.job import Job, LaunchError
from moetrain_launch.settings import KubernetesConfig, LaunchConfig


def job(form: str = "pytorchjob", **settings: Any) -> Job:
    own = {"claims": {"data": "/data"}, **settings.pop("kubernetes", {})}
    given = {"container": "registry.example/moetrain:0.1", "nodes": 2, "ranks": 8, "gpus": 8, **settings}
    launch = LaunchConfig(kind="kubernetes", kubernetes=KubernetesConfig(form=form, **own), **given)
    return Job(Path("/data/runs/OLMoE_1b"), ("moetrain.cli", "train", "--resume", "/data/runs/OLMoE_1b"), launch)


def parts(cls: type[kubernetes_schema.Part]) -> dict[str, type[kubernetes_schema.Part]]:
    """The classes of the schema below ``cls``, by name."""
    found = {cls.__name__: cls}
    for field in cls.model_fields.values():
        for one in leaves(field.annotation):
            if isinstance(one, type) and issubclass(one, kubernetes_schema.Part) and one.__name__ not in found:
                found |= parts(one)
    return found


def leaves(annotation: Any) -> list[Any]:
    """The types in an annotation, without what holds them."""
    origin = get_origin(annotation)
    if origin in (list, dict, Union, UnionType):
        return [leaf for inner in get_args(annotation) for leaf in leaves(inner)]
    if origin is Annotated:
        return leaves(get_args(annotation)[0])
    return [annotation]


# Our class -> theirs, where the name is not V1 + ours
THEIRS = {"PodMeta": "V1ObjectMeta", "ServiceMeta": "V1ObjectMeta", "PyTorchJob": "KubeflowOrgV1PyTorchJob",
          "PyTorchJobSpec": "KubeflowOrgV1PyTorchJobSpec", "ReplicaSpec": "KubeflowOrgV1ReplicaSpec",
          "RunPolicy": "KubeflowOrgV1RunPolicy"}  # fmt: skip


@pytest.mark.parametrize("kind", list(kubernetes_schema.KINDS))
def test_every_field_of_the_schema_is_one_of_the_api(kind: str) -> None:
    core = pytest.importorskip("kubernetes.client")
    kubeflow = pytest.importorskip("kubeflow.training")
    for name, ours in parts(kubernetes_schema.KINDS[kind]).items():
        theirs_name = THEIRS.get(name, f"V1{name}")
        theirs = getattr(kubeflow if theirs_name.startswith("Kubeflow") else core, theirs_name)
        known = {theirs.attribute_map[attribute]: type_ for attribute, type_ in theirs.openapi_types.items()}
        for field, info in ours.model_fields.items():
            assert field in known, f"{theirs_name} has no {field}; it has {sorted(known)}"
            theirs_type = known[field]  # as "str", "dict(str, str)", "list[V1Container]", "V1PodSpec"
            origin = get_origin(info.annotation)
            if origin in (list, dict):
                assert theirs_type.lower().startswith(origin.__name__), f"{theirs_name}.{field} is {theirs_type}"
            held = [THEIRS.get(leaf.__name__, f"V1{leaf.__name__}") if hasattr(leaf, "model_fields") else
                    "str" if get_origin(leaf) is Literal else leaf.__name__
                    for leaf in leaves(info.annotation)]  # fmt: skip
            assert any(one in theirs_type for one in held), f"{theirs_name}.{field} is {theirs_type}, not of {held}"


@pytest.mark.parametrize("form", ["pytorchjob", "job"])
def test_a_manifest_reads_back_whole_and_starts_every_rank(form: str, tmp_path: Path) -> None:
    """The shell of a pod is run, with a Python that only tells how it was called, as pod 1 of 2."""
    run_dir = tmp_path / "runs/OLMoE_1b"
    one = job(form, kubernetes={"claims": {"data": str(tmp_path)}, "rdma": {"rdma/hca": 4}}, python="./python")
    one = Job(run_dir, ("moetrain.cli", "train", "--resume", str(run_dir)), one.settings)
    objects = list(yaml.safe_load_all(kubernetes.as_yaml(kubernetes.manifest(one, "seed: 1\nsteps: 'a: b'\n"))))
    assert objects[0]["data"]["config.yaml"] == "seed: 1\nsteps: 'a: b'\n"
    for made in objects:
        kubernetes_schema.check(made)
        assert made["metadata"]["labels"] == {"moetrain-run": "olmoe-1b"}
    spec = objects[-1]["spec"]
    if form == "job":
        assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
        assert (
            objects[1]["kind"] == "Service" and objects[1]["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
        )
        template, environment = spec["template"], {"JOB_COMPLETION_INDEX": "1"}
        where = ["--master-addr=olmoe-1b-0.olmoe-1b", "--master-port=29400"]
    else:
        assert {name: r["replicas"] for name, r in spec["pytorchReplicaSpecs"].items()} == {"Master": 1, "Worker": 1}
        template = spec["pytorchReplicaSpecs"]["Worker"]["template"]
        environment = {"RANK": "1", "MASTER_ADDR": "olmoe-1b-master-0", "MASTER_PORT": "23456"}
        where = ["--master-addr=olmoe-1b-master-0", "--master-port=23456"]
    [container] = template["spec"]["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8, "rdma/hca": 4}}
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\n")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script = [*container["command"][:-1], container["command"][-1].replace(kubernetes.CONFIG, str(config))]
    env = {"PATH": os.environ["PATH"], "HOSTNAME": "pod-1", **environment}
    for n in range(2):  # a pod that is started again leaves the config as it is, which a run may have written anew
        done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
        words = ["--nnodes=2", "--nproc-per-node=8", "--node-rank=1", *where]
        assert done.stdout.split() == ["-m", "torch.distributed.run", *words, "-m", *one.command], done.stderr
        assert sorted(file.name for file in run_dir.iterdir()) == ["config.yaml", "launched.yaml"]
        assert (run_dir / "config.yaml").read_text() == "seed: 1\n" + "steps: 9\n" * n
        (run_dir / "config.yaml").write_text("seed: 1\nsteps: 9\n")
    config.write_text("seed: 2\n")  # other settings, in the same place
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and f"{run_dir} holds a run" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"container": None}, "launch.container is missing"),
        ({"kubernetes": {"claims": {}}}, "run_dir /data/runs/OLMoE_1b lies on no claim"),
        ({"kubernetes": {"claims": {"data": "/dat"}}}, "run_dir /data/runs/OLMoE_1b lies on no claim"),
        ({"kubernetes": {"namespace": "My Team"}}, "ConfigMap at metadata.namespace"),
        ({"kubernetes": {"memory": "500 GB"}}, "limits.memory"),
        ({"kubernetes": {"memory": "500GiB"}}, "limits.memory: not a quantity, as 500Gi; got '500GiB'"),
        ({"kubernetes": {"node_selector": {"gpu": "a b"}}}, "nodeSelector.gpu"),
        ({"kubernetes": {"rdma": {"my card": 1}}}, "limits.my card"),
        ({"env": {"A=B": "1"}}, "env.0.name"),
        ({"container": "my image"}, "containers.0.image"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_here(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(LaunchError) as refused:
        kubernetes.manifest(job(**settings), "")
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_damage_to_a_manifest_is_noticed() -> None:
    """A field that is misspelt, of the wrong type, or against a rule between fields."""

    def damaged(path: str, value: Any) -> dict[str, Any]:
        made: Any = kubernetes.manifest(job("job"), "")[-1]
        *groups, last = path.split(".")
        at = made
        for part in groups:
            at = at[int(part)] if part.isdigit() else at[part]
        at[last] = value
        return dict(made)

    pod = "spec.template.spec"
    kubernetes_schema.check(damaged("spec.completions", 3))
    for path, value in [
        ("spec.completion", 2),
        ("spec.completions", "2"),
        (f"{pod}.restartPolicy", "Always"),
        (f"{pod}.restartPolicy", "OnFailure"),  # not beside podFailurePolicy
        (f"{pod}.containers.0.volumeMounts.0.name", "nowhere"),
        (f"{pod}.volumes.0.emptyDir", {}),
        ("metadata.name", "1b"),
        ("kind", "Jobs"),
    ]:
        with pytest.raises(LaunchError):
            kubernetes_schema.check(damaged(path, value))


KUBECTL = """#!/bin/sh
echo "$@" >> calls
case "$1" in
  apply) cat > applied ;;
  get) [ "$2" = pods ] && cat pods.json || cat job.json ;;
  api-resources) echo pytorchjobs.kubeflow.org ;;
esac
"""


def test_submit_status_and_cancel_speak_to_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Path("job.json").write_text("")
    target = kubernetes.submit(job(kubernetes={"namespace": "team"}), "seed: 1\n")
    assert target == "k8s:team/olmoe-1b"
    applied = list(yaml.safe_load_all(Path("applied").read_text()))
    assert [one["kind"] for one in applied] == ["ConfigMap", "PyTorchJob"]
    pods = [
        {"status": {"phase": "Running", "containerStatuses": [{"restartCount": 2}]}},
        {"status": {"phase": "Pending"}},
    ]
    Path("pods.json").write_text(json.dumps({"items": pods}))
    assert kubernetes.state(target) == "olmoe-1b: pods 1 Pending, 1 Running; containers restarted 2 times"
    Path("pods.json").write_text('{"items": []}')
    with pytest.raises(LaunchError, match="there are no pods of it"):
        kubernetes.state(target)
    kubernetes.cancel(target)
    last = Path("calls").read_text().splitlines()[-1]
    assert last == "delete jobs,services,configmaps,pytorchjobs -n team -l moetrain-run=olmoe-1b --wait=false"
    log = 'E1128 02:53:52.580963   13893 memcache.go:265] "Unhandled Error" err="no server"'
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\necho '{log}\nThe connection was refused' >&2; exit 1\n")
    with pytest.raises(LaunchError, match=r"^kubectl refused: The connection was refused$"):
        kubernetes.state(target)


def test_a_job_that_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has ended is taken away, since apply would not start it again; none that runs, or is another run's."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def there(run_dir: str, **status: Any) -> None:
        Path("calls").write_text("")
        Path("job.json").write_text(
            json.dumps({"metadata": {"annotations": {"moetrain-run-dir": run_dir}}, "status": status})
        )

    there("/data/runs/OLMoE_1b", conditions=[{"type": "Failed", "status": "True"}])
    kubernetes.submit(job("job"), "seed: 1\n")
    verbs = [line.split()[:3] for line in Path("calls").read_text().splitlines()]
    assert verbs == [["get", "job", "olmoe-1b"], ["delete", "job", "olmoe-1b"], ["apply", "-f", "-"]]
    there("/data/runs/OLMoE_1b", conditions=[{"type": "Running", "status": "True"}])
    with pytest.raises(LaunchError, match="k8s:default/olmoe-1b is at work already"):
        kubernetes.submit(job(), "seed: 1\n")
    there("/data/others/OLMoE_1b", conditions=[{"type": "Complete", "status": "True"}])
    with pytest.raises(LaunchError, match="the job of another run, /data/others/OLMoE_1b"):
        kubernetes.submit(job("job"), "seed: 1\n")
    assert "apply" not in Path("calls").read_text()
