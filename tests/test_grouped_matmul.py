"""The blocked expert product equals its definition, forward and backward, whatever the groups look like."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.kernels.blocked import BLOCK_ROWS, FINE_STEP_ROWS, STEP_ROWS, Blocks
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp

E, D, F = 4, 6, 5
# More than two blocks, and no multiple of one.
R = 2 * BLOCK_ROWS + 44


def weights() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (E, D, 2, F)), jax.random.normal(keys[1], (E, F, D))


def inputs(seed: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (R, D)), jax.random.normal(keys[1], (R, D))


@jax.jit
def both(rows: jax.Array, upstream: jax.Array, sizes: jax.Array) -> tuple:
    """(output, gradients of rows and weights) of the two kernels."""

    def of(kernel: str) -> tuple:
        def mlp(x: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
            return grouped_mlp(x, sizes, ExpertWeights(w_in, w_out), kernel=kernel)

        y, pullback = jax.vjp(mlp, rows, *(w[: sizes.shape[0]] for w in weights()))
        return y, pullback(upstream)

    return of("blocked"), of("reference")


def naive(rows: jax.Array, sizes: list[int]) -> np.ndarray:
    w_in, w_out = (np.asarray(w, np.float64) for w in weights())
    out = np.zeros(rows.shape)
    start = 0
    for e, size in enumerate(sizes):
        x = np.asarray(rows[start : start + size], np.float64)
        gate, up = x @ w_in[e, :, 0], x @ w_in[e, :, 1]
        out[start : start + size] = (gate / (1 + np.exp(-gate)) * up) @ w_out[e]
        start += size
    return out


def check(sizes: list[int], seed: int = 0) -> None:
    rows, upstream = inputs(seed)
    (y, grads), (expected_y, expected_grads) = both(rows, upstream, jnp.array(sizes, jnp.int32))
    np.testing.assert_allclose(y, naive(rows, sizes), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(("rows", "w_in", "w_out"), grads, expected_grads, strict=True):
        # Sums over up to 300 rows in different orders.
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=3e-6 * max(1.0, float(jnp.abs(b).max())), err_msg=name
        )


@pytest.mark.parametrize(
    "sizes",
    [
        [75, 75, 75, 75],
        [R, 0, 0, 0],
        [0, 0, 0, R],
        [0, 0, 0, 0],
        [1, 1, 1, 1],
        [0, 130, 0, 7],
        [BLOCK_ROWS, BLOCK_ROWS, 44, 0],
        [BLOCK_ROWS - 1, BLOCK_ROWS + 1, 1, 43],
        [STEP_ROWS, STEP_ROWS + 1, STEP_ROWS - 1, BLOCK_ROWS - STEP_ROWS],
        [BLOCK_ROWS - STEP_ROWS + 1, 2 * STEP_ROWS, 0, BLOCK_ROWS + STEP_ROWS],
        [FINE_STEP_ROWS, FINE_STEP_ROWS + 1, FINE_STEP_ROWS - 1, BLOCK_ROWS - FINE_STEP_ROWS],
        # Of few groups with many rows each, blocks are cut less finely.
        [R, 0],
        [BLOCK_ROWS + 1, STEP_ROWS + 1],
        [BLOCK_ROWS - STEP_ROWS + 1, STEP_ROWS],
    ],
    ids=str,
)
@pytest.mark.slow
def test_blocked_equals_the_definition(sizes):
    check(sizes)


def test_small_groups_are_cut_more_finely():
    assert Blocks.of(4 * BLOCK_ROWS, 4).step == FINE_STEP_ROWS
    assert Blocks.of(4 * BLOCK_ROWS + 1, 4).step == Blocks.of(BLOCK_ROWS - 1, 4).step == STEP_ROWS


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, R), min_size=E - 1, max_size=E - 1), st.integers(0, R), st.integers(0, 3))
@pytest.mark.slow
def test_blocked_equals_the_definition_for_any_groups(cuts, end, seed):
    ends = [*sorted(min(c, end) for c in cuts), end]
    check([b - a for a, b in zip([0, *ends], ends, strict=False)], seed)


def test_rows_of_no_group_give_zero_and_get_no_gradient():
    rows, upstream = inputs(0)
    (y, grads), _ = both(rows, upstream, jnp.array([5, 0, 9, 0], jnp.int32))
    assert not y[14:].any() and not grads[0][14:].any()
    assert y[:14].all() and not grads[1][1].any()


def test_what_stands_in_rows_of_no_group_does_not_matter():
    rows, upstream = inputs(0)
    sizes = jnp.array([5, 0, 9, 0], jnp.int32)
    filled = both(rows.at[14:].set(1e6), upstream.at[14:].set(1e6), sizes)[0]
    jax.tree.map(np.testing.assert_array_equal, filled, both(rows, upstream, sizes)[0])


@pytest.mark.slow
def test_mapped_over_seeds_each_has_the_bits_it_has_alone_and_no_cut_is_computed_in_vain():
    sizes = jnp.array([[300, 0, 31, 200], [1, 255, 256, 20], [0, 0, 0, 7]], jnp.int32)
    rows, upstream = (jnp.stack(x) for x in zip(*(inputs(seed) for seed in range(3)), strict=True))
    mapped, _ = jax.vmap(both)(rows, upstream, sizes)
    for seed in range(3):
        alone, _ = both(rows[seed], upstream[seed], sizes[seed])
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), mapped, alone)
    assert "cond" in str(jax.make_jaxpr(jax.vmap(both))(rows, upstream, sizes))
