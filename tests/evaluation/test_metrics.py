"""metrics.py against scikit-learn, published examples, brute force, hand sums and simulation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import beta, norm, rankdata
from scipy.stats import t as student
from sklearn import calibration
from sklearn.metrics import auc as area
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from mrnet.evaluation import metrics
from mrnet.evaluation.metrics import (
    MetricError,
    OneClassError,
    auc_difference,
    auc_interval,
    average_precision,
    brier,
    calibration_curve,
    choose_threshold,
    expected_calibration_error,
    holm,
    mean_auc_difference,
    operating_point,
    roc_auc,
    roc_band,
    summary,
    wilson_interval,
)

# Hanley & McNeil (Radiology 1982): one reader's ratings of 109 CT images, 58 normal, 51 abnormal.
CT_LABELS = np.repeat([0, 1], [58, 51])
CT_RATINGS = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33])


def binormal(rng, positives, negatives, auc, rows=()):
    """Labels (n,) and normal scores (*rows, n) with this true AUC: means 0 and d, variance 1."""
    labels = np.repeat([1, 0], [positives, negatives])
    distance = math.sqrt(2) * norm.ppf(auc)
    return labels, rng.standard_normal((*rows, len(labels))) + distance * labels


def brute_force(labels, *scores):
    """AUCs (k,) and DeLong's covariance (k, k), straight from the paper: all m x n pairs."""
    v10, v01 = [], []
    for values in scores:
        values = np.asarray(values, dtype=float)
        x, y = values[np.equal(labels, 1)], values[np.equal(labels, 0)]
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)  # (m, n)
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
    v10, v01 = np.array(v10), np.array(v01)  # (k, m), (k, n)
    covariance = (
        np.atleast_2d(np.cov(v10)) / v10.shape[1] + np.atleast_2d(np.cov(v01)) / v01.shape[1]
    )
    return v10.mean(axis=1), covariance


def standard_error(labels, scores):
    placements = metrics._placements(np.equal(labels, 1), np.asarray(scores, dtype=float))
    return math.sqrt(metrics._delong_variance(*placements))


@st.composite
def exams(draw, sets=1, least=1):
    """Labels of both classes, and score lists with many ties."""
    classes = draw(st.tuples(st.integers(least, 20), st.integers(least, 20)))
    labels = draw(st.permutations([1] * classes[0] + [0] * classes[1]))
    values = st.lists(st.integers(0, 12), min_size=len(labels), max_size=len(labels))
    return np.array(labels), *(np.array(draw(values)) / 12 for _ in range(sets))


# --- AUC and its interval


def test_auc_of_a_hand_counted_example():
    # pairs (positive, negative): 3>1, 3>2, 2>1 won, 2=2 half, of 4: 3.5 / 4
    assert roc_auc([1, 1, 0, 0], [3, 2, 1, 2]) == 0.875


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, bool, np.int64])
def test_labels_may_be_any_numbers_and_columns(shape, kind):
    labels = np.array([1, 1, 0, 0], kind).reshape(shape)
    scores = np.array([3, 2, 1, 2], np.float32)
    assert roc_auc(labels, scores.reshape(shape)) == 0.875
    assert operating_point(labels, scores, 2).tp == 2


def test_hanley_mcneil_example_has_the_published_delong_values():
    # Stata's manual, roctab on these data: area 0.8932, standard error (DeLong) 0.0307,
    # asymptotic normal 95 % interval 0.83295 to 0.95339. The paper itself gives 0.893.
    error = standard_error(CT_LABELS, CT_RATINGS)
    auc, low, high = auc_interval(CT_LABELS, CT_RATINGS)
    assert round(auc, 4) == 0.8932 and round(error, 4) == 0.0307
    assert round(auc - norm.ppf(0.975) * error, 5) == 0.83295
    assert round(auc + norm.ppf(0.975) * error, 5) == 0.95339
    # On the logit scale by hand: t(0.975, 50) = 2.00856; logit(0.8932) = 2.12379;
    # 0.030724 / (0.89317 * 0.10683) = 0.32200; 2.12379 -+ 0.64676 -> expit 0.8141 and 0.9411
    assert low == pytest.approx(0.8141, abs=1e-4) and high == pytest.approx(0.9411, abs=1e-4)


