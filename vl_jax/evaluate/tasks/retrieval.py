"""Retrieval: every text looks for its picture and every picture for its texts, in all that is held out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vl_jax.batch import Batch
from vl_jax.evaluate.metrics.retrieval import ranks_of, retrieval
from vl_jax.evaluate.task import Examinee, Findings, Record
from vl_jax.moe.stacks import RoutingState


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Recall at K both ways by the vectors of a ``Pairs`` head, over all and by language.

    Every picture is in the pool once, with all its texts; the texts of one language meet all pictures.
    """

    head: str = "pairs"
    ks: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self):
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks}: expected at least one K, and all of them >= 1")

    @property
    def headline(self) -> str:
        """Recall of texts that look for their picture, at the first K."""
        return f"text_to_image_recall_at_{self.ks[0]}"

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; a record is a text and the rank of its picture.

        Raises:
          ValueError: no sample has a picture and a text.
        """
        records, ids, images, texts = [], [], [], []
        for some, batch in examinee.samples():
            pairs = examinee.apply(_compiled(examinee.layout.model, self.head), batch)
            label = batch.labels[self.head]
            rows = [row for row in range(len(some)) if label.present[row]]
            records += [some[row] for row in rows]
            ids += [int(label.values[row]) for row in rows]
            images += [pairs.image[row] for row in rows]
            texts += [pairs.text[row] for row in rows]
        if not records:
            raise ValueError(f"no sample of {examinee.source!r} has a picture for head {self.head!r}")
        text_ids, text_vectors = np.array(ids), np.stack(texts)
        _, first = np.unique(text_ids, return_index=True)
        image_ids, image_vectors = text_ids[first], np.stack(images)[first]
        ranks, _ = ranks_of(text_vectors, image_vectors, text_ids, image_ids)
        for record, rank in zip(records, ranks, strict=True):
            shown = {name: record[name] for name in ("id", "question", "language", "image")}
            yield {**shown, "rank": int(rank), "correct": bool(rank == 1)}

        def scores(chosen: Sequence[int]) -> dict[str, float]:
            found = retrieval(image_vectors, text_vectors[chosen], image_ids, text_ids[chosen], self.ks)
            return _flat(found, self.ks)

        languages = sorted({record["language"] for record in records} - {""})
        groups = {
            name: scores([i for i, record in enumerate(records) if record["language"] == name])
            for name in languages
        }
        overall = scores(range(len(records)))
        shares = tuple(name for name in overall if "recall_at" in name)
        return Findings(overall, {"language": groups} if len(groups) > 1 else {}, shares)


def _flat(found: dict[str, dict[str, float]], ks: Sequence[int]) -> dict[str, float]:
    """Scores by one name each; what chance gives stands before it as a baseline."""
    flat: dict[str, float] = {}
    for way in ("text_to_image", "image_to_text"):
        for k in ks:
            flat[f"{way}_recall_at_{k}"] = found[way][f"recall_at_{k}"]
            flat[f"chance_{way}_recall_at_{k}"] = found[way][f"chance_at_{k}"]
        flat[f"{way}_median_rank"] = found[way]["median_rank"]
        flat[f"{way}_pool"] = int(found[way]["pool"])
    return {**flat, "count": int(found["text_to_image"]["queries"])}


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The head's ``PairVectors``, without what all rows share."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> Any:
        output: Any = model.apply(variables, batch, state)
        return output.predictions[head].replace(scale=None, bias=None)

    return jax.jit(run)
