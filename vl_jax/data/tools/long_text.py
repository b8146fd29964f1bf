"""Texts that are longer than a sample may be, as several samples in a row that say all of it.

turn 1, turn 2, turn 3, turn 4   -->   turns 1 and 2  |  turn 3  |  turn 4       as many as fit
one long text                    -->   its beginning  |  what follows  | ...     between two tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from vl_jax.data.sample import TEXT, Sample, Turn
from vl_jax.data.text.chat import Turns, encode_dialogue
from vl_jax.data.text.tokenizer import Tokenizer


def split(sample: Sample, tokenizer: Tokenizer, *, max_tokens: int, turns: Turns) -> list[Sample]:
    """The sample itself if it fits or has images; else samples that fit, one behind the other.

    A question whose answer does not fit stays as it is: it is left out when it is read.
    """

    def length(chosen: Sequence[Turn]) -> int:
        alone = dataclasses.replace(sample, turns=tuple(chosen))
        return len(encode_dialogue(alone, tokenizer, image_lengths=[], turns=turns).tokens)

    if sample.images or length(sample.turns) <= max_tokens:
        return [sample]
    groups: list[list[Turn]] = []
    for turn in sample.turns:
        if groups and length([*groups[-1], turn]) <= max_tokens:
            groups[-1].append(turn)
        elif turn.kind == TEXT and length([turn]) > max_tokens:
            room = max_tokens - length([dataclasses.replace(turn, answer="")])
            groups += [[dataclasses.replace(turn, answer=p)] for p in _pieces(turn.answer, tokenizer, room)]
        else:
            groups.append([turn])
    if len(groups) == 1:
        return [sample]
    return [
        dataclasses.replace(sample, id=f"{sample.id}#{number}", turns=tuple(group))
        for number, group in enumerate(groups)
    ]


def _pieces(text: str, tokenizer: Tokenizer, room: int) -> Iterator[str]:
    """The text in pieces of at most so many tokens; together they are the text, but for space between."""
    text, start, room = text.strip(), 0, max(room, 1)
    while start < len(text):
        stop = _place(text, start, room, tokenizer)
        while stop > start + 1 and len(tokenizer.encode(text[start:stop].strip())) > room:
            stop -= 1  # A character of several tokens, or tokens that read otherwise alone.
        yield text[start:stop].strip()
        start = stop
        while start < len(text) and text[start].isspace():
            start += 1


def _place(text: str, start: int, token: int, tokenizer: Tokenizer) -> int:
    """Where a token behind ``start`` begins, or the text ends; at least one character further."""
    size = 4 * token
    while True:  # No more of a long text is encoded than it takes.
        places = tokenizer.places(text[start : start + size])
        if token < len(places):
            return start + max(places[token], 1)
        if start + size >= len(text):
            return len(text)
        size *= 2
