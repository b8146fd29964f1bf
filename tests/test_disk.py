"""A full disk is one line that says what was to be written; files are whole or not there."""

from __future__ import annotations

import errno
import os

import pytest

from vl_jax.runtime import disk


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file.json"
    disk.write_text(path, "one")
    path.chmod(0o640)
    disk.write_text(path, "zwölf\n")
    assert path.read_text(encoding="utf-8") == "zwölf\n" and path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", disk.FULL)
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, monkeypatch, number):
    path = tmp_path / "file.json"
    disk.write_text(path, "old")

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*file\.json: .*; 1,234 bytes more are needed, "
    ) as caught:
        disk.write_bytes(path, b"x" * 1234)
    assert caught.value.errno == number and "\n" not in str(caught.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(IsADirectoryError):
        disk.write_text(tmp_path, "x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_system_really_says_so(tmp_path):
    with pytest.raises(OSError) as caught:
        with disk.naming(tmp_path / "log", needed=3), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"abc")
    assert caught.value.errno == errno.ENOSPC and "3 bytes more are needed" in str(caught.value)
