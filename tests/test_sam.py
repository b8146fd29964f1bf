"""SAM and the high-resolution branch around it: options against a plain reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax.encoders.high_resolution import HighResolution, HighResolutionConfig
from vl_jax.encoders.sam import SAM, SAMConfig, SAMOutput, join, offset_table, partition, with_offsets
from vl_jax.interop import conv, rules

pytestmark = pytest.mark.slow  # an encoder beside the main path: minutes of compilation

# Two programs for the same numbers add in different orders; activations are of order 1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
TINY = SAMConfig(
    image_size=20,
    patch_size=4,
    embed_dim=12,
    mlp_dim=16,
    output_dim=6,
    num_layers=3,
    num_heads=2,
    window=3,
    global_layers=(1,),
)

assert_close = functools.partial(np.testing.assert_allclose, **TOLERANCE)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def make(config: SAMConfig, pixels: Any) -> Any:
    """Parameters, none of them at a constant; a scale of 1 and a bias of 0 would hide mistakes."""
    boxed = jax.eval_shape(lambda: SAM(config).init(jax.random.key(0), pixels)["params"])
    flat = params_lib.flatten(nn.meta.unbox(boxed))
    arrays = params_lib.unflatten(
        {
            path: np.float32(0.3) * np.asarray(random(*leaf.shape, seed=i))
            + np.float32(path.endswith("scale"))
            for i, (path, leaf) in enumerate(flat.items())
        }
    )
    return jax.tree.map(jnp.asarray, arrays)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("remat", "dtype"))
def see(config: SAMConfig, params: Any, pixels: jax.Array, **options: Any) -> SAMOutput:
    output = SAM(config, **options).apply({"params": params}, pixels, method="stages")
    assert isinstance(output, SAMOutput)
    return output


def exported(config: SAMConfig, params: Any) -> dict[str, np.ndarray]:
    table = rules.plan(conv.sam_rules(), shapes(params), conv.sam_stacks(config))
    return dict(rules.export(table, params))


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}


# A reference of its own, in float64, from published tensors: loops over windows, heads and queries.

ERF = np.vectorize(math.erf)
ACTIVATIONS = {"gelu": lambda x: x * 0.5 * (1 + ERF(x / 2**0.5)), "relu": lambda x: np.maximum(x, 0)}


def ref_norm(x: np.ndarray, w: Any, name: str, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def ref_conv(x: np.ndarray, kernel: np.ndarray, *, stride: int, padding: int) -> np.ndarray:
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (0, 1))[::stride, ::stride]
    return np.einsum("uvcpq,ocpq->uvo", patches, kernel)


def ref_attend(x: np.ndarray, w: Any, name: str, config: SAMConfig) -> np.ndarray:
    rows, columns, dim = x.shape
    qkv = x @ w[f"{name}.qkv.weight"].T + w.get(f"{name}.qkv.bias", 0.0)
    query, key, value = np.moveaxis(qkv.reshape(rows, columns, 3, config.num_heads, -1), 2, 0)
    mixed = np.zeros_like(query)
    for i, j, head in itertools.product(range(rows), range(columns), range(config.num_heads)):
        q = query[i, j, head]
        scores = np.einsum("uvh,h->uv", key[:, :, head], q) / q.size**0.5
        if config.relative_positions:
            for u, v in itertools.product(range(rows), range(columns)):
                down, right = (
                    w[f"{name}.rel_pos_h"][i - u + rows - 1],
                    w[f"{name}.rel_pos_w"][j - v + columns - 1],
                )
                scores[u, v] += q @ down + q @ right
        weights = np.exp(scores - scores.max())
        mixed[i, j, head] = np.einsum("uv,uvh->h", weights / weights.sum(), value[:, :, head])
    return mixed.reshape(x.shape) @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def ref_layer(x: np.ndarray, w: Any, name: str, config: SAMConfig, window: int) -> np.ndarray:
    normed = ref_norm(x, w, f"{name}.layer_norm1", config.norm_epsilon)
    if window:
        padded = np.pad(normed, ((0, -x.shape[0] % window), (0, -x.shape[1] % window), (0, 0)))
        mixed = np.zeros_like(padded)
        for u, v in itertools.product(range(0, padded.shape[0], window), range(0, padded.shape[1], window)):
            part = slice(u, u + window), slice(v, v + window)
            mixed[part] = ref_attend(padded[part], w, f"{name}.attn", config)
        x = x + mixed[: x.shape[0], : x.shape[1]]
    else:
        x = x + ref_attend(normed, w, f"{name}.attn", config)
    hidden = ref_norm(x, w, f"{name}.layer_norm2", config.norm_epsilon)
    hidden = ACTIVATIONS[config.activation](
        hidden @ w[f"{name}.mlp.lin1.weight"].T + w[f"{name}.mlp.lin1.bias"]
    )
    return x + hidden @ w[f"{name}.mlp.lin2.weight"].T + w[f"{name}.mlp.lin2.bias"]


def reference(pixels: jax.Array, weights: Any, config: SAMConfig) -> tuple[np.ndarray, list[np.ndarray]]:
    """Features of one image [h w c], and the states after every layer."""
    w = {key.removeprefix("vision_encoder."): np.asarray(v, np.float64) for key, v in weights.items()}
    x = ref_conv(
        np.asarray(pixels, np.float64),
        w["patch_embed.projection.weight"],
        stride=config.patch_size,
        padding=0,
    )
    x = x + w["patch_embed.projection.bias"] + w.get("pos_embed", np.zeros(1))[0]
    states = []
    for i in range(config.num_layers):
        window = 0 if i in config.global_layers else config.window
        x = ref_layer(x, w, f"layers.{i}", config, window)
        states.append(x)
    x = ref_norm(ref_conv(x, w["neck.conv1.weight"], stride=1, padding=0), w, "neck.layer_norm1", 1e-6)
    x = ref_norm(ref_conv(x, w["neck.conv2.weight"], stride=1, padding=1), w, "neck.layer_norm2", 1e-6)
    return x, states


# Options that do not meet in the code share a program, for most of a test is its compilation.
OPTIONS: dict[str, dict[str, Any]] = {
    "windows that do not divide the grid": {},
    "windows that divide the grid": {"image_size": 24},
    "a window larger than the grid, no bias of queries, keys and values": {"window": 7, "qkv_bias": False},
    "a window as large as the grid, no relative positions": {"window": 5, "relative_positions": False},
    "every layer global, no absolute positions": {"window": 0, "absolute_positions": False},
    "no layer global, another activation and epsilon": {
        "global_layers": (),
        "activation": "relu",
        "norm_epsilon": 1e-2,
    },
    "a first layer that is global, a rest of pixels, and odd patches": {
        "global_layers": (0,),
        "image_size": 23,
        "patch_size": 5,
    },
    "global layers side by side": {"global_layers": (1, 2)},
    "global layers in no order": {"global_layers": (2, 0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_agrees_with_the_reference(options: dict[str, Any]):
    config = dataclasses.replace(TINY, **options)
    pixels = random(2, config.image_size, config.image_size, 3)
    params = make(config, pixels)
    output = see(config, params, pixels)
    for image in range(2):
        features, states = reference(pixels[image], exported(config, params), config)
        assert_close(output.features[image], features)
        if config.global_layers:
            assert_close(output.first_global[image], states[config.global_layers[0]])
    assert config.global_layers or output.first_global is None


@pytest.mark.slow
def test_rematerialised_layers_have_the_same_gradient():
    config = dataclasses.replace(TINY, num_layers=1, global_layers=())
    pixels = random(1, 20, 20, 3)
    params = make(config, pixels)

    def loss(params: Any, remat: bool) -> jax.Array:
        return jnp.sum(see(config, params, pixels, remat=remat).features[..., 0] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(assert_close, gradient(params, False), gradient(params, True))


def test_published_tensors_come_out_as_they_went_in():
    pixels = random(1, 20, 20, 3)
    params = make(TINY, pixels)
    weights = exported(TINY, params)
    table = rules.plan(conv.sam_rules(), shapes(params), conv.sam_stacks(TINY))
    again = rules.read(table, weights, jax.eval_shape(lambda: params))
    assert weights["vision_encoder.layers.2.attn.rel_pos_h"].shape == (5, 6)
    assert weights["vision_encoder.layers.1.attn.rel_pos_h"].shape == (9, 6)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_window_layer_sees_its_window_only():
    config = dataclasses.replace(TINY, num_layers=1, global_layers=(), absolute_positions=False)
    pixels = random(1, 20, 20, 3)
    params = make(config, pixels)

    def before_neck(pixels: Any) -> jax.Array:
        _, seen = SAM(config).apply({"params": params}, pixels, method="stages", capture_intermediates=True)
        (layers, _), *_ = params_lib.flatten(seen["intermediates"])["window_layers/__call__"]
        return jnp.sum(layers[0, 0, 0, 4])

    influence = np.abs(jax.jit(jax.grad(before_neck))(pixels)).reshape(5, 4, 5, 4, 3).sum((1, 3, 4))
    assert np.array_equal(influence > 0, np.outer(np.arange(5) < 3, np.arange(5) >= 3))


def test_windows_are_cut_in_reading_order_and_joined_again():
    grid = jnp.arange(1.0, 16).reshape(1, 3, 5, 1)
    windows = partition(grid, window=2)
    assert windows[:, :, :, 0].tolist() == [
        [[1, 2], [6, 7]],
        [[3, 4], [8, 9]],
        [[5, 0], [10, 0]],
        [[11, 12], [0, 0]],
        [[13, 14], [0, 0]],
        [[15, 0], [0, 0]],
    ]
    assert jnp.array_equal(join(windows, rows=3, columns=5), grid)


def test_a_table_of_three_offsets_stretches_to_five():
    # Offset i of 5 lies at (i + 1/2) * 3/5 - 1/2: -0.2 (the end), 0.4, 1, 1.6, 2.2 (the end).
    stretched = offset_table(jnp.array([[0.0], [10.0], [30.0]]), size=3)[:, :, 0]
    expected = [0.0, 4.0, 10.0, 22.0, 30.0]
    for query, key in itertools.product(range(3), range(3)):
        assert_close(stretched[query, key], expected[query - key + 2])


def test_offsets_add_to_the_scores_what_the_unscaled_query_says():
    query, key = random(1, 2, 3, 1, 4), random(1, 2, 3, 1, 4, seed=1)
    rows, columns = random(3, 4, seed=2), random(5, 4, seed=3)
    wide = with_offsets(query, key, rows, columns)
    scores = jnp.einsum("MTNK,MSNK->TS", *wide).reshape(2, 3, 2, 3)
    for i, j, u, v in itertools.product(range(2), range(3), range(2), range(3)):
        q = query[0, i, j, 0]
        assert_close(scores[i, j, u, v], q @ key[0, u, v, 0] / 2 + q @ (rows[i - u + 1] + columns[j - v + 2]))


def test_without_absolute_positions_any_size_of_image_will_do():
    config = dataclasses.replace(TINY, absolute_positions=False)
    params = make(config, random(1, 20, 20, 3))
    assert see(config, params, random(1, 28, 16, 3)).features.shape == (1, 7, 4, 6)
    with pytest.raises(ValueError, match="pixels of 28 x 16 must be of image_size=20"):
        SAM(TINY).init(jax.random.key(0), random(1, 28, 16, 3))


@pytest.mark.slow
def test_activations_may_be_bfloat16():
    pixels = random(2, 20, 20, 3)
    params = make(TINY, pixels)
    wide = see(TINY, params, pixels).features
    narrow = see(TINY, params, pixels, dtype=jnp.dtype(jnp.bfloat16)).features
    assert narrow.dtype == jnp.bfloat16
    # Eight bits of significand, through three layers and two norms; features are of order 1.
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim=12 is not a multiple of num_heads=5"),
        ({"window": -1}, "window=-1 must be >= 0"),
        ({"global_layers": (3,)}, "must be from 0 to 2"),
        ({"patch_size": 21}, "must be from 1 to image_size=20"),
    ],
)
def test_a_config_names_what_is_wrong(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_absent_keys_of_a_published_config_take_the_official_defaults():
    assert conv.read_sam({"model_type": "sam_vision_model"}) == SAMConfig()
    assert conv.read_sam({"hidden_size": 96, "mlp_dim": None, "mlp_ratio": 2.5}).mlp_dim == 240
    assert conv.read_sam({"num_hidden_layers": 6}).global_layers == (2, 5)
    hybrid = conv.read_high_resolution({"vision_config": {"image_size": 384}})
    assert hybrid == HighResolutionConfig(SAMConfig(), grid=24)
    with pytest.raises(ValueError, match="hidden_act='mish': known are"):
        conv.read_sam({"hidden_act": "mish"})
    with pytest.raises(ValueError, match="the first must be from 0 to 1"):
        conv.read_high_resolution({"high_res_vision_config": {"num_hidden_layers": 2}})


@pytest.mark.slow
def test_the_share_of_early_features_begins_at_zero_and_learns():
    config = HighResolutionConfig(TINY, grid=2)
    pixels = random(1, 20, 20, 3)

    @jax.jit
    def run(key: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            tokens = jnp.asarray(HighResolution(config).apply({"params": params}, pixels).tokens)  # type: ignore[union-attr]
            return jnp.sum(tokens[..., 0]), tokens

        params = nn.meta.unbox(HighResolution(config).init(key, pixels))["params"]
        return jax.grad(loss, has_aux=True)(params)

    gradient, tokens = run(jax.random.key(0))
    assert tokens.shape == (1, 4, config.output_dim)
    assert not np.any(gradient["neck"]["conv1"]["kernel"]) and np.any(gradient["share"])
    with pytest.raises(ValueError, match=r"global_layers=\(\) must name a layer"):
        HighResolutionConfig(dataclasses.replace(TINY, global_layers=()))
