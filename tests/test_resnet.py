"""Residual networks: options against a plain reference, and what batch normalisation does in training."""

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
from vl_jax.encoders.resnet import EPSILON, MOMENTUM, BatchNorm, ResNet, ResNetConfig, ResNetOutput
from vl_jax.interop import conv, rules

pytestmark = pytest.mark.slow  # an encoder beside the main path: minutes of compilation

# Two programs for the same numbers add in different orders; activations are of order 1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
TINY = ResNetConfig(stem_dim=4, stage_dims=(8, 12), stage_blocks=(3, 1))

assert_close = functools.partial(np.testing.assert_allclose, **TOLERANCE)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


PIXELS = random(2, 33, 22, 3)


def make(config: ResNetConfig) -> Any:
    """Parameters and statistics, none of them at a constant; variances are positive."""
    boxed = jax.eval_shape(lambda: ResNet(config).init(jax.random.key(0), PIXELS))
    flat = params_lib.flatten(nn.meta.unbox(boxed))
    leaves = {path: np.asarray(random(*leaf.shape, seed=i)) for i, (path, leaf) in enumerate(flat.items())}
    arrays = params_lib.unflatten(
        {
            path: np.float32(0.5) + np.float32(0.1) * np.abs(leaf)
            if path.endswith(("scale", "variance"))
            else np.float32(0.3) * leaf
            for path, leaf in leaves.items()
        }
    )
    return jax.tree.map(jnp.asarray, arrays)


@functools.partial(jax.jit, static_argnums=0)
def see(config: ResNetConfig, variables: Any, pixels: Any = PIXELS) -> ResNetOutput:
    output = ResNet(config).apply(variables, pixels, method="stages")
    assert isinstance(output, ResNetOutput)
    return output


def plan(config: ResNetConfig, tree: Any) -> rules.Plan:
    shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
    return rules.plan(conv.resnet_rules(config), shapes)


# A reference of its own, in float64, from published tensors, one image [c h w] at a time.

ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / 2**0.5)),
    "selu": lambda x: (
        1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))
    ),
}


