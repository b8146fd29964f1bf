"""How well the vectors of two modalities agree, row by row: row i of one belongs to row i of the other.

Vectors are brought to length 1 first. Every picture should stand there once, with one text: a row that is
there twice counts as a wrong match of itself. Measures say different things, and some go up where
retrieval goes down: a model that gives all rows one vector has the best alignment and the worst
uniformity, and all ranks last. A CKA or an overlap of neighbours needs no common space, so it compares
two towers that never met.

    measure (x, y: the vectors of a row; n rows)                       best   source
    recall_at_K, median_rank, mean_reciprocal_rank, both ways                 ``retrieval``: ties are lost
    alignment        mean |x - y|²                                     0      Wang and Isola, 2020
    uniformity       log mean over i < j of exp(-2 |x_i - x_j|²)       -4     or so; the same, of each
    modality_gap     |mean x - mean y|                                 0      Liang et al., 2022
    matched_cosine, unmatched_cosine    means of x·y                   1, 0
    match_auroc      chance that a matched pair is nearer than an unmatched one, equal ones half
    cka              linear; near 1 for noise if n is no more than the width
                                                                       1      Kornblith et al., 2019
    cka_unbiased     0 for noise on average                            1      Song et al., 2012
    mutual_neighbours    share of a row's k nearest that both modalities name
                                                                       1      Huh et al., 2024
    similarity_correlation    Spearman's, of x_i·x_j with y_i·y_j      1      Kriegeskorte et al., 2008
    effective_rank   exp of the entropy of the spectrum                width  Roy and Vetterli, 2007
    hubness          skewness of how often a row is among the k nearest of the other modality's rows
                                                                       0      Radovanović et al., 2010
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from vl_jax.evaluate.metrics.per_sample import PerSample
from vl_jax.evaluate.metrics.retrieval import ranks_of

_KS = (1, 5, 10)


def alignment(
    images: Float[np.ndarray, "N E"], texts: Float[np.ndarray, "M F"], *, neighbours: int = 10
) -> dict[str, float]:
    """All measures of the table above; ``image_`` and ``text_`` before those of one modality.

    Takes memory for a few matrices of n by n numbers.

    Args:
      images: vectors, of any length but 0.
      texts: vectors of the same space; both shapes have to be one.
      neighbours: the k of ``mutual_neighbours`` and ``hubness``.

    Raises:
      ValueError: the shapes differ, there are fewer than 4 rows or no more than k, or a vector is 0 or no
        number.
    """
    x, y = _unit(images, texts)
    if not 1 <= neighbours < len(x):
        raise ValueError(f"neighbours={neighbours}: expected 1 to {len(x) - 1}, one less than there are rows")
    scores = {name: found.score for name, found in alignment_samples(images, texts).items()}
    across = np.round(x @ y.T, 12)  # equal rows tie wherever they stand
    matched, unmatched = np.diagonal(across), _off_diagonal(across)
    for name, vectors, similarity in (("image", x, across.T), ("text", y, across)):
        scores[f"{name}_uniformity"] = uniformity(vectors)
        scores[f"{name}_effective_rank"] = effective_rank(vectors)
        scores[f"{name}_hubness"] = hubness(similarity, neighbours)
    for way, ranks in _ranks(x, y).items():
        scores[f"{way}_median_rank"] = float(np.median(ranks))
    return {
        **scores,
        "modality_gap": float(np.linalg.norm(x.mean(axis=0) - y.mean(axis=0))),
        "unmatched_cosine": float(unmatched.mean()),
        "match_auroc": match_auroc(matched, unmatched),
        "cka": linear_cka(x, y),
        "cka_unbiased": linear_cka(x, y, unbiased=True),
        "mutual_neighbours": mutual_neighbours(x, y, neighbours),
        "similarity_correlation": similarity_correlation(x, y),
    }


def alignment_samples(
    images: Float[np.ndarray, "N E"],
    texts: Float[np.ndarray, "M F"],
    *,
    clusters: Sequence[str] | None = None,
) -> dict[str, PerSample]:
    """The measures that are means over rows, row by row.

    Args:
      clusters: rows of one hang together; None: each row by itself.

    Raises:
      ValueError: as ``alignment``, or there is another number of clusters.
    """
    x, y = _unit(images, texts)
    keys = [f"sample {row}" for row in range(len(x))] if clusters is None else list(clusters)
    if len(keys) != len(x):
        raise ValueError(f"{len(keys)} clusters for {len(x)} rows")
    values = {"alignment": np.sum((x - y) ** 2, axis=1), "matched_cosine": np.sum(x * y, axis=1)}
    for way, ranks in _ranks(x, y).items():
        values |= {f"{way}_recall_at_{k}": (ranks <= k).astype(np.float64) for k in _KS}
        values[f"{way}_mean_reciprocal_rank"] = 1 / ranks
    return {name: PerSample(found, np.ones(len(x)), tuple(keys)) for name, found in values.items()}


def _unit(images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != texts.shape or len(images) < 4:
        raise ValueError(
            f"images {images.shape}, texts {texts.shape}: expected the same shape, 4 rows or more"
        )
    found = []
    for name, vectors in (("image", images), ("text", texts)):
        wide = vectors.astype(np.float64)
        lengths = np.linalg.norm(wide, axis=1)
        wrong = ~(np.isfinite(lengths) & (lengths > 0))
        if wrong.any():
            raise ValueError(f"{name} vector {np.argmax(wrong)} is 0 or not finite")
        found.append(wide / lengths[:, None])
    return found[0], found[1]


def _ranks(x: np.ndarray, y: np.ndarray) -> dict[str, Int[np.ndarray, " N"]]:
    rows = np.arange(len(x))
    return {
        "image_to_text": ranks_of(x, y, rows, rows)[0],
        "text_to_image": ranks_of(y, x, rows, rows)[0],
    }


def _off_diagonal(square: np.ndarray) -> np.ndarray:
    return square[~np.eye(len(square), dtype=bool)]


def uniformity(vectors: Float[np.ndarray, "N E"]) -> float:
    """How evenly vectors of length 1 lie on their sphere: 0 if all are one, lower if they are apart."""
    cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), k=1)]
    return float(np.log(np.mean(np.exp(-2 * (2 - 2 * cosines)))))


def match_auroc(matched: Float[np.ndarray, " N"], unmatched: Float[np.ndarray, " M"]) -> float:
    """The chance that a matched pair has a higher score than an unmatched one; equal ones count half."""
    order = np.sort(unmatched)
    below = np.searchsorted(order, matched, side="left")
    up_to = np.searchsorted(order, matched, side="right")
    return float(np.mean(below + up_to) / (2 * len(unmatched)))


def linear_cka(
    one: Float[np.ndarray, "N E"], other: Float[np.ndarray, "N F"], *, unbiased: bool = False
) -> float:
    """How alike two sets of vectors of the same rows are, whatever is turned or stretched as a whole.

    Args:
      one: vectors; their width need not be that of the others.
      other: vectors of the same rows.
      unbiased: by the estimate of HSIC that is 0 on average for unrelated rows; it needs 4 rows.

    Returns:
      0 where one of the sets does not vary.
    """

    def gram(vectors: np.ndarray) -> np.ndarray:
        centred = vectors - vectors.mean(axis=0)
        if np.linalg.norm(centred) <= 1e-10 * np.linalg.norm(vectors):  # nothing but rounding
            centred *= 0
        product = centred @ centred.T
        if unbiased:
            np.fill_diagonal(product, 0)
        return product

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        if not unbiased:
            return float(np.sum(a * b))
        n = len(a)
        total = np.sum(a * b) + a.sum() * b.sum() / ((n - 1) * (n - 2))
        return float(total - 2 * np.sum(a.sum(axis=0) * b.sum(axis=0)) / (n - 2)) / (n * (n - 3))

    a, b = gram(one.astype(np.float64)), gram(other.astype(np.float64))
    own = hsic(a, a), hsic(b, b)
    least = [1e-12 * float(np.sum(g * g)) / len(g) ** 2 for g in (a, b)]
    if own[0] <= least[0] or own[1] <= least[1]:
        return 0.0
    return hsic(a, b) / float(np.sqrt(own[0] * own[1]))


def mutual_neighbours(one: Float[np.ndarray, "N E"], other: Float[np.ndarray, "N F"], k: int) -> float:
    """The mean share of the k nearest rows, by cosine of vectors of length 1, that both sets name."""

    def nearest(vectors: np.ndarray) -> np.ndarray:
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -np.inf)
        chosen = np.zeros(cosines.shape, bool)
        np.put_along_axis(chosen, np.argsort(-cosines, axis=1, kind="stable")[:, :k], True, axis=1)
        return chosen

    return float(np.mean(np.sum(nearest(one) & nearest(other), axis=1)) / k)


def similarity_correlation(one: Float[np.ndarray, "N E"], other: Float[np.ndarray, "N F"]) -> float:
    """Spearman's correlation of the cosines of all pairs of rows; 0 where those of one set are all equal."""
    pairs = np.triu_indices(len(one), k=1)
    ranks = [stats.rankdata(np.round((v @ v.T)[pairs], 12)) for v in (one, other)]
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def effective_rank(vectors: Float[np.ndarray, "N E"]) -> float:
    """How many directions the vectors fill about evenly: exp of the entropy of their singular values."""
    values = np.linalg.svd(vectors, compute_uv=False)
    shares = values[values > 1e-12 * values.max()] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def hubness(similarity: Float[np.ndarray, "N M"], k: int) -> float:
    """The skewness of how often each column is among the k largest of a row; 0 where all are as often."""
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    counts = np.bincount(nearest.ravel(), minlength=similarity.shape[1]).astype(np.float64)
    apart = counts - counts.mean()
    spread = np.sqrt(np.mean(apart**2))
    return float(np.mean(apart**3) / spread**3) if spread else 0.0
