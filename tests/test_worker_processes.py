"""Worker processes give what threads give, and leave nothing behind, however a run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_packed import CONFIG as PACKED
from test_pipeline import CONFIG, SPEC, assert_same, two_pictures, write_records

from vl_jax.data.config import LoadingConfig
from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample
from vl_jax.data.stream import worker_processes
from vl_jax.data.stream.background import Background, DataFailure
from vl_jax.data.stream.packed import PackedIterator
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.data.stream.worker_processes import Processes

pytest.importorskip("grain")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("/dev/shm")

# Takes a batch, names its workers, and goes on as it is told.
SCRIPT = """
import dataclasses, multiprocessing, sys, time
from vl_jax.data.config import DataConfig, LoadingConfig, ModelSpec
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.data.sources.build import ScenesConfig

if __name__ == "__main__":
    config = DataConfig(
        sources=(ScenesConfig("a", 40),),
        tiling=TilingConfig(32, views="global"),
        loading=LoadingConfig(num_workers=2),
    )
    batches = TrainIterator(config, ModelSpec(2, "prefix", 2048), batch_size=4)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("as it happens")
    time.sleep(60)
"""


def segments() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def gone(pid: int) -> bool:
    """Whether a process has ended within a few seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead, though nobody has asked for its status
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.slow
def test_the_batches_are_those_of_threads(packed):
    kind, config = (PackedIterator, PACKED) if packed else (TrainIterator, CONFIG)
    before = segments()
    threads = kind(config, SPEC, batch_size=3)
    workers = kind(dataclasses.replace(config, loading=LoadingConfig(num_workers=2)), SPEC, batch_size=3)
    for _ in range(4):
        assert_same(next(workers), next(threads))
        assert workers.ids == threads.ids
    assert workers.get_state() == threads.get_state()
    pids = [child.pid for child in multiprocessing.active_children()]
    assert len(pids) == 2
    workers.set_state(json.loads(json.dumps(threads.get_state())))  # ends these workers, starts others
    assert_same(next(workers), next(threads))
    for stream in (workers, threads):
        stream.close()
    assert not multiprocessing.active_children() and all(map(gone, pids))
    assert segments() <= before


def test_bad_samples_are_skipped_with_the_same_account(tmp_path):
    config = write_records(tmp_path, {3, 11})
    streams = [
        TrainIterator(dataclasses.replace(config, loading=LoadingConfig(num_workers=n)), SPEC, batch_size=8)
        for n in (0, 1)
    ]
    for _ in range(3):
        assert_same(*map(next, streams))
    threads, workers = (stream.get_state() for stream in streams)
    assert threads == workers and sorted(workers["skipped"].values()) == ["missing_image"] * 2
    for stream in streams:
        stream.close()


def test_a_dead_worker_is_one_line(tmp_path):
    batches = TrainIterator(
        dataclasses.replace(CONFIG, loading=LoadingConfig(num_workers=1)), SPEC, batch_size=2
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(
        ChildProcessError, match=r"^a data worker \(process \d+\) died: SIGKILL; loading.num_wor"
    ):
        for _ in range(20):
            next(batches)
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_stopped_does_not_keep_the_end_waiting():
    batches = TrainIterator(
        dataclasses.replace(CONFIG, loading=LoadingConfig(num_workers=1)), SPEC, batch_size=2
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGSTOP)
    batches.close()
    assert not multiprocessing.active_children() and gone(worker.pid or 0)


class Panic(BaseException):
    """Stands for the panic of a library in another language, which is no ``Exception``."""


class Panics:
    """Reads nothing; picklable, for a worker."""

    def __call__(self, tasks):
        raise Panic("called `Option::unwrap()`\n on a `None` value")


def test_a_panic_in_the_data_thread_is_one_line():
    def make(stop):
        yield 1
        Panics()([])

    work = Background(make, prefetch=2)
    assert work.next() == 1
    for _ in range(2):
        with pytest.raises(DataFailure) as caught:
            work.next()
        assert str(caught.value) == "while data was read: Panic: called `Option::unwrap()` on a `None` value"
    work.stop()


@pytest.mark.slow
def test_a_panic_in_a_worker_is_one_line():
    pool = Processes(Panics, 1, room=1 << 16)
    with pytest.raises(DataFailure, match="^in a data worker: Panic: called `Option::unwrap"):
        pool.submit(["task"]).result(timeout=600)
    pool.close()


def test_what_is_wrong_with_a_source_is_said_as_by_threads(tmp_path):
    config = dataclasses.replace(write_records(tmp_path, set()), loading=LoadingConfig(num_workers=1))
    batches = TrainIterator(config, SPEC, batch_size=2)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list of records, found dict"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("end", ["raise", "kill"])
@pytest.mark.slow
def test_nothing_is_left_when_the_process_ends_badly(end, tmp_path):
    script, before = tmp_path / "script.py", segments()
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), end]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        pids = list(map(int, run.stdout.readline().split()))
        assert len(pids) == 2
        if end == "kill":
            run.kill()
        errors = run.stderr.read()
    assert all(map(gone, pids)) and segments() <= before
    assert "leaked" not in errors and ("as it happens" in errors) == (end == "raise")


def test_workers_do_not_load_jax():
    heavy = "jax", "flax", "grain", "ml_collections"
    code = f"import sys, vl_jax.data.stream.readers; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=600)
        == "[]\n"
    )


@pytest.mark.parametrize("room", [0, 6_000, 1 << 20])
def test_examples_are_the_same_on_the_other_side_whether_they_fit_or_not(room):
    encoder = make_encoder(dataclasses.replace(CONFIG, max_tiles=2), SPEC)
    bad = BadSample("corrupt_image", "sample 3: no")
    given = [encoder.example(two_pictures()), bad, encoder.example(two_pictures((32, 5)))]
    memory = memoryview(bytearray(room))
    packed, used = worker_processes._pack(given, memory)
    data = np.frombuffer(memory, np.uint8, used).copy()
    found = [
        worker_processes._unpack(x, data) if isinstance(x, worker_processes._Packed) else x for x in packed
    ]
    assert sum(isinstance(x, Example) for x in packed) == {0: 2, 6_000: 2, 1 << 20: 0}[room]
    assert found[1] is bad
    for a, b in zip(given[::2], found[::2], strict=True):
        for field in dataclasses.fields(Example):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_too_little_shared_memory_is_said_before_anything_starts(monkeypatch):
    room = os.statvfs(SHARED).f_bavail * os.statvfs(SHARED).f_frsize
    with pytest.raises(ValueError, match="num_workers=2: needs .* MiB of shared memory, /dev/shm has"):
        worker_processes.Processes(list, 2, room=room)
    with pytest.raises(ValueError, match="num_workers=-1: must not be negative"):
        LoadingConfig(num_workers=-1)
