"""How answers to visual questions are brought to one form before they are compared.

Source: the evaluation script of VQA (GT-Vision-Lab/VQA, ``vqaEval.py``), and the answer processor of
Pythia/MMF that TextVQA's server and lmms-eval use. Scores differ by points if a step is left out or two of
them change places.
"""

from __future__ import annotations

import re

# In this order: a mark is looked for in the text as it was, and taken out of what is left.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_APART = re.compile(r"(?<!\d)\.(?!\d)")  # of VLMEvalKit since 2026
_PERIODS = (
    32  # the script takes out so many at most: it hands over re.UNICODE, which is 32, in place of a count
)
_COMMA = re.compile(r"\d,\d")  # of the VQA script and of VLMEvalKit
_COMMAS = re.compile(r"(?<=\d),+(?=\d)")  # of the answer processor: "1,,2" as well
_NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# How the contractions that the script knows are written.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspelt() -> dict[str, str]:
    """Each contraction with one apostrophe missing, by its right spelling.

    The script's entries with a capital letter are left out, as texts are in lower case by then.
    """
    found = {"somebody'd": "somebodyd"}  # so it is in the script
    for word in _CONTRACTED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found


_CONTRACTIONS = _misspelt()


def spaced(text: str) -> str:
    """Line ends and tabs as spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_marks(text: str, *, commas: re.Pattern[str] = _COMMA, periods: re.Pattern[str] = _PERIOD) -> str:
    """Punctuation taken out where it stands by a space or the text has a comma in a number, else a space."""
    anywhere, found = commas.search(text) is not None, text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if anywhere or beside else " ")
    return periods.sub("", found, count=_PERIODS)


def plain_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions with their apostrophe."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_form(text: str) -> str:
    """The form of the VQA script: marks, then words."""
    return plain_words(without_marks(spaced(text)))


def digit_form(text: str) -> str:
    """``vqa_form`` that leaves a full stop behind a digit alone."""
    return plain_words(without_marks(spaced(text), periods=_PERIOD_APART))


def evalai_form(text: str) -> str:
    """The form of the answer processor: commas, question marks and "'s" are seen to before the rest."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return evalai_again(spaced(words))


def evalai_again(text: str) -> str:
    """The two later steps of the answer processor alone, all that lmms-eval takes for VQAv2."""
    return plain_words(without_marks(text, commas=_COMMAS))
