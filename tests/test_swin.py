"""The Swin transformer against a reference of its own, and what its windows and shifts are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import folder_in

from vl_jax import params as params_lib
from vl_jax.encoders import shifted
from vl_jax.encoders.swin import SwinConfig
from vl_jax.heads.classification import Classification
from vl_jax.interop import parts, rules
from vl_jax.interop.encoders import swin
from vl_jax.interop.folder import read_config
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import Variables, plan_layout
from vl_jax.sharding import MeshConfig, make_mesh

TINY = SwinConfig(
    image_size=22,
    patch_size=2,
    embed_dim=6,
    stage_blocks=(2, 2),
    num_heads=(2, 3),
    window=4,
    mlp_ratio=1.5,
    norm_epsilon=1e-3,
)


def make(config: SwinConfig, pixels: jax.Array) -> Any:
    """Parameters of which none is at its usual constant."""
    shapes = jax.eval_shape(lambda: config.build("float32").init(jax.random.key(0), pixels))
    flat = params_lib.flatten(nn.meta.unbox(shapes)["params"])
    generator = np.random.default_rng(0)
    return params_lib.unflatten(
        {
            path: jnp.asarray(
                generator.standard_normal(leaf.shape) * 0.3 + (path.endswith("scale")), jnp.float32
            )
            for path, leaf in flat.items()
        }
    )


@functools.partial(jax.jit, static_argnums=0)
def see(config: SwinConfig, params: Any, pixels: jax.Array) -> Any:
    with jax.default_matmul_precision("highest"):
        return config.build("float32").apply({"params": params}, pixels)


# A reference of its own, in float64, from published tensors: loops over places, no window is ever cut out.


def norm(x: np.ndarray, w: Any, name: str, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Any, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def attend(x: np.ndarray, w: Any, name: str, heads: int, window: int, shift: int) -> np.ndarray:
    """Cells of a padded grid see those of their window: windows begin at ``shift``, and at the ends."""
    rows, columns, dim = x.shape
    query, key, value = (
        linear(x, w, f"{name}.attention.self.{p}").reshape(rows, columns, heads, -1)
        for p in ("query", "key", "value")
    )
    table = w[f"{name}.attention.self.relative_position_bias_table"]
    side = round(len(table) ** 0.5)
    mixed = np.zeros_like(query)

    def ends(at: int, length: int) -> tuple[int, int]:
        first = (at - shift) // window * window + shift
        return max(first, 0), min(first + window, length)

    for i, j, head in itertools.product(range(rows), range(columns), range(heads)):
        (top, bottom), (left, right) = ends(i, rows), ends(j, columns)
        places = list(itertools.product(range(top, bottom), range(left, right)))
        scores = np.array(
            [
                query[i, j, head] @ key[u, v, head] / query.shape[-1] ** 0.5
                + table[(i - u + side // 2) * side + j - v + side // 2, head]
                for u, v in places
            ]
        )
        weights = np.exp(scores - scores.max())
        seen = np.array([value[u, v, head] for u, v in places])
        mixed[i, j, head] = weights @ seen / weights.sum()
    return linear(mixed.reshape(x.shape), w, f"{name}.attention.output.dense")


def reference(pixels: np.ndarray, w: Any, config: SwinConfig) -> tuple[np.ndarray, list[np.ndarray]]:
    """The last grid of one picture [h w c], and what every stage gives before it is merged."""
    size = config.patch_size
    height, width, _ = pixels.shape
    x = np.pad(pixels, ((0, -height % size), (0, -width % size), (0, 0)))
    x = x.reshape(x.shape[0] // size, size, -1, size, x.shape[2])
    x = np.einsum("upvqc,ocpq->uvo", x, w["embeddings.patch_embeddings.projection.weight"])
    x = x + w["embeddings.patch_embeddings.projection.bias"]
    x = norm(x, w, "embeddings.norm", 1e-5)
    if config.absolute_positions:
        x = x + w["embeddings.position_embeddings"].reshape(x.shape)
    maps = []
    for stage, blocks in enumerate(config.stage_blocks):
        for number in range(blocks):
            name = f"encoder.layers.{stage}.blocks.{number}"
            rows, columns = x.shape[:2]
            window = min(rows, columns, config.window)
            shift = config.window // 2 if number % 2 and min(rows, columns) > config.window else 0
            y = norm(x, w, f"{name}.layernorm_before", config.norm_epsilon)
            y = np.pad(y, ((0, -rows % window), (0, -columns % window), (0, 0)))
            y = attend(y, w, name, config.num_heads[stage], window, shift)
            x = x + y[:rows, :columns]
            y = linear(
                norm(x, w, f"{name}.layernorm_after", config.norm_epsilon), w, f"{name}.intermediate.dense"
            )
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / 2**0.5))
            x = x + linear(y, w, f"{name}.output.dense")
        maps.append(x)
        if stage + 1 < len(config.stage_blocks):
            x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)))
            x = np.concatenate([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], axis=-1)
            name = f"encoder.layers.{stage}.downsample"
            x = linear(norm(x, w, f"{name}.norm", 1e-5), w, f"{name}.reduction")
    return norm(x, w, "layernorm", config.norm_epsilon), maps


OPTIONS: dict[str, dict[str, Any]] = {
    "odd grids that windows do not divide": {},
    "a last block without a pair, one window, grey pictures": {
        "stage_blocks": (1, 3),
        "image_size": 16,
        "num_channels": 1,
        "pixel_mean": 0.5,
        "pixel_std": 0.5,
    },
    "grids smaller than the window, learned positions": {
        "image_size": 10,
        "absolute_positions": True,
        "qkv_bias": False,
    },
    "pictures that are not square, with a rest of pixels, an odd window": {
        "image_size": (15, 28),
        "window": 3,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_agrees_with_the_reference(options: dict[str, Any]):
    config = dataclasses.replace(TINY, **options)
    pixels = jnp.asarray(np.random.default_rng(1).standard_normal((2, *config.input_shape)), jnp.float32)
    params = make(config, pixels)
    flat = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(params).items()}
    plan = rules.plan(swin.HUB.rules(config), flat, swin.HUB.stacks(config))
    weights = {key: np.asarray(value, np.float64) for key, value in rules.export(plan, params)}
    encoded = see(config, params, pixels)
    for image in range(2):
        last, maps = reference(np.asarray(pixels[image], np.float64), weights, config)
        np.testing.assert_allclose(encoded.maps[-1][image], last, rtol=1e-4, atol=1e-4)
        for found, expected in zip(encoded.maps[:-1], maps, strict=False):
            np.testing.assert_allclose(found[image], expected, rtol=1e-4, atol=1e-4)
    assert encoded.tokens.shape == (2, config.num_tokens, config.output_dim)
    assert [grid.shape[1:3] for grid in encoded.maps] == list(config.grids)
    np.testing.assert_allclose(encoded.pooled, encoded.tokens.mean(1), rtol=1e-5, atol=1e-5)


def test_cells_that_a_roll_brings_together_do_not_see_one_another():
    # A line of 8 cells rolled by 2 is 2 3 4 5 | 6 7 0 1: of the second window, two pairs of neighbours.
    seen = shifted.seen_in_shifted(8, 4, side=4, shift=2).reshape(2, 4, 4, 4, 4)
    np.testing.assert_array_equal(seen[0, :, 0, :, 0], np.ones((4, 4)))
    np.testing.assert_array_equal(
        seen[1, :, 0, :, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    )


def test_offsets_count_from_the_key_to_the_query():
    table = jnp.arange(25.0).reshape(5, 5, 1)  # of windows of 3 x 3
    bias = shifted.offset_bias(table, side=3)[0].reshape(3, 3, 3, 3)
    assert bias[0, 0, 0, 0] == 12 and bias[2, 0, 0, 0] == 22 and bias[0, 1, 2, 2] == 1
    inner = shifted.offset_bias(table, side=2)[0].reshape(2, 2, 2, 2)
    np.testing.assert_array_equal(inner, bias[:2, :2, :2, :2])


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((8, 8), (4, 2)), ((4, 4), (4, 0)), ((3, 3), (3, 0)), ((9, 4), (4, 0)), ((5, 5), (4, 2))],
)
def test_a_grid_no_larger_than_the_window_does_not_shift(grid: tuple[int, int], expected: tuple[int, int]):
    assert shifted.window_of(*grid, 4) == expected


def test_swin_t_has_its_published_size():
    shapes = jax.eval_shape(
        lambda: SwinConfig().build("float32").init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    # torchvision counts 28,288,354 with a classifier of 1000 classes behind 768 channels.
    assert count == 28_288_354 - 769 * 1000


def test_both_layouts_of_names_cover_every_parameter():
    config = SwinConfig()
    boxed = jax.eval_shape(
        lambda: config.build("float32").init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    )
    flat = params_lib.flatten(nn.meta.unbox(boxed)["params"])
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    for names, fields in ((swin.HUB, {}), (swin.VISION, {"architecture": "swin_t"})):
        plan = rules.plan(names.rules(config), shapes, names.stacks(config))
        assert not plan.problems and swin.names_of(fields) is names and swin.read_swin(fields) == config
        keys = {key: leaf.source_shape for leaf in plan.leaves for _, key in leaf.sources()}
        assert sum(math.prod(shape) for shape in keys.values()) == 28_288_354 - 769 * 1000
    assert keys["features.5.3.attn.qkv.weight"] == (1152, 384)
    assert keys["features.6.reduction.weight"] == (768, 1536)


@pytest.mark.slow
def test_a_published_folder_begins_a_tower(oracles: Path):
    folder = folder_in(oracles, "hf", "swin")
    encoder = swin.read_swin(read_config(folder))
    model = JointConfig((Tower("image", encoder),), (Classification(("a", "b")),))
    layout = plan_layout(model, model.smallest_batch(1), make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout.params)
    begun = parts.load(Variables(empty, {}, {}), layout, parts.find(model, (("image", str(folder)),)))
    with np.load(folder / "io.npz") as recorded:
        pixels, expected = recorded["in_pixel_values"], recorded["out_pooler_output"]
    found = see(encoder, begun.params["image"], jnp.asarray(np.moveaxis(pixels, 1, -1)))
    np.testing.assert_allclose(found.pooled, expected, rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(model, towers=(Tower("image", dataclasses.replace(encoder, window=3)),))
    with pytest.raises(ValueError, match="'image' has window=3, the swin of .* has 4"):
        parts.find(other, (("image", str(folder)),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2,)}, r"stage_blocks=\(2, 2\), num_heads=\(2,\): must be of one length"),
        ({"num_heads": (2, 5)}, "embed_dim=12 is not a multiple of num_heads=5"),
        ({"window": 0}, "window=0: must be >= 1"),
        (
            {"num_channels": 1},
            r"pixel_mean=\(0.485, .*: expected a number, or one for each of num_channels=1",
        ),
    ],
)
def test_a_config_names_what_is_wrong(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_pictures_of_another_size_do_not_fit_learned_positions():
    config = dataclasses.replace(TINY, absolute_positions=True)
    with pytest.raises(ValueError, match="pixels of 24 x 22 must be of image_size=22"):
        jax.eval_shape(lambda: config.build("float32").init(jax.random.key(0), jnp.zeros((1, 24, 22, 3))))
