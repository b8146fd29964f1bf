"""Deformable convolution: both forms against a loop over places, what offsets mean, and how it begins."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.encoders.deformable import FORMS, DeformableConv, Form, Taps, deform
from vl_jax.encoders.deformable_front import DeformableFrontConfig
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.vit import ViTConfig

TAPS = {
    "as large": Taps(),
    "strided": Taps(stride=2, padding=0),
    "dilated": Taps(size=2, stride=1, padding=2, dilation=3),
}
SHAPE = (2, 7, 8, 4)  # M h w C
GROUPS, FEATURES = 2, 3


def case(taps: Taps, seed: int = 0, scale: float = 2.0) -> tuple[Any, Any, Any, Any]:
    """Cells, offsets, mask and kernel."""
    random = np.random.default_rng(seed)
    grid = (SHAPE[0], taps.places(SHAPE[1]), taps.places(SHAPE[2]), GROUPS, taps.size**2)
    arrays = (
        random.standard_normal(SHAPE),
        scale * random.standard_normal((*grid, 2)),
        random.uniform(0, 1, grid),
        random.standard_normal((taps.size, taps.size, SHAPE[3], FEATURES)),
    )
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)  # type: ignore[return-value]


def loop(x: Any, offsets: Any, mask: Any, kernel: Any, taps: Taps) -> np.ndarray:
    """The definition, place by place and channel by channel, in float64."""
    x, offsets, mask, kernel = (np.asarray(a, np.float64) for a in (x, offsets, mask, kernel))
    images, height, width, channels = x.shape
    _, u, v, groups, count = mask.shape
    out = np.zeros((images, u, v, kernel.shape[-1]))

    def at(image: int, row: float, column: float, channel: int) -> float:
        total, top, left = 0.0, int(np.floor(row)), int(np.floor(column))
        for i, j in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= i < height and 0 <= j < width:
                total += x[image, i, j, channel] * (1 - abs(row - i)) * (1 - abs(column - j))
        return total

    for image, i, j, k, channel in itertools.product(
        range(images), range(u), range(v), range(count), range(channels)
    ):
        group = channel // (channels // groups)
        p, q = divmod(k, taps.size)
        down, right = offsets[image, i, j, group, k]
        row = i * taps.stride - taps.padding + p * taps.dilation + down
        column = j * taps.stride - taps.padding + q * taps.dilation + right
        seen = mask[image, i, j, group, k] * at(image, row, column, channel)
        out[image, i, j] += kernel[p, q, channel] * seen
    return out


@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS.keys())
def test_both_forms_are_the_definition(taps: Taps):
    given = case(taps)
    found = deform(*given, taps=taps)
    np.testing.assert_allclose(found, loop(*given, taps), rtol=1e-4, atol=1e-5)
    x, offsets, mask, kernel = given
    near = jnp.clip(offsets, -1, 1)
    expected = loop(x, near, mask, kernel, taps)
    for form in FORMS:
        clipped = deform(x, near, mask, kernel, taps=taps, form=form)  # type: ignore[arg-type]
        np.testing.assert_allclose(clipped, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(deform(*given, taps=taps, form="near"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS.keys())
def test_the_forms_see_the_same_to_rounding(taps: Taps):
    x, offsets, *_ = case(taps)
    near = jnp.clip(offsets, -1, 1)
    one, other = (form(x, near, taps) for form in FORMS.values())
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS.keys())
def test_without_offsets_it_is_a_convolution(form: Form, taps: Taps):
    x, offsets, mask, kernel = case(taps)
    found = deform(x, jnp.zeros_like(offsets), jnp.ones_like(mask), kernel, taps=taps, form=form)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (taps.stride,) * 2,
        [(taps.padding,) * 2] * 2,
        rhs_dilation=(taps.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_whole_offsets_are_shifts(form: Form):
    taps, x = Taps(size=1, padding=0), case(Taps())[0]
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        offsets = jnp.broadcast_to(jnp.array([down, right], jnp.float32), (*SHAPE[:3], 1, 1, 2))
        seen = FORMS[form](x, offsets, taps)[:, :, :, 0]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        expected = padded[:, 1 + down : 1 + down + SHAPE[1], 1 + right : 1 + right + SHAPE[2]]
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: Form):
    taps = TAPS["strided"]
    x, offsets, mask, kernel = case(taps)
    # Away from whole offsets, where the slope jumps; within 1, where both forms hold.
    offsets = jnp.sign(offsets) * (0.2 + 0.6 * jax.nn.sigmoid(offsets))
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 3, FEATURES)), jnp.float32)

    def value(*given: Any) -> Any:
        return jnp.sum(deform(*given, taps=taps, form=form) * weight)

    given = (x, offsets, mask, kernel)
    found = jax.grad(value, argnums=(0, 1, 2, 3))(*given)
    random = np.random.default_rng(4)
    for i, gradient in enumerate(found):
        step = jnp.asarray(random.choice([-0.1, 0.1], given[i].shape), jnp.float32)
        ends = [
            np.sum(loop(*given[:i], given[i] + sign * step, *given[i + 1 :], taps) * np.asarray(weight))
            for sign in (1, -1)
        ]
        # Linear in each, as long as no offset passes a whole number; offsets enter a product of two.
        np.testing.assert_allclose(np.sum(gradient * step), (ends[0] - ends[1]) / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_one_is_a_plain_convolution_whose_offsets_learn(form: Form):
    x = case(Taps())[0]
    module = DeformableConv(FEATURES, groups=GROUPS, form=form)
    params = nn.meta.unbox(module.init(jax.random.key(0), x)["params"])
    found = module.apply({"params": params}, x)
    expected = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) ** 2))(params)  # type: ignore[operator]
    by_kind = gradient["branch"].reshape(3, 3, SHAPE[3], -1, 3)
    assert all(np.any(by_kind[..., kind]) for kind in range(3))


def test_the_near_form_has_no_gather():
    taps = Taps()
    text = str(jax.make_jaxpr(lambda *given: deform(*given, taps=taps, form="near"))(*case(taps)))
    assert " gather[" not in text
    assert " gather[" in str(jax.make_jaxpr(lambda *given: deform(*given, taps=taps))(*case(taps)))


@pytest.mark.slow
def test_a_new_front_leaves_the_picture_as_it_is():
    inner = SwinConfig(image_size=8, patch_size=2, embed_dim=4, stage_blocks=(1,), num_heads=(2,), window=2)
    config = DeformableFrontConfig(inner, features=6, groups=2)
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, *config.input_shape)), jnp.uint8)
    module = config.build("float32")
    params: Any = nn.meta.unbox(module.init(jax.random.key(0), pixels)["params"])
    expected: Any = inner.build("float32").apply({"params": params["encoder"]}, pixels)
    found: Any = module.apply({"params": params}, pixels)
    np.testing.assert_allclose(found.tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    assert len(found.maps) == 1 and config.num_tokens == 16 and config.pooled_dim == 4
    gradient = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, pixels).tokens ** 3))(params)  # type: ignore[union-attr]
    assert np.any(gradient["last"])


def test_a_config_names_what_is_wrong():
    with pytest.raises(ValueError, match="features=6 must be a multiple of groups=4"):
        DeformableFrontConfig(ViTConfig(), features=6, groups=4)
    with pytest.raises(ValueError, match="stride=0, dilation=1: must be >= 1"):
        dataclasses.replace(Taps(), stride=0)