def test_delong_variance_by_hand():
    # positives 3, 2 beat 2 and 1.5 of 2 negatives: variance of (1, 0.75) is 0.03125;
    # negatives 1, 2 are beaten by 2 and 1.5 of 2: 0.03125. (0.03125 + 0.03125) / 2 = 0.03125
    assert standard_error([1, 1, 0, 0], [3, 2, 1, 2]) ** 2 == pytest.approx(0.03125, rel=1e-12)


@settings(deadline=None, max_examples=200)
@given(exams(least=2))
def test_delong_equals_all_pairs_brute_force(case):
    labels, scores = case
    aucs, covariance = brute_force(labels, scores)
    assert standard_error(labels, scores) ** 2 == pytest.approx(covariance[0, 0], abs=1e-14)
    auc, low, high = auc_interval(labels, scores)
    assert auc == pytest.approx(aucs[0], abs=1e-14)
    assert roc_auc(labels, scores) == pytest.approx(aucs[0], abs=1e-14)
    if covariance[0, 0] > 1e-12:  # on the logit scale; Student's t of the smaller class
        quantile = student.ppf(0.975, np.bincount(labels).min() - 1)
        width = quantile * math.sqrt(covariance[0, 0]) / (auc * (1 - auc))
        assert (low, high) == pytest.approx((expit(logit(auc) - width), expit(logit(auc) + width)))


@settings(deadline=None, max_examples=150)
@given(exams())
def test_interval_contains_the_estimate_and_stays_in_range(case):
    labels, scores = case
    auc, low, high = auc_interval(labels, scores)
    assert 0 <= low <= auc <= high <= 1
    assert auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert type(low) is type(high) is type(auc) is float


