"""Sweeps: what runs, under which name; that nothing runs twice; and the page that compares."""

from __future__ import annotations

import csv
import json

import pytest

from vl_jax import cli, config, runs, schema, sweep
from vl_jax.report import comparison
from vl_jax.schema import ConfigError

pytest.importorskip("ml_collections")

FILE = """
from pathlib import Path
from vl_jax import config
def sweep_rate():
    for rate in (0.1, 0.2):
        yield {"stages.first.optimizer.learning_rate": rate}
def sweep_scheme():
    yield {"model.moe.scheme": "top_k"}
    yield {"model.moe.scheme": "loss_free", "model.moe.balance.bias_rate": 0.5}
def sweep_wrong():
    yield {"model.moe.top_k": 99}
def get_config():
    return config.view(config.load(%r))
"""


@pytest.fixture
def spec(tmp_path) -> str:
    tiny = str(__file__).replace("test_sweep.py", "tiny_experiment.py")
    path = tmp_path / "file.py"
    path.write_text(FILE % tiny)
    return str(path)


def leave_a_run(chosen, folder) -> None:
    """What training leaves behind, as far as the comparison reads it."""
    (folder / "eval" / "held").mkdir(parents=True)
    (folder / "config.json").write_text(schema.to_json(chosen))
    score = 0.5 if chosen.model.moe.scheme == "top_k" else 0.75
    scores = {"exact_match": score, "blind_exact_match": 0.25, "count": 4}
    groups = {"kind": {"colour": {"exact_match": 1.0}}}
    result = {"headline": "exact_match", "scores": scores, "groups": groups, "shares": list(scores)[:2]}
    (folder / "eval" / "held" / "2.json").write_text(json.dumps(result))
    lines = [{"step": n, "loss": 3.0 - n, "routing/maxvio": [1.0, 3.0]} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"wall_time_s": 7}))


def test_sweeps_are_multiplied_and_runs_named_after_what_differs(spec):
    variants = config.sweep(spec, ["rate", "scheme"])
    assert [sweep.folder_name(v) for v in variants] == [
        "learning_rate=0.1,scheme=top_k",
        "learning_rate=0.1,scheme=loss_free,bias_rate=0.5",
        "learning_rate=0.2,scheme=top_k",
        "learning_rate=0.2,scheme=loss_free,bias_rate=0.5",
    ]
    assert sweep.folder_name({}) == "base"
    assert sweep.folder_name({"model.moe.scheme": "../x/my.py:router"}) == "scheme=..-x-my.py-router"
    with pytest.raises(ConfigError, match="--sweep=speed: .*file.py has rate, scheme, wrong"):
        config.sweep(spec, ["speed"])


def test_a_finished_run_is_not_repeated_and_all_are_compared(spec, tmp_path, monkeypatch, capsys):
    ran = []

    def run(chosen, folder):
        ran.append((folder.name, chosen.seed))
        leave_a_run(chosen, folder)

    monkeypatch.setattr(runs, "run", run)
    command = ["sweep", f"--config={spec}", "--sweep=scheme", f"--workdir={tmp_path / 'runs'}"]
    assert cli.main([*command, "--config.seed=3"]) == 0
    assert ran == [("scheme=top_k", 3), ("scheme=loss_free,bias_rate=0.5", 3)]
    assert cli.main([*command, "--config.seed=3"]) == 0 and len(ran) == 2
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "runs" / "comparison.html")
    with (tmp_path / "runs" / "comparison.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["scheme=top_k"]["held: exact_match"] == "0.5"
    assert rows["scheme=loss_free,bias_rate=0.5"]["held: exact_match"] == "0.75"
    assert rows["scheme=top_k"]["held: blind_exact_match"] == "0.25"
    assert rows["scheme=top_k"]["held: kind=colour"] == "1.0"
    assert rows["scheme=top_k"]["routing/maxvio_mean"] == "2.0" and rows["scheme=top_k"]["loss"] == "1.5"
    page = (tmp_path / "runs" / "comparison.html").read_text(encoding="utf-8")
    assert "75.0 %" in page and "100.0 %" in page and "2 runs" in page and "<script" not in page


def test_configurations_are_checked_before_anything_runs(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match="config.model.moe: top_k=99"):
        sweep.run(spec, ["rate", "wrong"], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_does_not_stop_the_others(spec, tmp_path, monkeypatch):
    def run(chosen, folder):
        if chosen.model.moe.scheme == "top_k":
            raise ValueError("no room")
        leave_a_run(chosen, folder)

    monkeypatch.setattr(runs, "run", run)
    with pytest.raises(ValueError, match="1 of 2 runs failed: scheme=top_k; see"):
        sweep.run(spec, ["scheme"], tmp_path / "runs")
    assert [row.name for row in comparison._runs(tmp_path / "runs")] == ["scheme=loss_free,bias_rate=0.5"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run below it"):
        comparison.write_comparison(tmp_path)
