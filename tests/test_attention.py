"""Attention: the chunked causal form is the plain one, in values and gradients, for any mask it may get."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.nn import attention


def inputs(length: int, heads: int, key_heads: int, seed: int, width: int = 8, values: int = 6):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(2, length, heads, width), (2, length, key_heads, width), (2, length, key_heads, values)]
    query, key, value = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    return query, key, value, jax.random.normal(keys[3], (2, length, heads, values))


def both(length: int, mask, *, heads: int = 4, key_heads: int = 2, seed: int = 0):
    """Values and gradients, plain and in chunks."""
    query, key, value, weights = inputs(length, heads, key_heads, seed)

    def result(causal: bool):
        def loss(q, k, v):
            mixed = attention.attend(q, k, v, mask=mask, scale=0.3, causal=causal)
            return jnp.sum(mixed * weights), mixed

        gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
        return (mixed, *gradients)

    return result(False), result(True)


def assert_close(pair) -> None:
    for plain, chunked in zip(*pair, strict=True):
        np.testing.assert_allclose(chunked, plain, rtol=1e-5, atol=1e-5)


# One chunk, exactly one, one and a bit, and so many tokens that chunks become longer.
@pytest.mark.parametrize("length", [5, 128, 131, pytest.param(1100, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_chunks_change_neither_values_nor_gradients(length):
    order = jnp.arange(length)
    segments = jnp.stack([order * 3 // length, 0 * order])
    mask = (order[:, None] >= order) & (segments[:, :, None] == segments[:, None])
    assert_close(both(length, mask))


@pytest.mark.slow
def test_any_mask_below_the_diagonal_will_do_and_who_sees_nothing_gets_zeros():
    length, seed = 130, 5
    allowed = jax.random.bernoulli(jax.random.key(seed), 0.3, (2, length, length))
    mask = jnp.tril(allowed).at[:, 7].set(False)
    pair = both(length, mask, heads=3, key_heads=1, seed=seed)
    assert_close(pair)
    np.testing.assert_array_equal(pair[1][0][:, 7], 0.0)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in pair[1])


def test_no_piece_but_the_last_is_cut_short_and_they_cover_the_row():
    for length in (1, 127, 128, 1024, 1025, 5000):
        pieces = attention._chunks(length)
        assert [p.start for p in pieces[1:]] == [p.stop for p in pieces[:-1]]
        assert pieces[0].start == 0 and pieces[-1].stop == length and len(pieces) <= 8
        assert len({p.stop - p.start for p in pieces[:-1]}) <= 1
