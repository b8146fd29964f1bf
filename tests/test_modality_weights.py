"""What a run logs and a report shows of fusions that weigh modalities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.evaluate.modality_weights import WeightUse
from vl_jax.fusion.weights import ModalityWeights, summarize


def test_the_log_has_the_mean_weight_over_rows_that_have_a_modality():
    values = jnp.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    present = jnp.array([[True, True], [True, False], [True, True]])
    weights = ModalityWeights(values, present, ("image", "sound"))
    sums = weights.sums()
    found = summarize(jax.tree.map(jnp.add, sums, sums))  # of two micro-batches alike
    np.testing.assert_allclose(found["gate/weight/image"], 1.75 / 3, rtol=1e-6)
    np.testing.assert_allclose(found["gate/weight/sound"], 1.25 / 2, rtol=1e-6)
    assert summarize({}) == {}


def test_tables_are_means_by_group_over_samples_that_have_a_modality():
    use = WeightUse(("kind", "noise", "modality"))
    records = [
        {"kind": "colour", "labels": {"noise": "low"}},
        {"kind": "motion", "labels": {"noise": "high"}},
        {"kind": "motion", "labels": {}},
    ]
    image = np.array([0.9, 0.4, 1.0]), np.array([True, True, True])
    flow = np.array([0.1, 0.6, 0.0]), np.array([True, True, False])
    use.update(records, {"image": image, "flow": flow})
    use.update([{"kind": "motion"}], {"flow": (np.array([1.0, 9.0]), np.array([True, True]))})
    kind, noise, modality = use.matrices()
    assert (kind.rows, kind.columns) == (("colour", "motion"), ("image", "flow"))
    np.testing.assert_allclose(kind.values, [[0.9, 0.1], [0.7, 0.8]])
    assert noise.rows == ("high", "low")
    np.testing.assert_allclose(noise.values, [[0.4, 0.6], [0.9, 0.1]])
    assert modality.rows == ("flow", "image", "image + flow")
    np.testing.assert_allclose(modality.values, [[0.0, 1.0], [1.0, 0.0], [0.65, 0.35]])
    assert "by kind of question" in kind.title and WeightUse(("kind",)).matrices() == ()
