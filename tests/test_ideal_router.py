"""The test-bed of routers: the problem, what is measured on it, and that known routers come out in order."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import cli
from vl_jax.benchmarks import ideal_router
from vl_jax.benchmarks.ideal_router import Clusters, RouterScore
from vl_jax.moe.routing import MoEConfig

CLUSTER = np.array([[0, 0, 1, 1], [0, 1, 1, 0]], np.int32)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({0: [1, 1, 0, 0], 1: [0, 0, 2, 1]}, math.log(2)),  # experts of their own; sums do not count
        ({0: [1, 1, 1, 1], 1: [1, 1, 1, 1]}, 0.0),
        ({0: [1, 0, 0, 0], 1: [1, 0, 0, 0]}, 0.0),
        # Half of a cluster's weight is on an expert that both share.
        ({0: [1, 1, 0, 0], 1: [0, 1, 1, 0]}, 0.5 * math.log(2)),
    ],
)
def test_information_of_clusters_and_experts(rows, expected):
    weights = np.array([[rows[c] for c in row] for row in CLUSTER.tolist()], np.float32)
    found = ideal_router.information(jnp.asarray(weights), jnp.asarray(CLUSTER), 2)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_tokens_without_an_expert_are_left_out():
    weights = np.zeros((2, 4, 2), np.float32)
    weights[0] = np.eye(2)[CLUSTER[0]]
    found = ideal_router.information(jnp.asarray(weights), jnp.asarray(CLUSTER), 2)
    assert float(found) == pytest.approx(math.log(2), abs=1e-6)


def test_the_best_router_gives_every_cluster_experts_of_its_own():
    config = MoEConfig(num_experts=7, top_k=3, expert_dim=4)
    random = np.random.default_rng(0)
    ideal, drawn = (ideal_router._told(how, CLUSTER, config, random) for how in ("ideal", "drawn"))
    assert ideal[0, 0].tolist() == [0, 1, 2] and ideal[0, 2].tolist() == [3, 4, 5]
    assert all(len(set(token)) == 3 for token in drawn.reshape(-1, 3).tolist())
    assert drawn.min() >= 0 and drawn.max() < 7


def test_every_cluster_has_a_linear_map_and_rare_ones_are_rare():
    clusters = Clusters(width=3, length=50, skew=1.0)
    data = ideal_router._draw(clusters, 4, np.random.default_rng(0), 40)
    for cluster in range(4):
        mine = data["cluster"] == cluster
        x, target = data["x"][mine], data["target"][mine]
        found, *_ = np.linalg.lstsq(x, target, rcond=None)
        np.testing.assert_allclose(x @ found, target, atol=1e-4)
    counts = np.bincount(data["cluster"].ravel()) / data["cluster"].size
    np.testing.assert_allclose(counts, [0.48, 0.24, 0.16, 0.12], atol=0.03)


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(ValueError, match="best router needs 4 experts for each of two clusters"):
        ideal_router.examine("top_k", MoEConfig(num_experts=7, top_k=4, expert_dim=4))
    with pytest.raises(ValueError, match="steps=0 must be >= 1"):
        Clusters(steps=0)
    with pytest.raises(ValueError, match="noise=-1"):
        Clusters(noise=-1)


def test_the_command_says_how_near_a_scheme_comes(monkeypatch, capsys, tmp_path):
    def learned(config, clusters, number, routes):
        seeds, shift = np.zeros(3), {"": 0.3, "ideal": 0.1, "drawn": 0.5}[routes]
        return {"loss": seeds + shift, "information": seeds + math.log(4) / 2}

    monkeypatch.setattr(ideal_router, "_learn", learned)
    file = tmp_path / "score.json"
    assert cli.main(["conformance", "top_k", "--ideal", f"--json={file}"]) == 0
    said = capsys.readouterr().out
    assert "closeness       0.50  (0.50 to 0.50 over seeds)" in said and "specialisation  0.50" in said
    assert json.loads(file.read_text())["ideal"] == pytest.approx(0.1)
    assert cli.main(["conformance", "top_k", f"--json={file}"]) == 2
    assert "--json is for --ideal" in capsys.readouterr().err
    assert cli.main(["conformance", "nothing", "--ideal"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_known_routers_come_out_in_order():
    """An id says nothing, so a hash finds the clusters of pictures alone, half of them; scores find all."""
    clusters = Clusters(steps=300, seeds=1)
    found: dict[str, RouterScore] = {s: ideal_router.examine(s, clusters=clusters) for s in ("hash", "top_k")}
    assert all(score.ideal < score.drawn / 2 for score in found.values())
    assert abs(found["hash"].closeness - 0.5) < 0.25 and found["hash"].specialisation < 0.5
    assert found["top_k"].closeness > 0.75 and found["top_k"].specialisation > 0.6