@settings(deadline=None, max_examples=100)
@given(exams())
def test_interval_is_symmetric_and_knows_ranks_only(case):
    labels, scores = case
    auc, low, high = auc_interval(labels, scores)
    assert auc_interval(labels, np.exp(3 * scores) - 7) == (auc, low, high)
    for mirrored in (auc_interval(1 - labels, scores), auc_interval(labels, -scores)):
        assert mirrored == pytest.approx((1 - auc, 1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(
    "labels, scores",
    [
        (np.repeat([0, 1], [96, 24]), np.arange(120)),  # AUC 1
        (np.repeat([1, 0], [24, 96]), np.arange(120)),  # AUC 0
        (np.repeat([1, 0], [24, 96]), np.ones(120)),  # all tied
        ([1, 0, 0, 0], [3, 4, 1, 2]),  # one positive
        ([1, 0], [1, 0]),
    ],
)
def test_without_a_variance_the_interval_is_newcombes(labels, scores):
    auc, low, high = auc_interval(labels, scores)
    m, n = np.sum(labels), len(labels) - np.sum(labels)
    star = (m + n) / 2 - 1
    for bound in {low, high} - {0.0, 1.0}:
        # Hanley & McNeil's own form of the variance, at the bound, with Newcombe's N* for m-1, n-1
        q1, q2 = bound / (2 - bound), 2 * bound**2 / (1 + bound)
        variance = (bound * (1 - bound) + star * (q1 + q2 - 2 * bound**2)) / (m * n)
        assert abs(auc - bound) == pytest.approx(norm.ppf(0.975) * math.sqrt(variance), rel=1e-5)
    assert high - low > 0.05 and (low == 0) == (auc == 0) and (high == 1) == (auc == 1)


def test_more_exams_say_more():
    widths = [auc_interval(np.repeat([0, 1], n), np.arange(2 * n)).low for n in (2, 10, 60, 5000)]
    assert widths == sorted(widths) and widths[-1] > 0.999


@pytest.mark.parametrize("auc", [0.85, 0.95])
@pytest.mark.parametrize("positives", [24, 60])  # MRNet: 20 % and metadata half
def test_coverage_at_120_exams(positives, auc):
    rng = np.random.default_rng(positives)
    labels, scores = binormal(rng, positives, 120 - positives, auc, rows=(2500,))
    bounds = np.array([auc_interval(labels, row) for row in scores])
    coverage = np.mean((bounds[:, 1] <= auc) & (auc <= bounds[:, 2]))
    assert 0.93 <= coverage <= 0.97


def bootstrap_interval(labels, scores, resamples=metrics.RESAMPLES, seed=0):
    """Percentiles of the AUC over stratified resamples. Too narrow with few exams: a perfect
    ranking stays perfect in every resample, which gives [1, 1]."""
    resampled = []
    for positives, negatives in metrics._resampled_counts(labels == 1, scores, resamples, seed):
        below = negatives.cumsum(axis=1) - negatives / 2  # (r, k): a tie counts half
        resampled.append((positives * below).sum(axis=1))  # (r, k) -> (r,)
    pairs = (labels == 1).sum() * (labels == 0).sum()
    return np.quantile(np.concatenate(resampled) / pairs, [0.025, 0.975])


@pytest.mark.parametrize("positives", [24, 60])
@pytest.mark.whole
def test_closer_to_the_exact_interval_than_ten_thousand_resamples(positives):
    """The exact bounds are the true AUCs for which the one seen is a 2.5 % event on either side.

    They are read from a simulated table of the binormal family, which no method below knows.
    """
    rng, negatives = np.random.default_rng(5), 120 - positives
    labels, noise = binormal(rng, positives, negatives, 0.5, rows=(3000,))  # 0.5: no distance yet
    truths = norm.cdf(np.linspace(0.0, 2.6, 53))
    table = []
    for truth in truths:
        ranks = rankdata(noise + math.sqrt(2) * norm.ppf(truth) * labels, axis=1)
        beaten = ranks[:, :positives].sum(axis=1) - positives * (positives + 1) / 2
        table.append(np.quantile(beaten / (positives * negatives), [0.025, 0.975]))
    lower, upper = np.transpose(table)  # both rise with the truth
    errors = {"delong": [], "bootstrap": []}
    for auc in (0.85, 0.95):
        for scores in binormal(rng, positives, negatives, auc, rows=(60,))[1]:
            seen = roc_auc(labels, scores)
            exact = np.array([np.interp(seen, upper, truths), np.interp(seen, lower, truths)])
            errors["delong"].append(np.abs(auc_interval(labels, scores)[1:] - exact).mean())
            bounds = bootstrap_interval(labels, scores, resamples=10_000)
            errors["bootstrap"].append(np.abs(bounds - exact).mean())
    assert np.mean(errors["delong"]) < np.mean(errors["bootstrap"])


def test_bootstrap_is_scikit_learn_over_the_same_resamples():
    rng = np.random.default_rng(2)
    labels, scores = binormal(rng, 15, 25, 0.8)
    scores = np.round(scores, 1)  # with ties
    positive, distinct = labels == 1, np.unique(scores)
    aucs = []
    for up, down in metrics._resampled_counts(positive, scores, 60, seed=9):
        assert (up.sum(axis=1) == 15).all() and (down.sum(axis=1) == 25).all()  # stratified
        for p, n in zip(up, down, strict=True):
            drawn = np.concatenate([np.repeat(distinct, p), np.repeat(distinct, n)])
            aucs.append(roc_auc_score(np.repeat([1, 0], [15, 25]), drawn))
    bounds = bootstrap_interval(labels, scores, resamples=60, seed=9)
    assert len(aucs) == 60 and bounds == pytest.approx(np.quantile(aucs, [0.025, 0.975]))
    roc_band(labels, scores, resamples=1)  # the fewest


def test_a_difference_of_one_run_is_delongs():
    rng = np.random.default_rng(0)
    labels, scores = binormal(rng, 30, 50, 0.8, rows=(2,))
    one = mean_auc_difference(labels, scores[:1], scores[1:])
    assert one == pytest.approx(auc_difference(labels, *scores), abs=1e-12)


def test_a_difference_of_several_runs_has_their_mean_and_its_variance():
    rng = np.random.default_rng(1)
    labels, scores = binormal(rng, 25, 40, 0.8, rows=(6,))
    aucs, covariance = brute_force(labels, *scores)
    weights = np.array([1, 1, 1, -1, -1, -1]) / 3
    found = mean_auc_difference(labels, scores[:3], scores[3:])
    assert found.value == pytest.approx(weights @ aucs)
    # Hillis 2007: of exams, as if known, and of the mean of three runs
    of_exams, of_runs = weights @ covariance @ weights, np.var(aucs[:3] - aucs[3:], ddof=1) / 3
    error = math.sqrt(of_exams + of_runs)
    freedom = (of_exams + of_runs) ** 2 / (of_runs**2 / 2)
    half = student.ppf(0.975, freedom) * error
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half))
    assert found.p == pytest.approx(2 * student.sf(abs(found.value) / error, freedom))


