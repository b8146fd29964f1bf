"""Scaling curves: what is declared, whether planted laws are found, what is judged, and the commands."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from vl_jax import cli, runs, schema
from vl_jax.ablation import budget, records
from vl_jax.ablation.budget import ArmCost
from vl_jax.ablation.scaling import declared, fit, judged, law
from vl_jax.ablation.scaling.declared import Axis, Expect, Scaling
from vl_jax.ablation.scaling.law import LAWS, Law, Term, power_law
from vl_jax.report import loglog
from vl_jax.schema import ConfigError

pytest.importorskip("ml_collections")


# --- laws ---


def crossed(**axes) -> dict[str, list[float]]:
    """All combinations of the values of some variables."""
    meshes = np.meshgrid(*axes.values(), indexing="ij")
    return {name: mesh.ravel().tolist() for name, mesh in zip(axes, meshes, strict=True)}


SIZES, TOKENS = np.geomspace(1e5, 1e7, 4).tolist(), np.geomspace(1e6, 1e8, 4).tolist()
PLANTED = {
    "power": (power_law("size"), {"E": 1.0, "A": 50.0, "alpha": 0.34}, {"size": SIZES * 1 + [3e5, 3e6]}),
    "chinchilla": (
        LAWS["chinchilla"],
        {"E": 1.7, "A": 50.0, "B": 100.0, "alpha": 0.34, "beta": 0.28},
        crossed(size=SIZES, tokens=TOKENS),
    ),
    "separable": (
        LAWS["separable"],
        {"A": 20.0, "alpha": 0.1, "beta": 0.05},
        crossed(size=SIZES[:3], experts=[2.0, 4.0, 8.0, 16.0]),
    ),
    "routed": (
        LAWS["routed"],
        {"A": 20.0, "alpha": 0.1, "beta": 0.3, "c": -0.015},
        crossed(size=SIZES, experts=[2.0, 4.0, 8.0, 16.0]),
    ),
    "fine_grained": (
        LAWS["fine_grained"],
        {"E": 0.5, "A": 20.0, "G": 30.0, "B": 80.0, "alpha": 0.2, "gamma": 0.6, "beta": 0.3},
        crossed(size=SIZES, tokens=TOKENS[:3], granularity=[1.0, 2.0, 4.0, 8.0]),
    ),
}


def losses_of(name: str) -> np.ndarray:
    """What a planted law gives, written out by hand."""
    of, p, xs = PLANTED[name]
    x = {variable: np.array(values) for variable, values in xs.items()}
    assert set(p) == set(of.parameters)
    if name == "power":
        return p["E"] + p["A"] / x["size"] ** p["alpha"]
    if name == "chinchilla":
        return p["E"] + p["A"] / x["size"] ** p["alpha"] + p["B"] / x["tokens"] ** p["beta"]
    if name == "separable":
        return p["A"] / (x["size"] ** p["alpha"] * x["experts"] ** p["beta"])
    if name == "routed":
        slope = p["alpha"] + p["c"] * np.log(x["experts"])
        return p["A"] * x["size"] ** -slope * x["experts"] ** -p["beta"]
    finer = p["G"] / x["granularity"] ** p["gamma"] + p["A"]
    return p["E"] + finer / x["size"] ** p["alpha"] + p["B"] / x["tokens"] ** p["beta"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_law_without_noise_is_found_whole(name):
    of, planted, xs = PLANTED[name]
    found = fit.fit(of, xs, losses_of(name), resamples=2)
    assert not fit.unidentified(of, xs)
    assert {e.name: e.interval.estimate for e in found.estimates} == pytest.approx(planted, rel=2e-3)
    assert found.predict(xs) == pytest.approx(losses_of(name), rel=1e-5)
    assert np.abs(found.errors).max() < 1e-5
    again = law.from_json(json.loads(json.dumps(law.to_json(of))))
    assert again == of and again.equation == of.equation


@pytest.mark.parametrize(
    ("name", "noise", "repetitions"),
    [("power", 0.01, 40), ("chinchilla", 0.005, 25), ("separable", 0.01, 100)],
)
@pytest.mark.slow
def test_intervals_of_exponents_hold_what_was_planted(name, noise, repetitions):
    """Nine of ten do, or more; and they are narrow enough to say something."""
    of, planted, xs = PLANTED[name]
    random, clean = np.random.default_rng(1), losses_of(name)
    inside, widths = [], []
    for _ in range(repetitions):
        noisy = clean * np.exp(noise * random.standard_normal(len(clean)))
        found = fit.fit(of, xs, noisy, resamples=200)
        for exponent in of.exponents:
            _, low, high = found[exponent].interval
            inside.append(low <= planted[exponent] <= high)
            widths.append((high - low) / planted[exponent])
    assert np.mean(inside) >= 0.9, np.mean(inside)
    assert np.median(widths) < 1


def test_a_run_that_went_astray_moves_the_law_little():
    of, planted, xs = PLANTED["chinchilla"]
    noisy = losses_of("chinchilla") * np.exp(0.002 * np.random.default_rng(0).standard_normal(16))
    noisy[5] *= 1.3
    found = fit.fit(of, xs, noisy, resamples=2)
    assert found["beta"].interval.estimate == pytest.approx(planted["beta"], abs=0.05)


def test_what_cannot_be_told_is_said():
    of, _, xs = PLANTED["chinchilla"]
    two = crossed(size=SIZES[:2], tokens=TOKENS)
    assert fit.unidentified(of, two) == ["E", "A", "alpha"]
    losses = losses_of("chinchilla")
    few = {name: values[:5] for name, values in xs.items()}
    with pytest.raises(ValueError, match="4 points are fewer than the 5 parameters of chinchilla"):
        fit.fit(of, {name: values[:4] for name, values in xs.items()}, losses[:4])
    exact = fit.fit(of, few, losses[:5])
    assert all(e.is_lost for e in exact.estimates) and "nothing is left over" in exact["B"].why_not
    assert all(math.isinf(e.interval.high) for e in exact.estimates)
    # Tokens do nothing here, so that their term is one more constant.
    flat = fit.fit(of, xs, 1.7 + 50 / np.array(xs["size"]) ** 0.34, resamples=50)
    assert flat["E"].is_lost and flat["B"].is_lost
    assert flat["beta"].interval.estimate == pytest.approx(0, abs=1e-6)
    assert flat["alpha"].interval.estimate == pytest.approx(0.34, abs=0.02) and not flat["alpha"].why_not
    noisy = losses * np.exp(0.1 * np.random.default_rng(1).standard_normal(16))
    assert fit.fit(of, xs, noisy, resamples=100)["alpha"].why_not == "its interval is wider than its value"
    for wrong in (math.nan, 0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="of point 2: expected finite and above zero"):
            fit.fit(of, xs, [*losses[:2], wrong, *losses[3:]])


def test_a_law_is_found_by_what_varies():
    assert law.find("", ["tokens"]).equation == "L = E + A / tokens^alpha"
    assert law.find("", ["tokens", "size"]).name == "chinchilla"
    assert law.find("", ["size", "tokens", "granularity"]).equation == (
        "L = E + A / size^alpha + G / (granularity^gamma size^alpha) + B / tokens^beta"
    )
    assert "size^(c log experts)" in law.find("joint", ["size", "tokens", "experts"]).equation
    for name, variables, message in (
        ("chinchila", ["size"], "did you mean 'chinchilla'"),
        ("chinchilla", ["size"], "is of size, tokens, but the axes vary size"),
        ("power", ["size", "tokens"], "is of one variable"),
        ("", ["size", "depth"], "no law is of size, depth .* give a Law of your own"),
    ):
        with pytest.raises(ValueError, match=message):
            law.find(name, variables)
    with pytest.raises(ValueError, match="two coefficients are called 'A'"):
        Law("x", (Term("A"), Term("A", {"size": "p"})))
    with pytest.raises(ValueError, match="no term has a variable"):
        Law("x", (Term("A"),))


# --- what is declared ---

SIZE = Axis("size", {str(d): {"model.moe.expert_dim": d} for d in (8, 16, 32, 64)})
STEPS = Axis("tokens", {f"x{n}": {"stages.first.steps": n} for n in (8, 16, 32)})


def grid(**options) -> Scaling:
    return Scaling(**{"axes": (SIZE, STEPS), **options})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Scaling(()), "axes: there is none"),
        (lambda: grid(axes=(SIZE, SIZE)), "axes: two vary 'size'"),
        (lambda: grid(axes=(STEPS,), law="chinchilla"), "is of size, tokens, but the axes vary tokens"),
        (lambda: grid(law=power_law("depth")), "law 'power' is of depth, but the axes vary size, tokens"),
        (lambda: Scaling((Axis("size", {"1": {}, "2": {}}),)), "2 points are fewer than the 3 parameters"),
        (lambda: grid(expects=(Expect("alfa", low=0),)), "no parameter 'alfa'; did you mean 'alpha'"),
        (lambda: Expect("alpha"), "give one of them"),
        (lambda: Expect("alpha", 1.0, 0.5), "low=1.0 and high=0.5"),
        (lambda: grid(seeds=0), "seeds=0"),
        (lambda: grid(held_back=1.0), "held_back=1.0"),
        (lambda: Axis("experts", {"many": {}}), "point 'many' must be its value, a number above zero"),
        (lambda: Axis("experts", {"0": {}}), "point '0' must be its value"),
        (lambda: Axis("size", {"a/b": {}}), "'a/b' is no name"),
        (lambda: Axis("cost", {"a": {}}, ("size", "depth")), "varies='depth' must be of size, tokens"),
        (lambda: Axis("size", {}), "it has no point"),
    ],
)
def test_a_wrong_declaration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_grid_is_all_combinations_and_outlives_json():
    chosen = grid(expects=(Expect("alpha", low=0.0, says="so"),))
    again = declared.from_json(json.loads(json.dumps(declared.to_json(chosen))))
    assert declared.to_json(again) == declared.to_json(chosen) and again.expects == chosen.expects
    found = declared.ablation_of(chosen)
    assert len(found.arms) == 12 and found.arms[0].name == "size8-tokensx8" and found.equal == ()
    assert found.arms[-1].changes == {"model.moe.expert_dim": 64, "stages.first.steps": 32}
    with pytest.raises(ConfigError, match="two axes change stages.first.steps; one has to"):
        twice = Axis("experts", {"1": {"stages.first.steps": 1}})
        declared.ablation_of(
            Scaling((STEPS, twice), law=Law("x", (Term("A", {"tokens": "p", "experts": "q"}),)))
        )
    with pytest.raises(ConfigError, match="plan of a scaling curve: "):
        declared.from_json({"axes": []})


def test_values_are_counted_or_are_the_names_of_points():
    cost = {"tokens": 100, "active_parameters": 7, "parameters": 9, "flops": 4200.0}
    together = Axis("cost", {str(n): {} for n in range(6)}, varies=("size", "tokens"))
    costs = {f"cost{n}": {**cost, "tokens": 100 + n} for n in range(6)}
    chosen = Scaling((together,), size="flops_per_token")
    assert declared.values_of(chosen, costs)["tokens"] == [100, 101, 102, 103, 104, 105]
    assert declared.values_of(chosen, costs)["size"][0] == 42
    assert declared.values_of(dataclasses.replace(chosen, size="parameters"), costs)["size"] == [9.0] * 6
    experts = Scaling((Axis("experts", {"2": {}, "4": {}, "8": {}}),))
    values = declared.values_of(experts, {f"experts{n}": cost for n in (2, 4, 8)})
    assert values == {"experts": [2, 4, 8]}


# --- the commands ---

FILE = """
from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm
from vl_jax.ablation.scaling.declared import Axis, Expect, Scaling
def scaling_size():
    size = Axis("size", {str(d): {"model.moe.expert_dim": d} for d in (8, 16, 32)%s})
    tokens = Axis("tokens", {f"x{n}": {"stages.first.steps": n} for n in (8, 16, 32)})
    return Scaling((size, tokens), metric="loss", seeds=1, expects=(%s,))
