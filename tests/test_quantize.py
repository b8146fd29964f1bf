"""Weights in int8: what they stand for, how far that is from what they were, and adapters beside them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vl_jax import params as params_lib
from vl_jax.compress import quantize
from vl_jax.nn.packed import dequantize
from vl_jax.roles import ORDINARY, Role
from vl_jax.runtime.lazy_array import LazyArray
from vl_jax.train import lora
from vl_jax.train.lora import LoraConfig, Only

EXPERTS = Role((-3,), (-1,), decay=True, experts=-4)  # of w_in [L E D X F]
SQUARE = Role((-2,), (-1,), decay=True)
ROLES = {"moe/w_in": EXPERTS, "mlp/w_out": SQUARE, "norm/scale": Role(), "head/kernel": ORDINARY}
SHAPES = {"moe/w_in": (2, 3, 6, 2, 5), "mlp/w_out": (2, 6, 4), "norm/scale": (2, 6), "head/kernel": (6, 9)}
MATRICES = {"moe/w_in", "mlp/w_out"}


def tree(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return params_lib.unflatten(
        {p: jnp.asarray(random.normal(size=s), jnp.float32) for p, s in SHAPES.items()}
    )


def filled(shapes: Any, size: float = 0.3) -> Any:
    random = np.random.default_rng(5)
    return jax.tree.map(lambda s: jnp.asarray(size * random.normal(size=s.shape), jnp.float32), shapes)


def test_a_matrix_worked_by_hand():
    weight = jnp.array([[1.0, -0.5], [-2.54, 0.25]])  # channels are columns: 2.54 / 127 = 0.02
    values, scale = quantize.quantize(weight, SQUARE)
    np.testing.assert_array_equal(values, [[50, -127], [-127, 64]])  # 0.25 / (0.5 / 127) = 63.5, to even
    np.testing.assert_allclose(scale, [[0.02, 0.5 / 127]], rtol=1e-6)
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32


@settings(max_examples=50, deadline=None)
@given(
    arrays.arrays(
        np.float32, (3, 4, 5), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
    ),
    st.sampled_from([Role((-2,), (-1,)), Role((-1,), (-2,)), Role((-3, -2), (-1,))]),
)
def test_no_weight_moves_by_more_than_half_a_scale(weight: np.ndarray, role: Role):
    values, scale = quantize.quantize(jnp.asarray(weight), role)
    moved = np.abs(np.asarray(dequantize(values, scale), np.float64) - weight)
    assert np.all(moved <= np.asarray(scale, np.float64) * 0.50001)
    assert np.all(np.abs(np.asarray(values, int)) <= 127) and np.all(np.asarray(scale) > 0)


@settings(max_examples=50, deadline=None)
@given(
    arrays.arrays(np.int8, (4, 5), elements=st.integers(-127, 127)),
    arrays.arrays(np.int16, (5,), elements=st.integers(1, 2**14)),
    st.integers(-30, 30),
)
def test_what_int8_can_say_is_said_exactly(numbers: np.ndarray, scales: np.ndarray, exponent: int):
    numbers[0] = 127  # a channel whose largest number is smaller has a finer scale
    weight = jnp.asarray(numbers * scales.astype(np.float32) * np.float32(2.0**exponent))
    values, scale = quantize.quantize(weight, SQUARE)
    np.testing.assert_array_equal(values, numbers)
    np.testing.assert_array_equal(dequantize(values, scale), weight)


def test_each_channel_of_each_layer_and_expert_has_a_scale_of_its_own():
    weight = tree()["moe"]["w_in"]
    values, scale = quantize.quantize(weight, EXPERTS)
    assert scale.shape == (2, 3, 1, 2, 5)
    again, other = quantize.quantize(weight.at[1, 2, :, 0, 3].multiply(100.0), EXPERTS)
    same = np.ones(scale.shape, bool)
    same[1, 2, 0, 0, 3] = False
    np.testing.assert_array_equal(np.asarray(scale == other), same)
    np.testing.assert_array_equal(values, again)  # numbers are relative to their scale


def test_a_channel_of_zeros_stays_zero():
    values, scale = quantize.quantize(jnp.zeros((3, 2)), SQUARE)
    assert not np.any(dequantize(values, scale)) and np.all(np.isfinite(scale))


@pytest.mark.slow
def test_a_tree_becomes_small_and_whole_again_and_all_else_stays():
    params = tree()
    small = quantize.quantized(params, MATRICES, ROLES)
    assert quantize.paths_of(small) == MATRICES and quantize.paths_of(params) == set()
    flat, back = params_lib.flatten(params), params_lib.flatten(quantize.whole(small))
    assert back.keys() == flat.keys()
    for path in flat.keys() - MATRICES:
        assert back[path] is flat[path]
    found = quantize.errors(params, MATRICES, ROLES)
    for path in MATRICES:
        error = np.linalg.norm(flat[path] - back[path]) / np.linalg.norm(flat[path])
        np.testing.assert_allclose(found[path], error, rtol=1e-4)
        assert 0 < error < 0.01
    # 4 bytes become 1, and 4 for a scale of every 6 (w_in, w_out have 6 inputs).
    matrices = 2 * 3 * 6 * 2 * 5 + 2 * 6 * 4
    others = 4 * (2 * 6 + 6 * 9)
    assert quantize.size(params) == 4 * matrices + others
    assert quantize.size(small) == matrices + 4 * matrices // 6 + others
    for shape, leaf in zip(
        *map(jax.tree.leaves, (quantize.shapes(params, MATRICES, ROLES), small)), strict=True
    ):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_small_weights_are_whole_when_a_part_of_a_checkpoint_is_read():
    small = quantize.quantized(tree(), MATRICES, ROLES)
    flat = {path: LazyArray.of(np.asarray(leaf)) for path, leaf in params_lib.flatten(small).items()}
    found, expected = quantize.whole_when_read(flat), params_lib.flatten(quantize.whole(small))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        index = (slice(1, 2), *(slice(0, 3),) * (len(array.shape) - 1))
        np.testing.assert_array_equal(array[index], np.asarray(expected[path])[index])


def test_what_is_no_matrix_is_refused_in_one_line():
    assert quantize.select(tree(), ROLES) == MATRICES
    with pytest.raises(ValueError) as error:
        quantize.select(tree(), ROLES, ("norm/.*",))
    assert str(error.value) == (
        "pattern 'norm/.*' matches no weight matrix, only norm/scale; embedding, head, router, norms and "
        "biases stay as they are"
    )


@pytest.mark.slow
def test_as_close_as_qwix_where_that_sees_a_weight():
    qarray = pytest.importorskip("qwix._src.core.qarray")
    weight = tree(3)["mlp"]["w_out"][0]
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,), calibration_method="absmax")
    theirs = qarray.quantize(weight, how)
    values, scale = quantize.quantize(weight, SQUARE)
    # It divides by 127.5, and so cannot say every weight again that int8 can say.
    np.testing.assert_allclose(scale / theirs.scale, 127.5 / 127, rtol=1e-6)
    assert np.all(np.abs(np.asarray(values, int) - np.asarray(theirs.qvalue, int)) <= 1)
    ours, others = (
        jnp.linalg.norm(w - weight) for w in (dequantize(values, scale), qarray.dequantize(theirs))
    )
    assert ours < 1.2 * others


ONLY = Only(layers=(1,), experts=(0, 2))
CONFIG = LoraConfig(rank=2, alpha=3.0, targets=(".*w_in",), only=ONLY)


@pytest.mark.slow
def test_only_chosen_layers_and_experts_have_factors_and_change():
    params = tree()
    shapes = lora.shapes(CONFIG, params, ROLES)
    assert shapes["moe"]["w_in"]["a"].shape == (1, 2, 2, 6, 2)  # [layers experts gate-or-up inputs rank]
    assert shapes["moe"]["w_in"]["b"].shape == (1, 2, 2, 2, 5)
    adapters = filled(shapes)
    merged = lora.merge(params, adapters, CONFIG.scale, ROLES, ONLY)["moe"]["w_in"]
    expected = np.array(params["moe"]["w_in"])
    a, b = adapters["moe"]["w_in"]["a"], adapters["moe"]["w_in"]["b"]
    for place, expert in enumerate((0, 2)):
        product = np.einsum("xdr,xrf->dxf", a[0, place], b[0, place])
        expected[1, expert] += 1.5 * product
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    for layer, expert in ((0, 0), (0, 1), (0, 2), (1, 1)):
        np.testing.assert_array_equal(merged[layer, expert], params["moe"]["w_in"][layer, expert])


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [set(), MATRICES])
def test_packed_weights_are_the_merged_ones_and_only_factors_have_gradients(stacked: set[str]):
    config = LoraConfig(rank=2, alpha=3.0, targets=(".*/w_.*",), only=Only(layers=(1,)))
    small = quantize.quantized(tree(), MATRICES, ROLES)
    adapters = filled(lora.shapes(config, tree(), ROLES))
    merged = params_lib.flatten(lora.merge(small, adapters, config.scale, ROLES, config.only))
    packed = params_lib.flatten(lora.pack(small, adapters, config.scale, ROLES, config.only, stacked))
    assert merged.keys() == packed.keys()
    for path, leaf in packed.items():
        unpacked = leaf.unpack() if path in stacked else leaf
        np.testing.assert_allclose(unpacked, merged[path], rtol=1e-5, atol=1e-6)

    def total(adapters: Any, small: Any) -> jax.Array:
        flat = params_lib.flatten(lora.pack(small, adapters, config.scale, ROLES, config.only, stacked))
        return sum(jnp.sum((x.unpack() if p in stacked else x) ** 2) for p, x in flat.items())

    grads = jax.grad(total)(adapters, small)
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in jax.tree.leaves(grads))
    with pytest.raises(TypeError, match="int8"):
        jax.grad(total, argnums=1)(adapters, small)


def test_merging_into_int8_is_refused_in_one_line_where_rounding_would_eat_the_adapter():
    small = quantize.quantized(tree(), MATRICES, ROLES)
    config = LoraConfig(rank=2, alpha=2.0, targets=("mlp/w_out",))
    merge = functools.partial(lora.merge_in_int8, small, scale=1.0, roles=ROLES)
    tiny = filled(lora.shapes(config, tree(), ROLES), size=0.03)
    with pytest.raises(ValueError, match=r"^mlp/w_out in int8 loses \d+% of its adapter, more than .*apart$"):
        merge(tiny)
    large = filled(lora.shapes(config, tree(), ROLES), size=2.0)
    found = params_lib.flatten(quantize.whole(merge(large, most_lost=0.02)))
    expected = params_lib.flatten(lora.merge(small, large, 1.0, ROLES))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=0.03 * float(jnp.max(jnp.abs(leaf))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": Only(experts=(3,))}, r"only.experts=\(3,\) must be from 0 to 2 in moe/w_in"),
        ({"only": Only(layers=(0, 2))}, r"only.layers=\(0, 2\) must be from 0 to 1 in moe/w_in"),
        (
            {"targets": ("mlp/.*",), "only": Only(experts=(0,))},
            r"only.experts=\(0,\): no weight of targets=\('mlp/.*',\) has experts",
        ),
    ],
)
def test_layers_and_experts_that_are_not_there_are_refused_in_one_line(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        lora.select(LoraConfig(**{"targets": ("moe/.*",), **options}), tree(), ROLES)


@pytest.mark.parametrize("options", [{"layers": (-1,)}, {"experts": (1, 1)}])
def test_numbers_without_a_meaning_are_refused(options: dict[str, tuple[int, ...]]):
    with pytest.raises(ValueError, match="must be different numbers >= 0"):
        Only(**options)
