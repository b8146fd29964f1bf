"""Metrics of vectors, rankings and losses: values worked by hand, definitions, and what the packages say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from vl_jax.evaluate.metrics import alignment as module
from vl_jax.evaluate.metrics.alignment import alignment, alignment_samples
from vl_jax.evaluate.metrics.language import TextLosses
from vl_jax.evaluate.metrics.ranking import RankingScores, multiclass_auroc
from vl_jax.evaluate.metrics.retrieval import retrieval

CASES = 1000
rows = np.eye(4)


# Vectors.


def test_equal_towers_worked_by_hand():
    found = alignment(3 * rows, rows, neighbours=1)  # lengths do not count
    assert found == pytest.approx(
        {
            **{
                "alignment": 0,
                "matched_cosine": 1,
                "unmatched_cosine": 0,
                "match_auroc": 1,
                "modality_gap": 0,
            },
            **{f"{way}_recall_at_{k}": 1 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
            **{f"{way}_median_rank": 1 for way in ("image_to_text", "text_to_image")},
            **{f"{way}_mean_reciprocal_rank": 1 for way in ("image_to_text", "text_to_image")},
            # All pairs are at a squared distance of 2, in 4 directions; each row is the nearest of its own.
            **{"image_uniformity": -4, "text_uniformity": -4, "image_effective_rank": 4},
            **{"text_effective_rank": 4, "image_hubness": 0, "text_hubness": 0},
            # All cosines of one modality are equal, so they have no order.
            **{"cka": 1, "cka_unbiased": 0, "mutual_neighbours": 1, "similarity_correlation": 0},
        }
    )


def test_one_vector_for_all_is_aligned_and_finds_nothing():
    same = np.tile([[1.0, 2.0]], (5, 1))
    found = alignment(same, same, neighbours=2)
    assert [found["alignment"], found["image_uniformity"]] == pytest.approx([0, 0], abs=1e-12)
    assert found["text_to_image_median_rank"] == 5 and found["text_to_image_recall_at_1"] == 0
    assert (
        found["match_auroc"] == 0.5
        and found["cka"] == 0
        and found["image_effective_rank"] == pytest.approx(1)
    )


def test_a_gap_and_a_swap_worked_by_hand():
    found = alignment(rows, -rows, neighbours=1)
    # The means are 1/4 and -1/4 in each of four directions, matched vectors are 2 apart.
    assert found["modality_gap"] == pytest.approx(1) and found["alignment"] == pytest.approx(4)
    assert found["match_auroc"] == 0 and found["image_to_text_mean_reciprocal_rank"] == pytest.approx(1 / 4)
    swapped = alignment(rows, rows[[1, 0, 2, 3]], neighbours=1)
    assert swapped["image_to_text_recall_at_1"] == 0.5 and swapped["alignment"] == pytest.approx(1)


def test_neighbours_and_hubs_worked_by_hand():
    angles = np.radians([0, 10, 90, 101])  # the pairs 0-1 and 2-3 are near
    one = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert module.mutual_neighbours(one, one[[0, 2, 1, 3]], 1) == 0
    assert module.mutual_neighbours(one, one[[1, 0, 3, 2]], 1) == 1
    # All rows name column 0: it is named four times, the others never.
    similarity = np.tile([1.0, 0, 0, 0], (4, 1))
    apart = np.array([3.0, -1, -1, -1])
    assert module.hubness(similarity, 1) == pytest.approx(np.mean(apart**3) / np.mean(apart**2) ** 1.5)
    assert module.effective_rank(np.diag([1.0, 1, 0])) == pytest.approx(2)
    shares = np.array([0.75, 0.25])
    assert module.effective_rank(np.diag([3.0, 1])) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))


def test_cka_is_that_of_its_definition_and_turning_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
        a, b = x - x.mean(axis=0), y - y.mean(axis=0)
        norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
        assert module.linear_cka(x, y) == pytest.approx(np.linalg.norm(b.T @ a) ** 2 / norms)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    for unbiased in (False, True):
        expected = module.linear_cka(x, y, unbiased=unbiased)
        assert module.linear_cka(5 * x @ turn + 1, y, unbiased=unbiased) == pytest.approx(expected)
        assert module.linear_cka(x, x @ turn, unbiased=unbiased) == pytest.approx(1)


def test_the_unbiased_estimate_is_the_mean_over_four_different_rows():
    rng = np.random.default_rng(0)
    four = np.array(list(itertools.permutations(range(5), 4))).T

    def hsic(k: np.ndarray, m: np.ndarray) -> np.ndarray:
        i, j, q, r = four
        return np.mean(k[:, i, j] * (m[:, i, j] + m[:, q, r] - 2 * m[:, i, q]), axis=1)

    x, y = rng.normal(size=(CASES, 5, 2)), rng.normal(size=(CASES, 5, 3))
    k, m = x @ x.transpose(0, 2, 1), y @ y.transpose(0, 2, 1)
    both, own = hsic(k, m), (hsic(k, k), hsic(m, m))
    assert (np.minimum(*own) > 0).mean() > 0.9
    for case in np.flatnonzero(np.minimum(*own) > 0):
        expected = both[case] / np.sqrt(own[0][case] * own[1][case])
        assert module.linear_cka(x[case], y[case], unbiased=True) == pytest.approx(expected)


def test_only_the_unbiased_cka_of_noise_is_near_zero():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40, 200))
    assert module.linear_cka(x, y) > 0.7 and abs(module.linear_cka(x, y, unbiased=True)) < 0.1


@pytest.mark.slow
def test_order_statistics_are_those_of_scipy_and_of_counting():
    rng = np.random.default_rng(0)
    matched, unmatched = (rng.integers(0, 5, (CASES, n)).astype(float) for n in (4, 7))
    one, two = matched[:, :, None], unmatched[:, None]
    wins = np.mean((one > two) + (one == two) / 2, axis=(1, 2))
    x, y = rng.normal(size=(2, CASES, 5, 3))
    cosines = [(v @ v.transpose(0, 2, 1))[:, *np.triu_indices(5, k=1)].T for v in (x, y)]
    expected = np.diagonal(stats.spearmanr(*cosines).statistic, offset=CASES)  # of each case in both sets
    for case in range(CASES):
        assert module.match_auroc(matched[case], unmatched[case]) == pytest.approx(wins[case])
        assert module.similarity_correlation(x[case], y[case]) == pytest.approx(expected[case])


@pytest.mark.slow
def test_neighbours_hubs_and_ranks_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, CASES, 6, 3))
    near = [np.argsort(-(v @ v.transpose(0, 2, 1)) + 1e9 * np.eye(6), axis=2)[..., :2] for v in (x, y)]
    similarity = x @ y.transpose(0, 2, 1)
    best = np.argsort(-similarity, axis=2)[..., :2].reshape(CASES, -1)
    for case in range(CASES):
        shared = [len(set(a) & set(b)) / 2 for a, b in zip(near[0][case], near[1][case], strict=True)]
        assert module.mutual_neighbours(x[case], y[case], 2) == pytest.approx(np.mean(shared))
        counts = np.array([np.sum(best[case] == column) for column in range(6)])
        expected = stats.skew(counts) if np.ptp(counts) else 0
        assert module.hubness(similarity[case], 2) == pytest.approx(expected)
        values = np.sqrt(np.linalg.eigvalsh(x[case].T @ x[case]))
        assert module.effective_rank(x[case]) == pytest.approx(np.exp(stats.entropy(values)))


def test_uniformity_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        x = rng.normal(size=(5, 3))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        far = [np.exp(-2 * np.sum((a - b) ** 2)) for a, b in itertools.combinations(x, 2)]
        assert module.uniformity(x) == pytest.approx(np.log(np.mean(far)))


def test_values_by_row_are_those_of_retrieval():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60, 4))
    y += 2 * x
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    samples = alignment_samples(x, y, clusters=[f"picture {i // 2}" for i in range(60)])
    expected, ids = alignment(x, y), np.arange(60)
    for way, found in retrieval(x, y, ids, ids).items():
        assert samples[f"{way}_recall_at_5"].score == pytest.approx(found["recall_at_5"])
        assert expected[f"{way}_median_rank"] == found["median_rank"]
    assert all(expected[name] == pytest.approx(found.score) for name, found in samples.items())
    assert samples["alignment"].by_cluster()[1].tolist() == [2] * 30


@pytest.mark.parametrize(
    ("images", "texts", "options", "message"),
    [
        (rows, rows[:, :3], {}, r"images \(4, 4\), texts \(4, 3\): expected the same shape"),
        (rows[:3], rows[:3], {}, "expected the same shape, 4 rows or more"),
        (rows, rows * np.array([[1], [1], [0], [1]]), {}, "text vector 2 is 0 or not finite"),
        (rows * np.array([[1], [np.nan], [1], [1]]), rows, {}, "image vector 1 is 0 or not finite"),
        (rows, rows, {"neighbours": 4}, "neighbours=4: expected 1 to 3"),
    ],
)
def test_vectors_that_cannot_be_compared_are_named(images, texts, options, message):
    with pytest.raises(ValueError, match=message):
        alignment(images, texts, **options)


def test_another_number_of_clusters_is_refused():
    with pytest.raises(ValueError, match="3 clusters for 4 rows"):
        alignment_samples(rows, rows, clusters=["a", "b", "c"])


# Rankings.


def test_rankings_worked_by_hand():
    pytest.importorskip("sklearn")
    scores = RankingScores()
    for truth, score in ((True, 0.9), (False, 0.9), (True, 0.4), (False, 0.1)):
        scores.update(truth, score)
    found = scores.compute()
    # Of four pairs: a tie, two wins, one loss. Precision is 1/2 at recall 1/2, and 2/3 at recall 1.
    assert found["auroc"] == pytest.approx(2.5 / 4)
    assert found["average_precision"] == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)
    assert found["f1"] == found["precision"] == found["recall"] == found["accuracy"] == 0.5
    assert scores.samples()["accuracy"].values.tolist() == [1, 0, 0, 1]


def test_rankings_of_one_kind_or_of_no_number_are_refused():
    pytest.importorskip("sklearn")
    scores = RankingScores()
    with pytest.raises(ValueError, match="no sample to score"):
        scores.compute()
    scores.update(True, 0.5)
    with pytest.raises(ValueError, match="AUROC: all 1 samples are of one kind; needs both"):
        scores.compute()
    with pytest.raises(ValueError, match="sample 1: score=nan is not finite"):
        scores.update(False, math.nan)
    with pytest.raises(ValueError, match="AUROC: class 2 of 3 has no sample to compare"):
        multiclass_auroc(np.array([0, 1, 1]), np.ones((3, 3)))
    with pytest.raises(ValueError, match="all of which must be finite"):
        multiclass_auroc(np.array([0, 1]), np.array([[0.0, np.inf], [1.0, 0.0]]))


@pytest.mark.slow
def test_auroc_is_the_share_of_pairs_in_order():
    pytest.importorskip("sklearn")
    rng, classes = np.random.default_rng(0), 200
    for _ in range(CASES // classes):  # each class against the rest is a case of its own
        truth = np.concatenate([np.arange(classes), rng.integers(0, classes, 100)])
        scores, wins = rng.integers(0, 50, size=(300, classes)).astype(float), []
        for k in range(classes):
            of_class, others = scores[truth == k, k, None], scores[truth != k, k]
            wins.append(np.mean((of_class > others) + (of_class == others) / 2))
        assert multiclass_auroc(truth, scores) == pytest.approx(np.mean(wins))


# Losses of texts.


def test_perplexity_and_bits_worked_by_hand():
    losses = TextLosses()
    with pytest.raises(ValueError, match="no sample to score"):
        losses.compute()
    losses.update(6 * math.log(2), tokens=3, num_bytes=6, cluster="a")
    losses.update(2 * math.log(2), tokens=1, num_bytes=10)
    # 8 bits for 4 tokens and 16 bytes: no mean of the two texts.
    expected = {"perplexity": 4, "nats_per_token": 2 * math.log(2), "bits_per_byte": 0.5}
    assert losses.compute() == pytest.approx(expected)
    assert losses.samples()["bits_per_byte"].values == pytest.approx([1, 0.2])
    losses.update(1e6, tokens=1, num_bytes=1)
    assert losses.compute()["perplexity"] == math.inf


@pytest.mark.parametrize(
    "loss, tokens, num_bytes", [(math.nan, 1, 1), (-1.0, 1, 1), (1.0, 0, 1), (1.0, 1, 0)]
)
def test_losses_that_mean_nothing_are_refused(loss, tokens, num_bytes):
    with pytest.raises(ValueError, match="sample 0: (loss|tokens)="):
        TextLosses().update(loss, tokens, num_bytes)
