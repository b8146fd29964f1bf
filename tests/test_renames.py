"""Where a bucket is mounted no folder can be renamed: what is made on a disk is made there all the same."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import mounts
import numpy as np
import pytest

from vl_jax import cli
from vl_jax.checkpoint import Checkpointer, CheckpointError
from vl_jax.interop.folder import write_folder
from vl_jax.interop.safetensors import Entry
from vl_jax.metrics import read_metrics, without_timings
from vl_jax.runtime.storage import commit

TINY = str(Path(__file__).with_name("tiny_experiment.py"))


@pytest.fixture(params=[errno.ENOSYS, errno.EXDEV])
def mount(request, monkeypatch) -> None:
    mounts.refuse(monkeypatch, request.param)


def tree(step: int) -> dict[str, jax.Array]:
    return {"a": jnp.arange(100.0) + step, "b": jnp.int32(step)}


def save(folder: Path, *steps: int, **options) -> None:
    checkpointer = Checkpointer(folder, **options)
    for step in steps:
        checkpointer.save(step, params=tree(step), training={"n": jnp.int32(step)}, record={"at": step})
    checkpointer.close()


def restored(folder: Path, *, mend: bool = False, read_only: bool = True) -> int | None:
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (tree(0), {"n": jnp.int32(0)})
    )
    checkpointer = Checkpointer(folder, read_only=read_only)
    try:
        found = checkpointer.restore(params=like[0], training_of=lambda _: like[1], mend=mend)
    finally:
        checkpointer.close()
    if found is None:
        return None
    step, params, training, record = found
    np.testing.assert_array_equal(params["a"], tree(step)["a"])
    assert (int(training["n"]), record["at"]) == (step, step)
    return step


def steps_in(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.is_dir())


@pytest.mark.usefixtures("mount")
def test_steps_are_committed_by_a_file_and_that_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="vl_jax"):
        save(tmp_path, 3, 7)
        save(tmp_path, 9, 11)
    assert [m for m in caplog.messages if "renamed" in m] == [
        f"{tmp_path}: no folder can be renamed there, so steps are committed by a file"
    ]
    assert steps_in(tmp_path) == ["11", "7", "9"] and restored(tmp_path) == 11
    assert all((tmp_path / step / commit.COMMITTED).is_file() for step in ("7", "9", "11"))


@pytest.mark.parametrize("left", ["nothing", "half", "all but the last file"])
@pytest.mark.usefixtures("mount")
def test_a_step_that_was_being_written_is_none(tmp_path, left):
    save(tmp_path, 3, 7)
    if left == "nothing":
        shutil.rmtree(tmp_path / "7")
        (tmp_path / "7").mkdir()
    elif left == "half":
        shutil.rmtree(tmp_path / "7/record")
    (tmp_path / "7" / commit.COMMITTED).unlink(missing_ok=True)
    assert Checkpointer(tmp_path, read_only=True).steps == [3] and restored(tmp_path) == 3
    assert (tmp_path / "7").is_dir()  # a reader leaves it
    assert restored(tmp_path, mend=True, read_only=False) == 3
    save(tmp_path, 7)
    assert restored(tmp_path) == 7


@pytest.mark.usefixtures("mount")
def test_what_was_saved_is_whole_or_that_is_said(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, params=tree(3), training={"n": jnp.int32(3)}, record={})
    checkpointer._manager.wait_until_finished()
    (tmp_path / "3" / commit.COMMITTED).unlink()
    with pytest.raises(CheckpointError, match="step 3 is not saved in"):
        checkpointer.wait()
    checkpointer.close()
    assert steps_in(tmp_path) == []


@pytest.mark.usefixtures("mount")
def test_damaged_steps_are_set_aside(tmp_path):
    save(tmp_path, 3, 7)
    file = next(f for f in (tmp_path / "7/record").rglob("*") if f.is_file() and "at" in f.read_text())
    file.write_text(json.dumps({**json.loads(file.read_text()), "at": 8}))
    assert restored(tmp_path, mend=True, read_only=False) == 3
    assert steps_in(tmp_path) == ["3", "damaged"] and steps_in(tmp_path / "damaged") == ["7"]


def test_a_run_may_move_to_a_mounted_bucket_and_back(tmp_path):
    save(tmp_path / "here", 3, 7)
    assert not (tmp_path / "here" / commit.MARK).exists()
    with mounts.refusing(errno.ENOSYS):
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        assert restored(tmp_path / "there") == 7
        save(tmp_path / "there", 9)
        assert restored(tmp_path / "there") == 9 and steps_in(tmp_path / "there") == ["3", "7", "9"]
    shutil.copytree(tmp_path / "there", tmp_path / "back")
    save(tmp_path / "back", 11)
    assert steps_in(tmp_path / "back") == ["11", "7", "9"] and restored(tmp_path / "back") == 11


@pytest.mark.usefixtures("mount")
def test_a_published_folder_is_whole_with_its_config(tmp_path):
    entries = {"w": Entry((4,), np.dtype(np.float32))}
    write_folder(tmp_path / "out", {"a": 1}, entries, [("w", np.ones(4, np.float32))])
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_a_run_on_a_mounted_bucket_is_the_run_of_a_disk(tmp_path, capsys):
    logs = []
    for name in ("disk", "mount"):
        out = tmp_path / name
        options = [f"--config={TINY}", f"--workdir={out}"]
        with mounts.refusing(errno.ENOSYS) if name == "mount" else contextlib.nullcontext():
            assert cli.main(["train", *options]) == 0
            assert cli.main(["train", *options]) == 0  # nothing is left to do
            assert cli.main(["evaluate", f"--workdir={out}"]) == 0
        assert (out / "report.html").is_file()
        logs.append([without_timings(line) for line in read_metrics(out / "metrics.jsonl")])
    assert logs[0] == logs[1]
    assert (tmp_path / "mount/checkpoints" / commit.MARK).is_file()
    assert not (tmp_path / "disk/checkpoints" / commit.MARK).exists()
