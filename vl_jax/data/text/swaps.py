"""Texts made wrong by one change: colours, numbers and sides, in English and Chinese.

    A red bus beside two green cars.  -->  A green bus beside two red cars.      two words exchanged
                                           A red bus beside three green cars.    a word replaced
    穿红衣服的两个人                    -->  穿蓝衣服的两个人, 穿红衣服的三个人

What is changed is what a picture shows, so that hardly any result is true of it. Nothing is parsed: a word is
changed only where its neighbours say what it means ("on the left", not "he left"; 红色, not 黄昏). Two words
are exchanged only where the texts behind them differ: "a black and white dog" and "a black dog and a white
dog" say the same either way.

A text-only model may still tell such texts from true ones (SugarCrepe, arXiv 2306.14610): see ``ngrams``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_Place = tuple[int, int]  # where a word begins and ends
_EN_COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "black",
    "white",
    "brown",
    "gray",
)
_EN_NUMBERS = ("two", "three", "four", "five", "six")
_ZH_COLOURS, _ZH_NUMBERS = tuple("红橙黄绿蓝紫粉黑白棕灰"), tuple("两三四五六")
_SPELLINGS = {"grey": "gray", "二": "两"}  # of words that are found, not written
_BODY = "of|side|hand|arm|leg|foot|shoulder|corner"
_LEADS = ("on the", "to the", "from the", "his", "her", "its", "their", "top", "bottom")
_BEFORE_SIDE = "|".join(f"(?<={words} )" for words in _LEADS)
_DETERMINER = r"(?= (?:an?|the|his|her|its|their|him|them|it|two|three|some)\b)"


@dataclass(frozen=True)
class _Rule:
    """Where words of a kind stand, and what may stand there instead."""

    pattern: re.Pattern[str]
    instead: Mapping[str, tuple[str, ...]]  # by the word
    exchanged: bool = False  # whether two of them may change places


def _others(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {word: tuple(w for w in words if w != word) for word in words}


def _next(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The numbers beside each."""
    return {w: tuple(words[j] for j in (i - 1, i + 1) if 0 <= j < len(words)) for i, w in enumerate(words)}


def _pair(one: str, other: str) -> dict[str, tuple[str, ...]]:
    return {one: (other,), other: (one,)}


def _rule(pattern: str, instead: dict[str, tuple[str, ...]], *, exchanged: bool = False) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), instead, exchanged)


_SIDES = _pair("left", "right")
_RULES = (
    _rule(rf"\b(?:{'|'.join((*_EN_COLOURS, 'grey'))})\b", _others(_EN_COLOURS), exchanged=True),
    _rule(rf"[{''.join(_ZH_COLOURS)}](?=[色狗猫马牛衣帽裤裙鞋球包T])", _others(_ZH_COLOURS), exchanged=True),
    _rule(rf"\b(?:{'|'.join(_EN_NUMBERS)})\b(?! (?:of|or)\b)", _next(_EN_NUMBERS), exchanged=True),
    _rule(r"[两二三四五六](?=[个只条匹名位辆人头张])", _next(_ZH_NUMBERS), exchanged=True),
    _rule(rf"(?:{_BEFORE_SIDE})(?:left|right)\b|\b(?:left|right)(?= (?:{_BODY})\b)", _SIDES, exchanged=True),
    _rule(rf"\b(?:over|under){_DETERMINER}", _pair("over", "under")),
    _rule(rf"\b(?:above|below){_DETERMINER}", _pair("above", "below")),
    _rule(rf"\b(?:in front of|behind){_DETERMINER}", _pair("in front of", "behind")),
    _rule(r"(?<=at the )(?:top|bottom)\b", _pair("top", "bottom"), exchanged=True),
    _rule("[左右](?=[边侧面方手上下])", _pair("左", "右"), exchanged=True),
    _rule("[上下](?=[边面方])", _pair("上", "下")),
    _rule("[前后](?=[边面方])", _pair("前", "后")),
)


class Swaps(NamedTuple):
    """Every text that one change makes of a text, in an order that follows from it alone."""

    exchanged: tuple[str, ...]  # two words in each other's place: the words are the same
    replaced: tuple[str, ...]


def swaps(text: str) -> Swaps:
    """What can be changed in a text; nothing in most."""
    found = [(rule, _places(text, rule)) for rule in _RULES]
    return Swaps(
        tuple(changed for rule, words in found if rule.exchanged for changed in _exchanged(text, words)),
        tuple(changed for rule, words in found for changed in _replaced(text, words, rule)),
    )


def _places(text: str, rule: _Rule) -> dict[_Place, str]:
    """Where the rule's words stand, and which they are."""
    spans = [match.span() for match in rule.pattern.finditer(text)]
    return {place: _plain(text[slice(*place)]) for place in spans}


def _exchanged(text: str, words: Mapping[_Place, str]) -> Iterator[str]:
    if any(_joined(text[one[1] : other[0]]) for one, other in itertools.pairwise(words)):
        return
    for one, other in itertools.combinations(dict.fromkeys(words.values()), 2):
        mine, theirs = ([place for place in words if words[place] == word] for word in (one, other))
        if not {_behind(text, place) for place in mine} & {_behind(text, place) for place in theirs}:
            yield rewritten(text, dict.fromkeys(mine, other) | dict.fromkeys(theirs, one))


def _replaced(text: str, words: Mapping[_Place, str], rule: _Rule) -> Iterator[str]:
    for place in words:
        for word in rule.instead[words[place]]:
            # Where the word stands twice, or the other one does too, the change may be true all the same.
            if list(words.values()).count(words[place]) == 1 and word not in words.values():
                yield rewritten(text, {place: word})


def _plain(word: str) -> str:
    return _SPELLINGS.get(word.lower(), word.lower())


def _behind(text: str, place: _Place) -> str:
    """What a word is said of: the word behind it, or the character."""
    match = re.match(r"\W*(?:色?的?)(\w)", text[place[1] :]) if ord(text[place[0]]) > 0x2E7F else None
    match = match or re.match(r"\W*(\w+)", text[place[1] :])
    return match[1].lower().removesuffix("s") if match else ""


def _joined(between: str) -> bool:
    """Whether two words are said of one thing together."""
    return bool(re.fullmatch(r"\s*(?:,|and|&|, and|-and-|or|-|/)?\s*|色?[和与、]?|色的?和", between))


def rewritten(text: str, words: Mapping[_Place, str]) -> str:
    """The text with other words at some places; capitals and a or an follow."""
    for (start, stop), word in sorted(words.items(), reverse=True):
        before, old = text[:start], text[start:stop]
        article = re.search(r"\b(an?)( )$", before, re.IGNORECASE)
        if article and old.isascii():
            kept = article[1][0] + ("n" if word[0] in "aeiou" else "")
            before = before[: article.start()] + kept + " "
        text = before + (word[0].upper() + word[1:] if old[0].isupper() else word) + text[stop:]
    return text
