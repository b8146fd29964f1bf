from __future__ import annotations

import builtins
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.metrics import TIMING_KEYS, MetricsWriter, read_metrics, truncate, without_timings


def _run(workdir: Path, *, start: int | None, stop: int, speed: float) -> None:
    """A run whose mathematics depends on the step only, and whose clock reads ``speed``."""
    with MetricsWriter(workdir, resume_step=start) as writer:
        for step in range(0 if start is None else start + 1, stop + 1):
            scalars = {"loss": 1 / (step + 1), "tokens_per_second": speed}
            writer.write(step, scalars, {"routing/load": [[step, 0.5]]}, stage="a" if step < 4 else "b")


def test_resumed_log_equals_uninterrupted_log(tmp_path: Path):
    _run(tmp_path / "whole", start=None, stop=9, speed=10.0)
    _run(tmp_path / "killed", start=None, stop=7, speed=20.0)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    _run(tmp_path / "killed", start=5, stop=9, speed=30.0)
    whole, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [without_timings(line) for line in whole] == [without_timings(line) for line in killed]
    assert [line["tokens_per_second"] for line in killed] == [20.0] * 6 + [30.0] * 4


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.integers(0, 20), max_size=12).map(sorted), data=st.data())
@pytest.mark.slow
def test_truncation_keeps_exactly_the_whole_lines_of_earlier_steps(tmp_path_factory, steps, data):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    content = b"".join(json.dumps({"step": s, "n": n}).encode() + b"\n" for n, s in enumerate(steps))
    cut = data.draw(st.integers(0, len(content)))
    first_step = data.draw(st.integers(0, 21))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    truncate(path, first_step=first_step)
    assert read_metrics(path) == [{"step": s, "n": n} for n, s in enumerate(steps[:whole]) if s < first_step]
    assert path.read_bytes() == b"" or path.read_bytes().endswith(b"\n")
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_new_run_starts_an_empty_log(tmp_path: Path):
    _run(tmp_path, start=None, stop=3, speed=1.0)
    MetricsWriter(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_line_is_readable_as_soon_as_it_is_written(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


def test_non_finite_values_are_null(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan")}, {"routing/maxvio": np.array([np.inf, 2.0], np.float32)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "routing/maxvio": [None, 2.0],
    }


def test_scalars_survive_the_round_trip_exactly(tmp_path: Path):
    values = {"a": 0.1 + 0.2, "b": float(np.float32(1 / 3)), "c": 1e-300}
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, values)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert {name: line[name] for name in values} == values


def test_half_line_in_the_middle_is_an_error(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_step_already_in_the_log_is_refused(tmp_path: Path):
    _run(tmp_path, start=None, stop=5, speed=1.0)
    with MetricsWriter(tmp_path, resume_step=5) as writer:
        with pytest.raises(ValueError, match="step=5"):
            writer.write(5, {})


@pytest.mark.parametrize("name", ["step", "stage", "both"])
def test_taken_name_is_refused(tmp_path: Path, name: str):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=name):
            writer.write(0, {name: 1.0}, {"both": [1.0]})


def test_timings_are_the_only_thing_left_out_of_a_comparison():
    line = {"step": 1, "loss": 2.0} | {name: 3.0 for name in TIMING_KEYS}
    assert without_timings(line) == {"step": 1, "loss": 2.0}


def test_missing_tensorboard_is_one_warning(tmp_path: Path, monkeypatch, caplog):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ImportError("No module named 'tensorboardX'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 1.0})
        writer.write(1, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "no TensorBoard log: No module named 'tensorboardX'"
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_tensorboard_gets_the_scalars(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 1.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


@pytest.mark.parametrize("left", [0, 1, 12, -1])
def test_a_line_that_a_crash_has_cut_is_written_again_once(tmp_path: Path, left: int):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step}, {"routing/maxvio": [0.5]}, stage="one")
        last = json.loads(json.dumps(writer.last))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:left])
    for _ in range(2):
        with MetricsWriter(tmp_path, resume_step=3, last=last) as writer:
            assert writer.last == last
        assert path.read_bytes() == whole


def test_a_log_that_is_whole_stays_when_later_lines_are_dropped(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"loss": 1.0})
        last = dict(writer.last or {})
        writer.write(20, {"loss": 0.5})
    with MetricsWriter(tmp_path, resume_step=15, last=last) as writer:
        writer.write(20, {"loss": 0.25})
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path / "metrics.jsonl")] == [
        (10, 1.0),
        (20, 0.25),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_with_the_bytes_that_are_missing(tmp_path: Path):
    words = r"metrics\.jsonl: no space left .*; \d+ bytes more are needed"
    with pytest.raises(OSError, match=words) as caught:
        with MetricsWriter(tmp_path) as writer:
            writer._file.close()
            writer._file = open("/dev/full", "wb", buffering=0)
            writer.write(1, {"loss": 1.0})
    assert "\n" not in str(caught.value)


def test_tensorboard_gets_the_figures_of_layers_and_of_evaluations(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        arrays = {"routing/maxvio": [0.5, 0.25], "routing/load": [[[1.0]]]}
        writer.write(3, {"eval/heldout/loss": 1.5, "bad": float("nan")}, arrays)
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = file.read_bytes()
    for name in (b"eval/heldout/loss", b"routing/maxvio/layer_0", b"routing/maxvio/layer_1"):
        assert found.count(name) == 1
    assert b"routing/load" not in found and b"bad" not in found
