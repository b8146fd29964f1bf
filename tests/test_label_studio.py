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
from vl_jax.data.sources.label_studio.annotated import annotated
from vl_jax.data.sources.label_studio.regions import _mask
from vl_jax.data.sources.label_studio.source import LabelStudioSource
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
    (_, turn) = annotated([turned], "", "here").turns
    assert turn.boxes[0].corners == pytest.approx((90, 0, 100, 20))


def test_transcripts_belong_to_their_rectangles_and_need_no_label(read):
    regions = [rectangle("", identity="a"), rectangle("Text", 0, 80, 50, 20, "b")]
    sample = read(task(*regions, text(["STOP"], "a"), text(["下一站", "Exit"], "b")))[0]
    kinds, where, whole, first, second = sample.turns
    assert (kinds.answer, where.question) == ("Text", "Locate every Text.")
    assert whole.question == "What is written in the picture?" and whole.answer == "STOP\n下一站\nExit"
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
        ([{"type": "keypointlabels", "value": {"x": 1}}], "result_not_read"),
        ([{"type": "ellipselabels", "value": {"x": 1}}], "bad_box"),
        ([{"type": "relation", "from_id": "a", "to_id": "b"}], "result_not_read"),
        ([rectangle("")], "no_label"),
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
@pytest.mark.slow
def test_any_results_are_turns_or_have_a_reason(results, value):
    results = [{**r, "value": value if isinstance(value, dict) else {"x": value}} for r in results]
    try:
        found = annotated(results, "", "here")
    except BadSample as error:
        assert "here" in str(error)
        return
    assert all(turn.answer for turn in found.turns) and all("here" in note.message for note in found.notes)
    assert not results or found.turns or found.notes


def labels(*names, kind="labels", identity="r1", **fields):
    """What a second control says of a region."""
    drawn = rectangle("", identity=identity, **fields)
    return {**drawn, "type": kind, "value": {**drawn["value"], kind: list(names)}}


def located(sample) -> dict[str, set]:
    """The corners of every label."""
    found: dict[str, set] = {}
    for box in (box for turn in sample.turns for box in turn.boxes):
        found.setdefault(box.label, set()).add(box.corners)
    return found


def without_id(result):
    return {name: value for name, value in result.items() if name != "id"}


PLACES = st.sampled_from([(10, 20), (50, 0), (0, 60)])
KINDS = st.sampled_from(["cat", "dog", "cow"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(KINDS, PLACES), min_size=1, max_size=3, unique_by=lambda region: region[1]),
    st.sampled_from(["own", "shared", "none"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_region_has_its_label_whatever_its_id_control_and_order(regions, ids, second, rng):
    results = []
    for number, (label, (x, y)) in enumerate(regions):
        identity = "r" if ids == "shared" else f"r{number}"
        drawn = [rectangle("" if second else label, x, y, 10, 10, identity)]
        drawn += [labels(label, x=x, y=y, width=10.0, height=10, identity=identity)] if second else []
        results += [without_id(r) for r in drawn] if ids == "none" else drawn
    rng.shuffle(results)
    found = annotated(results, "", "here")
    expected: dict[str, set] = {}
    for label, (x, y) in regions:
        expected.setdefault(label, set()).add((2.0 * x, float(y), 2.0 * x + 20, float(y) + 10))
    assert located(found) == expected and not found.notes


def test_answers_about_a_region_name_its_place(read):
    results = [rectangle(), {**choices("bad"), "id": "r1"}, choices("good", name="light")]
    sample = read(task(*results))[0]
    assert [(t.question, t.answer) for t in sample.turns[2:]] == [
        ("What is the quality at <|det|>[[100, 200, 400, 599]]<|/det|>?", "bad"),
        ("What is the light?", "good"),
    ]
    two = [rectangle(), text(["STOP"], "r1", "words"), text(["HALT"], "r1", "translation")]
    questions = [t.question.partition(" at ")[0] for t in read(task(*two))[0].turns[2:]]
    assert questions == ["What is the words", "What is the translation"]


def test_an_answer_that_tells_its_place_is_about_that_place_though_nothing_was_drawn(read):
    lone = {**rectangle(""), "type": "choices", "from_name": "quality"}
    lone["value"] = {**lone["value"], "choices": ["bad"]}
    (turn,) = read(task(lone))[0].turns
    assert turn.question == "<image>\nWhat is the quality at <|det|>[[100, 200, 400, 599]]<|/det|>?"


def test_results_of_other_kinds_are_answers_too(read):
    taxonomy = {"type": "taxonomy", "from_name": "kind", "value": {"taxonomy": [["animal", "cat"], ["pet"]]}}
    rating = {"type": "rating", "from_name": "rating", "value": {"rating": 4}}
    said = [turn.answer for turn in read(task(taxonomy, rating))[0].turns]
    assert said == ["animal / cat, pet", "4"]


def test_an_ellipse_is_enclosed(read):
    value = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 40, "rotation": 90, "ellipselabels": ["egg"]}
    ellipse = {**rectangle(), "type": "ellipselabels", "value": value}  # 20 x 40 pixels about (100, 50)
    assert located(read(task(ellipse))[0])["egg"].pop() == pytest.approx((60, 30, 140, 70))


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([rectangle(x=float("nan"), identity="r2")], "bad_box"),
        ([rectangle(x="far", identity="r2"), {**choices("bad"), "id": "r2"}], "bad_box"),
        ([rectangle("", 50, 0, 5, 5, "r2")], "no_label"),
        ([labels("lost", identity="r2", kind="keypointlabels")], "result_not_read"),
        (
            [{"type": "labels", "id": "n", "value": {"start": 0, "end": 3, "labels": ["name"]}}],
            "result_not_read",
        ),
        ([{"type": "relation", "from_id": "r1", "to_id": "r2"}], "result_not_read"),
        ([choices()], "bad_conversation"),
        ([7], "result_not_read"),
    ],
)
def test_what_cannot_be_read_is_noted_with_its_place_and_the_rest_is_kept(read, results, reason):
    sample = read(task(rectangle(), *results))[0]
    assert set(located(sample)) == {"cat"} and len(sample.turns) == 2
    assert sample.notes[0].reason == reason and "task 0" in sample.notes[0].message


