"""Detection: boxes as numbers, assignment and suppression against plain references, the head and its loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.images.spatial import Boxes, Cut, cut_labels
from vl_jax.data.images.tiling import TilingConfig, make_tiles, shown
from vl_jax.data.sample import BadSample, Box, Sample, Turn
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.metrics.pixels.boxes import box_iou
from vl_jax.evaluate.metrics.pixels.detection import DetectionScores
from vl_jax.evaluate.task import Examinee
from vl_jax.evaluate.tasks.found_boxes import FoundBoxes, patches_of
from vl_jax.fusion.streams import Stream
from vl_jax.heads import boxes as box_numbers
from vl_jax.heads.assignment import assign, inside
from vl_jax.heads.detection import AssignmentConfig, Detection
from vl_jax.heads.detector import Detected, DetectorConfig, Guesses, SaidConfig, cells_of
from vl_jax.heads.pyramid import nearest
from vl_jax.heads.suppression import Detections, strongest, suppress, without_copies
from vl_jax.joint import JointConfig, Tower


def random_boxes(rng: Any, *shape: int, size: float = 60.0) -> np.ndarray:
    low = rng.uniform(0, size, (*shape, 2))
    return np.concatenate([low, low + rng.uniform(2, size / 2, (*shape, 2))], axis=-1)


# References in float64, box by box, written from the papers.


def ref_overlaps(a: Any, b: Any) -> tuple[float, float, float]:
    """IoU, GIoU, CIoU."""
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    union = area[0] + area[1] - width * height
    iou = width * height / union
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)]
    giou = iou - (hull[0] * hull[1] - union) / (hull[0] * hull[1])
    apart = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    angle = [math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (a, b)]
    v = 4 / math.pi**2 * (angle[0] - angle[1]) ** 2
    alpha = v / (1 - iou + v) if v else 0.0
    return iou, giou, iou - sum(x * x for x in apart) / sum(x * x for x in hull) - alpha * v


def ref_suppress(boxes: Any, scores: Any, classes: Any, threshold: float) -> list[int]:
    """Greedy, by class, over a list of what is left; the most certain first."""
    overlap = box_iou(boxes, boxes)
    left, kept = sorted((i for i in range(len(scores)) if scores[i] > 0), key=lambda i: -scores[i]), []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if classes[i] != classes[best] or overlap[i, best] <= threshold]
    return kept


def ref_assign(scores: Any, boxes: Any, centres: Any, objects: Any, classes: Any, k: int) -> Any:
    """Object (or -1) and target score of every cell."""
    overlap = np.array([[ref_overlaps(b, o)[0] for o in objects] for b in boxes])
    metric = np.array([[scores[a][c] ** 0.5 for c in classes] for a in range(len(boxes))]) * overlap**6
    mine: dict[int, int] = {}
    for g, (x0, y0, x1, y1) in enumerate(objects):
        within = [a for a, (x, y) in enumerate(centres) if x0 <= x < x1 and y0 <= y < y1]
        for a in sorted(within, key=lambda a: -metric[a, g])[:k]:
            if a not in mine or overlap[a, g] > overlap[a, mine[a]]:
                mine[a] = g
    target = np.zeros(len(boxes))
    for a, g in mine.items():
        cells = [c for c, h in mine.items() if h == g]
        highest = max(metric[c, g] for c in cells)
        target[a] = metric[a, g] / highest * max(overlap[c, g] for c in cells) if highest else 0
    return np.array([mine.get(a, -1) for a in range(len(boxes))]), target


def test_overlaps_by_hand_and_by_a_plain_reference():
    one, other = np.array([0.0, 0.0, 4.0, 2.0]), np.array([2.0, 0.0, 6.0, 2.0])
    assert ref_overlaps(one, other) == pytest.approx((1 / 3, 1 / 3, 1 / 3 - 4 / 40))
    apart = np.array([6.0, 0.0, 8.0, 2.0])  # not a cell in common: a hull of 16, of which 4 are neither's
    assert ref_overlaps(one, apart)[1] == pytest.approx(-4 / 16)
    rng = np.random.default_rng(0)
    left, right = random_boxes(rng, 200), random_boxes(rng, 200)
    left, right = np.concatenate([left, [one, one, one]]), np.concatenate([right, [other, apart, one]])
    expected = np.array([ref_overlaps(a, b) for a, b in zip(left, right, strict=True)])
    functions = (box_numbers.iou, box_numbers.giou, box_numbers.ciou)
    found = jax.jit(lambda a, b: jnp.stack([f(a, b) for f in functions], axis=-1))(
        jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_weight_of_proportions_has_no_gradient_and_no_box_has_a_gradient_that_is_no_number():
    one, other = np.array([1.0, 2.0, 9.0, 5.0]), np.array([2.0, 1.0, 7.0, 8.0])
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(box_numbers.ciou(a, b))))
    width, height, (iou, _, ciou) = 8.0, 3.0, ref_overlaps(one, other)
    v = 4 / math.pi**2 * (math.atan(width / height) - math.atan(5 / 7)) ** 2
    alpha, step = v / (1 - iou + v), 1e-6

    def held(box: np.ndarray) -> float:
        plain = ref_overlaps(box, other)
        angle = math.atan((box[2] - box[0]) / (box[3] - box[1])) - math.atan(5 / 7)
        now = 4 / math.pi**2 * angle**2
        return plain[2] + (now / (1 - plain[0] + now) - alpha) * now

    assert held(one) == pytest.approx(ciou)
    expected = [(held(one + step * e) - held(one - step * e)) / (2 * step) for e in np.eye(4)]
    odd = np.array([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 5.0, 0.0], [2.0, 1.0, 7.0, 8.0], one])
    found = gradient(jnp.asarray(odd, jnp.float32), jnp.asarray([other] * 4, jnp.float32))
    np.testing.assert_allclose(found[3], expected, atol=1e-5)
    assert np.isfinite(found).all()


def test_focal_losses_against_their_formulas():
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(0, 3, 50), rng.uniform(0, 1, 50)
    targets[:20] = rng.integers(0, 2, 20)
    share = 1 / (1 + np.exp(-logits))
    entropy = -targets * np.log(share) - (1 - targets) * np.log(1 - share)
    right = share * targets + (1 - share) * (1 - targets)
    expected = (0.25 * targets + 0.75 * (1 - targets)) * (1 - right) ** 2 * entropy
    bins, distance = rng.normal(0, 2, (50, 8)), rng.uniform(-1, 9, 50)
    distance[:8] = np.arange(8)
    log_shares = bins - np.log(np.exp(bins).sum(axis=-1, keepdims=True))
    clamped = np.clip(distance, 0, 8 - 1.01)
    low, rows = np.floor(clamped).astype(int), np.arange(50)
    part = clamped - low
    split = -(1 - part) * log_shares[rows, low] - part * log_shares[rows, low + 1]

    @jax.jit
    def found(logits: Any, targets: Any, bins: Any, distance: Any) -> Any:
        plain = box_numbers.sigmoid_focal(logits, targets, alpha=-1.0, gamma=0.0)
        focal = box_numbers.sigmoid_focal(logits, targets)
        mean = box_numbers.expected(bins)
        return plain, focal, box_numbers.distribution_focal(bins, distance), mean

    arrays = [jnp.asarray(x, jnp.float32) for x in (logits, targets, bins, distance)]
    mean = (np.exp(log_shares) * np.arange(8)).sum(axis=-1)
    for ours, theirs in zip(found(*arrays), (entropy, expected, split, mean), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_distances_lead_to_a_box_and_back():
    cells = cells_of(2, 4, 16)  # 8 cells, 4 wide and 8 high
    assert cells[5].tolist() == [6.0, 12.0, 4.0, 8.0]
    box = np.array([1.0, 3.0, 10.0, 14.0], np.float32)
    distances = box_numbers.to_distances(jnp.asarray(cells), jnp.asarray(box))
    assert distances[5].tolist() == [5 / 4, 9 / 8, 4 / 4, 2 / 8]
    back = box_numbers.from_distances(jnp.asarray(cells), distances)
    np.testing.assert_allclose(back, np.broadcast_to(box, (8, 4)), atol=1e-5)


def test_cells_learn_the_objects_of_a_plain_reference():
    rng = np.random.default_rng(2)
    cells = cells_of(6, 6, 60)
    count, places, kinds, k = 40, 5, 3, 4
    near = rng.normal(0, 4, (count, 36, 4)) + cells[:, [0, 1, 0, 1]] + np.array([-9, -9, 9, 9])
    near[..., 2:] = np.maximum(near[..., 2:], near[..., :2] + 1)
    scores = rng.uniform(0.01, 1, (count, 36, kinds))
    objects, classes = random_boxes(rng, count, places, size=40.0), rng.integers(0, kinds, (count, places))
    there = rng.integers(0, places + 1, count)

    @jax.jit
    @jax.vmap
    def found(scores: Any, boxes: Any, objects: Any, classes: Any, there: Any) -> Any:
        candidates = inside(jnp.asarray(cells[:, :2]), objects) & (jnp.arange(places) < there)[None]
        return assign(scores, boxes, candidates, objects, classes, top_k=k)

    arrays = [jnp.asarray(x, jnp.float32) for x in (scores, near, objects)]
    result = found(*arrays, jnp.asarray(classes, jnp.int32), jnp.asarray(there, jnp.int32))
    shared = 0
    for i in range(count):
        expected, target = (
            ref_assign(scores[i], near[i], cells[:, :2], objects[i, : there[i]], classes[i, : there[i]], k)
            if there[i]
            else (np.full(36, -1), np.zeros(36))
        )
        assert np.where(result.assigned[i], result.object[i], -1).tolist() == expected.tolist()
        np.testing.assert_allclose(result.score[i], target, rtol=2e-4, atol=1e-6)
        shared += len(set(expected)) > 2
    assert shared > 10  # pictures in which objects meet


def test_an_object_smaller_than_a_cell_has_one_if_it_counts_as_large_as_that():
    cells, tiny = cells_of(4, 4, 16), jnp.asarray([[4.5, 4.5, 5.0, 5.0]])
    centres = jnp.asarray(cells[:, :2])
    assert not inside(centres, tiny).any()
    found = inside(centres, tiny, smallest=jnp.asarray([4.0, 4.0]))
    assert np.flatnonzero(found[:, 0]).tolist() == [5]


CASES, BOXES = 1000, 16


@pytest.mark.slow
def test_suppression_is_greedy_by_class_in_a_thousand_cases():
    rng = np.random.default_rng(3)
    boxes = random_boxes(rng, CASES, BOXES, size=40.0).round()
    scores = rng.integers(0, 12, (CASES, BOXES)) / 11  # many are equal, and some are no boxes
    classes, thresholds = rng.integers(0, 3, (CASES, BOXES)), rng.choice([0.0, 0.3, 0.5, 0.7], CASES)

    @jax.jit
    @jax.vmap
    def found(boxes: Any, scores: Any, classes: Any, threshold: Any) -> Any:
        stays = suppress(boxes, scores, classes, threshold=threshold)
        return stays, without_copies(Detections(boxes, scores, classes), threshold=threshold, most=5)

    arrays = jnp.asarray(boxes, jnp.float32), jnp.asarray(scores, jnp.float32)
    stays, best = found(*arrays, jnp.asarray(classes, jnp.int32), jnp.asarray(thresholds, jnp.float32))
    scores = np.asarray(arrays[1], np.float64)
    for i in range(CASES):
        kept = ref_suppress(boxes[i], scores[i], classes[i], thresholds[i])
        assert np.flatnonzero(stays[i]).tolist() == sorted(kept), i
        expected = [scores[i, k] for k in kept[:5]] + [0.0] * (5 - len(kept))
        assert best.scores[i].tolist() == pytest.approx(expected)
        assert best.boxes[i][: len(kept)].tolist() == boxes[i][kept[:5]].tolist()


def test_the_strongest_are_pairs_of_a_box_and_a_class():
    scores = jnp.asarray([[0.2, 0.9], [0.001, 0.0], [0.8, 0.5]])
    found = strongest(jnp.arange(12.0).reshape(3, 4), scores, most=5, least_score=0.1)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.5, 0.2, 0.0])
    assert found.classes.tolist()[:4] == [1, 0, 1, 0] and found.boxes[:4, 0].tolist() == [0, 8, 8, 0]


def test_a_finer_grid_takes_the_cell_under_its_centre():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    found = nearest(x, (3, 6))[0, :, :, 0]
    assert found.tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]


HEAD = Detection(("disc", "square"), size=32, most_objects=4, network=DetectorConfig(width=8, depth=1))


def labelled(boxes: Any, size: tuple[int, int] = (32, 32)) -> Sample:
    return Sample("s", (Turn("", ""),), labels={"boxes": boxes if boxes is None else Boxes(boxes, size)})


def test_labels_are_classes_and_corners():
    found = HEAD.read(labelled((Box("square", (1, 2, 8.5, 9)), Box("disc", (0, 0, 32, 32)))))
    assert found is not None and found.dtype == np.float32 and found.shape == HEAD.shape
    assert found[:2].tolist() == [[1, 1, 2, 8.5, 9], [0, 0, 0, 32, 32]] and found[2:, 0].tolist() == [-1, -1]
    nothing = HEAD.read(labelled(()))
    assert nothing is not None and (nothing[:, 0] == -1).all()  # a picture without objects is a label too
    assert HEAD.read(labelled(None)) is None


@pytest.mark.parametrize(
    ("boxes", "size", "reason", "message"),
    [
        (
            [Box("hen", (0, 0, 1, 1))],
            (32, 32),
            "unknown_label",
            "'hen' is none of the classes of head 'boxes'",
        ),
        ([Box("disc", (0, 0, 1, 1))] * 5, (32, 32), "too_many_boxes", "5 boxes, most_objects=4"),
        ([Box("disc", (3, 0, 3, 1))], (32, 32), "bad_box", "expected x0 < x1"),
        ([Box("disc", (0, 0, math.nan, 1))], (32, 32), "bad_box", "expected x0 < x1"),
        ([], (64, 32), "bad_label", r"of a picture of \(64, 32\) pixels, expected \(32, 32\)"),
    ],
)
def test_labels_that_cannot_be_used_say_why(boxes, size, reason, message):
    with pytest.raises(BadSample, match=message) as caught:
        HEAD.read(labelled(tuple(boxes), size))
    assert caught.value.reason == reason
    with pytest.raises(BadSample, match="is a str, expected boxes"):
        HEAD.read(Sample("s", (Turn("", ""),), labels={"boxes": "here"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Detection(("a", "a")), "expected one or more, all different"),
        (lambda: Detection(("a",), size=0), "size=0"),
        (lambda: Detection(("a",), gains=(1.0, -1.0, 1.0)), "gains"),
        (lambda: AssignmentConfig(top_k=0), "top_k=0"),
        (lambda: DetectorConfig(width=12), "width=12 of a detector must be a multiple of 8"),
        (lambda: DetectorConfig(levels=(1, 0)), r"levels=\(1, 0\) of a detector must rise"),
        (lambda: DetectorConfig(levels=(0, 3)).chosen((1, 2)), "the stream has 2 maps"),
        (lambda: SaidConfig(most=500), "most=500, candidates=300"),
        (lambda: SaidConfig(overlap=0.0), "overlap=0.0"),
        (lambda: HEAD.check_tile(64), "tile_size=64 differs from size=32"),
    ],
)
def test_configs_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def guesses(rng: Any, rows: int, cells: int, bins: int) -> Guesses:
    logits, distances = rng.normal(-1, 2, (rows, cells, 2)), rng.normal(0, 1, (rows, cells, 4, bins))
    return Guesses(jnp.asarray(logits, jnp.float32), jnp.asarray(distances, jnp.float32))


@pytest.mark.parametrize("bins", [1, 6])
@pytest.mark.slow
def test_the_loss_is_a_sum_over_rows_that_have_a_label(bins):
    head = dataclasses.replace(HEAD, network=DetectorConfig(width=8, reg_max=bins))
    rng, cells = np.random.default_rng(4), cells_of(8, 8, 32)
    samples = [(), (Box("disc", (2, 2, 20, 12)),), (Box("square", (1, 1, 9, 9)), Box("disc", (3, 4, 30, 31)))]
    labels = np.stack([head.read(labelled(boxes)) for boxes in (*samples, samples[1])])  # pyright: ignore
    found = Detections(jnp.zeros((4, 1, 4)), jnp.zeros((4, 1)), jnp.zeros((4, 1), jnp.int32))
    shown = Detected(
        jnp.broadcast_to(jnp.asarray(cells), (4, 64, 4)),
        guesses(rng, 4, 64, bins),
        guesses(rng, 4, 64, bins),
        found,
    )
    sums = jax.jit(lambda rows, label: head.sums(rows, label))
    present = jnp.asarray([True, True, True, False])
    loss, parts = sums(shown, Given(jnp.asarray(labels), present))
    assert set(parts) == {"box", "cls", "dfl", "one_box", "one_cls", "one_dfl"}
    gains = dict(zip(("box", "cls", "dfl"), head.gains, strict=True))
    expected = sum(gains[name.removeprefix("one_")] * float(value) for name, value in parts.items())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    single = [sums(shown, Given(jnp.asarray(labels), jnp.arange(4) == row))[1] for row in range(3)]
    for name, value in parts.items():
        assert float(value) == pytest.approx(sum(float(of[name]) for of in single), rel=1e-5), name
    # A picture without objects has nothing but classes to learn: their cross-entropy over 1.
    plain = np.logaddexp(0, np.asarray(shown.many.logits[0], np.float64)).sum()
    assert [float(single[0][name]) for name in ("box", "cls", "dfl")] == pytest.approx(
        [0, plain, 0], rel=1e-5
    )
    assert float(single[1]["box"]) > 0 and float(single[1]["dfl"]) > 0


def test_what_is_said_names_classes_and_is_drawn():
    found = Detections(np.array([[1.0, 2, 30, 31], [0, 0, 9, 9]]), np.array([0.75, 0.0]), np.array([1, 0]))
    said = HEAD.decode(Detected(np.zeros((0, 4)), Guesses(None, None), None, found))
    assert said == [{"label": "square", "score": 0.75, "box": [1.0, 2.0, 30.0, 31.0]}]
    # A tile of 32 pixels that shows 64 x 32 above a margin: four of its pixels to two of the tile's.
    cut = Cut((0, 0, 64, 64), (32, 32))
    margin = Detections(np.array([[1.0, 2, 30, 31], [0, 20, 9, 30]]), np.array([0.75, 0.5]), found.classes)
    placed = HEAD.decode_in(Detected(np.zeros((0, 4)), Guesses(None, None), None, margin), cut, (64, 32))
    assert placed == [{"label": "square", "score": 0.75, "box": [2.0, 4.0, 60.0, 32.0]}]
    blank = PilImage.new("RGB", (32, 32))
    assert np.asarray(HEAD.draw(blank, said)).any() and not np.asarray(blank).any()
    assert not np.asarray(HEAD.draw(blank, [{**said[0], "score": 0.1}])).any()


def test_a_stream_without_maps_is_refused():
    streams = {"image": Stream(jnp.zeros((1, 4, 8)), jnp.ones((1, 4), bool))}
    with pytest.raises(ValueError, match="head 'boxes': stream 'image' has no maps"):
        jax.eval_shape(functools.partial(HEAD.build().init, jax.random.key(0)), streams)


def test_the_difference_image_gives_patches():
    level = np.zeros((20, 30), np.uint8)
    level[2:5, 3:8] = 255
    level[5, 7:9] = 200  # meets the patch above
    level[15:17, 20:29] = 255
    level[10, 10] = 99  # too dark
    found = patches_of(level, 100, 0)
    assert found.boxes.tolist() == [[3, 2, 9, 6], [20, 15, 29, 17]]
    assert found.scores.tolist() == pytest.approx([24 / 600, 18 / 600])
    assert patches_of(level, 100, 2).boxes.tolist() == [[1, 0, 11, 8], [18, 13, 30, 19]]
    assert len(patches_of(level, 255, 20).boxes) == 1 and not len(patches_of(level * 0, 100, 2).boxes)
    with pytest.raises(ValueError, match="headline='mAP'"):
        FoundBoxes(headline="mAP")
    with pytest.raises(ValueError, match="difference=256"):
        FoundBoxes(difference=256)


SIDE = 48


def rectangles(count: int, size: int) -> tuple[np.ndarray, list[tuple[Box, ...]]]:
    """Grey pictures with two rectangles each, bright or dark, and where they are."""
    rng = np.random.default_rng(5)
    pictures, found = np.full((count, size, size, 3), 128, np.uint8), []
    for picture in pictures:
        boxes = []
        for half, (label, level) in enumerate((("bright", 255), ("dark", 0))):
            width, height = rng.integers(10, 20, 2)
            x, y = rng.integers(0, size // 2 - 20 + 4), rng.integers(0, size - height)
            x += half * size // 2
            picture[y : y + height, x : x + width] = level
            boxes.append(Box(label, tuple(map(float, (x, y, x + width, y + height)))))
        found.append(tuple(boxes))
    return pictures, found


@pytest.mark.slow  # a network learns, twice over
@pytest.mark.parametrize("branch", ["nms", "one_to_one"])
def test_a_tiny_network_learns_four_pictures(branch):
    pytest.importorskip("faster_coco_eval")
    pictures, objects = rectangles(4, SIDE)
    head = Detection(
        ("bright", "dark"),
        size=SIDE,
        branch=branch,
        most_objects=4,
        network=DetectorConfig(width=16, depth=1, reg_max=8),
    )
    network = ResNetConfig(
        stem_dim=8,
        stage_dims=(16, 32),
        stage_blocks=(1, 1),
        block="basic",
        image_size=SIDE,
        statistics="moving",
    )
    model = JointConfig((Tower("image", network),), (head,))
    batch = dataclasses.replace(
        model.smallest_batch(4),
        tiles=pictures[:, None],
        visual_index=np.zeros((4, 1), np.int32),
        labels={
            "boxes": Given(
                np.stack([head.read(labelled(b, (SIDE, SIDE))) for b in objects]), np.ones(4, bool)
            )
        },  # pyright: ignore
    )
    module = model.build()
    variables = nn.meta.unbox(jax.jit(lambda key: module.init(key, batch, {}))(jax.random.key(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 150))

    @jax.jit
    def step(params: Any, statistics: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            output, changed = module.apply(variables, batch, {}, mutable=["batch_stats"])
            total, parts = head.sums(output.predictions["boxes"], batch.labels["boxes"])
            return total / 4.0, (parts, changed["batch_stats"])

        (value, (_, statistics)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), statistics, state, value

    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    for _ in range(150):
        params, statistics, state, _ = step(params, statistics, state)
    found = (
        jax.jit(module.apply)({"params": params, "batch_stats": statistics}, batch, {})
        .predictions["boxes"]
        .found
    )
    scores = DetectionScores()
    for row in range(4):
        true = batch.labels["boxes"].values[row, :2].astype(np.float64)
        there = np.asarray(found.scores[row]) > 0
        said = [np.asarray(x)[row][there] for x in (found.boxes, found.classes, found.scores)]
        scores.update(true[:, 1:], true[:, 0].astype(int), said[0].astype(np.float64), *said[1:])
    assert scores.compute()["map_50"] > 0.9, scores.compute()


def test_a_picture_of_which_nothing_is_said_has_a_record():
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    of = {"id": "s", "question": "", "image": PilImage.new("RGB", (40, 20))}
    objects = np.array([[1.0, 2, 3, 10, 11]])
    record = FoundBoxes()._record(of, HEAD, objects, nothing)
    assert (record["answer"], record["prediction"], record["found"]) == ("1 square", "nothing", 0)
    assert record["image"].size == (40, 20)


class Pupil(Examinee):
    """Says of one picture what it is given, on the tile; stands where a run's model would."""

    def __init__(self, picture: PilImage.Image, label: Boxes, said: Detections, tiling: TilingConfig):
        network = ResNetConfig(stem_dim=8, stage_dims=(16, 32), stage_blocks=(1, 1), image_size=HEAD.size)
        model = JointConfig((Tower("image", network),), (HEAD,)).build()
        fields = {
            "layout": SimpleNamespace(model=model),
            "data": SimpleNamespace(tiling=tiling),
            "source": "val",
        }
        for name, value in {**fields, "picture": picture, "label": label, "said": said}.items():
            object.__setattr__(self, name, value)

    def samples(self) -> Any:
        labels = {"boxes": self.label}
        record = {"id": "s", "question": "", "labels": labels, "image": self.picture}
        in_tile = cut_labels(labels, shown(self.picture.size, self.data.tiling), self.picture.size)
        values = HEAD.read(Sample("s", (), (), labels=in_tile))
        given = Given(values[None], np.ones(1, bool))
        tile = make_tiles(self.picture, grid=(1, 1), config=self.data.tiling)
        yield [record], SimpleNamespace(labels={"boxes": given}, tiles=tile[None])

    def apply(self, compiled: Any, batch: Any) -> Detections:
        return Detections(self.said.boxes[None], self.said.scores[None], self.said.classes[None])


