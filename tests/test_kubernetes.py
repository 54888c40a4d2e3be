"""The files for Kubernetes are sound: pods by Kubernetes' own schema, the rest by what KubeRay documents.

KubeRay's own definitions are not part of the repository. With a folder of them, `helm-chart/kuberay-operator/crds` of
its repository, in KUBERAY_CRDS the files are checked against them as well.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from smallcap.config import CaptionConfig, ComputeConfig
from smallcap.machine.actor_plan import plan_actors
from tests.command_lines import parse_command
from tests.python_process import ROOT

FOLDER = ROOT / "deploy"
DOCUMENTS: dict[tuple[str, str], dict[str, Any]] = {
    (path.name, document["kind"]): document
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "alarms.yaml"
    for document in yaml.safe_load_all(path.read_text())
}
RAY = {names: document for names, document in DOCUMENTS.items() if document["apiVersion"] == "ray.io/v1"}
JOBS = {name: document["spec"] for (name, kind), document in RAY.items() if kind == "RayJob"}
SPEC: dict[str, Any] = RAY["raycluster.yaml", "RayCluster"]["spec"]
GROUPS = {"head": SPEC["headGroupSpec"]} | {group["groupName"]: group for group in SPEC["workerGroupSpecs"]}
_UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}


def fields(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    """A schema of an object that has these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# What the files use of KubeRay's API, as its reference describes it.
STRING, BOOLEAN, OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
PARAMETERS = {"type": "object", "additionalProperties": STRING}
HEAD = fields(("template",), rayStartParams=PARAMETERS, template=OBJECT)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=STRING, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=PARAMETERS, template=OBJECT,
)  # fmt: skip
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=STRING,
    authOptions=fields(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, resources=OBJECT),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = fields(
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT, shutdownAfterJobFinishes=BOOLEAN, ttlSecondsAfterFinished=COUNT, rayClusterSpec=CLUSTER,
)  # fmt: skip
NAME = fields(("name",), name={"type": "string", "pattern": "^[a-z][a-z0-9-]{0,46}$"})
WHOLE = {
    kind: fields(("metadata", "spec"), apiVersion={"const": "ray.io/v1"}, kind=STRING, metadata=NAME, spec=spec)
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((name, group["template"]["spec"]) for name, group in GROUPS.items())


def container(group: str) -> dict[str, Any]:
    (only,) = GROUPS[group]["template"]["spec"]["containers"]
    return dict(only)


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


@pytest.mark.parametrize("names", RAY, ids=lambda names: names[0])
def test_a_file_has_only_fields_that_kuberay_has(names: tuple[str, str]) -> None:
    jsonschema.validate(RAY[names], WHOLE[names[1]])
    misspelt = RAY[names] | {"spec": RAY[names]["spec"] | {"shutdownAfterJobFinish": True}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelt, WHOLE[names[1]])


def test_pods_and_access_fit_the_schema_of_kubernetes() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    version = kubernetes.latest_version()
    documents = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod} for name, pod in pods()]
    for document in [*documents, *(document for (file, _), document in DOCUMENTS.items() if file == "access.yaml")]:
        kubernetes.validate(document, version, strict=True)
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(documents[0] | {"spec": {"container": []}}, version, strict=True)


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's definitions")
@pytest.mark.parametrize("names", RAY, ids=lambda names: names[0])
def test_a_file_fits_kuberays_definition(names: tuple[str, str]) -> None:
    file = Path(os.environ["KUBERAY_CRDS"], f"ray.io_{names[1].lower()}s.yaml")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    closed_schema = closed(schema)
    closed_schema["properties"]["metadata"] = OBJECT
    jsonschema.validate(RAY[names], closed_schema)


