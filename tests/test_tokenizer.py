"""Byte-level BPE: lossless, reproducible, and special ids only on request."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import processor_folder

from vl_jax.data.published.vocabulary import PublishedTokenizer
from vl_jax.data.sources.scene_text import CHINESE, COLOUR_NAMES, PLACES, SHAPE_NAMES, TEMPLATES
from vl_jax.data.sources.scenes import CHINESE_WORDS, COLOURS, ENGLISH_WORDS
from vl_jax.data.text import patterns
from vl_jax.data.text.tokenizer import (
    EOS,
    GROUNDING,
    PAD,
    SPECIAL,
    Tokenizer,
    load_published_tokenizer,
    load_tokenizer,
    naming,
)
from vl_jax.data.tools.vocabulary import train_tokenizer

TOKENIZER = load_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["The owl's 3 boxes.", "所有权是 Rust 最独特的特性。", "a  b\n\t🦉é", " " * 70]
)
def test_english_and_chinese_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_strings_in_text_stay_text_unless_allowed():
    ids = {TOKENIZER.token_id(s) for s in SPECIAL}
    for special in SPECIAL:
        text = f"say {special} now"
        assert not ids & set(TOKENIZER.encode(text))
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
        assert TOKENIZER.token_id(special) in TOKENIZER.encode(text, allowed=[special])


def test_only_the_allowed_special_strings_become_ids():
    ids = TOKENIZER.encode("<|ref|>a<|/ref|><|User|>", allowed=GROUNDING)
    assert ids[0] == TOKENIZER.token_id("<|ref|>") and TOKENIZER.user not in ids
    with pytest.raises(ValueError, match="nothing special"):
        TOKENIZER.encode("x", allowed=["nothing special"])


def test_shipped_vocabulary_has_2048_entries_and_distinct_special_ids():
    assert TOKENIZER.vocab_size == 2048
    assert len({TOKENIZER.token_id(s) for s in SPECIAL}) == len(SPECIAL)
    assert TOKENIZER.bos == TOKENIZER.encode("<｜begin▁of▁sentence｜>", allowed=SPECIAL)[0]


def test_words_of_the_scenes_are_at_most_three_tokens():
    words = [*COLOURS, *CHINESE.values(), *PLACES["en"], *PLACES["zh"], *ENGLISH_WORDS, *CHINESE_WORDS]
    assert max(len(TOKENIZER.encode(w)) for w in words) <= 3


def test_chinese_names_are_tokens_of_their_own_in_every_question():
    tokenizer = load_tokenizer()
    templates = [template for kind in TEMPLATES.values() for template in kind["zh"] if "{0}" in template]
    for name in (CHINESE[word] for word in (*COLOUR_NAMES, *SHAPE_NAMES)):
        for template in templates:
            pieces = [tokenizer.decode([i]) for i in tokenizer.encode(template.format(name, name))]
            assert pieces.count(name) == template.count("{"), (template, pieces)


def test_training_twice_gives_the_same_bytes(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"text": f"the owl number {i} 猫头鹰 {i * 7}", "source": "good"} for i in range(200)]
    corpus.write_text("\n".join(json.dumps(line) for line in lines))
    for name in ("a.json", "b.json"):
        train_tokenizer([corpus], vocab_size=400, out=tmp_path / name, num_scenes=40)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    trained = load_tokenizer(str(tmp_path / "a.json"))
    assert trained.vocab_size == 400 and len(trained.encode("the owl")) < len("the owl")


def test_documents_of_an_unwanted_source_are_left_out(tmp_path):
    good = [json.dumps({"text": f"alpha beta {i}", "source": "ours"}) for i in range(50)]
    bad = [json.dumps({"text": "zyx zyx zyx", "source": "theirs/captions"}) for _ in range(50)]
    for name, lines in (("mixed", good + bad), ("good", good)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        file, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out"
        train_tokenizer([file], vocab_size=270, out=out, num_scenes=0, without_sources=["captions"])
    assert (tmp_path / "mixed.out").read_bytes() == (tmp_path / "good.out").read_bytes()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100"):
        train_tokenizer([], vocab_size=100, out=tmp_path / "x")
    with pytest.raises(ValueError, match="only supports"):
        train_tokenizer([], vocab_size=5000, out=tmp_path / "x", num_scenes=1)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": 1}\n')
    with pytest.raises(ValueError, match="bad.jsonl:2"):
        train_tokenizer([tmp_path / "bad.jsonl"], vocab_size=300, out=tmp_path / "x")
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.json: not a tokenizer file"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_a_vocabulary_without_the_special_tokens_is_refused(tmp_path):
    import tokenizers

    file = tmp_path / "plain.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(file))
    with pytest.raises(ValueError, match="lacks the special tokens"):
        load_tokenizer(str(file))


def test_a_vocabulary_for_texts_alone_needs_an_end_and_says_what_stands_around_them(tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<e>": 1, "<s>": 2}, unk_token="a"))
    made.add_special_tokens(["<e>", "<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer_config.json: names no eos_token"):
        load_tokenizer(str(tmp_path), reads="text")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    found = load_tokenizer(str(tmp_path), reads="text")
    assert (found.vocab_size, found.eos, found.pad, found.bos, found.image) == (3, 1, 1, -1, -1)
    assert found.around == ((), (1,))
    assert TOKENIZER.around == ((), (TOKENIZER.eos,))
    marks = [("<s>", 2), ("<e>", 1)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A <e>", special_tokens=marks)
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path), reads="text").around == ((2,), (1,))


def test_recorded_texts_of_the_reference_processor(oracles):
    folder = processor_folder(oracles)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    for case in json.loads((folder / "tokenizer_cases.json").read_text()):
        assert tokenizer.encode(case["text"], allowed=SPECIAL) == case["ids"]


FILE = "a/tokenizer.json"


class PanicException(BaseException):
    """As the tokenizers library raises it."""


@pytest.mark.parametrize("error", [PanicException("index\nout of range"), Exception("no"), MemoryError()])
def test_what_the_library_raises_names_the_file_in_one_line(error):
    with (
        pytest.raises(ValueError, match=r"^a/tokenizer.json: cannot read: \w") as told,
        naming(FILE, "cannot read"),
    ):
        raise error
    assert "\n" not in str(told.value)


def test_an_interruption_is_no_fault_of_a_file():
    with pytest.raises(KeyboardInterrupt), naming(FILE, "cannot read"):
        raise KeyboardInterrupt


HOSTILE = {
    "no object": "[]",
    "nested": "[" * 100_000,
    "no model": '{"version": "1.0", "added_tokens": [{"id": -1}]}',
    "model": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["x", "y"]]}}',
    "not a text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("load", [PublishedTokenizer, load_published_tokenizer])
def test_a_malformed_tokenizer_of_a_folder_is_named_in_one_line(tmp_path, name, load):
    text = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"tokenizer.json: ") as told:
        load(tmp_path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize("config", ["[" * 100_000, "[]", '{"eos_token": 5}', '{"eos_token": ["</s>"]}'])
@pytest.mark.parametrize("load", [PublishedTokenizer, load_published_tokenizer])
def test_a_malformed_tokenizer_config_is_named_in_one_line(tmp_path, config, load):
    (tmp_path / "tokenizer.json").write_text(load_tokenizer().plain.to_str())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: ") as told:
        load(tmp_path)
    assert "\n" not in str(told.value)


PUBLISHED_PATTERNS = [  # the forms that published vocabularies have
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'ll)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*|\s+(?!\S)",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+(?:'[sS])?",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\p{N}(?=(?:\d{3})+(?!\d))|[\p{Han}&&[^一]]+|(?<=a)b|\x{3000}+|\R+| {2,}",
]
SLOW_PATTERNS = {
    r"(a+)+$": "repeats what varies",
    r"(?:a|aa)+$": "repeats what varies",
    r"(\w+\s?)*x": "repeats what varies",
    r"((?:ab?){2,})y": "repeats what varies",
    r"a{1,3}+b": "repeats what varies",
    r"a+*b": "repeats what varies",
    r"(?i)(a*)*b": "repeats what varies",
    r"[]a](?:[^]b]|c)+": "repeats what varies",
    r"(a*)(?:\1)*b": "repeats what varies",
    r"(?<n>a\g<n>?b)": "calls a group",
    r"(?x) (a+) +": "unusual kind",
    r"(?~a+)+": "unusual kind",
    r"(?i)(?:a|A)+$": "repeats what varies",
    r"(?:[a-c]|b)+$": "repeats what varies",
    r"(?:a|\w)+$": "repeats what varies",
    r"(?:.|a)+$": "repeats what varies",
    r"(?:a|b?)+$": "repeats what varies",
    r"(?:(?=a)|a)+$": "repeats what varies",
    r"(?:\x61|a)+$": "repeats what varies",
    r"(?:(?:a|b)+|c)+$": "repeats what varies",
    r"(?:[^b]|a)+$": "repeats what varies",
    r"\s*\s*\s*\s*\s*x": "stand behind one another",
    r"((a{1000}){1000}){1000}": "copies",
    "(" * 5_000 + "a" + ")" * 5_000: "nested",
    "a" * 30_000: "characters",
}


def with_pattern(pattern: str) -> str:
    """The shipped vocabulary, with texts divided at a pattern."""
    description = json.loads(load_tokenizer().plain.to_str())
    description["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return json.dumps(description)


def test_patterns_of_published_vocabularies_pass():
    for pattern in PUBLISHED_PATTERNS:
        patterns.check(pattern)
        Tokenizer(with_pattern(pattern)).encode("One, two\n\n 345's " + " " * 300)


HARMLESS = [
    r"(?:a|b)+x",
    r"(?:ab|c|\n){2,}x",
    r"(?i)(?:[a-f]|[0-9]|-)*x",
    r"((?>a|b)|\.)+x",
    r"(?:[a-c]|d{2}e)+x",
]


@pytest.mark.parametrize("pattern", HARMLESS)
def test_alternatives_that_begin_differently_may_be_repeated(pattern):
    begun = time.process_time()
    Tokenizer(with_pattern(pattern)).encode("abcdde\nAB.09" * 300)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
def test_a_pattern_that_may_take_for_ever_is_refused_in_one_line(pattern):
    with pytest.raises(ValueError, match=rf"^a/tokenizer.json: .*{SLOW_PATTERNS[pattern]}") as told:
        Tokenizer(with_pattern(pattern), source=FILE)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize("load", [PublishedTokenizer, load_published_tokenizer])
def test_every_way_to_load_a_folder_refuses_slow_and_impossible_patterns(tmp_path, load):
    for pattern in ("(a+)+$", "(", "[", r"\p{Nonsense}"):
        (tmp_path / "tokenizer.json").write_text(with_pattern(pattern).replace('"Regex"', r'"\u0052egex"'))
        with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer file: ") as told:
            load(tmp_path)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("load", [PublishedTokenizer, load_published_tokenizer])
def test_a_file_neither_cuts_texts_nor_fills_them_up_nor_makes_them_very_long(tmp_path, load):
    description = json.loads(load_tokenizer().plain.to_str())
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": PAD}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**description, "truncation": cut, "padding": fill}))
    text = "Where is the red circle? It is above."
    assert load(tmp_path).encode(text) == load_tokenizer().encode(text)
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    description["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"tokenizer.json: .* more than 1000 times as long"):
        load(tmp_path)
