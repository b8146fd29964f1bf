"""The state and the losses of routing schemes are the same however a training step is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import test_step
import tiny

from vl_jax.model import LANGUAGE, VisionLanguageConfig
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.stacks import update_state

EXAMPLE = Path(__file__).resolve().parent.parent / "experiments" / "my_router.py"
# Every way to keep state or to draw noise, and the balance over whole steps, with fields of ``MoEConfig``.
CASES: dict[str, dict[str, Any]] = {
    "loss_free over steps": {"scheme": "loss_free", "balance": BalanceConfig(weight=0.1, scope="step")},
    "remoe": {"options": (("initial_l1", 0.1),)},
    "expert_threshold": {"options": (("decay", 0.5),)},
    "noisy_top_k": {},
    "my_router": {"scheme": f"{EXAMPLE}:my_router"},
}


def model(case: str, **language: Any) -> VisionLanguageConfig:
    config = tiny.of_text(tiny.config("top_k", **language))
    fields = {"scheme": case, "balance": BalanceConfig(weight=0.0), **CASES[case]}
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **fields))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_state_losses_and_gradients_are_those_of_one_device_and_one_batch(case):
    plain = model(case)
    state = tiny.build(plain)[1]
    expected = test_step.results(plain)
    if case == "remoe":  # the L1 weights drawn for the two layers have different signs: their losses cancel
        expected = (expected[0], {k: v for k, v in expected[1].items() if k != "auxiliary_loss"}, expected[2])
    update = jax.jit(lambda stats: update_state(state, stats, plain.stacks)[LANGUAGE])
    after = update(expected[2])
    # 8 devices, and on each of them 2 micro-batches, layers computed again for the gradient
    found = test_step.results(model(case, remat="full"), test_step.MESHES["data2-expert4"], accumulation=2)
    test_step.assert_same(found, expected)
    for key, again in update(found[2]).items():
        # Counts, and what follows from them, are equal; averages of scores, which are of order one and
        # have either sign, up to the order of additions.
        off = 1e-7 if case == "expert_threshold" else 0
        np.testing.assert_allclose(again, after[key], rtol=10 * off, atol=off, err_msg=key)
    moved = [not np.array_equal(after[key], state[LANGUAGE][key]) for key in after]
    assert all(moved)