def ablation_other():
    return Ablation((Arm("a"), Arm("b", {"stages.first.steps": 3})), "loss", "lower", seeds=1, equal=())
def scaling_wrong():
    return 5
def get_config():
    return config.view(config.load(%r))
"""
TINY = str(__file__).replace("test_scaling.py", "tiny_experiment.py")
SHOWN = 'Expect("alpha", low=0.0, says="wider is better (nobody, 2026)"), Expect("beta", low=0.0)'


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Writes an experiment file; size and tokens of an arm are simple multiples of what it changes."""

    def cost_of(chosen):
        steps, size = chosen.stages[0].steps, 10_000 * chosen.model.moe.expert_dim
        tokens = 100_000 * steps
        return ArmCost(steps, steps, tokens, size, size, 6.0 * size * tokens)

    monkeypatch.setattr(budget, "cost_of", cost_of)

    def write(expects: str = SHOWN, some: str = "") -> str:
        path = tmp_path / "file.py"
        path.write_text(FILE % (some, expects, TINY))
        return str(path)

    return write


def trainer(monkeypatch, ran=None, fail=()):
    """Runs leave the loss of a planted law, with a little noise; those of some (size, steps) fail."""

    def run(chosen, folder):
        size, steps = chosen.model.moe.expert_dim, chosen.stages[0].steps
        if ran is not None:
            ran.append((size, steps, chosen.seed))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(schema.to_json(chosen))
        if (size, steps) in fail:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        noise = 0.002 * math.sin(size * 7 + steps * 3 + chosen.seed * 5)
        loss = (1.5 + 40 / (1e4 * size) ** 0.4 + 200 / (1e5 * steps) ** 0.4) * (1 + noise)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        (folder / "run.json").write_text(json.dumps({"wall_time_s": 7, "commit": "abc"}))

    def run_together(experiments, folders):
        for chosen, folder in zip(experiments, folders, strict=True):
            run(chosen, folder)
        return [None] * len(folders)

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "run_together", run_together)


