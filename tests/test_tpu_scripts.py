from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "tpu_scripts"
SCRIPTS = sorted(p.name for p in FOLDER.iterdir() if p.suffix in (".sh", ".sbatch"))
RUNNABLE = [name for name in SCRIPTS if name != "dry_run.sh"]

PLACE = {"PROJECT": "my-project", "ZONE": "us-east5-b", "TPU_NAME": "pod"}
SLICE = PLACE | {"ACCELERATOR": "v6e-16", "RUNTIME": "v2-alpha-tpuv6e"}
JOB = {"CONFIG": "experiments/x.py", "WORKDIR": "runs/a b"}
CLUSTER = JOB | {
    "NAME": "run-1",
    "IMAGE": "registry/vl_jax:1",
    "ACCELERATOR": "tpu-v6e-slice",
    "TOPOLOGY": "4x4",
    "NUM_HOSTS": "4",
    "CHIPS_PER_HOST": "4",
    "CLAIM": "runs-claim",
}
SETTINGS = {
    "create.sh": SLICE,
    "fetch.sh": PLACE | {"WORKDIR": "runs/a b", "DESTINATION": "here"},
    "launch.sh": PLACE | JOB,
    "launch_gke.sh": CLUSTER,
    "queued_resource.sh": SLICE,
    "setup.sh": PLACE,
    "slurm.sbatch": JOB,
}


def _run(
    name: str, *arguments: str, settings: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Runs a script where every command that could reach a network or a queue writes a file instead."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("gcloud", "kubectl", "srun", "sbatch"):
        (tools / tool).write_text(f"#!/bin/sh\ntouch {folder}/called-$(basename $0)\n")
        (tools / tool).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder), **settings}
    return subprocess.run(
        ["bash", str(FOLDER / name), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def _dry(name: str, *arguments: str, folder: Path, **more: str) -> str:
    result = _run(name, "--dry-run", *arguments, settings=SETTINGS[name] | more, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_script_is_covered():
    assert set(SETTINGS) == set(RUNNABLE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses_as_bash(name: str):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True, timeout=20)


@pytest.mark.parametrize("name", RUNNABLE)
def test_script_stops_at_the_first_error_and_is_executable(name: str):
    assert "\nset -euo pipefail\n" in (FOLDER / name).read_text()
    assert os.access(FOLDER / name, os.X_OK)


@pytest.mark.parametrize("name", RUNNABLE)
def test_dry_run_runs_nothing(name: str, tmp_path: Path):
    assert _dry(name, folder=tmp_path).strip()
    assert [p.name for p in tmp_path.iterdir()] == ["tools"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_missing_setting_is_named(name: str, tmp_path: Path):
    for missing in SETTINGS[name]:
        settings = {k: v for k, v in SETTINGS[name].items() if k != missing}
        result = _run(name, "--dry-run", settings=settings, folder=tmp_path)
        assert result.returncode == 2
        assert f"{missing} is not set" in result.stderr and "usage:" in result.stderr


def test_create_names_the_slice_and_only_asks_for_spot_when_told(tmp_path: Path):
    (line,) = _dry("create.sh", folder=tmp_path).splitlines()
    words = shlex.split(line)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
    assert set(words[6:]) == {
        "--project=my-project",
        "--zone=us-east5-b",
        "--accelerator-type=v6e-16",
        "--version=v2-alpha-tpuv6e",
    }
    assert "--spot" in shlex.split(_dry("create.sh", folder=tmp_path, SPOT="true"))


def test_queued_resource_waits_as_long_as_told(tmp_path: Path):
    first, second = _dry("queued_resource.sh", folder=tmp_path, VALID_FOR="6h").splitlines()
    assert "queued-resources create pod-request" in first and "--node-id=pod" in first
    assert "--valid-until-duration=6h" in first and "queued-resources describe pod-request" in second


def test_setup_installs_on_all_workers_and_mounts_only_a_named_bucket(tmp_path: Path):
    text = _dry("setup.sh", folder=tmp_path)
    assert text.count("--worker=all") == 2 and "vl_jax_source[tpu]" in text and "gcsfuse" not in text
    assert "gcsfuse --implicit-dirs my-bucket runs" in _dry("setup.sh", folder=tmp_path, BUCKET="my-bucket")


def test_launch_passes_paths_and_overrides_through_two_shells(tmp_path: Path):
    text = _dry("launch.sh", "--config.model.name=a b", folder=tmp_path)
    # The first shell is the one the printed line is pasted into; bash itself takes its quoting apart.
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.split("\0")
    remote = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    trainer = next(line for line in remote.splitlines() if "vl_jax train" in line)
    expected = ["--config=experiments/x.py", "--workdir=../runs/a b", "--config.model.name=a b"]
    assert [word for word in shlex.split(trainer) if word.startswith("--")] == expected
    assert "--worker=all" in words and "VL_JAX_DISTRIBUTED=1" in trainer


def test_fetch_leaves_checkpoints_where_they_are(tmp_path: Path):
    text = _dry("fetch.sh", folder=tmp_path)
    assert "--exclude=./checkpoints" in text and text.count("--worker=0") == 2 and "here/run.tgz" in text


def test_manifest_is_filled_in_completely(tmp_path: Path):
    text = _dry("launch_gke.sh", folder=tmp_path, NUM_SLICES="2")
    assert text.startswith("kubectl apply") and "${" not in text
    for line in (
        "name: run-1",
        "replicas: 2",
        "completions: 4",
        "google.com/tpu: 4",
        "claimName: runs-claim",
    ):
        assert line in text
    assert '"--config=experiments/x.py", "--workdir=runs/a b"' in text


def test_manifest_passes_overrides_on(tmp_path: Path):
    words = ["--config.seed=3", r'--config.name=a "b" \ c', "--config.data.root=/x & y"]
    text = _dry("launch_gke.sh", *words, folder=tmp_path)
    line = next(line for line in text.splitlines() if "command:" in line)
    command = json.loads(line.partition("command:")[2])
    assert command == [
        "python",
        "-m",
        "vl_jax",
        "train",
        "--config=experiments/x.py",
        "--workdir=runs/a b",
        *words,
    ]


def test_image_holds_all_that_the_package_is_made_of():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied == {"setup.py", "pyproject.toml", "README.md", "LICENSE", "vl_jax", "experiments"}
    assert all((FOLDER.parent / name).exists() for name in copied)


def test_slurm_runs_one_trainer_per_node(tmp_path: Path):
    text = _dry("slurm.sbatch", "--config.seed=3", folder=tmp_path)
    assert text.startswith("srun ") and "vl_jax train --config=experiments/x.py" in text
    assert text.rstrip().endswith("--config.seed=3")
    assert "#SBATCH --ntasks-per-node=1" in (FOLDER / "slurm.sbatch").read_text()
