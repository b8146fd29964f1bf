"""A task: what a model is asked, how it is judged, and which score a person looks at first.

    Examinee --Task.run--> a record of every sample ... --and at the end--> Findings

A task is a frozen config dataclass, in ``evaluate/tasks/`` or in a file of one's own. Nothing else knows its
scores: the runner writes them, and reports print them, by these conventions::

    <headline>                the score that is shown first, by itself
    <baseline>_<headline>     the same score of something simpler, such as ``blind_exact_match``
    count                     how many samples stand behind the scores

A record is one JSON object. Reports know ``id``, ``question``, ``answer`` (the truth), ``prediction``,
``<baseline>_prediction``, ``correct``, ``image`` (a PIL picture or None; its file is named in its place),
``boxes`` and the fields that groups are made by; whatever else it holds they show by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import jax
from jax.experimental import multihost_utils

from vl_jax import sharding
from vl_jax.batch import Batch, without_absent
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.stream.evaluation_prompts import evaluation_prompts
from vl_jax.data.stream.evaluation_samples import evaluation_samples
from vl_jax.evaluate.metrics.per_sample import PerSample
from vl_jax.layout import Layout, put_batch
from vl_jax.moe.stacks import RoutingState

Record = Mapping[str, Any]
Scores = Mapping[str, SupportsFloat]  # a scalar of numpy or jax is one too


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is asked, whatever the task."""

    batch_size: int = 64
    limit: int = 0  # questions per source; 0: all
    per_sample: int = 0  # questions per image; 0: all
    max_new_tokens: int = 16
    prior_samples: int = 2000  # training samples that the prior baseline counts

    def __post_init__(self):
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and max_new_tokens={self.max_new_tokens} must be >= 1"
            )


