"""Checkpoints: what is saved comes back, on any mesh; what is damaged is noticed and passed over."""

from __future__ import annotations

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax.checkpoint import Checkpointer, CheckpointError, checksums
from vl_jax.runtime import lazy_array
from vl_jax.runtime.lazy_array import LazyArray
from vl_jax.sharding import MeshConfig, make_mesh


def sharding(devices: int, *names: str | None) -> NamedSharding:
    mesh = make_mesh(MeshConfig(1, devices, 1, 1), devices=jax.devices()[:devices])
    return NamedSharding(mesh, P(*names))


def tree(seed: int, devices: int = 1) -> dict:
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((64, 32), np.float32)
    return {
        "layer": {"kernel": jax.device_put(kernel, sharding(devices, "fsdp"))},
        "scale": jax.device_put(random.standard_normal(8, np.float32), sharding(devices)),
    }


def training(seed: int, devices: int = 1) -> dict:
    count = jax.device_put(np.int32(seed), sharding(devices))
    return {
        "step": count,
        "moment": jax.tree.map(lambda x: (x * 2).astype(jnp.bfloat16), tree(seed, devices)),
    }


def abstract(value):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value)


def write(folder: Path, *steps: int) -> None:
    checkpointer = Checkpointer(folder)
    for step in steps:
        checkpointer.save(step, params=tree(step), training=training(step), record={"at": {"step": step}})
    checkpointer.close()


def read(folder: Path, devices: int = 1, wanted=None):
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore(
            params=abstract(tree(0, devices) if wanted is None else wanted),
            training_of=lambda record: abstract(training(0, devices)),
        )
    finally:
        checkpointer.close()


def assert_is_step(restored, step: int, devices: int = 1) -> None:
    found, params, state, record = restored
    assert found == step and record["at"] == {"step": step}
    expected = (tree(step, devices), training(step, devices))
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, b)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def attempt(folder: Path) -> tuple[int | None, list[str]]:
    """The step that came back, checked, and what was logged; or None and the error."""
    messages = Messages()
    logging.getLogger("vl_jax").addHandler(messages)
    try:
        restored = read(folder)
    except CheckpointError as error:
        return None, [str(error)]
    assert_is_step(restored, restored[0])
    return restored[0], messages.texts


