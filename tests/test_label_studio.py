"""Exports of Label Studio as conversations: rectangles, transcripts, choices, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data import grounding
from vl_jax.data.label_studio import LabelStudioSource, _answers, _boxes_and_texts
from vl_jax.data.sample import BadSample
from vl_jax.data.sources import LabelStudioConfig, open_source


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
        ([{"type": "polygonlabels", "value": {"points": []}}], "no_labels"),
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
    with pytest.raises(BadSample, match="export as JSON, not JSON-MIN"):
        read({"id": 1, "data": {}, "label": []})[0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*"xy", "width", "height", "rotation", "text", "choices"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries(
    {"type": st.sampled_from(["rectanglelabels", "rectangle", "textarea", "choices"])},
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
