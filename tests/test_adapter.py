"""From what one encoder sees, or two, to visual tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.encoders.adapter import Adapter, AdapterConfig, gather_visual, pixel_shuffle
from vl_jax.encoders.high_resolution import HighResolutionConfig
from vl_jax.encoders.sam import SAMConfig
from vl_jax.kernels.activation import FUNCTIONS
from vl_jax.layout import abstract, plan_layout, put_batch
from vl_jax.model import VisionLanguage
from vl_jax.sharding import MeshConfig, make_mesh

# The same sums in another order, over values of order 1.
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def filled(tree: Any) -> Any:
    """Random leaves of the shapes of a tree, none of them at its initial constant."""
    leaves = params_lib.flatten(nn.meta.unbox(tree)).items()
    return params_lib.unflatten(
        {
            path: 0.3 * random(*leaf.shape, seed=i) + float(path.endswith("scale"))
            for i, (path, leaf) in enumerate(leaves)
        }
    )


# The adapter by itself.


def adapter(patches: jax.Array, width: int = 3, **options: Any) -> tuple[Adapter, Any]:
    """An adapter and parameters for patches [M P W]."""
    module = Adapter(AdapterConfig(**options), width)
    index = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), patches[None], index)["params"])
    return module, filled(shapes)


def project(patches: jax.Array, params: Any, module: Adapter) -> jax.Array:
    return jnp.asarray(module.apply({"params": params}, patches, method="project"))


def test_pixel_shuffle_joins_windows_channel_by_channel():
    grid = jnp.arange(18.0).reshape(1, 9, 2)  # 3 x 3 patches; the window at the end has one of them
    found = pixel_shuffle(grid, ratio=2)
    np.testing.assert_array_equal(found[0, 0], [0, 2, 6, 8, 1, 3, 7, 9])
    np.testing.assert_array_equal(found[0, 3], [16, 0, 0, 0, 17, 0, 0, 0])


def test_tokens_that_are_no_square_pass_where_nothing_is_joined():
    patches = random(2, 7, 4)
    np.testing.assert_array_equal(pixel_shuffle(patches, ratio=1), patches)


@pytest.mark.parametrize("extra", [0, 2])
def test_visual_tokens_are_rows_of_the_table_and_padding_is_zero(extra: int):
    tokens, learned = random(2, 2, 3, 4), random(extra, 4, seed=1)
    index = jnp.array([[5, 0, -1], [2, 5 + extra, -1]], jnp.int32)
    found = gather_visual(tokens, learned, index)
    flat = np.asarray(tokens).reshape(2, 6, 4)
    last = learned[-1] if extra else flat[1, 5]
    np.testing.assert_array_equal(found[0], [flat[0, 5], flat[0, 0], np.zeros(4)])
    np.testing.assert_array_equal(found[1], [flat[1, 2], last, np.zeros(4)])


@pytest.mark.parametrize("activation", sorted(FUNCTIONS))
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.slow
def test_the_projector_is_linear_maps_with_a_function_between(activation: Any, use_bias: bool):
    patches = random(2, 4, 5)
    options = {"downsample": 1, "activation": activation, "use_bias": use_bias, "separators": False}
    module, params = adapter(patches, **options)
    leaves = {path: np.asarray(leaf) for path, leaf in params_lib.flatten(params).items()}
    assert set(leaves) == {
        f"layer_{i}/{n}" for i in (0, 1) for n in (("kernel", "bias") if use_bias else ("kernel",))
    }
    hidden = np.asarray(patches) @ leaves["layer_0/kernel"] + leaves.get("layer_0/bias", 0)
    shaped = np.asarray(FUNCTIONS[activation](jnp.asarray(hidden)))
    expected = shaped @ leaves["layer_1/kernel"] + leaves.get("layer_1/bias", 0)
    assert_close(project(patches, params, module), expected)


def test_skipped_tokens_change_nothing():
    patches = random(2, 5, 4)
    module, params = adapter(patches, skip=1, num_layers=1)
    plain = Adapter(AdapterConfig(num_layers=1), 3)
    np.testing.assert_array_equal(project(patches, params, module), project(patches[:, 1:], params, plain))


def test_only_an_adapter_with_separators_has_them():
    patches = random(1, 4, 4)
    with_them, without = (adapter(patches, num_layers=1, separators=s)[1] for s in (True, False))
    assert with_them.keys() == {"layer_0", "newline", "separator"} and without.keys() == {"layer_0"}


@pytest.mark.parametrize("options", [{"skip": -1}, {"downsample": 0}, {"num_layers": -1}, {"mlp_ratio": 0}])
def test_impossible_adapters_are_refused(options: dict[str, int]):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}"):
        AdapterConfig(**options)  # pyright: ignore[reportArgumentType]


# Two encoders.

HIGH = HighResolutionConfig(
    SAMConfig(
        image_size=12,
        patch_size=4,
        embed_dim=8,
        mlp_dim=8,
        output_dim=4,
        num_layers=2,
        num_heads=2,
        window=2,
        global_layers=(1,),
    ),
    grid=4,
)
TWO = dataclasses.replace(
    tiny.config(),
    high_resolution=HIGH,
    adapter=AdapterConfig(downsample=1, num_layers=0, separators=False),
)


def pictures(rows: int, tiles: int = 2) -> Any:
    """A batch of rows that see all of their tiles, one token after the other."""
    small = TWO.smallest_batch(rows)
    levels = np.random.default_rng(0).integers(0, 256, (rows, tiles, *small.tiles.shape[2:]))
    index = np.broadcast_to(np.arange(16 * tiles, dtype=np.int32), (rows, 16 * tiles))
    return small.replace(
        tiles=levels.astype(np.uint8),
        high_tiles=np.asarray(random(rows, tiles, *small.high_tiles.shape[2:])),
        visual_index=index,
        visual_start=np.zeros_like(index),
        visual_segment_ids=np.ones_like(index),
    )


@functools.cache
def params_of_two() -> Any:
    return filled(abstract(TWO))


def see(params: Any, batch: Any) -> jax.Array:
    return jnp.asarray(VisionLanguage(TWO).apply({"params": params}, batch, method="see")[0])  # type: ignore[index]


@pytest.mark.slow
def test_a_visual_token_has_gradient_from_both_pictures_of_its_tile_and_from_every_parameter():
    batch = jax.tree.map(jnp.asarray, pictures(1))

    def of_second_tile(high: jax.Array, params: Any) -> jax.Array:
        return jnp.sum(see(params, batch.replace(high_tiles=high))[:, 16:] ** 2)

    high, params = jax.jit(jax.grad(of_second_tile, argnums=(0, 1)))(batch.high_tiles, params_of_two())
    assert not np.any(high[:, 0]) and np.abs(high[:, 1]).sum(axis=(0, 3)).all()
    assert np.abs(params["encoder"]["positions"]).sum(axis=1).all()
    others = {path: leaf for path, leaf in params_lib.flatten(params).items() if "language" not in path}
    assert not [path for path, leaf in others.items() if not np.any(leaf)]


@pytest.mark.slow
def test_two_resolutions_see_the_same_on_many_devices():
    batch = pictures(8, tiles=1)
    expected = jax.jit(see)(params_of_two(), jax.tree.map(jnp.asarray, batch))
    layout = plan_layout(TWO, batch, make_mesh(MeshConfig(2, 2, 1, 2)))
    with sharding.use_mesh(layout.mesh, layout.rules):
        params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params_of_two(), layout.params)
        found = jax.jit(see)(params, put_batch(batch, layout))
    assert_close(found, expected)


@pytest.mark.parametrize("high", [None, jnp.zeros((1, 1, 12, 12, 3), jnp.uint8)])
@pytest.mark.slow
def test_two_resolutions_refuse_pixels_that_are_not_normalised(high: Any):
    batch = TWO.smallest_batch(1).replace(high_tiles=high)
    with pytest.raises(ValueError, match="high_tiles=(None|uint8): .* normalised floats"):
        jax.eval_shape(lambda params: see(params, batch), abstract(TWO))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "high_resolution needs an encoder"),
        ({"high_resolution": dataclasses.replace(HIGH, grid=3)}, "grid=3: the encoder has 16 tokens, not 9"),
        ({"adapter": AdapterConfig(skip=16)}, "skip=16 leaves none"),
        ({"adapter": AdapterConfig(skip=1)}, "downsample=2: 15 tokens are not a square"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TWO, **changes)


def test_rows_with_newlines_need_separators_and_a_square():
    plain = dataclasses.replace(TWO, high_resolution=None)
    for options in ({"separators": False}, {"skip": 1}):
        model = dataclasses.replace(plain, adapter=AdapterConfig(downsample=1, **options))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="need separators, and tokens that form a square"):
            _ = model.tile_tokens_side
