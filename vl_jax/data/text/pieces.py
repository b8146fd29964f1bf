"""The text of an answer: whole, and piece by piece while its tokens come. Both are the same text.

    tokens 5, 9, 7 --pieces--> "A ", "", "cat"    together whole([5, 9, 7])

What a later token may still change is held back: an incomplete character, a run of byte tokens, the beginning
of a stop string. It is given at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

UNREADABLE = "\ufffd"  # what bytes that are no character become


@runtime_checkable
class Decodes(Protocol):
    """A tokenizer, as far as text is made by it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for a single byte, which is read together with its neighbours."""
        ...


def whole(ids: Sequence[int], tokenizer: Decodes, stop: Sequence[str] = ()) -> str:
    """The text of all tokens of an answer, up to the first stop string."""
    text = tokenizer.decode(ids)
    return text[: _end(text, stop)]


def pieces(
    tokens: Iterable[Sequence[int | None]], tokenizer: Decodes, stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of the first row as it grows, from what ``stream`` gives: ``whole`` in pieces.

    Args:
      tokens: for every step the token of each row; None for a row that has ended.
      stop: strings that end an answer; they are no part of it.
    """
    ids: list[int] = []
    shown = ""
    for token, *_ in tokens:
        if token is None:
            break
        ids.append(token)
        final = _final(ids, tokenizer)
        if _end(final, stop) < len(final):
            break
        sure = final[: len(final) - _begun(final, stop)]
        if len(sure) > len(shown) and sure.startswith(shown):
            yield sure[len(shown) :]
            shown = sure
    rest = whole(ids, tokenizer, stop)[len(shown) :]
    if rest:
        yield rest


def _final(ids: Sequence[int], tokenizer: Decodes) -> str:
    """The text that no further token changes: without incomplete characters, and runs of bytes at the end.

    One byte more may make all bytes of a run unreadable.
    """
    length = len(ids)
    while length and tokenizer.is_byte(ids[length - 1]):
        length -= 1
    return tokenizer.decode(ids[:length]).rstrip(UNREADABLE)


def _end(text: str, stop: Sequence[str]) -> int:
    """Where the stop string begins that is complete first; the length of the text without any."""
    found = [(begin + len(s), begin) for s in stop if s and (begin := text.find(s)) >= 0]
    return min(found)[1] if found else len(text)


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max([n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])], default=0)
