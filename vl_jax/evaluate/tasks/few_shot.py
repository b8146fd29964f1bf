"""Few examples: classes told apart by a tower's frozen vectors and k labelled samples of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.metrics.few_shot import WAYS, balanced_accuracy, draw
from vl_jax.evaluate.statistics import t_interval
from vl_jax.evaluate.task import Examinee, Findings, Record
from vl_jax.fusion.streams import pool
from vl_jax.moe.stacks import RoutingState


@dataclasses.dataclass(frozen=True)
class FewShot:
    """The mean over classes of the share that is right, from ``shots`` examples of each.

    Examples are drawn from the source itself, and all its other samples are asked about; so it is done
    ``draws`` times. The interval is that of the mean over draws, of these samples.
    Classes that have no sample beside their examples are left out.
    """

    stream: str = "image"  # whose vector
    label: str = "label"  # name in ``Sample.labels``
    shots: tuple[int, ...] = (1, 5)  # examples of each class
    draws: int = 20
    seed: int = 0  # of the draws

    def __post_init__(self):
        if not self.shots or min(self.shots) < 1 or self.draws < 2:
            raise ValueError(
                f"shots={self.shots}, draws={self.draws}: expected one k or more, each >= 1, and draws >= 2"
            )

    @property
    def headline(self) -> str:
        """By the nearest mean, from the most examples."""
        return f"nearest_mean_at_{max(self.shots)}"

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; a record says in what share of the draws it was told right.

        Raises:
          ValueError: fewer than two classes have more samples than the most ``shots``.
        """
        records, vectors = _seen(examinee, self.stream, self.label)
        names, labels = np.unique(
            [str(record["labels"][self.label]) for record in records], return_inverse=True
        )
        enough = np.bincount(labels) > max(self.shots)
        if enough.sum() < 2:
            raise ValueError(
                f"source {examinee.source!r}: {enough.sum()} classes of {self.label!r} have more than "
                f"{max(self.shots)} samples; at least two must, set fewer shots"
            )
        kept = np.flatnonzero(enough[labels])
        labels, names = np.unique(labels[kept], return_inverse=True)[1], names[enough]
        scores, intervals, right = self._scores(vectors[kept], labels)
        for row, place in enumerate(kept):
            record = records[place]
            yield {
                **{name: record[name] for name in ("id", "question", "language", "image")},
                "answer": str(names[labels[row]]),
                "share_right": right[row],
            }
        chance = {f"chance_{name}": 1 / len(names) for name in scores}
        settings = {"classes": names.tolist(), "left_out": len(records) - len(kept), "draws": self.draws}
        return Findings(
            {**scores, **chance, "count": len(kept)},
            shares=(*scores, *chance),
            intervals=intervals,
            settings=settings,
        )

    def _scores(
        self, vectors: np.ndarray, labels: np.ndarray
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]], list[float]]:
        """Scores, their intervals, and for each row how often the headline's way was right about it."""
        classes = int(labels.max()) + 1
        found: dict[str, list[float]] = {}
        asked, hits = np.zeros(len(labels)), np.zeros(len(labels))
        for shots in self.shots:
            rng = np.random.default_rng((self.seed, shots))
            for _ in range(self.draws):
                chosen = draw(labels, shots, rng)
                rest, examples = np.flatnonzero(~chosen), (vectors[chosen], labels[chosen])
                for way, tell in WAYS.items():
                    said, name = tell(*examples, vectors[rest], classes), f"{way}_at_{shots}"
                    found.setdefault(name, []).append(balanced_accuracy(said, labels[rest], classes))
                    if name == self.headline:
                        asked[rest] += 1
                        hits[rest] += said == labels[rest]
        means = {name: float(np.mean(values)) for name, values in found.items()}
        ends = {name: t_interval(values) for name, values in found.items()}
        intervals = {name: (end.low, end.high) for name, end in ends.items()}
        return means, intervals, (hits / np.maximum(asked, 1)).round(3).tolist()


def _seen(examinee: Examinee, stream: str, label: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The records that have the label, and their vectors [R E]."""
    records: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    for some, batch in examinee.samples():
        found = examinee.apply(_compiled(examinee.layout.model, stream), batch)
        for record, vector in zip(some, found, strict=False):
            if record["labels"].get(label) is not None:
                records.append(record)
                vectors.append(np.asarray(vector, np.float64))
    if not records:
        raise ValueError(f"source {examinee.source!r}: no sample has a label {label!r}")
    return records, np.stack(vectors)


@functools.cache
def _compiled(model: nn.Module, stream: str) -> Any:
    """The vector of every row [B E]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> jax.Array:
        streams: Any = model.apply(variables, batch, state).streams  # pyright: ignore
        if stream not in streams:
            raise ValueError(f"stream {stream!r}: the model has {', '.join(streams)}")
        return pool(streams[stream]).astype(jnp.float32)

    return jax.jit(run)