def windows(x: np.ndarray, size: int, stride: int, fill: float) -> np.ndarray:
    """All windows of an image, [c u v p q]."""
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def ref_conv(x: np.ndarray, w: Any, name: str, stride: int) -> np.ndarray:
    kernel = w[f"{name}.convolution.weight"]
    y = np.einsum("cuvpq,ocpq->ouv", windows(x, kernel.shape[-1], stride, 0.0), kernel)
    norm = {k: w[f"{name}.normalization.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
    norm = {k: v[:, None, None] for k, v in norm.items()}
    return (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]


def reference(image: jax.Array, weights: Any, c: ResNetConfig) -> list[np.ndarray]:
    """The stem and every stage."""
    w = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    activation = ACTIVATIONS[c.activation]
    x = np.moveaxis(np.asarray(image, np.float64), -1, 0)
    x = windows(activation(ref_conv(x, w, "embedder.embedder", 2)), 3, 2, -np.inf).max((-1, -2))
    stages = [x]
    for i, blocks in enumerate(c.stage_blocks):
        for j in range(blocks):
            stride = 1 if j else 2 if i else c.first_stage_stride
            strides = (stride, 1) if c.block == "basic" else (1, stride, 1)
            if c.block == "bottleneck" and c.bottleneck_stride == "1x1":
                strides = (stride, 1, 1)
            name, y = f"encoder.stages.{i}.layers.{j}", x
            for k, s in enumerate(strides):
                y = ref_conv(np.maximum(y, 0) if k else y, w, f"{name}.layer.{k}", s)
            shortcut = f"{name}.shortcut" if f"{name}.shortcut.convolution.weight" in w else None
            assert (shortcut is not None) == (stride != 1 or x.shape[0] != c.stage_dims[i])
            x = activation(y + (ref_conv(x, w, shortcut, stride) if shortcut else x))
        stages.append(x)
    return stages


# Options that do not meet in the code share a program, for most of a test is its compilation.
OPTIONS: dict[str, dict[str, Any]] = {
    "bottleneck, stride on the 3x3": {},
    "bottleneck, stride on the first 1x1, width no multiple of the bottleneck": {
        "bottleneck_stride": "1x1",
        "stage_dims": (9, 14),
    },
    "first stage strided, gelu": {"first_stage_stride": 2, "activation": "gelu"},
    "first stage strided on the 1x1": {"first_stage_stride": 2, "bottleneck_stride": "1x1"},
    "first stage as wide as the stem": {"stage_dims": (4, 12)},
    "basic": {"block": "basic"},
    "basic, first stage strided and as wide as the stem": {
        "block": "basic",
        "first_stage_stride": 2,
        "stage_dims": (4, 4),
    },
    "one stage, selu": {"stage_dims": (8,), "stage_blocks": (2,), "activation": "selu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_agrees_with_the_reference(options: dict[str, Any]):
    config = dataclasses.replace(TINY, **options)
    variables = make(config)
    output = see(config, variables)
    weights = dict(rules.export(plan(config, variables), variables))
    for image in range(2):
        expected = reference(PIXELS[image], weights, config)
        assert len(output.stages) == len(expected)
        for stage, wanted in zip(output.stages, expected, strict=True):
            # What cancels in a sum leaves the rounding of its terms: errors are seen against the largest.
            scale = np.abs(wanted).max()
            assert_close(stage[image] / scale, np.moveaxis(wanted, 0, -1) / scale)
        assert_close(output.pooled[image], expected[-1].mean((1, 2)))


def test_published_tensors_come_out_as_they_went_in():
    variables = make(TINY)
    table = plan(TINY, variables)
    weights = dict(rules.export(table, variables))
    counters = {k.replace("running_mean", "num_batches_tracked"): np.array(7) for k in weights if "mean" in k}
    targets = jax.eval_shape(lambda: variables)
    again = rules.read(table, {**weights, **counters}, targets, ignored=conv.RESNET_IGNORED)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


def test_frozen_statistics_stay_while_scale_and_bias_learn():
    variables = make(TINY)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        output, changed = ResNet(TINY).apply({**variables, "params": params}, PIXELS, mutable=["batch_stats"])
        return jnp.sum(output.pooled**2), changed["batch_stats"]

    gradient, statistics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, statistics, variables["batch_stats"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_statistics_of_the_batch_normalise_it_and_move_the_running_ones():
    x = 3.0 + 2.0 * random(4, 3, 2, 5)
    variables = BatchNorm(frozen=False).init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0.0)  # initialising is no step
    y, changed = BatchNorm(frozen=False).apply(variables, x, mutable=["batch_stats"])
    flat = np.asarray(x).reshape(-1, 5)
    assert_close(y.reshape(-1, 5), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + EPSILON))
    assert_close(changed["batch_stats"]["mean"], (1 - MOMENTUM) * flat.mean(0))
    # The running variance is that of the population, whose estimate divides by one less.
    assert_close(changed["batch_stats"]["variance"], MOMENTUM + (1 - MOMENTUM) * flat.var(0, ddof=1))


def test_every_layer_has_statistics_of_its_own():
    variables = make(TINY)
    moving = ResNet(dataclasses.replace(TINY, statistics="moving"))
    _, changed = jax.jit(functools.partial(moving.apply, mutable=["batch_stats"]))(variables, PIXELS)
    before, after = (params_lib.flatten(tree["batch_stats"]) for tree in (variables, changed))
    assert before.keys() == after.keys()
    assert after["stage0_others/conv1/norm/mean"].shape == (2, 2)  # blocks, channels
    assert all(not np.any(before[path] == after[path]) for path in before)


def test_a_residual_stage_does_not_mix_images():
    variables = make(TINY)
    assert_close(see(TINY, variables).pooled[1:], see(TINY, variables, PIXELS[1:]).pooled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_dims": (8,)}, "must be of one length"),
        ({"stage_blocks": (3, 0)}, r"stage_blocks=\(3, 0\) must be >= 1"),
        ({"stage_dims": (8, 3)}, "must be >= bottleneck=4"),
    ],
)
def test_a_config_names_what_is_wrong(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_absent_keys_of_a_published_config_take_the_official_defaults():
    assert conv.read_resnet({"model_type": "resnet"}) == ResNetConfig()
    published = {"layer_type": "basic", "hidden_act": "selu", "downsample_in_first_stage": True}
    ours = ResNetConfig(block="basic", activation="selu", first_stage_stride=2)
    assert conv.read_resnet(published) == ours
    assert conv.read_resnet({"downsample_in_bottleneck": True}).bottleneck_stride == "1x1"
    with pytest.raises(ValueError, match="layer_type='wide': known are basic, bottleneck"):
        conv.read_resnet({"layer_type": "wide"})
