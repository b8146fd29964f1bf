"""Training a byte-level BPE vocabulary with the special tokens of DeepSeek-VL2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vl_jax.data.sources.scene_text import CHINESE, KINDS, PLACES
from vl_jax.data.sources.scenes import ScenesConfig, ScenesSource
from vl_jax.data.text.tokenizer import SPECIAL

# Bare answers that running text hardly ever has: in it they follow a space.
_COMMON_ANSWERS = ("yes", "no", "是", "否")


def train_tokenizer(
    files: Sequence[str | Path],
    *,
    vocab_size: int,
    out: str | Path,
    num_scenes: int = 4000,
    without_sources: Sequence[str] = (),
) -> None:
    """Trains a byte-level BPE vocabulary and writes it; the same input gives the same bytes.

    Args:
      files: JSON lines with a ``text`` field, or (any other ending) plain text.
      vocab_size: entries of the result, special tokens included.
      out: the file to write.
      num_scenes: procedural scenes whose questions and answers join the text.
      without_sources: JSON lines whose ``source`` holds one of these strings are left out.

    Raises:
      ValueError: the text is too small for ``vocab_size`` entries, or a file is missing.
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {smallest}, the bytes and special tokens"
        )
    missing = [str(f) for f in files if not Path(f).is_file()]
    if missing:
        raise ValueError(f"input={missing}: no such file")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_corpus(files, num_scenes, without_sources), trainer)
    if model.get_vocab_size() != vocab_size:
        found = model.get_vocab_size()
        raise ValueError(f"vocab_size={vocab_size}: the text only supports {found} entries; give more text")
    Path(out).write_text(model.to_str(pretty=False) + "\n", encoding="utf-8")


def _corpus(files: Sequence[str | Path], num_scenes: int, without_sources: Sequence[str]) -> Iterator[str]:
    for file in files:
        with Path(file).open(encoding="utf-8") as lines:
            yield from _json_texts(lines, file, without_sources) if str(file).endswith(".jsonl") else lines
    yield from _scene_texts(num_scenes)


def _json_texts(lines: Iterable[str], file: str | Path, without_sources: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
                text, source = record["text"], str(record.get("source", ""))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{file}:{number}: expected a JSON object with a text field") from None
            if not any(s in source for s in without_sources):
                yield text


def _scene_texts(num_scenes: int) -> Iterator[str]:
    # Chinese has no spaces: unless its names stand alone here, merges glue them to the words around them.
    names = re.compile("(" + "|".join((*CHINESE.values(), *PLACES["zh"])) + ")")
    if num_scenes:
        for sample in ScenesSource(ScenesConfig("vocabulary", num_scenes, kinds=(*KINDS, "caption"))):
            for turn in sample.turns:
                for text in (turn.question.removeprefix("<image>"), turn.answer, f" {turn.answer}"):
                    yield from names.split(text)
            yield from _COMMON_ANSWERS
