"""Encoders of clips and volumes: short clips, hidden tubes, published sizes and names."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax.encoders.video.masked import MaskedClipsConfig, targets
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.encoders.video.videomae import VideoMAEConfig, sinusoids, tubes
from vl_jax.interop import rules
from vl_jax.interop.encoders import video

MAE = VideoMAEConfig(
    image_size=(8, 12), num_frames=6, patch_size=4, embed_dim=8, mlp_dim=16, num_layers=2, num_heads=2
)
R3D = VideoResNetConfig(image_size=12, num_frames=6, stem_dim=3, stage_dims=(4, 5, 6), stage_blocks=(1, 2, 1))
MASKED = MaskedClipsConfig(MAE, embed_dim=6, mlp_dim=8, num_layers=1, num_heads=3)


def clips_of(config: Any, count: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, *config.input_shape)), jnp.float32)


def variables_of(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Variables of which none is at its usual constant."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **options))
    flat = params_lib.flatten(nn.meta.unbox(shapes))
    random = np.random.default_rng(1)
    made = {
        path: np.float32(0.3) * random.standard_normal(leaf.shape).astype(np.float32)
        + np.float32(path.endswith(("scale", "variance")))
        for path, leaf in flat.items()
    }
    return jax.tree.map(jnp.asarray, params_lib.unflatten(made))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "length"), [(MAE, 4), (R3D, 5), (R3D, 4)])
def test_a_short_clip_is_seen_as_it_is_by_itself(config: Any, length: int):
    module, clips = config.build("float32"), clips_of(config)
    variables = variables_of(module, clips)
    run = jax.jit(module.apply)
    alone: Any = run(variables, clips[:, :length])
    valid = jnp.arange(config.num_frames) < jnp.array([[length], [length]])
    noise = jnp.where(valid[:, :, None, None, None], clips, 7.0)  # what stands behind the end is not read
    if config is MAE:
        noise = jnp.where(valid[:, :, None, None, None], clips, 0.0)
    encoded: Any = run(variables, noise, valid)
    count = alone.tokens.shape[1]
    near = {"rtol": 1e-5, "atol": 1e-6 * np.abs(alone.tokens).max()}
    np.testing.assert_allclose(encoded.tokens[:, :count], alone.tokens, **near)
    np.testing.assert_allclose(encoded.pooled, alone.pooled, **near)
    np.testing.assert_array_equal(encoded.mask, np.arange(config.num_tokens) < np.full((2, 1), count))


@pytest.mark.slow
def test_an_absent_clip_is_zeros_in_one_vector_and_counts_in_no_statistics():
    config = dataclasses.replace(R3D, statistics="moving")
    module, clips = config.build("float32"), clips_of(config, 3)
    variables = variables_of(module, clips)

    @jax.jit
    def train(clips: Any, valid: Any) -> Any:
        return module.apply(variables, clips, valid, mutable=["batch_stats"])

    encoded, changed = train(clips, jnp.array([True, False, True]))
    _, expected = train(clips[jnp.array([0, 2, 1])], jnp.array([True, True, False]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), changed, expected)
    assert not np.any(encoded.pooled[1]) and np.all(np.any(encoded.pooled[jnp.array([0, 2])], axis=1))
    before, after = (params_lib.flatten(tree["batch_stats"]) for tree in (variables, changed))
    assert all(np.any(before[path] != after[path]) for path in before)


# 3D residual networks.


def conv(x: np.ndarray, kernel: np.ndarray, stride: tuple[int, int, int]) -> np.ndarray:
    """A centred convolution of one clip [f h w c], kernel [o i t p q]: every place by itself."""
    sizes = kernel.shape[2:]
    x = np.pad(x, [(n // 2, n // 2) for n in sizes] + [(0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, sizes, (0, 1, 2))
    windows = windows[:: stride[0], :: stride[1], :: stride[2]]
    return np.einsum("fuvctpq,octpq->fuvo", windows, kernel)


def test_a_3d_network_agrees_with_a_plain_reference():
    config = VideoResNetConfig(
        image_size=12,
        num_frames=6,
        num_channels=1,
        stem_dim=3,
        stage_dims=(4, 5),
        stage_blocks=(2, 2),
        pixel_mean=0.5,
        pixel_std=0.5,
    )
    module, clips = config.build("float32"), clips_of(config, 1)
    variables = variables_of(module, clips)
    flat = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(variables).items()}
    plan = rules.plan(video.r3d_rules(config), flat)
    w = {key: np.asarray(value, np.float64) for key, value in rules.export(plan, variables)}

    def normed(x: np.ndarray, conv_name: str, norm: str, stride: tuple[int, int, int]) -> np.ndarray:
        x = conv(x, w[f"{conv_name}.weight"], stride)
        x = (x - w[f"{norm}.running_mean"]) / np.sqrt(w[f"{norm}.running_var"] + 1e-5)
        return x * w[f"{norm}.weight"] + w[f"{norm}.bias"]

    x = np.maximum(normed(np.asarray(clips[0], np.float64), "stem.0", "stem.1", (1, 2, 2)), 0)
    for stage in (1, 2):
        for block in (0, 1):
            stride = (2, 2, 2) if stage == 2 and block == 0 else (1, 1, 1)
            name = f"layer{stage}.{block}"
            y = np.maximum(normed(x, f"{name}.conv1.0", f"{name}.conv1.1", stride), 0)
            y = normed(y, f"{name}.conv2.0", f"{name}.conv2.1", (1, 1, 1))
            if f"{name}.downsample.0.weight" in w:
                x = normed(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = np.maximum(x + y, 0)
    with jax.default_matmul_precision("highest"):
        encoded: Any = jax.jit(module.apply)(variables, clips)
    near = {"rtol": 1e-4, "atol": 1e-5 * np.abs(x).max()}
    np.testing.assert_allclose(encoded.tokens[0], x.reshape(-1, 5), **near)
    np.testing.assert_allclose(encoded.pooled[0], x.mean((0, 1, 2)), **near)
    assert x.shape[:3] == config.shape


def test_r3d_18_has_its_published_size_and_names():
    config = video.read_r3d({"architecture": "r3d_18"})
    clips = jax.ShapeDtypeStruct((1, *config.input_shape), jnp.float32)
    boxed = jax.eval_shape(lambda c: config.build("float32").init(jax.random.key(0), c), clips)
    flat = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(nn.meta.unbox(boxed)).items()}
    count = sum(math.prod(shape) for path, shape in flat.items() if path.startswith("params/"))
    assert count == 33_371_472 - 513 * 400  # torchvision's, without the classifier of 400 classes
    plan = rules.plan(video.r3d_rules(config), flat)
    assert not plan.problems
    keys = {key: leaf.source_shape for leaf in plan.leaves for _, key in leaf.sources()}
    assert keys["stem.0.weight"] == (64, 3, 3, 7, 7)
    assert keys["layer3.0.downsample.0.weight"] == (256, 128, 1, 1, 1)
    assert keys["layer4.1.conv2.1.running_var"] == (512,)
    assert config.shape == (2, 7, 7) and config.num_tokens == 98
    with pytest.raises(ValueError, match="architecture='r2plus1d_18': known are r3d_18"):
        video.read_r3d({"architecture": "r2plus1d_18"})


# VideoMAE.


def test_positions_are_sines_of_falling_frequency():
    table = sinusoids(3, 4)
    expected = [
        [0, 1, 0, 1],
        *([math.sin(n), math.cos(n), math.sin(n / 100), math.cos(n / 100)] for n in (1, 2)),
    ]
    np.testing.assert_allclose(table, expected, atol=1e-7)


def test_tubes_stand_frame_pair_by_frame_pair_and_row_by_row():
    clip = jnp.arange(4 * 4 * 6 * 1.0).reshape(1, 4, 4, 6, 1)
    found = tubes(clip, frames=2, side=2)[0, :, :, 0]
    assert found.shape == (12, 8)
    np.testing.assert_array_equal(found[0], [0, 1, 6, 7, 24, 25, 30, 31])
    np.testing.assert_array_equal(found[:, 0], [0, 2, 4, 12, 14, 16, 48, 50, 52, 60, 62, 64])


def test_targets_are_pixels_from_0_to_1_or_normed_by_tube_and_channel():
    levels = np.random.default_rng(0).integers(0, 256, (1, *MAE.input_shape))
    floats = (levels / 255 - np.array(MAE.pixel_mean)) / np.array(MAE.pixel_std)
    given = jnp.asarray(floats, jnp.float32)
    plain = targets(given, dataclasses.replace(MASKED, normed=False))
    expected = tubes(jnp.asarray(levels / 255, jnp.float32), frames=2, side=4)
    np.testing.assert_allclose(plain.reshape(expected.shape), expected, atol=1e-6)
    normed = targets(given, MASKED).reshape(expected.shape)
    np.testing.assert_allclose(normed.mean(2), 0, atol=1e-5)
    np.testing.assert_allclose(normed.std(2, ddof=1), 1, atol=1e-4)


@pytest.mark.slow
def test_what_is_said_of_hidden_tubes_does_not_look_at_them():
    module, clips = MASKED.build("float32"), clips_of(MAE)
    hidden = np.zeros((2, MAE.num_tokens), bool)
    hidden[0, [0, 5, 7]] = hidden[1, [2, 3, 17]] = True
    variables = variables_of(module, clips, jnp.asarray(hidden), count=3)

    @jax.jit
    def said(clips: Any) -> Any:
        return module.apply(variables, clips, jnp.asarray(hidden), count=3)

    found = said(clips)
    assert found.pixels.shape == (2, 3, 2 * 4 * 4 * 3)
    patches = np.repeat(np.repeat(hidden.reshape(2, 3, 2, 3), 4, 2), 4, 3)  # [B pair row column] of pixels
    patches = np.repeat(patches, 2, 1)[..., None]
    other = said(jnp.where(patches, 3 * jnp.flip(clips, 1), clips))
    np.testing.assert_array_equal(other.pixels, found.pixels)
    assert other.loss != found.loss
    seen = said(jnp.where(patches, clips, clips + 1))
    assert np.all(np.any(seen.pixels != found.pixels, axis=(1, 2)))


def test_clips_whose_pixels_are_all_targets_are_whole_tubes():
    with pytest.raises(ValueError, match="encoder.num_frames=5, .* must be multiples of tubelet=2"):
        dataclasses.replace(MASKED, encoder=dataclasses.replace(MAE, num_frames=5))
    with pytest.raises(ValueError, match="num_frames=1, .* must hold a tube of tubelet=2"):
        dataclasses.replace(MAE, num_frames=1)
