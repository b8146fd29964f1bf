"""Metrics of boxes, masks and depth: values worked by hand, definitions, and what the packages say."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from vl_jax.evaluate.metrics.pixels.boxes import BoxAccuracy, BoxScores, box_iou, first_box
from vl_jax.evaluate.metrics.pixels.depth import DepthScores
from vl_jax.evaluate.metrics.pixels.detection import DetectionScores
from vl_jax.evaluate.metrics.pixels.segmentation import MaskScores, SegmentationScores

CASES = 1000


def boxes(rng: np.random.Generator, count: int, size: int = 200) -> np.ndarray:
    corners = np.sort(rng.integers(0, size, size=(count, 2, 2)), axis=1).astype(np.float64)
    corners[:, 1] += 1
    return corners.reshape(count, 4)


# One box.


def test_overlaps_worked_by_hand():
    one = np.array([[0, 0, 2, 2], [5, 5, 5, 5]], np.float64)
    two = np.array([[1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [5, 5, 5, 5]], np.float64)
    assert box_iou(one, two).tolist() == [[1 / 7, 1, 0, 0], [0, 0, 0, 0]]


def test_overlaps_are_those_of_pycocotools_and_stretching_changes_nothing():
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    one, two = boxes(rng, 40), boxes(rng, CASES // 40)
    width_height = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1) for b in (one, two)]
    expected = masks.iou(*width_height, [0] * len(two))
    assert box_iou(one, two) == pytest.approx(expected) and (expected > 0).mean() > 0.1
    stretch = np.array([3.0, 0.5, 3.0, 0.5])
    assert box_iou(one * stretch, two * stretch) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<|ref|>the dog<|/ref|><|det|>[[1, 2, 30, 40], [0, 0, 9, 9]]<|/det|>", (1, 2, 30, 40)),
        ("It is at [0.1, 0.2,0.3 , 0.4], or [1, 1, 2, 2].", (0.1, 0.2, 0.3, 0.4)),
        ("[[12, 40, 503, 999]]", (12, 40, 503, 999)),
        ("<|det|>[[30, 2, 1, 40]]<|/det|>", None),  # inside out
        ("[3, 0, 1, 4]", None),
        ("[1, 2, 3]", None),
        ("on the left", None),
    ],
)
def test_the_first_box_of_a_text(text, box):
    assert first_box(text) == box


def test_box_accuracy_worked_by_hand():
    metric = BoxAccuracy().start()
    truth = "<|det|>[[0, 0, 100, 100]]<|/det|>"
    for said in ("[0, 0, 100, 50]", "[0, 0, 100, 49]", "nowhere", "<|det|>[[0, 0, 100, 100]]<|/det|>"):
        metric.update(truth, said, cluster="picture")
    expected = {"box_accuracy": 0.5, "box_accuracy_iou": 1.99 / 4, "box_accuracy_malformed": 0.25}
    assert metric.compute() == pytest.approx(expected)  # half is enough
    numbers = BoxScores()
    for said in ([0, 0, 1, 0.5], [0, 0, 1, 0.49], None, [0, 0, 1, 1]):
        numbers.update([0, 0, 1, 1], said)
    assert numbers.compute() == pytest.approx(expected)
    numbers.update([0, 0, 1, 1], [0, 0, np.nan, 1])
    assert numbers.samples()["box_accuracy_malformed"].values.tolist() == [0, 0, 1, 0, 1]
    for wrong in ([0, 0, 0, 1], [0, 0, 1], [0, 0, np.inf, 1]):
        with pytest.raises(ValueError, match=r"sample 5: true box \(.*: expected x0 < x1 and y0 < y1"):
            numbers.update(wrong, None)
    with pytest.raises(ValueError, match="sample 4: reference 'left': expected one text with a box"):
        metric.update("left", "[0, 0, 1, 1]")


# Many boxes.


def test_average_precision_worked_by_hand():
    pytest.importorskip("faster_coco_eval")
    truth = np.array([[0, 0, 50, 50], [100, 100, 150, 150]], np.float64)
    said = np.array([truth[0], [200, 200, 250, 250], truth[1]], np.float64)
    scores = DetectionScores()
    scores.update(truth, np.array([0, 0]), said, np.array([0, 0, 0]), np.array([0.9, 0.8, 0.7]))
    found = scores.compute()
    # The best precision is 1 at the 51 recalls up to half, and 2 / 3 at the other 50, whatever the overlap.
    expected = (51 + 50 * 2 / 3) / 101
    assert [found[name] for name in ("map", "map_50", "map_medium")] == pytest.approx([expected] * 3)
    assert found["recall_1"] == 0.5 and found["recall_100"] == 1
    assert "map_small" not in found and "map_large" not in found  # there are none
    assert scores.by_class() == {0: pytest.approx({"map": expected, "map_50": expected})}
    # A third of a box is enough at 0.33, and at no overlap of COCO's.
    wide = DetectionScores()
    wide.update(truth[:1], np.array([2]), np.array([[25.0, 0, 75, 50]]), np.array([2]), np.array([1.0]))
    assert wide.at(0.33) == pytest.approx(1) and wide.at(0.34) == 0
    assert wide.by_class() == {2: {"map": 0.0, "map_50": 0.0}}
    # A class without a true box counts for nothing; a class without a detection counts as 0.
    more = np.array([3, 3, 3])
    scores.update(truth[:1], np.array([1]), said, more, np.array([0.9, 0.8, 0.7]))
    assert scores.compute()["map"] == pytest.approx(expected / 2)


def test_nothing_detected_is_worth_nothing_and_nothing_to_detect_is_refused():
    pytest.importorskip("faster_coco_eval")
    none, no_labels, no_scores = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    scores = DetectionScores()
    one = np.array([[0.0, 0.0, 9.0, 9.0]])
    with pytest.raises(ValueError, match=r"mAP: no true box in 0 picture\(s\)"):
        scores.compute()
    scores.update(one, np.array([0]), none, no_labels, no_scores, crowd=np.array([True]))
    with pytest.raises(ValueError, match=r"mAP: no true box in 1 picture\(s\)"):
        scores.compute()
    scores.update(one, np.array([0]), none, no_labels, no_scores)
    found = scores.compute()
    assert found["map"] == found["map_small"] == found["recall_100"] == 0
    with pytest.raises(ValueError, match="picture 2: detected box .*: expected x0 <= x1 and y0 <= y1"):
        scores.update(one, np.array([0]), one[:, ::-1], np.array([0]), np.array([1.0]))
    with pytest.raises(ValueError, match="picture 2: boxes, labels and scores differ in length"):
        scores.update(one, np.array([0]), one, np.array([0, 1]), np.array([1.0]))
    with pytest.raises(ValueError, match="picture 2: a score is not finite"):
        scores.update(one, np.array([0]), one, np.array([0]), np.array([np.nan]))


@pytest.mark.slow
def test_mean_average_precision_is_that_of_pycocotools():
    pytest.importorskip("faster_coco_eval")
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    rng, images = np.random.default_rng(0), 50
    for _ in range(CASES // images):
        scores, truths, said = DetectionScores(), [], []
        for image in range(images):
            true = boxes(rng, int(rng.integers(0, 5)))
            labels, crowd = rng.integers(0, 3, len(true)), rng.random(len(true)) < 0.1
            near = true[rng.random(len(true)) < 0.8]
            found = np.concatenate(
                [np.maximum(near + rng.integers(-6, 7, size=near.shape), 0), boxes(rng, 1)]
            )
            found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
            said_labels = rng.integers(0, 3, len(found))
            certain = rng.permutation(len(found) * images)[: len(found)] / 1000 + image / 1e6
            scores.update(true, labels, found, said_labels, certain, crowd=crowd)
            for target, corners, classes in ((truths, true, labels), (said, found, said_labels)):
                for row, (box, label) in enumerate(zip(corners, classes, strict=True)):
                    width, height = box[2:] - box[:2]
                    entry = {"image_id": image + 1, "category_id": int(label), "area": width * height}
                    entry |= {"bbox": [*box[:2], width, height]}
                    entry |= {"score": certain[row]} if target is said else {"iscrowd": int(crowd[row])}
                    target.append(entry | {"id": len(target) + 1})
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = {
                "images": [{"id": i + 1} for i in range(images)],
                "categories": [{"id": i} for i in range(3)],
                "annotations": truths,
            }
            truth.createIndex()
            expected = cocoeval.COCOeval(truth, truth.loadRes(said), "bbox")
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
        found = scores.compute()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "recall_1", "recall_10")
        assert [found.get(name, -1) for name in names] == pytest.approx(expected.stats[:8], abs=1e-9)


# Pixels.


def test_mean_iou_worked_by_hand():
    scores = SegmentationScores(3)
    with pytest.raises(ValueError, match="pixel_accuracy: no sample to score"):
        scores.compute()
    scores.update(np.array([[0, 0], [1, 255]]), np.array([[0, 1], [1, 7]]))
    # Of class 0 one pixel in common of two, and of class 1 too; class 2 is nowhere; 255 does not count.
    assert scores.compute() == pytest.approx({"mean_iou": 0.5, "pixel_accuracy": 2 / 3})
    assert scores.by_class()[:2].tolist() == [0.5, 0.5] and np.isnan(scores.by_class()[2])
    with pytest.raises(ValueError, match="picture 1: prediction 7 is no class; expected 0 to 2"):
        scores.update(np.array([[0]]), np.array([[7]]))
    with pytest.raises(ValueError, match="picture 1: truth -1 is no class"):
        scores.update(np.array([[-1]]), np.array([[0]]))
    nothing = SegmentationScores(2)
    nothing.update(np.array([[255]]), np.array([[0]]))
    with pytest.raises(ValueError, match=r"mIoU: no pixel of 1 picture\(s\) counts"):
        nothing.compute()


def test_iou_by_class_is_the_jaccard_score_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, truths, said = SegmentationScores(CASES, ignore=-1), [], []
    for _ in range(20):
        truth = rng.integers(0, CASES, size=(20, 10))
        prediction = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, CASES, size=truth.shape))
        scores.update(truth, prediction)
        truths, said = [*truths, *truth.ravel()], [*said, *prediction.ravel()]
    expected = metrics.jaccard_score(truths, said, labels=range(CASES), average=None, zero_division=0)
    assert np.nan_to_num(scores.by_class()) == pytest.approx(expected) and (expected > 0).mean() > 0.5


def test_masks_worked_by_hand():
    full, half, empty = (np.array([[a, b]]) for a, b in ((True, True), (True, False), (False, False)))
    wide = np.ones((1, 8), bool)
    scores = MaskScores()
    for truth, said in ((full, half), (wide, wide), (empty, empty), (empty, half)):
        scores.update(truth, said, cluster="picture")
    assert scores.compute() == pytest.approx({"giou": (0.5 + 1 + 1 + 0) / 4, "ciou": (1 + 8) / (2 + 8 + 1)})
    assert scores.samples()["ciou"].by_cluster()[1].tolist() == [11]
    with pytest.raises(ValueError, match=r"sample 4: truth \(1, 2\), prediction \(1, 8\)"):
        scores.update(full, wide)


# Depth.

TRUTH, SAID = np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 1.0, 8.0]])


def test_depth_worked_by_hand():
    scores = DepthScores()
    scores.update(TRUTH, SAID)
    third, log2 = 1 / 3, np.log10(2)
    assert scores.compute() == pytest.approx(
        {
            **{"abs_rel": 0.5, "sq_rel": 1.5, "mse": 17 / 3, "rmse": np.sqrt(17 / 3), "log10": 2 * log2 / 3},
            **{"delta_1": third, "delta_2": third, "delta_3": third},
        }
    )


def test_the_names_of_depth_errors_say_what_counts_and_what_was_fitted():
    capped = DepthScores(cap=3)
    capped.update(TRUTH, SAID)  # the pixel at 4 does not count
    assert capped.compute()["abs_rel_cap3"] == pytest.approx(0.25)
    median = DepthScores(alignment="median")
    median.update(TRUTH, SAID * 7)  # all predictions times 2 / 7
    assert median.compute()["abs_rel_median"] == pytest.approx((1 + 0 + 3) / 3)
    fitted = DepthScores(alignment="least_squares", cap=10)
    fitted.update(TRUTH, 5 - 3 * TRUTH)
    assert fitted.compute()["abs_rel_least_squares_cap10"] == pytest.approx(0, abs=1e-9)
    masked = DepthScores()
    masked.update(np.array([[1.0, np.nan, 0.0]]), np.array([[2.0, 1.0, 1.0]]), valid=np.ones((1, 3), bool))
    assert masked.compute()["delta_3"] == 0 and masked.compute()["abs_rel"] == 1


def test_a_mean_over_pictures_is_not_the_mean_over_pixels():
    each, pooled = DepthScores(), DepthScores(pooled=True)
    for scores in (each, pooled):
        scores.update(TRUTH, SAID)
        scores.update(TRUTH[:, :1], TRUTH[:, :1])
    found, together = each.compute(), pooled.compute()
    assert found["abs_rel"] == pytest.approx(0.25) and found["rmse"] == pytest.approx(np.sqrt(17 / 3) / 2)
    assert together["abs_rel_pooled"] == pytest.approx(1.5 / 4)
    assert together["rmse_pooled"] == pytest.approx(np.sqrt(17 / 4))
    assert "rmse_pooled" not in pooled.samples() and each.samples()["rmse"].score == found["rmse"]


def test_depth_errors_are_those_of_their_definition():
    truth, said = np.random.default_rng(0).uniform(0.5, 9, size=(2, CASES, 3))
    relative, ratio = abs(truth / said - 1) * said / truth, np.exp(abs(np.log(truth) - np.log(said)))
    scores = DepthScores()
    for case in range(CASES):
        scores.update(truth[case, None], said[case, None])
    found = scores.samples()
    assert found["abs_rel"].values == pytest.approx(relative.mean(axis=1))
    assert found["rmse"].values == pytest.approx(np.linalg.norm(truth - said, axis=1) / np.sqrt(3))
    assert found["log10"].values == pytest.approx(np.log10(ratio).mean(axis=1))
    assert found["delta_2"].values == pytest.approx((ratio < 1.5625).mean(axis=1))


@pytest.mark.parametrize(
    ("truth", "said", "message"),
    [
        (TRUTH, SAID[:, :2], "picture 0: truth, prediction and mask differ in shape"),
        (TRUTH * 0, SAID, "picture 0: no pixel of 3 counts"),
        (TRUTH, SAID * np.nan, "picture 0: 3 predicted depths are not finite"),
    ],
)
def test_depths_that_cannot_be_scored_are_named(truth, said, message):
    with pytest.raises(ValueError, match=message):
        DepthScores().update(truth, said)


def test_limits_of_depth_have_to_be_in_order():
    with pytest.raises(ValueError, match="floor=2, cap=1: expected 0 < floor < cap"):
        DepthScores(floor=2, cap=1)
