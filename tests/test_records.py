"""Flat records, labels and captions: what is read, what is refused, and how real datasets come out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image as PilImage

from vl_jax import schema
from vl_jax.data.config import DataConfig
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.sample import TEXT, BadSample, Turn
from vl_jax.data.sources import array_records
from vl_jax.data.sources.build import LlavaConfig, MetaConfig, RecordsConfig, open_source
from vl_jax.data.sources.merged import MergedSource

GOODS = [
    {"id": "a", "image": "a.png", "label": "dress", "price": 3, "lang": "en"},
    {"id": 7, "image": "a.png", "label": None, "price": 4.5, "title": "A hat", "lang": "fr"},
]


def opened(folder: Path, content, name="data.json", **fields):
    PilImage.new("RGB", (6, 4), (200, 10, 10)).save(folder / "a.png")
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(RecordsConfig("goods", name, **fields), root=str(folder))


def reason_of(source, index=0) -> str:
    with pytest.raises(BadSample) as caught:
        for image in source[index].images:
            image()
    assert "\n" not in str(caught.value) and f"record {index}" in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_record_becomes_a_picture_and_labels(name, tmp_path):
    content = json.dumps(GOODS) if name == "data.json" else "\n".join(map(json.dumps, GOODS))
    source = opened(tmp_path, content, name, image="image", labels=("label", "price"), language="lang")
    first, second = source
    assert first.id == "a" and first.turns == (Turn("<image>\n", "", TEXT, "en"),)
    assert first.images[0]().size == (6, 4)
    assert first.labels == {"label": "dress", "price": 3}
    assert second.id == "7" and second.labels == {"price": 4.5}  # null: it has no such label
    assert repr(source) == f"RecordsSource('{tmp_path / name}', 2 records)"


def test_a_table_becomes_texts_and_labels(tmp_path):
    table = 'text,kind,id\r\n"Where is it, and\nwhy?",lost,x\r\n\r\nHello,,\r\n'
    source = opened(tmp_path, "\ufeff" + table, "data.csv", text="text", labels=("kind",))
    first, second = source
    assert first.turns == (Turn("", "Where is it, and\nwhy?", TEXT),) and first.images == ()
    assert (first.id, first.labels) == ("x", {"kind": "lost"})
    assert (second.id, second.labels) == ("goods-1", {}) and second.turns[0].answer == "Hello"


def test_a_broken_row_of_a_table_spoils_only_itself(tmp_path):
    long = "x" * 200_000  # more than a cell may have
    rows = [b"a,b", b"1,2", b"1,2,3", b"\xff,2", f"{long},2".encode(), b"5,6"]
    source = opened(tmp_path, b"\n".join(rows), "data.csv", text="a", labels=("b",))
    assert [reason_of(source, n) for n in (1, 2, 3)] == ["bad_row", "not_utf8", "bad_row"]
    assert [source[n].turns[0].answer for n in (0, 4)] == ["1", "5"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"label": "x", "t": "x"}, "missing_field"),
        ({"image": "a.png", "t": "x"}, "missing_field"),
        ({"image": 5, "label": "x", "t": "x"}, "bad_image_field"),
        ({"image": "../a.png", "label": "x", "t": "x"}, "outside_root"),
        ({"image": "b.png", "label": "x", "t": "x"}, "missing_image"),
        ({"image": "a.png", "label": "x", "t": 5}, "bad_text"),
        ({"image": "a.png", "label": "x", "t": "\ud800"}, "bad_text"),
        ("a.png", "not_an_object"),
    ],
)
def test_a_bad_record_names_its_reason_and_place(tmp_path, record, reason):
    good = {"image": "a.png", "label": "x", "t": "x"}
    source = opened(tmp_path, [record, good], image="image", text="t", labels=("label",))
    assert reason_of(source) == reason and source[1].labels == {"label": "x"}


def test_a_field_that_no_record_has_is_refused_when_the_file_is_opened(tmp_path):
    text = r"source 'goods': field 'lable' is in no record of .*data\.json; .*; rename 'label' to 'lable'$"
    with pytest.raises(ValueError, match=text):
        opened(tmp_path, GOODS, image="image", labels=("lable",))
    with pytest.raises(ValueError, match="field 'x' is in no record"):
        opened(tmp_path, "a,b\n1,2\n", "data.csv", text="x")
    late = opened(tmp_path, GOODS, image="image", labels=("title",))  # the second record has it
    assert reason_of(late) == "missing_field" and late[1].labels == {"title": "A hat"}
    assert len(opened(tmp_path, [], image="image")) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file": "a.tsv", "text": "t"}, "must end in .json or .jsonl or .csv"),
        ({"file": "a.csv"}, "image, sound, text or media must name a field"),
    ],
)
def test_a_config_that_says_too_little_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecordsConfig("goods", **fields)


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names in the header \['a', 'a'\]: must be different"):
        opened(tmp_path, "a,a\n1,2\n", "data.csv", text="a")


def test_the_config_survives_json():
    source = RecordsConfig("goods", "a.csv", text="t", labels=("x",), audio=AudioConfig(num_bands=32))
    config = DataConfig(sources=(source, LlavaConfig("l", "a.json", labels=("y",), caption=True)))
    assert schema.from_json(schema.to_json(config), DataConfig) == config


def conversations(folder: Path, records, **fields):
    PilImage.new("RGB", (6, 4), (200, 10, 10)).save(folder / "a.png")
    (folder / "data.json").write_text(json.dumps(records))
    return open_source(LlavaConfig("talks", "data.json", **fields), root=str(folder))


def talk(*answers: str, **fields):
    said = [("human", "<image>\nWhat?"), ("gpt", answers[0])]
    said += [item for answer in answers[1:] for item in (("human", "And?"), ("gpt", answer))]
    return {"image": "a.png", "conversations": [{"from": a, "value": b} for a, b in said], **fields}


def test_fields_of_a_conversation_are_labels_and_so_is_its_first_answer(tmp_path):
    records = [talk("A cat.", "Yes.", speaker=3), talk("A dog.", speaker=None), talk("A cow.")]
    source = conversations(tmp_path, records, labels=("speaker", "answer"))
    assert [source[n].labels for n in (0, 1)] == [{"speaker": 3, "answer": "A cat."}, {"answer": "A dog."}]
    assert len(source[0].turns) == 2
    assert reason_of(source, 2) == "missing_field"


def test_a_caption_keeps_the_answer_and_the_picture(tmp_path):
    source = conversations(tmp_path, [talk("A cat.", lang="en"), talk("Yes.", "No.")], caption=True)
    assert source[0].turns == (Turn("<image>\n", "A cat.", TEXT, "en"),) and len(source[0].images) == 1
    assert reason_of(source, 1) == "bad_conversation"


def test_a_mixture_of_files_has_labels_too(tmp_path):
    conversations(tmp_path, [talk("A cat.", speaker=3)])
    (tmp_path / "meta.json").write_text(json.dumps({"talks": {"annotation": "data.json"}}))
    config = MetaConfig("m", "meta.json", labels=("speaker",), caption=True)
    sample = open_source(config, root=str(tmp_path))[0]
    assert sample.labels == {"speaker": 3} and sample.turns[0].kind == TEXT


def test_labels_outlive_conversion_and_keep_records_apart(tmp_path):
    source = conversations(tmp_path, [talk("1", s=3), talk("2", s=4), talk("3", s=3)], labels=("s",))
    assert array_records.decode(array_records.encode(source[1]), "here").labels == {"s": 4}
    merged = MergedSource(source, max_turns=9)
    assert [(len(s.turns), s.labels) for s in merged] == [(2, {"s": 3}), (1, {"s": 4})]


def labels_in(source, field: str) -> Counter:
    return Counter(source[n].labels[field] for n in range(len(source)))


@pytest.mark.parametrize(("folder", "classes"), [("clothing", 10), ("magnetic_tile", 6)])
def test_pictures_of_classes(folder, classes, shared_data):
    config = RecordsConfig("train", "train.json", image="image", labels=("label",))
    source = open_source(config, root=str(shared_data / folder))
    assert len(labels_in(source, "label")) == classes
    for index in range(0, len(source), len(source) // 5):
        assert source[index].images[0]().mode == "RGB"


@pytest.mark.slow
def test_queries_of_a_bank(shared_data):
    config = RecordsConfig("train", "train.csv", text="text", labels=("category",))
    source = open_source(config, root=str(shared_data / "banking77"))
    known = json.loads((shared_data / "banking77" / "categories.json").read_text())
    assert set(labels_in(source, "category")) == set(known) and len(known) == 77
    assert source[0].turns[0].answer == "I am still waiting on my card?"
    assert all(source[n].turns[0].answer for n in range(len(source)))


@pytest.mark.slow
def test_spoken_digits(shared_data):
    root, audio = str(shared_data / "fsdd_digits"), AudioConfig(num_bands=32)
    talks = open_source(LlavaConfig("train", "train.json", labels=("label",), audio=audio), root=root)
    flat = RecordsConfig("train", "train.json", sound="audio", labels=("label",), audio=audio)
    records = open_source(flat, root=root)
    assert labels_in(talks, "label") == labels_in(records, "label") and len(labels_in(talks, "label")) == 10
    assert records[0].images[0]().tobytes() == talks[0].images[0]().tobytes()


@pytest.mark.parametrize("folder", ["flickr8k_bilingual", "twemoji_bilingual"])
@pytest.mark.slow
def test_captions_of_two_languages(folder, shared_data):
    source = open_source(LlavaConfig("val", "val.json", caption=True), root=str(shared_data / folder))
    turns = [source[n].turns[0] for n in range(len(source))]
    assert {t.language for t in turns} == {"en", "zh"} and {t.kind for t in turns} == {TEXT}
    assert all(t.answer and t.question == "<image>\n" for t in turns)


@pytest.mark.slow
def test_kinds_of_cells(shared_data):
    config = LlavaConfig("train", "train.json", labels=("answer",))
    source = open_source(config, root=str(shared_data / "bccd_cells"))
    assert source[0].labels == {"answer": "red blood cell, white blood cell"}
    kinds = {kind for answer in labels_in(source, "answer") for kind in answer.split(", ")}
    assert kinds == {"red blood cell", "white blood cell", "platelet"}
