"""Drawn pictures: the same everywhere, and labels that say exactly what is seen."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vl_jax.data.sources.scene_text import SHAPE_NAMES
from vl_jax.data.sources.synthesis import layers
from vl_jax.data.sources.synthesis.boards import DEFECTS, SyntheticBoards, SyntheticBoardsConfig
from vl_jax.data.sources.synthesis.camera import CameraConfig
from vl_jax.data.sources.synthesis.scenes import SyntheticScenes, SyntheticScenesConfig

STILL = CameraConfig(lighting=0, blur=0, noise=0, compression=0)
MOVING = SyntheticScenesConfig("moving", motion=5.0)
SEEDS = st.integers(0, 10**6)


def digest(*arrays) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def test_pictures_and_labels_are_the_stored_ones_in_any_order():
    scenes, boards = SyntheticScenes(MOVING), SyntheticBoards(SyntheticBoardsConfig("boards"))
    found = []
    for index in (7, 3):
        scene, board = scenes[index], boards[index]
        maps = (scene.labels["classes"].read(), scene.labels["depth"].read(), scene.labels["flow"]())
        found.append(digest(scene.images[0](), scene.media["second"](), *maps))
        found.append(digest(*(image() for image in board.images), board.labels["classes"].read()))
    assert found == STORED


STORED = ["1ee1de575718463c", "8edc7f1b2288c899", "549f688c0dff7482", "015c4f46b2ed0a85"]


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.sampled_from((16, 61, 128)))
@example(34, 16)  # an object is behind others whole
def test_boxes_bound_what_is_seen_and_masks_agree_with_classes_and_depth(seed, size):
    config = SyntheticScenesConfig("s", seed=seed, image_size=size, max_objects=9)
    sample = SyntheticScenes(config)[0]
    instances, classes = sample.labels["instances"], sample.labels["classes"].read()
    masks, depth = instances.masks(), sample.labels["depth"].read()
    assert sample.labels["boxes"].boxes == instances.boxes
    assert not (masks.sum(0) > 1).any()
    np.testing.assert_array_equal(masks.any(0), classes > 0)
    distances = []
    for box, mask in zip(instances.boxes, masks, strict=True):
        rows, columns = np.nonzero(mask)
        assert box.corners == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (classes[mask] == 1 + SHAPE_NAMES.index(box.label)).all()
        (distance,) = set(depth[mask].tolist())
        distances.append(distance)
    assert distances == sorted(distances, reverse=True)
    world = sample.images[0].world
    ground = 1 / layers.ground_nearness(world)
    assert (depth <= ground[:, None] * 1.0001).all()
    for number, thing in enumerate(world.objects):
        alone = layers.cover(dataclasses.replace(world, things=(thing,))) > 0
        assert (depth[alone] <= distances[number]).all()  # what hides a part of it is nearer


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.floats(0.5, 8))
def test_the_second_frame_moved_back_is_the_first_one(seed, motion):
    config = SyntheticScenesConfig("s", seed=seed, motion=motion, shadow=0, camera=STILL)
    sample = SyntheticScenes(config)[0]
    first, second = np.asarray(sample.images[0](), float), sample.media["second"]().astype(float)
    right, down, seen = np.moveaxis(sample.labels["flow"](), -1, 0)
    y, x = np.mgrid[: len(first), : len(first)]
    x, y = (x + right)[seen > 0], (y + down)[seen > 0]
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    p, q = (x - column)[:, None], (y - row)[:, None]
    after, below = np.minimum(column + 1, 127), np.minimum(row + 1, 127)
    moved = (second[row, column] * (1 - p) + second[row, after] * p) * (1 - q)
    moved += (second[below, column] * (1 - p) + second[below, after] * p) * q
    error = np.abs(moved - first[seen > 0]).max(-1)
    still = np.abs(second - first).max(-1)[seen > 0]
    assert (seen > 0).mean() > 0.5
    assert np.median(error) < 3
    assert error.mean() < max(0.6 * still.mean(), 4)


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.sampled_from((64, 100, 160)))
def test_boards_differ_from_their_templates_in_the_defects_only(seed, size):
    config = SyntheticBoardsConfig("b", seed=seed, image_size=size, pitch=(10, 16), camera=STILL)
    sample = SyntheticBoards(config)[0]
    tested, whole = (np.asarray(image())[..., 0] for image in sample.images)
    instances, classes = sample.labels["instances"], sample.labels["classes"].read()
    masks = instances.masks()
    np.testing.assert_array_equal(tested != whole, masks.any(0))
    for box, mask in zip(instances.boxes, masks, strict=True):
        rows, columns = np.nonzero(mask)
        x0, y0, x1, y1 = box.corners
        assert 0 <= x0 <= columns.min() <= columns.max() < x1 <= size
        assert 0 <= y0 <= rows.min() <= rows.max() < y1 <= size
        assert (classes[mask] == 1 + DEFECTS.index(box.label)).all()
        gains = box.label in ("short circuit", "spur", "spurious copper")
        assert ((tested[mask] == 0) == gains).all()


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.integers(0, 3))
def test_a_board_may_come_as_its_difference_from_a_template_some_pixels_off(seed, shift):
    config = SyntheticBoardsConfig("b", seed=seed, image_size=80, pitch=(10, 16), camera=STILL, shift=shift)
    pair = SyntheticBoards(config)[0]
    joined = SyntheticBoards(dataclasses.replace(config, template="difference", questions=False))[0]
    assert joined.labels["boxes"] == pair.labels["boxes"]
    assert [(turn.question, turn.kind) for turn in joined.turns] == [("<image>\n", "text")]
    tested, whole = (np.asarray(image())[..., 0].astype(int) for image in pair.images)
    (picture,) = (np.asarray(image()) for image in joined.images)
    np.testing.assert_array_equal(picture, np.stack([tested, whole, abs(tested - whole)], -1))
    straight = np.asarray(SyntheticBoards(dataclasses.replace(config, shift=0))[0].images[1]())[..., 0]
    inner, places = 80 - 2 * shift, range(2 * shift + 1)
    moved = [straight[y : y + inner, x : x + inner] for y in places for x in places]
    seen = whole[shift : shift + inner, shift : shift + inner]
    assert any((seen == part).all() for part in moved)


@pytest.mark.slow
def test_every_kind_of_defect_is_drawn():
    for kind in DEFECTS:
        source = SyntheticBoards(SyntheticBoardsConfig("b", kinds=(kind,), min_defects=2))
        assert {box.label for i in range(8) for box in source[i].labels["boxes"].boxes} == {kind}


@pytest.mark.parametrize(
    "bad", [{"motion": 99.0}, {"kinds": ("word",)}, {"max_objects": 0}, {"texture": 2.0}]
)
def test_what_cannot_be_drawn_is_said_in_one_line(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.* of source 's': must") as error:
        SyntheticScenesConfig("s", **bad)
    assert "\n" not in str(error.value)
