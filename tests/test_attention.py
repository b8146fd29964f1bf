"""Attention: the chunked causal form is the plain one, in values and gradients, for any mask it may get."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.kernels import aot
from vl_jax.nn import attention, chunked, masks


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
    for plain, pieces in zip(*pair, strict=True):
        np.testing.assert_allclose(pieces, plain, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("causal", [True, False])
def test_pieces_cover_the_row_and_few_programs_are_written_for_it(causal):
    for length in (1, 127, 128, 729, 1024, 1025, 4096, 5000, 16_384):
        cut = chunked.pieces(length, length, causal)
        assert [p.start for p in cut[1:]] == [p.stop for p in cut[:-1]]
        assert cut[0].start == 0 and cut[-1].stop == length and len(cut) <= 2 * chunked.MOST_CHUNKS
        assert max(p.size for p in cut) <= chunked.LONGEST
        assert all(p.keys == length or (causal and p.keys >= p.stop) for p in cut)


@pytest.mark.parametrize("length, window", [(5, None), (130, 3), (130, 0), (1300, None), (1300, 200)])
@pytest.mark.slow
def test_a_mask_by_its_rule_is_the_mask_written_out(length, window):
    order = jnp.arange(length)
    segments = jnp.stack([1 + order * 3 // length, jnp.where(order < length - 2, 1, 0)])
    branches = jnp.stack([order % 3, order * 5 // length])
    rule = masks.PackedMask(segments, branches, None if window is None else jnp.int32(window))
    mask = (order[:, None] >= order) & (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    mask &= (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])
    if window:
        mask &= order[:, None] - order < window
    np.testing.assert_array_equal(rule.whole, mask)
    query, key, value, weights = inputs(length, 2, 1, seed=3)

    def gradients(mask):
        def loss(q, k, v):
            return jnp.sum(attention.attend(q, k, v, mask=mask, scale=0.3, causal=True) * weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    for a, b in zip(gradients(rule), gradients(mask), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length, keys, masked", [(729, 729, False), (600, 40, True), (513, 600, True)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.slow
def test_long_sequences_that_see_all_are_the_plain_ones(length, keys, masked, sinks, monkeypatch):
    query, _, _, weights = inputs(length, 4, 2, seed=1)
    _, key, value, _ = inputs(keys, 4, 2, seed=2)
    mask = None
    if masked:
        mask = jax.random.bernoulli(jax.random.key(4), 0.5, (2, 1 if keys == 40 else length, keys))
        mask = mask.at[1].set(False)
    sink = jnp.array([-1.0, 0.5, 2.0, 0.0]) if sinks else jnp.zeros(4)

    def result():
        def loss(q, k, v, s):
            mixed = attention.attend(q, k, v, mask=mask, scale=0.3, sinks=s if sinks else None)
            return jnp.sum(mixed * weights), mixed

        found, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(query, key, value, sink)
        return (mixed, *found)

    chunks = result()
    monkeypatch.setattr(attention, "WHOLE", 10_000)
    assert_close((result(), chunks))


@pytest.mark.slow
def test_sinks_in_causal_chunks_are_the_plain_ones():
    query, key, value, weights = inputs(1100, 4, 2, seed=1)
    mask = jnp.tril(jnp.ones((2, 1100, 1100), bool))

    def result(causal):
        def loss(q, k, v, s):
            mixed = attention.attend(q, k, v, mask=mask, scale=0.3, sinks=s, causal=causal)
            return jnp.sum(mixed * weights), mixed

        sinks = jnp.array([-1.0, 0.5, 2.0, 0.0])
        found, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(query, key, value, sinks)
        return (mixed, *found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WHOLE", 10_000)
        plain = result(False)
    assert_close((plain, result(True)))


@pytest.mark.slow
def test_memory_of_a_gradient_grows_with_the_length():
    def temporaries(length, causal):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, ids):
            mask = masks.PackedMask(ids, ids) if causal else None
            return jnp.sum(attention.attend(q, k, v, mask=mask, scale=0.3, causal=causal) ** 2)

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, ids)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    for causal in (True, False):
        assert temporaries(8192, causal) <= 2 * 1.2 * temporaries(4096, causal)


@pytest.mark.tpu_aot
def test_memory_of_a_gradient_on_a_tpu_grows_with_the_length_up_to_16k():
    place = jax.sharding.SingleDeviceSharding(aot.devices("v5e")[0])

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16, sharding=place)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)

        def loss(q, k, v, ids):
            mixed = attention.attend(q, k, v, mask=masks.PackedMask(ids, ids), scale=0.3, causal=True)
            return jnp.sum(mixed.astype(jnp.float32) ** 2)

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, ids)
        return aot.compile_absent(lowered, quick=True).memory_analysis().temp_size_in_bytes

    assert temporaries(16_384) <= (2 * 1.2) ** 2 * temporaries(4096)
