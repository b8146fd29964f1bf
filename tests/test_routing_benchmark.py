"""The ways that are timed against one another compute the same layer."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from vl_jax import cli
from vl_jax.benchmarks import routing as routing_benchmark
from vl_jax.benchmarks.routing import Shape

SMALL = Shape(tokens=64, width=8, hidden=6, num_experts=4, top_k=2)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_all_ways_give_the_same_output_and_gradients(gated, monkeypatch):
    monkeypatch.setattr(routing_benchmark, "CAPACITY_FACTOR", 4)  # room for every choice
    shape = Shape(**{**vars(SMALL), "gated": gated})
    inputs = routing_benchmark.draw(shape, load="zipf")
    ways = routing_benchmark.ways(shape, platform="cpu")
    assert len(ways) == 5
    first, *others = (
        jax.tree.leaves((way(*inputs), routing_benchmark.forward_backward(way)(*inputs)))
        for way in ways.values()
    )
    for found in others:
        for a, b in zip(found, first, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_every_way_is_measured_or_named():
    large = Shape(tokens=8192, width=512, hidden=64, num_experts=256, top_k=8)
    for shape in (SMALL, large):
        measured = routing_benchmark.ways(shape, platform="cpu")
        reasons = routing_benchmark.left_out(shape, platform="cpu")
        every = {"capacity buffer", "every expert on every row", "one-hot products", "lax.ragged_dot"}
        assert not set(measured) & set(reasons)
        assert set(measured) | set(reasons) == {"ours, blocked", "megablox", "tokamax", *every}
    assert reasons["lax.ragged_dot"] == "needs 34.4 GB"


def test_every_token_chooses_different_experts_and_zipf_prefers_the_first():
    shape = Shape(tokens=500, width=2, hidden=2, num_experts=8, top_k=3)
    counts = {}
    for load in ("balanced", "zipf"):
        experts = np.asarray(routing_benchmark.draw(shape, load=load)[1])
        assert all(len(set(row)) == 3 for row in experts.tolist())
        counts[load] = np.bincount(experts.reshape(-1), minlength=8)
    assert counts["balanced"].max() < 1.4 * counts["balanced"].min()
    assert counts["zipf"][0] > 2 * counts["zipf"][-1]


@pytest.mark.slow
def test_figures_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(routing_benchmark, "CPU_SHAPES", (SMALL,))
    monkeypatch.setattr(routing_benchmark.allocator, "keep_freed_memory", lambda **_: None)
    file = tmp_path / "found.json"
    assert cli.main(["benchmark", "routing", "--repeats=1", f"--json={file}"]) == 0
    balanced, zipf = json.loads(file.read_text())["layers"]
    assert (balanced["load"], zipf["load"]) == ("balanced", "zipf")
    assert balanced["modes"]["forward"]["ours, blocked"]["ratio"] == 1.0
    assert "one-hot products" in capsys.readouterr().out
    with pytest.raises(ValueError, match="repeats=0: must be at least 1"):
        routing_benchmark.run(repeats=0)
