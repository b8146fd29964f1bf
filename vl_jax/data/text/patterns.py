"""What a tokenizer file of somebody else does to a text: it may take no time and no memory without bound.

The library that divides texts tries one way after another (it is Oniguruma). Where something whose length
varies is repeated, as in ``(a+)+``, the number of ways doubles with every character. Such patterns are
refused before a text is read. Alternatives that begin with different characters, as in ``(?:ab|c)+``, leave
one way at each place, and pass. What is left takes a number of steps that grows as a small power of the
text's length. Replacements, one behind the other, may make a text longer, but not by every factor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

LONGEST = 20_000  # characters of a pattern; the longest published ones have a few thousand
MOST_COPIES = 10_000  # of what is repeated by number, counted through all levels
MOST_OPEN = 4  # repetitions without bound, one behind the other
DEEPEST = 50  # levels of brackets
MOST_GROWTH = 1000  # how many times as long replacements may make a text, all together

_NUMBERED = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\(\?(?:#|<?[=!]|[:>]|<\w+>|'\w+'|[imsWDSP-]*[:)])")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{[^}]*\}|[xuo](?:\{[^}]*\}|[0-9a-fA-F]{0,4})|[gk][<'][^>']*[>']|.)", re.DOTALL
)
_LOOKS = ("(?=", "(?!", "(?<=", "(?<!")  # they match no character
_PLAIN_CLASS = re.compile(r"\[[^\\\[\]^&-](?:[^\\\[\]^&-]|-[^\\\[\]^&-])*\]")
_ESCAPED = {"\\n": "\n", "\\r": "\r", "\\t": "\t", **{f"\\{mark}": mark for mark in "\\.^$*+?|()[]{}/-"}}


@dataclasses.dataclass(frozen=True)
class _Extent:
    """What is known of a part of a pattern."""

    varies: bool = False  # it matches one place in more than one way
    copies: int = 1  # that numbers in braces make of it
    open: int = 0  # repetitions without bound in it, one behind the other
    # The small ASCII letters and other ASCII characters that a match begins with; None: it may be others, or
    # there may be none. Letters of both sizes count as one, as a pattern may ignore the size.
    first: frozenset[str] | None = None


def check_file(description: Any) -> None:
    """Raises ValueError, in one line, for a parsed ``tokenizer.json`` that may do so."""
    growth = 1
    for part in _objects(description):
        if isinstance(pattern := part.get("Regex"), str):
            check(pattern)
        if part.get("type") == "Replace":
            growth *= max(1, len(str(part.get("content", ""))))
    if growth > MOST_GROWTH:
        raise ValueError(f"its replacements make a text more than {MOST_GROWTH} times as long")


def _objects(description: Any) -> Iterator[dict[str, Any]]:
    """Every object in the description but for the vocabulary."""
    waiting = [description]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += [inner for key, inner in value.items() if key not in ("vocab", "merges")]
        elif isinstance(value, list):
            waiting += value


def check(pattern: str) -> None:
    """Raises ValueError, in one line, for a pattern that may take time or memory without bound."""
    shown = pattern if len(pattern) < 100 else f"{pattern[:100]}..."
    if len(pattern) > LONGEST:
        raise ValueError(
            f"the pattern {shown!r} has {len(pattern)} characters; at most {LONGEST} are allowed"
        )
    try:
        _PatternReader(pattern).read()
    except _Unbounded as reason:
        raise ValueError(
            f"the pattern {shown!r} may take time without bound: {reason}; write it without that, or take "
            "another tokenizer"
        ) from None


class _Unbounded(Exception):
    """Says what makes a pattern slow."""


class _PatternReader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str):
        self._text, self._at = pattern, 0

    def read(self) -> _Extent:
        """The whole pattern. Whether its brackets match is for the library to say."""
        part = self._branches(0)
        while self._at < len(self._text):
            self._at += 1
            part = self._branches(0)
        return part

    def _branches(self, depth: int) -> _Extent:
        """Alternatives, up to the bracket that closes them."""
        if depth > DEEPEST:
            raise _Unbounded(f"brackets are nested more than {DEEPEST} deep")
        found = [self._sequence(depth)]
        while self._text.startswith("|", self._at):
            self._at += 1
            found.append(self._sequence(depth))
        firsts = [part.first for part in found if part.first is not None]
        first = frozenset().union(*firsts) if len(firsts) == len(found) else None
        are_apart = first is not None and len(first) == sum(map(len, firsts))
        varies = any(part.varies for part in found) or (len(found) > 1 and not are_apart)
        copies, endless = max(part.copies for part in found), max(part.open for part in found)
        return _Extent(varies, copies, endless, first)

    def _sequence(self, depth: int) -> _Extent:
        varies, copies, endless, first, begin = False, 1, 0, None, self._at
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            start = self._at
            part = self._repeated(self._one(depth), start)
            first = part.first if start == begin else first
            varies, copies, endless = varies or part.varies, copies + part.copies, endless + part.open
            if copies > MOST_COPIES + LONGEST:
                raise _Unbounded(f"its numbers make more than {MOST_COPIES} copies")
            if endless > MOST_OPEN:
                raise _Unbounded(f"more than {MOST_OPEN} repetitions without end stand behind one another")
        return _Extent(varies, copies, endless, first)

    def _one(self, depth: int) -> _Extent:
        """A character, a class of characters or a group."""
        text, character = self._text, self._text[self._at]
        if character == "\\":
            match = _ESCAPE.match(text, self._at)
            self._at = len(text) if match is None else match.end()
            if match is not None and match[0][:2] == "\\g":
                raise _Unbounded(f"{match[0]} calls a group")
            escape = "" if match is None else match[0]
            first = _only(_ESCAPED.get(escape, ""))
            return _Extent(varies=escape[1:2] in [*"k123456789"], first=first)
        if character == "[":
            start, self._at = self._at, self._end_of_class()
            return _Extent(first=_members(text[start : self._at]))
        self._at += 1
        return self._group(depth) if character == "(" else _Extent(first=_only(character.strip(".^$*+?{}")))

    def _group(self, depth: int) -> _Extent:
        opening = _GROUP.match(self._text, self._at - 1)
        if self._text.startswith("?", self._at) and opening is None:
            raise _Unbounded(f"{self._text[self._at - 1 : self._at + 4]!r} begins a group of an unusual kind")
        if opening is not None:
            self._at = opening.end()
            if opening[0] == "(?#":
                closing = self._text.find(")", self._at)
                self._at = len(self._text) if closing < 0 else closing + 1
                return _Extent(varies=True)
            if opening[0].endswith(")"):  # it holds for what follows, as a group of its own
                return self._branches(depth + 1)
        part = self._branches(depth + 1)
        self._at += 1
        looks = opening is not None and opening[0] in _LOOKS
        return dataclasses.replace(part, first=None) if looks else part

    def _end_of_class(self) -> int:
        """Where the characters in square brackets end, which may hold others in brackets."""
        text, at, depth = self._text, self._at, 0
        while at < len(text):
            if text[at] == "\\":
                at += 1
            elif text[at] == "[":
                depth += 1
                at += text.startswith("^", at + 1)
                at += text.startswith("]", at + 1)  # the first one is a character
            elif text[at] == "]":
                depth -= 1
                if not depth:
                    return at + 1
            at += 1
        return at

    def _repeated(self, part: _Extent, start: int) -> _Extent:
        """The part with what stands behind it: ``*``, ``+``, ``?`` or numbers, and how eager they are."""
        quantifiers = 0
        while (bounds := self._quantifier()) is not None:
            least, most = bounds
            quantifiers += 1
            several = most is None or most > 1
            if several and (part.varies or quantifiers > 1):
                what = self._text[start : self._at]
                raise _Unbounded(f"{what[:60]!r} repeats what varies in length")
            copies = part.copies * max(least, most or 1)
            if copies > MOST_COPIES:
                raise _Unbounded(f"its numbers make more than {MOST_COPIES} copies")
            first = part.first if least else None
            part = _Extent(part.varies or least != most, copies, part.open + (most is None), first)
        return part

    def _quantifier(self) -> tuple[int, int | None] | None:
        """Bounds of the quantifier that stands here, behind which the pattern is then read on."""
        character = self._text[self._at : self._at + 1]
        if character and character in "*+?":
            self._at += 1
            if self._text[self._at : self._at + 1] in ("?", "+"):  # lazy, or for good
                self._at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        match = _NUMBERED.match(self._text, self._at)
        if match is None or not (match[1] or match[3]):
            return None
        self._at = match.end()
        if self._text.startswith("?", self._at):
            self._at += 1
        least = min(int(match[1] or 0), MOST_COPIES + 1)
        most = least if not match[2] else min(int(match[3]), MOST_COPIES + 1) if match[3] else None
        return least, most


def _only(character: str) -> frozenset[str] | None:
    """The set of one ASCII character; None for all others, and for none."""
    return frozenset(character.lower()) if len(character) == 1 and character.isascii() else None


def _members(text: str) -> frozenset[str] | None:
    """The characters of a class in brackets, if it only names ASCII characters and stretches of them."""
    if not text.isascii() or _PLAIN_CLASS.fullmatch(text) is None:
        return None
    found: set[str] = set()
    for low, high in re.findall(r"(.)(?:-(.))?", text[1:-1], re.DOTALL):
        found.update(map(chr, range(ord(low), ord(high or low) + 1)))
    return frozenset(character.lower() for character in found)
