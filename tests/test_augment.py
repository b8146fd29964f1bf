"""Augmented samples: what the text says of the picture stays true, and lengths stay what they were."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from PIL import ImageDraw
from test_packed import CONFIG as PACKED
from test_pipeline import CONFIG, SPEC, assert_same

from vl_jax import config as config_lib
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.augment import AugmentationConfig, augment
from vl_jax.data.images.augmented import MARGIN, AugmentedImage, Geometry, Look
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Box, FileImage, Sample, Turn
from vl_jax.data.stream.evaluation_prompts import evaluation_prompts
from vl_jax.data.stream.packed import PackedIterator
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.data.text import grounding
from vl_jax.data.text.tokenizer import load_tokenizer
from vl_jax.data.tools.preview import render_samples, to_html

TOKENIZER = load_tokenizer()
COLOURS = {"red": (220, 0, 0), "green": (0, 220, 0), "blue": (0, 0, 220)}
STRONG = AugmentationConfig(crop=0.5, flip_rate=0.5, min_visible=0.5)
EVERYTHING = AugmentationConfig(brightness=0.4, contrast=0.4, saturation=0.4, crop=0.3, flip_rate=0.5)


def length(text: str) -> int:
    return len(TOKENIZER.encode(text, allowed=grounding.SPECIAL[4:9]))


def draw(sample: Sample, config: AugmentationConfig = STRONG, seed: int = 0) -> Sample:
    return augment(sample, config, np.random.default_rng((seed, 1)), length=length)


def scene(boxes: dict[str, tuple[int, int, int, int]], size: tuple[int, int]) -> Sample:
    """Coloured rectangles, each asked for; coordinates go up to, not through, the second corner."""
    picture = PilImage.new("RGB", size, (128, 128, 128))
    turns = []
    for name, (x0, y0, x1, y1) in boxes.items():
        ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLOURS[name])
    for name, corners in boxes.items():
        box = Box(name, tuple(map(float, corners)))
        answer = grounding.write_boxes([box], width=size[0], height=size[1])
        turns.append(Turn(f"Find {name}.", answer, "grounding", "en", (box,)))
    turns[0] = dataclasses.replace(turns[0], question="<image>\n" + turns[0].question)
    return Sample("scene", tuple(turns), (lambda: picture,))


@st.composite
def layouts(draw) -> tuple[dict[str, tuple[int, int, int, int]], tuple[int, int]]:
    size = draw(st.tuples(st.integers(60, 240), st.integers(60, 240)))
    boxes = {}
    for number, name in enumerate(COLOURS):  # each in a third of its own
        third = size[0] // 3
        x0 = third * number + draw(st.integers(0, third // 3))
        y0 = draw(st.integers(0, size[1] // 2))
        boxes[name] = (
            x0,
            y0,
            draw(st.integers(x0 + 8, third * (number + 1))),
            draw(st.integers(y0 + 8, size[1])),
        )
    return boxes, size


def coloured(picture: PilImage.Image, name: str) -> tuple[int, int, int, int]:
    """Where a colour is seen, its edges included."""
    pixels = np.asarray(picture).astype(int)
    channel = list(COLOURS).index(name)
    others = pixels[..., [c for c in range(3) if c != channel]].max(-1)
    rows, columns = np.nonzero(pixels[..., channel] - others > 60)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@settings(max_examples=120, deadline=None)
@given(layouts(), st.integers(0, 10**6))
@pytest.mark.slow
def test_boxes_still_enclose_what_they_name(layout, seed):
    sample = scene(*layout)
    found = draw(sample, seed=seed)
    picture, original = found.images[0](), sample.images[0]()
    assert picture.size == original.size
    for before, turn in zip(sample.turns, found.turns, strict=True):
        (box,) = turn.boxes
        seen = coloured(picture, box.label)
        np.testing.assert_allclose(box.corners, seen, atol=2.5)  # bicubic edges are soft
        (written,) = grounding.parse(turn.answer).boxes(*picture.size)
        np.testing.assert_allclose(written.corners, box.corners, atol=1.5 + max(picture.size) / 999)
        assert length(turn.answer) == length(before.answer) and turn.question == before.question


def test_draws_differ_and_follow_from_the_key():
    sample = scene(
        {"red": (20, 20, 50, 60), "green": (60, 30, 90, 80), "blue": (120, 10, 150, 60)}, (180, 90)
    )
    draws = [draw(sample, EVERYTHING, seed) for seed in range(40)]
    shown = {d.images[0].geometry for d in draws}
    assert len(shown) > 20 and {g.mirrored for g in shown} == {True, False}
    for seed in (3, 4):
        again = draw(sample, EVERYTHING, seed)
        assert again.turns == draws[seed].turns
        np.testing.assert_array_equal(again.images[0](), draws[seed].images[0]())


@pytest.mark.parametrize(
    "said",
    [
        "What is LEFT of the box?", "The right one.", "Read the sign.", "What does it say?", "它在左边吗?",
        "右侧是什么?", "上面写着什么?", "What time is it?", "What number is on the shirt?",
    ],
)  # fmt: skip
def test_nothing_is_mirrored_where_the_text_speaks_against_it(said):
    def picture():
        return PilImage.new("RGB", (40, 30))

    config = AugmentationConfig(flip_rate=1.0)
    for turn in (Turn(f"<image>\n{said}", "yes"), Turn("<image>\nWhat?", said)):
        sample = Sample("s", (turn, Turn("Sure?", "yes")), (picture,))
        assert not draw(sample, config).images[0].geometry.mirrored
    plain = Sample("s", (Turn("<image>\nWhat colour is it? 什么颜色?", "red"),), (picture,))
    assert draw(plain, config).images[0].geometry.mirrored
    by_kind = dataclasses.replace(plain, turns=(dataclasses.replace(plain.turns[0], kind="ocr"),))
    assert draw(by_kind, AugmentationConfig(crop=0.5, flip_rate=1.0)).images[0].geometry == Geometry()


def test_a_crop_leaves_counts_places_and_pairs_of_pictures_alone():
    def picture():
        return PilImage.new("RGB", (40, 30))

    for question in ("How many?", "有几个?", "What is in the corner?"):
        sample = Sample("s", (Turn(f"<image>\n{question}", "2"),), (picture,))
        assert draw(sample).images[0].geometry.shown == Geometry.shown
    pair = Sample("s", (Turn("<image>\n<image>\nSame?", "yes"),), (picture, picture))
    first, second = draw(pair, EVERYTHING).images
    assert first.geometry == Geometry() and first.look == second.look != Look()


def test_a_box_at_the_edge_is_kept_by_its_rule():
    sample = scene({"red": (0, 0, 12, 90), "green": (60, 30, 90, 80), "blue": (168, 10, 180, 60)}, (180, 90))
    for seed in range(60):
        found = draw(sample, dataclasses.replace(STRONG, min_visible=0.9), seed)
        geometry = found.images[0].geometry
        for turn, before in zip(found.turns, sample.turns, strict=True):
            x0, y0, x1, y1 = geometry.cut(180, 90).move(before.boxes[0].corners)
            a, b, c, d = turn.boxes[0].corners
            assert (c - a) * (d - b) >= 0.9 * (x1 - x0) * (y1 - y0) - 1e-6


def test_a_reduced_jpeg_shows_the_same_part(tmp_path):
    sample = scene({"red": (100, 100, 300, 260), "green": (400, 30, 500, 400)}, (640, 480))
    sample.images[0]().save(tmp_path / "a.jpg", quality=95)
    image = AugmentedImage(FileImage(tmp_path / "a.jpg", "a"), Geometry((0.1, 0, 0.8, 0.7), True), Look())
    whole, reduced = image(), image.at_least(100, 75)
    assert image.size() == whole.size == (640, 480) and reduced.size == (160, 120)
    np.testing.assert_allclose(np.asarray(reduced), whole.resize((160, 120)), atol=90)
    assert np.abs(np.asarray(reduced).astype(int) - whole.resize((160, 120))).mean() < 3


def test_hues_turn_by_hand():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [90, 90, 90]]], np.uint8)
    picture = PilImage.fromarray(colours)
    turned = np.asarray(Look(hue=1 / 3)(picture)).astype(int)
    np.testing.assert_allclose(turned, [[[0, 255, 0], [0, 0, 255], [90, 90, 90]]], atol=6)
    np.testing.assert_array_equal(Look(hue=0.4)(picture.convert("L")), picture.convert("L"))


def test_what_is_off_changes_no_draw():
    sample = scene({"red": (20, 20, 50, 60), "green": (60, 30, 90, 80)}, (180, 90))
    for seed in range(5):
        one = draw(sample, EVERYTHING, seed).images[0]
        other = draw(sample, dataclasses.replace(EVERYTHING, hue=0.2), seed).images[0]
        assert one.look == dataclasses.replace(other.look, hue=0.0) and other.look.hue != 0


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 10**6), st.booleans())
def test_boxes_follow_a_picture_that_is_made_smaller(layout, seed, crops):
    config = AugmentationConfig(zoom_out=0.7, flip_rate=0.5, crop=0.3 if crops else 0.0)
    sample = scene(*layout)
    found = draw(sample, config, seed)
    picture = found.images[0]()
    assert picture.size == sample.images[0]().size
    left, top, right, bottom = found.images[0].geometry.shown
    assert crops or (left <= 0 and top <= 0 and right >= 1 and bottom >= 1 and right - left <= 1 / 0.3)
    for turn in found.turns:
        (box,) = turn.boxes
        x0, y0, x1, y1 = box.corners
        assert 0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height
        if min(x1 - x0, y1 - y0) > 6:
            np.testing.assert_allclose(box.corners, coloured(picture, box.label), atol=2.5)
    if left < -0.05:
        corner = np.asarray(picture)[0, -1 if found.images[0].geometry.mirrored else 0]
        assert corner.tolist() == list(MARGIN)


def test_a_text_about_places_is_not_zoomed_and_both_ways_are_taken():
    sample = scene({"red": (20, 20, 50, 60)}, (180, 90))
    config = AugmentationConfig(zoom_out=0.5, crop=0.3)
    sides = [g[2] - g[0] for g in (draw(sample, config, s).images[0].geometry.shown for s in range(60))]
    assert 15 < sum(side > 1 for side in sides) < 45 and min(sides) < 1 and max(sides) < 2
    placed = Sample("s", (Turn("<image>\nWhat is in the corner?", "2"),), sample.images)
    assert draw(placed, config).images[0].geometry == Geometry()
    with pytest.raises(ValueError, match=r"augmentation.hue=0.6: must lie in 0..0.5"):
        AugmentationConfig(hue=0.6)
    with pytest.raises(ValueError, match=r"augmentation.zoom_out=1.0: must lie in 0..1, below 1"):
        AugmentationConfig(zoom_out=1.0)


@pytest.mark.parametrize("kind", [TrainIterator, PackedIterator])
@pytest.mark.slow
def test_a_resumed_stream_and_worker_processes_see_the_same_pixels(kind):
    config = CONFIG if kind is TrainIterator else PACKED
    augmented = dataclasses.replace(config, augmentation=EVERYTHING)
    plain, first = (kind(c, SPEC, batch_size=3) for c in (config, augmented))
    unchanged, changed = next(plain), next(first)
    np.testing.assert_array_equal(unchanged.segment_ids, changed.segment_ids)
    assert (unchanged.tiles != changed.tiles).any()
    state = json.loads(json.dumps(first.get_state()))
    second = kind(dataclasses.replace(augmented, loading=LoadingConfig(num_workers=1)), SPEC, batch_size=3)
    second.set_state(state)
    for _ in range(2):
        assert_same(next(first), next(second))
    for stream in (plain, first, second):
        stream.close()


def test_it_is_off_unless_asked_for_never_in_evaluation_and_shown_beside_the_picture():
    assert DataConfig().augmentation is None
    augmented = dataclasses.replace(CONFIG, augmentation=EVERYTHING)
    for (_, a), (_, b) in zip(
        *(evaluation_prompts(c, SPEC, "held", batch_size=4, limit=4) for c in (CONFIG, augmented)),
        strict=True,
    ):
        assert_same(a, b)
    (preview,) = render_samples(augmented, SPEC, "a", count=1)
    assert len(preview.augmented) == 2 and 'alt="augmented"' in to_html([preview])
    assert not render_samples(CONFIG, SPEC, "a", count=1)[0].augmented
    changed = config_lib.replace(CONFIG, [("augmentation.flip_rate", "0.5")])
    assert changed.augmentation == AugmentationConfig(flip_rate=0.5)
    with pytest.raises(ValueError, match=r"augmentation.crop=1.0: must lie in 0..1, below 1"):
        AugmentationConfig(crop=1.0)


@settings(max_examples=30, deadline=None)
@given(layouts(), st.integers(0, 1000))
def test_an_example_keeps_its_tokens_and_tiles(layout, seed):
    sample = scene(*layout)
    tiling = TilingConfig(tile_size=32, candidates=((1, 1), (2, 1), (1, 2)))
    config = dataclasses.replace(CONFIG, tiling=tiling, max_tiles=3, max_tokens=400)
    encoder = make_encoder(config, SPEC)
    plain, changed = (encoder.example(s) for s in (sample, draw(sample, EVERYTHING, seed)))
    assert len(plain.tokens) == len(changed.tokens) and plain.grids == changed.grids
    np.testing.assert_array_equal(plain.visual_index, changed.visual_index)
    np.testing.assert_array_equal(plain.loss_weights, changed.loss_weights)
