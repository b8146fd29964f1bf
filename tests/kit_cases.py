"""Answers and references that scoring scripts could read differently: marks, digits, other scripts, nothing.

A case is ``{"task", "references", "prediction"}`` and what the task needs besides; all of it is made here.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np

Case = dict[str, Any]

WORDS = """
    red Red RED circle a an the two Two ten none zero yes no Yes no. not cat's cats dont don't youre it's
    10 3.5 3.14 1,000 1,,2 5 5. .5 -2 0 0.0 12% 12 $5 3/4 1e3 nan 07 2 % 5% 100 105 95 94.9 50%
    left-hand (blue) "green" New-York St. U.S.A. what? hello! a,b a;b x=y x_y [1] {z} @home
    café naïve ÅÄÖ ẞ İstanbul ﬁne 红色 圆形 两 是 否 ＡＢＣ ｙｅｓ 全角　空格 １２％ кот
""".split()
JOINTS = (" ", " ", " ", "  ", "\n", "\t", ", ", "-", "", " . ", "? ", "/")
OPTIONS = ("red circle", "blue square", "a green cat", "Two", "New-York", "红色", "12%", "it's a dog")


def text(rng: np.random.Generator, most: int = 4) -> str:
    """A few words with something between them; now and then nothing, or spaces alone."""
    if rng.random() < 0.03:
        return str(rng.choice(["", " ", "\n", "."]))
    words = rng.choice(WORDS, rng.integers(1, most + 1))
    found = str(words[0])
    for word in words[1:]:
        found += str(rng.choice(JOINTS)) + str(word)
    return found


def near(rng: np.random.Generator, said: str) -> str:
    """The text, or one that differs from it in a way that scripts forgive or not."""
    changes: tuple[Callable[[str], str], ...] = (
        lambda t: t,
        lambda t: t,
        str.upper,
        str.lower,
        lambda t: f" {t} ",
        lambda t: f"{t}   ",
        lambda t: f"{t}.",
        lambda t: f"the {t}",
        lambda t: f"{t}?",
        lambda t: t.replace(" ", ""),
        lambda t: t.replace(" ", "\n"),
        lambda t: f"it is {t}",
        lambda t: t[: len(t) // 2],
        lambda t: t[::-1],
        lambda t: f"{t}%",
        lambda t: _folded(t),
    )
    return changes[rng.integers(len(changes))](said)


def _folded(said: str) -> str:
    """With the letters and digits of East Asian width."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in said)


def people(rng: np.random.Generator) -> Case:
    """Ten answers of people, of which some agree."""
    pool = [text(rng, 3) for _ in range(rng.integers(1, 5))]
    answers = [str(rng.choice(pool)) for _ in range(10)]
    if rng.random() < 0.3:
        answers = [near(rng, answer) if rng.random() < 0.3 else answer for answer in answers]
    said = near(rng, answers[0]) if rng.random() < 0.8 else text(rng, 3)
    return {"references": answers, "prediction": said}


def few(rng: np.random.Generator) -> Case:
    """One to three references."""
    references = [text(rng) for _ in range(rng.integers(1, 4))]
    said = near(rng, references[0]) if rng.random() < 0.8 else text(rng)
    return {"references": references, "prediction": said}


def number(rng: np.random.Generator) -> Case:
    """One reference, as often as not a number, and an answer about as large."""
    if rng.random() < 0.4:
        case = few(rng)
        return {"references": case["references"][:1], "prediction": case["prediction"]}
    value = float(rng.choice([0, 1, 10, 12.5, 100, 2019, -3, 0.5]))
    factor = float(rng.choice([1, 1.05, 0.95, 1.051, 0.9499, 1.02, 2, 0.01]))
    forms = ("{:g}", "{:.1f}", "{:g}%", "{:,.0f}", " {:g}", "{:g} ", "${:g}", "{:g}.")
    truth, said = (str(rng.choice(forms)).format(x) for x in (value, value * factor))
    return {"references": [truth], "prediction": said}


def yes_or_no(rng: np.random.Generator) -> Case:
    """A reference of yes or no, and an answer that may be one."""
    said = str(
        rng.choice(["yes", "no", "Yes", "No.", " yes ", "Yes, it is", "no, not yes", "YES", "not", "know"])
    )
    return {
        "references": [str(rng.choice(["yes", "no", "Yes", "No"]))],
        "prediction": text(rng) if rng.random() < 0.15 else near(rng, said),
    }


