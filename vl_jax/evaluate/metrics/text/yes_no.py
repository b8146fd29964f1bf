"""Yes or no, as POPE asks whether an object is there: accuracy, precision, recall, F1, rate of yes.

"Yes" is what is looked for. A model that says yes to everything has recall 1 and a yes rate of 1; so the rate
stands beside the scores. POPE reports its random, popular and adversarial questions apart. Source: Li et al.,
"Evaluating Object Hallucination in Large Vision-Language Models", 2023; readings are what the scripts do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from vl_jax.evaluate.metrics.per_sample import TextScores
from vl_jax.evaluate.metrics.text.vqa_text import without_marks

Reading = Literal["first", "official", "vlmevalkit", "lmms_eval"]
_SCORES = ("accuracy", "precision", "recall", "f1", "yes_rate", "unreadable")


def read_yes_no(text: str, *, reading: Reading = "first") -> bool | None:
    """What an answer says: True for yes, False for no, None if it is neither.

    Args:
      reading: ``first``: the first "yes" or "no" among its words. ``official``: POPE's script; "no" or "not"
        in the first sentence is no, anything else is yes. ``vlmevalkit``: one of the two words, and not the
        other. ``lmms_eval``: the whole answer is one of the two words.
    """
    if reading == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return not {"No", "not", "no"} & set(words)
    if reading == "lmms_eval":
        return {"yes": True, "no": False}.get(text.lower().strip())
    if reading == "vlmevalkit":
        words = without_marks(text.lower()).split()
        return None if ("yes" in words) == ("no" in words) else "yes" in words
    found = re.search(r"\b(yes|no)\b", text.lower())
    return None if found is None else found[1] == "yes"


@dataclasses.dataclass(frozen=True)
class YesNo:
    """The scores of yes-or-no questions, whose references are "yes" or "no".

    An answer that is neither is wrong, and counts as no "yes". (With lmms-eval's reading it is also left
    out of recall and F1, as there. The kit's "yes ratio" is that of the references; ours is that of the
    answers.)
    """

    name: str = "pope"
    reading: Reading = "first"  # how an answer is read, see ``read_yes_no``

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of all scores."""
        return tuple(f"{self.name}_{score}" for score in _SCORES)

    def start(self) -> TextScores:
        """No answers yet."""
        return TextScores(self.scores, self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, tuple[float, float]]:
        truths = {text.lower().strip() for text in references}
        if truths != {"yes"} and truths != {"no"}:
            raise ValueError(f"references {', '.join(map(repr, references))}: expected 'yes' or 'no'")
        truth = truths == {"yes"}
        said = read_yes_no(prediction, reading=self.reading)
        missed = said is False or (said is None and self.reading != "lmms_eval")
        hit, yes, false_no = truth and said is True, said is True, truth and missed
        false_yes = yes and not truth
        found = {
            "accuracy": (said == truth, 1),
            "precision": (hit, yes),
            "recall": (hit, hit or false_no),
            "f1": (2 * hit, 2 * hit + false_yes + false_no),
            "yes_rate": (yes, 1),
            "unreadable": (said is None, 1),
        }
        return {f"{self.name}_{k}": (float(total), float(size)) for k, (total, size) in found.items()}
