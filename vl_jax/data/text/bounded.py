"""Texts so long that they cannot fit: they are cut before they are made tokens, which would take for ever.

    a text of 100 MB, room for 2,048 tokens   -->   its beginning, of more than twice as many tokens

What is cut is more than twice too long even so: it is refused, or cut at its end, as the whole text would be.
"""

from __future__ import annotations

import dataclasses

from vl_jax.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from vl_jax.data.text.tokenizer import Tokenizer

_CHARACTERS = 64  # of a token: far more than it usually has


def bounded(sample: Sample, tokenizer: Tokenizer, most: int) -> Sample:
    """The sample itself, or one whose texts of far more than ``most`` tokens are cut; image marks stay."""
    turns = (text for turn in sample.turns for text in (turn.question, turn.answer))
    if max(map(len, (sample.system, *turns))) <= _CHARACTERS * most:
        return sample

    def cut(text: str) -> str:
        size = _CHARACTERS * most
        while size < len(text):
            if len(tokenizer.encode(text[:size])) > 2 * most:
                lost = text.count(IMAGE_PLACEHOLDER) - text.count(IMAGE_PLACEHOLDER, 0, size)
                return text[:size] + IMAGE_PLACEHOLDER * lost
            size *= 2
        return text

    def turn(whole: Turn) -> Turn:
        return dataclasses.replace(whole, question=cut(whole.question), answer=cut(whole.answer))

    return dataclasses.replace(sample, system=cut(sample.system), turns=tuple(map(turn, sample.turns)))