def test_a_label_that_may_be_of_several_regions_is_noted(read):
    both = [rectangle(""), rectangle("", 50, 0, 10, 10)]
    lone = {"type": "choices", "id": "r1", "value": {"choices": ["bad"]}}
    sample = read(task(*both, labels("cat"), labels("dog", x=50, y=0, width=10, height=10), lone))[0]
    assert set(located(sample)) == {"cat", "dog"}
    assert [note.reason for note in sample.notes] == ["result_not_read"]


def test_what_belongs_to_a_region_that_cannot_be_read_goes_to_no_other(read):
    good, bad = rectangle("", identity="r"), rectangle("", x=200, identity="r")
    results = [good, bad, labels("cat", identity="r"), labels("dog", x=200, identity="r")]
    sample = read(task(*results, {**choices(), "id": "r"}))[0]
    assert located(sample) == {"cat": {(20, 20, 80, 60)}}
    assert [n.reason for n in sample.notes] == ["bad_box", "result_not_read", "result_not_read"]


def test_annotations_that_do_not_count_are_noted(read):
    several = task(rectangle("cat"))
    several["annotations"] += [
        {"result": [rectangle("dog")]},
        {"result": [rectangle("cow")], "ground_truth": True},
        {"result": [rectangle("pig")], "was_cancelled": True},
        {"result": []},
    ]
    sample = read(several)[0]
    assert set(located(sample)) == {"cow"}
    assert {note.reason for note in sample.notes} == {"annotation_not_read", "annotation_cancelled"}
    assert "2 of 3" in sample.notes[0].message


def about(name, result):
    return {**result, "to_name": name}


@pytest.mark.parametrize(
    ("tags", "data", "to_name", "labels"),
    [
        (("img", "img"), {}, "", {"cat", "dog"}),  # one picture, whatever its tag is called
        (("image", "second"), {"second": "b.png"}, "", {"cat"}),
        (("second", "image"), {"second": "b.png"}, "", {"dog"}),
        (("left", "right"), {"second": "b.png"}, "right", {"dog"}),
        (("left", "right"), {"second": "b.png"}, "", None),  # which is which?
        (("second", "second"), {"second": "b.png"}, "", None),
        (("left", "right"), {}, "", None),
    ],
)
def test_regions_are_those_of_the_right_picture(read, tmp_path, tags, data, to_name, labels):
    results = [about(tags[0], rectangle("cat")), about(tags[1], rectangle("dog", 50, 0, 10, 10, "r2"))]
    results.append(about("words", choices("good")))
    read(task(*results, **data))
    source = open_source(LabelStudioConfig("ls", "export.json", to_name=to_name), root=str(tmp_path))
    sample = source[0]
    assert set(located(sample)) == (labels or set()) and sample.turns[-1].answer == "good"
    assert [n.reason for n in sample.notes] == ["other_picture"] * (2 - len(labels or ()))
    if labels is None and "left" in tags:
        assert "to_name" in sample.notes[0].message


def test_pages_behind_the_first_are_noted(read):
    sample = read(task(rectangle(), {**rectangle("dog", identity="r2"), "item_index": 1}))[0]
    assert set(located(sample)) == {"cat"} and "page 1" in sample.notes[0].message


def test_a_file_of_another_folder_is_not_taken_for_a_picture(read):
    sample = read(task(rectangle(), image="/data/local-files/?d=camera2/a.png"))[0]
    with pytest.raises(BadSample, match="missing_image"):
        sample.images[0]()


def test_of_several_controls_one_answers_the_question(read):
    two = [choices("wet", name="state"), choices("yes", name="answer")]
    asked = read(task(*two, question="Is it wet?"))[0].turns
    assert [t.question for t in asked] == ["<image>\nWhat is the state?", "Is it wet?"]
    sample = read(task(*two[:1], choices("good"), question="Is it wet?"))[0]
    assert [n.reason for n in sample.notes] == ["question_not_read"]


def test_a_second_control_labels_regions_of_json_min_too(tmp_path):
    PilImage.new("RGB", (200, 100)).save(tmp_path / "a.png")
    place = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0}
    minimal = {"id": 7, "image": "a.png", "rect": [place], "label": [{**place, "labels": ["cat"]}]}
    (tmp_path / "min.json").write_text(json.dumps([minimal]))
    sample = open_source(LabelStudioConfig("ls", "min.json"), root=str(tmp_path))[0]
    assert located(sample) == {"cat": {(20, 20, 80, 60)}} and not sample.notes
