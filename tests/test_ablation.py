"""Ablations: what is declared, what runs, what is judged and how often wrongly, and what a seed reaches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import tiny

from vl_jax import cli, config, experiment, runs, schema, sweep
from vl_jax.ablation import budget, identity, judgement, page, plan, records, results, state, workers
from vl_jax.ablation.budget import ArmCost
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.ablation.workers import Job
from vl_jax.evaluate.statistics import smallest_p
from vl_jax.fit import flops
from vl_jax.layout import Variables
from vl_jax.report.figure import Dot, ForestRow, Panel, Stroke, Words, forest
from vl_jax.runtime import shipped
from vl_jax.runtime.lock import InUse
from vl_jax.schema import ConfigError
from vl_jax.train.loop import Stopped

pytest.importorskip("ml_collections")

FILE = """
from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
RATE = "stages.first.optimizer.learning_rate"
def ablation_rate():
    arms = (Arm("slow", {RATE: 0.1}), Arm("fast", {RATE: 0.2}))
    claim = Claim("fast", "slow", expected="lower", says="speed (nobody, 2026)")
    return Ablation(arms, "loss", "lower", (claim,), seeds=%d%s)
def sweep_other():
    yield {RATE: 0.1}
def get_config():
    return config.view(config.load(%r))
"""
TINY = str(__file__).replace("test_ablation.py", "tiny_experiment.py")
COST = ArmCost(16, 128, 12288, 77232, 76464, 3e9)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Writes an experiment file; the cost of an arm is not counted."""
    monkeypatch.setattr(budget, "cost_of", lambda experiment: COST)

    def write(seeds: int = 3, more: str = "") -> str:
        path = tmp_path / "file.py"
        path.write_text(FILE % (seeds, more, TINY))
        return str(path)

    return write


def trainer(monkeypatch, loss, ran=None, fail=()):
    """Runs leave a log whose loss is ``loss(rate, seed)``; those of the named (rate, seed) fail."""

    def run(chosen, folder):
        rate = chosen.stages[0].optimizer.learning_rate
        if ran is not None:
            ran.append((rate, chosen.seed))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(schema.to_json(chosen))
        if (rate, chosen.seed) in fail:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhile running")
        lines = [{"step": n, "loss": loss(rate, chosen.seed)} for n in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text(json.dumps({"wall_time_s": 7, "commit": "abc"}))

    def run_together(experiments, folders):
        reasons = []
        for chosen, folder in zip(experiments, folders, strict=True):
            try:
                runs.run(chosen, folder)
                reasons.append(None)
            except (RuntimeError, InUse) as error:
                reasons.append(error)
        return reasons

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "run_together", run_together)


def better(rate: float, seed: int) -> float:
    return 2.0 - rate + 0.01 * seed + 0.001 * ((7 * seed) % 5) * rate


# --- what is declared ---


def two(**options) -> Ablation:
    return Ablation(**{"arms": (Arm("a"), Arm("b")), "metric": "loss", "better": "lower", **options})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: two(arms=(Arm("a"),)), "expected two or more"),
        (lambda: two(arms=(Arm("a"), Arm("a"))), "different names"),
        (lambda: Arm("a/b"), "a name has letters"),
        (lambda: two(equal=("money",)), "equal='money' is no budget; there are steps, samples, tokens"),
        (lambda: two(claims=(Claim("a", "c"),)), "a against c: expected two of the arms a, b"),
        (lambda: Claim("a", "b", margin=0.1), "no other has one"),
        (lambda: Claim("a", "b", expected="not_higher"), "need a margin > 0"),
        (lambda: Claim("a", "b", expected="lower", margin=0.1), "no other has one"),
        (lambda: two(arms=(Arm("a"), Arm("b", tuning=({}, {})))), "tuning budget differs: a has 1, b has 2"),
        (lambda: two(seeds=0), "seeds=0"),
    ],
)
def test_a_wrong_declaration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_plan_is_the_same_after_it_was_written(tmp_path):
    arms = (Arm("a", {"x.y": 1}, ({"z": 0.5}, {})), Arm("b", tuning=({}, {"z": "t"})))
    declared = two(
        arms=arms, claims=(Claim("a", "b", "mse", "not_higher", 0.1, "so"),), columns=("loss", "routing/*")
    )
    again = plan.from_json(json.loads(json.dumps(plan.to_json(declared))))
    assert again.arms[0].changes == {"x.y": "1"} and again.arms[0].tuning == ({"z": "0.5"}, {})
    assert again.claims == declared.claims and again.columns == declared.columns
    assert plan.to_json(again) == plan.to_json(declared)
    assert not set(plan.seeds_of(declared)) & set(plan.tuning_seeds_of(declared))
    with pytest.raises(ConfigError, match="plan of an ablation: "):
        plan.from_json({"arms": []})


