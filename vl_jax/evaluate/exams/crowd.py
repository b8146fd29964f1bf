"""A question among several pictures: its own, and those of other questions, in an order that follows from it.

The score against the number of pictures says whether a model still finds the one that is asked about.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from vl_jax.data.sample import Image
from vl_jax.evaluate.exams.question import Question


@dataclasses.dataclass(frozen=True)
class Crowd:
    """How many pictures there are, and how a prompt says which of them is meant."""

    count: int = 2
    lead: str = "The question is about picture {number} of {count}.\n"  # before the question

    def __post_init__(self):
        if self.count < 2:
            raise ValueError(f"count={self.count} of pictures: expected at least 2; one picture is no crowd")
        try:
            self.lead.format(number=1, count=self.count)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"lead={self.lead!r}: only {{number}} and {{count}} are known: {error}"
            ) from None

    def around(self, question: Question, pool: Sequence[Question]) -> tuple[tuple[Image, ...], str]:
        """The pictures of a question, and what the prompt says of the place of its own.

        Args:
          pool: questions whose pictures may stand beside it, one of each cluster (see ``pool_of``).

        Raises:
          ValueError: the pool has too few pictures, or the question has not exactly one.
        """
        if len(question.images) != 1:
            raise ValueError(
                f"question {question.id!r} has {len(question.images)} pictures; only one can be among others"
            )
        if len(pool) < self.count:
            raise ValueError(f"{self.count} pictures in a prompt: there are only {len(pool)} different ones")
        entropy = hashlib.sha256(f"{question.id}\0crowd".encode()).digest()
        draws = np.random.default_rng(np.frombuffer(entropy, np.uint32))
        place = draws.random()
        chosen: dict[int, Image] = {}
        while len(chosen) < self.count - 1:  # with more pictures, those of the shorter prompt stay
            drawn = int(draws.integers(len(pool)))
            if pool[drawn].cluster != question.cluster:
                chosen.setdefault(drawn, pool[drawn].images[0])
        images, number = list(chosen.values()), int(place * self.count)
        images.insert(number, question.images[0])
        return tuple(images), self.lead.format(number=number + 1, count=self.count)


def pool_of(questions: Sequence[Question]) -> list[Question]:
    """The first question of each cluster that has a picture."""
    found: dict[str, Question] = {}
    for question in questions:
        if question.images:
            found.setdefault(question.cluster, question)
    return list(found.values())
