"""The benchmarks: what is compared and divided by hand-worked numbers; and, slow, a run at a tiny size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vl_jax.benchmarks import checkpoint as checkpoint_benchmark
from vl_jax.benchmarks import step as step_benchmark

TINY = {
    **step_benchmark.MODEL,
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def test_sides_that_disagree_are_not_timed():
    found = step_benchmark.compare([1.0, 2.0], [1.0, 2.00001])
    assert found["numbers"] == 2 and found["difference"] == pytest.approx(5e-6, rel=1e-2)
    with pytest.raises(ValueError, match="ours and transformers differ by 5.0e-01"):
        step_benchmark.compare([1.0, 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="differ by nan"):
        step_benchmark.compare([np.nan], [1.0])


def test_ratios_are_of_cpu_time_and_against_the_faster_way_of_the_other_side():
    timed = {
        step_benchmark.OURS: {"loop": [(1.0, 9.0), (2.0, 9.0), (1.0, 9.0)]},
        step_benchmark.THEIRS: {"calls": [(4.0, 9.0), (8.0, 9.0), (9.0, 9.0)], "loop": [(5.0, 1.0)] * 3},
    }
    speed = step_benchmark._ratios("decode", timed)["loop"]
    assert speed == {"median": 4.0, "lowest": 2.5, "highest": 5.0}
    assert step_benchmark._ratios("step", timed)["loop"]["median"] == 0.25


def test_an_unknown_name_and_no_turns_are_refused():
    with pytest.raises(ValueError, match="benchmark 'train': known are step, decode"):
        step_benchmark.run("train")
    with pytest.raises(ValueError, match="repeats=0: must be at least 1"):
        step_benchmark.run("step", repeats=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "decode"])
def test_figures_are_printed_and_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device, as for anyone who measures
    case = step_benchmark.Case(model=TINY, rows=2, length=8, prompt=3, new_tokens=5, checked=2)
    result = step_benchmark.run(name, repeats=2, json_file=tmp_path / "found.json", case=case)
    assert json.loads((tmp_path / "found.json").read_text())["measured"] == result["measured"]
    ours = result["measured"][step_benchmark.OURS]
    assert set(ours) == ({"step"} if name == "step" else {"calls", "loop"})
    for clocks in ours.values():
        assert 0 < clocks["cpu"]["lowest"] <= clocks["cpu"]["median"] <= clocks["cpu"]["highest"]
    printed = capsys.readouterr().out
    assert step_benchmark.UNITS[name] in printed
    assert ("ours / transformers" in printed) == (step_benchmark.THEIRS in result["measured"])


@pytest.mark.slow
def test_the_benchmark_of_checkpoints_divides_what_holds_up_by_the_step(tmp_path, capsys):
    case = step_benchmark.Case(model=TINY, rows=2, length=8)
    result = checkpoint_benchmark.run(repeats=1, json_file=tmp_path / "found.json", case=case)
    assert json.loads((tmp_path / "found.json").read_text())["parameters"] == result["parameters"]
    medians = {name: clocks["wall"]["median"] for name, clocks in result["measured"].items()}
    assert result["share_of_a_step"]["wall"] == medians["held up"] / medians["step"]
    assert "a save holds up" in capsys.readouterr().out