def read_text(rng: np.random.Generator) -> Case:
    """References that an answer may hold, none of them empty; now and then a formula."""
    case = few(rng)
    references = [r if r.strip() else "x" for r in case["references"]]
    formula = bool(rng.random() < 0.25)
    return {**case, "references": references, "formula": formula, "category": formula_category(formula)}


def formula_category(formula: bool) -> str:
    """A category of OCRBench."""
    return "Handwritten Mathematical Expression Recognition" if formula else "Doc-oriented VQA"


def box(rng: np.random.Generator) -> Case:
    """A true box in shares of the picture, and an answer that holds a box, or hardly."""
    corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) + [[0, 0], [0.01, 0.01]]
    truth = [round(float(x), 4) for x in corners.ravel()]
    said = (
        [x + float(rng.normal(0, 0.05)) for x in truth] if rng.random() < 0.8 else list(rng.uniform(0, 1, 4))
    )
    if rng.random() < 0.1:
        said = said[::-1]
    if rng.random() < 0.05:
        said = [float(round(x)) for x in said]
    forms = (
        "[{:.3f}, {:.3f}, {:.3f}, {:.3f}]",
        "[{:.3f},{:.3f},{:.3f},{:.3f}]",
        "it is at [ {:.2f}, {:.2f}, {:.2f}, {:.2f} ].",
        "({:.2f}, {:.2f}, {:.2f}, {:.2f})",
        "[{:.2f} , {:.2f}, {:.2f}, {:.2f}]",
        "[{:.2f}, {:.2f}, {:.2f}]",
        "[[{:.3f}, {:.3f}, {:.3f}, {:.3f}]]",
        "[{:.0f}, {:.0f}, {:.0f}, {:.0f}] [0, 0, 1, 1]",
    )
    weights = np.array([5, 3, 2, 1, 1, 1, 1, 1]) / 15
    return {"references": [], "box": truth, "prediction": str(rng.choice(forms, p=weights)).format(*said)}


def option(rng: np.random.Generator) -> Case:
    """Options by letter, and an answer that may name one by its letter or its text."""
    chosen = rng.choice(OPTIONS, rng.integers(2, 5), replace=False)
    options = {letter: str(o) for letter, o in zip(string.ascii_uppercase, chosen, strict=False)}
    letter = str(rng.choice(list(options)))
    forms = (
        *(
            "{l}",
            "{l}.",
            "({l})",
            "{l}. {t}",
            "The answer is {l}",
            "The answer is ({l}).",
            "{t}",
            "{t}.",
            ":{l}",
        ),
        *(
            "A cat is {l} I think of it as such",
            "{l} or A",
            "I do not know",
            "{l}: {t}",
            "it is {t} then",
            "",
            "Z",
        ),
        *("Z {t}", "{l},", "Cannot determine the answer, {l}", "{l}) {t}", "e", "E"),
    )
    said = str(rng.choice(forms)).format(l=letter, t=options[letter])
    return {"references": [letter], "options": options, "prediction": said}


# By the kit's task whose script scores it.
MAKERS: dict[str, Callable[[np.random.Generator], Case]] = {
    "lmms_eval/vqav2": people,
    "lmms_eval/textvqa": people,
    "lmms_eval/docvqa": few,
    "lmms_eval/chartqa": number,
    "lmms_eval/pope": yes_or_no,
    "lmms_eval/ocrbench": read_text,
    "lmms_eval/refcoco": box,
    "lmms_eval/mmbench": option,
    "vlmevalkit/vqa": people,
    "vlmevalkit/docvqa": few,
    "vlmevalkit/chartqa": number,
    "vlmevalkit/pope": yes_or_no,
    "vlmevalkit/ocrbench": read_text,
    "vlmevalkit/mmbench": option,
}


def cases(task: str, count: int, seed: int = 0) -> list[Case]:
    """So many cases of a task, the same for the same seed."""
    rng = np.random.default_rng([seed, *task.encode()])
    return [{"task": task, **MAKERS[task](rng)} for _ in range(count)]