def test_an_arm_whose_budget_differs_is_refused():
    other = dataclasses.replace(COST, tokens=round(COST.tokens * 1.009), flops=COST.flops * 1.02)
    budget.check({"a": COST, "b": other}, ("tokens", "parameters"), 0.01)
    with pytest.raises(ConfigError, match=r"arm 'b': its budget differs: flops 3.06e\+09, 'a' has 3e\+09"):
        budget.check({"a": COST, "b": other}, ("tokens", "flops"), 0.01)


def test_products_are_counted_in_loops_and_branches():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

    def f(x, w):
        unused = x @ w @ w  # noqa: F841
        y = jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]
        return jax.lax.cond(y[0, 0] > 0, lambda y: y @ w @ w, lambda y: y @ w, y)

    once = 2 * 4 * 8 * 8
    assert flops.count(jax.make_jaxpr(f)(x, w).jaxpr) == 7 * once
    image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = jax.make_jaxpr(
        lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1), "SAME", dimension_numbers=numbers)
    )
    assert flops.count(conv(image, kernel).jaxpr) == 2 * 8 * 8 * 16 * 27


@pytest.mark.slow
def test_another_expert_for_every_token_costs_its_products():
    one, two = (budget.cost_of(experiment.load(TINY, [("model.moe.top_k", str(k))])) for k in (1, 2))
    # Three matrices of 16 x 8, forward and twice backward, and a little to add the results up.
    products = 3 * two.tokens * 2 * 3 * 16 * 8
    assert products <= two.flops - one.flops <= 1.1 * products
    assert two.active_parameters - one.active_parameters == 3 * 16 * 8


# --- what runs ---


def command(spec: str, folder, *options: str) -> list[str]:
    return ["sweep", f"--config={spec}", f"--workdir={folder}", *options]


@pytest.mark.slow
def test_what_is_missing_runs_and_what_changed_is_not_used_again(spec, tmp_path, monkeypatch, capsys):
    ran, folder = [], tmp_path / "runs"
    trainer(monkeypatch, better, ran)
    assert cli.main(command(spec(), folder, "--sweep=rate", "--list")) == 0 and not ran
    said = capsys.readouterr().out
    assert "slow: 16 steps, 12,288 tokens" in said and "0 of 6 runs are finished" in said
    assert cli.main(command(spec(), folder, "--sweep=rate")) == 2  # three pairs show nothing
    assert sorted(ran) == [(rate, seed) for rate in (0.1, 0.2) for seed in range(3)]
    assert "1 of 1 declared directions did not hold (fast against slow: not shown)" in capsys.readouterr().err
    assert cli.main(command(spec(6), folder, "--sweep=rate")) == 0
    assert sorted(ran[6:]) == [(rate, seed) for rate in (0.1, 0.2) for seed in (3, 4, 5)]
    assert "expected lower: held" in capsys.readouterr().out
    assert cli.main(command(spec(6), folder, "--sweep=rate", "--config.data.loading.num_workers=2")) == 0
    assert len(ran) == 12  # how data is read changes no figure
    assert cli.main(command(spec(6), folder, "--sweep=rate", "--config.data.seed=5")) == 0
    assert len(ran) == 24
    assert cli.main(["report", f"--workdir={folder}"]) == 0
    assert len(results.read(folder).outcomes) == 12  # those of before are not mixed in


