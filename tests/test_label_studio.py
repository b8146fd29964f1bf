"""Exports of Label Studio as conversations: rectangles, transcripts, choices, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import LabelStudioConfig, open_source
from vl_jax.data.sources.label_studio import LabelStudioSource, _answers, _boxes_and_texts
from vl_jax.data.sources.regions import _mask
from vl_jax.data.text import grounding


def rectangle(label="cat", x=10, y=20, width=30, height=40, identity="r1", **value):
    labels = {"rectanglelabels": [label]} if label else {}
    return {
        "type": "rectanglelabels" if label else "rectangle",
        "id": identity,
        "from_name": "label",
        "original_width": 200,
        "original_height": 100,
        "value": {"x": x, "y": y, "width": width, "height": height, **labels, **value},
    }


def polygon(*points, label="cat", identity="p1"):
    value = {"points": [list(p) for p in points], "closed": True, "polygonlabels": [label]}
    return {**rectangle(identity=identity), "type": "polygonlabels", "value": value}


def packed(values, lengths=(2, 4, 8, 16)) -> list[int]:
    """Values from 0 to 255 in the format of brushes: runs where there are any, else pieces of values."""
    bits, start = f"{len(values):032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in lengths), 0
    while start < len(values):
        stop = start + 1
        run = stop < len(values) and values[stop] == values[start]
        while stop < len(values) and stop - start < 60_000 and (values[stop] == values[stop - 1]) == run:
            stop += 1
        choice = next(i for i, n in enumerate(lengths) if stop - start - 1 < 2**n)
        bits += f"{run:b}{choice:02b}{stop - start - 1:0{lengths[choice]}b}"
        bits += "".join(f"{v:08b}" for v in (values[start : start + 1] if run else values[start:stop]))
        start = stop
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def brush(mask: np.ndarray, label="cat", **value):
    rle = packed(np.repeat(mask.reshape(-1).astype(int) * 255, 4).tolist())
    height, width = mask.shape
    size = {"original_width": width, "original_height": height}
    value = {"format": "rle", "rle": rle, "brushlabels": [label], **value}
    return {"type": "brushlabels", "id": "b1", **size, "value": value}


def text(words, identity="t", name="caption"):
    return {"type": "textarea", "id": identity, "from_name": name, "value": {"text": words}}


def choices(*words, name="quality"):
    return {"type": "choices", "id": "c", "from_name": name, "value": {"choices": list(words)}}


def task(*results, **data):
    return {"id": 7, "data": {"image": "/data/upload/1/a.png", **data}, "annotations": [{"result": results}]}


@pytest.fixture
def read(tmp_path):
    PilImage.new("RGB", (200, 100)).save(tmp_path / "a.png")

    def opened(*tasks) -> LabelStudioSource:
        (tmp_path / "export.json").write_text(json.dumps(tasks))
        return open_source(LabelStudioConfig("ls", "export.json"), root=str(tmp_path))

    return opened


def test_rectangles_are_asked_for_by_kind_and_place(read):
    sample = read(
        task(rectangle(), rectangle("dog", 50, 0, 10, 10, "r2"), rectangle("cat", 0, 0, 1, 1, "r3"))
    )[0]
    assert sample.id == "ls-7" and sample.images[0]().size == (200, 100)
    assert [t.question for t in sample.turns] == [
        "<image>\nWhich kinds of object are visible?", "Locate every cat.", "Locate every dog.",
    ]  # fmt: skip
    assert sample.turns[0].answer == "cat, dog"
    assert sample.turns[1].boxes[0].corners == (20, 20, 80, 60)
    found = grounding.parse(sample.turns[1].answer)
    assert not found.malformed and len(found.regions[0].boxes) == 2


def test_a_turned_rectangle_is_enclosed():
    turned = rectangle(x=50, y=0, width=10, height=10, rotation=90)  # 20 x 10 pixels about (100, 0)
    (_, turn) = _boxes_and_texts([turned], "here")
    assert turn.boxes[0].corners == pytest.approx((90, 0, 100, 20))


def test_transcripts_belong_to_their_rectangles_and_need_no_label(read):
    regions = [rectangle("", identity="a"), rectangle("Text", 0, 80, 50, 20, "b")]
    sample = read(task(*regions, text(["STOP"], "a"), text(["下一站", "Exit"], "b")))[0]
    whole, first, second = sample.turns
    assert (
        whole.question == "<image>\nWhat is written in the picture?" and whole.answer == "STOP\n下一站\nExit"
    )
    assert first.question == "What is written at <|det|>[[100, 200, 400, 599]]<|/det|>?"
    assert (first.answer, first.kind) == ("STOP", "ocr") and second.answer == "下一站\nExit"


def test_choices_and_texts_answer_the_tasks_question_or_are_asked_for_by_name(read):
    asked = read(task(choices("yes"), question="Is it wet?"))[0].turns
    assert [(t.question, t.answer) for t in asked] == [("<image>\nIs it wet?", "yes")]
    named = read(task(choices("sharp", "dark"), text("A cat.")))[0].turns
    assert [(t.question, t.answer) for t in named] == [
        ("<image>\nWhat is the quality?", "sharp, dark"), ("What is the caption?", "A cat."),
    ]  # fmt: skip


def test_names_of_pictures_are_those_of_the_export_never_addresses(read, tmp_path):
    (tmp_path / "in").mkdir()
    PilImage.new("RGB", (3, 3)).save(tmp_path / "in" / "b c.png")
    source = read(
        task(choices("x"), image="/data/local-files/?d=in/b%20c.png"),
        task(choices("x"), image="https://example.org/a.png"),
        task(choices("x"), image="/data/local-files/?d=../../etc/hostname"),
        task(choices("x"), image=None),
    )
    assert source[0].images[0]().size == (3, 3)
    for index, reason in ((1, "bad_image_field"), (2, "outside_root"), (3, "bad_image_field")):
        with pytest.raises(BadSample) as caught:
            source[index]
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([], "no_labels"),
        ([{"type": "ellipselabels", "value": {"x": 1}}], "no_labels"),
        ([polygon((10, 20), (50, 30))], "bad_box"),
        ([polygon((10, 20), (50, 30), (20, float("nan")))], "bad_box"),
        ([polygon((10, 20), (50, 20), (20, 20))], "bad_box"),
        ([rectangle(x=float("nan"))], "bad_box"),
        ([rectangle(x=200)], "bad_box"),
        ([rectangle("<|ref|>")], "bad_box"),
        ([{**rectangle(), "original_width": 0}], "bad_box"),
        ([{**rectangle(), "image_rotation": 90}], "bad_box"),
        ([choices()], "bad_conversation"),
        ([text([7])], "bad_conversation"),
        ([text(["<image>"])], "placeholder_mismatch"),
    ],
)
def test_a_bad_task_has_a_reason(read, results, reason):
    with pytest.raises(BadSample) as caught:
        read(task(*results))[0]
    assert caught.value.reason == reason and "task 0" in str(caught.value)


def test_the_first_annotation_that_was_not_cancelled_counts(read):
    both = task(choices("old"))
    both["annotations"] = [{"was_cancelled": True, "result": [choices("no")]}, *both["annotations"]]
    assert read(both)[0].turns[0].answer == "old"
    with pytest.raises(BadSample, match="needs annotations"):
        read({"id": 1, "data": {"image": "a.png"}, "label": []})[0]


def test_polygons_and_brushes_are_the_rectangles_around_them(read):
    mask = np.zeros((100, 200), bool)
    mask[20:30, 40:45] = mask[25:60, 100] = True
    sample = read(task(polygon((10, 20), (50, 30), (20, 90)), brush(mask, "dog")))[0]
    boxes = {box.label: box.corners for turn in sample.turns for box in turn.boxes}
    assert boxes == {"cat": (20, 20, 100, 90), "dog": (40, 20, 101, 60)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_brush_is_decoded_to_what_was_painted(data):
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    values = data.draw(
        st.lists(st.sampled_from([0, 0, 0, 7, 255]), min_size=4 * height * width, max_size=4 * height * width)
    )
    found = _mask(bytes(packed(values)), len(values))
    assert found.tolist() == [v > 0 for v in values]
    broken = bytes(packed(values))[: data.draw(st.integers(0, 8))]
    with pytest.raises(ValueError):
        _mask(broken, len(values))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(1, 100))
def test_any_bytes_are_a_mask_or_refused(data, count):
    try:
        assert _mask(count.to_bytes(4) + data, count).shape == (count,)
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"rle": [0, 0]}, "bad_mask"),
        ({"rle": [300]}, "bad_mask"),
        ({"rle": "x"}, "bad_mask"),
        ({"rle": None}, "bad_mask"),
    ],
)
def test_a_bad_brush_has_a_reason(read, value, reason):
    with pytest.raises(BadSample) as caught:
        read(task(brush(np.ones((4, 4), bool), **value)))[0]
    assert caught.value.reason == reason


def test_json_min_has_the_same_turns(read, tmp_path):
    mask = np.zeros((100, 200), bool)
    mask[3:5, 6:9] = True
    drawn = [rectangle(), polygon((10, 20), (50, 30), (20, 90), label="dog"), brush(mask, "fly")]
    whole = task(*drawn, choices("sharp"), question="Is it good?")
    values = [{**r["value"], "original_width": 200, "original_height": 100} for r in drawn[:2]]
    minimal = {
        "id": 7,
        "image": "/data/upload/1/a.png",
        "question": "Is it good?",
        "label": [*values, drawn[2]["value"]],  # the last says nothing of the picture's size
        "quality": "sharp",
        "lead_time": 3.5,
    }
    (tmp_path / "min.json").write_text(json.dumps([minimal, {**minimal, "quality": {"choices": ["sharp"]}}]))
    config = LabelStudioConfig("ls", "min.json", answers=("quality",))
    source, expected = open_source(config, root=str(tmp_path)), read(whole)[0]
    assert source[0].turns == expected.turns and source[0].id == expected.id
    assert source[1].turns == expected.turns
    unnamed = open_source(LabelStudioConfig("ls", "min.json"), root=str(tmp_path))
    assert unnamed[0].turns == expected.turns[:-1]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*"xy", "width", "height", "rotation", "points", "rle", "text", "choices"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries(
    {"type": st.sampled_from(["rectanglelabels", "polygonlabels", "brush", "textarea", "choices"])},
    optional={"id": values, "from_name": values, "original_width": values, "original_height": values},
), max_size=3), values)  # fmt: skip
def test_any_results_are_turns_or_have_a_reason(results, value):
    results = [{**r, "value": value if isinstance(value, dict) else {"x": value}} for r in results]
    try:
        turns = [*_boxes_and_texts(results, "here"), *_answers(results, "", "here")]
    except BadSample as error:
        assert "here" in str(error)
        return
    assert all(turn.answer for turn in turns)