def closed(schema: Any) -> Any:
    """Returns a schema whose objects have no fields that it does not name, and whose quantities may be numbers."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(item) for name, item in schema.items()}
    if inner.get("x-kubernetes-int-or-string"):
        inner.pop("type", None)
    if inner.get("type") == "object" and isinstance(inner.get("properties"), dict):
        inner.setdefault("additionalProperties", False)
    return inner


def test_the_jobs_run_on_the_cluster_of_the_third_file() -> None:
    assert set(JOBS) == {"rayjob-caption.yaml", "rayjob-build-index.yaml"}
    for spec in JOBS.values():
        assert spec["rayClusterSpec"] == SPEC


def test_a_job_ends_its_cluster_and_is_tried_again() -> None:
    for spec in JOBS.values():
        assert spec["shutdownAfterJobFinishes"]
        assert spec["ttlSecondsAfterFinished"] > 0  # which KubeRay allows only with the other one
        assert spec["backoffLimit"] > 0


@pytest.mark.parametrize("command", ["caption", "build-index"])
def test_the_entry_points_are_commands_that_wait_for_the_autoscaler(command: str) -> None:
    name, (config, *_) = parse_command(JOBS[f"rayjob-{command}.yaml"]["entrypoint"])
    assert name == command
    compute: ComputeConfig = config.compute  # type: ignore[attr-defined]
    nodes = [{}, {"CPU": float(container("cpu")["resources"]["limits"]["cpu"])}]  # what is there when it begins
    plan = plan_actors(compute, nodes)
    assert (plan.device, plan.max_actors) == ("cuda", GROUPS["gpu"]["maxReplicas"])
    if isinstance(config, CaptionConfig):
        assert config.retrieval.cache_dir in {mount["mountPath"] for mount in container("gpu")["volumeMounts"]}


def test_the_head_does_no_work_and_is_not_on_a_spot_node() -> None:
    head = GROUPS["head"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container("head")["resources"]["limits"]
    assert "tolerations" not in head["template"]["spec"]
    affinity = yaml.safe_dump(head["template"]["spec"]["affinity"])
    spot = {toleration["key"] for toleration in GROUPS["gpu"]["template"]["spec"]["tolerations"]} - {"nvidia.com/gpu"}
    assert len(spot) == 2
    for key in spot:
        assert key in affinity


def test_workers_come_and_go() -> None:
    assert SPEC["enableInTreeAutoscaling"]
    gpu, cpu = GROUPS["gpu"], GROUPS["cpu"]
    assert (gpu["minReplicas"], container("gpu")["resources"]["limits"]["nvidia.com/gpu"]) == (0, "1")
    assert cpu["minReplicas"] > 0  # a cluster without a CPU cannot list
    assert "nvidia.com/gpu" not in container("cpu")["resources"]["limits"]
    assert "nvidia.com/gpu" in {toleration["key"] for toleration in gpu["template"]["spec"]["tolerations"]}
    assert "nvidia.com/gpu" not in {toleration["key"] for toleration in cpu["template"]["spec"]["tolerations"]}
    for _, pod in pods():
        assert pod["restartPolicy"] == "Never"  # autoscaler v2 replaces pods itself


@pytest.mark.parametrize("group", GROUPS)
def test_the_object_store_fits_into_shared_memory_and_that_into_the_pod(group: str) -> None:
    volumes = {volume["name"]: volume["emptyDir"] for volume in GROUPS[group]["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
    shared = volumes[mounts["/dev/shm"]]
    assert shared["medium"] == "Memory"
    store = int(GROUPS[group]["rayStartParams"]["object-store-memory"])
    memory = bytes_of(container(group)["resources"]["limits"]["memory"])
    assert store < bytes_of(shared["sizeLimit"]) < memory / 2
    assert set(mounts.values()) == set(volumes)


@pytest.mark.parametrize("group", GROUPS)
def test_all_pods_are_one_image_without_root_with_the_same_access(group: str) -> None:
    pod = GROUPS[group]["template"]["spec"]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (FOLDER / "Dockerfile").read_text(), re.M)
    assert (str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["runAsGroup"])) == user
    assert pod["securityContext"]["runAsNonRoot"]
    image = container(group)["image"]
    assert image == container("head")["image"]
    assert re.search(r":\d[\w.]*$", image)
    assert pod["serviceAccountName"] == DOCUMENTS["access.yaml", "ServiceAccount"]["metadata"]["name"]
    (source,) = container(group)["envFrom"]
    assert source["secretRef"] == {"name": DOCUMENTS["access.yaml", "Secret"]["metadata"]["name"], "optional": True}
    assert DOCUMENTS["access.yaml", "Secret"]["stringData"] == {}


def test_the_cluster_asks_for_a_token_and_has_the_ray_of_the_image() -> None:
    assert SPEC["authOptions"]["mode"] == "token"
    (ray,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert SPEC["rayVersion"] == ray
