"""Retrieval by nearest vector: how often what was looked for is among the first K.

    image --> all texts, nearest first --> rank of the first text that is its own   (and the other way round)

An image may have several texts, and the first of them counts, as is usual for Flickr and COCO. Ties go
against the model: a match that scores the same as something wrong stands behind it. So a model that gives all
pictures one vector has the last rank, and not one that depends on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def retrieval(
    images: Float[np.ndarray, "N E"],
    texts: Float[np.ndarray, "M E"],
    image_ids: Int[np.ndarray, " N"],
    text_ids: Int[np.ndarray, " M"],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk: int = 1024,
) -> dict[str, dict[str, float]]:
    """Recall at K in both directions, by inner product, beside the recall of a random order.

    Rows with a negative id are left out. A row with an id that the other side lacks is no query, but stays in
    the pool and distracts.

    Args:
      images: vectors; of length 1 if cosines are meant.
      texts: vectors of the same space.
      image_ids: what each image shows. Its texts are those with the same id.
      text_ids: what each text tells of.
      ks: how many of the nearest are looked at.
      chunk: queries that are compared with the whole pool at once.

    Returns:
      For ``image_to_text`` and ``text_to_image``: ``recall_at_K`` and ``chance_at_K`` for every K (shares of
      the queries), ``median_rank`` (1 is best), ``queries``, ``unmatched`` (rows without a match, which are
      no queries), and ``pool``, the number of candidates.

    Raises:
      ValueError: no image and text share an id, or a K or ``chunk`` is below 1.
    """
    if not ks or min(ks) < 1 or chunk < 1:
        raise ValueError(f"ks={tuple(ks)}, chunk={chunk}: expected at least one K, and all of them >= 1")
    images, image_ids = images[image_ids >= 0], image_ids[image_ids >= 0]
    texts, text_ids = texts[text_ids >= 0], text_ids[text_ids >= 0]
    if not np.isin(image_ids, text_ids).any():
        raise ValueError(f"none of {len(image_ids)} images has an id of one of {len(text_ids)} texts")
    return {
        "image_to_text": _one_way(images, texts, image_ids, text_ids, ks, chunk),
        "text_to_image": _one_way(texts, images, text_ids, image_ids, ks, chunk),
    }


def neighbours(
    vectors: Float[np.ndarray, "N E"], kinds: Int[np.ndarray, " N"], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at K of rows that look for another row of their kind, none of which finds itself.

    Returns:
      As one direction of ``retrieval``.

    Raises:
      ValueError: no two rows are of one kind, or a K is below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)}: expected at least one K, and all of them >= 1")
    _, kind, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    matched = np.flatnonzero(counts[kind] > 1)
    if not len(matched):
        raise ValueError(f"no two of {len(kinds)} rows are of one kind")
    ranks, positives = np.zeros(len(matched), np.int64), counts[kind[matched]] - 1
    for place, row in enumerate(matched):
        others = np.arange(len(kinds)) != row
        found, _ = ranks_of(vectors[row : row + 1], vectors[others], kinds[row : row + 1], kinds[others])
        ranks[place] = found[0]
    return _scores(ranks, positives, len(kinds) - 1, ks, unmatched=len(kinds) - len(matched))


def _one_way(
    queries: np.ndarray,
    pool: np.ndarray,
    query_ids: np.ndarray,
    pool_ids: np.ndarray,
    ks: Sequence[int],
    chunk: int,
) -> dict[str, float]:
    matched = np.isin(query_ids, pool_ids)
    ranks, positives = ranks_of(queries[matched], pool, query_ids[matched], pool_ids, chunk=chunk)
    return _scores(ranks, positives, len(pool), ks, unmatched=int(np.sum(~matched)))


def _scores(
    ranks: np.ndarray, positives: np.ndarray, pool: int, ks: Sequence[int], *, unmatched: int
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for k in ks:
        scores[f"recall_at_{k}"] = float(np.mean(ranks <= k))
        scores[f"chance_at_{k}"] = float(np.mean(chance(positives, pool=pool, k=k)))
    scores["median_rank"] = float(np.median(ranks))
    return scores | {"queries": len(ranks), "unmatched": unmatched, "pool": pool}


def ranks_of(
    queries: Float[np.ndarray, "N E"],
    pool: Float[np.ndarray, "M E"],
    query_ids: Int[np.ndarray, " N"],
    pool_ids: Int[np.ndarray, " M"],
    *,
    chunk: int = 1024,
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The rank of each query's first match, from 1, and the number of its matches.

    Products are taken in float64 and rounded to float32, so that equal vectors tie wherever they stand. A
    score that is no number loses where it belongs to a match, and wins where it does not.
    """
    wide = pool.astype(np.float64).T
    ranks, positives = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        with np.errstate(invalid="ignore", over="ignore"):
            scores = (queries[rows].astype(np.float64) @ wide).astype(np.float32)
        match = query_ids[rows, None] == pool_ids
        found = np.where(match & ~np.isnan(scores), scores, -np.inf).max(axis=1, initial=-np.inf)
        ranks[rows] = 1 + np.sum(~match & ~(scores < found[:, None]), axis=1)
        positives[rows] = np.sum(match, axis=1)
    return ranks, positives


def chance(positives: Int[np.ndarray, " N"], *, pool: int, k: int) -> Float[np.ndarray, " N"]:
    """The chance that one of the first ``k`` of a pool in random order is among so many matches.

    Of the hypergeometric distribution: ``1 - C(pool - positives, k) / C(pool, k)``.
    """
    drawn = np.arange(min(k, pool))
    misses = np.maximum(pool - positives[:, None] - drawn, 0) / (pool - drawn)
    return 1.0 - np.prod(misses, axis=1)
