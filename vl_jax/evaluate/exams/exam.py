"""An exam as a task: its prompt around the questions of a source, and metrics of the answers.

    source --questions_of--> Question --prompt, pictures--> Sample --ask--> predictions --score--> Findings

The source says how files are laid out (``ExamConfig``), the exam what is asked and how it is judged. So the
same exam can be asked of a run while it trains, and of any model folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from typing import Annotated, Any

import jax
from PIL import Image as PilImage

import vl_jax
from vl_jax import schema
from vl_jax.data.config import find_source, opened
from vl_jax.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from vl_jax.evaluate.exams.answering import ask
from vl_jax.evaluate.exams.crowd import Crowd, pool_of
from vl_jax.evaluate.exams.metrics import Circular, OCRBench, PhraseBoxes
from vl_jax.evaluate.exams.predictions import PredictionFile
from vl_jax.evaluate.exams.question import Question, check_prompt, questions_of, written
from vl_jax.evaluate.exams.scoring import Parser, Scored, score
from vl_jax.evaluate.exams.stress import Stress, WorseImage
from vl_jax.evaluate.task import AnswerMetric, Examinee, Findings, Record, scores_of
from vl_jax.evaluate.tasks.answers import BuiltIn
from vl_jax.generation.decode import Writer, warn_if_not_causal
from vl_jax.runtime.checksums import checksums
from vl_jax.runtime.version import commit
from vl_jax.schema import Open

_PICTURES = 120  # records that keep their picture
_PICTURE = 640  # pixels of its longer side
_UNASKED = ("metrics", "headline", "parser")  # fields that judge answers, and change none


@dataclasses.dataclass(frozen=True)
class Exam:
    """Questions with pictures, asked by a prompt, answered greedily, read by a parser, judged by metrics."""

    layout: str  # of the published files, one of ``LAYOUTS``; what is read is up to the source
    prompt: str  # with {question}, and perhaps {hint} and {options}; the pictures stand in front of it
    headline: str  # the score that is shown first, one of those of ``metrics``
    metrics: tuple[
        Annotated[
            BuiltIn | OCRBench | Circular | PhraseBoxes | AnswerMetric, Open("metric", ("name", "start"))
        ],
        ...,
    ]
    parser: Parser = "whole"  # what of a prediction is the answer
    max_new_tokens: int = 32  # of an answer
    stress: Stress | None = None  # what is done to the pictures
    crowd: Crowd | None = None  # further pictures in the prompt

    def __post_init__(self):
        check_prompt(self.prompt)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        names = [name for metric in self.metrics for name in scores_of(metric)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"metrics: two scores are called {twice!r}; give one metric another name")
        if self.headline not in names:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(names)}")

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Scored:
        """Judges predictions by id, whoever made them; raises as ``scoring.score``."""
        return score(self.metrics, questions, predictions, parser=self.parser)

    def prompts(self, questions: Sequence[Question]) -> list[Sample]:
        """What a model is asked, one conversation of one turn for each question.

        Raises:
          ValueError: there are too few pictures for a crowd.
        """
        pool = pool_of(questions) if self.crowd is not None else []
        return [self._prompt(question, pool) for question in questions]

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Asks what is not answered yet, then judges everything.

        Raises:
          ValueError: a question cannot be read, or a score is not finite; see ``score``.
        """
        model = examinee.layout.model
        if not isinstance(model, Writer):
            kind = type(model).__name__
            raise ValueError(f"the model is a {kind}, which writes no text; an exam asks for texts")
        for metric in self.metrics:
            metric.start()  # before the first answer, as its package may be missing
        warn_if_not_causal(model)
        source = opened(examinee.data, find_source(examinee.data, examinee.source))
        questions = questions_of(source, limit=examinee.extent.limit)
        samples = self.prompts(questions)
        asked = {
            **self._asked(examinee),
            "data": {"questions": len(questions), "digest": _digest(source, questions)},
        }
        notes = {"commit": commit(), "vl_jax": vl_jax.__version__, "jax": jax.__version__}
        file = PredictionFile(
            examinee.kept,
            task=self.layout,
            asked=asked,
            ids=[question.id for question in questions],
            writes=jax.process_index() == 0,
            notes=notes,
        )
        predictions = ask(examinee, samples, file, max_new_tokens=self.max_new_tokens)
        scored = self.score(questions, predictions)
        for number, (question, sample) in enumerate(zip(questions, samples, strict=True)):
            problem = file.done[question.id].get("problem")
            yield {
                "id": question.id,
                "question": question.text,
                "answer": " | ".join(dict.fromkeys(question.references)),
                "references": list(question.references),
                "prompt": sample.turns[0].question,
                "prediction": predictions[question.id],
                "judged": scored.answers[question.id],
                "scores": {name: values[question.id] for name, values in scored.values.items()},
                "cluster": question.cluster,
                **question.groups,
                **({"problem": problem} if problem else {}),
                "image": self._shown(question, sample) if number < _PICTURES and not problem else None,
            }
        judged = json.loads(schema.to_json(self))
        unanswered = sum("problem" in file.done[question.id] for question in questions)
        return Findings(
            {**scored.scores, "unanswered": unanswered},
            scored.groups,
            scored.shares,
            intervals=scored.intervals,
            settings={**asked, **notes, **{name: judged[name] for name in _UNASKED}},
        )

    def _prompt(self, question: Question, pool: Sequence[Question]) -> Sample:
        images, lead = question.images, ""
        if self.crowd is not None:
            images, lead = self.crowd.around(question, pool)
        if self.stress is not None:
            stress = self.stress
            images = tuple(
                WorseImage(image, stress, f"{question.id}/{place}") for place, image in enumerate(images)
            )
        text = f"{IMAGE_PLACEHOLDER}\n" * len(images) + lead + written(self.prompt, question)
        return Sample(question.id, (Turn(text, ""),), images)

    def _shown(self, question: Question, sample: Sample) -> PilImage.Image | None:
        """The picture of a question, small, for people to look at: as it was asked, or its own of a crowd."""
        images = sample.images if self.crowd is None else question.images
        if not images:
            return None
        picture = images[0]().copy()
        picture.thumbnail((_PICTURE, _PICTURE))
        return picture

    def _asked(self, examinee: Examinee) -> dict[str, Any]:
        """What answers follow from, beside the data."""
        own = json.loads(schema.to_json(self))
        data, extent = examinee.data, examinee.extent
        state = {**examinee.variables, "routing": examinee.routing_state}
        sums = json.dumps(checksums(state), sort_keys=True)
        return {
            **{name: value for name, value in own.items() if name not in _UNASKED},
            "decoding": "greedy",
            "limit": extent.limit,
            "batch_size": extent.batch_size,
            "images": examinee.pictures
            or {
                "tiling": json.loads(schema.to_json(data.tiling)),
                "decoding": data.decoding,
                "max_tiles": data.max_tiles,
            },
            "max_tokens": data.max_tokens,
            "dtype": getattr(examinee.layout.model.config, "dtype", ""),
            "model": hashlib.sha256(sums.encode()).hexdigest(),
        }


def _digest(source: Any, questions: Sequence[Question]) -> str:
    """That of the source's files, where it has one; else of what is asked."""
    if hasattr(source, "digest"):
        return source.digest
    text = json.dumps([[q.id, q.text, q.references, q.cluster] for q in questions], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
