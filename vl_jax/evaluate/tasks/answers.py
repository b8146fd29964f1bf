"""Question answering: short answers, right if they match after normalising, against two blind baselines.

*blind*: the same model with the image withheld. *prior*: the most frequent training answer to the same
question (or kind of question). What a model knows beyond both, it saw.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import track

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, opened
from vl_jax.data.published.stops import read_stops
from vl_jax.data.sample import BadSample
from vl_jax.data.text.normalize import normalize
from vl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vl_jax.evaluate.metrics.exact_match import ExactMatch, is_match
from vl_jax.evaluate.task import AnswerMetric, Compared, Examinee, Findings, Grouped, Record
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import warn_if_not_causal
from vl_jax.generation.generate import answer_ids, generate
from vl_jax.layout import put_batch
from vl_jax.schema import Open

_BASELINES = ("blind", "prior")
_GROUPS = ("kind", "language")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Every question of the source, answered greedily; by kind of question and by language."""

    headline: str = "exact_match"  # the score that is shown first, one of those of ``metrics``
    metrics: tuple[Annotated[ExactMatch | AnswerMetric, Open("metric", ("name", "start"))], ...] = (
        ExactMatch(),
    )

    def __post_init__(self):
        if self.headline not in self._shares:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(self._shares)}")

    @property
    def _shares(self) -> tuple[str, ...]:
        """The names of the scores: those of the model, then those of every baseline."""
        own = tuple(metric.name for metric in self.metrics)
        return (*own, *(f"{baseline}_{name}" for baseline in _BASELINES for name in own))

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Answers everything without the image first, then with it."""
        warn_if_not_causal(examinee.layout.model)
        prior = Prior(training_turns(examinee.data, examinee.extent.prior_samples))
        blind = {record["id"]: text for record, text in answered(examinee, with_image=False)}
        grouped = Grouped(lambda: Compared(self.metrics, _BASELINES), _GROUPS)
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
        return grouped.findings(shares=self._shares)


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
            yield from zip(records, _generate(examinee, batch, tokenizer), strict=False)

    title = f"{examinee.source}: {'with image' if with_image else 'image withheld'}"
    yield from track(one_by_one(), title, console=Console(stderr=True))


def _generate(examinee: Examinee, batch: Batch, tokenizer: Tokenizer) -> list[str]:
    layout, stop = examinee.layout, _stops(examinee.data.tokenizer, tokenizer)
    with sharding.use_mesh(layout.mesh, layout.rules):
        tokens = generate(
            examinee.variables,
            examinee.routing_state,
            put_batch(batch, layout),
            model=layout.model,
            config=GenerationConfig(max_new_tokens=examinee.extent.max_new_tokens),
            stop=stop,
        )
    tokens = multihost_utils.process_allgather(tokens, tiled=True)
    return [tokenizer.decode(ids) for ids in answer_ids(tokens, stop=stop)]


def _stops(path: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end token, and those that the folder of a published tokenizer names beside it."""
    named = read_stops(path, tokenizer.added, None).tokens if path and Path(path).is_dir() else ()
    return tuple(dict.fromkeys((tokenizer.eos, *named)))
