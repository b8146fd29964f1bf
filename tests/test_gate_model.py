"""Gates with a budget in whole models: where they begin, and what is not run for rows that are closed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax.batch import Batch, without_pictures
from vl_jax.fusion.budget import LEARNING, BudgetConfig, Grain
from vl_jax.model import VisionLanguage, VisionLanguageConfig

GRAINS: tuple[Grain, ...] = ("sample", "layer", "token")


def model_of(grain: Grain, **options: Any) -> VisionLanguageConfig:
    """Two dense layers, each behind a gate with a budget."""
    plain = tiny.config("top_k", fusion="gated")
    language = dataclasses.replace(plain.language, num_layers=2, num_dense_layers=2)
    gate = dataclasses.replace(plain.fusion.gate, budget=BudgetConfig(grain, **options))
    return dataclasses.replace(plain, language=language, fusion=dataclasses.replace(plain.fusion, gate=gate))


def questions(pictures: tuple[int, ...] = (1, 0, 1, 1)) -> Batch:
    """One question a row, with so many pictures."""
    rows = [[tiny.example(i, fusion="gated", text=5 + i, tiles=n)] for i, n in enumerate(pictures)]
    return tiny.batch(rows, fusion="gated", length=14)


@functools.partial(jax.jit, static_argnames=("model", "learning"))
def outputs(model: VisionLanguageConfig, params: Any, state: Any, batch: Batch, *, learning: bool) -> Any:
    """Logits, and what the gates decided."""
    network = VisionLanguage(model)
    rngs = {LEARNING: jax.random.key(0)} if learning else None
    output: Any = network.apply({"params": params}, batch, state, rngs=rngs)
    return network.apply({"params": params}, output.hidden, method="logits"), output.gates


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.slow
def test_a_gate_that_begins_closed_equals_the_model_without_pictures_to_the_bit(grain, hard):
    model = model_of(grain, hard=hard)
    params, state = tiny.build(model)
    assert sum(path.endswith("gate/opening") for path in params_lib.flatten(params))
    start = params_lib.map_paths(lambda path, x: 0 * x if path.endswith("gate/opening") else x, params)
    batch = questions()
    for learning in (False, True):
        (found, gates), (text, none) = (
            outputs(model, start, state, b, learning=learning) for b in (batch, without_pictures(batch))
        )
        assert none is None and float(gates.decided.open.sum()) > 0  # something does look, and adds nothing
        np.testing.assert_array_equal(found, text)
        assert np.abs(outputs(model, params, state, batch, learning=learning)[0] - text).max() > 1e-3
