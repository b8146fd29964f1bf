"""Waiting for slices, watching them and launching again, on a cloud that is not there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from cloud import GCLOUD, furnish, run

PLACE = {"PROJECT": "my-project", "ZONE": "us-east5-b", "TPU_NAME": "pod", "POLL_SECONDS": "0"}
SLICE = PLACE | {"TOPOLOGY": "v6e:2x4"}  # one host
JOB = SLICE | {"CONFIG": "experiments/x.py", "WORKDIR": "runs/x"}


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A folder with tools, and no slices."""
    furnish(tmp_path, gcloud=GCLOUD)
    for tool in ("sleep", "tar", "python3"):  # of which the last two would copy and install this checkout
        (tmp_path / f"tools/{tool}").write_text("#!/bin/sh\n")
        (tmp_path / f"tools/{tool}").chmod(0o755)
    return tmp_path


def _says(cloud: Path, name: str, *states: str) -> None:
    (cloud / name).write_text("".join(f"{state}\n" for state in states))


def _asked(cloud: Path) -> list[str]:
    return (cloud / "asked").read_text().splitlines()


# The queue


def test_the_queue_is_waited_for_until_the_slice_is_there(cloud: Path):
    _says(cloud, "pod-request.state", "MISSING", "WAITING_FOR_RESOURCES", "SILENCE", "PROVISIONING", "ACTIVE")
    result = run("queued_resource.sh", settings=SLICE, folder=cloud)
    assert result.returncode == 0 and "ACTIVE" in result.stdout
    assert _asked(cloud) == ["describe pod-request", "create pod-request", *["describe pod-request"] * 4]


def test_no_answer_at_first_is_no_answer(cloud: Path):
    _says(cloud, "pod-request.state", "SILENCE", "MISSING", "MISSING", "ACTIVE")
    assert run("queued_resource.sh", settings=SLICE, folder=cloud).returncode == 0
    assert _asked(cloud).count("create pod-request") == 1