def command(spec: str, folder, *options: str) -> list[str]:
    return ["sweep", f"--config={spec}", f"--workdir={folder}", "--sweep=size", *options]


def _folder_with(folder: Path, file: Path) -> Path:
    folder.mkdir()
    (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_one_command_runs_the_grid_fits_the_law_and_says_what_held(spec, tmp_path, monkeypatch, capsys):
    ran, folder = [], tmp_path / "runs"
    trainer(monkeypatch, ran)
    assert cli.main(command(spec(), folder, "--list")) == 0 and not ran
    assert "size32-tokensx32: 32 steps, 3,200,000 tokens" in capsys.readouterr().out
    assert cli.main(command(spec(), folder)) == 0 and len(ran) == len(set(ran)) == 9
    said = capsys.readouterr().out
    assert "L = E + A / size^alpha + B / tokens^beta (Hoffmann" in said
    assert re.search(r"^alpha: 0\.\d+ \[0\.\d+, [\d.]+\], expected above 0: held$", said, re.M)
    assert "Fitted without size32-tokensx32, it predicts them within 0." in said
    assert cli.main(command(spec(), folder, "--seeds=2")) == 0 and len(ran) == len(set(ran)) == 18
    html = (folder / "scaling.html").read_text()
    assert ">held<" in html and "wider is better (nobody, 2026)" in html and html.count("<script") == 0
    assert "(said late)" not in html and "<circle" in html
    lines = (folder / "scaling.csv").read_text().splitlines()
    assert len(lines) == 10
    assert lines[0] == "point,runs,size,tokens,flops,loss,law off by,predicted off by"
    assert "| alpha | identified |" in (folder / "scaling.md").read_text()
    assert (folder / "scaling.pdf").read_bytes().startswith(b"%PDF-1.4")
    assert (folder / "scaling.svg").read_text().count("<circle") == 2 * 18  # a panel for each axis
    assert r"\begin{tabular}" in (folder / "scaling.tex").read_text()
    record = json.loads((folder / "record.json").read_text())
    assert [p["name"] for p in record["parameters"]] == ["E", "A", "B", "alpha", "beta"]
    assert record["forecast"]["error"] < record["forecast"]["plain"] and len(record["runs"]) == 18
    records.write(_folder_with(tmp_path / "records", folder / "record.json"))
    page = (tmp_path / "RESULTS.md").read_text()
    assert "## size" in page and "9 points, 2 seeds, 18 of 18 runs finished." in page
    assert re.search(
        r"\| alpha \| wider is better \(nobody, 2026\) \| above 0 \| .* \| \*\*held\*\* \|", page
    )
    assert "<table" in (tmp_path / "RESULTS.html").read_text()
    assert cli.main(["report", f"--workdir={folder}", "--columns=loss"]) == 2
    assert cli.main(command(spec('Expect("beta", high=0.1)'), folder, "--seeds=2")) == 2
    found = capsys.readouterr()
    assert "1 of 1 expectations did not hold (beta: reversed)" in found.err and len(ran) == 18
    assert "below 0.1 (said late)" in (folder / "scaling.html").read_text()


@pytest.mark.slow
def test_a_failed_run_leaves_a_law_but_no_answer(spec, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"
    trainer(monkeypatch, fail={(32, 32)})
    assert cli.main(command(spec(), folder)) == 2
    found = capsys.readouterr()
    assert "1 of 9 runs failed, the first size32-tokensx32,seed=0" in found.err
    assert "alpha = 0." in found.out and "expected above 0: incomplete" in found.out
    (log,) = folder.glob("size8-tokensx8,*/metrics.jsonl")
    for loss, message in (("-1.0", "loss is -1.0; a law is of finite losses"), ("NaN", "loss is nan; a law")):
        log.write_text(f'{{"step": 1, "loss": {loss}}}\n')
        assert cli.main(["report", f"--workdir={folder}"]) == 2
        assert message in capsys.readouterr().err
    (folder / "scaling.json").write_text("{}")
    assert cli.main(["report", f"--workdir={folder}"]) == 2
    assert "scaling.json: damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_anything_runs(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("it ran"))
    folder = tmp_path / "runs"
    for options, some, message in (
        (
            (),
            "[:2]",
            r"law 'chinchilla': no losses of this grid can tell E, A, alpha .* 2 of size, 3 of tokens",
        ),
        (("--sweep=wrong",), "", r"scaling_wrong\(\) gave int, no Scaling"),
        (("--sweep=size,other",), "", "other is an ablation, which is run by itself"),
        (("--sweep=length",), "", "there is|has other, size, wrong"),
        (("--seeds=0",), "", "--seeds=0: seeds=0"),
    ):
        assert cli.main(command(spec(some=some), folder, *options)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error), error
    assert not folder.exists()
    trainer(monkeypatch)
    assert cli.main(command(spec(), folder)) == 0
    assert cli.main([*command(spec(), folder), "--sweep=other"]) == 2
    assert "holds a scaling curve; choose another for an ablation" in capsys.readouterr().err
    assert cli.main([*command(spec(), tmp_path / "other"), "--sweep=other"]) == 0
    assert cli.main(command(spec(), tmp_path / "other")) == 2
    assert "holds an ablation; choose another for a scaling curve" in capsys.readouterr().err


def test_marks_of_a_logarithmic_axis_are_round():
    assert loglog.marks(1e5, 1e7) == pytest.approx([1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7])
    assert loglog.marks(1e-3, 1e9)[0] == pytest.approx(1e-3) and len(loglog.marks(1e-3, 1e9)) == 13
    assert loglog.marks(2.05, 2.45) == pytest.approx([2.1, 2.2, 2.3, 2.4])
    empty = loglog.panels([loglog.LogLogPanel("nothing", "x", ())])
    assert len(empty.shapes) == 1 and judged.NOT_IDENTIFIED == "not identified"
