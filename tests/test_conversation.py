"""Every dialect of a record gives the same conversation; lines of a file are found without reading it."""

from __future__ import annotations

import json

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
