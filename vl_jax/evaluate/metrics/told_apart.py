"""Own texts and wrong ones: how often a picture is more like its own text than like one that is wrong of it.

A tie is wrong, for a model that does not see the difference has not told them apart. The blind baseline,
which knows no picture, has half of a tie: it would toss a coin.
"""

from __future__ import annotations

from collections.abc import Sequence


class ToldApart:
    """Counts pairs of a text and a wrong one, and texts that are before all of theirs."""

    def __init__(self):
        self._pairs = self._right = self._texts = self._all_right = self._without = 0
        self._blind = 0.0

    def update(
        self, own: float, wrong: Sequence[float], blind_own: float, blind_wrong: Sequence[float]
    ) -> None:
        """Takes one text.

        Args:
          own: how like its picture the text is.
          wrong: how like the picture each wrong text is; a text without any is only counted.
          blind_own: how likely the text is.
          blind_wrong: how likely each wrong text is; may be empty.
        """
        right = [other < own for other in wrong]
        self._pairs += len(right)
        self._right += sum(right)
        self._texts += bool(right)
        self._all_right += bool(right) and all(right)
        self._without += not right
        self._blind += sum(1.0 if o < blind_own else 0.5 if o == blind_own else 0.0 for o in blind_wrong)

    def compute(self) -> dict[str, float | int]:
        """Shares of pairs and of texts; no share where there is no wrong text."""
        counts: dict[str, float | int] = {"wrong_texts": self._pairs, "texts_without_wrong": self._without}
        if not self._pairs:
            return counts
        return {
            "told_apart": self._right / self._pairs,
            "blind_told_apart": self._blind / self._pairs,
            "chance_told_apart": 0.5,
            "all_told_apart": self._all_right / self._texts,
            **counts,
        }
