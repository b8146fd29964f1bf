"""Every recorded fixture against this package, and the harness against made-up fixtures."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import jax
import numpy as np
import parity
import pytest
from parity import Fixture, Result, Row

from vl_jax.interop.safetensors import Entry, write_file

# Whole models take their time to compile.
QUICK = {parity.VL2_VISION, parity.VL2_PROJECTOR, parity.VL2_ROPE, parity.VL2_PROCESSOR}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each fixture found, so that ``-k`` selects them by name."""
    if "recording" not in metafunc.fixturenames:
        return
    try:
        root = inspect.unwrap(conftest.oracles)()  # the function below the fixture: nothing has run yet
        cases = [
            pytest.param(
                fixture, id=fixture.name, marks=[] if fixture.model_class in QUICK else pytest.mark.slow
            )
            for fixture in parity.discover(root)
        ]
        reason = f"no fixtures below {root}"
    except pytest.skip.Exception as skipped:
        cases, reason = [], str(skipped)
    metafunc.parametrize("recording", cases or [pytest.param(None, marks=pytest.mark.skip(reason=reason))])


@pytest.mark.slow
def test_recorded_values_are_reproduced(recording: Fixture, request: pytest.FixtureRequest):
    properties = request.node.user_properties
    try:
        with jax.default_matmul_precision("highest"):
            result = parity.check(recording)
    except Exception:
        properties.append(parity.pack(Result(recording.name, recording.model_class, parity.RAISED)))
        raise
    properties.append(parity.pack(result))
    if result.status == parity.NOT_SUPPORTED:
        pytest.skip(f"{recording.model_class} is {parity.NOT_SUPPORTED}")
    assert result.status == parity.AGREES, "\n".join([result.summary(), *result.lines(result.failures)])


# The harness itself.

CONFIG = {"model_type": "made_up"}
WEIGHT = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
INPUTS = {"in_x": np.array([0.5, -1.0], np.float32), "in_ids": np.arange(2)}
OUTPUTS = {
    "out_y": WEIGHT @ INPUTS["in_x"],
    "out_tokens": np.array([3, 1]),
    "mid/mlp.gate.0": np.array([[0.1, 0.7, 0.6]], np.float32),
    "mid/mlp.gate.1": np.array([[0.7, 0.6]], np.float32),
    "mid/mlp.gate.2": np.array([[1, 2]]),
    "mid/mlp.1": np.array([[0.7, 0.6]], np.float32),
}
GRADS = {"w": np.array([[10.0, 0.0]], np.float32)}
NOTES = {
    "out_train_losses_f64": np.zeros(2, np.float32),
    "out_decode_prefill_len": np.array(3),
    "out_decode_vs_full_maxdiff": np.zeros((), np.float32),
    "out_greedy_min_margin": np.zeros((), np.float32),
}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    entries = {name: Entry(array.shape, array.dtype) for name, array in arrays.items()}
    write_file(path, entries, arrays.items())


@pytest.fixture
def made_up(tmp_path: Path) -> Fixture:
    folder = tmp_path / "any" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    about = {name: {"tol_abs": 1e-4} for name, a in (OUTPUTS | NOTES).items() if a.dtype.kind == "f"}
    (folder / "meta.json").write_text(json.dumps({"model_class": "MadeUp", "arrays": about}))
    np.savez(folder / "io.npz", allow_pickle=False, **INPUTS, **OUTPUTS, **NOTES)
    _save(folder / "model.safetensors", {"w": WEIGHT})
    _save(folder / "grads.safetensors", GRADS)
    (tmp_path / "README.md").write_text("not a fixture")
    (fixture,) = parity.discover(tmp_path)
    return fixture


def right(fixture: Fixture) -> dict[str, np.ndarray]:
    """The runner of the made-up model."""
    return {**OUTPUTS, "out_y": fixture.weights["w"] @ fixture.arrays["in_x"], "grad/w": GRADS["w"]}


def broken(fixture: Fixture) -> dict[str, np.ndarray]:
    """A runner that fails."""
    raise RuntimeError("no such layer")