def test_a_request_is_not_made_twice(cloud: Path):
    _says(cloud, "pod-request.state", "PROVISIONING", "ACTIVE")
    assert run("queued_resource.sh", settings=SLICE, folder=cloud).returncode == 0
    assert "create pod-request" not in _asked(cloud)


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING"])
def test_a_request_that_never_comes_back_is_not_waited_for(state: str, cloud: Path):
    _says(cloud, "pod-request.state", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", state)
    result = run("queued_resource.sh", settings=SLICE, folder=cloud)
    assert result.returncode == 1 and f"pod-request is {state}; delete.sh" in result.stderr


def test_waiting_has_an_end(cloud: Path):
    _says(cloud, "pod-request.state", "WAITING_FOR_RESOURCES")
    result = run("queued_resource.sh", settings=SLICE | {"WAIT_MINUTES": "0"}, folder=cloud)
    assert result.returncode == 1
    assert "still WAITING_FOR_RESOURCES after WAIT_MINUTES=0; run again to wait on" in result.stderr


def test_delete_asks_only_for_what_is_there(cloud: Path):
    _says(cloud, "pod-1.state", "READY")
    assert run("delete.sh", settings=PLACE | {"NUM_SLICES": "2"}, folder=cloud).returncode == 0
    assert [line for line in _asked(cloud) if line.startswith("delete")] == ["delete pod-1"]


# The babysitter


def _launches(cloud: Path, *answers: str, states: tuple[str, ...] = ("READY",), **more: str):
    """Runs the babysitter with what hosts answer and how the slice is, poll after poll."""
    _says(cloud, "answers", *answers)
    _says(cloud, "pod.state", *states)
    result = run("babysit.sh", settings=JOB | more, folder=cloud)
    return result, result.stdout.count(": launch ")


def test_a_run_that_ends_well_is_done(cloud: Path):
    result, launches = _launches(cloud, "train none", "train running", "train running", "train ended 0")
    assert result.returncode == 0 and launches == 1 and "done; fetch.sh" in result.stdout
    kinds = [line.split()[0] for line in _asked(cloud)]
    assert "create" not in kinds and "delete" not in kinds  # the slice was there


def test_a_slice_that_was_taken_away_is_made_anew(cloud: Path):
    asked_for = (*["MISSING"] * 3, "ACTIVE")
    taken = ("SUSPENDED", "SUSPENDED", "MISSING", "ACTIVE")
    _says(cloud, "pod-request.state", *asked_for, *taken)
    states = ("MISSING", "MISSING", "READY", "READY", "PREEMPTED", "PREEMPTED", "READY")
    result, launches = _launches(cloud, "train running", "train running", "train ended 0", states=states)
    assert result.returncode == 0, result.stderr
    assert launches == 2  # the first, and the one after the slice was taken
    asked = [line for line in _asked(cloud) if not line.startswith(("describe", "ssh", "scp"))]
    assert asked == ["create pod-request", "delete pod-request", "delete pod", "create pod-request"]


def test_a_place_in_the_queue_is_kept(cloud: Path):
    _says(cloud, "pod-request.state", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result, launches = _launches(cloud, "train running", "train ended 0", states=("MISSING", "READY"))
    assert result.returncode == 0 and launches == 1
    assert not [line for line in _asked(cloud) if line.startswith(("delete", "create"))]


def test_a_trainer_that_ends_early_is_launched_again(cloud: Path):
    (cloud / "host-0").mkdir()
    result, launches = _launches(
        cloud, "train none", "train running", "train ended 1", "train ended killed", "train ended 0"
    )
    assert result.returncode == 0 and launches == 3


def test_retries_have_an_end(cloud: Path):
    result, launches = _launches(cloud, "train ended 1", RETRIES="3")
    assert result.returncode == 1 and launches == 4
    assert "a trainer ended early, and RETRIES=3 are used up" in result.stderr
    assert "cost money" in result.stderr


def test_a_users_mistake_is_not_tried_again(cloud: Path):
    result, launches = _launches(cloud, "train running", "train ended 2")
    assert result.returncode == 2 and launches == 0 and "refuses its settings" in result.stderr


def test_what_a_person_stopped_stays_stopped(cloud: Path):
    result, launches = _launches(cloud, "train running", "train stopped")
    assert result.returncode == 0 and launches == 0 and "stopped by stop.sh" in result.stdout


def test_no_answer_is_no_loss(cloud: Path):
    """Nothing is deleted because this machine's own network is away."""
    result, launches = _launches(
        cloud, "train running", states=("READY", *["SILENCE"] * 9, "READY", "SILENCE"), PATIENCE="20"
    )
    assert result.returncode == 1 and launches == 0
    assert "no answer to PATIENCE=20 polls (waiting)" in result.stderr
    assert not [line for line in _asked(cloud) if line.startswith(("delete", "create"))]


def test_hosts_that_do_not_answer_are_missed(cloud: Path):
    result, launches = _launches(cloud, "train ended 0", TOPOLOGY="v6e:4x4", PATIENCE="2")
    assert result.returncode == 1 and launches == 0 and "(silent)" in result.stderr


# The hosts, as folders of this machine: what the scripts send them really runs


TRAINER = """#!/bin/sh
echo "$@"
[ ! -f ../fail ] || exit 7
trap 'echo saved; exit 143' TERM
touch ../ready
while [ ! -f ../finish ]; do /bin/sleep 0.05; done
"""


@pytest.fixture
def hosts(cloud: Path):
    """Two hosts that were set up."""
    for number in range(2):
        host = cloud / f"host-{number}"
        (host / "vl_jax_source").mkdir(parents=True)
        (host / "vl_jax_env/bin").mkdir(parents=True)
        python = host / "vl_jax_env/bin/python"
        python.write_text(TRAINER)
        python.chmod(0o755)
    _says(cloud, "pod.state", "READY")
    (cloud / "tools/sleep").unlink()  # what runs on hosts may sleep
    yield cloud
    for file in cloud.glob("host-*/train.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def _until(what: str, cloud: Path) -> None:
    for _ in range(400):
        if all((host / what).exists() for host in cloud.glob("host-*")):
            return
        time.sleep(0.05)
    raise TimeoutError(what)


def _launch(cloud: Path, *arguments: str) -> int:
    return run("launch.sh", *arguments, settings=JOB | {"WORKDIR": "runs/a b"}, folder=cloud).returncode


def test_a_launch_outlives_its_connection_and_tells_how_it_ended(hosts: Path):
    assert _launch(hosts, "--config.name=a 'b'") == 0
    _until("ready", hosts)
    assert _launch(hosts) == 1  # already running
    status = run("status.sh", settings=PLACE, folder=hosts).stdout.splitlines()
    words = "-m vl_jax train --config=experiments/x.py --workdir=../runs/a b --config.name=a 'b'"
    assert status == ["pod: READY", *[f"{socket.gethostname()}: running: {words}"] * 2]
    for host in hosts.glob("host-*"):
        (host / "finish").touch()
    _until("train.exit", hosts)
    assert "ended 0" in run("status.sh", settings=PLACE, folder=hosts).stdout
    logs = run("logs.sh", settings=PLACE | {"WORKER": "all", "TAIL": "1"}, folder=hosts).stdout.splitlines()
    assert logs == [f"{socket.gethostname()}: {words}"] * 2


def test_stop_lets_every_host_save_and_a_launch_goes_on(hosts: Path):
    assert _launch(hosts) == 0
    _until("ready", hosts)
    result = run("stop.sh", settings=PLACE, folder=hosts)
    assert result.stdout.count("ended with status 143") == 2, result.stdout + result.stderr
    assert (hosts / "host-0/train.log").read_text().endswith("saved\n")
    assert run("status.sh", settings=PLACE, folder=hosts).stdout.count(": stopped: saved") == 2
    assert _launch(hosts) == 0  # and is no longer noted as stopped
    _until("ready", hosts)
    assert "stopped" not in run("status.sh", settings=PLACE, folder=hosts).stdout


def test_stop_kills_what_does_not_stop(hosts: Path):
    for host in hosts.glob("host-*"):
        text = TRAINER.replace("trap 'echo saved; exit 143' TERM", "trap '' TERM")
        (host / "vl_jax_env/bin/python").write_text(text)
    assert _launch(hosts) == 0
    _until("ready", hosts)
    result = run("stop.sh", settings=PLACE | {"STOP_MINUTES": "0"}, folder=hosts)
    assert result.stdout.count("killed, without saving") == 2, result.stdout + result.stderr


def test_a_failure_is_seen_by_the_babysitter(hosts: Path):
    for host in hosts.glob("host-*"):
        (host / "fail").touch()
        (host / "vl_jax_source.tgz").touch()
    settings = JOB | {"RETRIES": "1", "STOP_MINUTES": "0"}
    result = run("babysit.sh", settings=settings, folder=hosts)
    assert result.returncode == 1 and "a trainer ended early, and RETRIES=1 are used up" in result.stderr
    assert (hosts / "host-1/train.log").read_text().count("== launched on") == 2


def test_stop_before_a_launch_says_so(hosts: Path):
    assert run("stop.sh", settings=PLACE, folder=hosts).stdout.count("nothing was launched") == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_it_ends_and_deletes_only_what_is_lost(seed: int, cloud: Path):
    draw = random.Random(seed)
    lost = ("MISSING", "PREEMPTED", "STOPPED")
    states = draw.choices(("READY",) * 8 + ("SILENCE", "REPAIRING") + lost * (seed % 2), k=12)
    ended = ("ended 0", "ended 1", "ended killed", "ended 124")
    answers = draw.choices(("none", "running", "running", *ended, "SILENCE"), k=12)
    _says(cloud, "pod-request.state", *draw.choices(("MISSING", "ACTIVE", "PROVISIONING", "SUSPENDED"), k=20))
    result, launches = _launches(
        cloud,
        *(answer if answer == "SILENCE" else f"train {answer}" for answer in answers),
        states=tuple(states),
        RETRIES="3",
        PATIENCE="3",
        WAIT_MINUTES="0",
    )
    assert result.returncode in (0, 1) and launches <= 4, result.stderr
    assert ("done" in result.stdout) == (result.returncode == 0)
    if not set(states) & set(lost):
        assert not [line for line in _asked(cloud) if line.startswith(("delete", "create"))]
