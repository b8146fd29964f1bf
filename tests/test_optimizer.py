"""Schedules, decay and rates of the optimiser, against values worked by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax.roles import ORDINARY, Role
from vl_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule

PARAMS = {
    "a": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2), "scale": jnp.ones(2)},
    "b": {"kernel": jnp.full((2, 2), 2.0), "embedding": jnp.ones((2, 2))},
}
PATHS = set(params_lib.flatten(PARAMS))
DECAYED = {"a/kernel", "b/kernel"}
ROLES = {path: Role(decay=path in DECAYED) for path in PATHS}


def updates_of(config: OptimizerConfig, gradients, *, paths=frozenset(PATHS), steps: int = 10):
    """The first update of the leaves in ``paths``, times the learning rate of the first step, by path."""
    trained, _ = params_lib.split(PARAMS, set(paths))
    grads, _ = params_lib.split(gradients, set(paths))
    optimizer = make_optimizer(config, set(paths), ROLES)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
    rate = float(schedule(config, steps)(0))
    return {path: rate * u for path, u in params_lib.flatten(updates).items()}


def config(**options) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 0.1, "schedule": "constant", **options})


ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def rates(config: OptimizerConfig, steps: int, at) -> list[float]:
    return [float(schedule(config, steps)(i)) for i in at]


def test_warm_up_rises_from_its_first_step_to_the_peak():
    found = rates(config(warmup_steps=4), 20, [0, 1, 2, 3, 4, 19])
    np.testing.assert_allclose(found, [0.025, 0.04375, 0.0625, 0.08125, 0.1, 0.1], rtol=1e-6)


def test_cosine_falls_to_its_fraction_at_the_end_and_is_half_way_in_the_middle():
    found = rates(config(schedule="cosine", final_fraction=0.2), 100, [0, 50, 100])
    np.testing.assert_allclose(found, [0.1, 0.06, 0.02], rtol=1e-5)


def test_cosine_counts_from_the_end_of_the_warm_up():
    found = rates(config(schedule="cosine", final_fraction=0.0, warmup_steps=20), 120, [20, 70, 120])
    np.testing.assert_allclose(found, [0.1, 0.05, 0.0], rtol=1e-5, atol=1e-8)


def test_step_schedule_divides_by_root_ten_at_half_and_at_three_quarters():
    found = rates(config(schedule="step"), 100, [0, 49, 51, 74, 76, 99])
    root = math.sqrt(10)
    np.testing.assert_allclose(found, [0.1, 0.1, 0.1 / root, 0.1 / root, 0.01, 0.01], rtol=1e-5)


@pytest.mark.slow
def test_without_gradient_exactly_the_masked_leaves_decay():
    updates = updates_of(config(weight_decay=0.5), ZEROS)
    for path, update in updates.items():
        expected = -0.1 * 0.5 * 2.0 if path in DECAYED else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)


def test_patterns_spare_leaves_beside_those_that_do_not_decay_by_their_role():
    updates = updates_of(config(weight_decay=0.5, no_decay=("a/.*",)), ZEROS)
    assert {path for path, update in updates.items() if np.any(update)} == {"b/kernel"}


def test_the_pattern_that_old_runs_recorded_means_that_roles_decide():
    names = r".*/(scale|(\w+_)?bias\w*|opening|newline|separator|positions|class_token|probe|embedding)"
    old = OptimizerConfig(no_decay=(names,))
    assert old == OptimizerConfig()
    only = {"kernel": ORDINARY}
    assert make_optimizer(old, set(only), only)
    # Beside another pattern it is what somebody wrote, and has to match.
    with pytest.raises(ValueError, match="matches no parameter"):
        make_optimizer(OptimizerConfig(no_decay=(names, "kernel")), set(only), only)


def test_the_first_adam_step_is_the_rate_in_the_direction_of_the_sign():
    updates = updates_of(config(weight_decay=0.0), jax.tree.map(lambda x: -3 * x, ONES))
    for path, update in updates.items():
        np.testing.assert_allclose(update, 0.1, rtol=1e-5, err_msg=path)


def test_a_group_moves_at_its_multiple_of_the_rate():
    updates = updates_of(config(weight_decay=0.0, rates=(("a/.*", 0.25), ("a/bias", 2.0))), ONES)
    expected = {"a/kernel": -0.025, "a/scale": -0.025, "a/bias": -0.2, "b/kernel": -0.1, "b/embedding": -0.1}
    for path, update in updates.items():
        np.testing.assert_allclose(update, expected[path], rtol=1e-5, err_msg=path)


def test_a_group_may_name_leaves_that_this_stage_freezes():
    updates = updates_of(config(rates=(("b/.*", 0.5),)), ONES, paths={"a/kernel"})
    assert updates.keys() == {"a/kernel"}


def test_long_gradients_are_clipped_together_and_short_ones_are_not():
    # Adam divides its first step by the gradient's size; an epsilon far above it leaves the size visible.
    options = config(weight_decay=0.0, clip_norm=1.0, epsilon=1e6)
    norm = math.sqrt(sum(x.size for x in jax.tree.leaves(ONES)))
    for factor, clipped in ((100.0, 1 / norm), (0.01, 0.01)):
        updates = updates_of(options, jax.tree.map(lambda x, f=factor: x * f, ONES))
        np.testing.assert_allclose(updates["a/kernel"], -0.1 * clipped / 1e6, rtol=1e-3)


@pytest.mark.parametrize("options", [{"no_decay": ("nothing",)}, {"rates": (("nothing", 2.0),)}])
def test_a_pattern_that_matches_nothing_is_one_line(options):
    with pytest.raises(ValueError, match="pattern 'nothing' matches no parameter; top-level names: a, b"):
        make_optimizer(config(**options), PATHS, ROLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be >= 0"),
        ({"final_fraction": 1.5}, "final_fraction=1.5 in 0..1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def muon_update(tree, gradients, roles):
    """The update of Muon at learning rate 1 and no decay, by path, sign turned."""
    settings = config(method="muon", learning_rate=1.0, weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(settings, set(roles), roles)
    with jax.numpy_dtype_promotion("standard"):  # inside optax
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(tree), tree)
    return {path: -np.asarray(u) for path, u in params_lib.flatten(updates).items()}


def random_tree(shapes: dict[str, tuple[int, ...]]):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    leaves = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes.values(), strict=True)]
    return params_lib.unflatten(dict(zip(shapes, leaves, strict=True)))


def test_muon_makes_the_update_of_a_matrix_orthogonal_and_as_large_as_adams():
    tree = random_tree({"block/fc/kernel": (24, 48)})
    update = muon_update(tree, tree, {"block/fc/kernel": Role((-2,), (-1,))})["block/fc/kernel"]
    gradient = np.asarray(tree["block"]["fc"]["kernel"])
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    nearest = left @ right * 0.2 * math.sqrt(48)
    # Five Newton-Schulz iterations leave the singular values within about 0.7 .. 1.2 (Jordan et al. 2024).
    singular = np.linalg.svd(update, compute_uv=False) / (0.2 * math.sqrt(48))
    assert 0.6 < singular.min() and singular.max() < 1.3
    assert np.sum(update * nearest) / np.linalg.norm(update) / np.linalg.norm(nearest) > 0.97
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 0.2, rtol=0.2)


@pytest.mark.slow
def test_muon_treats_stacked_layers_experts_and_heads_as_matrices_of_their_own():
    # Shape, the role of the layer that is stacked, and one matrix of the stack.
    kinds = {
        "moe/w_in": ((2, 3, 8, 2, 6), Role((-3,), (-1,)), lambda a: a[1, 2, :, 1]),
        "attention/query": ((2, 8, 2, 4), Role((-3,), (-2, -1)), lambda a: a[1].reshape(8, 8)),
        "attention/output": ((2, 2, 4, 8), Role((-3, -2), (-1,)), lambda a: a[1].reshape(8, 8)),
        "attention/kv_up": ((2, 2, 4, 6), Role((-1,), (-3, -2)), lambda a: a[1].reshape(8, 6).T),
        "attention/qkv": ((2, 8, 3, 2, 4), Role((-4,), (-3, -2, -1)), lambda a: a[1].reshape(8, 24)),
        "stem/kernel": ((2, 2, 3, 8), Role((-4, -3, -2), (-1,)), lambda a: a.reshape(12, 8)),
        "convs/kernel": ((2, 3, 3, 4, 8), Role((-4, -3, -2), (-1,)), lambda a: a[1].reshape(36, 8)),
    }
    stacked = random_tree({path: shape for path, (shape, _, _) in kinds.items()})
    found = muon_update(stacked, stacked, {path: role for path, (_, role, _) in kinds.items()})
    for path, (_, _, cut) in kinds.items():
        tree = {"one": {"kernel": cut(params_lib.flatten(stacked)[path])}}
        alone = muon_update(tree, tree, {"one/kernel": Role((-2,), (-1,))})["one/kernel"]
        np.testing.assert_allclose(cut(found[path]), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_muon_leaves_what_is_no_matrix_to_adam():
    tree = random_tree({"router": (2, 8, 4), "norm": (2, 8)})
    for path, update in muon_update(tree, tree, {"router": ORDINARY, "norm": Role()}).items():
        # Adam's first step is the sign of the gradient.
        np.testing.assert_allclose(update, np.sign(tree[path]), rtol=1e-4)
