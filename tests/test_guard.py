"""Updates that would harm a model are skipped, counted, described, and end a run when they go on."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.runtime.checkpoint_record import not_finite
from vl_jax.train.guard import BEHIND, SKIPPED_FILE, Guard, GuardConfig, UpdatesSkipped, guarded
from vl_jax.train.hooks import Moment
from vl_jax.train.stages import Stage
from vl_jax.train.step import GRADIENT_NORMS, TrainState, gradient_names, gradient_norms

STAGE = Stage("one", steps=100)


def state(value: float, step: int) -> TrainState:
    leaf = jnp.float32(value)
    return TrainState(
        jnp.int32(step),
        {"a": leaf},
        {"m": leaf},
        {"s": {"bias": leaf}},
        {"b": leaf},
        {"c": leaf},
        {"l": leaf},
    )


@pytest.mark.parametrize("loss", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("norm", [2.0, math.nan, -math.inf, 5.0])
def test_a_skipped_update_leaves_everything_but_the_step_as_it_was(loss, norm):
    def step(before, batch, rate):
        return state(math.nan if math.isnan(loss) else 9.0, 8), {
            "loss": jnp.float32(loss),
            "grad_norm": jnp.float32(norm),
        }

    after, metrics = guarded(step)(state(3.0, 7), None, 0.1, np.float32(4.0))  # type: ignore[arg-type]
    sound = loss == 1.0 and norm == 2.0
    assert bool(metrics["sound"]) == sound
    expected = state(9.0 if sound else 3.0, 8)
    assert after == expected


def test_what_a_step_passes_on_is_not_selected():
    frozen = jnp.ones(3)

    def step(before, batch, rate):
        return before, {"loss": jnp.float32(math.nan), "grad_norm": jnp.float32(1)}

    given = TrainState(jnp.int32(0), {"frozen": frozen}, None, {})
    after, _ = guarded(step)(given, None, 0.1)  # type: ignore[arg-type]
    assert after.params["frozen"] is frozen


def test_a_wrapper_may_leave_out_what_is_watched():
    after, metrics = guarded(lambda s, b, r: (state(9.0, 8), {}))(state(3.0, 7), None, 0.1)  # type: ignore
    assert after == state(9.0, 8) and bool(metrics["sound"])


def test_norms_of_layers_by_hand():
    grads = {"stack": jnp.array([[3.0, 4.0], [0.0, 2.0]]), "bias": jnp.array([[1.0, 2.0], [2.0, 4.0]])}
    assert gradient_names(grads, {"stack"}) == ["bias", "stack[0]", "stack[1]"]
    np.testing.assert_allclose(gradient_norms(grads, {"stack"}), [5.0, 5.0, 2.0])


def feed(guard: Guard, step: int, norm: float, *, loss: float = 1.0, stage: Stage = STAGE) -> float:
    """One step of that gradient norm; the limit that it had."""
    limit = guard.limit(step)
    figures = {
        "loss": np.float32(loss),
        "grad_norm": np.float32(norm),
        "sound": jnp.bool_(math.isfinite(loss) and math.isfinite(norm) and norm <= limit),
        GRADIENT_NORMS: jnp.array([norm, 1.0], jnp.float32),
        "accuracy": np.float32(0.5),
    }
    left = guard.watch(Moment(stage, step, step), figures, limit, [[f"sample {step}"]])  # type: ignore[arg-type]
    assert left.keys() == {"loss", "grad_norm", "accuracy"}
    return limit


def opened(tmp_path: Path, saved: dict | None = None, step: int = 0, **options) -> Guard:
    guard = Guard(GuardConfig(**options), tmp_path / "logs", state=saved, step=step)
    guard.begin_stage(["first", "second"], anew=saved is None)
    return guard


def described(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "logs" / SKIPPED_FILE).read_text().splitlines()]


def test_a_run_ends_after_so_many_in_a_row_and_says_where(tmp_path):
    guard = opened(tmp_path, max_in_a_row=3)
    losses = [math.nan, math.inf, 1.0, math.nan, math.nan, math.nan]
    for step, loss in enumerate(losses, 1):
        feed(guard, step, 2.0, loss=loss)
    assert guard.skipped == 3  # the last ones are still on their way
    with pytest.raises(UpdatesSkipped) as caught:
        guard.settle()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("the update of step 6 was skipped: loss is nan")
    assert "the parameters are those of step 3" in message and SKIPPED_FILE in message
    lines = described(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    assert lines[1]["loss"] == "inf" and lines[1]["samples"] == [["sample 2"]]
    assert lines[0][GRADIENT_NORMS] == {"first": 2.0, "second": 1.0}


def test_healthy_updates_write_nothing(tmp_path):
    guard = opened(tmp_path)
    for step in range(1, 20):
        assert feed(guard, step, float(step)) == math.inf
    guard.settle()
    assert guard.skipped == 0 and not (tmp_path / "logs").exists()
    assert guard.get_state() == {"skipped": 0, "in_a_row": 0, "norms": []}


def test_a_resumed_run_counts_on_and_describes_a_step_once(tmp_path):
    guard = opened(tmp_path, max_in_a_row=4)
    for step, loss in enumerate([1.0, math.nan, math.nan], 1):
        feed(guard, step, 2.0, loss=loss)
        guard.settle()
        if step == 2:
            saved = json.loads(json.dumps(guard.get_state()))
    resumed = opened(tmp_path, saved, 2, max_in_a_row=4)
    assert resumed.skipped == 1 and [line["step"] for line in described(tmp_path)] == [2]
    for step in (3, 4):
        feed(resumed, step, 2.0, loss=math.nan)
    resumed.settle()
    assert [line["step"] for line in described(tmp_path)] == [2, 3, 4]
    feed(resumed, 5, 2.0, loss=math.nan)
    with pytest.raises(UpdatesSkipped, match="those of step 1"):
        resumed.settle()


@settings(max_examples=40, deadline=None)
@given(
    norms=st.lists(st.floats(0.5, 100.0, width=32), min_size=8, max_size=40),
    window=st.integers(1, 6),
    looks=st.sets(st.integers(1, 40)),
)
def test_which_updates_are_spikes_does_not_depend_on_when_the_host_looks(
    tmp_path_factory, norms, window, looks
):
    folder = tmp_path_factory.mktemp("guard")
    options = {"spike_factor": 2.0, "spike_window": window, "max_in_a_row": 99}
    calm, eager = opened(folder, **options), opened(folder / "other", **options)
    for step, norm in enumerate(norms, 1):
        known = norms[: max(step - 1 - BEHIND, 0)][-window:]
        expected = 2.0 * statistics.median(known) if len(known) == window else math.inf
        assert feed(calm, step, norm) == pytest.approx(expected)
        assert feed(eager, step, norm) == calm.limit(step)
        if step in looks:  # as at a checkpoint, from which another process goes on
            eager.settle()
            eager = opened(folder / "other", json.loads(json.dumps(eager.get_state())), step, **options)
    calm.settle()
    eager.settle()
    assert calm.get_state() == eager.get_state()


def test_a_stage_begins_without_the_norms_of_the_one_before(tmp_path):
    guard = opened(tmp_path, spike_factor=2.0, spike_window=1)
    for step in range(1, 6):
        feed(guard, step, 1.0)
    assert guard.limit(6) == 2.0
    guard.begin_stage([], anew=True)
    assert guard.limit(6) == math.inf


def test_leaves_that_are_not_finite_are_named():
    tree = {
        "params": {"w": jnp.ones(2), "n": jnp.zeros(2, jnp.int32)},
        "optimizer": [jnp.array([1.0, np.inf])],
    }
    assert not_finite(tree) == ["optimizer/0"]
    assert not_finite({"n": jnp.zeros(2, jnp.int32)}) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_in_a_row": 0}, "max_in_a_row=0"), ({"spike_factor": 0.5}, "spike_factor=0.5: must be above 1")],
)
def test_a_guard_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GuardConfig(**options)