def test_runs_that_rank_alike_do_not_differ():
    labels, scores = binormal(np.random.default_rng(2), 5, 5, 0.8, rows=(2,))
    assert mean_auc_difference(labels, scores, 2 * scores) == (0, 0, 0, 1)


def test_holm():
    # R's p.adjust(c(0.04, 0.01, 0.03, 0.005), "holm")
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0]) and len(holm([])) == 0


def test_bootstrap_agrees_with_delong_on_many_exams_and_is_seeded(monkeypatch):
    labels, scores = binormal(np.random.default_rng(3), 800, 1200, 0.85)
    monkeypatch.setattr(metrics, "CHUNK", 500_000)  # 2,000 resamples in 8 chunks
    bootstrap = bootstrap_interval(labels, scores)
    assert bootstrap == pytest.approx(auc_interval(labels, scores)[1:], abs=0.0015)
    assert np.array_equal(bootstrap, bootstrap_interval(labels, scores))
    assert not np.array_equal(bootstrap, bootstrap_interval(labels, scores, seed=1))


# --- two models on the same exams


@settings(deadline=None, max_examples=150)
@given(exams(sets=2, least=2))
def test_paired_test_equals_brute_force(case):
    labels, a, b = case
    aucs, covariance = brute_force(labels, a, b)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    result = auc_difference(labels, a, b)
    assert result.value == pytest.approx(aucs[0] - aucs[1], abs=1e-12)
    if variance > 1e-12:
        z = (aucs[0] - aucs[1]) / math.sqrt(variance)
        half = norm.ppf(0.975) * math.sqrt(variance)
        assert result.p == pytest.approx(2 * norm.cdf(-abs(z)), abs=1e-9)
        assert result.low == pytest.approx(max(result.value - half, -1), abs=1e-9)
        assert result.high == pytest.approx(min(result.value + half, 1), abs=1e-9)


@settings(deadline=None, max_examples=150)
@given(exams(sets=2))
def test_paired_test_is_sane_for_any_exams(case):
    labels, a, b = case
    value, low, high, p = auc_difference(labels, a, b)
    assert -1 <= low <= value <= high <= 1 and 0 <= p <= 1
    assert (p < 0.05) == (low > 0 or high < 0) or p == pytest.approx(0.05)
    assert auc_difference(labels, b, a) == pytest.approx((-value, -high, -low, p), abs=1e-9)
    assert auc_difference(labels, a, 2 * a + 1) == (0, 0, 0, 1)


def test_perfect_against_useless_is_significant_though_the_variance_is_zero():
    labels, perfect = np.repeat([0, 1], [96, 24]), np.arange(120.0)
    value, low, high, p = auc_difference(labels, perfect, np.zeros(120))
    assert value == 0.5 and low > 0.3 and p < 1e-3
    # two perfect models with different scores are equal, but not known to be equal for ever
    value, low, high, p = auc_difference(labels, perfect, perfect > 95)
    assert (value, p) == (0, 1) and low < -0.04 and high > 0.04


