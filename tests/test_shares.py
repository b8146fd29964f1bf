"""Conversions that several workers share: the same files, whoever writes which, whatever interrupts them."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mounts
import pytest

from vl_jax.data.sources.build import ScenesConfig, open_source
from vl_jax.data.tools import convert as convert_lib
from vl_jax.data.tools.convert import WHOLE, Report, Share, Unfinished, convert
from vl_jax.runtime.storage import folders

pytest.importorskip("array_record")
CONFIG = ScenesConfig("s", num_examples=7)


def converted(target: Path, share: Share = WHOLE, **options) -> Report | Unfinished:
    return convert(CONFIG, open_source(CONFIG), target, per_file=2, share=share, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Report, dict[str, bytes]]:
    target = tmp_path_factory.mktemp("alone") / "out"
    report = converted(target)
    assert isinstance(report, Report)
    return report, contents(target)


@pytest.mark.parametrize("count", [1, 2, 3, 6])  # of four files
def test_shares_make_the_files_of_one_worker_in_whatever_order(tmp_path, alone, count):
    for number, order in enumerate(itertools.islice(itertools.permutations(range(count)), 4)):
        target = tmp_path / f"out{number}"
        reports = [converted(target, Share(index, count)) for index in order]
        assert contents(target) == alone[1] and not target.with_name(f"out{number}.partial").exists()
        ends = [report for report in reports if isinstance(report, Report)]
        assert ends and all(report == alone[0] for report in ends)
        assert all(isinstance(report, Unfinished) for report in reports[: -len(ends)])


def test_a_share_says_what_is_missing_and_is_not_done_again(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert converted(out, Share(1, 2)) == Unfinished(2, 4)
    assert not out.exists()
    monkeypatch.setattr(convert_lib, "_write_part", lambda *_: pytest.fail("written twice"))
    assert converted(out, Share(1, 2)) == Unfinished(2, 4)
    assert str(Unfinished(2, 4)) == "2 of 4 files are there; the worker that writes the last one ends it"


def test_shares_of_disks_of_their_own_are_put_together_without_writing_again(tmp_path, alone, monkeypatch):
    for index in range(2):
        converted(tmp_path / str(index) / "out", Share(index, 2))
    shutil.copytree(tmp_path / "0/out.partial", tmp_path / "1/out.partial", dirs_exist_ok=True)
    monkeypatch.setattr(convert_lib, "_write_part", lambda *_: pytest.fail("written again"))
    assert converted(tmp_path / "1/out") == alone[0]
    assert contents(tmp_path / "1/out") == alone[1]


def test_workers_may_end_at_the_same_time(tmp_path, alone):
    for trial in range(8):
        out = tmp_path / f"out{trial}"
        with ThreadPoolExecutor(3) as pool:
            reports = list(pool.map(lambda index, out=out: converted(out, Share(index, 3)), range(3)))
        assert alone[0] in reports and contents(out) == alone[1]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EXDEV, errno.EMFILE])
def test_a_folder_that_cannot_be_renamed_is_moved_file_by_file(tmp_path, alone, monkeypatch, error):
    mounts.refuse(monkeypatch, error)
    assert not folders.can_be_renamed(tmp_path) and not list(tmp_path.iterdir())
    assert converted(tmp_path / "out") == alone[0]
    assert contents(tmp_path / "out") == alone[1] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moved", [0, 1, 3, 7])
def test_a_move_that_was_interrupted_is_finished(tmp_path, alone, monkeypatch, moved):
    mounts.refuse(monkeypatch, errno.ENOSYS)
    replace, left = os.replace, [moved]

    def dies(source, target):
        if os.path.dirname(source) != os.path.dirname(target):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path / "out")
    assert not (tmp_path / "out" / convert_lib.REPORT).exists()
    monkeypatch.setattr(os, "replace", replace)
    assert converted(tmp_path / "out") == alone[0]
    assert contents(tmp_path / "out") == alone[1] and os.listdir(tmp_path) == ["out"]


def test_a_folder_can_be_renamed_here_and_the_trial_leaves_nothing(tmp_path):
    assert folders.can_be_renamed(tmp_path / "new") and not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "1/2/3", "a/b", "0 / 2"])
def test_what_is_no_share_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^shard=.*must be i/n with 0 <= i < n, such as 0/8 to 7/8$"):
        Share.parse(text)
    assert Share.parse("3/8") == Share(3, 8)
