"""The vision transformer: what its options mean, where parameters live, and published weights in and out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.encoders.transformer import Attention
from vl_jax.encoders.vit import PatchStem, ViT, ViTConfig, normalize
from vl_jax.interop import rules, vision

# The same sums in another order, over values of order 1.
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

TINY = ViTConfig(image_size=(14, 9), patch_size=4, embed_dim=16, mlp_dim=24, num_layers=3, num_heads=2)
CLASS = dataclasses.replace(TINY, class_token=True, pooling="class")
CLIP = dataclasses.replace(CLASS, pre_norm=True, final_norm="pooled", stem_bias=False, projection_dim=5)
SIGLIP = dataclasses.replace(TINY, pooling="attention")
BY_NAME = {"tiny": TINY, "class": CLASS, "clip": CLIP, "siglip": SIGLIP}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pixels(config: ViTConfig, *, seed: int = 0) -> np.ndarray:
    return random(2, *config.input_shape, seed=seed)


def shapes(config: ViTConfig, method: Any = "encode") -> dict[str, Any]:
    model, image = ViT(config), pixels(config)
    boxed = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, method=method)["params"], image)
    return params_lib.flatten(nn.meta.unbox(boxed))


@functools.cache
def make(config: ViTConfig) -> Any:
    """Random parameters, none of them at its initial constant."""
    leaves = {
        path: np.float32(0.3) * random(*leaf.shape, seed=i) + np.float32(path.endswith("scale"))
        for i, (path, leaf) in enumerate(shapes(config).items())
    }
    return params_lib.unflatten(leaves)


@functools.cache
def _program(config: ViTConfig, method: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """One for every test that asks for the same."""
    return jax.jit(functools.partial(ViT(config, **dict(options)).apply, method=method))


def encode(config: ViTConfig, image: Any = None, *, params: Any = None, **options: Any) -> Any:
    image = pixels(config) if image is None else image
    run = _program(config, "encode", tuple(options.items()))
    return run({"params": make(config) if params is None else params}, image)


def features(config: ViTConfig, image: Any = None, *, params: Any = None) -> jax.Array:
    image = pixels(config) if image is None else image
    run = _program(config, "__call__", ())
    return run({"params": make(config) if params is None else params}, image).tokens


# What it computes.


def test_a_patch_stem_is_a_strided_convolution():
    stem, image = PatchStem(TINY), jnp.asarray(pixels(TINY))
    kernel, bias = random(4, 4, 3, 16), random(16, seed=1)
    expected = jax.lax.conv_general_dilated(
        image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = stem.apply({"params": {"kernel": kernel, "bias": bias}}, image)
    assert_close(found, (expected + bias).reshape(2, 3 * 2, 16))


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.slow
def test_a_rest_smaller_than_a_patch_is_never_seen(stem: Any):
    config = dataclasses.replace(TINY, stem=stem)
    assert config.grid_shape == (3, 2)
    params = jax.tree.map(jnp.asarray, make(config))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(ViT(config).apply({"params": params}, x).tokens ** 2)))  # type: ignore[union-attr]
    seen = np.abs(gradient(pixels(config))).sum(axis=(0, 3)) > 0
    assert seen[:12, :8].all() and not seen[12:].any() and not seen[:, 8:].any()


@pytest.mark.parametrize("mean, std", [(0.5, 0.25), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])
@pytest.mark.slow
def test_grey_levels_and_normalised_floats_give_the_same_features(mean: Any, std: Any):
    config = dataclasses.replace(TINY, pixel_mean=mean, pixel_std=std)
    levels = np.random.default_rng(0).integers(0, 256, (2, *config.input_shape)).astype(np.uint8)
    floats = ((levels / 255 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)
    assert_close(normalize(jnp.asarray(levels), mean=mean, std=std), floats)
    assert_close(features(config, jnp.asarray(levels)), features(config, jnp.asarray(floats)))


def test_attention_is_that_of_every_head_by_itself():
    x, source = random(2, 3, 8), random(2, 5, 8, seed=1)
    params = {
        "qkv": random(8, 3, 2, 4, seed=2),
        "qkv_bias": random(3, 2, 4, seed=3),
        "project": random(2, 4, 8, seed=4),
        "project_bias": random(8, seed=5),
    }
    attend = jax.jit(Attention(num_heads=2).apply)
    found = attend({"params": params}, x, source)
    host = {name: np.asarray(value, np.float64) for name, value in params.items()}
    total = np.zeros((2, 3, 8)) + host["project_bias"]
    for head in range(2):
        inputs = (x, source, source)
        query, key, value = (
            np.asarray(y, np.float64) @ host["qkv"][:, i, head] + host["qkv_bias"][i, head]
            for i, y in enumerate(inputs)
        )
        scores = np.exp(query @ key.swapaxes(1, 2) / 2)
        total += scores / scores.sum(axis=-1, keepdims=True) @ value @ host["project"][head]
    assert_close(found, total)
    assert_close(attend({"params": params}, x), attend({"params": params}, x, x))


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.slow
def test_patches_may_come_in_any_order_if_their_positions_go_with_them(name: str):
    config = dataclasses.replace(BY_NAME[name], image_size=(12, 8))
    order = np.array([3, 0, 5, 1, 4, 2])
    image = pixels(config)
    cells = image.reshape(2, 3, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 4, 4, 3)[:, order]
    moved = cells.reshape(2, 3, 2, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(image.shape)
    params = params_lib.flatten(make(config))
    first = int(config.class_token)
    table = jnp.concatenate([params["positions"][:first], params["positions"][first:][order]])
    before = encode(config, image)
    after = encode(config, moved, params=params_lib.unflatten({**params, "positions": table}))
    assert_close(after.pooled, before.pooled)
    assert_close(after.tokens[:, first:], before.tokens[:, first:][:, order])


def test_a_pooled_final_norm_leaves_tokens_alone():
    config = dataclasses.replace(CLIP, projection_dim=0)
    encoded, params = encode(config), make(config)
    raw = np.asarray(encoded.tokens[:, 0], np.float64)
    centred = raw - raw.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    assert_close(encoded.pooled, normed * params["norm"]["scale"] + params["norm"]["bias"])
    everywhere = encode(dataclasses.replace(config, final_norm="tokens"), params=params)
    assert_close(everywhere.tokens[:, 0], encoded.pooled)
    assert_close(everywhere.pooled, encoded.pooled)


def test_a_projected_vector_goes_through_its_activation():
    linear = dataclasses.replace(CLASS, projection_dim=5, projection_bias=True)
    pooled = encode(linear).pooled
    assert pooled.shape == (2, 5) and linear.pooled_dim == 5
    tanh = dataclasses.replace(linear, projection_activation="tanh")
    assert_close(encode(tanh, params=make(linear)).pooled, np.tanh(pooled))


@pytest.mark.slow
def test_features_are_the_chosen_hidden_states_side_by_side():
    config, params = dataclasses.replace(CLIP, class_feature=True), make(CLIP)

    def after(count: int) -> jax.Array:
        """What an encoder of so many layers gives; of none, one whose only block adds nothing."""
        blocks = jax.tree.map(lambda a: a[: max(count, 1)] * float(count > 0), params["blocks"])
        return features(
            dataclasses.replace(config, num_layers=max(count, 1)), params={**params, "blocks": blocks}
        )

    states = [after(count) for count in range(4)]
    for layers in [(0,), (1, 2), (-2,), (-1, 1), (3, -4)]:
        chosen = dataclasses.replace(config, feature_layers=layers)
        expected = np.concatenate([states[i] for i in layers], axis=-1)
        assert_close(features(chosen, params=params), expected)
    without = dataclasses.replace(chosen, class_feature=False)
    assert_close(features(without, params=params), expected[:, 1:])


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.slow
def test_features_without_chosen_layers_are_the_final_tokens(name: str):
    config = BY_NAME[name]
    assert_close(features(config), encode(config).tokens[:, int(config.class_token) :])


def test_images_do_not_see_one_another():
    image = pixels(SIGLIP)
    alone = encode(SIGLIP, image[:1])
    together = encode(SIGLIP, image)
    assert_close(alone.tokens, together.tokens[:1])
    assert_close(alone.pooled, together.pooled[:1])


@pytest.mark.slow
def test_remat_changes_neither_features_nor_gradients():
    config = dataclasses.replace(CLIP, feature_layers=(1, -1))

    def loss(params: Any, *, remat: bool) -> jax.Array:
        image = jnp.asarray(pixels(config))
        return jnp.sum(ViT(config, remat=remat).apply({"params": params}, image).tokens ** 2)  # type: ignore[union-attr]

    plain, again = (
        jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat)))(make(config))
        for remat in (False, True)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), plain, again)


def test_activations_take_the_dtype_asked_for():
    low = encode(SIGLIP, dtype=jnp.dtype(jnp.bfloat16))
    assert low.tokens.dtype == low.pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.tokens.astype(np.float32), encode(SIGLIP).tokens, atol=0.2)


# What parameters it has, and where.


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.slow
def test_parameters_follow_from_the_config_not_from_what_is_called(name: str):
    config = dataclasses.replace(BY_NAME[name], feature_layers=(1,))
    assert shapes(config, "__call__").keys() == shapes(config, "encode").keys()


def test_options_have_the_parameters_they_need_and_no_others():
    def paths(**options: Any) -> set[str]:
        return set(shapes(dataclasses.replace(CLASS, **options)))

    base = paths()
    assert base - paths(qkv_bias=False) == {"blocks/attention/qkv_bias"}
    assert base - paths(stem_bias=False) == {"stem/bias"}
    assert paths(pre_norm=True) - base == {"pre_norm/scale", "pre_norm/bias"}
    assert paths(projection_dim=3) - base == {"projection/kernel"}
    assert base - set(shapes(TINY)) == {"class_token"}
    assert {path.split("/")[0] for path in set(shapes(SIGLIP)) - set(shapes(TINY))} == {"pooler"}


def test_heads_are_an_axis_of_their_own_and_are_divided_over_devices():
    boxed = jax.eval_shape(lambda x: ViT(SIGLIP).init(jax.random.key(0), x, method="encode"), pixels(SIGLIP))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.place(boxed["params"], mesh, sharding.AxisRules())
    assert placed["blocks/attention/qkv"].spec == P(None, "fsdp", None, "tensor", None)
    assert placed["blocks/attention/qkv_bias"].spec == P(None, None, "tensor", None)
    assert placed["blocks/attention/project"].spec == P(None, "tensor", None, "fsdp")
    assert not any(placement.whole for placement in placed.values())
    params = jax.device_put(make(SIGLIP), sharding.shardings(placed, mesh))
    image = jax.device_put(jnp.tile(pixels(SIGLIP), (2, 1, 1, 1)), sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        spread = encode(SIGLIP, image, params=params)
    assert_close(spread.tokens[:2], encode(SIGLIP).tokens)
    assert_close(spread.pooled[:2], encode(SIGLIP).pooled)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": (14, 3)}, r"image_size=\(14, 3\) < patch_size=4"),
        ({"num_heads": 3}, "embed_dim=16 is not a multiple of num_heads=3"),
        ({"stem": "conv", "patch_size": (4, 2)}, r"patch_size=\(4, 2\): the conv stem allows 4, 8, 16"),
        ({"pooling": "class"}, "pooling='class' needs class_token=True"),
        ({"class_feature": True}, "class_feature=True needs class_token=True"),
        ({"final_norm": "pooled"}, "final_norm='pooled' needs pooling='class', not 'none'"),
        ({"projection_dim": 4}, "projection_dim=4 needs a pooling other than 'none'"),
        ({"feature_layers": (1, -5)}, "feature_layers: -5 is not one of the 4 hidden states"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_the_side_of_a_grid_is_asked_of_squares_only():
    assert dataclasses.replace(TINY, image_size=11, patch_size=(4, 5)).grid == 2
    with pytest.raises(ValueError, match="gives 3 x 2 patches, not a square"):
        _ = TINY.grid


# Published weights.

_SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
_IMAGE = {"image_size": 9, "patch_size": 4, "num_channels": 1}
PUBLISHED: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {**_SIZES, **_IMAGE},
    "clip_vision_model": {**_SIZES, **_IMAGE},
    "vit": {**_SIZES, **_IMAGE, "image_size": [8, 13], "qkv_bias": False, "pooler_output_size": 7},
    "vision": {"width": 12, "layers": 2, "heads": 3, "mlp_ratio": 1.7, "image_size": 9, "patch_size": 4},
}


def made_up_weights(plan: rules.Plan) -> dict[str, np.ndarray]:
    keys = [(key, leaf.source_shape) for leaf in plan.leaves for _, key in leaf.sources()]
    return {key: np.asarray(random(*shape, seed=i)) for i, (key, shape) in enumerate(keys)}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.slow
def test_published_weights_come_back_as_they_were(kind: str):
    config = vision.read_vision({"model_type": kind, **PUBLISHED[kind]})
    table = vision.vision_rules(kind, source="a.tower.", target="encoder/")
    targets = {f"encoder/{path}": leaf for path, leaf in shapes(config).items()}
    plan = rules.plan(table, {path: leaf.shape for path, leaf in targets.items()})
    weights = made_up_weights(plan)
    assert vision.find_prefix(weights, kind) == "a.tower."
    extra = {"a.tower.embeddings.position_ids": np.arange(3)}
    tree = rules.read(plan, weights | extra, params_lib.unflatten(targets), ignored=vision.IGNORED)
    back = dict(rules.export(plan, tree))
    assert back.keys() == weights.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[key])


PATCHES = "embeddings.patch_embedding.weight"


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.tower.vision_model."])
def test_an_encoder_is_found_by_its_names(prefix: str):
    assert vision.find_prefix([f"{prefix}{PATCHES}", "other.weight"], "clip_vision_model") == prefix


@pytest.mark.parametrize(
    "keys, count", [([], 0), ([f"other_{PATCHES}"], 0), ([f"a.{PATCHES}", f"b.{PATCHES}"], 2)]
)
def test_no_encoder_or_several_are_an_error(keys: list[str], count: int):
    with pytest.raises(ValueError, match=f"{count} tensors are called '{PATCHES}'; expected one"):
        vision.find_prefix(keys, "clip_vision_model")


def test_what_a_config_leaves_out_is_the_default_of_its_class():
    siglip = vision.read_vision({"model_type": "siglip_vision_model"})
    assert (siglip.grid, siglip.activation, siglip.norm_epsilon) == (14, "gelu_tanh", 1e-6)
    clip = vision.read_vision({"model_type": "clip_vision_model"})
    assert (clip.grid, clip.activation, clip.norm_epsilon) == (7, "quick_gelu", 1e-5)
    vit = vision.read_vision({"model_type": "vit"})
    assert (vit.grid, vit.activation, vit.norm_epsilon, vit.projection_dim) == (14, "gelu", 1e-12, 768)
    vl2 = vision.read_vision(
        {"model_type": "vision", "layers": 27, "mlp_ratio": 3.7362, "patch_size": 14, "width": 1152}
    )
    assert vl2 == ViTConfig()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "bert"}, "model_type='bert': known are siglip_vision_model, clip_vision_model, vit"),
        ({"model_type": "vit", "hidden_act": "mish"}, "hidden_act='mish': known are gelu,"),
        ({"model_type": "vit", "hidden_act": "tanh"}, "hidden_act='tanh': known are gelu,"),
        ({"model_type": "vision", "class_token": True}, "class_token=True: expected False"),
        ({"model_type": "vision", "ignore_head": False}, "ignore_head=False: expected True"),
    ],
)
def test_configs_that_are_not_supported_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        vision.read_vision(config)