def scores_of(pupil: Any, **fields: Any) -> tuple[list[Any], Any]:
    run, records = FoundBoxes(**fields).run(pupil), []
    while True:
        try:
            records.append(next(run))
        except StopIteration as end:
            return records, end.value


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(96, 64), (50, 90)])
def test_scores_are_those_of_boxes_on_the_picture(fit, size):
    pytest.importorskip("faster_coco_eval")
    tiling = TilingConfig(tile_size=HEAD.size, views="global", fit=fit)
    objects = [("square", (0, 0, 14, 12)), ("disc", (20, 30, 44, 52))]  # a crop cuts the first of them off
    label = Boxes(tuple(Box(name, tuple(map(float, c))) for name, c in objects), size)
    there = [(1, (1, 0, 13, 12), 0.9), (0, (22, 29, 45, 52), 0.8), (0, (2, 30, 20, 44), 0.7)]
    on_picture = np.array([corners for _, corners, _ in there], float)
    cut = shown(size, tiling)
    on_tile = np.array([cut.move(tuple(corners)) for corners in on_picture.tolist()])
    scores, classes = np.array([s for *_, s in there]), np.array([k for k, *_ in there])
    picture = PilImage.new("RGB", size)
    records, found = scores_of(Pupil(picture, label, Detections(on_tile, scores, classes), tiling))
    expected = DetectionScores()
    true = HEAD.objects(label.boxes, "")
    expected.update(true[:, 1:], true[:, 0].astype(int), on_picture, classes, scores)
    for name, value in expected.compute().items():
        assert found.scores[name] == pytest.approx(value), name
    assert records[0]["image"].size == size and records[0]["answer"] == "1 disc, 1 square"


