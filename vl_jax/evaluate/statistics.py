"""Statistics of comparisons: intervals and tests of paired differences, over few seeds or over many samples.

    few seeds, one number each       t_interval, sign_flip_test, holm
    many samples, in clusters        bootstrap_interval, rate_interval, sign_flip_test with ``clusters``
    both at once                     crossed_interval

Pure numpy and scipy: nothing here knows of models, runs or files. What makes intervals of few values too
narrow, and what is done about it:

* The percentiles of a bootstrap are those of a normal distribution whose variance is divided by n, not by
  n - 1: of 8 values, "95 %" covers about 89 %. ``bootstrap_interval`` widens them by both (Hesterberg, What
  Teachers Should Know About the Bootstrap, 2015, section 4), and ``t_interval`` has no such fault.
* Questions about one picture are right or wrong together: the cluster is what is drawn again.
* Seeds share their held-out samples, so an interval over seeds is of *these* samples. ``crossed_interval``
  draws both again.
* Many comparisons on one page find something by chance: ``holm``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

_MOST_SIGNS = 16  # values up to which all 2**n choices of signs are looked at
_RANDOM_SIGNS = 20_000  # choices that are drawn for more values
_AT_ONCE = 2_000_000  # numbers in memory while resampling


Values = Sequence[float] | Sequence[int] | np.ndarray  # one axis


class Interval(NamedTuple):
    """An estimate and the two ends of its interval; ends that nothing is known of are infinite."""

    estimate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Paired:
    """What is said of the differences of pairs, treatment minus baseline."""

    pairs: int
    effect: Interval  # the mean difference, by Student's t
    p: float  # two-sided, of the exact test over signs
    smallest_p: float  # the smallest that so many pairs can give


def paired(differences: Values, *, confidence: float = 0.95) -> Paired:
    """Interval and test of the mean of paired differences.

    Raises:
      ValueError: there is no difference, or one is not finite.
    """
    values = _finite(differences)
    return Paired(
        len(values),
        t_interval(values, confidence=confidence),
        sign_flip_test(values),
        smallest_p(len(values)),
    )


def t_interval(values: Values, *, confidence: float = 0.95) -> Interval:
    """The mean and its interval by Student's t; of one value, the interval has no ends.

    Raises:
      ValueError: there is no value, or one is not finite.
    """
    values = _finite(values)
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, -np.inf, np.inf)
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half))


def sign_flip_test(
    differences: Values,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
) -> float:
    """Two-sided p of a mean difference of zero, if each difference could as well have the other sign.

    Exact for up to 16 values, that is, never too small whatever the distribution; for more, signs are drawn.
    It asks no normal distribution, only that without an effect the two sides of a pair can be exchanged.

    Args:
      clusters: values of one cluster change sign together; None: each alone.

    Raises:
      ValueError: there is no value, or one is not finite.
    """
    values = _finite(differences)
    sums = values if clusters is None else _cluster_sums(values, clusters)[0]
    observed = abs(sums.sum())
    # Sums of the same numbers in another order differ in the last digits.
    least = observed - 1e-12 * np.abs(sums).sum()
    count = len(sums)
    if count <= _MOST_SIGNS:
        flipped = sums[0] + _signs(count - 1) @ sums[1:]  # The other half have all signs changed.
        return float(np.mean(np.abs(flipped) >= least))
    draws = np.random.default_rng(seed)
    found, rows = 0, max(1, _AT_ONCE // count)
    for start in range(0, _RANDOM_SIGNS, rows):
        signs = draws.integers(0, 2, (min(rows, _RANDOM_SIGNS - start), count)) * 2.0 - 1.0
        found += int(np.sum(np.abs(signs @ sums) >= least))
    return (found + 1) / (_RANDOM_SIGNS + 1)  # The signs as they are count as drawn, too.


@functools.lru_cache(maxsize=4)
def _signs(count: int) -> np.ndarray:
    """All choices of signs for so many values: [2**count, count]."""
    return np.array(list(itertools.product((1.0, -1.0), repeat=count))).reshape(2**count, count)


def smallest_p(pairs: int) -> float:
    """The smallest p that ``sign_flip_test`` can give for so many pairs."""
    return 2.0 ** (1 - pairs) if pairs <= _MOST_SIGNS else 1 / (_RANDOM_SIGNS + 1)


def exact_mcnemar(right: Sequence[bool], other_right: Sequence[bool]) -> float:
    """Two-sided p that two models are right equally often, by the questions that only one of them got.

    Raises:
      ValueError: they did not answer the same number of questions.
    """
    first, second = np.asarray(right, bool), np.asarray(other_right, bool)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} answers: expected answers to the same questions")
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for being one of several, by Holm's method; in the order given."""
    count, adjusted, before = len(p_values), [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        before = max(before, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = before
    return adjusted


def bootstrap_interval(
    values: Values,
    *,
    clusters: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of values and its interval from drawing whole clusters again.

    Percentiles, widened for few clusters as the head of this file says. For paired scores of two models, give
    their differences.

    Args:
      clusters: which values belong together, such as the questions about one picture; None: each is alone.

    Raises:
      ValueError: there is no value, one is not finite, or there are not as many clusters as values.
    """
    values = _finite(values)
    return rate_interval(
        values,
        np.ones_like(values),
        clusters=clusters,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def rate_interval(
    sums: Values,
    sizes: Values,
    *,
    clusters: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """``sum(sums) / sum(sizes)`` and its interval, as ``bootstrap_interval``; a rate of nothing is 0.

    Args:
      sums, sizes: of every value, such as errors and words of a text; a mean has sizes of 1.

    Raises:
      ValueError: as ``bootstrap_interval``; or there are not as many sizes as sums, or one is negative.
    """
    sums, sizes = _finite(sums), _finite(sizes)
    if len(sums) != len(sizes) or (sizes < 0).any():
        raise ValueError(f"{len(sizes)} sizes of {len(sums)} sums: expected one each, 0 or more")
    names = np.arange(len(sums)) if clusters is None else clusters
    (totals, _), (weights, _) = _cluster_sums(sums, names), _cluster_sums(sizes, names)
    rate, count = (float(sums.sum() / sizes.sum()) if sizes.any() else 0.0), len(totals)
    if count < 2:
        return Interval(rate, -np.inf, np.inf)
    draws, rates = np.random.default_rng(seed), []
    rows = max(1, _AT_ONCE // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = draws.multinomial(count, np.full(count, 1 / count), size)  # how often each cluster is drawn
        drawn_sums, drawn_sizes = drawn @ totals, drawn @ weights
        rates.append(np.divide(drawn_sums, drawn_sizes, out=np.zeros(size), where=drawn_sizes > 0))
    return _widened(rate, np.concatenate(rates), count, confidence)


def crossed_interval(
    values: Float[np.ndarray, "S N"],
    *,
    clusters: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """The mean over seeds S and samples N that all seeds share, both drawn again.

    An interval over seeds alone is of these very samples, and one over samples alone of these very runs.
    This one is of another seed on other samples; it is somewhat too wide rather than too narrow (Owen, The
    pigeonhole bootstrap, 2007).

    Args:
      values: score, or difference of scores, of every sample under every seed.
      clusters: which samples belong together; None: each is alone.

    Raises:
      ValueError: there is no value, or one is not finite.
    """
    _finite(values.reshape(-1))
    names = np.arange(values.shape[1]) if clusters is None else clusters
    by_seed = [_cluster_sums(row, names) for row in values]
    sums, sizes = np.stack([s for s, _ in by_seed]), by_seed[0][1]
    mean, seeds, count = float(values.mean()), *sums.shape
    if seeds < 2 or count < 2:
        return Interval(mean, -np.inf, np.inf)
    draws = np.random.default_rng(seed)
    rows = draws.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # how often each seed is drawn
    columns = draws.multinomial(count, np.full(count, 1 / count), resamples)
    means = np.sum((rows @ sums) * columns, axis=1) / seeds / (columns @ sizes)
    return _widened(mean, means, min(seeds, count), confidence)


def _widened(mean: float, means: np.ndarray, count: int, confidence: float) -> Interval:
    """Percentiles of resampled means, as far out as Student's t of ``count`` values goes."""
    reach = stats.t.ppf((1 + confidence) / 2, count - 1) * np.sqrt(count / (count - 1))
    outside = float(stats.norm.sf(reach))
    low, high = np.quantile(means, (outside, 1 - outside))
    return Interval(mean, float(low), float(high))


def _cluster_sums(
    values: np.ndarray, clusters: Sequence[object] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values of every cluster, and how many they are; clusters in the order they come."""
    if len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} names of clusters for {len(values)} values")
    numbers: dict[object, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in clusters]
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _finite(values: Values) -> np.ndarray:
    found = np.asarray(values, float)
    if found.size == 0:
        raise ValueError("no value: expected at least one")
    if not np.isfinite(found).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(found))[0])} is not finite")
    return found
