"""Boxes in text: round trips, what is malformed, and that nothing a model writes raises."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vl_jax import cli
from vl_jax.data.sample import Box
from vl_jax.data.text import grounding
from vl_jax.data.text.grounding import Grounding, Region, draw, parse, to_grid, to_pixels, write, write_boxes
from vl_jax.data.text.tokenizer import GROUNDING, SPECIAL, load_tokenizer
from vl_jax.report import drawing

labels = st.text(max_size=12).filter(lambda s: not any(mark in s for mark in SPECIAL))
intervals = st.tuples(st.integers(0, 999), st.integers(0, 999)).map(sorted)
boxes = st.tuples(intervals, intervals).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))
regions = st.tuples(labels, st.lists(boxes, max_size=4).map(tuple))
# Text that looks like the format, and breaks it anywhere.
noise = st.lists(
    st.sampled_from([*GROUNDING, "[[1, 2, 3, 4]]", "[", "]", ",", "1", "999", "1000", "-1", " ", "dog", "\0"])
    | st.text(max_size=4),
    max_size=30,
).map("".join)

DOG = "<|ref|>dog<|/ref|>"


@settings(max_examples=200, deadline=None)
@given(st.lists(regions, max_size=4))
@pytest.mark.slow
def test_what_is_written_is_read_back(items):
    expected = tuple(Region(label, found) for label, found in items)
    assert parse(write(expected)) == Grounding(expected, 0)


@settings(max_examples=300, deadline=None)
@given(noise)
def test_no_text_raises_and_every_box_lies_on_the_grid(text):
    found = parse(text)
    assert found.malformed >= 0
    for region in found.regions:
        for x0, y0, x1, y1 in region.boxes:
            assert 0 <= x0 <= x1 <= 999 and 0 <= y0 <= y1 <= 999
    # What was read is well formed: written again, it reads the same.
    again = [r for r in found.regions if not any(mark in r.label for mark in SPECIAL)]
    assert parse(write(again)) == Grounding(tuple(again), 0)


@pytest.mark.parametrize(
    ("text", "expected", "malformed"),
    [
        ("no boxes here", [], 0),
        ("find " + DOG + ".", [], 0),
        (DOG + "<|det|>[[1, 2, 3, 4], [5,6,7,8]]<|/det|>", [("dog", (1, 2, 3, 4)), ("dog", (5, 6, 7, 8))], 0),
        (DOG + " \n<|det|> [ [ 1 ,2,3,4 ] ] <|/det|>", [("dog", (1, 2, 3, 4))], 0),
        (DOG + "is here <|det|>[[1, 2, 3, 4]]<|/det|>", [("", (1, 2, 3, 4))], 0),
        (DOG + "<|det|>[]<|/det|>", [], 0),
        (DOG + "<|det|>[1, 2, 3, 4]<|/det|>", [("dog", (1, 2, 3, 4))], 1),
        (DOG + "<|det|>[[1, 2, 3, 4], [5, 6]]<|/det|>", [("dog", (1, 2, 3, 4))], 1),
        (DOG + "<|det|>[[1, 2, 3, 4], [5, 6<|/det|>", [("dog", (1, 2, 3, 4))], 1),
        (DOG + "<|det|>[[1, 2, 3, 4], [5, 6", [("dog", (1, 2, 3, 4))], 1),
        (DOG + "<|det|>[[1, 2, 3, 1000], [1, 2, 3, -4], [9, 2, 3, 4]]<|/det|>", [], 3),
        (DOG + "<|det|>[[1.5, 2, 3, 4]]<|/det|>", [], 1),
        (DOG + "<|det|>__import__('os')<|/det|>", [], 1),
        (DOG + "<|det|><|/det|>", [], 1),
        ("<|ref|>dog<|det|>[[1, 2, 3, 4]]<|/det|>", [("", (1, 2, 3, 4))], 1),
        ("<|/det|><|/ref|><|ref|>", [], 3),
    ],
)
def test_malformed_pieces_are_counted(text, expected, malformed):
    found = parse(text)
    assert [(r.label, box) for r in found.regions for box in r.boxes] == expected
    assert found.malformed == malformed


def test_pixels_follow_the_published_rule():
    assert to_pixels((0, 500, 999, 998), 640, 480) == (0, 240, 640, 479)
    found = parse(DOG + "<|det|>[[0, 500, 999, 998]]<|/det|>").boxes(640, 480)
    assert found == (Box("dog", (0, 240, 640, 479)),)
    assert to_grid((-5, 240, 700, 479), 640, 480) == (0, 500, 999, 997)


@settings(max_examples=100, deadline=None)
@given(boxes, st.integers(1, 4000), st.integers(1, 4000))
def test_pixels_and_grid_differ_by_less_than_a_pixel_and_a_step(corners, width, height):
    back = to_grid(to_pixels(corners, width, height), width, height)
    for before, after, size in zip(corners, back, (width, height) * 2, strict=True):
        assert abs(before - after) <= 999 / size + 0.5


def test_boxes_of_one_label_share_a_region_and_survive_the_tokenizer():
    items = [Box("圆形 dog", (1.0, 2.0, 30.0, 40.0)), Box("cat", (0, 0, 9, 9)), Box("圆形 dog", (5, 5, 6, 6))]
    text = write_boxes(items, width=100, height=100)
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text, allowed=GROUNDING)
    assert sum(i in map(tokenizer.token_id, GROUNDING) for i in ids) == 8
    found = parse(tokenizer.decode(ids))
    assert [(r.label, len(r.boxes)) for r in found.regions] == [("圆形 dog", 2), ("cat", 1)]
    assert found.regions[0].boxes[0] == (10, 20, 300, 400)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region("a<|det|>", ()), "special mark"),
        (Region("a", ((1, 2, 3, 1000),)), "box"),
        (Region("a", ((4, 2, 3, 9),)), "box"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(region, message):
    with pytest.raises(ValueError, match=message):
        write([region])


def test_boxes_are_drawn_at_their_corners_in_one_colour_a_label():
    picture = Image.new("RGB", (200, 100), "white")
    boxes = [Box("dog", (20, 40, 80, 90)), Box("狗", (120, 40, 180, 90)), Box("dog", (90, 50, 110, 80))]
    drawn = draw(picture, boxes).picture
    first, second, third = (drawn.getpixel((box.corners[0], 70)) for box in boxes)
    assert first == third != second and (255, 255, 255) not in (first, second)
    assert drawn.getpixel((50, 70)) == (255, 255, 255)  # inside, nothing is covered
    assert picture.getextrema() == ((255, 255),) * 3


def test_a_label_that_no_font_can_write_is_numbered(monkeypatch):
    monkeypatch.setattr(grounding, "_FONTS", ("no such font.ttf",))
    picture = Image.new("RGB", (200, 100), "white")
    corners = (20, 40, 80, 90)
    numbered = draw(picture, [Box("cat", corners), Box("斑马", corners)])
    assert numbered.legend == {"2": "斑马"}
    as_digit = draw(picture, [Box("cat", corners), Box("2", corners)])
    assert not as_digit.legend and numbered.picture.tobytes() == as_digit.picture.tobytes()


def test_an_answer_is_drawn_on_its_picture(tmp_path, capsys):
    Image.new("RGB", (1000, 500), "white").save(tmp_path / "in.png")
    text = write([Region("dog", ((100, 200, 500, 900),))]) + "<|det|>[[1, 2"
    drawing.draw_boxes(text, tmp_path / "in.png", tmp_path / "out.png")
    assert capsys.readouterr().err.strip() == f"{tmp_path / 'out.png'}: boxes drawn: 1, not readable: 1"
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.getpixel((101, 300)) != (255, 255, 255) == drawn.getpixel((300, 300))
    assert cli.main(["generate", f"--workdir={tmp_path}", "--prompt=x", f"--draw={tmp_path / 'x.png'}"]) == 2
    assert "--draw needs --image" in capsys.readouterr().err