def test_what_a_crop_does_not_show_is_missed():
    pytest.importorskip("faster_coco_eval")
    tiling = TilingConfig(tile_size=HEAD.size, views="global", fit="crop")
    boxes = Box("square", (0.0, 10.0, 16.0, 26.0)), Box("disc", (40.0, 10.0, 56.0, 26.0))
    label = Boxes(boxes, (96, 32))
    cut = shown((96, 32), tiling)
    said = Detections(np.array([cut.move((40.0, 10.0, 56.0, 26.0))]), np.array([0.9]), np.array([0]))
    records, found = scores_of(Pupil(PilImage.new("RGB", (96, 32)), label, said, tiling))
    assert found.scores["map_50"] == pytest.approx(0.5) and records[0]["found"] == 1


def test_a_baseline_is_measured_on_the_picture_too():
    pytest.importorskip("faster_coco_eval")
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[10:30, 30:60] = 255
    label = Boxes((Box("square", (30.0, 10.0, 60.0, 30.0)),), (120, 40))
    tiling = TilingConfig(tile_size=HEAD.size, views="global", padding_colour=(0, 0, 0))
    nothing = Detections(np.zeros((1, 4)), np.zeros(1), np.zeros(1))
    pupil = Pupil(PilImage.fromarray(pixels), label, nothing, tiling)
    _, found = scores_of(pupil, difference=100, margin=0)
    assert found.scores["difference_located_map_50"] == pytest.approx(1.0)
    assert found.scores["map_50"] == 0.0
