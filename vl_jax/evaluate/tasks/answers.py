"""Question answering: short answers, right if they match after normalising, against two blind baselines.

*blind*: the same model with the image withheld. *prior*: the most frequent training answer to the same
question (or kind of question). What a model knows beyond both, it saw.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Annotated, Any

from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import track

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, opened
from vl_jax.data.published.stops import stops_of_data
from vl_jax.data.sample import BadSample
from vl_jax.data.text.normalize import normalize
from vl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vl_jax.evaluate.gates import gate_use
from vl_jax.evaluate.metrics.exact_match import ExactMatch, is_match
from vl_jax.evaluate.metrics.pixels.boxes import BoxAccuracy
from vl_jax.evaluate.metrics.text.anls import ANLS
from vl_jax.evaluate.metrics.text.bleu import BLEU, ChrF
from vl_jax.evaluate.metrics.text.cider import CIDErD
from vl_jax.evaluate.metrics.text.error_rate import ErrorRate
from vl_jax.evaluate.metrics.text.relaxed import RelaxedAccuracy
from vl_jax.evaluate.metrics.text.rouge import RougeL
from vl_jax.evaluate.metrics.text.vqa import VQAAccuracy
from vl_jax.evaluate.metrics.text.yes_no import YesNo
from vl_jax.evaluate.task import (
    AnswerMetric,
    Compared,
    Examinee,
    Findings,
    Grouped,
    Record,
    scores_of,
    shares_of,
)
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import warn_if_not_causal
from vl_jax.generation.generate import answer_ids, generate
from vl_jax.layout import put_batch
from vl_jax.schema import Open

BuiltIn = (
    ExactMatch
    | VQAAccuracy
    | ANLS
    | RelaxedAccuracy
    | YesNo
    | BoxAccuracy
    | CIDErD
    | RougeL
    | BLEU
    | ChrF
    | ErrorRate
)

_BASELINES = ("blind", "prior")
_GROUPS = ("kind", "language")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Every question of the source, answered greedily; by kind of question and by language."""

    headline: str = "exact_match"  # the score that is shown first, one of those of ``metrics``
    metrics: tuple[Annotated[BuiltIn | AnswerMetric, Open("metric", ("name", "start"))], ...] = (
        ExactMatch(),
    )

    def __post_init__(self):
        names = _with_baselines(name for metric in self.metrics for name in scores_of(metric))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"metrics: two scores are called {twice!r}; give one metric another name")
        if self.headline not in names:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(names)}")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Answers everything without the image first, then with it."""
        warn_if_not_causal(examinee.layout.model)
        # Before the first answer, as a metric's package may be missing.
        grouped = Grouped(lambda: Compared(self.metrics, _BASELINES), _GROUPS)
        prior = Prior(training_turns(examinee.data, examinee.extent.prior_samples))
        blind = {record["id"]: text for record, text in answered(examinee, with_image=False)}
        for record, text in answered(examinee):
            guesses = {
                "blind": blind.get(record["id"], ""),
                "prior": prior.predict(record["question"], record["kind"]),
            }
            grouped.update(record, record["answer"], text, **guesses)
            yield {
                **{name: record[name] for name in ("id", "question", "answer", "kind", "language")},
                "prediction": text,
                **{f"{name}_prediction": guess for name, guess in guesses.items()},
                "correct": is_match(record["answer"], text),
                "image": record["image"],
                "boxes": [dataclasses.asdict(box) for box in record["boxes"]],
            }
        shares = _with_baselines(name for metric in self.metrics for name in shares_of(metric))
        return grouped.findings(shares=shares, matrices=gate_use(examinee, examinee.prompts(), _GROUPS))


def _with_baselines(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the model's scores, then those of every baseline."""
    own = tuple(names)
    return (*own, *(f"{baseline}_{name}" for baseline in _BASELINES for name in own))


class Prior:
    """The most frequent answer to a question in the training data; ties go to the one seen first."""

    def __init__(self, turns: Iterable[tuple[str, str, str]]):
        """Counts (question, kind, answer) triples."""
        self._by_question: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for question, kind, answer in turns:
            self._by_question[normalize(question)][answer] += 1
            self._by_kind[kind][answer] += 1

    def predict(self, question: str, kind: str) -> str:
        counts = self._by_question.get(normalize(question)) or self._by_kind.get(kind)
        return counts.most_common(1)[0][0] if counts else ""


def training_turns(data: DataConfig, count: int) -> Iterator[tuple[str, str, str]]:
    """(question, kind, answer) of the first samples of every training source."""
    for source_config in data.sources:
        source = opened(data, source_config)
        for index in itertools.islice(range(len(source)), count):
            try:
                sample = source[index].without_images()
            except BadSample:
                continue  # counted and logged where it is trained on
            for turn in sample.turns:
                yield turn.question, turn.kind, turn.answer


def answered(examinee: Examinee, *, with_image: bool = True) -> Iterator[tuple[dict[str, Any], str]]:
    """Every question's record, and what the model says to it; shows progress."""
    tokenizer = load_tokenizer(examinee.data.tokenizer)

    def one_by_one() -> Iterator[tuple[dict[str, Any], str]]:
        for records, batch in examinee.prompts(with_image=with_image):
            texts = generated(examinee, batch, tokenizer, examinee.extent.max_new_tokens)
            yield from zip(records, texts, strict=False)

    title = f"{examinee.source}: {'with image' if with_image else 'image withheld'}"
    yield from track(one_by_one(), title, console=Console(stderr=True))


def generated(examinee: Examinee, batch: Batch, tokenizer: Tokenizer, max_new_tokens: int) -> list[str]:
    """What the model says to every prompt of a host batch, greedily; every process has all of it."""
    layout, stop = examinee.layout, stops_of_data(examinee.data.tokenizer, tokenizer)
    with sharding.use_mesh(layout.mesh, layout.rules):
        tokens = generate(
            examinee.variables,
            examinee.routing_state,
            put_batch(batch, layout),
            model=layout.model,
            config=GenerationConfig(max_new_tokens=max_new_tokens),
            stop=stop,
        )
    tokens = multihost_utils.process_allgather(tokens, tiled=True)
    return [tokenizer.decode(ids) for ids in answer_ids(tokens, stop=stop)]
