"""Words of a caption, as the scores of captions count them.

The scores of COCO take what Stanford's Penn Treebank tokenizer makes of a lower-case text, without eleven
kinds of punctuation. That tokenizer is a Java program. This one follows the same rules as far as captions
need them: clitics apart ("it 's", "do n't"), marks apart, words with hyphens and numbers whole, brackets
by name. A Chinese character, or a Japanese one, is a word by itself.
"""

from __future__ import annotations

import re

_EAST = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = rf"[^\W{_EAST}]"
_TOKEN = re.compile(
    rf"""
      [{_EAST}]
    | (?:[a-z]\.){{2,}}                                                 # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|prof|gen|rev|etc)\.                   # shortened words keep their stop
    | '\d0s | '(?:s|m|re|ve|ll|d)\b                                     # '90s, and clitics after a space
    | \d+(?:[.,:/]\d+)+(?!\w)                                           # 1,000.5 and 10:30
    | {_WORD}+(?:(?:[-/&@]|'(?=\w)){_WORD}+)*
    | \.\.\. | [!?]+ | -+
    | [^\w\s]
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=.)(?:n't|'(?:s|m|re|ve|ll|d))$")
_TWO_WORDS = {
    whole: (whole[:cut], whole[cut:])
    for whole, cut in {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3}.items()
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# What COCO's script leaves out. It names brackets in capital letters, so those of a lower-case text stay.
_LEFT_OUT = {"'", '"', "`", ".", "?", "!", ",", ":", "-", "--", "---", "...", ";"}
_ALIKE = str.maketrans(
    {**dict.fromkeys("‘’", "'"), **dict.fromkeys("“”", '"'), "–": " -- ", "—": " -- ", "…": " ... "}
)


def ptb_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    words: list[str] = []
    for token in _TOKEN.findall(text.lower().translate(_ALIKE)):
        if token not in _LEFT_OUT:
            words += _parts(_BRACKETS.get(token) or token)
    return words


def _parts(token: str) -> list[str]:
    """A word and its clitics."""
    ends: list[str] = []
    while clitic := _CLITIC.search(token):
        token, end = token[: clitic.start()], token[clitic.start() :]
        ends.insert(0, end)
    return [*_TWO_WORDS.get(token, (token,)), *ends]
