"""Texts that do not fit become samples that do, and together say the same."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.sample import TEXT, Sample, Turn
from vl_jax.data.sources.build import ArrayRecordConfig, LlavaConfig, open_source
from vl_jax.data.text.chat import encode_dialogue
from vl_jax.data.text.tokenizer import load_tokenizer
from vl_jax.data.tools.convert import convert
from vl_jax.data.tools.long_text import split

TOKENIZER = load_tokenizer()
words = st.lists(
    st.sampled_from(["owl", " the ", "什么", "🦉", "\n", "123", "a" * 40, "<|ref|>", "ß"]), max_size=60
)


def tokens(sample: Sample, turns="dialogue") -> int:
    return len(encode_dialogue(sample, TOKENIZER, image_lengths=[], turns=turns).tokens)


def bare(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=80, deadline=None)
@given(words.map("".join), st.integers(12, 60))
def test_a_long_text_is_cut_between_tokens_and_nothing_gets_lost(text, most):
    sample = Sample("t", (Turn("", text, kind=TEXT),), system="Look.")
    parts = split(sample, TOKENIZER, max_tokens=most, turns="dialogue")
    assert bare("".join(part.turns[0].answer for part in parts)) == bare(text)
    assert all(tokens(part) <= most for part in parts)
    assert len({part.id for part in parts}) == len(parts) and (len(parts) > 1 or parts == [sample])
    assert len(parts) <= 1 + 2 * tokens(sample) // (most - 6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(words.map("".join), words.map("".join)), min_size=1, max_size=8),
    st.integers(30, 200),
    st.sampled_from(["dialogue", "independent"]),
)
@pytest.mark.slow
def test_turns_stay_whole_and_in_order(pairs, most, turns):
    sample = Sample("t", tuple(Turn(q, a, kind="open") for q, a in pairs))
    parts = split(sample, TOKENIZER, max_tokens=most, turns=turns)
    assert tuple(turn for part in parts for turn in part.turns) == sample.turns
    assert all(tokens(part, turns) <= most or len(part.turns) == 1 for part in parts)
    for first, second in zip(parts, parts[1:], strict=False):  # no more samples than it takes
        joined = Sample("j", (*first.turns, second.turns[0]))
        assert tokens(joined, turns) > most


def test_a_sample_with_a_picture_stays_as_it_is():
    sample = Sample("p", (Turn("<image>\nWhat?", "owl " * 99),), (lambda: PilImage.new("RGB", (2, 2)),))
    assert split(sample, TOKENIZER, max_tokens=20, turns="dialogue") == [sample]


def test_converted_texts_are_split_and_counted(tmp_path):
    pytest.importorskip("array_record")
    texts = ["short", " ".join(f"word{i}" for i in range(60)), "也短"]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = LlavaConfig("t", "d.jsonl")
    cut = functools.partial(split, tokenizer=TOKENIZER, max_tokens=64, turns="dialogue")
    report = convert(config, open_source(config, root=str(tmp_path)), tmp_path / "out", split=cut)
    assert report.split == 1 and report.records > 3 and "1 were split" in str(report)
    converted = open_source(ArrayRecordConfig("t", "out/*.arrayrecord"), root=str(tmp_path))
    assert len(converted) == report.records
    said = [converted[i].turns[0].answer for i in range(len(converted))]
    assert said[0] == "short" and said[-1] == "也短" and bare("".join(said[1:-1])) == bare(texts[1])
    assert convert(config, open_source(config, root=str(tmp_path)), tmp_path / "out", split=cut) == report
    with pytest.raises(ValueError, match="is not a conversion of this source"):
        convert(config, open_source(config, root=str(tmp_path)), tmp_path / "out")
