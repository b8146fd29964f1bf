"""The ledger of a run's time: its parts are the whole, whatever happens to the run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.runtime.ledger import Ledger
from vl_jax.runtime.spent import (
    CHECKPOINT,
    COMPILE,
    DATA,
    EVALUATION,
    GOODPUT_FILE,
    INITIALISATION,
    KINDS,
    STEP,
    WASTED,
    account,
    read_ledger,
)


class Time:
    """A clock that stands still but for what it is told."""

    def __init__(self):
        self.value = 1000.0

    def __call__(self) -> float:
        return self.value


def launched(folder, time, *, peak=None, began=None):
    return Ledger(folder, began=began, peak=peak, now=time, clock=time)


def test_a_resumed_run_by_hand(tmp_path):
    """Two launches: the first goes to step 30 and is killed, the second goes on from step 20."""
    time = Time()
    first = launched(tmp_path, time, peak=100.0, began=990.0).__enter__()
    time.value += 5
    first.goes_on_from(0)  # 15 s of initialisation
    first.turn(STEP)
    for step in range(1, 31):
        with first.spend(DATA):
            time.value += 1
        time.value += 3
        first.done(step, 60.0)
        if step == 20:
            with first.spend(CHECKPOINT):
                time.value += 2
            first.write()
    first.write()
    file, first._file = first._file, None  # killed
    file.close()
    first.__exit__()
    time.value += 100  # nobody runs
    with launched(tmp_path, time, peak=100.0) as second:
        time.value += 4
        second.goes_on_from(20)
        second.turn(STEP)
        for step in range(21, 26):
            time.value += 3
            second.done(step, 60.0)
        second.turn(EVALUATION)
        time.value += 6
    found = account(read_ledger(tmp_path / GOODPUT_FILE))
    assert found is not None
    assert (found.launches, found.steps, found.wasted_steps) == (2, 25, 10)
    assert found.wall == pytest.approx(15 + 30 * 4 + 2 + 4 + 5 * 3 + 6)
    assert found.between == pytest.approx(100)
    expected = {INITIALISATION: 19, STEP: 25 * 3, DATA: 20, CHECKPOINT: 2, EVALUATION: 6, WASTED: 10 * 4}
    assert {k: v for k, v in found.seconds.items() if v} == pytest.approx(expected)
    assert found.remainder == pytest.approx(0, abs=1e-6)
    assert found.goodput == pytest.approx(75 / 162)
    assert found.mfu == pytest.approx(25 * 60 / (75 * 100))
    assert found.overall_mfu == pytest.approx(25 * 60 / (162 * 100))


def test_what_the_compiler_takes_is_taken_from_the_kind_in_which_it_runs(tmp_path):
    time = Time()
    with launched(tmp_path, time) as ledger:
        ledger.turn(STEP)
        time.value += 10
        ledger._lasted("/jax/core/compile/jaxpr_trace_duration", 1.0)  # within the next
        time.value += 1
        ledger._lasted("/jax/core/compile/jaxpr_trace_duration", 4.0)
        time.value += 5
        ledger._lasted("/jax/core/compile/backend_compile_duration", 5.0)
        ledger._lasted("/jax/other", 5.0)
        ledger._counted("/jax/compilation_cache/cache_misses")
    found = account(read_ledger(tmp_path / GOODPUT_FILE))
    assert found is not None
    assert (found.seconds[STEP], found.seconds[COMPILE]) == pytest.approx((7, 9))
    assert (found.hits, found.misses) == (0, 1)


ACTIONS = st.lists(
    st.tuples(st.sampled_from((*KINDS, "done", "write", "compile")), st.floats(0, 30)), max_size=25
)


@given(launches=st.lists(st.tuples(st.integers(0, 8), ACTIONS), min_size=1, max_size=4), data=st.data())
def test_parts_are_the_whole_wherever_the_file_is_cut(launches, data, tmp_path_factory):
    folder, time, reached = tmp_path_factory.mktemp("run"), Time(), 0
    for back, actions in launches:
        with launched(folder, time) as ledger:
            step = max(0, reached - back)
            ledger.goes_on_from(step)
            for action, seconds in actions:
                if action == "done":
                    step += 1
                    ledger.done(step, 1.0)
                elif action == "write":
                    ledger.write()
                elif action == "compile":
                    ledger._lasted("/jax/core/compile/backend_compile_duration", seconds)
                else:
                    ledger.turn(action)
                time.value += seconds
            reached = max(reached, step)
        time.value += 7
    content = (folder / GOODPUT_FILE).read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    (folder / GOODPUT_FILE).write_bytes(content[:cut])
    lines = read_ledger(folder / GOODPUT_FILE)
    assert len(lines) == content[:cut].count(b"\n")
    found = account(lines)
    assert (found is None) == (not lines)
    if found is None:
        return
    assert abs(found.remainder) < 1e-3 and found.between >= 0
    assert all(value >= -1e-6 for value in found.seconds.values())
    done = [line["step"] for line in lines if "step" in line]
    assert found.steps == (done[-1] if done else 0)  # each step up to the last counts once
    with launched(folder, time):  # the next launch drops what was cut, and adds to the rest
        pass
    again = read_ledger(folder / GOODPUT_FILE)
    assert again[: len(lines)] == lines and again[len(lines)]["launch"] == lines[-1]["launch"] + 1
    assert (folder / GOODPUT_FILE).read_bytes().endswith(b"\n")


def test_lines_of_launches_with_other_steps_between_are_shared_out():
    lines = [
        {"launch": 1, "began": 0.0, "time": 0.0},
        {"launch": 1, "time": 1.0, "step": 0, "seconds": {INITIALISATION: 1.0}},
        {"launch": 1, "time": 11.0, "step": 10, "seconds": {STEP: 8.0, EVALUATION: 2.0}},
        {"launch": 2, "began": 12.0, "time": 12.0},
        {"launch": 2, "time": 13.0, "step": 6, "seconds": {"some later kind": 1.0}},
    ]
    found = account(lines)
    assert found is not None and found.seconds[WASTED] == pytest.approx(8.0 * 4 / 10)
    assert found.seconds[EVALUATION] == 2.0 and found.seconds["some later kind"] == 1.0
    assert (found.steps, found.wasted_steps) == (6, 4)
    assert math.isclose(found.remainder, 0, abs_tol=1e-9)
    assert found.flops is None and found.mfu is None  # lines with steps do not say theirs


def test_a_disk_that_is_full_ends_no_run(tmp_path, caplog):
    time = Time()
    with launched(tmp_path, time) as ledger:

        class Full:
            def write(self, _: bytes) -> int:
                raise OSError(28, "No space left on device")

            def close(self) -> None: ...

        ledger._file.close()
        ledger._file = Full()
        ledger.write()
        ledger.write()
    assert caplog.text.count("no more lines") == 1


def test_nothing_is_written_by_a_process_that_follows(tmp_path):
    with Ledger(None) as ledger:
        ledger.write()
    assert not list(tmp_path.iterdir()) and read_ledger(tmp_path / GOODPUT_FILE) == []
    assert account([]) is None
