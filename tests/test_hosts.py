"""Processes find each other, agree, and notice who is gone; here they are threads around a dictionary."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.runtime import start
from vl_jax.runtime.hosts import cluster
from vl_jax.runtime.hosts.cluster import Cluster, find, nodes
from vl_jax.runtime.hosts.joined import Hosts
from vl_jax.runtime.hosts.pulse import LOST, Pulse
from vl_jax.runtime.hosts.rendezvous import Missing, meet, odd_one

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08,10],login",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_a_step_of_slurm_says_it_and_a_task_alone_on_its_node_has_all_devices():
    found = find(SLURM)
    assert found is not None
    assert (found.address, found.count, found.number, found.devices) == ("node07:61441", 4, 2, None)
    assert found.who(3) == "process 3 (host login)"
    shared = find({**SLURM, "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"})
    assert shared is not None and shared.devices == (1,) and shared.who(3) == "process 3"
    step = find({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert step is not None and step.count == 1  # srun -n 1 in a larger allocation
    assert (
        find({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}) is None
    )  # no step: the script


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_lists_of_nodes_are_read_as_slurm_writes_them(numbers, width):
    names = [f"n{n:0{width}d}x" for n in numbers]
    inside = ",".join(f"{n:0{width}d}" for n in numbers)
    assert nodes(f"n[{inside}]x") == nodes(",".join(names)) == names
    assert nodes(f"a,n[{inside}]x,b-1") == ["a", *names, "b-1"]


def test_ranges_of_nodes_by_hand():
    assert nodes("a[1,07-09],b") == ["a1", "a07", "a08", "a09", "b"]


def test_a_slice_of_gke_says_it_and_several_slices():
    pod = {"TPU_WORKER_HOSTNAMES": "w-0.s,w-1.s", "TPU_WORKER_ID": "1"}
    found = find(pod)
    assert found is not None
    assert (found.address, found.count, found.number) == ("w-0.s:8482", 2, 1)
    assert found.who(0) == "process 0 (host w-0.s)"
    slices = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "c:8080",
    }
    found = find(pod | slices | {"JAX_COORDINATOR_PORT": "9"})
    assert found is not None
    assert (found.address, found.count, found.number) == ("c:9", 6, 5)
    alone = find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert alone is not None and alone.count == 1


@pytest.mark.parametrize("ends", ["unused:0:10.0.0.1,unused:1:10.0.0.2", "10.0.0.1,10.0.0.2"])
def test_the_metadata_of_a_tpu_vm_says_it(monkeypatch, ends):
    told = {
        "worker-network-endpoints": ends,
        "agent-worker-number": "1",
        "tpu-env": "MEGASCALE_SLICE_ID: '0'",
    }

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = told.get(self.path.rpartition("/")[2], "").encode()
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        found = find({}, cluster.tpu_metadata())
        server.shutdown()
    assert found is not None
    assert (found.address, found.count, found.number) == ("10.0.0.1:8482", 2, 1)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert cluster.tpu_metadata() is None


def test_variables_say_it_elsewhere_and_an_indexed_job_knows_its_number():
    told = {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "3"}
    found = find(told | {"JAX_PROCESS_ID": "2"})
    assert found is not None and (found.address, found.count, found.number) == ("first:1234", 3, 2)
    found = find(told | {"JOB_COMPLETION_INDEX": "1"})
    assert found is not None and found.number == 1
    found = find(SLURM | {"JAX_COORDINATOR_ADDRESS": "other:1"})
    assert found is not None and (found.address, found.count, found.number) == ("other:1", 4, 2)
    assert find({}) is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "needs JAX_NUM_PROCESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "needs JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"}, "whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, r"0\.\.1"),
    ],
)
def test_what_is_not_whole_is_refused(told, words):
    with pytest.raises(ValueError, match=words):
        find(told)


def test_who_has_to_join_and_cannot_says_so(monkeypatch):
    monkeypatch.setenv("VL_JAX_DISTRIBUTED", "1")
    with pytest.raises(ValueError, match="nothing here says which processes there are"):
        start.set_up()
    monkeypatch.setenv("VL_JAX_DISTRIBUTED", "0")
    start.set_up(SLURM, joins=True)  # told not to


def clusters(count: int, **changes) -> list[Cluster]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    made = [Cluster(address, count, number, "a test") for number in range(count)]
    return [made[0], *made[1:]]


def all_at_once(*work) -> list:
    """What each gives or raises, in threads."""
    results: list = [None] * len(work)

    def do(place: int) -> None:
        try:
            results[place] = work[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=do, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_all_meet_whoever_comes_first():
    made = clusters(4)

    def come(one: Cluster):
        time.sleep((0.4, 0.0, 0.2, 0.6)[one.number])
        return meet(one, {"jax": "1"}, within=30)

    found = all_at_once(*(lambda one=one: come(one) for one in made))
    assert all(hellos == found[0] for hellos in found)
    assert [hello["number"] for hello in found[0]] == [0, 1, 2, 3]
    assert found[0][2]["host"] == socket.gethostname()
    again = all_at_once(*(lambda one=one: meet(one, {}, within=30) for one in made))  # the port is free again
    assert len(again[0]) == 4


@pytest.mark.slow
def test_those_that_do_not_come_are_named_to_all_that_did():
    made = clusters(4)
    begun = time.monotonic()
    found = all_at_once(*(lambda one=one: meet(one, {}, within=2) for one in (made[0], made[2])))
    assert all(isinstance(error, Missing) for error in found), found
    assert all("process 1, process 3 of 4 have not come within 2 s" in str(error) for error in found), found
    assert time.monotonic() - begun < 15


def test_the_first_is_named_when_nobody_listens():
    with pytest.raises(Missing, match=r"process 0 of 2 has not come within 1 s at localhost:\d+ \(.*refused"):
        meet(clusters(2)[1], {}, within=1)


@pytest.mark.slow
def test_something_else_at_the_port_is_no_process_of_the_job():
    one = clusters(2)[1]
    with socket.create_server(("localhost", int(one.address.split(":")[1]))) as other:

        def answer() -> None:
            with contextlib.suppress(OSError):
                with other.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.1 400\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Missing, match="process 0 of 2"):
            meet(one, {}, within=1)


def test_a_version_that_differs_is_named_the_same_everywhere():
    made, versions = clusters(3), ("0.10.2", "0.10.2", "0.11.0")
    found = all_at_once(
        *(lambda one=one: meet(one, {"jax": versions[one.number]}, within=30) for one in made)
    )
    host = socket.gethostname()
    assert {str(error) for error in found} == {
        f"hosts differ: process 2 (host {host}): jax 0.11.0; 2 of 3 processes: jax 0.10.2; install the same "
        "on every host"
    }
    assert not any(isinstance(error, Missing) for error in found)


def test_two_with_one_number_and_another_count_are_refused():
    made = clusters(3)
    twice = all_at_once(*(lambda one=one: meet(one, {}, within=30) for one in (made[0], made[1], made[1])))
    assert all("process 1 (host" in str(error) and "number of another" in str(error) for error in twice)
    first, second = clusters(2)
    wrong = Cluster(second.address, 5, 1, "a test")
    found = all_at_once(*(lambda one=one: meet(one, {}, within=30) for one in (first, wrong)))
    assert all("was told of 5 processes, process 0 of 2" in str(error) for error in found)


def test_who_is_odd_by_hand():
    names = ["a", "b", "c"]
    assert odd_one(["1", "1", "1"], names) is None
    assert odd_one(["2", "1", "1"], names) == "a: 2; 2 of 3 processes: 1"
    assert odd_one(["1", "2"], names) == "b: 2; a: 1"
    assert odd_one(["1", "2", "3"], names) == "b and 1 more: 2; 1 of 3 processes: 1"


class Store:
    """What the coordination service keeps; ``silent`` stands for a first process that is stopped or gone."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.silent = False

    def _answer(self) -> None:
        if self.silent:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self._answer()
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key: str) -> str:
        self._answer()
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        until = time.monotonic() + timeout_in_ms / 1000
        while key not in self.values:
            if time.monotonic() > until:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.01)
        return self.values[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        self._answer()
        return [(path, value) for path, value in list(self.values.items()) if path.startswith(key)]


def hosts_of(count: int) -> tuple[Store, list[Hosts]]:
    store, made = Store(), clusters(count)
    return store, [Hosts(one, [f"process {n} (host h{n})" for n in range(count)], store) for one in made]


def test_facts_that_differ_end_in_the_same_line_everywhere():
    _, hosts = hosts_of(3)
    facts = [{"config.seed": 0, "config.name": "a"}] * 2 + [{"config.seed": 1, "config.name": "a"}]
    pairs = zip(hosts, facts, strict=True)
    found = all_at_once(*(lambda h=h, f=f: h.same("config", f, "mend it") for h, f in pairs))
    line = "hosts differ: process 2 (host h2): config.seed is 1; 2 of 3 processes: config.seed is 0; mend it"
    assert {str(error) for error in found} == {line}
    again = all_at_once(*(lambda h=h: h.same("config", {"x": 1, "y": None}, "") for h in hosts))
    assert again == [None] * 3


def test_the_first_may_be_the_odd_one_and_what_one_lacks_is_absent():
    _, hosts = hosts_of(3)
    facts = [{"a": 1, "b": 2}, {"b": 2}, {"b": 2}]
    pairs = zip(hosts, facts, strict=True)
    found = all_at_once(*(lambda h=h, f=f: h.same("config", f, "mend it") for h, f in pairs))
    assert {str(e) for e in found} == {
        "hosts differ: process 0 (host h0): a is 1; 2 of 3 processes: a is absent; mend it"
    }


def test_who_does_not_come_to_a_comparison_is_named_to_all():
    _, hosts = hosts_of(3)
    found = all_at_once(*(lambda h=h: h.gather("x", "", within=0.5) for h in hosts[:2]))
    assert all(isinstance(e, Missing) and "process 2 (host h2): not come to 'x'" in str(e) for e in found), (
        found
    )


@contextlib.contextmanager
def pulses(store: Store, count: int, silent_after: float) -> Iterator[tuple[list[Pulse], dict]]:
    left: dict[int, tuple[str, int]] = {}
    names = [f"process {n}" for n in range(count)]

    def leaving(number: int) -> Callable[[str, int], None]:
        def leave(line: str, status: int) -> None:
            left.setdefault(number, (line, status))

        return leave

    made = [Pulse(store, n, names, leaving(n)) for n in range(count)]
    for pulse in made:
        pulse.silent_after = silent_after
        pulse.start()
    try:
        yield made, left
    finally:
        for pulse in made:
            pulse.stop_soon()


def until(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_one_without_a_sign_of_life_ends_all_and_is_named():
    with pulses(Store(), 3, 1.0) as (made, left):
        made[2].move("waiting for the data of step 7")
        until(lambda: "7" in made[0]._store.values.get("vl_jax/pulse/2", ""))
        made[2].stop_soon()  # as one that was killed
        until(lambda: {0, 1} <= left.keys())
        line, status = left[0]
        assert left[1] == left[0] and status == LOST
        assert line.startswith("process 2: no sign of life for 1 s (last: waiting for the data of step 7)")


@pytest.mark.slow
def test_all_that_give_signs_go_on_and_the_one_behind_is_known():
    with pulses(Store(), 3, 1.0) as (made, left):
        assert made[0].behind() == ""
        for n, moves in enumerate((3, 1, 3)):
            for _ in range(moves):
                made[n].move(f"step {moves}")
        until(lambda: made[0].behind() == "furthest behind is process 1: step 1")
        time.sleep(2)
        assert not left


def test_a_first_that_does_not_answer_is_named():
    store = Store()
    with pulses(store, 2, 1.0) as (_, left):
        store.silent = True
        until(lambda: 1 in left)
        assert (
            left[1][0].startswith("process 0: no sign of life for 1 s, and no answer") and left[1][1] == LOST
        )


def test_why_one_ends_is_told_to_the_others():
    with pulses(Store(), 3, 5.0) as (made, left):
        made[1].tell("process 1 ended: the disk is full", 2)
        until(lambda: {0, 2} <= left.keys())
        assert left[0] == left[2] == ("process 1 ended: the disk is full", 2) and 1 not in left
        made[2].let_go()
        assert json.loads(made[0]._store.values["vl_jax/end/1"])[1] == 2


def test_a_log_has_what_python_and_libraries_write_and_the_screen_what_python_does(tmp_path):
    code = (
        "import logging, os, sys, pathlib\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "from vl_jax.runtime.hosts import log\n"
        "log.begin(pathlib.Path(sys.argv[1]), 3)\n"
        "logging.warning('by logging'); os.write(2, b'by a library\\n'); log.say('error: the last line')\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.splitlines() == ["WARNING:root:by logging", "error: the last line"]
    lines = (tmp_path / "3.log").read_text().splitlines()
    assert "by logging" in lines[0] and lines[1:] == ["by a library", "error: the last line"]
