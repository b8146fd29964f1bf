"""OCRBench: a point for every answer that holds one of its references, of 1000 questions in ten categories.

Both are in lower case, with spaces for line ends. Of handwritten formulas all spaces are taken out and
the case is kept. As a long answer holds more texts, the mean length of the answers stands beside the
score. Source: Liu et al., "OCRBench", 2023, and its script, which VLMEvalKit follows. lmms-eval 0.7.3 also
reads letters of East Asian width as plain ones, but in formulas; its score is the share, VLMEvalKit's the
number of points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList, references_of

Variant = Literal["official", "lmms_eval"]
FORMULAS = "Handwritten Mathematical Expression Recognition"
_RECOGNITION = "Text Recognition"
# The five groups that the paper reports, by category.
GROUPS = {
    "Regular Text Recognition": _RECOGNITION,
    "Irregular Text Recognition": _RECOGNITION,
    "Artistic Text Recognition": _RECOGNITION,
    "Handwriting Recognition": _RECOGNITION,
    "Digit String Recognition": _RECOGNITION,
    "Non-Semantic Text Recognition": _RECOGNITION,
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    FORMULAS: FORMULAS,
}


# Letters, digits and marks of East Asian width, and the space.
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def holds_reference(
    references: Sequence[str], prediction: str, *, formulas: bool = False, variant: Variant = "official"
) -> bool:
    """Whether an answer holds one of its references.

    Args:
      formulas: whether it is about a formula.
      variant: ``official``: its script, and VLMEvalKit. ``lmms_eval``: with plain letters for wide ones.

    Raises:
      ValueError: a reference is empty, which any answer would hold.
    """

    def form(text: str) -> str:
        if formulas:
            return text.strip().replace("\n", " ").replace(" ", "")
        plain = text.strip().translate(_WIDE) if variant == "lmms_eval" else text
        return plain.lower().strip().replace("\n", " ")

    if not all(form(reference) for reference in references):
        raise ValueError("a reference is empty; any answer would hold it")
    return any(form(reference) in form(prediction) for reference in references)


class OCRBenchScores:
    """The score over all questions, by group and by category.

    Args:
      variant: see ``holds_reference``.
    """

    def __init__(self, variant: Variant = "official"):
        self._variant: Variant = variant
        self._found = SampleList(("ocrbench", "answer_length"))
        self._by_category: dict[str, list[bool]] = {}

    def update(
        self, truth: str | Sequence[str], prediction: str, *, category: str, cluster: str | None = None
    ) -> None:
        """Takes one question.

        Raises:
          ValueError: there is no reference, or one is empty, or there is no such category.
        """
        number = len(self._found)
        if category not in GROUPS:
            raise ValueError(f"sample {number}: category={category!r}: expected one of {', '.join(GROUPS)}")
        references = references_of(truth, prediction, number)
        try:
            right = holds_reference(
                references, prediction, formulas=category == FORMULAS, variant=self._variant
            )
        except ValueError as error:
            raise ValueError(f"sample {number}: {error}") from None
        self._by_category.setdefault(category, []).append(right)
        self._found.add({"ocrbench": float(right), "answer_length": float(len(prediction))}, cluster)

    def samples(self) -> dict[str, PerSample]:
        """The score and the length of the answer, sample by sample; ValueError without a sample."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """``ocrbench`` (the share), ``points``, ``answer_length`` in characters, and points by group.

        Groups and categories without a question are left out. ValueError without a sample.
        """
        scores = self._found.compute()
        points = {f"points/{name}": sum(right) for name, right in self._by_category.items()}
        for category, right in self._by_category.items():
            if (group := GROUPS[category]) != category:
                points[f"points/{group}"] = points.get(f"points/{group}", 0) + sum(right)
        return {**scores, "points": sum(map(sum, self._by_category.values())), **points}
