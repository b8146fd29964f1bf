"""Checkpoints: what is saved comes back, on any mesh; what is damaged is noticed and passed over."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import checkpoint
from vl_jax.checkpoint import Checkpointer, CheckpointError, NotFiniteError, OtherTreeError
from vl_jax.runtime import checksums as checksums_lib
from vl_jax.runtime import lazy_array
from vl_jax.runtime.checksums import checksums, earlier_checksums, examined, not_finite
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


def write(folder: Path, *steps: int, **options) -> None:
    checkpointer = Checkpointer(folder, **options)
    for step in steps:
        checkpointer.save(step, params=tree(step), training=training(step), record={"at": {"step": step}})
    checkpointer.close()


def restore(checkpointer: Checkpointer, devices: int = 1, wanted=None, state=None, *, mend: bool = False):
    state = training(0, devices) if state is None else state
    return checkpointer.restore(
        params=abstract(tree(0, devices) if wanted is None else wanted),
        training_of=lambda record: abstract(state),
        mend=mend,
    )


def read(folder: Path, devices: int = 1, wanted=None, state=None):
    checkpointer = Checkpointer(folder)
    try:
        return restore(checkpointer, devices, wanted, state)
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
        return pool.submit(attempt, folder).result(timeout=600)


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
@pytest.mark.slow
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
    with pytest.raises(CheckpointError, match=r"checksum of params differs at scale"):
        checkpointer.restore(params=targets[0], training_of=lambda _: targets[1])
    checkpointer.close()


def test_only_the_newest_steps_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5)
    assert sorted(int(f.name) for f in tmp_path.iterdir() if f.name.isdigit()) == [3, 4, 5]


def test_every_nth_step_stays_beside_the_newest_and_the_best(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5, 6, 7, 8, keep=2, every=3, others=lambda: {1})
    assert sorted(int(f.name) for f in tmp_path.iterdir() if f.name.isdigit()) == [1, 3, 6, 7, 8]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_arrays_come_back_in_another_dtype_once_they_are_checked(tmp_path, dtype):
    def other(value):
        return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, value)

    write(tmp_path, 3)
    wanted, state = other(tree(0, 8)), jax.tree.map(lambda x: x.astype(jnp.float32), training(0, 8)["moment"])
    step, params, found, _ = read(tmp_path, 8, wanted, {"step": training(0, 8)["step"], "moment": state})
    assert step == 3
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other(tree(3, 8))), strict=True):
        assert a.dtype == dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(found["moment"]), jax.tree.leaves(training(3)["moment"]), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


def test_a_leaf_of_another_kind_is_refused(tmp_path):
    write(tmp_path, 3)
    wanted = {**tree(0), "scale": jnp.zeros(8, jnp.int32)}
    with pytest.raises(OtherTreeError, match="scale is float32 in the checkpoint, int32 in the model"):
        read(tmp_path, wanted=wanted)


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


def record_file(folder: Path, step: int) -> Path:
    return largest_file(folder / str(step) / "record")


def change_record(folder: Path, step: int, change) -> None:
    """Writes the record of a step anew."""
    file = record_file(folder, step)
    record = json.loads(file.read_text())
    file.write_text(json.dumps(change(record)))


def as_earlier(record: dict, step: int) -> dict:
    """The record that earlier versions wrote of a step."""
    sums = {"params": earlier_checksums(tree(step)), "training": earlier_checksums(training(step))}
    return {"at": record["at"], "checksums": sums}


def test_checkpoints_of_earlier_versions_are_read_and_checked(tmp_path):
    write(tmp_path, 3, 7)
    change_record(tmp_path, 3, lambda record: as_earlier(record, 3))
    change_record(tmp_path, 7, lambda record: as_earlier(record, 6))  # as if all had changed since
    step, messages = attempt(tmp_path)
    assert step == 3 and "step 7: checksum of params differs" in messages[0]


def test_a_record_that_was_changed_is_noticed(tmp_path):
    write(tmp_path, 3, 7)
    change_record(tmp_path, 7, lambda record: {**record, "at": {"step": 8}})
    assert attempt(tmp_path) == (
        3,
        ["checkpoint skipped: step 7: the record of step 7 differs from its checksum"],
    )
    shutil.copytree(tmp_path / "3", tmp_path / "9")  # sound, and of another step
    step, messages = attempt(tmp_path)
    assert step == 3 and "the record of step 9 differs" in messages[0]


def test_damaged_steps_are_set_aside_and_written_anew(tmp_path, caplog):
    write(tmp_path, 3, 7, 9)
    for step in (7, 9):
        change_record(tmp_path, step, lambda record: {**record, "at": {}})
    (tmp_path / "8.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    checkpointer = Checkpointer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="vl_jax"):
        assert_is_step(restore(checkpointer, mend=True), 3)
    lines = [message for message in caplog.messages if "set aside" in message]
    assert len(lines) == 2 and f"set aside as {tmp_path / 'damaged' / '9'}" in lines[0]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["3", "damaged"]
    assert sorted(f.name for f in (tmp_path / "damaged").iterdir()) == ["7", "9"]
    checkpointer.save(7, params=tree(7), training=training(7), record={"at": {"step": 7}})
    checkpointer.close()
    assert_is_step(read(tmp_path), 7)
    change_record(tmp_path, 7, lambda record: {**record, "at": {}})
    checkpointer = Checkpointer(tmp_path)
    assert_is_step(restore(checkpointer, mend=True), 3)  # again: both are kept
    checkpointer.close()
    assert sorted(f.name for f in (tmp_path / "damaged").iterdir()) == ["7", "7-1", "9"]


def test_nothing_is_set_aside_where_no_step_is_sound(tmp_path):
    write(tmp_path, 3)
    change_record(tmp_path, 3, lambda record: {**record, "at": {}})
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint can be restored; step 3: .* to begin anew"):
        restore(checkpointer, mend=True)
    checkpointer.close()
    assert (tmp_path / "3").is_dir()


def test_what_was_not_saved_is_not_said_to_be(tmp_path):
    write(tmp_path, 7)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="step 3 is not saved: .* holds step 7 already"):
        checkpointer.save(3, params=tree(3), training=training(3), record={})
    checkpointer.close()


def test_parameters_that_are_not_finite_never_become_the_newest_step(tmp_path):
    write(tmp_path, 3)
    bad = {**tree(7), "scale": jnp.array([1.0, jnp.nan] * 4)}
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError) as error:
        checkpointer.save(7, params=bad, training=training(7), record={"at": {"step": 7}})
    checkpointer.close()
    assert str(error.value) == (
        "step 7 is not saved: parameters are not finite: scale; the newest checkpoint is of step 3"
    )
    state = {**training(7), "step": jnp.float32(jnp.inf)}
    with pytest.raises(NotFiniteError, match="the training state is not finite: step; the newest"):
        checkpointer.save(7, params=tree(7), training=state, record={})
    lazy = Checkpointer(tmp_path, lazy=True)  # as earlier versions would have written it
    lazy.save(7, params=lazily(bad), training=lazily(training(7)), record={"at": {"step": 7}})
    lazy.close()
    step, (message,) = attempt(tmp_path)
    assert step == 3 and message == "checkpoint skipped: step 7: parameters are not finite: scale"


def test_a_full_disk_is_told_with_what_is_missing(tmp_path, monkeypatch):
    write(tmp_path, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    checkpointer = Checkpointer(tmp_path)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves((tree(7), training(7))))
    assert needed == 12_340
    with pytest.raises(CheckpointError) as error:
        checkpointer.save(7, params=tree(7), training=training(7), record={})
    checkpointer.close()
    assert str(error.value) == (
        f"step 7 is not saved in {tmp_path}: it needs 12.3 kB, 1 kB are free; the newest checkpoint is of "
        "step 3; make room and run again"
    )
    assert [f.name for f in tmp_path.iterdir()] == ["3"]


def test_a_save_that_fails_on_its_way_to_disk_is_told_in_one_line(tmp_path, monkeypatch):
    write(tmp_path, 3)
    checkpointer = Checkpointer(tmp_path)

    def fails():
        raise OSError("No space left on device\nand more")

    monkeypatch.setattr(checkpointer._manager, "wait_until_finished", fails)
    checkpointer._writing = 7, 10**18
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(CheckpointError) as error:
        checkpointer.close()
    assert "it needs 1e+06 TB" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("make room and run again (OSError: No space left on device and more)")
    assert [f.name for f in tmp_path.iterdir()] == ["3"]


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


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, bool, np.int64])
def test_any_changed_bits_change_the_checksum(dtype):
    random = np.random.default_rng(0)
    array = random.integers(0, 2, (70_000,) if dtype is np.int8 else (300, 3)).astype(dtype)
    size = array.dtype.itemsize
    before, seen = checksums({"a": array})["['a']"], set()
    for number in range(200):
        changed = array.copy()
        bytes_ = changed.reshape(-1).view(np.uint8).reshape(-1, size)
        rows = random.choice(len(bytes_), 1 + number % 6, replace=False)
        if array.dtype == bool:
            bytes_[rows] ^= 1
        elif number % 2:  # signs, one or several
            bytes_[rows, -1] ^= 0x80
        else:
            bytes_[rows, random.integers(size)] ^= np.uint8(1 << random.integers(8))
        seen.add(checksums({"a": changed})["['a']"])
    assert before not in seen


def test_an_earlier_checksum_does_not_see_two_signs():
    array = np.ones(4, np.float32)
    changed = array * np.array([-1, 1, -1, 1], np.float32)
    assert earlier_checksums({"a": array}) == earlier_checksums({"a": changed})
    assert checksums({"a": array}) != checksums({"a": changed})


def test_a_checksum_by_hand():
    """Of one zero at index 0 it is 0; of a one, the published finaliser of 1."""
    assert checksums({"a": np.zeros(1, np.uint32)}) == {"['a']": 0}
    assert checksums({"a": np.ones((), np.uint32)}) == {"['a']": 0x514E28B7}


def test_leaves_that_are_not_finite_are_named_wherever_they_are():
    value = {"a": jnp.array([1.0, jnp.inf]), "b": jnp.arange(3), "c": jnp.array(jnp.nan, jnp.bfloat16)}
    spread = jax.device_put(np.array([1.0] * 7 + [np.nan], np.float32), sharding(8, "fsdp"))
    assert not_finite(value | {"d": spread, "e": spread.at[7].set(0)}) == ["['a']", "['c']", "['d']"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32"])
@pytest.mark.parametrize("devices", [1, 8])
def test_one_pass_finds_checksums_and_what_is_not_finite(dtype, devices):
    random = np.random.default_rng(1)
    for trial, size in enumerate((8, 64, 70_000)):
        array = random.standard_normal(size, np.float32).astype(jnp.dtype(dtype))
        if trial and dtype != "int32":
            array[random.integers(size)] = [np.nan, np.inf, -np.inf][random.integers(3)]
        value = {"a": jax.device_put(array, sharding(devices, "fsdp")), "b": jnp.zeros(())}
        sums, bad = examined(value)
        assert sums == checksums(value) and bad == not_finite(value)
        assert bad == ["['a']"] * (not np.isfinite(array.astype(np.float32)).all())


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert message.startswith(f"step 3 of {tmp_path} is of another model: ")
    assert "2 leaves found, 2 expected; go on with the options the run began with" in message
    assert "another model: layer/kernel is (64, 32) in the checkpoint, absent in the model" in message
    assert "layer/weight is absent in the checkpoint, (32, 32) in the model" in message
    assert "\n" not in message


@pytest.mark.parametrize("earlier", [False, True])
def test_a_checkpoint_of_another_optimiser_is_refused_by_leaf(tmp_path, earlier):
    write(tmp_path, 3)
    if earlier:
        change_record(tmp_path, 3, lambda record: as_earlier(record, 3))
    other = {"step": training(0)["step"], "optimizer": (tree(0)["layer"],)}
    with pytest.raises(CheckpointError if earlier else OtherTreeError) as error:
        read(tmp_path, state=other)
    message = str(error.value)
    assert "step 3" in message and "\n" not in message
    assert "moment/layer/kernel is (64, 32) in the checkpoint, absent in the model" in message
    assert "optimizer/0/kernel is absent in the checkpoint, (64, 32) in the model" in message
    assert "another optimiser or routing scheme" in message and "3 leaves found, 2 expected" in message


def test_the_checksum_does_not_depend_on_sharding():
    assert checksums(tree(5, 1)) == checksums(tree(5, 8))
    assert checksums(training(5, 1)) == checksums(training(5, 8))
    assert earlier_checksums(training(5, 1)) == earlier_checksums(training(5, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool", "float64"])
@pytest.mark.parametrize("in_a_mesh", [False, True])
def test_compiled_programs_give_the_checksum_that_numpy_gives(dtype, in_a_mesh, monkeypatch):
    random = np.random.default_rng(2)
    mesh = Mesh(np.array(jax.devices()).reshape(-1), ("x",))
    with jax.set_mesh(mesh) if in_a_mesh else contextlib.nullcontext():
        for size in (2**14 - 1, 2**15, 2**16 + 2**14 + 7):
            array = (2 * random.standard_normal(size, np.float32)).astype(jnp.dtype(dtype))
            for bad in (None, np.inf, np.nan) if jnp.issubdtype(array.dtype, jnp.floating) else (None,):
                if bad is not None:
                    array[random.integers(size)] = bad
                found = []
                for sizes in ((), (2**15, 2**14)):
                    monkeypatch.setattr(checksums_lib, "_COMPILED", sizes)
                    found += [examined({"a": array}), examined({"a": LazyArray.of(array)})]
                assert found == [found[0]] * 4
                assert found[0][1] == ([] if bad is None else ["['a']"])
