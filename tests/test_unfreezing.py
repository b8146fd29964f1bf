"""Progressive unfreezing: layers sleep until their step, in one compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vl_jax.roles import Role
from vl_jax.train.optimizer import OptimizerConfig, make_optimizer
from vl_jax.train.updates.unfreezing import Unfreeze, first_steps

PARAMS = {"image": {"blocks": jnp.ones((3, 2)), "stem": jnp.ones(2)}, "head": jnp.ones(2)}
PATHS = ("image/blocks", "image/stem", "head")
ROLES = dict.fromkeys(PATHS, Role())
LAYERS = {"image/blocks": 3}


def run(config: OptimizerConfig, steps: int, *, plain: bool = False) -> list:
    """Parameters and states after every step, all gradients of one sign."""
    optimizer = make_optimizer(config, set(PATHS), ROLES, layers=LAYERS, plain=plain)
    params, state, found, compiled = PARAMS, optimizer.init(PARAMS), [], []

    @jax.jit
    def step(params, state):
        compiled.append(1)
        grads = jax.tree.map(jnp.ones_like, params)
        with jax.numpy_dtype_promotion("standard"):
            extra = {"plain": grads} if plain else {}
            updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, jax.tree.map(lambda u: 0.1 * u, updates)), state

    for _ in range(steps):
        params, state = step(params, state)
        found.append(jax.device_get((params, state)))
    assert len(compiled) == 1
    return found


@pytest.mark.parametrize("plain", [False, True])
def test_layers_wake_from_the_top(plain):
    rules = (Unfreeze("image/stem", (4,)), Unfreeze("image/blocks", (0, 2)))
    found = run(OptimizerConfig(unfreeze=rules), 5, plain=plain)
    before = PARAMS
    for step, (params, state) in enumerate(found):
        moved = np.any(params["image"]["blocks"] != before["image"]["blocks"], axis=1)
        np.testing.assert_array_equal(moved, [step >= 2, step >= 2, True])
        assert np.any(params["image"]["stem"] != before["image"]["stem"]) == (step >= 4)
        assert np.any(params["head"] != before["head"])
        adam = state.inner[0 if plain else 1]
        for moments in (adam.mu, adam.nu):  # of what has slept nothing is known
            assert np.any(moments["image"]["blocks"][2]) and np.any(moments["head"])
            assert np.any(moments["image"]["blocks"][:2]) == (step >= 2)
            assert np.any(moments["image"]["stem"]) == (step >= 4)
        before = params


def test_what_sleeps_counts_in_no_norm():
    """The gradient of the head alone has a norm of 1.41, which is cut to 1: all of its first moment."""
    found = run(OptimizerConfig(unfreeze=(Unfreeze("image/.*", (9,)),), clip_norm=1.0), 1)
    np.testing.assert_allclose(found[0][1].inner[1].mu["head"], 0.1 / np.sqrt(2), rtol=1e-5)


def test_without_rules_nothing_changes():
    plain, one = run(OptimizerConfig(), 3)[-1][0], run(OptimizerConfig(unfreeze=(Unfreeze("head", (0,)),)), 3)
    jax.tree.map(np.testing.assert_array_equal, plain, one[-1][0])


def test_later_rules_overrule_and_wrong_ones_are_refused():
    rules = (Unfreeze("image/.*", (5,)), Unfreeze("image/stem", (1,)))
    found = first_steps(rules, dict.fromkeys(PATHS), LAYERS)
    assert {path: steps.tolist() for path, steps in found.items()} == {"image/blocks": 5, "image/stem": 1}
    with pytest.raises(ValueError, match="has 2 steps, and image/stem has 0 layers"):
        first_steps((Unfreeze("image/stem", (1, 2)),), dict.fromkeys(PATHS), LAYERS)
    with pytest.raises(ValueError, match="matches no parameter"):
        first_steps((Unfreeze("sound/.*", (1,)),), dict.fromkeys(PATHS), LAYERS)
    with pytest.raises(ValueError, match="expected one or more, each >= 0"):
        Unfreeze("head", ())
