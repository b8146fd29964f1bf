"""Sweeps: what runs, under which name; that nothing runs twice; and the page that compares."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vl_jax import cli, config, runs, schema, sweep
from vl_jax.report import charts, comparison
from vl_jax.report import row as row_of
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
    with (tmp_path / "runs" / "comparison.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["scheme=top_k"]["failed"].endswith("no room") and rows["scheme=top_k"]["loss"] == ""
    assert rows["scheme=loss_free,bias_rate=0.5"]["failed"] == ""


def test_a_finished_run_of_another_configuration_is_not_used_again(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run", leave_a_run)
    sweep.run(spec, ["scheme"], tmp_path / "runs")
    same = [("data.loading.num_workers", "1"), ("loop.keep_checkpoints", "1")]
    assert all(job.is_finished for job in sweep.jobs_of(spec, ["scheme"], tmp_path / "runs", same))
    for path, value in (("evaluation.limit", "3"), ("stages.first.steps", "5")):
        with pytest.raises(
            ConfigError, match=f"scheme=top_k holds a finished run of another .*config.{path}"
        ):
            sweep.run(spec, ["scheme"], tmp_path / "runs", [(path, value)])


def test_runs_are_rows_and_seeds_one_of_them(spec, tmp_path, monkeypatch):
    tiny = config.load(spec)
    for seed in range(3):
        for rate in (0.1, 0.2):
            chosen = config.replace(
                tiny, [("seed", str(seed)), ("stages.first.optimizer.learning_rate", str(rate))]
            )
            leave_a_run(chosen, tmp_path / f"learning_rate={rate},seed={seed}")
            lines = [{"step": n, "loss": 3.0 + rate + seed / 10} for n in (1, 2)]
            log = tmp_path / f"learning_rate={rate},seed={seed}" / "metrics.jsonl"
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "labels.json").write_text(json.dumps({"learning_rate=0.1,seed=0": "slow,seed=0"}))
    comparison.write_comparison(tmp_path, ["loss", "steps"])
    text = (tmp_path / "comparison.md").read_text()
    assert "|  | runs | loss | steps |" in text
    assert (
        "| slow | 3 | **3.20 ± 0.25** | 2 |" in text and "| learning_rate=0.2 | 3 | 3.30 ± 0.25 | 2 |" in text
    )
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "6 runs of 2 kinds" in page and "Single runs" in page
    with pytest.raises(
        ValueError, match="--columns=speed: no figure is called so; there are held: exact_match"
    ):
        comparison.write_comparison(tmp_path, ["speed"])


def test_a_sweep_of_seeds_goes_on_after_a_kill_and_its_tests_are_those_of_scipy(spec, tmp_path, monkeypatch):
    ran: list[str] = []
    schemes = ("top_k", "loss_free", "remoe", "expert_choice")
    loss = {s: 2.0 + 0.1 * n + 0.3 * np.random.default_rng(n).random(8) for n, s in enumerate(schemes)}

    def run(chosen, folder):
        if len(ran) == 13:  # here the first launch is killed
            ran.append("")
            raise KeyboardInterrupt
        ran.append(folder.name)
        leave_a_run(chosen, folder)
        value = loss[chosen.model.moe.scheme][chosen.seed]
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": value}) + "\n")

    four = f"def sweep_four():\n    return [{{'model.moe.scheme': s}} for s in {schemes}]\n"
    Path(spec).write_text(Path(spec).read_text() + four)
    monkeypatch.setattr(runs, "run", run)
    folder = tmp_path / "runs"
    command = ["sweep", f"--config={spec}", "--sweep=four", f"--workdir={folder}", "--seeds=8"]
    assert cli.main(command) == 130 and len(ran) == 14
    assert cli.main(command) == 0
    assert len(ran) == 33 and len(set(ran)) == 33  # every run once
    with (folder / "paired.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[0] == "less scheme=top_k" and len(rows) == 3
    at, found = head.index("loss"), {}
    for name, *values in rows:
        scheme = name.partition("=")[2].partition(" ")[0]
        difference = loss[scheme] - loss["top_k"]
        t = stats.ttest_rel(loss[scheme], loss["top_k"])
        options = {"permutation_type": "samples", "n_resamples": np.inf}
        exact = stats.permutation_test((difference,), lambda x, axis: np.mean(x, axis=axis), **options)
        mean, p, holm = map(float, values[at - 1 : at + 2])
        np.testing.assert_allclose((mean, p), (difference.mean(), exact.pvalue), rtol=1e-6)
        found[scheme] = (p, holm)
        half = np.diff(t.confidence_interval(0.95))[0] / 2
        page = (folder / "comparison.html").read_text(encoding="utf-8")
        assert charts.with_error(mean, half) in page and charts.number(p) in page
    ranked, most = sorted(found.values()), 0.0
    for place, (p, holm) in enumerate(ranked):
        most = max(most, min(1.0, p * (3 - place)))
        assert holm == pytest.approx(most)
    assert "scheme=expert_choice (not causal)" in page and "remoe (not causal)" not in page


def test_figures_of_routing_are_read_off_the_log():
    even, split = [[0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]
    assert row_of.information([even]) == pytest.approx((math.log(2), 0.0))
    assert row_of.information([split]) == pytest.approx((math.log(2), math.log(2)))
    assert row_of.information([[[0.0, 0.0]]]) == (0.0, 0.0)
    assert row_of.better("heldout: exact_match", {"heldout: exact_match"}) == "higher"
    assert row_of.better("eval/heldout/loss", set()) == "lower" and row_of.better("entropy", set()) is None
    assert len({charts.colour(n) for n in range(40)}) == 40


def test_parts_of_ones_own_are_called_by_their_names():
    variant = {"model.moe.scheme": "../x/my.py:router", "seed": "3"}
    assert sweep.label_of(variant) == "scheme=router (my.py),seed=3" and sweep.label_of({}) == "base"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run below it"):
        comparison.write_comparison(tmp_path)
