"""Tokenizer files that are changed at random: each is read, and reads, or is answered in one line.

``VL_JAX_TOKENIZERS=5000`` says how many there are.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

from vl_jax.data.published.vocabulary import PublishedTokenizer
from vl_jax.data.text.tokenizer import EOS, SPECIAL, Tokenizer, load_published_tokenizer

COUNT = int(os.environ.get("VL_JAX_TOKENIZERS", "100"))
SECONDS = 5.0  # of processor time for one file
MEMORY = 500 << 10  # KiB that all of it may take
TEXT = "One two, aab 345's\n\n 猫 é " + "a" * 300 + " " * 300

HOSTILE: list[Any] = [None, True, 0, -1, 2**31, 2**63, 2**64 - 1, 1e308, float("nan"), "", "\0", "a", "▁"]
HOSTILE += ["x" * 100_000, [], {}, [[]], [["a"]], {"String": ""}]
# Tables of replacements, as base64: their size, units of four bytes, texts.
TABLES = (b"\4\0\0\0\xff\xff\xff\xff", b"\x08\0\0\0" + b"\x80\4\0\0" * 2 + b"a\0", b"\xff\xff\xff\x7f", b"")
HOSTILE += [base64.b64encode(table).decode() for table in TABLES]
HOSTILE += [{"Regex": pattern} for pattern in ("(a|aa)+$", "(", "", ".", "(?=a)", "(?:a|b)+")]

ENTRIES = {entry: n for n, entry in enumerate([*SPECIAL, *map(chr, range(33, 127)), "ab", "<unk>", "</s>"])}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MARKED = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
ENDS = {"sep": ["</s>", 5], "cls": ["</s>", 5]}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [5], "tokens": ["</s>"]}},
}
# What a part of a file may be.
PARTS: dict[str, list[Any]] = {
    "truncation": [None, {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}],
    "normalizer": [
        None,
        {"type": "NFC"},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKD"},
                {"type": "Replace", "pattern": {"String": "a"}, "content": "bb"},
            ],
        },
    ],
    "pre_tokenizer": [
        None,
        BYTES,
        MARKED,
        {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "CharDelimiterSplit", "delimiter": " "},
        {"type": "FixedLength", "length": 3},
        {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "BertPreTokenizer"}]},
    ],
    "post_processor": [
        None,
        BYTES,
        TEMPLATE,
        {"type": "BertProcessing", **ENDS},
        {"type": "RobertaProcessing", **ENDS, "trim_offsets": True, "add_prefix_space": False},
    ],
    "decoder": [
        None,
        BYTES,
        MARKED,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    ],
    "model": [
        {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": False,
            "vocab": ENTRIES,
            "merges": [["a", "b"]],
        },
        {
            "type": "WordPiece",
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ENTRIES,
        },
        {"type": "WordLevel", "unk_token": "<unk>", "vocab": ENTRIES},
        {"type": "Unigram", "unk_id": 0, "vocab": [[entry, -float(n)] for entry, n in ENTRIES.items()]},
    ],
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def malformed(value: Any, chance: random.Random) -> Any:
    """A copy of which some part is another value, gone, there many times, or under another key."""
    if chance.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return chance.choice(HOSTILE)
    if isinstance(value, list):
        place = chance.randrange(len(value))
        inner = [malformed(value[place], chance)] * chance.choice([1, 1, 0, 2, 50])
        return [*value[:place], *inner, *value[place + 1 :]]
    key, way = chance.choice(list(value)), chance.random()
    rest = {k: v for k, v in value.items() if k != key}
    if way < 0.15:
        return rest if way < 0.1 else {**rest, key.upper(): value[key]}
    return {**value, key: malformed(value[key], chance)}


def description(chance: random.Random) -> dict[str, Any]:
    """A tokenizer file of parts that go together or do not, some of them malformed."""
    added = [{"id": n, "content": text, **FLAGS} for n, text in enumerate(SPECIAL)]
    found = {"version": "1.0", "padding": None, "added_tokens": added}
    found |= {name: copy.deepcopy(chance.choice(parts)) for name, parts in PARTS.items()}
    for _ in range(chance.choice([0, 0, 1, 1, 1, 2, 3])):
        name = chance.choice(list(found))
        found[name] = malformed(found[name], chance)
    return found


def read(load, folder: Path) -> str:
    """What becomes of a file, and of a text that it reads and writes."""
    try:
        tokenizer = load(folder)
        for ids in (tokenizer.encode(TEXT), [0, 5, 7, 10**6]):
            tokenizer.decode(ids)
        if isinstance(tokenizer, Tokenizer):
            _, _ = tokenizer.around, tokenizer.places(TEXT)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 700 and str(folder) in str(error), (
            error
        )
        return "one line"
    return "read"


def alone(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    return Tokenizer(file.read_text(), source=str(file), reads="text")


def test_changed_tokenizers_read_or_are_answered_in_one_line(tmp_path):
    ends: Counter = Counter()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(COUNT):
        (tmp_path / "tokenizer.json").write_text(json.dumps(description(random.Random(f"tokenizer/{seed}"))))
        start = time.process_time()
        ends.update(read(load, tmp_path) for load in (PublishedTokenizer, load_published_tokenizer, alone))
        assert time.process_time() - start < SECONDS, seed
    print(dict(ends))
    assert ends["read"] > COUNT / 5 and ends["one line"] > COUNT / 5, ends
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