def attempt_elsewhere(folder: Path) -> tuple[int | None, list[str]]:
    """``attempt`` in a process that ends: reads that storage abandons may complain at any later time."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(attempt, folder).result()


def largest_file(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert read(tmp_path / "run") is None


def test_the_newest_step_comes_back_bit_for_bit(tmp_path):
    write(tmp_path, 3, 7)
    assert_is_step(read(tmp_path), 7)


def test_arrays_saved_on_one_device_come_back_on_eight(tmp_path):
    write(tmp_path, 3)
    assert_is_step(read(tmp_path, devices=8), 3, devices=8)


def lazily(value):
    """The tree with every array read from a copy in memory, a piece at a time."""
    return jax.tree.map(lambda x: LazyArray.of(np.asarray(x)), value)


@pytest.mark.parametrize("lazy", [{"writer"}, {"reader"}, {"writer", "reader"}])
@pytest.mark.parametrize("piece", [60, 2**20])  # bytes: parts of a row, and whole arrays
def test_lazy_arrays_are_stored_as_ordinary_ones_are(tmp_path, monkeypatch, lazy, piece):
    monkeypatch.setattr(lazy_array, "PIECE", piece)
    form = lazily if "writer" in lazy else lambda value: value
    checkpointer = Checkpointer(tmp_path, lazy="writer" in lazy)
    checkpointer.save(3, params=form(tree(3)), training=form(training(3)), record={"step": 3})
    checkpointer.close()
    targets = abstract((tree(3, devices=8), training(3, devices=8)))
    checkpointer = Checkpointer(tmp_path, lazy="reader" in lazy)
    found = checkpointer.restore(params=targets[0], training_of=lambda _: targets[1])
    checkpointer.close()
    assert found is not None
    for leaf, expected in zip(
        jax.tree.leaves(found[1:3]), jax.tree.leaves((tree(3), training(3))), strict=True
    ):
        assert isinstance(leaf, LazyArray) == ("reader" in lazy)
        leaf = leaf[tuple(map(slice, leaf.shape))] if isinstance(leaf, LazyArray) else leaf
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_damage_is_noticed_before_a_lazy_array_is_given_back(tmp_path):
    checkpointer = Checkpointer(tmp_path, lazy=True)
    checkpointer.save(3, params=lazily(tree(3)), training=lazily(training(3)), record={})
    checkpointer.close()
    # Zeros of the same length in place of the smallest array: storage has nothing to complain about.
    other = Checkpointer(tmp_path / "other", lazy=True)
    zeros = jax.tree.map(jnp.zeros_like, tree(3))
    other.save(3, params=lazily(zeros), training=lazily(training(3)), record={})
    other.close()
    (tmp_path / "other/3/params/scale/0").rename(tmp_path / "3/params/scale/0")
    checkpointer = Checkpointer(tmp_path, lazy=True)
    targets = abstract((tree(3), training(3)))
    with pytest.raises(CheckpointError, match=r"checksum of params differs at \['scale'\]"):
        checkpointer.restore(params=targets[0], training_of=lambda _: targets[1])
    checkpointer.close()


def test_only_the_newest_steps_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5)
    assert sorted(int(f.name) for f in tmp_path.iterdir() if f.name.isdigit()) == [3, 4, 5]


@pytest.mark.parametrize("item", ["params", "training"])
def test_a_damaged_step_is_noticed_and_the_one_before_is_used(tmp_path, item):
    write(tmp_path, 3, 7)
    file = largest_file(tmp_path / "7" / item)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    step, (message,) = attempt_elsewhere(tmp_path)
    assert step == 3
    assert message.startswith("checkpoint skipped: step 7") and "\n" not in message


def test_a_flipped_bit_that_still_decodes_is_found_by_the_checksum():
    before = tree(1)
    flipped = np.asarray(before["layer"]["kernel"]).copy()
    flipped.view(np.uint32)[5, 5] ^= 1
    after = {**before, "layer": {"kernel": jnp.asarray(flipped)}}
    changed = {name for name, value in checksums(after).items() if value != checksums(before)[name]}
    assert changed == {"['layer']['kernel']"}


def test_two_exchanged_values_change_the_checksum():
    a = jnp.array([1.0, 2.0, 3.0])
    assert checksums({"a": a}) != checksums({"a": a[::-1]})


def test_a_step_without_its_record_is_passed_over(tmp_path):
    write(tmp_path, 3, 7)
    for file in (tmp_path / "7" / "record").rglob("*"):
        if file.is_file():
            file.unlink()
    step, (message,) = attempt_elsewhere(tmp_path)
    assert step == 3
    assert message.startswith("checkpoint skipped: step 7")


def test_a_step_that_was_still_being_written_is_ignored(tmp_path):
    write(tmp_path, 3)
    half = tmp_path / "7.orbax-checkpoint-tmp-1"
    (half / "params").mkdir(parents=True)
    assert_is_step(read(tmp_path), 3)


def test_when_no_step_is_sound_the_error_is_one_line(tmp_path):
    write(tmp_path, 3)
    largest_file(tmp_path / "3" / "params").write_bytes(b"nothing")
    step, (error,) = attempt_elsewhere(tmp_path)
    assert step is None
    assert error.startswith("no checkpoint can be restored; step 3: ") and "\n" not in error


def test_a_checkpoint_of_another_model_is_refused_by_leaf(tmp_path):
    write(tmp_path, 3)
    other = tree(0)
    other["layer"] = {"weight": other["layer"]["kernel"][:32]}
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, wanted=other)
    message = str(error.value)
    assert "another model: layer/kernel is (64, 32) in the checkpoint, absent in the model" in message
    assert "layer/weight is absent in the checkpoint, (32, 32) in the model" in message
    assert "\n" not in message


def test_the_checksum_does_not_depend_on_sharding():
    assert checksums(tree(5, 1)) == checksums(tree(5, 8))
    assert checksums(training(5, 1)) == checksums(training(5, 8))
