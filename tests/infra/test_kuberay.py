"""The KubeRay files: known fields only, locked down, and a command line that our own parser takes."""

import os
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config import load_config
from pipeline.settings import Settings
from tests.infra.facts import ROOT, parse_command, pinned

KUBERAY = ROOT / "infra" / "kuberay"
UID = 10001  # of infra/Dockerfile

# Fields of ray.io/v1 that the files may use, each with those inside it; None: a value, {}: any keys.
CONTAINER: dict[str, Any] = {
    "name": None,
    "image": None,
    "securityContext": {
        "allowPrivilegeEscalation": None,
        "readOnlyRootFilesystem": None,
        "capabilities": {"drop": None},
    },
    "resources": {"requests": {}, "limits": {}},
    "volumeMounts": {"name": None, "mountPath": None},
}
POD = {
    "spec": {
        "serviceAccountName": None,
        "automountServiceAccountToken": None,
        "securityContext": {
            "runAsNonRoot": None,
            "runAsUser": None,
            "runAsGroup": None,
            "fsGroup": None,
            "seccompProfile": {"type": None},
        },
        "containers": CONTAINER,
        "volumes": {"name": None, "emptyDir": {"sizeLimit": None}},
    }
}
RAY_JOB_SPEC = {
    "submissionMode": None,
    "entrypoint": None,
    "shutdownAfterJobFinishes": None,
    "ttlSecondsAfterFinished": None,
    "activeDeadlineSeconds": None,
    "backoffLimit": None,
    "rayClusterSpec": {
        "rayVersion": None,
        "authOptions": {"mode": None},
        "headGroupSpec": {"rayStartParams": {}, "template": POD},
        "workerGroupSpecs": {
            "groupName": None,
            "replicas": None,
            "minReplicas": None,
            "maxReplicas": None,
            "rayStartParams": {},
            "template": POD,
        },
    },
}
ALLOWED = {
    "rayjob": {"apiVersion": None, "kind": None, "metadata": {}, "spec": RAY_JOB_SPEC},
    "raycronjob": {
        "apiVersion": None,
        "kind": None,
        "metadata": {},
        "spec": {"schedule": None, "timeZone": None, "jobTemplate": RAY_JOB_SPEC},
    },
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())


def job_spec(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    return spec["jobTemplate"] if name == "raycronjob" else spec


def unknown_fields(value: Any, allowed: dict[str, Any] | None, path: str = "") -> list[str]:
    if isinstance(value, list):
        return [fault for item in value for fault in unknown_fields(item, allowed, path)]
    if not isinstance(value, dict) or allowed == {}:
        return []
    if allowed is None:
        return [f"{path} must be a value"]
    return [
        fault
        for key, inner in value.items()
        for fault in (unknown_fields(inner, allowed[key], f"{path}.{key}") if key in allowed else [f"{path}.{key}"])
    ]


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_only_known_fields_are_used(name):
    document = load(name)
    assert unknown_fields(document, ALLOWED[name]) == []
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"].lower() == name


def test_an_unknown_field_would_be_found():
    planted = load("rayjob")
    planted["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    planted["spec"]["schedule"] = "* * * * *"
    faults = [".spec.rayClusterSpec.workerGroupSpecs.minReplica", ".spec.schedule"]
    assert sorted(unknown_fields(planted, ALLOWED["rayjob"])) == faults


def test_the_cron_variant_runs_the_same_job():
    assert job_spec("raycronjob") == job_spec("rayjob")
    cron = load("raycronjob")["spec"]
    assert len(cron["schedule"].split()) == 5
    assert cron["timeZone"] == "Etc/UTC"


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_the_command_line_is_one_that_the_job_takes(name):
    script, arguments = parse_command(shlex.split(job_spec(name)["entrypoint"]))
    assert script == ROOT / "jobs" / "nightly_candidates.py"
    settings = load_config(Settings, arguments.config, arguments.set)
    assert settings.root.startswith("s3://"), "several nodes share no disk"


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_the_cluster_goes_away_and_cannot_wait_for_ever(name):
    spec = job_spec(name)
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    deadline = load_config(Settings, ROOT / "conf" / "nightly.yaml").cluster.deadline_minutes * 60
    assert spec["activeDeadlineSeconds"] > deadline, "the job ends itself first, with its own exit code"
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_ray_is_the_pinned_version_and_asks_for_a_token(name):
    cluster = job_spec(name)["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_every_pod_is_locked_down(name):
    cluster = job_spec(name)["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == UID
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert ":" in container["image"]
        assert not container["image"].endswith(":latest")
        writable = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert writable == {"/tmp", "/home/nightrails"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_the_whole_schema_of_the_operator_where_it_is_at_hand(name):
    """NIGHTRAILS_KUBERAY_CRDS: the folder ray-operator/config/crd/bases of a KubeRay checkout."""
    folder = os.environ.get("NIGHTRAILS_KUBERAY_CRDS")
    if not folder:
        pytest.skip("NIGHTRAILS_KUBERAY_CRDS names no folder of KubeRay's CRDs, which are a megabyte each and not ours")
    crd = yaml.load((Path(folder) / f"ray.io_{name}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(load(name))] == []
    planted = load(name)
    planted["spec"]["surprise"] = True
    assert not validator.is_valid(planted)


def closed(schema: Any) -> Any:
    """The schema, refusing keys that it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: closed(value) for key, value in schema.items()}
    if changed.pop("x-kubernetes-int-or-string", None):
        changed.pop("type", None)
    if changed.get("type") == "object" and "properties" in changed:
        changed.setdefault("additionalProperties", False)
    return changed
