"""Pictures with labels that lie in them: what of a record becomes which label, and what is refused."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.images.augmented import AugmentedImage, Geometry, Look
from vl_jax.data.images.spatial import Boxes, Instances, PixelMap
from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import open_source
from vl_jax.data.sources.placed import PlacedConfig

RECORD = {
    "id": "a",
    "image": "a.png",
    "boxes": [{"label": "cat", "bbox": [1, 1, 3, 3]}, {"label": "dog", "bbox": [4, 0, 6, 2]}],
    "mask": "classes.png",
    "objects": "objects.png",
    "depth": "depth.png",
    "room": "kitchen",
}
FIELDS = {"boxes": "boxes", "classes": "mask", "depth": "depth", "labels": ("room",), "void": (9,)}


@pytest.fixture
def folder(tmp_path):
    levels = np.arange(24).reshape(4, 6)
    PilImage.fromarray(np.full((4, 6, 3), 40, np.uint8)).save(tmp_path / "a.png")
    PilImage.fromarray(np.full((4, 6, 3), 100, np.uint8)).save(tmp_path / "b.png")
    PilImage.fromarray((levels % 10).astype(np.uint8)).save(tmp_path / "classes.png")
    objects = np.zeros((4, 6), np.uint8)
    objects[1:3, 1:3], objects[:2, 4:] = 1, 2
    PilImage.fromarray(objects).save(tmp_path / "objects.png")
    PilImage.fromarray((levels * 100).astype(np.uint16)).save(tmp_path / "depth.png")
    return tmp_path


def sample(folder, record=RECORD, **fields):
    (folder / "data.json").write_text(json.dumps([record]))
    return open_source(PlacedConfig("train", "data.json", **{**FIELDS, **fields}), root=str(folder))[0]


def test_each_field_is_a_label_of_its_kind(folder):
    found = sample(folder, objects="objects")
    boxes, classes, depth = (found.labels[name] for name in ("boxes", "mask", "depth"))
    assert (
        isinstance(boxes, Boxes) and [b.label for b in boxes.boxes] == ["cat", "dog"] and boxes.size == (6, 4)
    )
    assert isinstance(classes, PixelMap) and classes.missing == 255
    expected = np.arange(24).reshape(4, 6) % 10
    np.testing.assert_array_equal(classes.values(), np.where(expected == 9, 255, expected))
    np.testing.assert_allclose(depth.values(), np.arange(24).reshape(4, 6) / 10)
    assert depth.missing == 0 and found.labels["room"] == "kitchen" and found.turns[0].answer == ""
    objects = found.labels["objects"]
    assert isinstance(objects, Instances) and objects.boxes == boxes.boxes
    assert [mask.sum() for mask in objects.values()] == [4, 4] and objects.values()[1, 0, 4]
    assert pickle.loads(pickle.dumps(found)).labels["mask"].values().shape == (4, 6)


def test_objects_are_found_by_the_numbers_of_their_boxes(folder):
    boxes = [{**box, "instance": 2 - i} for i, box in enumerate(RECORD["boxes"])]
    objects = sample(folder, {**RECORD, "boxes": boxes}, objects="objects").labels["objects"]
    assert objects.values()[0, 0, 4] and objects.values()[1, 1, 1]


def test_boxes_of_another_size_are_scaled_and_clipped(folder):
    boxes = [
        {"label": "a", "bbox": [-2, 2, 6, 20]},
        {"label": "b", "bbox": [20, 20, 30, 30]},
        {"label": "c", "bbox": [0, 0, 12, 8]},
    ]
    found = sample(folder, {**RECORD, "boxes": boxes, "width": 12, "height": 8})
    assert [(b.label, b.corners) for b in found.labels["boxes"].boxes] == [
        ("a", (0.0, 1.0, 3.0, 4.0)),
        ("c", (0.0, 0.0, 6.0, 4.0)),
    ]
    assert [note.reason for note in found.notes] == ["scaled_boxes", "box_outside"]
    assert sample(folder, {**RECORD, "boxes": []}).labels["boxes"].boxes == ()


def test_a_record_without_a_mask_is_all_background_or_has_no_label(folder):
    record = {k: v for k, v in RECORD.items() if k not in ("mask", "depth")}
    assert {"mask", "depth"}.isdisjoint(sample(folder, record).labels)
    found = sample(folder, record, background=3).labels["mask"]
    np.testing.assert_array_equal(found.values(), np.full((4, 6), 3))


def test_two_pictures_become_their_difference(folder):
    found = sample(folder, {**RECORD, "image": ["a.png", "b.png"]}, pair="difference")
    assert found.images[0]().getpixel((0, 0)) == (100, 40, 60)
    last = sample(folder, {**RECORD, "image": ["a.png", "b.png"]}, pair="last").images[0]()
    assert last.convert("L").getpixel((0, 0)) == 100
    with pytest.raises(BadSample, match="needs two pictures, image names one"):
        sample(folder, pair="difference")
    PilImage.new("L", (3, 3)).save(folder / "small.png")
    with pytest.raises(BadSample, match="have no difference"):
        sample(folder, {**RECORD, "image": ["small.png", "a.png"]}, pair="difference").images[0]()


@given(
    factors=st.tuples(*[st.floats(0.1, 1.9)] * 3, st.floats(-0.5, 0.5)),
    shown=st.sampled_from([(0, 0, 1, 1), (0.2, 0.1, 0.9, 0.8), (-0.3, -0.2, 1.1, 1.2)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_difference_is_that_of_the_two_pictures_as_they_look(factors, shown, seed):
    rng = np.random.default_rng(seed)
    template = rng.integers(0, 256, (12, 16), np.uint8)
    board = np.where(rng.random((12, 16)) < 0.2, 255 - template, template)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        PilImage.fromarray(template).save(folder / "a.png")
        PilImage.fromarray(board).save(folder / "b.png")
        image = sample(folder, {**RECORD, "image": ["a.png", "b.png"]}, pair="difference").images[0]
        plain = np.asarray(image()).astype(int)
        drawn = AugmentedImage(image, Geometry(tuple(map(float, shown))), Look(*factors))()
        changed = np.asarray(drawn).astype(int)
    np.testing.assert_array_equal(changed[..., 2], np.abs(changed[..., 0] - changed[..., 1]))
    if shown == (0, 0, 1, 1):  # what is alike stays alike, and channels do not mix
        np.testing.assert_array_equal(changed[..., 2] == 0, (plain[..., 2] == 0) | (changed[..., 2] == 0))
        assert (changed[..., 2][plain[..., 2] == 0] == 0).all()
        for channel, before in ((0, plain[..., 0]), (1, plain[..., 1])):
            order = np.argsort(before.ravel(), kind="stable")
            assert (np.diff(changed[..., channel].ravel()[order]) >= 0).all()  # by level alone
    if min(shown) < 0:
        assert changed[0, 0].tolist()[2] == 0  # the margin differs from nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": 7}, "image must be a path, or a list of two"),
        ({"image": ""}, "image must be a path"),
        ({"boxes": 3}, "boxes must be a list"),
        ({"boxes": [{"bbox": [1, 2, 3]}]}, r"boxes\[0\] needs bbox: four finite numbers"),
        ({"boxes": [{"bbox": [3, 0, 1, 1]}]}, "needs x0 <= x1"),
        ({"mask": ["a"]}, "mask must be a path"),
        ({"mask": "../a.png"}, "leaves the mask folder"),
        ({"mask": "gone.png"}, "no image file"),
        ({"mask": "a.png"}, r"has colours \(RGB\)"),
        ({"mask": "small.png"}, r"a map of \[3, 3\] pixels, its picture is 4 x 6"),
        ({"width": 9, "height": 9}, "which is not the shape of the picture"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder, change, message):
    PilImage.new("L", (3, 3)).save(folder / "small.png")
    with pytest.raises(BadSample, match=message) as error:
        sample(folder, {**RECORD, **change}).labels["mask"].values()
    assert "\n" not in str(error.value)


def test_an_object_outside_the_picture_is_left_out_and_the_others_keep_their_masks(folder):
    boxes = [{"label": "far", "bbox": [20, 20, 30, 30]}, *RECORD["boxes"]]
    boxes = [{**box, "instance": number} for number, box in enumerate(boxes)]
    found = sample(folder, {**RECORD, "boxes": boxes}, objects="objects")
    objects = found.labels["objects"]
    assert [box.label for box in objects.boxes] == ["cat", "dog"] and objects.values()[1, 0, 4]
    assert [note.reason for note in found.notes] == ["box_outside"]


def test_a_field_that_no_record_has_is_named(folder):
    with pytest.raises(BadSample, match="no field 'box'.*boxes"):
        sample(folder, boxes="box")
    with pytest.raises(ValueError, match="objects='o' needs boxes"):
        PlacedConfig("train", "data.json", objects="o")
    with pytest.raises(ValueError, match="depth_levels=0.0"):
        PlacedConfig("train", "data.json", depth_levels=0.0)
