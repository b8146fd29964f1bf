"""Traces of some steps of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from vl_jax import cli
from vl_jax.runtime import trace

TINY = ROOT / "tests/tiny_experiment.py"


@pytest.mark.parametrize(("text", "steps"), [("1", [1]), ("20", [20]), ("3-5", [3, 4, 5])])
def test_steps_are_counted_from_one(text: str, steps: list[int]):
    assert list(trace.steps_of(text, 20)) == steps


@pytest.mark.parametrize("text", ["0", "0-3", "5-3", "19-21", "21"])
def test_steps_that_the_run_does_not_have_are_refused(text: str):
    with pytest.raises(ValueError, match=f"--profile={text} must be steps from 1 to 20"):
        trace.steps_of(text, 20)


@pytest.mark.parametrize("text", ["steps", "3:5", "-3", "3-", "1.5", "3 - 5"])
def test_what_names_no_steps_is_refused(text: str):
    with pytest.raises(ValueError, match="must be a step such as 12, or steps such as 10-12"):
        trace.steps_of(text, 20)


class _Step:
    def __init__(self, step: int):
        self.global_step = step


def _traces(folder: Path) -> list[Path]:
    return list(folder.rglob("*.xplane.pb"))


def test_a_trace_that_ends_early_is_written(tmp_path: Path):
    with trace.traced(range(2, 9), tmp_path) as (hook,):
        for step in (1, 2, 3):
            hook.before_step({}, _Step(step))
            assert hook.after_step({}, {"loss": step}, _Step(step)) == {"loss": step}
            assert not _traces(tmp_path)
    assert len(_traces(tmp_path / trace.PROFILE)) == 1


def test_a_run_that_is_further_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING"), trace.traced(range(2, 4), tmp_path) as (hook,):
        for step in (7, 8):
            hook.before_step({}, _Step(step))
            hook.after_step({}, {}, _Step(step))
    assert caplog.text.count("no trace: the run goes on after step 3") == 1
    assert not (tmp_path / trace.PROFILE).exists()


def test_without_steps_nothing_is_traced(tmp_path: Path):
    with trace.traced(None, tmp_path) as hooks:
        assert hooks == ()


def test_wrong_steps_end_a_run_before_it_has_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["train", f"--config={TINY}", f"--workdir={tmp_path}/run", "--profile=90-95"]
    assert cli.main(given) == 2
    assert "--profile=90-95 must be steps from 1 to 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_traced(tmp_path: Path):
    assert cli.main(["train", f"--config={TINY}", f"--workdir={tmp_path}", "--profile=3-5"]) == 0
    (file,) = _traces(tmp_path / trace.PROFILE)
    content = file.read_bytes()
    assert b"step_num" in content and b"train" in content