def test_a_useless_recipe_is_behind_in_every_number_of_runs():
    """Perfect against constant scores: of one run and of three of the same the same limits, and
    those of the two AUCs' own intervals (Newcombe 1998, method 10)."""
    labels, perfect = np.repeat([0, 1], [96, 24]), np.arange(120.0)
    (_, low_a, high_a), (_, low_b, high_b) = (
        auc_interval(labels, scores) for scores in (perfect, np.zeros(120))
    )
    low = 0.5 - math.hypot(1 - low_a, high_b - 0.5)
    high = 0.5 + math.hypot(high_a - 1, 0.5 - low_b)
    for runs in (1, 3):
        found = mean_auc_difference(labels, [perfect] * runs, [np.zeros(120)] * runs)
        assert found[:3] == pytest.approx((0.5, low, high)) and found.p < 1e-3


def test_runs_that_differ_much_prove_little():
    """No difference between two recipes whose trainings differ from seed to seed: the test keeps
    its size with three runs, where the normal quantile rejects in 0.15."""
    rng, rejected = np.random.default_rng(5), []
    labels = np.repeat([0, 1], [300, 100])
    for _ in range(400):
        knees = rng.standard_normal(400)
        strength = 1.2 + 0.25 * rng.standard_normal((2, 3, 1))  # of each training
        a, b = strength * labels + knees + 0.3 * rng.standard_normal((2, 3, 400))
        rejected.append(mean_auc_difference(labels, a, b).p < 0.05)
    assert np.mean(rejected) <= 0.08


def test_paired_test_keeps_its_size_and_its_coverage():
    # Both scores are the same knee seen with independent noise, so the true difference is 0.
    rng = np.random.default_rng(11)
    labels, knees = binormal(rng, 48, 72, 0.9, rows=(1500,))
    results = [
        auc_difference(labels, *(knee + 0.6 * rng.standard_normal((2, 120)))) for knee in knees
    ]
    rejected = np.mean([result.p < 0.05 for result in results])
    covered = np.mean([result.low <= 0 <= result.high for result in results])
    assert 0.03 <= rejected <= 0.07 and covered == pytest.approx(1 - rejected)


# --- thresholds


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_values_of_newcombe_1998(successes, n, low, high):
    # Stat. Med. 17:857, table I, method 3
    interval = wilson_interval(successes, n)
    assert interval == pytest.approx((successes / n, low, high), abs=5e-5)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_wilson_is_the_closed_form_at_any_level(level):
    k, n, z = 7, 30, norm.ppf((1 + level) / 2)
    half = z * math.sqrt(k * (n - k) / n + z**2 / 4)
    low, high = (k + z**2 / 2 - half) / (n + z**2), (k + z**2 / 2 + half) / (n + z**2)
    assert wilson_interval(k, n, level) == pytest.approx((k / n, low, high))


