"""Every dialect of a record gives the same conversation; lines of a file are found without reading it."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vl_jax.data.files.spans import json_items, lines
from vl_jax.data.sample import BadSample, Sample, Turn
from vl_jax.data.sources.build import LlavaConfig, open_source
from vl_jax.data.sources.conversation import parse
from vl_jax.data.text import chat
from vl_jax.data.text.tokenizer import load_tokenizer

SHAREGPT = {
    "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "A"}]
}
PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]


def messages(content, answer="A", **fields):
    pair = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": pair, **fields}


@pytest.mark.parametrize(
    "record",
    [
        {**SHAREGPT, "images": ["a.png"]},
        messages("<image>\nWhat?", image="a.png"),
        messages(PARTS, images=["a.png"]),
        messages(
            [{"type": "image_url", "image_url": {"url": "a.png"}}, PARTS[1]], [{"type": "text", "text": "A"}]
        ),
        {"question": "What?", "answer": "A", "image": "a.png"},
    ],
)
def test_a_conversation_reads_the_same_in_every_dialect(record):
    found = parse(record, "f, record 0", default_id="x")
    assert found.turns == (Turn("<image>\nWhat?", "A", kind="open"),) and [m.name for m in found.media] == [
        "a.png"
    ]


def test_images_that_come_with_a_record_need_no_names():
    found = parse({"text": "a cat"}, "f", default_id="x", num_images=1)
    assert found.turns == (Turn("<image>\n", "a cat", kind="open"),) and found.media == ()


def test_a_plain_text_is_encoded_as_it_is():
    tokenizer = load_tokenizer("")
    found = parse({"text": "once upon a time"}, "f", default_id="x")
    sample = Sample(found.id, found.turns)
    for turns in ("dialogue", "independent"):
        dialogue = chat.encode_dialogue(sample, tokenizer, image_lengths=[], turns=turns)
        assert dialogue.tokens.tolist() == [
            tokenizer.bos,
            *tokenizer.encode("once upon a time"),
            tokenizer.eos,
        ]
        assert (dialogue.loss_weights[1:-1] == 1).all()


def boxed(answer="cat: <box:1>", box=(10, 20, 30, 40), **fields):
    boxes = [{"label": "dog", "bbox": [0, 0, 1, 1]}, {"label": "cat", "bbox": list(box)}]
    return {"question": "Where?", "answer": answer, "boxes": boxes, "width": 100, "height": 50, **fields}


def test_boxes_are_written_on_the_grid():
    (turn,) = parse(boxed(), "f", default_id="x").turns
    assert turn.answer == "cat: <|det|>[[100, 400, 300, 799]]<|/det|>" and turn.kind == "grounding"
    assert [(b.label, b.corners) for b in turn.boxes] == [("cat", (10, 20, 30, 40))]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (boxed("<box:2>"), "bad_box"),
        (boxed(box=(float("nan"), 0, 1, 1)), "bad_box"),
        (boxed(box=(10**400, 0, 10**401, 1)), "bad_box"),
        (boxed(box=(5, 0, 1, 1)), "bad_box"),
        (boxed(box=(101, 0, 120, 9)), "bad_box"),
        (boxed(box=(0, -9, 5, -1)), "bad_box"),
        (boxed(box=(0, 0, 1)), "bad_box"),
        (boxed(box=(True, 0, 1, 1)), "bad_box"),
        (boxed(width=None), "bad_box"),
        (boxed(boxes={}, answer="<box:0>"), "bad_box"),
        (messages([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]), "bad_image_field"),
        (messages([{"type": "video"}]), "bad_conversation"),
        (messages([7]), "bad_conversation"),
        (messages([{"type": {"a": []}}]), "bad_conversation"),
        ({"messages": {}}, "bad_conversation"),
        ({"text": ["no text"]}, "bad_conversation"),
        ({"question": "alone?"}, "bad_conversation"),
        ({}, "bad_conversation"),
        ({"messages": [{"role": ["user"], "content": ""}]}, "bad_conversation"),
    ],
)
def test_a_bad_record_has_a_reason(record, reason):
    with pytest.raises(BadSample) as caught:
        parse(record, "f, record 3", default_id="x")
    assert caught.value.reason == reason and "f, record 3" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "\n", "a", "a\n", "\n\na\r\n   \nlonger than eight\n \t \nb", "\ufeffa\nb"]
)
def test_lines_are_those_that_are_not_blank(tmp_path, text):
    (tmp_path / "f").write_bytes(text.encode())
    found = lines(tmp_path / "f")
    expected = [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    assert [found[i].decode().strip() for i in range(len(found))] == expected


records = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, max_size=4), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_the_items_of_a_json_list_are_found_where_they_stand(tmp_path, items, indent, escaped, mark):
    text = json.dumps(items, indent=indent, ensure_ascii=escaped)
    (tmp_path / "f").write_text(text, encoding="utf-8-sig" if mark else "utf-8")
    found = json_items(tmp_path / "f")
    assert [json.loads(found[i]) for i in range(len(found))] == items


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not JSON"),
        (b"[1, 2", "Expecting ',' delimiter: line 1 column 6"),
        (b"[1,]", "not JSON: Expecting value: line 1 column 4"),
        (b"[1 2]", "Expecting ',' delimiter: line 1 column 4"),
        (b"[1] 2", "Extra data: line 1 column 5"),
        (b"[" * 100_000, "not JSON"),
        (b"7", "expected a list of records, found int"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
    ],
)
def test_a_file_that_is_no_json_list_is_refused_with_the_position(tmp_path, text, problem):
    (tmp_path / "f").write_bytes(text)
    with pytest.raises(ValueError, match=problem):
        json_items(tmp_path / "f")


def test_a_line_that_is_not_utf8_spoils_only_itself(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'{"text": "one"}\n\xff\xfe\n' + json.dumps({"text": "two"}).encode())
    source = open_source(LlavaConfig("t", "f.jsonl"), root=str(tmp_path))
    assert [source[i].turns[0].answer for i in (0, 2)] == ["one", "two"]
    with pytest.raises(BadSample, match="record 1.*not UTF-8 at byte 0"):
        source[1]


TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]


def read(record, **options):
    return parse(record, "f, record 0", default_id="x", **options)


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "conversations": TALK},
        {"system_prompt": "Be brief.", "conversations": TALK, "tools": "", "history": None},
        {"conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
        {"conversations": [{"role": "developer", "content": "Be brief."}, *TALK], "source": "web"},
        {"messages": [{"role": "developer", "content": "Be brief."}, *TALK], "system": "Be brief. "},
        {"instruction": "What?", "input": "", "output": "A", "system": "Be brief.", "history": []},
    ],
)
def test_a_system_text_is_read_wherever_it_stands(record):
    found = read(record)
    assert (found.system, [t.answer for t in found.turns], found.notes) == ("Be brief.", ["A"], ())


def test_instructions_come_behind_what_was_said_before():
    record = {"instruction": "And now?", "input": "2", "output": "B", "history": [["What?", "A"]]}
    found = read({**record, "image": "a.png"})
    assert [(t.question, t.answer) for t in found.turns] == [("<image>\nWhat?", "A"), ("And now?\n2", "B")]
    for wrong in ([["What?"]], "What?", [[1, 2]]):
        with pytest.raises(BadSample, match="f, record 0"):
            read({**record, "history": wrong})


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tools": "[{}]"}, "tools_not_read"),
        ({"functions": [{}]}, "functions_not_read"),
        ({"rejected": {"from": "gpt", "value": "B"}}, "rejected_not_read"),
        ({"knowledge": "It is A."}, "field_not_read"),
        ({"question": "What else?"}, "field_not_read"),
        ({"system": "Be brief."}, "system_not_read"),
        ({"weight": "12 kg"}, "weight_not_read"),
    ],
)
def test_a_key_that_changes_the_meaning_is_noted_with_its_place(extra, reason):
    found = read({"conversations": [{"from": "system", "value": "Be long."}, *TALK], **extra})
    (note,) = found.notes
    assert note.reason == reason and "f, record 0" in note.message and next(iter(extra)) in note.message


def test_a_key_of_a_message_that_changes_its_meaning_is_noted():
    talk = [TALK[0], {**TALK[1], "tool_calls": [{}], "id": 3, "mood": "glad"}]
    notes = read({"conversations": talk}).notes
    assert [n.reason for n in notes] == ["tool_calls_not_read", "field_not_read"]
    assert all("conversations[1]" in n.message for n in notes)


def test_labels_and_what_describes_a_record_are_no_keys_to_be_noted():
    record = {"text": "A", "mood": "glad", "weight": 80, "url": "u", "split": "train", "tools": []}
    assert not read(record, labels=("mood", "weight")).notes


WEIGHTS = [({}, 1), ({"weight": 0}, 0), ({"weight": 1.0}, 1), ({"weight": "0.5"}, 0.5), ({"train": False}, 0)]
WEIGHTS += [({"training": True}, 1), ({"loss": False}, 0), ({"weight": None}, 1), ({"weight": -1}, 1)]


@given(st.lists(st.sampled_from(WEIGHTS), min_size=1, max_size=4), st.sampled_from([1, 2, None]))
def test_answers_have_the_weight_of_their_record_and_their_own(weights, whole):
    talk = [m for extra, _ in weights for m in (TALK[0], {**TALK[1], **extra})]
    record = {"conversations": talk, "weight": whole}
    expected = [weight * (whole or 1) for _, weight in weights]
    if not any(expected):
        with pytest.raises(BadSample, match="nothing is learnt"):
            read(record)
        return
    found = read(record)
    assert [t.weight for t in found.turns] == expected
    assert bool(found.notes) == any(extra.get("weight") == -1 for extra, _ in weights)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"conversation": TALK}, "found the keys 'conversation'; rename 'conversation' to 'conversations'"),
        ({"Messages": TALK}, "rename 'Messages' to 'messages'"),
        ({"id": 1, "prompt": "What?"}, "expected one of conversations, .*; found the keys 'id', 'prompt'$"),
        ({"question": "<image>What?", "answer": "A", "img": "a"}, "rename 'img' to 'image'"),
        ({"question": "<image>What?", "answer": "A", "imges": "a"}, "rename 'imges' to 'images'"),
        ({"question": "<image>", "answer": "A", "image": ["a", "b"]}, "write <image> into a question once"),
        ({"conversations": TALK, "image": "a.png"}, "0 <image> placeholders .* 1 images: write <image>"),
        ({"conversations": TALK[:1]}, "a user first and an assistant last; found user"),
        ({"conversations": [{"from": "bot", "value": ""}]}, r"conversations\[0\]: .*found 'bot'"),
        ({"text": "A", "image": "a", "images": ["b"]}, "name other files: leave one of them out"),
        ({**messages(PARTS), "image": ["a", "b"]}, "1 <image> placeholders"),
        (
            {**messages([{"type": "image", "image": "b"}, PARTS[1]]), "image": ["a"]},
            "beside the messages and in them",
        ),
    ],
)
def test_a_record_that_is_nearly_right_is_told_what_was_found_and_what_to_do(record, words):
    with pytest.raises(BadSample) as caught:
        read(record)
    message = str(caught.value).rpartition(" [")[0]
    assert re.search(words, message) and "\n" not in message


def test_files_that_are_named_twice_are_one():
    found = read({**messages([{"type": "image", "image": "a"}, PARTS[1]]), "images": [{"path": "a"}]})
    assert [m.name for m in found.media] == ["a"]


def test_an_id_and_a_message_can_be_printed_in_a_line():
    found = read({"id": "a\nb\ud83d", "text": "A"})
    assert found.id == "a\ufffdb\ufffd"
    assert str(BadSample("x", "a\nb")) == "a\ufffdb [x]"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("f.json", b'{"a": 1}\n{"a": 2}\n', "a file with one record a line is named .jsonl"),
        ("f.json", b'{"images": [], "annotations": []}', "found dict with the keys 'images', 'annotations'"),
        ("f.json", "[]".encode("utf-16"), "a text in UTF-16-LE: save it as UTF-8"),
        ("f.jsonl", "{}".encode("utf-16"), "a text in UTF-16-LE: save it as UTF-8"),
        ("g.json", b"[]", "no such file .*f.json; .*--config.data.root"),
    ],
)
def test_a_file_that_is_nearly_right_is_told_what_to_do(tmp_path, name, text, problem):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=problem):
        open_source(LlavaConfig("t", name.replace("g", "f")), root=str(tmp_path))


def test_a_list_in_a_file_of_lines_is_told_its_name(tmp_path):
    (tmp_path / "f.jsonl").write_text(json.dumps([{"text": "A"}], indent=1))
    with pytest.raises(BadSample, match="a JSON list is named .json"):
        open_source(LlavaConfig("t", "f.jsonl"), root=str(tmp_path))[0]
