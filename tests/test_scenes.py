"""Procedural scenes: exact, reproducible, bilingual, and not answerable from the question alone."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from vl_jax.data.sources.glyphs import GLYPHS
from vl_jax.data.sources.scene_text import CHINESE, KINDS, PLACES
from vl_jax.data.sources.scenes import COLOURS, ScenesConfig, ScenesSource

SOURCE = ScenesSource(ScenesConfig("scenes", num_examples=1500))
COLOUR_OF = {CHINESE[c]: c for c in COLOURS} | {c: c for c in COLOURS}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")


def scene_of(index: int, source: ScenesSource = SOURCE):
    return source[index].images[0].scene


def near_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels.astype(int) - np.array(COLOURS[colour])).sum(-1) < 30


def test_a_scene_depends_only_on_seed_and_index():
    shifted = ScenesSource(ScenesConfig("shifted", num_examples=10, first=7))
    a, b = SOURCE[9], shifted[2]
    assert (a.id, a.turns) == (b.id, b.turns)
    np.testing.assert_array_equal(a.images[0](), b.images[0]())
    assert ScenesSource(ScenesConfig("other", seed=1))[9].turns != a.turns


def test_the_answer_to_a_colour_question_is_the_colour_drawn_in_its_box():
    checked = 0
    for index in range(60):
        sample = SOURCE[index]
        pixels = np.asarray(sample.images[0]())
        for turn in sample.turns:
            if turn.kind == "colour":
                x0, y0, x1, y1 = (round(v) for v in turn.boxes[0].corners)
                inside = pixels[max(y0, 0) : y1, max(x0, 0) : x1]
                share = {c: near_colour(inside, c).mean() for c in COLOURS}
                assert max(share, key=share.__getitem__) == COLOUR_OF[turn.answer]
                checked += 1
    assert checked > 40


def test_nothing_coloured_is_drawn_outside_the_boxes():
    for index in range(40):
        scene = scene_of(index)
        pixels = np.asarray(SOURCE[index].images[0]())
        empty = np.abs(pixels.astype(int) - np.array(scene.background)).sum(-1) < 12
        for corners in [o.corners for o in scene.objects] + [scene.word_corners]:
            x0, y0, x1, y1 = corners
            empty[max(int(y0) - 3, 0) : int(y1) + 4, max(int(x0) - 3, 0) : int(x1) + 4] = True
        assert empty.all()


def test_objects_and_word_do_not_overlap_and_lie_inside():
    for index in range(300):
        scene = scene_of(index)
        boxes = [o.corners for o in scene.objects] + ([scene.word_corners] if scene.word else [])
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            assert -1 < x0 < x1 < 65 and -1 < y0 < y1 < 65
            for u0, v0, u1, v1 in boxes[:i]:
                assert x1 <= u0 + 1 or u1 <= x0 + 1 or y1 <= v0 + 1 or v1 <= y0 + 1


def test_count_position_and_word_answers_follow_from_the_scene():
    for index in range(200):
        scene = scene_of(index)
        for turn in SOURCE[index].turns:
            if turn.kind == "count":
                assert int(turn.answer) == len(turn.boxes)
            elif turn.kind == "word":
                assert turn.answer == scene.word
            elif turn.kind == "position":
                (x0, y0, x1, y1) = turn.boxes[0].corners
                cell = int((x0 + x1) / 2 // (64 / 3)), int((y0 + y1) / 2 // (64 / 3))
                assert turn.answer == PLACES[turn.language][cell[1] * 3 + cell[0]]


def test_a_relation_is_the_dominant_direction_between_the_two_boxes():
    for index in range(200):
        for turn in SOURCE[index].turns:
            if turn.kind == "relation":
                (a, b) = (
                    [(x0 + x1) / 2, (y0 + y1) / 2] for x0, y0, x1, y1 in (k.corners for k in turn.boxes)
                )
                dx, dy = a[0] - b[0], a[1] - b[1]
                name = (
                    ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
                )
                assert turn.answer in (name, CHINESE[name])


@pytest.mark.slow
def test_an_object_is_only_named_when_the_name_fits_one_object():
    for index in range(300):
        objects = scene_of(index).objects
        for turn in SOURCE[index].turns:
            if turn.kind not in ("colour", "shape", "position"):
                continue
            text = turn.question
            shapes = {s for s in SHAPES if s in text or CHINESE[s] in text}
            colours = {c for c in COLOURS if c in text or CHINESE[c] in text}
            fitting = [o for o in objects if {o.shape} >= shapes and {o.colour} >= colours]
            assert len(fitting) == 1, text


def test_as_many_objects_as_asked_for_and_no_more_repeats_than_asked_for():
    source = ScenesSource(ScenesConfig("s", 200, min_objects=2, max_objects=3, repeat_rate=0.0))
    for index in range(200):
        objects = scene_of(index, source).objects
        assert 2 <= len(objects) <= 3
        assert len({o.colour for o in objects}) == len({o.shape for o in objects}) == len(objects)
    repeating = ScenesSource(ScenesConfig("s", 200, min_objects=2, repeat_rate=1.0))
    for index in range(200):
        objects = scene_of(index, repeating).objects
        assert min(len({o.colour for o in objects}), len({o.shape for o in objects})) < len(objects)


@pytest.mark.slow
def test_answers_are_balanced_within_every_kind():
    answers = defaultdict(Counter)
    for index in range(len(SOURCE)):
        for turn in SOURCE[index].turns:
            answers[turn.kind, turn.language][turn.answer] += 1
    limits = {"colour": 0.2, "shape": 0.25, "count": 0.35, "position": 0.2, "relation": 0.33, "word": 0.1}
    assert {kind for kind, _ in answers} == set(KINDS)
    for (kind, _), counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < limits[kind]


def test_every_kind_is_asked_in_both_languages_and_the_first_turn_brings_the_image():
    seen = set()
    for index in range(100):
        turns = SOURCE[index].turns
        assert turns[0].question.startswith("<image>\n")
        assert not any("<image>" in t.question for t in turns[1:])
        seen |= {(t.kind, t.language) for t in turns}
    assert seen == {(kind, language) for kind in KINDS for language in ("en", "zh")}


def test_a_caption_names_every_object_and_the_word():
    source = ScenesSource(ScenesConfig("captions", languages=("en",), kinds=("caption",)))
    for index in range(30):
        scene = scene_of(index, source)
        (turn,) = source[index].turns
        assert all(f"{o.colour} {o.shape}" in turn.answer for o in scene.objects)
        assert scene.word in turn.answer


@pytest.mark.slow
def test_every_chinese_character_is_drawn_differently():
    source = ScenesSource(ScenesConfig("zh", num_examples=800, languages=("zh",), word_rate=1.0))
    assert {scene_of(i, source).word for i in range(800)} == set(GLYPHS)
    assert len(set(GLYPHS.values())) == len(GLYPHS)
    points = [p for strokes in GLYPHS.values() for stroke in strokes for p in stroke]
    assert np.min(points) >= 0 and np.max(points) <= 1


@pytest.mark.parametrize("size", [32, 64, 200])
def test_pictures_have_the_size_asked_for(size):
    picture = ScenesSource(ScenesConfig("s", image_size=size))[3].images[0]()
    assert picture.size == (size, size) and picture.mode == "RGB"


def test_only_asked_kinds_and_languages_appear():
    source = ScenesSource(ScenesConfig("s", languages=("zh",), kinds=("word", "count")))
    turns = [t for i in range(30) for t in source[i].turns]
    assert {t.kind for t in turns} == {"word", "count"} and {t.language for t in turns} == {"zh"}


@pytest.mark.parametrize(
    "bad",
    [
        {"num_examples": 0},
        {"max_objects": 7},
        {"min_objects": 0},
        {"max_objects": 2, "min_objects": 3},
        {"word_rate": 1.5},
        {"repeat_rate": -0.1},
        {"first": -1},
    ],
)
def test_a_bad_field_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ScenesConfig("s", **bad)
