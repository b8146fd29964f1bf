"""Retrieval: every text looks for its picture and every picture for its texts, in all that is held out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from vl_jax.batch import Batch
from vl_jax.data.text.negatives import NEGATIVES
from vl_jax.evaluate.blind import NGrams, training_texts
from vl_jax.evaluate.metrics.retrieval import neighbours, ranks_of, retrieval
from vl_jax.evaluate.metrics.told_apart import ToldApart
from vl_jax.evaluate.task import Examinee, Findings, Matrix, Record
from vl_jax.moe.stacks import RoutingState
from vl_jax.train.objectives.wrong_texts import as_rows

_WAYS = ("text_to_image", "image_to_text")


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Recall at K both ways by the vectors of a ``Pairs`` head, over all and by language.

    Every picture is in the pool once, with all its texts; the texts of one language meet all pictures. With
    wrong texts (``data.conversation.negatives``), how often a text is nearer to its picture than they are.
    With ``alike``, what has the same label counts as found too, and pictures look for other pictures as well.

    Beside them stand chance and a blind model, which knows the training texts alone (see ``blind``): it gives
    all pictures the same score, and a text the same for every picture.
    """

    head: str = "pairs"
    ks: tuple[int, ...] = (1, 5, 10)
    first: Literal["recall", "told_apart"] = "recall"  # of what the headline is
    alike: str = ""  # label of samples: what has the same is as good as the picture itself; empty: nothing is
    picture: str = ""  # label that samples of one picture share; empty: what the head takes for one picture

    def __post_init__(self):
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks}: expected at least one K, and all of them >= 1")

    @property
    def headline(self) -> str:
        """Recall of texts that look for their picture, at the first K; or of wrong texts told apart."""
        return "told_apart" if self.first == "told_apart" else f"text_to_image_recall_at_{self.ks[0]}"

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; a record is a text and the rank of its picture.

        Raises:
          ValueError: no sample has a picture and a text.
        """
        seen = _seen(examinee, self.head)
        if self.picture:
            seen = dataclasses.replace(seen, ids=_kinds(seen, self.picture))
        blind = NGrams(training_texts(examinee.data, examinee.extent.prior_samples))
        _, first = np.unique(seen.ids, return_index=True)
        pool = seen.images[first], seen.ids[first]
        ranks, _ = ranks_of(seen.texts, pool[0], seen.ids, pool[1])
        apart = [_apart(seen, row, blind) for row in range(len(seen.records))]
        for record, rank, told in zip(seen.records, ranks, apart, strict=True):
            shown = {name: record[name] for name in ("id", "question", "language", "image")}
            shown |= {"rank": int(rank), "correct": bool(rank == 1), "similarity": told[0]}
            yield {**shown, **_as_record(record, told)}
        likely = np.array([blind.mean_log_likelihood(r["question"]) if blind else 0.0 for r in seen.records])

        def scores(chosen: Sequence[int]) -> dict[str, float]:
            rows = list(chosen)
            found = retrieval(pool[0], seen.texts[rows], pool[1], seen.ids[rows], self.ks)
            if blind:
                same = np.ones((len(pool[1]), 1))
                guessed = retrieval(same, likely[rows, None], pool[1], seen.ids[rows], self.ks)
                # Where all have one score, nothing but chance decides.
                guessed["text_to_image"] |= {
                    f"recall_at_{k}": found["text_to_image"][f"chance_at_{k}"] for k in self.ks
                }
                found = {way: found[way] | _blind(guessed[way], self.ks) for way in _WAYS}
            metric = ToldApart()
            for row in rows:
                metric.update(*apart[row])
            apart_scores = metric.compute() if seen.has_wrong else {}
            return _flat(found, self.ks) | apart_scores | _alike(seen, self.alike, first, rows, self.ks)

        languages = sorted({record["language"] for record in seen.records} - {""})
        groups = {
            name: scores([i for i, record in enumerate(seen.records) if record["language"] == name])
            for name in languages
        }
        overall = scores(range(len(seen.records)))
        shares = tuple(name for name in overall if "recall_at" in name or "told_apart" in name)
        matrices = (_table(overall, self.ks),)
        return Findings(overall, {"language": groups} if len(groups) > 1 else {}, shares, matrices)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """All rows of a source that have a picture, [R E] or [R N E] each."""

    records: list[dict[str, Any]]
    ids: np.ndarray
    images: np.ndarray
    texts: np.ndarray
    wrong: np.ndarray  # [R 0 E] where the data has no wrong texts
    there: np.ndarray  # bool[R N]
    has_wrong: bool


def _seen(examinee: Examinee, head: str) -> _Seen:
    records: list[dict[str, Any]] = []
    columns: list[list[Any]] = [[], [], [], [], []]
    has_wrong = False
    for some, batch in examinee.samples():
        pairs = examinee.apply(_compiled(examinee.layout.model, head), batch)
        given, label = batch.media.get(NEGATIVES), batch.labels[head]
        wrong, there = (
            np.zeros((len(label.values), 0, pairs.text.shape[-1])),
            np.zeros((len(label.values), 0)),
        )
        if given is not None:
            has_wrong, there = True, given.values[..., 0]
            wrong = examinee.apply(_compiled_wrong(examinee.layout.model, head), batch)
        for row, record in enumerate(some):
            if label.present[row]:
                records.append(record)
                found = label.values[row], pairs.image[row], pairs.text[row], wrong[row], there[row] > 0
                for column, value in zip(columns, found, strict=True):
                    column.append(value)
    if not records:
        raise ValueError(f"no sample of {examinee.source!r} has a picture for head {head!r}")
    ids, images, texts, wrong, there = map(np.stack, columns)
    return _Seen(records, ids.astype(int), images, texts, wrong, there, has_wrong)


_Apart = tuple[float, list[float], float, list[float]]  # as ``ToldApart`` takes it


def _apart(seen: _Seen, row: int, blind: NGrams) -> _Apart:
    """How like its picture a text and its wrong ones are, and how likely each is by itself."""
    picture = seen.images[row].astype(np.float64)
    own, others = float(np.float32(picture @ seen.texts[row])), (seen.wrong[row] @ picture).astype(np.float32)
    record, there = seen.records[row], seen.there[row]
    texts = [text for text, is_there in zip(record["negatives"], there, strict=False) if is_there]
    likely = [blind.log_likelihood(text) for text in texts] if blind else []
    return own, others[there].tolist(), blind.log_likelihood(record["question"]) if blind else 0.0, likely


def _as_record(record: dict[str, Any], told: _Apart) -> dict[str, Any]:
    """What a record says of wrong texts; nothing where there are none."""
    own, others, *_ = told
    return {"negatives": record["negatives"], "told_apart": [o < own for o in others]} if others else {}


def _blind(found: dict[str, float], ks: Sequence[int]) -> dict[str, float]:
    return {f"blind_at_{k}": found[f"recall_at_{k}"] for k in ks}


def _alike(
    seen: _Seen, label: str, pool: np.ndarray, rows: Sequence[int], ks: Sequence[int]
) -> dict[str, float]:
    """Scores where a label decides what is right: both ways, and of pictures that look for pictures."""
    if not label:
        return {}
    kinds = _kinds(seen, label)
    found = retrieval(seen.images[pool], seen.texts[rows], kinds[pool], kinds[rows], ks)
    found["image_to_image"] = neighbours(seen.images[pool], kinds[pool], ks)
    scores: dict[str, float] = {}
    for way in found:
        for k in ks:
            scores[f"{way}_recall_at_{k}_by_{label}"] = found[way][f"recall_at_{k}"]
            scores[f"chance_{way}_recall_at_{k}_by_{label}"] = found[way][f"chance_at_{k}"]
    return scores


def _kinds(seen: _Seen, label: str) -> np.ndarray:
    """A number for every row that rows with the same label share."""
    values = [str(record["labels"].get(label)) for record in seen.records]
    return np.unique(values, return_inverse=True)[1]


def _flat(found: dict[str, dict[str, float]], ks: Sequence[int]) -> dict[str, float]:
    """Scores by one name each; what chance and a blind model give stand before it as baselines."""
    flat: dict[str, float] = {}
    for way in _WAYS:
        for k in ks:
            flat[f"{way}_recall_at_{k}"] = found[way][f"recall_at_{k}"]
            for baseline in ("chance", "blind"):
                if f"{baseline}_at_{k}" in found[way]:
                    flat[f"{baseline}_{way}_recall_at_{k}"] = found[way][f"{baseline}_at_{k}"]
        flat[f"{way}_median_rank"] = found[way]["median_rank"]
        flat[f"{way}_pool"] = int(found[way]["pool"])
    return {**flat, "count": int(found["text_to_image"]["queries"])}


def _table(scores: dict[str, float], ks: Sequence[int]) -> Matrix:
    """Shares beside what chance and a blind model give, with the size of the pool."""
    rows = {
        f"{way.replace('_', ' ')}, pool {scores[f'{way}_pool']}, R@{k}": f"{way}_recall_at_{k}"
        for way in _WAYS
        for k in ks
    }
    if "told_apart" in scores:
        rows["own text or a wrong one, pool 2"] = "told_apart"
    columns = tuple(b for b in ("", "chance_", "blind_") if f"{b}{_WAYS[0]}_recall_at_{ks[0]}" in scores)
    values = [[scores[f"{column}{name}"] for column in columns] for name in rows.values()]
    names = tuple(column.strip("_") or "model" for column in columns)
    return Matrix("Beside chance and a blind model", tuple(rows), names, values, "task", "who")


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The head's ``PairVectors``, without what all rows share."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> Any:
        output: Any = model.apply(variables, batch, state)
        return output.predictions[head].replace(scale=None, bias=None)

    return jax.jit(run)


@functools.cache
def _compiled_wrong(model: nn.Module, head: str) -> Any:
    """The vectors of wrong texts [B N E]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> Any:
        output: Any = model.apply(variables, as_rows(batch), state)
        text = output.predictions[head].text
        return text.reshape(batch.tokens.shape[0], -1, text.shape[-1])

    return jax.jit(run)
