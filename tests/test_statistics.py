"""Statistics of comparisons: worked values, and how often intervals hold what they should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from vl_jax.evaluate import statistics as ours


def test_the_exact_test_is_the_share_of_signs_that_give_as_much():
    # Of 8 choices of signs, only all plus and all minus reach 1 + 2 + 3.
    assert ours.sign_flip_test([1, 2, 3]) == 2 / 8
    assert ours.sign_flip_test([1, 1, -1]) == 1.0
    assert ours.sign_flip_test([5]) == 1.0 and ours.sign_flip_test([0, 0, 0]) == 1.0
    assert ours.sign_flip_test(np.full(8, 0.1)) == ours.smallest_p(8) == 2 / 256
    random = np.random.default_rng(0)
    for count in (2, 5, 9):
        values = random.standard_normal(count)
        sums = [np.dot(signs, values) for signs in itertools.product((1, -1), repeat=count)]
        share = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-12)
        assert ours.sign_flip_test(values) == pytest.approx(share)


def test_the_exact_test_agrees_with_scipy_and_with_drawn_signs():
    values = np.random.default_rng(1).normal(0.5, 1, 12)
    known = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert ours.sign_flip_test(values) == pytest.approx(known.pvalue)
    many = np.random.default_rng(2).normal(0.2, 1, 100)  # where normal theory is as good
    assert ours.sign_flip_test(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)


def test_values_of_a_cluster_change_sign_together():
    values, clusters = [1, 1, 1, -2], ["a", "a", "a", "b"]
    assert ours.sign_flip_test(values, clusters=clusters) == ours.sign_flip_test([3, -2])
    with pytest.raises(ValueError, match="3 names of clusters for 4 values"):
        ours.sign_flip_test(values, clusters=clusters[1:])


def test_the_t_interval_is_the_textbook_one():
    values = [4.0, 6.0, 8.0]  # mean 6, standard error 2 / sqrt(3), t of 2 degrees 4.3027
    found = ours.t_interval(values)
    assert found == pytest.approx((6, 6 - 4.302653 * 2 / 3**0.5, 6 + 4.302653 * 2 / 3**0.5), rel=1e-6)
    assert ours.t_interval([3.0]) == (3.0, -np.inf, np.inf)
    with pytest.raises(ValueError, match="value 1 is not finite"):
        ours.t_interval([1.0, np.nan])
    with pytest.raises(ValueError, match="no value"):
        ours.paired([])


def test_holm_is_the_textbook_method():
    assert ours.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ours.holm([0.9, 0.8]) == [1.0, 1.0] and ours.holm([]) == []


def test_mcnemar_counts_what_only_one_got_right():
    first = [True] * 9 + [False] * 3 + [True] * 50
    second = [False] * 9 + [True] * 3 + [True] * 50
    assert ours.exact_mcnemar(first, second) == pytest.approx(stats.binomtest(3, 12).pvalue)
    assert ours.exact_mcnemar([True], [True]) == 1.0
    with pytest.raises(ValueError, match="2 and 1 answers"):
        ours.exact_mcnemar([True, True], [True])


def coverage(interval, draw, repetitions: int) -> float:
    """How often an interval holds the true mean of what is drawn, which is zero."""
    found = [interval(draw()) for _ in range(repetitions)]
    return float(np.mean([low <= 0 <= high for _, low, high in found]))


def test_intervals_of_eight_values_cover_what_they_say():
    random = np.random.default_rng(0)
    eight = lambda: random.standard_normal(8)  # noqa: E731
    assert 0.925 <= coverage(ours.t_interval, eight, 1000) <= 0.975
    bootstrap = lambda values: ours.bootstrap_interval(values, resamples=400)  # noqa: E731
    assert 0.92 <= coverage(bootstrap, eight, 300) <= 0.98

    def plain(values):
        found = np.random.default_rng(0).choice(values, (400, len(values))).mean(axis=1)
        return (0, *np.quantile(found, (0.025, 0.975)))

    assert coverage(plain, eight, 500) < 0.92  # what the widening is for


def test_questions_about_one_picture_count_as_one():
    random, names = np.random.default_rng(0), np.repeat(np.arange(40), 5)

    def by_picture():
        return np.repeat(random.standard_normal(40), 5)

    def clustered(values):
        return ours.bootstrap_interval(values, clusters=list(names), resamples=300)

    def alone(values):
        return ours.bootstrap_interval(values, resamples=300)

    assert coverage(clustered, by_picture, 150) > 0.9
    assert coverage(alone, by_picture, 100) < 0.8


def test_seeds_that_share_their_samples_do_not_hide_that_others_would_differ():
    random = np.random.default_rng(0)

    def scores():  # both the seed and the sample matter
        return random.standard_normal((6, 1)) + 3 * random.standard_normal((1, 30)) + np.zeros((6, 30))

    def crossed(values):
        return ours.crossed_interval(values, resamples=300)

    def seeds_only(values):
        return ours.t_interval(values.mean(axis=1))

    assert coverage(crossed, scores, 200) > 0.92
    assert coverage(seeds_only, scores, 500) < 0.93


def test_a_cluster_is_weighed_by_its_size():
    found = ours.bootstrap_interval([1, 1, 1, 0], clusters=["a", "a", "a", "b"], resamples=200)
    assert found.estimate == 0.75 and found.low == 0.0 and found.high == 1.0
    assert ours.bootstrap_interval([1, 0], clusters=["a", "a"]).high == np.inf
