"""Records about the same pictures become one sample, whose questions read as they did alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.sample import TEXT, BadSample, Box, Sample, Turn, standalone_questions
from vl_jax.data.sources.build import ArrayRecordConfig, LlavaConfig, open_source
from vl_jax.data.sources.merged import MergedSource
from vl_jax.data.text.chat import encode_dialogue
from vl_jax.data.text.tokenizer import load_tokenizer
from vl_jax.data.tools.convert import convert

TOKENIZER = load_tokenizer()
COLOURS = ("red", "green", "blue")


def picture(colour: str):
    return lambda: PilImage.new("RGB", (4, 4), colour)


def alone(sample: Sample) -> list[tuple[str, str, str]]:
    """Every question as it is asked alone, with its answer and its pictures."""
    pixels = repr([image().tobytes() for image in sample.images])
    pairs = zip(standalone_questions(sample), sample.turns, strict=True)
    return [(pixels, question, turn.answer) for question, turn in pairs]


records = st.lists(
    st.tuples(
        st.lists(st.sampled_from(COLOURS), max_size=2),
        st.sampled_from(["{}\n", "See {} ", "{}"]),
        st.lists(st.sampled_from(["What?", "哪个？", "Why is that? ", "{}"]), min_size=1, max_size=3),
        st.sampled_from(["", "Be brief."]),
    ),
    max_size=12,
)


def sample_of(number, colours, opening, questions, system) -> Sample:
    marks = "<image>" * len(colours)
    first = questions[0]
    asked = first.replace("{}", "Where?") if not colours else opening.format(marks) + first.replace("{}", "")
    if colours and first == "{}":
        asked = f"What is in {marks}"  # asks before it shows
    turns = [asked, *(q.replace("{}", "Where?") for q in questions[1:])]
    return Sample(
        f"s{number}",
        tuple(Turn(q, f"answer {number}.{i}") for i, q in enumerate(turns)),
        tuple(picture(c) for c in colours),
        system,
    )


@settings(max_examples=150, deadline=None)
@given(records, st.integers(2, 5))
@pytest.mark.slow
def test_every_question_is_there_once_and_reads_as_it_did_alone(drawn, most):
    source = [sample_of(n, *record) for n, record in enumerate(drawn)]
    merged = list(MergedSource(source, max_turns=most))
    questions = [q for sample in source for q in alone(sample)]
    assert sorted(q for sample in merged for q in alone(sample)) == sorted(questions)
    assert len({sample.id for sample in merged}) == len(merged)
    assert all(len(s.turns) <= most or s in source for s in merged)
    for sample in merged:  # each branch is the conversation with that question alone, token by token
        lengths = [3] * len(sample.images)
        whole = encode_dialogue(sample, TOKENIZER, image_lengths=lengths, turns="independent")
        for branch, ((_, question, answer), _) in enumerate(zip(alone(sample), sample.turns, strict=True)):
            one = Sample("one", (Turn(question, answer),), sample.images, sample.system)
            single = encode_dialogue(one, TOKENIZER, image_lengths=lengths, turns="independent")
            mine = (whole.branch_ids == 0) | (whole.branch_ids == branch + 1)
            if len(sample.turns) > 1:
                assert whole.tokens[mine].tolist() == single.tokens.tolist()
                assert whole.positions[mine].tolist() == single.positions.tolist()
                assert whole.loss_weights[mine].tolist() == single.loss_weights.tolist()


def test_what_differs_before_the_question_stays_apart():
    red, green = picture("red"), picture("green")
    box = Box("a", (0.0, 0.0, 1.0, 2.0))
    source = [
        Sample("0", (Turn("<image>\nA?", "a"),), (red,)),
        Sample("1", (Turn("<image>\nB?", "b", "vqa", "en", (box,)),), (picture("red"),)),
        Sample("green", (Turn("<image>\nA?", "a"),), (green,)),
        Sample("opening", (Turn("Look: <image>\nA?", "a"),), (red,)),
        Sample("system", (Turn("<image>\nA?", "a"),), (red,), "Be brief."),
        Sample("caption", (Turn("<image>\n", "a", TEXT),), (red,)),
        Sample("behind", (Turn("A?\n<image>", "a"),), (red,)),
        Sample("later", (Turn("<image>\nA?", "a"), Turn("<image>\nB?", "b")), (red, green)),
        Sample("text", (Turn("A?", "a"),)),
        Sample("text too", (Turn("A?", "a"),)),
        Sample("size", (Turn("<image>\nA?", "a"),), (lambda: PilImage.new("RGB", (2, 8), "red"),)),
        Sample("10", (Turn("<image>\nC?", "c"), Turn("D?", "d")), (red,)),
    ]
    merged = list(MergedSource(source, max_turns=9, num_threads=3))
    assert [s.id for s in merged] == [s.id for s in source if s.id not in ("1", "10")]
    assert [t.question for t in merged[0].turns] == ["<image>\nA?", "B?", "C?", "D?"]
    assert merged[0].turns[1] == Turn("B?", "b", "vqa", "en", (box,))
    assert merged[1:] == source[2:-1]


def write(folder, records) -> LlavaConfig:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return LlavaConfig("vqa", "data.jsonl")


def ask(number, image, question="What?"):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"a{number}"}]
    return {"id": f"r{number}", "image": image, "conversations": turns}


def test_a_conversion_merges_and_counts(tmp_path):
    pytest.importorskip("array_record")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        PilImage.fromarray(rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images = ["a.png", "b.png", "a.png", "broken.png", "copy.png", "broken.png", "a.png", "gone.png"]
    config = write(tmp_path, [ask(n, image) for n, image in enumerate(images)])
    seen = []
    source = open_source(config, root=str(tmp_path))
    report = convert(
        config,
        source,
        tmp_path / "new",
        merge_turns=3,
        comparing=lambda *counts: seen.append(counts),
    )
    assert seen == [(8, 8)]
    assert str(report) == ("3 records, 2 were merged into others, left out: 2 corrupt_image, 1 missing_image")
    assert all(f"r{n}" in " ".join(report.skipped.values()) for n in (3, 5, 7))
    new = open_source(ArrayRecordConfig("new", "new/*.arrayrecord"), root=str(tmp_path))
    found = [(s.id, [t.answer for t in s.turns]) for s in (new[i] for i in range(len(new)))]
    assert found == [("r0", ["a0", "a2", "a4"]), ("r1", ["a1"]), ("r6", ["a6"])]
    assert convert(config, source, tmp_path / "new", merge_turns=3) == report
    with pytest.raises(ValueError, match="not a conversion of this source"):
        convert(config, source, tmp_path / "new")


def test_a_picture_that_many_records_name_is_decoded_once(tmp_path, monkeypatch):
    PilImage.new("RGB", (5, 5)).save(tmp_path / "a.png")
    config = write(tmp_path, [ask(n, "a.png") for n in range(5)])
    source, calls, opened = open_source(config, root=str(tmp_path)), [], PilImage.open
    monkeypatch.setattr(PilImage, "open", lambda *args: calls.append(args) or opened(*args))
    merged = MergedSource(source, max_turns=9)
    assert len(merged) == 1 and len(calls) == 1
    assert len(merged[0].turns) == 5


def test_a_record_that_cannot_be_read_raises_when_it_is_asked_for():
    class Source(list):
        def __getitem__(self, index):
            if index == 1:
                raise BadSample("not_json", "record 1")
            return super().__getitem__(index)

    shown = Sample("x", (Turn("<image>\nA?", "a"),), (picture("red"),))
    merged = MergedSource(Source([shown, None, shown]), max_turns=2)
    assert len(merged) == 2 and len(merged[0].turns) == 2
    with pytest.raises(BadSample, match="record 1"):
        merged[1]