def test_names_of_sweeps_and_ablations(spec, tmp_path, capsys):
    for options, message in (
        ((), "--sweep is missing: .* has rate, other"),
        (("--sweep=rate,other",), "rate is an ablation, which is run by itself"),
        (("--sweep=speed",), "--sweep=speed: .*file.py has other, rate"),
        (("--sweep=other", "--seeds=0"), "--seeds=0 must be >= 1"),
        (("--sweep=rate", "--parallel=0"), "--parallel=0 must be >= 1"),
        (("--sweep=rate", "--config.seed=1"), "the seeds are those of the ablation"),
        (("--sweep=rate", "--seeds=0"), "--seeds=0: seeds=0"),
        (("--sweep=rate", "--config.stages.first.steps=0"), "arm 'slow': config.stages.first: steps=0"),
    ):
        assert cli.main(command(spec(), tmp_path / "runs", *options)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_is_a_row_with_its_reason_and_is_tried_again(spec, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"
    trainer(monkeypatch, better, fail={(0.2, 1)})
    assert cli.main(command(spec(6), folder, "--sweep=rate")) == 2
    said = capsys.readouterr()
    assert "1 of 12 runs failed" in said.err and "out of memory while running" in said.err
    assert "5 pairs" in said.out and "incomplete" in said.out
    html = (folder / "comparison.html").read_text()
    assert "failed: " in html and "no pair for seed 1" in html and "<script" not in html
    (failed,) = folder.glob("fast,seed=1,*")
    assert "RESOURCE_EXHAUSTED" in (failed / "logs" / "failure.txt").read_text()
    trainer(monkeypatch, better)
    assert cli.main(command(spec(6), folder, "--sweep=rate")) == 0
    assert not (failed / "failed.json").exists()


def test_an_interrupted_sweep_goes_on_with_what_is_missing(spec, tmp_path, monkeypatch):
    ran, folder = [], tmp_path / "runs"
    trainer(monkeypatch, better, ran)
    whole = runs.run

    def run(chosen, folder):
        if len(ran) == 4:
            raise Stopped(15, None)
        whole(chosen, folder)

    monkeypatch.setattr(runs, "run", run)
    assert cli.main(command(spec(6), folder, "--sweep=rate")) not in (0, 2)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    assert len(before) == len(ran) == 4
    monkeypatch.setattr(runs, "run", whole)
    assert cli.main(command(spec(6), folder, "--sweep=rate")) == 0
    assert len(ran) == len(set(ran)) == 12
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("heldot: loss", "metric='heldot: loss': 'heldot' is no source of .*did you mean 'heldout'"),
        ("eval/heldout/loss", "loop.evaluate_every=0; set it, or take 'heldout: loss'"),
        ("eval/test/loss", "'test' is no source of data.evaluation; there are: heldout"),
    ],
)
def test_a_metric_that_cannot_be_there_is_refused_before_anything_runs(
    spec, tmp_path, monkeypatch, capsys, metric, message
):
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("it ran"))
    file = spec()
    (tmp_path / "file.py").write_text((tmp_path / "file.py").read_text().replace('"loss"', f'"{metric}"'))
    assert cli.main(command(file, tmp_path / "runs", "--sweep=rate")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


def test_a_figure_that_no_run_has_and_one_that_is_not_finite_are_named(spec, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"
    trainer(monkeypatch, lambda rate, seed: None if (rate, seed) == (0.2, 1) else better(rate, seed))
    assert cli.main(command(spec(6), folder, "--sweep=rate")) == 2
    said = capsys.readouterr()
    assert "5 pairs" in said.out and "incomplete" in said.out and "fast against slow: incomplete" in said.err
    html = (folder / "comparison.html").read_text()
    assert re.search("fast,seed=1,.{8} is finished, but its loss is no finite number", html)
    (plan_file,) = folder.glob("plan.json")
    plan_file.write_text(plan_file.read_text().replace('"metric": "loss"', '"metric": "lost"'))
    assert cli.main(["report", f"--workdir={folder}"]) == 2
    assert "metric='lost' is no figure of these runs; did you mean 'loss'" in capsys.readouterr().err


def test_candidates_are_tried_with_other_seeds_and_the_best_is_taken(spec, tmp_path, monkeypatch, capsys):
    ran, folder = [], tmp_path / "runs"
    trainer(monkeypatch, lambda rate, seed: better(rate, seed) + (rate == 0.9), ran)
    candidates = ", ".join(f'{{"stages.first.optimizer.learning_rate": {rate}}}' for rate in (0.3, 0.6, 0.9))
    file = spec(2, f", tuning=({candidates}), tuning_seeds=1")
    assert cli.main(command(file, folder, "--sweep=rate")) == 2  # both arms are the same then
    assert sorted(ran[:6]) == sorted([(0.3, 2), (0.6, 2), (0.9, 2)] * 2)
    assert sorted(ran[6:]) == sorted([(0.6, 0), (0.6, 1)] * 2)
    found = results.read(folder)
    assert found.stored.chosen == {"slow": 1, "fast": 1} and len(found.trials) == 6
    assert "taken: " in (folder / "comparison.html").read_text()


def test_a_run_of_another_process_is_left_to_it(spec, tmp_path, monkeypatch):
    trainer(monkeypatch, better)
    whole, busy = runs.run, []

    def run(chosen, folder):
        if chosen.seed == 1 and not busy:
            raise InUse("in use by another run (process 7 on host)")
        whole(chosen, folder)

    monkeypatch.setattr(runs, "run", run)
    declared = sweep.find_ablation(spec(), ["rate"])
    launched = sweep.launch(spec(), "rate", declared, tmp_path / "runs")
    assert launched.run() == []
    states = [o.status for o in results.read(tmp_path / "runs").outcomes]
    assert states == ["finished", "missing", "finished"] * 2


def test_runs_in_processes_of_their_own(tmp_path, monkeypatch):
    """Three at once: one works, one fails with a message, one is killed."""
    scripts = {
        "good": "import time; time.sleep(0.3)",
        "bad": "import sys; print('error: no room'); sys.exit(2)",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "taken": "import sys; print('error: D is in use by another run (process 1)'); sys.exit(2)",
    }
    monkeypatch.setattr(
        Job, "command", property(lambda job: [sys.executable, "-c", scripts[job.folder.name]])
    )
    jobs = [Job(tmp_path / name, config.load(TINY), "", ()) for name in scripts]
    assert sorted(workers.run(jobs, parallel=3)) == ["bad", "killed"]
    assert state.failure(tmp_path / "bad") == "no room"
    assert "signal 9" in (state.failure(tmp_path / "killed") or "")
    assert state.failure(tmp_path / "taken") is None


def test_the_command_of_a_job_is_that_of_train(tmp_path):
    job = Job(
        tmp_path / "a",
        config.load(TINY),
        "f.py:x",
        (("a.b", "1"),),
    )
    assert job.command[1:] == [
        "-m",
        "vl_jax",
        "train",
        "--config=f.py:x",
        f"--workdir={tmp_path / 'a'}",
        "--config.a.b=1",
    ]


def test_a_file_of_ones_own_counts_by_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = config.load(TINY)
    router = tmp_path / "router.py"
    router.write_text("from vl_jax.moe.schemes.token_choice import TOP_K as mine\n")
    chosen = config.replace(chosen, [("model.moe.scheme", "router.py:mine")])
    first = identity.digest(chosen)
    assert identity.digest(config.replace(chosen, [("name", "another"), ("mesh.fsdp", "2")])) == first
    assert identity.digest(config.replace(chosen, [("seed", "1")])) != first
    router.write_text(router.read_text() + "# changed\n")
    assert identity.digest(chosen) != first


# --- what is judged ---


def values(plan_: Ablation, **arms) -> dict:
    return {"loss": {name: dict(enumerate(found)) for name, found in arms.items()}}


BASE = np.array([1.0, 1.2, 0.9, 1.1, 1.3, 0.8, 1.05, 0.95])
SPREAD = 0.01 * np.array([1, -1, 2, 0, 1, -2, 0, 1])


@pytest.mark.parametrize(
    ("shift", "expected", "margin", "word", "fails"),
    [
        (-0.1, "lower", 0.0, "held", False),
        (-0.1, "higher", 0.0, "reversed", True),
        (-0.1, "open", 0.0, "lower", False),
        (0.001, "higher", 0.0, "not shown", True),
        (0.001, "open", 0.0, "no difference shown", False),
        (0.001, "not_higher", 0.05, "held", False),
        (0.001, "not_lower", 0.05, "held", False),
        (0.1, "not_higher", 0.05, "not shown", True),
        (-0.1, "not_higher", 0.05, "held", False),
        (0.0, "not_higher", 0.002, "not shown", True),
    ],
)
def test_a_claim_is_judged_by_what_was_declared(shift, expected, margin, word, fails):
    declared = two(claims=(Claim("a", "b", "", expected, margin),))
    (found,) = judgement.judge(declared, values(declared, a=list(BASE + shift + SPREAD), b=list(BASE)))
    assert (found.word, found.fails) == (word, fails)
    assert found.effect.estimate == pytest.approx(shift + SPREAD.mean()) and found.pairs == 8


def test_many_claims_are_adjusted_and_missing_pairs_are_said():
    claims = (Claim("a", "b", expected="lower"), Claim("b", "a"), Claim("a", "b", "other"))
    declared = two(claims=claims)
    given = values(declared, a=list(BASE - 0.1 + SPREAD), b=list(BASE))
    first, second, third = judgement.judge(declared, given)
    assert (first.p, first.adjusted) == (2 / 256, 6 / 256) and first.word == "held"
    assert second.word == "higher" and third.word == "incomplete" and third.pairs == 0 and not third.fails
    given["loss"]["a"][3] = None
    first, second, _ = judgement.judge(declared, given)
    assert first.word == "incomplete" and first.fails and first.missing == (3,) and first.pairs == 7
    few = dataclasses.replace(declared, seeds=4)
    first, *_ = judgement.judge(few, values(few, a=list(BASE[:4] - 0.1), b=list(BASE[:4])))
    assert (
        first.word == "not shown" and "4 pairs cannot show a difference among 3 claims; 7 can" in first.notes
    )
    same, *_ = judgement.judge(few, values(few, a=[1.0] * 4, b=list(BASE[:4])))
    assert any("every seed of a gives the same figure" in note for note in same.notes)


def simulated(effect: float, *, repetitions: int, claims: int = 1) -> float:
    """How often two arms of correlated seeds are declared different, at the default number of seeds."""
    random = np.random.default_rng(0)
    declared = two(claims=(Claim("a", "b"),) * claims)
    count = declared.seeds
    found = 0
    for _ in range(repetitions):
        given = {}
        shared = random.standard_normal(count)  # what a seed does to both arms
        own = random.standard_normal((2, count))
        given = values(declared, a=list(shared + own[0] + effect * 2**0.5), b=list(shared + own[1]))
        found += any(v.word in ("lower", "higher") for v in judgement.judge(declared, given))
    return found / repetitions


def test_identical_arms_are_told_apart_rarely_and_a_planted_effect_mostly():
    """An effect of 1.25 standard deviations of a difference is found in 80 % of the experiments or more."""
    assert simulated(0.0, repetitions=1000) <= 0.05
    assert simulated(0.0, repetitions=200, claims=3) <= 0.05
    assert simulated(1.25, repetitions=200) >= 0.8


# --- pages ---


@pytest.fixture
def finished(spec, tmp_path, monkeypatch):
    trainer(monkeypatch, better)
    file, folder = spec(8), tmp_path / "runs"
    assert cli.main(command(file, folder, "--sweep=rate")) == 0
    return folder


def test_the_answer_is_written_in_every_form(finished, capsys):
    html = (finished / "comparison.html").read_text()
    assert "fast against slow" in html and ">held<" in html and "speed (nobody, 2026)" in html
    assert "exact test over signs" in html and html.count("<script") == 0
    assert "| fast against slow | held | lower | loss |" in (finished / "comparison.md").read_text()
    assert r"fast against slow & held & lower & loss" in (finished / "comparison.tex").read_text()
    lines = (finished / "comparison.csv").read_text().splitlines()
    assert len(lines) == 17 and lines[0].startswith("arm,seed,state,commit,loss")
    assert (finished / "comparison.svg").read_text().count("<circle") == 9  # eight pairs and their mean
    pdf = (finished / "comparison.pdf").read_bytes()
    start = int(pdf.rsplit(b"startxref\n", 1)[1].split()[0])
    assert (
        pdf.startswith(b"%PDF-1.4")
        and pdf[start:].startswith(b"xref\n0 6")
        and b"(fast against slow) Tj" in pdf
    )
    assert cli.main(["report", f"--workdir={finished}", "--columns=steps,wall*"]) == 0
    assert "| arm | runs | steps | wall time s |" in (finished / "comparison.md").read_text()
    assert cli.main(["report", f"--workdir={finished}", "--columns=speed"]) == 2
    assert "--columns=speed: no figure is called so; there are " in capsys.readouterr().err


def test_a_claim_that_was_made_up_afterwards_is_marked(finished, tmp_path):
    assert not any(page.is_late(found, v) for found in [results.read(finished)] for v in found.verdicts)
    stored = state.read(finished)
    other = dataclasses.replace(stored.plan, claims=(Claim("slow", "fast", expected="higher"),))
    declared = state.declared(stored, other, finished=16, commit="def")
    state.write(finished, dataclasses.replace(stored, plan=other, declared=declared))
    found = page.write(finished)
    assert [page.is_late(found, v) for v in found.verdicts] == [True]
    assert "declared when runs were finished already" in (finished / "comparison.html").read_text()


def test_all_results_are_a_page_made_of_records(finished, tmp_path, capsys):
    folder = tmp_path / "records"
    folder.mkdir()
    assert cli.main(["report", f"--records={folder}"]) == 2
    assert "no record there" in capsys.readouterr().err
    (folder / "rate.json").write_bytes((finished / "record.json").read_bytes())
    assert cli.main(["report", f"--records={folder}"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## rate" in text and "| fast against slow | **held** | lower | loss |" in text
    assert "abc" in text and "speed (nobody, 2026)" in text
    # Names stand beside the intervals, and above them on a phone.
    assert (tmp_path / "RESULTS.html").read_text().count("<svg") == 2
    (folder / "rate.json").write_text("{}")
    with pytest.raises(ValueError, match="is no record of an ablation: it has no name"):
        records.write(folder)


# --- what a seed reaches ---


def stream_of(seed: int, *changes: tuple[str, str]):
    """The first batches of the tiny experiment's second stage, and the ids of their samples."""
    chosen = dataclasses.replace(config.load(TINY, changes), seed=seed)
    with contextlib.closing(experiment.open_stream(chosen, chosen.stages[1])) as stream:
        batch = next(stream)
        return batch, stream.ids


def test_a_seed_reaches_the_order_of_samples_turns_and_withheld_pictures():
    (first, ids), (again, same), (_, others) = stream_of(0), stream_of(0), stream_of(1)
    assert ids == same and np.array_equal(first.tokens, again.tokens) and ids != others
    one = (
        "data.sources.scenes.num_examples",
        "1",
    )  # there is no order, so turns and pictures are what is left
    kept, other = (stream_of(seed, one, ("data.image_dropout_rate", "0.5"))[0] for seed in (0, 1))
    assert not np.array_equal(kept.tokens, other.tokens)


def test_a_seed_reaches_augmentation():
    one = [("data.sources.scenes.num_examples", "1"), ("data.image_dropout_rate", "0.0")]
    plain = [stream_of(seed, *one)[0].tiles for seed in (0, 1)]
    changed = [stream_of(s, *one, ("data.augmentation.brightness", "0.5"))[0].tiles for s in (0, 0, 1)]
    assert np.array_equal(plain[0], plain[1])
    assert np.array_equal(changed[0], changed[1]) and not np.array_equal(changed[0], changed[2])


def test_a_seed_reaches_parameters_and_the_noise_of_routing(tmp_path, monkeypatch):
    """What both are made by is given it; that they follow from it is tested where they are made."""
    given, layout = {}, tiny.layout_of(tiny.config())
    monkeypatch.setattr(experiment, "example_batch", lambda *_: None)

    def init_variables(_layout, _batch, seed):
        given["init"] = seed
        return Variables({}, {})

    monkeypatch.setattr(experiment, "init_variables", init_variables)
    chosen = dataclasses.replace(config.load(TINY), seed=5)
    experiment.first_weights(chosen, layout)

    def programs(_layout, _stages, *, seed):
        given["noise"] = seed
        raise KeyError("seen")

    monkeypatch.setattr(runs, "programs", programs)
    monkeypatch.setattr(runs, "plan", lambda _: layout)
    with pytest.raises(KeyError, match="seen"):
        runs.run(chosen, tmp_path / "run")
    assert given == {"init": 5, "noise": 5}


def test_every_metric_of_a_figure_has_its_own_axis_and_nothing_is_cut():
    long = ForestRow("a_scheme_with_a_long_name against another_scheme", 0.5, 0.2, 0.8, "not shown, p 0.123")
    small = ForestRow("b against a", 1e-3, -1e-3, 3e-3, "held")
    for is_narrow in (False, True):
        drawing = forest([Panel("loss", [long]), Panel("share", [small])], title="T", is_narrow=is_narrow)
        dots = [shape.centre[0] for shape in drawing.shapes if isinstance(shape, Dot)]
        zeros = [s.start[0] for s in drawing.shapes if isinstance(s, Stroke) and s.dashed]
        assert all(dot - zero > 20 for dot, zero in zip(dots, zeros, strict=True))
        texts = [shape for shape in drawing.shapes if isinstance(shape, Words) and shape.anchor == "start"]
        assert all(t.at[0] + 0.45 * t.size * len(t.text) <= drawing.width for t in texts)
        line = next(s for s in drawing.shapes if isinstance(s, Stroke) and not s.dashed)
        assert is_narrow or 8 + 0.45 * 10 * len(long.name) < line.start[0]


SUITE = [
    (spec, name)
    for spec in shipped.names()
    if spec.startswith("ablations/")
    for name in re.findall(r"^def ablation_(\w+)", shipped.path_of(spec).read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("spec", "name"), SUITE)
@pytest.mark.slow
def test_an_ablation_of_the_package_is_declared_whole(spec, name, tmp_path, monkeypatch):
    """Its arms can be built and differ, its claims have a source, and its seeds can show a difference."""
    monkeypatch.setattr(budget, "cost_of", lambda experiment: COST)
    declared = sweep.find_ablation(spec, [name])
    assert declared is not None and declared.seeds >= 8 and declared.says and declared.claims
    assert all(claim.says for claim in declared.claims if claim.expected != "open")
    assert len(declared.claims) * smallest_p(declared.seeds) <= 1 - declared.confidence
    launched = sweep.launch(spec, name, declared, tmp_path, seeds=1)
    variants = sum(len(declared.candidates(arm)) for arm in declared.arms)
    assert len({job.folder.name.rpartition(",")[2] for job in launched.jobs.values()}) == variants


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "name"), SUITE)
def test_arms_of_an_ablation_of_the_package_cost_the_same(spec, name, tmp_path):
    sweep.launch(spec, name, sweep.find_ablation(spec, [name]), tmp_path)


@pytest.mark.parametrize("spec", sorted({spec for spec, _ in SUITE}))
@pytest.mark.slow
def test_one_number_scales_an_ablation_of_the_package(spec):
    once, four_times = (experiment.load(f"{spec}:{scale}") for scale in (1, 4))
    for short, long in zip(once.stages, four_times.stages, strict=True):
        assert long == dataclasses.replace(short, steps=4 * short.steps)
    # As text: a class of the file is another one each time that the file is loaded.
    assert schema.to_json(dataclasses.replace(four_times, stages=once.stages)) == schema.to_json(once)
