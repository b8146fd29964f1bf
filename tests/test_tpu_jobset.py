"""The manifest for Kubernetes: its fields exist, overrides arrive, and what stops large jobs is found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloud import FOLDER, run

JOB = {
    "NAME": "run-1",
    "IMAGE": "registry/vl_jax:1",
    "CONFIG": "experiments/x.py",
    "WORKDIR": "/runs/a b",
    "TOPOLOGY": "v6e:4x4",
    "CLAIM": "runs-claim",
}
SHARED = {"NAMESPACE": "team", "QUEUE": "team-queue", "PRIORITY": "high", "RESERVATION": "ours"}
TRAIN = ["python", "-m", "vl_jax", "train", "--config=experiments/x.py", "--workdir=/runs/a b"]


class Map(dict[str, Any]):
    """An object of a schema: its fields with their kinds; those in ``required`` must be there."""

    def __init__(self, required: str = "", **fields: Any):
        super().__init__(fields)
        self.required = required.split()


def check(value: Any, kind: Any, path: str = "") -> None:
    """Raises unless a value is of a kind: a type, a pattern, a list a map of fields or of texts."""
    if isinstance(kind, Map):
        assert isinstance(value, dict), path
        unknown, missing = set(value) - set(kind), set(kind.required) - set(value)
        assert not unknown and not missing, f"{path}: unknown {unknown}, missing {missing}"
        for name, part in value.items():
            check(part, kind[name], f"{path}.{name}")
    elif isinstance(kind, list):
        assert isinstance(value, list) and value, path
        for number, part in enumerate(value):
            check(part, kind[0], f"{path}[{number}]")
    elif isinstance(kind, str):
        assert isinstance(value, str) and re.fullmatch(kind, value), f"{path}: {value!r}"
    elif kind is TEXTS:
        assert isinstance(value, dict), path
        assert all(isinstance(text, str) for pair in value.items() for text in pair), f"{path}: {value}"
    else:
        assert type(value) is kind, f"{path}: {value!r}"


# The fields of a JobSet as kubernetes-sigs/jobset publishes them (api/jobset/v1alpha2/jobset_types.go, from
# which its CRD is made); those of Job and Pod as https://kubernetes.io/docs/reference/ lists them, as far as
# the manifest uses them.
TEXTS = object()
LABEL = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
OPERATOR = "All|Any"
ACTION = "FailJobSet|(RestartJobSet|RestartJob)(AndIgnoreMaxRestarts)?"
METADATA = Map(name=LABEL, namespace=LABEL, labels=TEXTS, annotations=TEXTS)
RESOURCES = Map(requests=Map(**{"google.com/tpu": int}), limits=Map(**{"google.com/tpu": int}))
CLAIM = Map("claimName", claimName=LABEL, readOnly=bool)
CONTAINER = Map(
    "name image",
    name=LABEL,
    image=r"\S+",
    command=["(?s).*"],
    env=[Map("name value", name="[A-Z_]+", value=".*")],
    ports=[Map("containerPort", containerPort=int)],
    resources=RESOURCES,
    volumeMounts=[Map("name mountPath", name=LABEL, mountPath="/.*", readOnly=bool)],
)
TOLERATION = Map(key=r"\S+", operator="Exists|Equal", value=".*", effect="NoSchedule")
POD = Map(
    "containers restartPolicy",
    restartPolicy="Never",  # which a podFailurePolicy needs
    terminationGracePeriodSeconds=int,
    nodeSelector=TEXTS,
    tolerations=[TOLERATION],
    containers=[CONTAINER],
    volumes=[Map("name persistentVolumeClaim", name=LABEL, persistentVolumeClaim=CLAIM)],
)
EXIT_CODES = Map("operator values", containerName=LABEL, operator="In|NotIn", values=[int])
FAILURES = Map("action", action="FailJob|Ignore|Count|FailIndex", onExitCodes=EXIT_CODES)
JOB_SPEC = Map(
    "template",
    parallelism=int,
    completions=int,
    backoffLimit=int,
    podFailurePolicy=Map("rules", rules=[FAILURES]),
    template=Map("spec", metadata=METADATA, spec=POD),
)
JOBSET = Map(
    "apiVersion kind metadata spec",
    apiVersion="jobset.x-k8s.io/v1alpha2",
    kind="JobSet",
    metadata=METADATA,
    spec=Map(
        replicatedJobs=[
            Map(
                "name template",
                name=LABEL,
                groupName=LABEL,
                template=Map("spec", metadata=METADATA, spec=JOB_SPEC),
                replicas=int,
                dependsOn=[Map("name status", name=LABEL, status="Ready|Complete")],
            )
        ],
        network=Map(enableDNSHostnames=bool, subdomain=LABEL, publishNotReadyAddresses=bool),
        successPolicy=Map("operator", operator=OPERATOR, targetReplicatedJobs=[LABEL]),
        failurePolicy=Map(
            maxRestarts=int,
            restartStrategy="Recreate|BlockingRecreate|InPlaceRestart",
            rules=[
                Map(
                    "name action",
                    name="[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
                    action=ACTION,
                    onJobFailureReasons=["BackoffLimitExceeded|DeadlineExceeded|PodFailurePolicy"],
                    onJobFailureMessagePatterns=[".*"],
                    targetReplicatedJobs=[LABEL],
                )
            ],
        ),
        startupPolicy=Map("startupPolicyOrder", startupPolicyOrder="AnyOrder|InOrder"),
        suspend=bool,
        coordinator=Map("replicatedJob", replicatedJob=LABEL, jobIndex=int, podIndex=int),
        managedBy=".*",
        ttlSecondsAfterFinished=int,
    ),
)


def _manifest(folder: Path, *arguments: str, **more: str) -> dict[str, Any]:
    result = run("launch_gke.sh", "--dry-run", *arguments, settings=JOB | more, folder=folder)
    assert result.returncode == 0, result.stderr
    first, *lines, last = result.stdout.splitlines()
    assert first == "kubectl apply -f - <<'END'" and last == "END" and "${" not in result.stdout
    return yaml.safe_load("\n".join(lines))


def _pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def _rows() -> list[list[str]]:
    lines = (FOLDER / "topologies.txt").read_text().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(
    "more",
    [
        {},
        SHARED,
        {"SPOT": "true", "NUM_SLICES": "3", "DATA_CLAIM": "data"},
        SHARED | {"SAFE_TO_EVICT": "true", "MAX_RESTARTS": "0", "GRACE_SECONDS": "30"},
        {"QUEUE": "1", "PRIORITY": "true", "NAMESPACE": "null"},  # YAML would take these for something else
    ],
)
def test_manifest_has_the_fields_of_a_jobset(more: dict[str, str], tmp_path: Path):
    check(_manifest(tmp_path, **more), JOBSET)


def test_the_schema_finds_what_is_wrong(tmp_path: Path):
    manifest = _manifest(tmp_path)
    for path, value in (("spec.replicas", 2), ("metadata.labels", {"a": 1}), ("spec.suspend", "yes")):
        parent, name = path.split(".")
        with pytest.raises(AssertionError, match=name):
            check(manifest | {parent: manifest[parent] | {name: value}}, JOBSET)


def test_manifest_holds_what_was_set(tmp_path: Path):
    manifest = _manifest(tmp_path, **SHARED, NUM_SLICES="2", DATA_CLAIM="data-claim")
    assert manifest["metadata"]["name"] == "run-1" and manifest["metadata"]["namespace"] == "team"
    assert manifest["metadata"]["labels"] == {
        "app.kubernetes.io/name": "vl-jax",
        "kueue.x-k8s.io/queue-name": "team-queue",
        "kueue.x-k8s.io/priority-class": "high",
    }
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = _pod(manifest)
    assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 4
    assert job["template"]["spec"]["template"]["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"
    }
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/reservation-name": "ours",
        "cloud.google.com/reservation-affinity": "specific",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/vl_jax:1" and container["command"] == TRAIN
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert mounts == {"runs": "/runs", "data": "/data"}
    assert claims == {"runs": "runs-claim", "data": "data-claim"}


def test_what_is_not_set_is_not_there(tmp_path: Path):
    manifest = _manifest(tmp_path)
    assert "namespace" not in manifest["metadata"] and len(manifest["metadata"]["labels"]) == 1
    pod = _pod(manifest)
    assert len(pod["nodeSelector"]) == 2 and len(pod["tolerations"]) == 1 and len(pod["volumes"]) == 1


def test_spot_nodes_are_chosen_and_tolerated(tmp_path: Path):
    pod = _pod(_manifest(tmp_path, SPOT="true"))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][-1] == {
        "key": "cloud.google.com/gke-spot",
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
    }


def test_a_users_mistake_is_not_tried_twenty_times(tmp_path: Path):
    spec = _manifest(tmp_path)["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]},
    }
    (reaction,) = spec["failurePolicy"]["rules"]
    assert reaction["action"] == "FailJobSet" and reaction["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] == 20


def test_manifest_passes_overrides_on(tmp_path: Path):
    words = ["--config.seed=3", r'--config.name=a "b" \ c', "--config.data.root=/x & y ${NAME}"]
    words.append("--profile=3")
    result = run("launch_gke.sh", "--dry-run", *words, settings=JOB, folder=tmp_path)
    manifest = yaml.safe_load("\n".join(result.stdout.splitlines()[1:-1]))
    assert _pod(manifest)["containers"][0]["command"] == [*TRAIN, *words]


@pytest.mark.slow
@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_every_topology_has_a_manifest(row: list[str], tmp_path: Path):
    topology, _, chips, hosts, _, label = row
    manifest = _manifest(tmp_path, TOPOLOGY=topology)
    check(manifest, JOBSET)
    pod, job = _pod(manifest), manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == int(hosts)
    per_host = pod["containers"][0]["resources"]["requests"]["google.com/tpu"]
    assert per_host * int(hosts) == int(chips)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]


# What stops a large job


def _found(folder: Path, **more: str) -> list[str]:
    """What the check misses."""
    result = run("launch_gke.sh", "--check", settings=JOB | more, folder=folder)
    assert not (folder / "ran").exists()
    faults = re.findall(r"^launch_gke\.sh: no (.+?): ", result.stderr, re.MULTILINE)
    assert result.returncode == (2 if faults else 0), result.stderr
    assert len(faults) == len(result.stderr.splitlines())
    return faults


FIELDS = {
    "namespace": "NAMESPACE",
    "queue label": "QUEUE",
    "reservation": "RESERVATION",
    "priority class": "PRIORITY",
}


def test_the_check_names_each_field_that_is_missing(tmp_path: Path):
    assert _found(tmp_path) == list(FIELDS)
    for fault, field in FIELDS.items():
        assert _found(tmp_path, **SHARED | {field: ""}) == [fault]
    assert _found(tmp_path, **SHARED, SAFE_TO_EVICT="true") == ["safe-to-evict"]
    assert _found(tmp_path, **SHARED) == []
    assert _found(tmp_path, **SHARED | {"RESERVATION": ""}, SPOT="true") == []


def test_the_check_reads_the_manifest_itself(tmp_path: Path):
    """Somebody edits the template, by hand."""
    copied = tmp_path / "tpu_scripts"
    copied.mkdir()
    for file in FOLDER.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    template = (copied / "jobset.yaml").read_text()
    for old, new, fault in (
        ("google.com/tpu: ${CHIPS_PER_HOST}", "google.com/tpu: 8", "node shape"),
        ("${GKE_TOPOLOGY}", '"2x4"', "node shape"),
        ("completions: ${HOSTS}", "completions: 1", "node shape"),
        ("cluster-autoscaler.kubernetes.io/safe-to-evict: ${SAFE_TO_EVICT}", "a: b", "safe-to-evict"),
        ("namespace: ${NAMESPACE}", "generation: 1", "namespace"),
    ):
        assert old in template
        (copied / "jobset.yaml").write_text(template.replace(old, new))
        result = run(str(copied / "launch_gke.sh"), "--check", settings=JOB | SHARED, folder=tmp_path)
        assert result.returncode == 2 and f"no {fault}: " in result.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"NAME": "Run_1"}, "NAME=Run_1 must be up to 40 of a-z, 0-9 and -"),
        ({"NAME": "x" * 41}, "must be up to 40"),
        ({"WORKDIR": "runs/x"}, "WORKDIR=runs/x must lie under /runs"),
        ({"SPOT": "true", "RESERVATION": "ours"}, "SPOT=true and RESERVATION=ours exclude each other"),
        ({"NUM_SLICES": "two"}, "NUM_SLICES=two must be a whole number >= 1"),
    ],
)
def test_what_cannot_work_is_one_line(more: dict[str, str], said: str, tmp_path: Path):
    result = run("launch_gke.sh", "--dry-run", settings=JOB | more, folder=tmp_path)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