@dataclasses.dataclass(frozen=True)
class Examinee:
    """The model that is examined, and the held-out source that it is examined on."""

    layout: Layout
    params: Any
    routing_state: Any
    data: DataConfig
    spec: ModelSpec
    source: str  # name in ``data.evaluation``
    extent: Extent
    collections: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the model
    alive: Callable[[], None] = lambda: None  # called before every batch
    kept: Path | None = None  # file in which a task may keep what it has so far, if it is stopped
    # Of a model that is asked through a processor of its own: what it says to each sample, in so many tokens
    # at most, or why it could not be asked.
    respond: Callable[[Sequence[Sample], int], list[str | BadSample]] | None = None
    pictures: str = ""  # how that processor reads pictures, in words

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with: parameters and collections."""
        return {"params": self.params, **self.collections}

    def apply(self, compiled: Callable[[Any, RoutingState, Batch], Any], batch: Batch) -> Any:
        """What a compiled ``(variables, routing_state, batch)`` gives for a host batch, on every host."""
        if jax.process_count() == 1:
            batch = without_absent(batch, getattr(self.layout.model.config, "may_lack", ()))
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            found = compiled(self.variables, self.routing_state, put_batch(batch, self.layout))
        return multihost_utils.process_allgather(found, tiled=True)

    def prompts(self, *, with_image: bool = True) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        """The source's questions as records and batches; see ``evaluation_prompts``."""
        prompts = evaluation_prompts(
            self.data,
            self.spec,
            self.source,
            batch_size=self.extent.batch_size,
            limit=self.extent.limit,
            per_sample=self.extent.per_sample,
            with_image=with_image,
        )
        return self._one_by_one(prompts)

    def samples(self) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        """The source's samples as records and batches; see ``evaluation_samples``."""
        samples = evaluation_samples(
            self.data, self.spec, self.source, batch_size=self.extent.batch_size, limit=self.extent.limit
        )
        return self._one_by_one(samples)

    def _one_by_one(
        self, batches: Iterator[tuple[list[dict[str, Any]], Batch]]
    ) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        for batch in batches:
            self.alive()
            yield batch


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A table of shares that a report shades, such as a confusion matrix."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Sequence[Sequence[float]]  # [row][column]
    row_name: str = ""
    column_name: str = ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """The scores of a task over all samples and by group.

    Attributes:
      groups: scores by kind of group and name of group, ``{"language": {"en": {...}}}``.
      shares: names of the scores that are shares of one, which are shown as percentages.
      matrices: tables that tell more than scores.
      intervals: low and high end of 95 % intervals, of scores that have one.
      settings: what the scores follow from, as JSON values.
    """

    scores: Scores
    groups: Mapping[str, Mapping[str, Scores]] = dataclasses.field(default_factory=dict)
    shares: tuple[str, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Metric(Protocol):
    """Takes samples one after another, or many at once, and computes scores from all of them."""

    def update(self, *args: Any, **kwargs: Any) -> None: ...

    def compute(self) -> Scores: ...


@runtime_checkable
class SampledMetric(Protocol):
    """A metric whose scores are made of a value for each sample, so that an interval can be given.

    Its ``update`` takes the name of a ``cluster`` too: samples of one, such as the questions about one
    picture, are not independent of one another.
    """

    def update(self, *args: Any, cluster: str | None = None, **kwargs: Any) -> None: ...

    def compute(self) -> Scores: ...

    def samples(self) -> Mapping[str, PerSample]: ...


@runtime_checkable
class AnswerMetric(Protocol):
    """The config of a metric of answers, a frozen dataclass: how far texts agree with the truth.

    One that gives several scores lists their names in ``scores``, and in ``shares`` those that are shares of
    one. Without them its one score has its own name, and is a share.
    """

    @property
    def name(self) -> str:
        """Of the metric, and of its score."""
        ...

    def start(self) -> Metric:
        """A metric that has seen nothing: ``update(truth, prediction)`` takes the texts of one question.

        The truth is a text, or a sequence of texts where a question has several references.
        """
        ...


def scores_of(metric: AnswerMetric) -> tuple[str, ...]:
    """The names of the scores of a metric of answers."""
    return tuple(getattr(metric, "scores", (metric.name,)))


def shares_of(metric: AnswerMetric) -> tuple[str, ...]:
    """The names of those scores of a metric of answers that are shares of one."""
    return tuple(getattr(metric, "shares", scores_of(metric)))


@runtime_checkable
class Task(Protocol):
    """What a task has to have; every process of a run calls ``run`` alike."""

    @property
    def headline(self) -> str:
        """Name of the score that a person looks at first."""
        ...

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Yields a record of every sample and returns the findings."""
        ...


class Compared:
    """Metrics of a model's answers, and of baselines that answer the same questions.

    Args:
      metrics: of answers.
      baselines: their names; the score of each is ``<baseline>_<score>``.
    """

    def __init__(self, metrics: Sequence[AnswerMetric], baselines: Sequence[str] = ()):
        self._count = 0
        self._by_answerer = {name: [m.start() for m in metrics] for name in ("", *baselines)}

    def update(
        self, truth: str | Sequence[str], prediction: str, *, cluster: str | None = None, **baselines: str
    ) -> None:
        """Takes one question: its truth, what the model says, and what each baseline says.

        Args:
          truth: a text, or several where a question has several references.
          cluster: questions of one hang together; None: this one hangs together with no other.
        """
        self._count += 1
        for name, text in {"": prediction, **baselines}.items():
            for metric in self._by_answerer[name]:
                if isinstance(metric, SampledMetric):
                    metric.update(truth, text, cluster=cluster)
                else:
                    metric.update(truth, text)

    def compute(self) -> dict[str, SupportsFloat]:
        """All scores, and ``count``."""
        return {**self._named(lambda metric: metric.compute()), "count": self._count}

    def samples(self) -> dict[str, PerSample]:
        """Every score that is made of values by sample, baselines included; in the order of the questions."""
        return self._named(lambda metric: metric.samples() if isinstance(metric, SampledMetric) else {})

    def _named(self, found: Callable[[Metric], Mapping[str, Any]]) -> dict[str, Any]:
        return {
            f"{name}_{score}" if name else score: value
            for name, metrics in self._by_answerer.items()
            for metric in metrics
            for score, value in found(metric).items()
        }


class Grouped:
    """One metric over all samples, and one over each group of them.

    Args:
      metric: makes an empty metric.
      kinds: fields of a record; samples of one value are a group, and an empty value is none.
    """

    def __init__(self, metric: Callable[[], Metric], kinds: Sequence[str]):
        self._make, self._overall = metric, metric()
        self._groups: dict[str, dict[str, Metric]] = {kind: {} for kind in kinds}

    def update(self, record: Record, *args: Any, **kwargs: Any) -> None:
        """Updates the metric of all samples and those of the record's groups."""
        self._overall.update(*args, **kwargs)
        for kind, groups in self._groups.items():
            name = str(record.get(kind) or "")
            if name:
                groups.setdefault(name, self._make()).update(*args, **kwargs)

    def findings(self, *, shares: tuple[str, ...] = (), matrices: tuple[Matrix, ...] = ()) -> Findings:
        """All scores; the groups of a kind are in alphabetical order."""
        groups = {
            kind: {name: found[name].compute() for name in sorted(found)}
            for kind, found in self._groups.items()
        }
        return Findings(self._overall.compute(), groups, shares, matrices)