@pytest.mark.parametrize("successes, n", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(MetricError, match=f"no proportion: {successes} successes of {n}"):
        wilson_interval(successes, n)


def test_operating_point_by_hand():
    # At 0.5 and above: exams 1, 2, 3; positives are 1, 3, 4. The score 0.5 itself counts.
    point = operating_point([1, 0, 1, 1, 0], [0.9, 0.8, 0.5, 0.4, 0.1], 0.5)
    assert (point.tp, point.fp, point.tn, point.fn) == (2, 1, 1, 1)
    assert point.sensitivity == wilson_interval(2, 3)
    assert point.specificity == wilson_interval(1, 2)
    assert point.accuracy == wilson_interval(3, 5)


def test_youden_by_hand_takes_the_more_sensitive_of_equals():
    # from 0.9 on: 1/2 - 0; 0.8: 1/2 - 1/2; 0.7: 1 - 1/2; 0.1: 0. Equal: 0.9 and 0.7
    assert choose_threshold([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]) == pytest.approx((0.7 + 0.1) / 2)


def test_youden_tells_close_sums_apart():
    # n/P, and later 2n/P - (n+1)/N with P = 2n + 1, N = 2n + 3: less by 1/(PN), 2.5e-9
    n = 10_000
    labels = np.repeat([1, 0, 1, 0, 1], [n, n + 1, n, n + 2, 1])
    falling = 1 - np.arange(len(labels)) / len(labels)
    assert choose_threshold(labels, falling) == pytest.approx(1 - (n - 0.5) / len(labels), abs=1e-9)


def test_wanted_sensitivity_by_hand():
    labels, scores = [1] * 20 + [0] * 20, np.r_[np.arange(21, 41), np.arange(1, 40, 2)] / 100
    # 19 of 20 positives score 0.22 and more, all of them 0.21 and more
    assert choose_threshold(labels, scores, 0.95) == pytest.approx(0.215)
    assert choose_threshold(labels, scores, 0.951) == pytest.approx(0.20)
    assert choose_threshold(labels, scores, 1.0) == pytest.approx(0.20)


def test_a_threshold_lies_below_the_lowest_score_and_above_a_neighbouring_float():
    assert choose_threshold([1, 0], [0.4, 0.6], 1.0) == 0.2
    assert choose_threshold([1, 0], [0.0, 0.6], 1.0) == 0.0
    for score in (0.3, np.nextafter(0.3, 1)):  # the midpoint rounds up for one, down for the other
        above = np.nextafter(score, 1)
        assert choose_threshold([1, 0], [above, score]) == above


@settings(deadline=None, max_examples=150)
@given(exams(), st.sampled_from([1e-13, 0.5, 0.8, 0.95, 1.0]))
def test_thresholds_lie_between_scores_and_do_what_they_promise(case, wanted):
    labels, scores = case
    scores = rankdata(scores, method="dense") / (len(scores) + 1)  # ties stay
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    youden = operating_point(labels, scores, choose_threshold(labels, scores))
    assert youden.threshold not in scores
    assert youden.sensitivity.value + youden.specificity.value - 1 == pytest.approx(
        (tpr - fpr)[1:].max(), abs=1e-12
    )
    point = operating_point(labels, scores, choose_threshold(labels, scores, wanted))
    assert point.threshold not in scores and point.sensitivity.value >= wanted - 1e-12
    higher = np.unique(scores[scores > point.threshold])
    if len(higher) > 1:
        assert operating_point(labels, scores, higher[1]).sensitivity.value < wanted


# --- probabilities


def test_brier_and_ece_by_hand():
    labels, probabilities = [1, 0, 1, 0], [0.9, 0.2, 0.6, 0.6]
    # (0.1^2 + 0.2^2 + 0.4^2 + 0.6^2) / 4 = 0.57 / 4
    assert brier(labels, probabilities) == pytest.approx(0.1425)
    # bins of 0.2: {0.2}: |0.2 - 0| x 1, {0.6, 0.6}: |0.6 - 0.5| x 2, {0.9}: |0.9 - 1| x 1;
    # (0.2 + 0.2 + 0.1) / 4
    assert expected_calibration_error(labels, probabilities, bins=5) == pytest.approx(0.125)
    assert expected_calibration_error([0, 1], [0.1, 0.3], bins=1) == pytest.approx(0.3)
    assert expected_calibration_error([0, 0, 1], [0, 0, 1]) == 0
    assert expected_calibration_error([1, 1], [0, 0]) == brier([1, 1], [0, 0]) == 1


@settings(deadline=None, max_examples=100)
@given(exams(), st.integers(1, 15))
def test_calibration_curve_is_scikit_learns_with_counts(case, bins):
    labels, probabilities = case
    curve = calibration_curve(labels, probabilities, bins)
    observed, predicted = calibration.calibration_curve(labels, probabilities, n_bins=bins)
    assert curve.observed == pytest.approx(observed)
    assert curve.predicted == pytest.approx(predicted)
    assert curve.count.sum() == len(labels) and (curve.count > 0).all()
    for k, n, low, high in zip(
        curve.observed * curve.count, curve.count, curve.low, curve.high, strict=True
    ):
        assert wilson_interval(round(k), n)[1:] == pytest.approx((low, high))
    assert 0 <= expected_calibration_error(labels, probabilities, bins) <= 1


def test_average_precision_is_scikit_learns():
    assert average_precision(CT_LABELS, CT_RATINGS) == average_precision_score(
        CT_LABELS, CT_RATINGS
    )


# --- curve and summary


def test_band_holds_the_true_curve_as_often_as_it_says():
    rng = np.random.default_rng(8)
    labels, scores = binormal(rng, 24, 96, 0.9, rows=(300,))
    bands = [roc_band(labels, row, resamples=200, points=11) for row in scores]
    fpr = bands[0].fpr[1:6]  # 0.1 to 0.5
    truth = norm.cdf(math.sqrt(2) * norm.ppf(0.9) + norm.ppf(fpr))
    covered = np.mean([(b.low[1:6] <= truth) & (truth <= b.high[1:6]) for b in bands], axis=0)
    assert (covered > 0.9).all() and 0.92 < covered.mean() < 0.995


@settings(deadline=None, max_examples=60)
@given(exams())
def test_band_contains_the_curve_and_stays_in_range(case):
    labels, scores = case
    band = roc_band(labels, scores, resamples=30)
    assert (band.low >= 0).all() and (band.high <= 1).all() and len(band.fpr) == 101
    assert (band.low <= band.tpr).all() and (band.tpr <= band.high).all()
    assert (np.diff(band.tpr) >= -1e-12).all() and band.tpr[-1] == band.low[-1] == 1
    # the curve's corners are scikit-learn's: its area differs by what 101 points cut off at most
    assert area(band.fpr, band.tpr) == pytest.approx(roc_auc(labels, scores), abs=0.011)


def test_a_perfect_curve_still_has_a_band():
    band = roc_band(np.repeat([0, 1], [96, 24]), np.arange(120))
    assert (band.tpr == 1).all() and 0.8 < band.low[0] < 0.95


def test_band_is_scikit_learns_curve_of_each_resample_and_jeffreys_interval(monkeypatch):
    labels, scores = binormal(np.random.default_rng(4), 9, 14, 0.8)
    scores = np.round(scores, 1)  # with ties
    monkeypatch.setattr(metrics, "CHUNK", 10 * len(labels))  # 25 resamples in 3 chunks
    band = roc_band(labels, scores, level=0.8, resamples=25, seed=6, points=21)
    grid, distinct, curves = np.linspace(0, 1, 21), np.unique(scores), []
    assert band.fpr == pytest.approx(grid)
    for up, down in metrics._resampled_counts(labels == 1, scores, 25, seed=6):
        for p, n in zip(up, down, strict=True):
            drawn = np.concatenate([np.repeat(distinct, p), np.repeat(distinct, n)])
            fpr, tpr, _ = roc_curve(np.repeat([1, 0], [9, 14]), drawn)
            curves.append(np.interp(grid, fpr, tpr))
    assert len(curves) == 25
    mean, variance = np.mean(curves, axis=0), np.var(curves, axis=0)
    fpr, tpr, _ = roc_curve(labels, scores)
    for i, seen in enumerate(np.interp(grid, fpr, tpr)):
        worth = min(mean[i] * (1 - mean[i]) / variance[i], 9) if variance[i] else 9
        low, high = beta.ppf([0.1, 0.9], seen * worth + 0.5, (1 - seen) * worth + 0.5)
        assert band.tpr[i] == pytest.approx(seen)
        assert band.low[i] == pytest.approx(1 if i == 20 else min(low, seen))
        assert band.high[i] == pytest.approx(max(high, seen))
    assert np.array_equal(roc_band(labels, scores).low, roc_band(labels, scores, seed=0).low)


def test_summary_by_hand():
    labels, probabilities = [1, 0, 1, 1, 0, 0], [0.9, 0.8, 0.6, 0.3, 0.35, 0.1]
    parts = {
        "auc": auc_interval(labels, probabilities),
        "sensitivity": wilson_interval(2, 3),
        "specificity": wilson_interval(1, 3),
        "accuracy": wilson_interval(3, 6),
    }
    wanted = {"n": 6, "positives": 3, "threshold": 0.35, "tp": 2, "fp": 2, "tn": 1, "fn": 1}
    for name, (value, low, high) in parts.items():
        wanted |= {name: value, f"{name}_low": low, f"{name}_high": high}
    wanted["average_precision"] = average_precision_score(labels, probabilities)
    wanted["brier"] = (0.1**2 + 0.8**2 + 0.4**2 + 0.7**2 + 0.35**2 + 0.1**2) / 6
    wanted["ece"] = (0.1 + 0.8 + 0.4 + 0.7 + 0.35 + 0.1) / 6  # each alone in its bin
    assert summary(labels, probabilities, 0.35) == pytest.approx(wanted)


@settings(deadline=None, max_examples=60)
@given(exams())
def test_summary_is_plain_finite_json(case):
    labels, probabilities = case
    report = summary(labels, probabilities, 0.5)
    json.dumps(report, allow_nan=False)
    assert all(type(value) in (int, float) for value in report.values())
    for name in ("auc", "sensitivity", "specificity", "accuracy"):
        assert 0 <= report[f"{name}_low"] <= report[name] <= report[f"{name}_high"] <= 1
    assert report["n"] == len(labels) and report["positives"] == labels.sum()
    assert report["brier"] == pytest.approx(np.mean((probabilities - labels) ** 2))
    assert report["auc"] == pytest.approx(roc_auc_score(labels, probabilities))


# --- bad input: one line that names it

TWO_ARRAYS = [
    roc_auc,
    auc_interval,
    choose_threshold,
    brier,
    average_precision,
    calibration_curve,
    expected_calibration_error,
    roc_band,
]


def fixed_threshold(labels, scores):
    return operating_point(labels, scores, 0.5)


def against_itself(labels, scores):
    return auc_difference(labels, scores, scores)


@pytest.mark.parametrize("function", [*TWO_ARRAYS, fixed_threshold, against_itself])
@pytest.mark.parametrize(
    "labels, scores, message",
    [
        ([0, 1, 1], [0.1, np.nan, 0.3], "1 of 3 predictions are NaN or infinite"),
        ([0, 1, 1], [0.1, np.inf, -np.inf], "2 of 3 predictions are NaN or infinite"),
        ([0, 1, 1], [0.1, 0.2], "lengths differ: 3 labels, 2 predictions"),
        ([0, 1, 2], [0.1, 0.2, 0.3], "labels must be 0 or 1, not 2"),
        ([0, 1, np.nan], [0.1, 0.2, 0.3], "labels must be 0 or 1, not nan"),
        ([0, 1, 0.5], [0.1, 0.2, 0.3], "labels must be 0 or 1, not 0.5"),
        ([], [], "no exams"),
        (["no", "yes"], [0.1, 0.2], "arrays of numbers"),
        ([[0, 1], [0, 1]], [[0.1, 0.2], [0.1, 0.2]], r"one number per exam .*\(2, 2\)"),
        (1, 0.5, "one number per exam"),
    ],
)
def test_bad_arrays_are_named_in_one_line(function, labels, scores, message):
    with pytest.raises(MetricError, match=message) as caught:
        function(labels, scores)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    "function",
    [
        roc_auc,
        auc_interval,
        choose_threshold,
        average_precision,
        roc_band,
        fixed_threshold,
        against_itself,
    ],
)
def test_one_class_is_its_own_error(function, label):
    for scores in ([0.1, 0.2, 0.3], [0.1]):
        message = f"only one class, all {len(scores)} labels are {label}"
        with pytest.raises(OneClassError, match=message):
            function([label] * len(scores), scores)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda y, s: brier(y, s * 4 - 2), "logits"),
        (lambda y, s: expected_calibration_error(y, s + 1), "logits"),
        (lambda y, s: calibration_curve(y, s, bins=0), "one bin"),
        (lambda y, s: roc_band(y, s, resamples=0), "one resample"),
        (lambda y, s: choose_threshold(y, s, 1.5), "1.5"),
        (lambda y, s: choose_threshold(y, s, 0), "0"),
        (lambda y, s: operating_point(y, s, math.nan), "nan"),
        (lambda y, s: operating_point(y, s, math.inf), "inf"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(MetricError, match=message):
        call(np.array([0, 1, 1]), np.array([0.1, 0.8, 0.9]))
