"""What ends an answer: every way in which a published folder names its end, and the text up to there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from vl_jax.data.published.stops import read_stops
from vl_jax.data.published.vocabulary import PublishedTokenizer
from vl_jax.data.text.chat_template import ChatTemplate
from vl_jax.data.text.pieces import pieces, whole

ADDED = {
    "<s>": 1,
    "</s>": 2,
    "<|im_start|>": 3,
    "<|im_end|>": 4,
    "<|im_end|>!": 5,
    "<|user|>": 6,
    "<|end|>": 7,
}


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": [2, 9, 2]}}, (2, 9)),
        ({"config": {"text_config": {"eos_token_id": [8]}, "eos_token_id": None}}, (8,)),
        (
            {"config": {"language_config": {"eos_token_id": 8}}, "generation_config": {"eos_token_id": [9]}},
            (8, 9),
        ),
        ({"generation_config": {"stop_words_ids": [[7], [1, 2]], "stop_token_ids": [6]}}, (6, 7)),
        ({"config": {"eos_token_id": -1}, "tokenizer_config": {"eos_token": "</s>"}}, (2,)),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, (4,)),
        ({"tokenizer_config": {"eot_token": "<|end|>", "eos_token": "unknown"}}, (7,)),
        ({}, ()),
    ],
)
def test_every_file_that_names_an_end_is_heard(tmp_path, files, tokens):
    assert read_stops(write(tmp_path, **files), ADDED, None).tokens == tokens


@pytest.mark.parametrize("value", ["2", 2.0, True, {"a": 1}, [1, "x"]])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_end_that_is_no_id_is_named(tmp_path, file, value):
    with pytest.raises(ValueError, match=rf"{file}.json: eos_token_id=.*must be a token's id") as error:
        read_stops(write(tmp_path, **{file: {"eos_token_id": value}}), ADDED, None)
    assert "\n" not in str(error.value)


def test_stop_strings_of_a_folder_are_heard(tmp_path):
    folder = write(tmp_path, generation_config={"stop_strings": ["\nUser:", "###"]})
    assert read_stops(folder, ADDED, None).strings == ("\nUser:", "###")


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NEXT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
HARMONY = (
    "{% for m in messages %}<|im_start|>{{ m.content }}"
    "{{ '<|user|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>!{% endfor %}"


@pytest.mark.parametrize(
    ("template", "tokens"),
    [(CHATML, (4,)), (NEXT, (6,)), (HARMONY, (6,)), (PARTS, (5,)), ("{{ messages[0].content }}", ())],
    ids=["chatml", "next turn", "last turn", "longest", "none"],
)
def test_the_token_with_which_a_template_ends_a_turn_stops(tmp_path, template, tokens):
    (tmp_path / "chat_template.jinja").write_text(template)
    assert read_stops(tmp_path, ADDED, ChatTemplate.load(tmp_path)).tokens == tokens


def byte_level() -> tokenizers.Tokenizer:
    """Token i < 256 is byte i of the alphabet; then some of several bytes, which end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = ["ok\u00e4", "\u0120th", "\u00bd\u0142", "\u00e4\u00bd", "ab", "\u00f0\u0141"]
    plain = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, *more])}, []))
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(["</s>", "<|im_end|>"])
    return plain


def byte_fallback() -> tokenizers.Tokenizer:
    """Pieces that begin with a space, and single bytes, as SentencePiece has them."""
    words = ["</s>", "\u2581a", "\u2581", "b", "\u4f60", "\ufffd", "###", "##"]
    words += [f"<0x{byte:02X}>" for byte in (0xE4, 0xBD, 0xA0, 0x41, 0xF0, 0x9F)]
    plain = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    plain.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    plain.add_special_tokens(["</s>"])
    return plain


def of(plain: tokenizers.Tokenizer, folder: Path) -> PublishedTokenizer:
    plain.save(str(folder / "tokenizer.json"))
    return PublishedTokenizer(write(folder, tokenizer_config={"eos_token": "</s>"}))


TEXTS = st.lists(st.sampled_from(["a", "b", "ab", "##", "###", "b#", "\u4f60", "a#"]), max_size=3)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.slow
def test_the_pieces_of_a_stream_are_the_whole_text(tmp_path, kind):
    tokenizer = of(kind(), tmp_path)
    size = kind().get_vocab_size() + 1  # one id is in no vocabulary, as models have them

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=12), TEXTS)
    def check(ids: list[int], stop: list[str]) -> None:
        found = list(pieces([[i] for i in ids], tokenizer, stop))
        assert "".join(found) == whole(ids, tokenizer, stop)
        assert all(found)

    check()


def test_what_is_complete_is_given_at_once_and_the_rest_at_the_end(tmp_path):
    tokenizer = of(byte_level(), tmp_path)
    ids = {token: i for token, i in byte_level().get_vocab().items()}
    half = [[ids["a"]], [ids["ok\u00e4"]]]  # "aok" and the first byte of a character
    assert list(pieces(half, tokenizer)) == ["a", "ok", "\ufffd"]
    assert list(pieces([*half, [ids["\u00bd\u0142"]]], tokenizer)) == ["a", "ok", "\u4f60"]
    assert list(pieces([[ids["a"]], [None]], tokenizer)) == ["a"]


def test_a_stop_string_is_never_shown_and_ends_the_stream(tmp_path):
    tokenizer, ids = of(byte_level(), tmp_path), byte_level().get_vocab()
    rows = iter([[ids[c]] for c in "a#b##cd"])
    assert list(pieces(rows, tokenizer, ["##"])) == ["a", "#b"]
    assert next(rows) == [ids["c"]]  # no token is asked for behind it
    assert whole([ids[c] for c in "abcd"], tokenizer, ["abcd", "bc"]) == "a"  # "bc" is complete first
