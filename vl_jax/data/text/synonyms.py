"""Synonyms: words of a text replaced by others of the same meaning, in English and Chinese.

    a man rides his bicycle near the shop  -->  a man rides his bike close to the store

Nothing that an answer or a label says is changed, nor anything that a place in the text points at. Colours,
numbers, sides and kinds of things are in no list: they are what one asks about.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vl_jax.data.sample import TEXT, Sample, Turn
from vl_jax.data.text.swaps import rewritten

# Our own lists; words of one group may stand for one another wherever they stand.
ENGLISH = (
    ("picture", "image", "photo"),
    ("big", "large"),
    ("little", "small"),
    ("bicycle", "bike"),
    ("sofa", "couch"),
    ("kid", "child"),
    ("kids", "children"),
    ("shop", "store"),
    ("stone", "rock"),
    ("near", "close to"),
    ("next to", "beside"),
    ("car", "automobile"),
    ("happy", "glad"),
    ("seated", "sitting"),
    ("jumps", "leaps"),
    ("jumping", "leaping"),
    ("fast", "quickly"),
    ("forest", "woods"),
    ("seashore", "beach"),
    ("tell me", "say"),
)
CHINESE = (
    ("图片", "图像"),
    ("照片", "相片"),
    ("自行车", "单车"),
    ("街道", "马路"),
    ("旁边", "边上"),
    ("男人", "男子"),
    ("女人", "女子"),
    ("电影", "影片"),
    ("商店", "店铺"),
    ("高兴", "开心"),
    ("巨大", "庞大"),
    ("石头", "石块"),
    ("看见", "看到"),
    ("描述", "描写"),
    ("海滩", "沙滩"),
    ("森林", "树林"),
)
_MARKED = re.compile(r"<\|")  # where a special token is written out


@dataclass(frozen=True)
class SynonymsConfig:
    """How many of the words that have a synonym are replaced."""

    rate: float = 0.3

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ValueError(f"synonyms.rate={self.rate}: must lie above 0, up to 1; synonyms=None is none")


def with_synonyms(sample: Sample, config: SynonymsConfig, rng: random.Random) -> Sample:
    """A draw of the sample with other words in its questions and captions; answers stay as they are."""
    if any(hasattr(label, "in_tokens") for label in sample.labels.values()):
        return sample  # a label says where in the text it lies
    kept = _kept(sample)

    def varied(turn: Turn) -> Turn:
        if turn.boxes and turn.kind != TEXT:
            return turn  # a question that points at something by its name
        if turn.kind == TEXT:
            return dataclasses.replace(turn, answer=replaced(turn.answer, config.rate, rng, kept=kept))
        return dataclasses.replace(turn, question=replaced(turn.question, config.rate, rng, kept=kept))

    return dataclasses.replace(sample, turns=tuple(varied(turn) for turn in sample.turns))


def replaced(text: str, rate: float, rng: random.Random, *, kept: Collection[str] = ()) -> str:
    """The text with synonyms at that rate.

    Args:
      kept: texts of which no word is replaced, nor written in the place of another.
    """
    if _MARKED.search(text):
        return text
    found: dict[tuple[int, int], str] = {}
    for match in _pattern().finditer(text):
        word = match[0].lower()
        others = [w for w in _synonyms()[word] if not _said(w, kept)]
        if others and not _said(word, kept) and rng.random() < rate:
            found[match.span()] = rng.choice(others)
    return rewritten(text, found)


def _said(word: str, kept: Collection[str]) -> bool:
    return any(word in text for text in kept)


def _kept(sample: Sample) -> list[str]:
    """All that answers and labels say, in small letters."""
    answers = [turn.answer for turn in sample.turns if turn.kind != TEXT]
    return [text.lower() for text in (*answers, *_texts(tuple(sample.labels.values())))]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in _texts(part)]
    return []


@functools.cache
def _synonyms() -> dict[str, tuple[str, ...]]:
    groups = (*ENGLISH, *CHINESE)
    return {word: tuple(w for w in group if w != word) for group in groups for word in group}


@functools.cache
def _pattern() -> re.Pattern[str]:
    english = "|".join(sorted((w for group in ENGLISH for w in group), key=len, reverse=True))
    chinese = "|".join(sorted((w for group in CHINESE for w in group), key=len, reverse=True))
    return re.compile(rf"\b(?:{english})\b|{chinese}", re.IGNORECASE)
