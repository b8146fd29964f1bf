"""Labels that lie in a picture: they are where the tile, a crop and a mirror show what they belong to."""

from __future__ import annotations

import pickle
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.images.augment import AugmentationConfig, augment
from vl_jax.data.images.spatial import Boxes, Cut, Instances, PixelMap, cut_labels, in_picture, whole
from vl_jax.data.images.tiling import TilingConfig, make_tiles, shown
from vl_jax.data.sample import BadSample, Box, Sample, image_size

SIDES = st.integers(1, 90)


class Drawn:
    """A picture that is there already."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __call__(self) -> PilImage.Image:
        return PilImage.fromarray(self.pixels)

    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]


class Held:
    def __init__(self, values: np.ndarray):
        self.values = values

    def __call__(self) -> np.ndarray:
        return self.values


def painted(width: int, height: int, corners: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = corners
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    return pixels


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@given(width=st.integers(20, 90), height=st.integers(20, 90), side=st.integers(24, 70), data=st.data())
@settings(max_examples=60)
def test_a_box_is_where_the_tile_shows_it(fit: Literal["pad", "crop", "stretch"], width, height, side, data):
    x0, y0 = data.draw(st.integers(0, width - 12)), data.draw(st.integers(0, height - 12))
    corners = x0, y0, data.draw(st.integers(x0 + 12, width)), data.draw(st.integers(y0 + 12, height))
    tiling = TilingConfig(tile_size=side, views="global", fit=fit, padding_colour=(0, 0, 0))
    picture = PilImage.fromarray(painted(width, height, corners))
    bright = make_tiles(picture, grid=(1, 1), config=tiling)[0, :, :, 0] >= 128
    cut = shown(picture.size, tiling)
    found = Boxes((Box("a", corners),), picture.size).cut(cut)
    if not bright.any():  # cut off, or too thin a strip of it is left to be bright
        assert all(min(x1 - x0, y1 - y0) < 1.5 for x0, y0, x1, y1 in (box.corners for box in found.boxes))
        return
    rows, columns = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
    seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    np.testing.assert_allclose(found.boxes[0].corners, seen, atol=1.0)
    mask = PixelMap(Held(painted(width, height, corners)[:, :, 0]), picture.size, 0).cut(cut).values()
    assert np.mean((mask > 0) != bright) < 4.0 * (sum(bright.shape)) / bright.size


@given(data=st.data(), mirrored=st.booleans())
def test_what_is_moved_can_be_moved_back(data, mirrored):
    numbers = st.floats(-50, 50, allow_subnormal=False)
    left, top = data.draw(numbers), data.draw(numbers)
    right, bottom = left + data.draw(st.floats(1, 90)), top + data.draw(st.floats(1, 90))
    cut = Cut((left, top, right, bottom), (data.draw(SIDES), data.draw(SIDES)), mirrored)
    corners = tuple(data.draw(numbers) for _ in range(4))
    np.testing.assert_allclose(cut.back(cut.move(corners)), corners, atol=1e-6)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@given(width=st.integers(1, 6000), height=st.integers(1, 6000), side=st.integers(8, 1024), data=st.data())
def test_a_box_comes_back_from_the_tile(fit: Literal["pad", "crop", "stretch"], width, height, side, data):
    xs = sorted(data.draw(st.floats(0, width, allow_subnormal=False)) for _ in range(2))
    ys = sorted(data.draw(st.floats(0, height, allow_subnormal=False)) for _ in range(2))
    corners = np.array([[xs[0], ys[0], xs[1], ys[1]]])
    cut = shown((width, height), TilingConfig(tile_size=side, views="global", fit=fit))
    on_tile = np.array([cut.move((xs[0], ys[0], xs[1], ys[1]))])
    np.testing.assert_allclose(in_picture(cut, on_tile, (width, height)), corners, atol=1e-4)
    beyond = in_picture(cut, np.array([[-9.0, -9, 2 * side, 2 * side]]), (width, height))[0]
    assert (beyond[:2] >= 0).all() and beyond[2] <= width and beyond[3] <= height


def test_a_cut_by_hand():
    label = PixelMap(Held(np.arange(6, dtype=np.uint8).reshape(2, 3)), (3, 2), 255)
    beyond = label.cut(Cut((1, -1, 5, 1), (4, 2)))  # two columns and a row are outside
    np.testing.assert_array_equal(beyond.values(), [[255] * 4, [1, 2, 255, 255]])
    mirrored = label.cut(Cut((0, 0, 3, 2), (3, 2), True))
    np.testing.assert_array_equal(mirrored.values(), [[2, 1, 0], [5, 4, 3]])
    boxes = Boxes((Box("a", (0, 0, 1, 1)), Box("b", (2, 0, 3, 2))), (3, 2))
    assert boxes.cut(Cut((1, 0, 3, 2), (4, 4))).boxes == (Box("b", (2.0, 0.0, 4.0, 4.0)),)
    assert boxes.cut(Cut((0, 0, 3, 2), (3, 2), True)).boxes[0] == Box("a", (2.0, 0.0, 3.0, 1.0))


def test_an_object_keeps_its_mask():
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :2, :2], masks[1, 2:, 4:] = True, True
    label = Instances((Box("a", (0, 0, 2, 2)), Box("b", (4, 2, 6, 4))), Held(masks), (6, 4))
    found = label.cut(Cut((3, 0, 6, 4), (3, 4)))
    assert [box.label for box in found.boxes] == ["b"]
    np.testing.assert_array_equal(found.values(), masks[1:, :, 3:])
    gone = label.cut(Cut((2, 0, 4, 2), (2, 2)))
    assert gone.boxes == () and gone.values().shape == (0, 2, 2)


def test_an_object_without_a_pixel_left_is_dropped():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :2, :8], masks[1, 4:8, :8] = (
        True,
        True,
    )  # the box of the first reaches further down than its mask
    boxes = Box("top", (0, 0, 8, 6)), Box("low", (0, 4, 8, 8))
    found = Instances(boxes, Held(masks), (8, 8)).cut(Cut((0, 3, 8, 8), (8, 5)))
    assert [box.label for box in found.boxes] == ["low"]
    np.testing.assert_array_equal(found.values(), masks[1:, 3:])
    thin = np.zeros((1, 1, 64), bool)
    thin[0, 0, 5] = True
    far = Instances((Box("dot", (5, 0, 6, 1)),), Held(thin), (64, 1)).cut(Cut((0, 0, 64, 1), (4, 1)))
    assert far.boxes == () and far.values().shape == (0, 1, 4)


@given(data=st.data())
@settings(max_examples=60)
def test_what_a_crop_keeps_can_be_seen_and_keeps_its_share(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    width, height = data.draw(st.integers(4, 40)), data.draw(st.integers(4, 40))
    low = rng.integers(0, (width - 2, height - 2), (4, 2))
    high = low + 1 + (rng.random((4, 2)) * (np.array([width, height]) - low)).astype(int)
    boxes, masks = [], np.zeros((4, height, width), bool)
    high = np.minimum(high, (width, height))
    for mask, (x0, y0), (x1, y1) in zip(masks, low.tolist(), high.tolist(), strict=True):
        boxes.append(Box("a", (float(x0), float(y0), float(x1), float(y1))))
        mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.2
    left, top = rng.uniform(-5, width - 2), rng.uniform(-5, height - 2)
    cut = Cut((left, top, left + rng.uniform(2, 40), top + rng.uniform(2, 40)), (int(rng.integers(1, 30)), 9))
    share = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    found = Instances(tuple(boxes), Held(masks), (width, height)).cut(cut, share)
    values = found.values()
    assert values.any(axis=(1, 2)).all() and len(values) == len(found.boxes)
    for box in found.boxes:
        x0, y0, x1, y1 = box.corners
        assert 0 <= x0 < x1 <= cut.size[0] and 0 <= y0 < y1 <= cut.size[1]
    moved = [cut.move(box.corners) for box in boxes]
    kept = 0
    for box in moved:
        clip = np.clip(box, 0, [*cut.size, *cut.size])
        visible, area = ((b[2] - b[0]) * (b[3] - b[1]) for b in (clip, box))
        kept += visible > 0 and visible >= share * area
    assert len(found.boxes) <= kept


def test_objects_that_augmentation_cuts_off_are_noted():
    labels = {"where": Boxes((Box("near", (20, 10, 40, 30)), Box("far", (58, 38, 60, 40))), (60, 40))}
    sample, notes = Sample("s", (), (Drawn(painted(60, 40, (10, 8, 30, 30))),), labels=labels), []
    for number in range(20):
        drawn = augment(sample, AugmentationConfig(crop=0.4), np.random.default_rng(number), length=len)
        assert bool(drawn.notes) == (len(drawn.labels["where"].boxes) < 2)
        notes += map(str, drawn.notes)
    message = "sample s: augmentation cuts off 1 of 2 objects [object_cut_off]"
    assert message in notes and len(notes) < 20


def test_labels_go_from_one_process_to_another():
    label = PixelMap(Held(np.ones((2, 2))), (2, 2), 0).cut(Cut((0, 0, 1, 1), (2, 2)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(label)).values(), np.ones((2, 2)))


def test_augmentation_moves_labels_as_it_moves_the_picture():
    pixels = painted(60, 40, (10, 8, 30, 30))
    labels = {
        "where": Boxes((Box("a", (10, 8, 30, 30)), Box("far", (58, 38, 60, 40))), (60, 40)),
        "map": PixelMap(Held(pixels[:, :, 0]), (60, 40), 7),
        "class": "box",
    }
    sample, lost = Sample("s", (), (Drawn(pixels),), labels=labels), 0
    for number in range(20):
        config = AugmentationConfig(crop=0.4, flip_rate=0.5)
        drawn = augment(sample, config, np.random.default_rng(number), length=len)
        bright = np.asarray(drawn.images[0]())[:, :, 0] >= 128
        rows, columns = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
        found = {box.label: box.corners for box in drawn.labels["where"].boxes}
        if "a" in found:
            seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            np.testing.assert_allclose(found["a"], seen, atol=1.5)
        lost += "far" not in found
        assert np.mean((drawn.labels["map"].values() == 255) != bright) < 0.1
        assert drawn.labels["class"] == "box" and image_size(drawn.images[0]) == (60, 40)
    assert 0 < lost < 20


def test_what_cannot_be():
    with pytest.raises(BadSample, match=r"label 'map' is of \(3, 2\) pixels, its picture of \(4, 2\)"):
        cut_labels({"map": Boxes((), (3, 2))}, Cut((0, 0, 4, 2), (4, 2)), (4, 2))
    with pytest.raises(BadSample, match=r"a map of \[3, 2\] pixels, its picture is 2 x 3"):
        PixelMap(Held(np.zeros((3, 2))), (3, 2), 0).values()
    with pytest.raises(BadSample, match="0 masks of 1 objects"):
        Instances((Box("a", (0, 0, 1, 1)),), Held(np.zeros((0, 2, 3))), (3, 2)).values()
    with pytest.raises(BadSample, match="expected x0 <= x1"):
        whole(Boxes((Box("a", (2, 0, 1, 1)),), (3, 2)))
    with pytest.raises(BadSample, match="bad_box"):
        whole(Boxes((Box("a", (0, 0, float("nan"), 1)),), (3, 2)))
    kept = whole(Boxes((Box("a", (-1, -1, 2, 2)), Box("b", (5, 5, 9, 9))), (3, 2)))
    assert kept.boxes == (Box("a", (0.0, 0.0, 2.0, 2.0)),)
