"""Instances: masks by hand, packing and back, the loss of the head, what it says, and its precision."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax import schema
from vl_jax.batch import Given
from vl_jax.data.images.spatial import Boxes, Cut, Instances
from vl_jax.data.sample import BadSample, Box, Sample, Turn
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.metrics.pixels.instances import InstanceScores, mask_iou
from vl_jax.evaluate.tasks.found_masks import FoundMasks
from vl_jax.heads import masks
from vl_jax.heads.detector import Detected, DetectorConfig, Guesses, cells_of
from vl_jax.heads.instances import InstanceMasks, Segmented
from vl_jax.heads.suppression import Detections
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import plan_layout, put_batch
from vl_jax.sharding import MeshConfig, make_mesh, use_mesh

SIDE, PLACES, P = 32, 4, 3
NETWORK = DetectorConfig(width=8, depth=1, reg_max=4, coefficients=P)
HEAD = InstanceMasks(
    ("disc", "square"), size=SIDE, most_objects=PLACES, network=NETWORK, mask_stride=8, mask_dim=8
)


def drawn(*objects: tuple[str, tuple[int, int, int, int]], size: int = SIDE) -> Instances:
    """Rectangles and discs, each with its mask."""
    y, x = np.mgrid[:size, :size] + 0.5
    found = []
    for label, (x0, y0, x1, y1) in objects:
        mask = (x > x0) & (x < x1) & (y > y0) & (y < y1)
        if label == "disc":
            mask &= ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
        found.append(mask)
    boxes = tuple(Box(label, tuple(map(float, corners))) for label, corners in objects)
    stacked = np.stack(found) if found else np.zeros((0, size, size), bool)
    return Instances(boxes, lambda: stacked, (size, size))


def read(*objects: Any, head: InstanceMasks = HEAD) -> np.ndarray:
    label = drawn(*objects, size=head.size)
    found = head.read(Sample("s", (Turn("", ""),), labels={head.field: label}))
    assert found is not None and found.shape == head.shape and found.dtype == np.dtype(head.dtype)
    return found


ONE = ("disc", (2, 2, 20, 14))
TWO = ("square", (3, 12, 29, 31))
THREE = ("square", (0, 0, 9, 8))


@given(
    size=st.sampled_from((1, 31, 32, 33)),
    count=st.integers(0, PLACES),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_labels_and_run_lengths_give_back_what_they_hold(size, count, share, seed):
    rng = np.random.default_rng(seed)
    objects = rng.normal(0, 100, (PLACES, 5)).astype(np.float32)
    true = rng.random((count, size, size)) < share
    label = masks.pack(objects, true)
    assert label.shape == (PLACES, masks.label_width(size)) and label.dtype == np.uint32
    np.testing.assert_array_equal(masks.objects_in(label), objects)
    found = np.asarray(masks.masks_in(label, size))
    np.testing.assert_array_equal(found[:count], true)
    assert not found[count:].any()
    for mask in true:
        said = json.loads(json.dumps(masks.run_lengths(mask)))
        np.testing.assert_array_equal(masks.from_run_lengths(said), mask)


def test_run_lengths_are_those_of_coco():
    codec = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.9, 1.0):
        mask = rng.random((7, 5)) < share
        said = masks.run_lengths(mask)
        packed = codec.frPyObjects(said, 7, 5)
        assert packed == codec.encode(np.asfortranarray(mask, np.uint8))
    with pytest.raises(ValueError, match=r"counts of 3 pixels, expected 4 of size=\[2, 2\]"):
        masks.from_run_lengths({"size": [2, 2], "counts": [1, 2]})


@pytest.mark.slow
@pytest.mark.parametrize(("size", "cells"), [(12, 3), (13, 4), (5, 7), (6, 6)])
def test_a_box_covers_its_area_and_masks_keep_theirs(size, cells):
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.uniform(0, size, (2, 50)).astype(np.float32), axis=0)
    found = masks.covered(jnp.asarray(low), jnp.asarray(high), cells=cells, size=size)
    np.testing.assert_allclose(found.sum(axis=-1) * size / cells, high - low, atol=1e-4)
    assert found.min() >= 0 and found.max() <= 1 + 1e-5
    mask = rng.random((9, size, size)) < rng.random((9, 1, 1))
    share = masks.shares(jnp.asarray(mask), (cells, cells))
    np.testing.assert_allclose(share.mean(axis=(1, 2)), mask.mean(axis=(1, 2)), atol=1e-5)
    if size == cells:
        np.testing.assert_allclose(share, mask, atol=1e-5)


def test_the_loss_of_a_mask_by_hand_on_a_grid_of_four_by_four():
    """A tile of 8 x 8 pixels: cells are of 2 x 2. The box covers two cells and half of the next two."""
    box = jnp.array([[2.0, 2.0, 5.0, 4.0]])
    inside = masks.within(box, (4, 4), 8)
    expected = np.zeros((1, 4, 4))
    expected[0, 1] = [0, 1, 0.5, 0]
    np.testing.assert_allclose(inside, expected)
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2:4, 2:4] = True  # the first cell
    mask[0, 2, 4] = True  # a quarter of the second
    true = masks.shares(jnp.asarray(mask), (4, 4))
    np.testing.assert_allclose(true[0, 1], [0, 1, 0.25, 0], atol=1e-6)
    assert float(true.sum()) == pytest.approx(1.25)
    logits = jnp.full((1, 1, 4, 4), 50.0).at[0, 0, 1, 1].set(0.0).at[0, 0, 1, 2].set(np.log(3.0))
    # log 2 of the first cell; of a share of 1/4 said to be 3/4: 1/4 log 4/3 + 3/4 log 4, which counts half.
    second = 0.25 * np.log(4 / 3) + 0.75 * np.log(4)
    found = masks.cross_entropy(logits, true, inside)
    np.testing.assert_allclose(found, [[(np.log(2) + 0.5 * second) / 1.5]], rtol=1e-6)
    assert masks.cross_entropy(logits, true, jnp.zeros((1, 4, 4))).tolist() == [[0.0]]  # a box without area


def guesses(rng: Any, rows: int, cells: int) -> Guesses:
    logits, distances = rng.normal(-1, 2, (rows, cells, 2)), rng.normal(0, 1, (rows, cells, 4, 4))
    coefficients = np.tanh(rng.normal(0, 1, (rows, cells, P)))
    return Guesses(*(jnp.asarray(x, jnp.float32) for x in (logits, distances, coefficients)))


@functools.cache
def prediction(rows: int, seed: int = 0) -> Segmented:
    """What a head with both branches might say."""
    rng, cells = np.random.default_rng(seed), cells_of(8, 8, SIDE)
    found = Detections(jnp.zeros((rows, 1, 4)), jnp.zeros((rows, 1)), jnp.zeros((rows, 1), jnp.int32))
    cells = jnp.broadcast_to(jnp.asarray(cells), (rows, 64, 4))
    detected = Detected(cells, guesses(rng, rows, 64), guesses(rng, rows, 64), found)
    prototypes = jnp.asarray(np.maximum(rng.normal(0, 2, (rows, 4, 4, P)), 0), jnp.float32)
    return Segmented(detected, prototypes, jnp.zeros((rows, 1, P)))


@functools.cache
def compiled() -> Any:
    """Loss, parts, and the gradient of prototypes."""

    def run(shown: Segmented, label: Given) -> Any:
        def loss(prototypes: jax.Array) -> Any:
            return HEAD.sums(shown.replace(prototypes=prototypes), label)

        (value, parts), slope = jax.value_and_grad(loss, has_aux=True)(shown.prototypes)
        return value, parts, slope

    return jax.jit(run)


def sums(*labels: np.ndarray, present: Any = None, seed: int = 0) -> Any:
    there = np.ones(len(labels), bool) if present is None else np.asarray(present)
    return compiled()(prediction(len(labels), seed), Given(jnp.asarray(np.stack(labels)), jnp.asarray(there)))


@pytest.mark.slow
@given(order=st.permutations(range(PLACES)), seed=st.integers(0, 50))
@settings(max_examples=8, deadline=None)
def test_the_order_of_objects_changes_no_loss(order, seed):
    label = read(ONE, TWO, THREE)  # of three objects, in four places
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), prediction(2, seed))
    both = Given(jnp.asarray(np.stack([label, label[list(order)]])), jnp.ones(2, bool))
    _, _, slope = compiled()(same, both)
    np.testing.assert_allclose(slope[0], slope[1], rtol=1e-4, atol=1e-6)
    first, second = (compiled()(same, Given(both.values, jnp.arange(2) == row)) for row in (0, 1))
    assert float(first[0]) == pytest.approx(float(second[0]), rel=1e-5) and float(first[1]["mask"]) > 0
    for name, value in first[1].items():
        assert float(second[1][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_rows_add_up_and_what_is_not_there_adds_nothing():
    rows = [read(ONE, TWO), read(), read(THREE)]
    loss, parts, slope = sums(*rows, present=[True, True, False])
    # A row without a label, whatever its numbers hold; and a picture without objects.
    assert np.abs(slope[0]).sum() > 0 and not slope[1].any() and not slope[2].any()
    single = [sums(*rows, present=np.arange(3) == row) for row in (0, 1)]
    assert float(single[1][1]["mask"]) == 0.0 == float(single[1][1]["one_mask"])
    for name, value in parts.items():
        assert float(value) == pytest.approx(sum(float(of[1][name]) for of in single), rel=1e-5), name
    gains = {**dict(zip(("box", "cls", "dfl"), HEAD.gains, strict=True)), "mask": HEAD.mask_gain}
    expected = sum(gains[name.removeprefix("one_")] * float(value) for name, value in parts.items())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    # The mask of a place that holds no object is not looked at.
    full = rows[0].copy()
    full[2:, 5:] = 2**32 - 1
    other = sums(full, *rows[1:], present=[True, True, False])
    assert float(other[0]) == float(loss)
    np.testing.assert_array_equal(other[2], slope)


@pytest.mark.slow
def test_the_loss_is_that_of_a_plain_reference():
    label, shown = read(ONE, TWO), prediction(1)
    found = HEAD.assigned(
        shown.detected.cells[0],
        jax.tree.map(lambda x: x[0], shown.detected.many),
        masks.objects_in(label),
        top_k=HEAD.assignment.top_k,
    )
    truth = [drawn(ONE, TWO).values()[g].reshape(4, 8, 4, 8).mean(axis=(1, 3)) for g in range(2)]
    inside = np.asarray(masks.within(masks.objects_in(label)[:2, 1:], (4, 4), SIDE), np.float64)
    total = 0.0
    for a in np.flatnonzero(found.assigned):
        g = int(found.object[a])
        logits = np.asarray(shown.prototypes[0] @ shown.detected.many.coefficients[0, a], np.float64)
        losses = np.logaddexp(0, logits) - truth[g] * logits
        total += float(found.score[a]) * (losses * inside[g]).sum() / inside[g].sum()
    expected = total / max(float(found.score.sum()), 1.0)
    assert expected > 0 and float(sums(label)[1]["mask"]) == pytest.approx(expected, rel=1e-4)


def test_a_label_is_an_instances_and_objects_without_a_pixel_are_left_out():
    found = read(ONE, TWO)
    assert np.asarray(masks.objects_in(found)).tolist() == [
        [0, 2, 2, 20, 14],
        [1, 3, 12, 29, 31],
        [-1, 0, 0, 0, 0],
        [-1, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(masks.masks_in(found, SIDE)[:2], drawn(ONE, TWO).values())
    unseen = drawn(ONE, TWO, THREE)
    values = unseen.values().copy()
    values[1] = False
    label = dataclasses.replace(unseen, masks=lambda: values)
    np.testing.assert_array_equal(HEAD.read(sample(label)), read(ONE, THREE))
    nothing = read()
    assert (np.asarray(masks.objects_in(nothing))[:, 0] == -1).all() and HEAD.read(Sample("s", ())) is None


def sample(label: Any) -> Sample:
    return Sample("s", (), labels={"instances": label})


@pytest.mark.parametrize(
    ("label", "line"),
    [
        (Boxes((), (SIDE, SIDE)), "instances is a Boxes, expected objects with masks"),
        (drawn(size=16), r"of a picture of \(16, 16\) pixels, expected \(32, 32\)"),
        (drawn(("hen", (1, 1, 9, 9))), "'hen' is none of the classes of head 'instances'"),
        (drawn(*[ONE] * 5), "5 boxes, most_objects=4 of head 'instances'"),
        (Instances(drawn(ONE).boxes, drawn().masks, (SIDE, SIDE)), "0 masks of 1 objects"),
    ],
)
def test_labels_that_cannot_be_used_say_why(label, line):
    with pytest.raises(BadSample, match=line):
        HEAD.read(sample(label))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: InstanceMasks(("a",), network=DetectorConfig()), "network.coefficients=0 of head"),
        (lambda: dataclasses.replace(HEAD, mask_gain=-1.0), "mask_gain=-1.0"),
        (lambda: dataclasses.replace(HEAD, mask_stride=0), "stride=0 of head 'instances'"),
        (lambda: dataclasses.replace(HEAD, classes=()), "expected one or more"),
        (lambda: DetectorConfig(coefficients=-1), "coefficients=-1"),
        (lambda: FoundMasks(headline="map"), "headline='map': expected one of mask_map_50"),
    ],
)
def test_configs_that_cannot_be_are_refused(make, line):
    with pytest.raises(ValueError, match=line):
        make()


RESNET = ResNetConfig(
    stem_dim=8,
    stage_dims=(8, 16),
    stage_blocks=(1, 1),
    block="basic",
    image_size=SIDE,
    statistics="moving",
)
MODEL = JointConfig((Tower("image", RESNET),), (HEAD,))


def test_a_config_survives_json():
    text = schema.to_json(MODEL)
    assert schema.from_json(text, JointConfig) == MODEL and '"InstanceMasks"' in text


def test_masks_are_enlarged_as_jax_does_and_cut_by_their_boxes():
    rng = np.random.default_rng(0)
    prototypes, of = rng.normal(0, 1, (4, 4, P)), rng.normal(0, 1, (2, P))
    boxes = np.array([[0, 0, SIDE, SIDE], [4.6, 8.0, 20.0, 9.4]])
    found = masks.from_prototypes(prototypes.astype(np.float32), of.astype(np.float32), boxes, SIDE)
    logits = jnp.asarray(np.einsum("uvp,np->nuv", prototypes, of), jnp.float32)
    fine = np.asarray(jax.image.resize(logits, (2, SIDE, SIDE), "bilinear"))
    clear = np.abs(fine) > 1e-4
    np.testing.assert_array_equal(found[0][clear[0]], fine[0][clear[0]] > 0)
    rows, columns = np.nonzero(found[1])
    assert rows.min() >= 8 and rows.max() <= 8 and columns.min() >= 5 and columns.max() <= 19
    np.testing.assert_array_equal(
        found[1][8, 5:20][clear[1][8, 5:20]], (fine[1] > 0)[8, 5:20][clear[1][8, 5:20]]
    )


def test_what_is_said_has_a_mask_and_is_drawn():
    boxes = np.array([[4.0, 4, 20, 12], [0, 0, 9, 9]], np.float32)
    found = Detections(boxes, np.array([0.75, 0.0]), np.array([1, 0]))
    detected = Detected(np.zeros((0, 4)), Guesses(None, None), None, found)
    row = Segmented(detected, np.ones((4, 4, P), np.float32), np.full((2, P), 0.5, np.float32))
    (said,) = HEAD.decode(row)
    assert (said["label"], said["score"], said["box"]) == ("square", 0.75, [4, 4, 20, 12])
    mask = masks.from_run_lengths(said["mask"])
    assert mask[4:12, 4:20].all() and mask.sum() == 8 * 16
    blank = PilImage.new("RGB", (SIDE, SIDE))
    picture = np.asarray(HEAD.draw(blank, [said]))
    assert picture[10, 12].any() and not picture[28, 28].any() and not np.asarray(blank).any()
    assert not np.asarray(HEAD.draw(blank, [{**said, "score": 0.1}])).any()


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_said_lies_in_the_picture(mirrored: bool):
    # The tile shows the right half of a picture twice as large, its sides exchanged or not.
    size, cut = (4 * SIDE, 2 * SIDE), Cut((2.0 * SIDE, 0.0, 4.0 * SIDE, 2.0 * SIDE), (SIDE, SIDE), mirrored)
    found = Detections(np.array([[4.0, 4, 20, 12]], np.float32), np.array([0.75]), np.array([1]))
    detected = Detected(np.zeros((0, 4)), Guesses(None, None), None, found)
    row = Segmented(detected, np.ones((4, 4, P), np.float32), np.full((1, P), 0.5, np.float32))
    (said,) = HEAD.decode_in(row, cut, size)
    x0, y0, x1, y1 = (int(x) for x in said["box"])
    left = SIDE - 20 if mirrored else 4
    assert (x0, y0, x1, y1) == (2 * SIDE + 2 * left, 8, 2 * SIDE + 2 * left + 32, 24)
    mask = masks.from_run_lengths(said["mask"])
    assert mask.shape == (2 * SIDE, 4 * SIDE)
    assert mask[y0:y1, x0:x1].all() and mask.sum() == 16 * 32
    picture = np.asarray(HEAD.draw(PilImage.new("RGB", size), [said]))
    assert picture[(y0 + y1) // 2, (x0 + x1) // 2].any() and not picture[:, : 2 * SIDE].any()


def learned(rows: int, head: InstanceMasks = HEAD) -> Any:
    """Pictures of two objects, and the batch of them."""
    rng = np.random.default_rng(0)
    labels, tiles = [], np.full((rows, SIDE, SIDE, 3), 90, np.uint8)
    for tile in tiles:
        x, y = rng.integers(0, 6, 2)
        objects = (("disc", (x, y, x + 12, y + 14)), ("square", (x + 14, 15 - y, x + 24, 29 - y)))
        for mask, level in zip(drawn(*objects).values(), (220, 20), strict=True):
            tile[mask] = level
        labels.append(read(*objects, head=head))
    model = dataclasses.replace(MODEL, heads=(head,))
    return model, dataclasses.replace(
        model.smallest_batch(rows),
        tiles=tiles[:, None],
        visual_index=np.zeros((rows, 1), np.int32),
        labels={head.name: Given(np.stack(labels), np.ones(rows, bool))},
    )


@pytest.mark.slow
def test_eight_devices_are_one():
    found = []
    for mesh in (MeshConfig(data=2, fsdp=4), MeshConfig(data=1)):
        count = mesh.data * mesh.fsdp
        model, batch = learned(8)
        layout = plan_layout(
            model, model.smallest_batch(count), make_mesh(mesh, devices=jax.devices()[:count])
        )
        random = np.random.default_rng(1)

        def draw(leaf: Any, random: Any = random) -> jax.Array:
            value = 0.5 + 0.1 * np.abs(random.standard_normal(leaf.shape, np.float32))
            return jax.device_put(value, leaf.sharding)

        params, statistics = (jax.tree.map(draw, tree) for tree in (layout.params, layout.collections))

        def loss(params: Any, statistics: Any, batch: Any, module: nn.Module = layout.model) -> Any:
            output: Any = module.apply({"params": params, **statistics}, batch, {})
            value, parts = HEAD.sums(output.predictions["instances"], batch.labels["instances"])
            return value / 8.0, parts

        with use_mesh(layout.mesh, layout.rules):
            step = jax.jit(jax.value_and_grad(loss, has_aux=True))
            found.append(jax.device_get(step(params, statistics, put_batch(batch, layout))))
    (value, parts), gradient = found[0]
    np.testing.assert_allclose(value, found[1][0][0], rtol=1e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(part, found[1][0][1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, found[1][1])


@pytest.mark.slow  # a network learns, twice over
@pytest.mark.parametrize("branch", ["nms", "one_to_one"])
def test_a_tiny_network_learns_four_pictures(branch):
    pytest.importorskip("faster_coco_eval")
    network = dataclasses.replace(NETWORK, width=16, coefficients=4)
    head = dataclasses.replace(HEAD, branch=branch, network=network, mask_stride=4, mask_dim=16)
    model, batch = learned(4, head)
    module, label = model.build(), batch.labels["instances"]
    variables = nn.meta.unbox(jax.jit(lambda key: module.init(key, batch, {}))(jax.random.key(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 150))

    @jax.jit
    def step(params: Any, statistics: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            output, changed = module.apply(variables, batch, {}, mutable=["batch_stats"])
            total, parts = head.sums(output.predictions["instances"], label)
            return total / 4.0, (parts, changed["batch_stats"])

        (value, (parts, statistics)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), statistics, state, (value, parts["mask"])

    params, statistics = variables["params"], variables["batch_stats"]
    state, losses = optimizer.init(params), []
    for _ in range(150):
        params, statistics, state, value = step(params, statistics, state)
        losses.append([float(of) for of in value])
    (first, _), (middle, _), (last, mask) = losses[0], losses[20], losses[-1]
    assert first > middle > last and mask / 4.0 < 0.4
    said = jax.jit(module.apply)({"params": params, "batch_stats": statistics}, batch, {})
    scores = InstanceScores()
    for row in range(4):
        found = jax.tree.map(lambda of, row=row: np.asarray(of[row]), said.predictions["instances"])
        objects = np.asarray(masks.objects_in(label.values[row]))[:2]
        true = np.asarray(masks.masks_in(label.values[row], SIDE))[:2]
        there = found.found.scores > 0
        kinds, certain = found.found.classes[there], found.found.scores[there]
        scores.update(true, objects[:, 0].astype(int), head.said_masks(found), kinds, certain)
    assert scores.compute()["map_50"] > 0.8, scores.compute()


# Mean average precision.


def test_average_precision_of_masks_by_hand():
    pytest.importorskip("faster_coco_eval")
    true = np.zeros((2, 60, 60), bool)
    true[0, :40, :40], true[1, 50:, 50:] = True, True
    # The first is found by a mask of which three quarters are right, in a box that is right altogether.
    said = true.copy()
    said[0, :20, :20] = False
    assert mask_iou(true, said).tolist() == [[0.75, 0], [0, 1]]
    assert mask_iou(true[:0], said).shape == (0, 2)
    scores, kinds, certain = InstanceScores(), np.array([0, 0]), np.array([0.9, 0.8])
    scores.update(true, kinds, said, kinds, certain)
    found = scores.compute()
    assert found["map_50"] == pytest.approx(1) and found["map_small"] == pytest.approx(1)
    assert found["map_medium"] == pytest.approx(0.6)  # right at 0.5, ..., 0.75 of ten overlaps
    assert scores.at(0.74) == pytest.approx(1) and scores.at(0.76) < 0.6
    assert scores.by_class()[0]["map"] == pytest.approx(found["map"]) and scores.compute() == found
    with pytest.raises(ValueError, match=r"picture 1: true and detected masks differ in size: \[60, 60\]"):
        scores.update(true, kinds, said[:, :50], kinds, certain)
    with pytest.raises(ValueError, match="picture 1: masks, labels and scores differ in length"):
        scores.update(true, kinds, said[:1], kinds, certain)
    with pytest.raises(ValueError, match=r"mAP: no true mask in 0 picture\(s\)"):
        InstanceScores().compute()


@pytest.mark.slow
def test_mean_average_precision_of_masks_is_that_of_pycocotools():
    pytest.importorskip("faster_coco_eval")
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    codec = pytest.importorskip("pycocotools.mask")
    rng, images, size = np.random.default_rng(0), 40, 120
    for _ in range(25):
        scores, truths, said = InstanceScores(), [], []
        for image in range(images):
            count = int(rng.integers(0, 5))
            true = np.zeros((count, size, size), bool)
            for mask in true:
                (x, y), (width, height) = rng.integers(0, 80, 2), rng.integers(4, 115, 2)
                mask[y : y + height, x : x + width] = rng.random() < 0.9
                mask &= rng.random((size, size)) < 0.9
            labels, crowd = rng.integers(0, 3, count), rng.random(count) < 0.1
            near = [np.roll(mask, rng.integers(-6, 7, 2), (0, 1)) for mask in true if rng.random() < 0.8]
            found = np.stack([*near, rng.random((size, size)) < 0.3])
            kinds = rng.integers(0, 3, len(found))
            certain = rng.permutation(len(found) * images)[: len(found)] / 1000 + image / 1e6
            scores.update(true, labels, found, kinds, certain, crowd=crowd)
            for target, of, classes in ((truths, true, labels), (said, found, kinds)):
                for row, (mask, label) in enumerate(zip(of, classes, strict=True)):
                    entry: dict[str, Any] = {"image_id": image + 1, "category_id": int(label)}
                    entry["segmentation"] = codec.encode(np.asfortranarray(mask, np.uint8))
                    entry |= (
                        {"score": certain[row]}
                        if target is said
                        else {"iscrowd": int(crowd[row]), "area": int(mask.sum())}
                    )
                    target.append(entry | {"id": len(target) + 1})
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = {
                "images": [{"id": i + 1, "height": size, "width": size} for i in range(images)],
                "categories": [{"id": i} for i in range(3)],
                "annotations": truths,
            }
            truth.createIndex()
            expected = cocoeval.COCOeval(truth, truth.loadRes(said), "segm")
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "recall_1", "recall_10")
        for _ in range(2):  # asked again, the same
            found = scores.compute()
            assert [found.get(name, -1) for name in names] == pytest.approx(expected.stats[:8], abs=1e-9)
