"""Heads of pixels: segmentation and depth, their decoder, labels and losses, and what they say."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.config import DataConfig
from vl_jax.data.images import palette
from vl_jax.data.images.spatial import PixelMap
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.tools import class_weights
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.fusion.streams import Stream
from vl_jax.heads import pixels
from vl_jax.heads.depth import Depth
from vl_jax.heads.segmentation import Segmentation
from vl_jax.joint import JointConfig, Tower
from vl_jax.nn.conv import group_norm

SIZE = 8
MASK = Segmentation(("ground", "car", "tree"), size=SIZE, stride=2, dim=8)
DEPTH = Depth(size=SIZE, stride=2, dim=8)
RESNET = ResNetConfig(stem_dim=8, stage_dims=(8, 16), stage_blocks=(1, 1), block="basic", image_size=32)


def sample(**labels) -> Sample:
    return Sample("s", (), labels=labels)


def map_of(values, missing=255.0) -> PixelMap:
    return PixelMap(lambda: np.asarray(values), (SIZE, SIZE), missing)


def streams(*sides: int) -> dict[str, Stream]:
    maps = tuple(jnp.ones((2, side, side, 8 * (i + 1))) for i, side in enumerate(sides))
    return {"image": Stream(jnp.ones((2, 1, 8)), jnp.ones((2, 1), bool), maps=maps)}


def test_group_norm_is_that_of_each_picture_and_group():
    random = np.random.default_rng(0)
    x = random.normal(3.0, 2.0, (2, 3, 4, 6)).astype(np.float32)
    scale, bias = random.normal(size=(2, 6)).astype(np.float32)
    groups = x.reshape(2, 12, 2, 3)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(
        group_norm(*map(jnp.asarray, (x, scale, bias)), groups=2, epsilon=1e-5), expected, atol=2e-5
    )


@pytest.mark.parametrize(
    ("sides", "size", "stride", "levels"),
    [
        ((8, 4, 2), 32, 4, ("up1", "up2")),
        ((8, 4, 2), 32, 8, ("up1",)),  # the finest map is finer than wanted, and is not read
        ((9, 5, 5, 3), 33, 4, ("up1", "up3")),  # odd sides, and two maps of one resolution
        ((4, 2), 32, 2, ("up1", "up2", "up3")),  # finer than any map
    ],
)
@pytest.mark.slow
def test_the_decoder_goes_up_to_its_stride_and_logits_to_the_tile(sides, size, stride, levels):
    head = dataclasses.replace(MASK, size=size, stride=stride).build()
    prediction, variables = jax.eval_shape(
        functools.partial(head.init_with_output, jax.random.key(0)), streams(*sides)
    )
    assert prediction.shape == (2, size, size, 3)
    ups = [name for name in variables["params"]["decoder"] if name.startswith("up")]
    assert sorted(ups) == sorted(levels)


@pytest.mark.parametrize("head", [MASK, DEPTH])
def test_a_stream_without_maps_is_named(head):
    with pytest.raises(ValueError, match=rf"head '{head.name}': stream 'image' has no maps"):
        jax.eval_shape(functools.partial(head.build().init, jax.random.key(0)), streams())


@pytest.mark.slow
def test_segmentation_weighs_classes_and_leaves_out_missing_pixels_and_rows():
    head = dataclasses.replace(MASK, class_weights=(1.0, 2.0, 0.5))
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    truth = random.integers(0, 3, (3, SIZE, SIZE)).astype(np.uint8)
    truth[0, :3] = 255
    label = Given(jnp.asarray(truth), jnp.array([True, True, False]))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses, right = 0.0, 0.0
    for row in range(2):
        known = truth[row] != 255
        classes, found = truth[row][known], shares[row][known]
        weights = np.array(head.class_weights)[classes]
        losses += np.mean(-weights * np.log(found[np.arange(len(classes)), classes]))
        right += np.mean(found.argmax(-1) == classes)
    loss, metrics = head.sums(jnp.asarray(logits), label)
    np.testing.assert_allclose(loss, losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["pixel_accuracy"], right, rtol=1e-5)


@pytest.mark.parametrize("focus", [0.85, 1.0])
def test_the_loss_of_depth_is_scale_invariant(focus):
    head = dataclasses.replace(DEPTH, variance_focus=focus)
    random = np.random.default_rng(0)
    said, true = random.uniform(0.5, 8, (2, 3, SIZE, SIZE)).astype(np.float32)
    true[0, :2], true[2] = 0, 0
    label = Given(jnp.asarray(true), jnp.array([True, True, False]))
    expected, off = 0.0, 0.0
    for row in range(2):
        known = true[row] > 0
        apart = np.log(said[row][known]) - np.log(true[row][known])
        expected += np.sqrt(np.mean(apart**2) - focus * np.mean(apart) ** 2)
        off += np.mean(np.abs(said[row] - true[row])[known] / true[row][known])
    loss, metrics = head.sums(jnp.asarray(1 / said), label)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["abs_rel"], off, rtol=1e-4)
    if focus == 1:
        np.testing.assert_allclose(head.sums(jnp.asarray(1 / (3 * said)), label)[0], loss, rtol=1e-4)


@pytest.mark.slow
def test_a_perfect_depth_and_a_row_without_one_have_finite_gradients():
    true = jnp.full((2, SIZE, SIZE), 2.0).at[1].set(0.0)
    label = Given(true, jnp.array([True, False]))
    slope = jax.grad(lambda x: DEPTH.sums(x, label)[0])(jnp.full_like(true, 0.5))
    assert jnp.isfinite(slope).all() and not slope[1].any()


def test_labels_are_read_in_pixels_of_the_tile():
    values = np.zeros((SIZE, SIZE))
    values[0, 0], values[1] = 255, 2
    found = MASK.read(sample(mask=map_of(values)))
    assert found is not None and found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)
    assert MASK.read(sample()) is None and MASK.read(sample(mask=map_of(np.full((SIZE, SIZE), 255)))) is None
    void = np.where(values == 2, 11, values)  # as CamVid marks pixels of no class
    np.testing.assert_array_equal(MASK.read(sample(mask=map_of(void % 255, missing=11))) == 255, values == 2)

    depth = np.full((SIZE, SIZE), 3.0)
    depth[0], depth[1], depth[2] = 0, 11, np.nan
    found = DEPTH.read(sample(depth=map_of(depth, missing=0)))
    assert found is not None and found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0], [0, 0, 0, 3, 3, 3, 3, 3])


@pytest.mark.parametrize(
    ("head", "label", "line"),
    [
        (MASK, map_of(np.full((SIZE, SIZE), 3)), r"64 pixels of 3; head 'mask' has the classes 0 to 2"),
        (MASK, map_of(np.zeros((4, 8))), r"mask of \[4, 8\] pixels, expected \[8, 8\]"),
        (MASK, "car", r"mask is a str, expected a map of pixels"),
        (DEPTH, map_of(np.full((SIZE, SIZE), -1.0), 0), r"64 pixels of -1.0, no depth"),
    ],
)
def test_labels_that_cannot_be_used_are_told(head, label, line):
    with pytest.raises(BadSample, match=line):
        head.read(sample(**{head.field: label}))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Segmentation(("one",)), "expected 2 to 255, all different"),
        (lambda: dataclasses.replace(MASK, class_weights=(1.0,)), "expected 3 numbers >= 0"),
        (
            lambda: dataclasses.replace(MASK, class_weights=(1, float("nan"), 1)),
            "expected 3 numbers >= 0",
        ),
        (lambda: dataclasses.replace(MASK, dim=12), "dim=12 of head 'mask' must be a multiple of 8"),
        (lambda: dataclasses.replace(DEPTH, stride=9), "must be 1 <= stride <= size"),
        (lambda: dataclasses.replace(DEPTH, far=0.0), "far=0.0 of head 'depth' must be a number above 0"),
        (lambda: dataclasses.replace(DEPTH, variance_focus=1.1), "must be in 0..1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, line):
    with pytest.raises(ValueError, match=line):
        make()


def test_a_head_and_the_tiles_are_of_one_size():
    model = JointConfig((Tower("image", RESNET),), (dataclasses.replace(MASK, size=32),))
    model.check_data(DataConfig(max_tokens=8, tiling=TilingConfig(tile_size=32, views="global")))
    other = dataclasses.replace(model, heads=(dataclasses.replace(MASK, size=16),))
    with pytest.raises(ValueError, match="tile_size=32 differs from size=16 of head 'mask'"):
        other.check_data(DataConfig(max_tokens=8, tiling=TilingConfig(tile_size=32, views="global")))


def test_what_is_said_is_json_and_can_be_drawn():
    logits = np.zeros((SIZE, SIZE, 3), np.float32)
    logits[:2, :, 1] = 1
    said = MASK.decode(logits)
    assert said["shares"] == {"ground": 0.75, "car": 0.25}
    np.testing.assert_array_equal(np.asarray(pixels.from_text(said["map"])), logits.argmax(-1))
    drawn = MASK.draw(PilImage.new("RGB", (16, 12)), said)
    assert drawn.width == 16 and drawn.getpixel((3, 1)) != drawn.getpixel((3, 9))

    disparity = np.full((SIZE, SIZE), 0.5, np.float32)
    disparity[0] = 0.1
    said = DEPTH.decode(disparity)
    assert (said["nearest"], said["median"], said["farthest"]) == (2.0, 2.0, 10.0)
    values = np.asarray(pixels.from_text(said["map"])) * said["unit"]
    np.testing.assert_allclose(values, 1 / disparity, atol=said["unit"])
    near, far = (DEPTH.draw(PilImage.new("RGB", (8, 8)), said).getpixel((3, y)) for y in (6, 0))
    assert sum(near) > sum(far)


def test_colours_of_classes_differ():
    assert len({tuple(colour) for colour in palette.colours(40).tolist()}) == 40


def test_weights_by_median_frequency(caplog):
    maps = [np.array([[0, 0, 0, 1]]), np.array([[0, 255, 2, 2]]), np.array([[255, 255, 255, 255]])]
    source = [sample(mask=PixelMap(lambda m=m: m, (4, 1), 255)) for m in maps] + [
        sample(),
        BadSample("x", "y"),
    ]
    counts = class_weights.pixel_counts(source, "mask", 4)
    np.testing.assert_array_equal(counts, [[3, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    # 4 of 7 pixels, 1 of 4, 2 of 3; the median is 4/7.
    weights = class_weights.median_frequency(counts, classes=("a", "b", "c", "d"))
    np.testing.assert_allclose(weights, [1, (4 / 7) * 4, (4 / 7) * 1.5, 1])
    assert "no picture has a pixel of d" in caplog.text
    with pytest.raises(ValueError, match="mask has pixels of 2, of 2 classes"):
        class_weights.pixel_counts(source, "mask", 2)
    with pytest.raises(ValueError, match="no sample has a map of pixels under 'depth'"):
        class_weights.pixel_counts(source, "depth", 2)


@pytest.mark.slow
def test_both_heads_learn_a_few_pictures_by_heart_in_one_model():
    """Pictures of a bright square on dark ground: its pixels are of class 1, and near."""
    size, rows = 32, 4
    heads = (
        Segmentation(("ground", "square"), size=size, stride=2, dim=16),
        Depth(size=size, stride=2, dim=16),
    )
    model = JointConfig((Tower("image", RESNET),), heads)
    random = np.random.default_rng(0)
    mask = np.zeros((rows, size, size), np.uint8)
    for row, (x, y) in enumerate(random.integers(2, 18, (rows, 2))):
        mask[row, y : y + 12, x : x + 12] = 1
    tiles = (40 + 150 * mask[..., None] + random.integers(0, 30, (*mask.shape, 3))).astype(np.uint8)
    there = np.ones(rows, bool)
    batch = dataclasses.replace(
        model.smallest_batch(rows),
        tiles=tiles[:, None],
        visual_index=np.zeros((rows, 1), np.int32),
        labels={
            "mask": Given(mask, there),
            "depth": Given(np.where(mask, 2.0, 6.0).astype(np.float32), there),
        },
    )
    module, batch = model.build(), jax.tree.map(jnp.asarray, batch)
    variables = nn.meta.unbox(module.init(jax.random.key(0), batch, {}))
    optimizer = optax.adam(3e-3)

    def loss(params):
        found = module.apply({**variables, "params": params}, batch, {}).predictions
        mask_loss, mask_metrics = heads[0].sums(found["mask"], batch.labels["mask"])
        depth_loss, depth_metrics = heads[1].sums(found["depth"], batch.labels["depth"])
        return (mask_loss + depth_loss) / rows, {**mask_metrics, **depth_metrics}

    @jax.jit
    def step(params, moments):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts with decay rates
            updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), moments, metrics

    params = variables["params"]
    moments, metrics = optimizer.init(params), {}
    for _ in range(150):
        params, moments, metrics = step(params, moments)
    assert metrics["pixel_accuracy"] / rows > 0.98 and metrics["abs_rel"] / rows < 0.1
