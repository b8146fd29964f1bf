"""Indices that are kept: made once, mapped then, and never relied on when anything is wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from vl_jax.data.files import index_cache

ARRAYS = {
    "wide": np.arange(20_000, dtype=np.int64),
    "odd": np.arange(99_999, dtype=np.uint8),
    "none": np.zeros(0, np.uint16),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where indices are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vl_jax" / "index"


class Made:
    """A way to make an index that counts how often it was asked to."""

    count = 0

    def __init__(self, arrays=ARRAYS):
        self.arrays = arrays

    def __call__(self, done):
        self.count += 1
        done(1)
        return self.arrays


def keep(files, made, sound=lambda arrays: True, kind="test-1"):
    found = index_cache.keep(kind, files, made, sound)
    assert found.keys() == made.arrays.keys()
    for name, array in made.arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def write(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_text(name)
    return [folder / name for name in names]


def test_an_index_is_made_once_for_the_same_files(tmp_path, folder):
    files, made = write(tmp_path, "a", "b"), Made()
    for _ in range(3):
        keep(files, made)
    assert made.count == 1 and len(list(folder.iterdir())) == 1
    keep(files[:1], made)
    keep(files, made, kind="test-2")
    assert made.count == 3 and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("change", [lambda f: f.write_text("longer"), lambda f: os.utime(f, ns=(1, 1))])
def test_an_index_of_files_that_have_changed_is_made_anew_in_its_place(tmp_path, folder, change):
    files, made = write(tmp_path, "a", "b"), Made()
    keep(files, made)
    change(files[1])
    keep(files, made)
    keep(files, made)
    assert made.count == 2 and len(list(folder.iterdir())) == 1


def test_an_index_that_is_not_sound_is_made_anew(tmp_path):
    files, made = write(tmp_path, "a"), Made()
    keep(files, made)
    keep(files, made, sound=lambda arrays: False)
    keep(files, made, sound=lambda arrays: arrays["absent"])
    assert made.count == 3


def test_a_small_index_is_not_kept(tmp_path, folder):
    made = Made({"few": np.arange(9)})
    keep(write(tmp_path, "a"), made)
    assert made.count == 1 and not folder.exists()


def test_without_a_folder_to_write_to_it_is_made_every_time(tmp_path, monkeypatch):
    files, made = write(tmp_path, "a"), Made()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep(files, made)
    keep(files, made)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    keep(files, made)
    assert made.count == 3


def test_a_write_that_fails_leaves_nothing(tmp_path, folder, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    keep(write(tmp_path, "a"), Made())
    assert list(folder.iterdir()) == []


def test_a_damaged_index_is_made_anew(tmp_path, folder):
    files, chance = write(tmp_path, "a"), random.Random(0)
    keep(files, Made())
    (index,) = folder.iterdir()
    whole = index.read_bytes()
    for _ in range(60):
        damaged, made = bytearray(whole), Made()
        at = chance.choice([chance.randrange(120), chance.randrange(len(whole))])
        way = chance.randrange(4)
        if way == 0:
            damaged[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            del damaged[at:]
        elif way == 2:
            del damaged[at : at + chance.randint(1, 20)]
        else:
            damaged[at:at] = chance.randbytes(chance.randint(1, 20))
        index.write_bytes(damaged)
        keep(files, made)
        assert made.count == 1, (way, at)
        assert index.read_bytes() == whole


def test_somebody_who_waits_is_told_for_what(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(index_cache, "_PATIENCE_S", 0.0)
    with caplog.at_level("INFO"):
        keep(write(tmp_path, "a", "b"), Made())
    assert "making the index of a and 1 more of 0 MB, ETA " in caplog.text