def _check(fixture: Fixture, **changes: Any) -> dict[str, Row]:
    rows = parity.compare(fixture, {**right(fixture), **changes})
    return {row.array: row for row in rows if row.problem}


def test_right_values_agree(made_up: Fixture):
    assert made_up.name == "any/name" and made_up.config == CONFIG
    result = parity.check(made_up, runners={"MadeUp": f"{__name__}:right"})
    assert result.status == parity.AGREES
    assert {row.array for row in result.rows} == {*OUTPUTS, "grad/w"}


@pytest.mark.parametrize("name", ["out_y", "out_tokens", "mid/mlp.gate.2", "mid/mlp.1", "grad/w"])
def test_one_wrong_value_is_named(made_up: Fixture, name: str):
    wrong = np.array(right(made_up)[name])
    wrong.flat[-1] += 5
    failed = _check(made_up, **{name: wrong})
    assert set(failed) == {name} and failed[name].problem.startswith("1 of 2 values")


def test_tolerances_are_those_recorded(made_up: Fixture):
    y, gradient = OUTPUTS["out_y"], GRADS["w"]
    assert not _check(made_up, out_y=y + np.float32(0.9e-4))
    (row,) = _check(made_up, out_y=y + np.float32(1.1e-4)).values()
    assert row.tolerance == 1e-4 and row.ratio == pytest.approx(1.1, rel=0.05)
    # Gradients: 1e-4 of the largest, here 10, and 1e-6.
    assert not _check(made_up, **{"grad/w": gradient + np.float32(0.99e-3)})
    assert _check(made_up, **{"grad/w": gradient + np.float32(1.02e-3)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_do_not_agree(made_up: Fixture, value: float):
    assert set(_check(made_up, out_y=np.full_like(OUTPUTS["out_y"], value))) == {"out_y"}


@pytest.mark.parametrize("name", [*OUTPUTS, "grad/w"])
def test_a_missing_array_fails(made_up: Fixture, name: str):
    computed = right(made_up)
    del computed[name]
    failed = [row for row in parity.compare(made_up, computed) if row.problem]
    assert [(row.array, row.problem) for row in failed] == [(name, "not computed")]


def test_another_shape_fails(made_up: Fixture):
    failed = _check(made_up, out_y=OUTPUTS["out_y"][None])
    assert failed["out_y"].problem == "shape (1, 2), recorded (2,)"


def test_experts_are_compared_as_sets(made_up: Fixture):
    swapped = {name: OUTPUTS[name][:, ::-1] for name in ("mid/mlp.gate.1", "mid/mlp.gate.2", "mid/mlp.1")}
    assert not _check(made_up, **swapped)
    # Indices alone, or weights alone, belong to other experts.
    assert set(_check(made_up, **{"mid/mlp.gate.2": swapped["mid/mlp.gate.2"]})) == {
        "mid/mlp.gate.1",
        "mid/mlp.1",
    }


def test_a_class_without_runner_is_named(made_up: Fixture):
    result = parity.check(made_up, runners={})
    assert result.status == parity.NOT_SUPPORTED and "MadeUp" in result.summary()


def test_results_travel_as_plain_values(made_up: Fixture):
    result = parity.check(made_up, runners={"MadeUp": f"{__name__}:right"})
    key, value = parity.pack(result)
    assert key == parity.PROPERTY and parity.unpack(json.loads(json.dumps(value))) == result


def test_an_array_without_tolerance_fails(made_up: Fixture):
    made_up.meta["arrays"].pop("out_y")
    assert _check(made_up)["out_y"].problem == "no tolerance is known"
    made_up.meta["arrays"]["out_y"] = {"tol_abs": float("nan")}
    assert _check(made_up, out_y=OUTPUTS["out_y"] + 1)["out_y"].problem == "2 of 2 values above tolerance"


# DeepSeek-VL2.


def _vl2_model(folder: Path, config: dict[str, Any], **files: dict[str, np.ndarray]) -> Fixture:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _save(folder / "model.safetensors", {"w": WEIGHT})
    for stem, arrays in ({"lm_text": {}} | files).items():
        np.savez(folder / f"{stem}.npz", allow_pickle=False, **arrays)
    found = parity.discover(folder.parent)
    return next(fixture for fixture in found if fixture.folder == folder)


def test_padded_positions_are_not_compared(tmp_path: Path):
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    logits = np.zeros((2, 3, 4), np.float32)
    batch = {"attention_mask": mask, "logits_explicit_positions": logits, "greedy_ids": np.zeros((2, 3), int)}
    fixture = _vl2_model(tmp_path / "v", {}, lm_leftpad=batch)
    name = "lm_leftpad/logits_explicit_positions"
    computed = {name: logits.copy(), "lm_leftpad/greedy_ids": batch["greedy_ids"]}
    computed[name][0, 0] = np.nan
    assert not [row for row in parity.compare(fixture, computed) if row.problem]
    computed[name][0, 1, 2] = 1e-3
    (failed,) = [row for row in parity.compare(fixture, computed) if row.problem]
    assert (failed.array, failed.problem) == (name, "1 of 20 values above tolerance")


@pytest.mark.parametrize(
    ("name", "config", "recorded", "tolerance"),
    [
        ("lm_text/hidden_0", {}, 3.0, 1e-4 + 3e-4),
        ("lm_text/loss_ce", {}, 3.0, 1e-5),
        ("train_seqaux/aux_loss_layer1", {}, 3.0, 1e-6),
        ("train_seqaux/grad:language.model.norm.weight", {}, 3.0, 1e-4 + 3e-3),
        ("vlm_wide/inputs_embeds", {}, 3.0, 2e-5),
        ("vlm_wide/last_logits_chunked_prefill", {}, 1.0, 2e-4),
        ("lm_cache/cache_layer0_k_final", {}, 0.0, 1e-4),
        ("lm_text/gate1_topk_weight_sorted", {}, 3.0, 1e-5),
        ("lm_text/attn_layer0", {"routed_scaling_factor": 2.5, "norm_topk_prob": True}, 1.0, 1e-5),
        ("lm_text/attn_layer0", {"routed_scaling_factor": 16.0}, 1.0, 2e-5),
    ],
)
def test_tolerances_of_deepseek_vl2_go_by_kind(
    tmp_path: Path, name: str, config: dict[str, Any], recorded: float, tolerance: float
):
    stem, _, array = name.partition("/")
    values = np.full(1, recorded, np.float32)
    fixture = _vl2_model(tmp_path / "v", {"language_config": config}, **{stem: {array: values}})
    for factor, agrees in ((0.98, True), (1.02, False)):
        (row,) = parity.compare(fixture, {name: values.astype(np.float64) + factor * tolerance})
        assert (not row.problem) == agrees


def test_experts_of_deepseek_vl2_are_compared_as_sets(tmp_path: Path):
    arrays = {"gate1_topk_idx_sorted": np.array([[0, 3]]), "gate1_topk_weight_sorted": np.array([[0.2, 0.9]])}
    fixture = _vl2_model(tmp_path / "v", {}, lm_text=arrays)
    assert not any(row.problem for row in parity.compare(fixture, _under("lm_text", arrays, reverse=True)))
    # Either of the two alone in another order is wrong.
    for name in arrays:
        mixed = _under("lm_text", arrays) | _under("lm_text", {name: arrays[name]}, reverse=True)
        failed = [row.array for row in parity.compare(fixture, mixed) if row.problem]
        assert failed == ["lm_text/gate1_topk_weight_sorted"]


def _under(stem: str, arrays: dict[str, np.ndarray], *, reverse: bool = False) -> dict[str, np.ndarray]:
    return {f"{stem}/{name}": a[..., ::-1] if reverse else a for name, a in arrays.items()}


def test_parts_of_deepseek_vl2_are_found_by_their_files(tmp_path: Path):
    array = {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32)}
    root = tmp_path / "set"
    _vl2_model(root / "models" / "one", {}, vlm_wide=array)
    for folder in ("pixels", "pixels/cases", "bridge", "eyes"):
        (root / folder).mkdir()
    for path, content in {
        "pixels/cases.json": [],
        "pixels/processor_config.json": {},
        "bridge/configs.json": {"odd": {"depth": 2}},
        "eyes/config.json": {"model_type": "vision"},
        "rope.json": {},
        "measured.json": {},
    }.items():
        (root / path).write_text(json.dumps(content))
    for stem in ("pixels/batchify_left", "pixels/cases/one", "bridge/odd", "eyes/io", "rope"):
        np.savez(root / f"{stem}.npz", allow_pickle=False, **array)
    for path in ("bridge/odd.safetensors", "eyes/model.safetensors"):
        _save(root / path, {"w": WEIGHT})
    found = {fixture.name: fixture for fixture in parity.discover(tmp_path)}
    assert {name: fixture.model_class for name, fixture in found.items()} == {
        "set/models/one": parity.VL2_MODEL,
        "set/pixels": parity.VL2_PROCESSOR,
        "set/bridge/odd": parity.VL2_PROJECTOR,
        "set/eyes": parity.VL2_VISION,
        "set/rope": parity.VL2_ROPE,
    }
    assert found["set/models/one"].processor == root / "pixels"
    assert set(found["set/pixels"].arrays) == {f"{s}/{n}" for s in ("batchify_left", "one") for n in "xy"}
    assert found["set/bridge/odd"].config == {"depth": 2}
    assert np.array_equal(found["set/bridge/odd"].weights["w"], WEIGHT)
    computed = {"odd/y": array["y"]}
    assert [row.problem for row in parity.compare(found["set/bridge/odd"], computed)] == [""]


@pytest.mark.slow
def test_every_recorded_array_has_a_tolerance(oracles: Path):
    """A recording agrees with itself in every array, and with changed values in none."""
    for fixture in parity.discover(oracles):
        recorded = {name: np.asarray(array) for name, array in fixture.arrays.items()}
        assert all(not row.problem for row in parity.compare(fixture, recorded)), fixture.name
        changed = {name: np.nan_to_num(array.astype(np.float64)) + 7 for name, array in recorded.items()}
        for row in parity.compare(fixture, changed):
            assert row.problem or not recorded[row.array].size, f"{fixture.name} {row.array}"


# The table.


class _Terminal:
    """What the summary uses of pytest's reporter."""

    def __init__(self, results: list[Result], verbosity: int):
        self.verbosity, self.text = verbosity, ""
        reports = [SimpleNamespace(when="call", user_properties=[parity.pack(r)]) for r in results]
        self.stats = {"passed": reports, "warnings": [object()]}

    def section(self, title: str) -> None:
        self.write_line(title)

    def write_line(self, line: str) -> None:
        self.text += line + "\n"


@pytest.fixture
def results() -> list[Result]:
    good, bad = Row("out_a", 1e-6, 1e-5), Row("out_b", 1.0, 1e-5, "1 of 2 values above tolerance")
    return [
        Result("hf/one", "One", parity.AGREES, (good,)),
        Result("hf/two", "Two", parity.DIFFERS, (good, bad)),
        Result("hf/three", "Three", parity.NOT_SUPPORTED),
    ]


@pytest.mark.parametrize("verbosity", [0, 1])
def test_the_table_has_a_line_per_fixture_and_per_failure(
    results: list[Result], verbosity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VL_JAX_PARITY_TABLE", str(tmp_path / "table.txt"))
    terminal = _Terminal(results, verbosity)
    parity.pytest_terminal_summary(terminal)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, terminal.text))

    assert count(r"hf/one +One +ok  1 arrays, worst 0.1 x tolerance at out_a") == 1
    assert count(r"hf/two +Two +FAILED  1 of 2 arrays, worst 1e\+05 x tolerance at out_b") == 1
    assert count(r"hf/three +Three +not yet supported") == 1
    assert count(r"hf/two +out_b .* 1 of 2 values above tolerance") == 1
    assert count(r"hf/\w+ +out_a .* ok") == 2 * verbosity
    assert count("3 fixtures: 1 FAILED, 1 not yet supported, 1 ok; 3 arrays compared") == 1
    assert len(re.findall(r"hf/\w+ +out_\w .*", (tmp_path / "table.txt").read_text())) == 3
