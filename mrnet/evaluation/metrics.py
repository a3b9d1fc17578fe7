"""Metrics of predictions: arrays in, numbers with confidence intervals out.

    from mrnet.evaluation.metrics import auc_interval, choose_threshold, operating_point
    auc, low, high = auc_interval(labels, probabilities)
    threshold = choose_threshold(tuning_labels, tuning_probabilities)    # never the reported exams
    print(operating_point(labels, probabilities, threshold).sensitivity)

Labels are 0 or 1, one per exam, with shape (n,) or (n, 1); scores are finite, higher meaning more
positive. What cannot be computed is a MetricError in one line, never NaN and never a made-up 0.5.
AUC, average precision, Brier score and ROC curve are scikit-learn's, Wilson's interval is scipy's.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import beta, binomtest, norm, rankdata
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from mrnet.errors import MetricError, OneClassError
from mrnet.layout.labels import is_positive

LEVEL = 0.95  # of confidence intervals
RESAMPLES = 2000  # of the bootstrap: the default of pROC (Robin et al. 2011)
ECE_BINS = 10
BELOW_CHANCE = "below chance: the AUC's interval lies below 0.5; look whether labels are swapped"
ROUNDING = 1e-12  # part of a variance that is none
CHUNK = 4_000_000  # counts held at once while resampling, 32 MB, whatever the number of exams


class Interval(NamedTuple):
    """An estimate between the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """AUC of a minus AUC of b, its confidence interval, and the test that it is 0."""

    value: float
    low: float
    high: float
    p: float  # two-sided


class OperatingPoint(NamedTuple):
    """What a threshold does: three proportions with their intervals, and the four counts."""

    threshold: float
    sensitivity: Interval
    specificity: Interval
    accuracy: Interval
    tp: int
    fp: int
    tn: int
    fn: int


class Calibration(NamedTuple):
    """A reliability diagram: one entry for each bin that holds an exam, arrays of shape (b,)."""

    predicted: np.ndarray  # mean probability in the bin
    observed: np.ndarray  # fraction of positives in the bin
    low: np.ndarray  # Wilson interval of that fraction
    high: np.ndarray
    count: np.ndarray  # exams in the bin


class RocBand(NamedTuple):
    """A ROC curve at fixed false positive rates with its pointwise band, arrays of shape (g,)."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


def answered(labels, *scores):
    """Labels and scores (n,) of the exams that every model has a score for, one that is not NaN."""
    rows = np.logical_and.reduce([~np.isnan(one) for one in scores])
    return np.asarray(labels)[rows], *(np.asarray(one)[rows] for one in scores)


def roc_auc(labels, scores):
    """Area under the ROC curve, scikit-learn's; cheap enough to be called after every epoch.

    Raises MetricError for bad arrays, OneClassError when the AUC is undefined.
    """
    positive, scores = _checked(labels, scores, both_classes=True)
    return float(roc_auc_score(positive, scores))


def auc_interval(labels, scores):
    """AUC with its confidence interval, an Interval within [0, 1] that contains the estimate.

    The variance is that of DeLong et al. (Biometrics 1988), by the midranks of Sun & Xu (IEEE
    Signal Process. Lett. 2014), on the logit scale, which keeps coverage near AUC 1 (Qin &
    Hotilovac, Stat. Methods Med. Res. 2008; Perme & Manevski, same journal, 2019). The quantile
    is Student's with one degree of freedom less than the smaller class has exams, the lower limit
    of Welch and Satterthwaite's: with few positives the variance estimate is itself uncertain.

    The variance is 0 for AUC 0 or 1 and where all scores tie, and undefined with one exam in a
    class. The interval is then the score interval of Newcombe (Stat. Med. 2006, method 5), which
    takes its variance from AUC and class sizes alone. It is cautious: a perfect ranking can have
    a lower bound below that of a nearly perfect one.

    Raises MetricError for bad arrays, OneClassError when the AUC is undefined.
    """
    positive, scores = _checked(labels, scores, both_classes=True)
    return _delong_interval(*_placements(positive, scores))


def mean_auc_interval(labels, scores):
    """Mean AUC over several findings of the same exams, an Interval.

    Each finding's own limits (`auc_interval`'s, which hold with few positives and at AUC 1) are
    put together by the correlation of the AUCs: the mean is below its estimate by d'Rd under the
    square root, over the number of findings, where d are the distances of the lower limits and R
    the correlations from DeLong's covariance (MOVER: Zou & Donner, Stat. Med. 2008). Exams are
    shared, so findings that err on the same ones widen the interval. A correlation that cannot be
    estimated, of a finding without a variance, is taken as 1.

    Args:
        labels: (n, findings), 0 or 1, NaN where unknown.
        scores: (n, findings), NaN where there is no answer.

    Raises MetricError for bad arrays, OneClassError when the AUC of a finding is undefined.
    """
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    if labels.shape != scores.shape or labels.ndim != 2 or not labels.shape[1]:
        raise MetricError(f"labels {labels.shape} and scores {scores.shape} are not (n, findings)")
    known = ~(np.isnan(labels) | np.isnan(scores))
    influences, intervals = np.zeros(labels.shape), []
    for k, rows in enumerate(known.T):
        positive, of_finding = _checked(labels[rows, k], scores[rows, k], both_classes=True)
        placements = _placements(positive, of_finding)
        intervals.append(_delong_interval(*placements))
        rows = np.flatnonzero(rows)
        influences[rows[positive], k], influences[rows[~positive], k] = _influences(*placements)
    deviations = np.linalg.norm(influences, axis=0)
    scale = np.outer(deviations, deviations)
    unknown = np.ones(scale.shape)
    correlation = np.divide(influences.T @ influences, scale, out=unknown, where=scale > 0)
    value, low, high = np.array(intervals).T
    below, above = (
        math.sqrt(max(distance @ correlation @ distance, 0.0)) / len(intervals)  # but for rounding
        for distance in (value - low, high - value)
    )
    mean = float(value.mean())
    return Interval(mean, max(mean - below, 0.0), min(mean + above, 1.0))


def auc_difference(labels, scores_a, scores_b):
    """AUC of a minus AUC of b on the same exams: DeLong's paired test (Biometrics 1988).

    The `mean_auc_difference` of one run each.
    """
    return mean_auc_difference(labels, [scores_a], [scores_b])


def mean_auc_difference(labels, runs_a, runs_b):
    """Mean AUC of some runs a minus that of as many runs b, run by run on the same exams.

    A run is a training with a seed and folds of its own. DeLong's variance of the mean over the
    runs is that of its placements' means, and covers the exams. What other seeds would change is
    the differences' sample variance over the runs divided by their number, added: cautious, because
    a part of it is in DeLong's variance already. As a few seeds say little about their own spread,
    the quantile is Student's with Hillis's degrees of freedom: the runs are the readers of a study
    of several readers and cases (Obuchowski & Rockette, Commun. Stat. Simul. Comput. 1995; Hillis,
    Stat. Med. 2007). Where runs spread twice as much as exams, a test at 0.05 still rejects in 0.11
    with two runs, 0.08 with three: take three. One run says nothing about other seeds.

    Scores that rank the exams alike give difference 0 and p 1. Where DeLong's variance of
    the difference is 0 although the rankings differ (two perfect models), or undefined (one exam in
    a class), the interval and p come from the two AUCs' own intervals, combined as if independent
    (Newcombe, Stat. Med. 1998, method 10; Zou & Donner, Stat. Med. 2008).

    Args:
        runs_a, runs_b: scores (runs, n).

    Raises MetricError for bad arrays, OneClassError when the AUC is undefined.
    """
    positive, *scores = _checked(labels, *runs_a, *runs_b, both_classes=True)
    count = len(runs_a)
    scores = scores[:count], scores[count:]
    placements = [[_placements(positive, one) for one in runs] for runs in scores]
    a, b = ([sum(side) for side in zip(*runs, strict=True)] for runs in placements)  # exact
    variance = _delong_variance(a[0] - b[0], a[1] - b[1]) / count**2
    a, b = ([side / count for side in both] for both in (a, b))
    difference = _mean_auc(*a) - _mean_auc(*b)
    below = above = math.sqrt(variance)
    if variance == 0 and not all(
        np.array_equal(rankdata(x), rankdata(y)) for x, y in zip(*scores, strict=True)
    ):
        quantile = float(norm.ppf((1 + LEVEL) / 2))
        below, above = (side / quantile for side in _independent_distances(a, b))
    each = [_mean_auc(*x) - _mean_auc(*y) for x, y in zip(*placements, strict=True)]
    of_runs = float(np.var(each, ddof=1)) / count if count > 1 else 0.0
    below, above = (_with_runs(side**2, of_runs, count) for side in (below, above))
    low, high = (
        error * float(student.isf((1 - LEVEL) / 2, free)) for error, free in (below, above)
    )
    error, free = below if difference > 0 else above  # the side where 0 lies
    p = float(2 * student.sf(abs(difference) / error, free)) if error else 1.0
    return Difference(difference, max(difference - low, -1.0), min(difference + high, 1.0), p)


def _with_runs(of_exams, of_runs, count):
    """Standard error of the sum of two variances, one of exams, taken as known, and one estimated
    from `count` runs; and its degrees of freedom."""
    total = of_exams + of_runs
    if of_runs <= ROUNDING * total:
        return math.sqrt(total), math.inf
    return math.sqrt(total), (count - 1) * (total / of_runs) ** 2


def holm(p_values):
    """p values adjusted for their number, in their order (Holm, Scand. J. Stat. 1979): array."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted[np.argsort(order)]


def wilson_interval(successes, n, level=LEVEL):
    """A proportion with Wilson's interval (JASA 1927), from scipy; n at least 1."""
    if n < 1 or not 0 <= successes <= n:
        raise MetricError(f"no proportion: {successes} successes of {n}")
    low, high = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    value = successes / n
    # scipy's bounds at 0 and n of n can miss the estimate by a rounding error
    return Interval(float(value), float(min(low, value)), float(max(high, value)))


def operating_point(labels, scores, threshold):
    """Sensitivity, specificity and accuracy with Wilson intervals; positive is score >= threshold.

    Raises MetricError for bad arrays or arguments, OneClassError when one of them is undefined.
    """
    positive, scores = _checked(labels, scores, both_classes=True)
    if not math.isfinite(threshold):
        raise MetricError(f"the threshold must be a finite number, not {threshold}")
    called = scores >= threshold
    tp, fn = int((called & positive).sum()), int((~called & positive).sum())
    fp, tn = int((called & ~positive).sum()), int((~called & ~positive).sum())
    return OperatingPoint(
        float(threshold),
        wilson_interval(tp, tp + fn),
        wilson_interval(tn, tn + fp),
        wilson_interval(tp + tn, len(scores)),
        tp,
        fp,
        tn,
        fn,
    )


def choose_threshold(labels, probabilities, sensitivity=None):
    """A threshold for operating_point: a probability midway between two neighbouring ones that were
    predicted, so that another run's rounding moves no exam to the other side; half of the lowest
    where all are positive.

    **Never choose it on the exams it is reported on**: that makes both look better than they are.

    Args:
        probabilities: (n,), 0 to 1.
        sensitivity: the highest threshold that reaches it, and so the best specificity that goes
            with it; None for the largest sensitivity + specificity (Youden, Cancer 1950), of equals
            the one with more sensitivity.

    Raises MetricError for bad arrays or arguments, OneClassError when the ROC is undefined.
    """
    positive, scores = _checked(labels, probabilities, both_classes=True, probability=True)
    # Each distinct score from the highest down; before them is infinity, which calls none positive.
    fpr, tpr, thresholds = (
        values[1:] for values in roc_curve(positive, scores, drop_intermediate=False)
    )
    if sensitivity is None:
        gain = tpr - fpr
        chosen = np.flatnonzero(np.isclose(gain, gain.max(), rtol=0, atol=1e-12))[-1]
    elif 0 < sensitivity <= 1:
        chosen = np.flatnonzero(tpr >= sensitivity - 1e-12)[0]  # 19 of 20 is 0.95, rounded or not
    else:
        raise MetricError(f"a wanted sensitivity is in (0, 1], not {sensitivity}")
    score, below = [*thresholds, 0.0][chosen : chosen + 2]
    middle = (score + below) / 2
    return float(middle if middle > below else score)  # nothing lies between neighbouring floats


def brier(labels, probabilities):
    """Mean squared error of the probabilities, 0 is best (Brier 1950); scikit-learn's.

    Raises MetricError for bad arrays; defined for one class too.
    """
    positive, probabilities = _checked(labels, probabilities, probability=True)
    return float(brier_score_loss(positive, probabilities, pos_label=True))


def average_precision(labels, scores):
    """Area under the precision-recall steps, scikit-learn's; chance is the prevalence.

    Raises MetricError for bad arrays, OneClassError when all labels are the same.
    """
    positive, scores = _checked(labels, scores, both_classes=True)
    return float(average_precision_score(positive, scores))


def calibration_curve(labels, probabilities, bins=ECE_BINS):
    """The points of a reliability diagram, with what scikit-learn's leaves out: counts, intervals.

    Bins are equally wide, each without its lower edge (0 belongs to the first), as in Guo et al.
    (ICML 2017) and scikit-learn; empty ones are left out.

    Raises MetricError for bad arrays or arguments; defined for one class too.
    """
    positive, probabilities = _checked(labels, probabilities, probability=True)
    if bins < 1:
        raise MetricError(f"at least one bin is needed, not {bins}")
    edges = np.linspace(0, 1, bins + 1)
    index = np.searchsorted(edges[1:-1], probabilities)  # (n,), 0 to bins - 1
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    count = count[filled]
    predicted = np.bincount(index, probabilities, minlength=bins)[filled] / count
    positives = np.bincount(index, positive, minlength=bins)[filled]
    observed, low, high = np.array(
        [wilson_interval(k, n) for k, n in zip(positives, count, strict=True)]
    ).T
    return Calibration(predicted, observed, low, high, count)


def expected_calibration_error(labels, probabilities, bins=ECE_BINS):
    """Mean distance of predicted and observed frequency over equal-width bins, weighted by count.

    Naeini et al. (AAAI 2015), Guo et al. (ICML 2017). In [0, 1], 0 is best. It depends on the
    number of bins, and with 120 exams even a calibrated model has some hundredths.

    Raises MetricError for bad arrays or arguments; defined for one class too.
    """
    curve = calibration_curve(labels, probabilities, bins)
    return float(np.average(np.abs(curve.predicted - curve.observed), weights=curve.count))


def roc_band(labels, scores, level=LEVEL, resamples=RESAMPLES, seed=0, points=101):
    """The ROC curve at `points` false positive rates from 0 to 1, with a pointwise band: RocBand.

    Each rate's stratified bootstrap variance gives the effective sample size of the sensitivity, at
    most the positives there are; the bounds are Jeffreys' interval for as many (Brown et al.,
    Stat. Sci. 2001; effective size: Korn & Graubard, Surv. Methodol. 1998). Percentiles would
    have no width where the curve touches 1.

    Raises MetricError for bad arrays or arguments, OneClassError when the ROC is undefined.
    """
    positive, scores = _checked(labels, scores, both_classes=True)
    grid = np.linspace(0, 1, points)
    # np.interp takes the last of equal abscissas: the top of a vertical step
    tpr = np.interp(grid, *roc_curve(positive, scores, drop_intermediate=False)[:2])
    exams = positive.sum()
    rows = []
    for positives, negatives in _resampled_counts(positive, scores, resamples, seed):
        hits = np.pad(positives[:, ::-1].cumsum(axis=1) / exams, ((0, 0), (1, 0)))
        alarms = np.pad(negatives[:, ::-1].cumsum(axis=1) / (~positive).sum(), ((0, 0), (1, 0)))
        rows += [np.interp(grid, *row) for row in zip(alarms, hits, strict=True)]
    mean, variance = np.mean(rows, axis=0), np.var(rows, axis=0)
    worth = np.full(points, float(exams))
    np.divide(mean * (1 - mean), variance, out=worth, where=variance > 0)
    worth = np.minimum(worth, exams)
    low, high = beta.interval(level, tpr * worth + 0.5, (1 - tpr) * worth + 0.5)
    low[grid == 1] = 1.0  # all called positive: certain
    return RocBand(grid, tpr, np.minimum(low, tpr), np.maximum(high, tpr))


def summary(labels, probabilities, threshold):
    """All metrics in one flat dict of plain ints and floats, ready for JSON.

    Raises MetricError for bad arrays or arguments, OneClassError when all labels are the same.
    """
    point = operating_point(labels, probabilities, threshold)
    report = {"n": point.tp + point.fp + point.tn + point.fn, "positives": point.tp + point.fn}
    intervals = {
        "auc": auc_interval(labels, probabilities),
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
        "accuracy": point.accuracy,
    }
    for name, (value, low, high) in intervals.items():
        report |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return report | {
        "threshold": point.threshold,
        "tp": point.tp,
        "fp": point.fp,
        "tn": point.tn,
        "fn": point.fn,
        "average_precision": average_precision(labels, probabilities),
        "brier": brier(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
    }


def _checked(labels, *scores, both_classes=False, probability=False):
    """labels as bool (n,), each of scores as float64 (n,), or MetricError."""
    try:
        arrays = [np.asarray(values, dtype=np.float64) for values in (labels, *scores)]
    except (TypeError, ValueError) as error:
        raise MetricError(f"labels and predictions must be arrays of numbers: {error}") from None
    for values in arrays:
        if values.ndim == 0 or values.size != len(values):
            raise MetricError(f"one number per exam is needed, not an array of {values.shape}")
    labels, *scores = (values.reshape(-1) for values in arrays)  # (n, 1) -> (n,)
    if not len(labels):
        raise MetricError("no exams: the labels are empty")
    for values in scores:
        if len(values) != len(labels):
            raise MetricError(f"lengths differ: {len(labels)} labels, {len(values)} predictions")
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise MetricError(f"{bad} of {len(values)} predictions are NaN or infinite")
        if probability and (values.min() < 0 or values.max() > 1):
            raise MetricError(
                f"probabilities must be in [0, 1], these reach from {values.min():g}"
                f" to {values.max():g}: did you pass logits?"
            )
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise MetricError(f"labels must be 0 or 1, not {wrong[0]:g}")
    if both_classes and labels.min() == labels.max():
        raise OneClassError(
            "AUC, sensitivity or specificity undefined: only one class, "
            f"all {len(labels)} labels are {labels[0]:g}"
        )
    return labels == 1, *scores


def _placements(positive, scores):
    """For each positive the negatives it beats, (m,); for each negative the positives, (n,).

    Ties count half. A midrank among all exams less that among the own class is the number of the
    other class below: O(N log N) where comparing all pairs is O(m n) (Sun & Xu 2014).
    """
    ranks = rankdata(scores)
    beaten = ranks[positive] - rankdata(scores[positive])
    beating = positive.sum() - (ranks[~positive] - rankdata(scores[~positive]))
    return beaten, beating


def _mean_auc(beaten, beating):
    return float(beaten.mean() / len(beating))


def _delong_variance(beaten, beating):
    """DeLong's variance from placements or their differences; 0.0 where it is undefined.

    Placements are multiples of 1/2 and so exact: no rounding hides a variance of 0.
    """
    m, n = len(beaten), len(beating)
    if min(m, n) < 2:
        return 0.0
    return float(beaten.var(ddof=1) / (m * n**2) + beating.var(ddof=1) / (n * m**2))


def _influences(beaten, beating):
    """What each positive, (m,), and each negative, (n,), adds to an AUC's deviation: the sum of
    their squares is DeLong's variance; 0 where that is undefined."""
    m, n = len(beaten), len(beating)
    if min(m, n) < 2:
        return np.zeros(m), np.zeros(n)
    of_positives = (beaten - beaten.mean()) / (n * math.sqrt(m * (m - 1)))
    return of_positives, (beating - beating.mean()) / (m * math.sqrt(n * (n - 1)))


def _delong_interval(beaten, beating):
    """auc_interval, from _placements."""
    m, n = len(beaten), len(beating)
    auc = _mean_auc(beaten, beating)
    variance = _delong_variance(beaten, beating)
    if variance == 0:
        quantile = norm.ppf((1 + LEVEL) / 2)
        return Interval(
            auc, _newcombe_low(auc, m, n, quantile), 1 - _newcombe_low(1 - auc, m, n, quantile)
        )
    width = student.ppf((1 + LEVEL) / 2, min(m, n) - 1) * math.sqrt(variance) / (auc * (1 - auc))
    return Interval(auc, float(expit(logit(auc) - width)), float(expit(logit(auc) + width)))


def _independent_distances(a, b):
    """From a difference of AUCs, of pairs of _placements, to its limits as if independent."""
    auc_a, low_a, high_a = _delong_interval(*a)
    auc_b, low_b, high_b = _delong_interval(*b)
    return math.hypot(auc_a - low_a, high_b - auc_b), math.hypot(high_a - auc_a, auc_b - low_b)


def _newcombe_low(auc, m, n, quantile):
    """Lower bound of Newcombe's method 5 (Stat. Med. 2006); 1 - that of 1 - auc is the upper."""
    if auc == 0:
        return 0.0
    star = (m + n) / 2 - 1

    def excess(true):  # > 0 where `true` is further from auc than the quantile allows
        variance = (
            true
            * (1 - true)
            / (m * n)
            * (1 + star * (1 - true) / (2 - true) + star * true / (1 + true))
        )
        return (auc - true) ** 2 - quantile**2 * variance

    # the upper end stays clear of auc = 1, which is itself a root
    return float(brentq(excess, 0.0, auc * (1 - 1e-12)))


def _resampled_counts(positive, scores, resamples, seed):
    """Stratified bootstrap: yields counts of positives and negatives, each (r, k), in chunks.

    Column j counts the exams drawn with the j-th lowest of the k distinct scores, which is all
    that AUC and ROC curve depend on.
    """
    if resamples < 1:
        raise MetricError(f"at least one resample is needed, not {resamples}")
    rng = np.random.default_rng(seed)
    distinct, place = np.unique(scores, return_inverse=True)
    k = len(distinct)
    step = max(1, CHUNK // len(scores))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        counts = []
        for places in (place[positive], place[~positive]):
            drawn = places[rng.integers(len(places), size=(rows, len(places)))]
            drawn += k * np.arange(rows)[:, None]  # each resample its own columns
            counts.append(np.bincount(drawn.ravel(), minlength=rows * k).reshape(rows, k))
        yield counts


def metrics_of(names, labels, logits, losses):
    """{finding: {"loss", "auc"}} over the exams whose label is known, NaN without any; arrays
    float32 (n, tasks).

    The AUC of one class is NaN: a few tuning exams may lose their only positive one to a plane that
    it lacks, and the loss selects the epoch.
    """
    metrics = {}
    for t, task in enumerate(names):
        known = ~np.isnan(labels[:, t])
        positive = is_positive(labels[known, t])
        auc = roc_auc(positive, logits[known, t]) if len(set(positive)) == 2 else float("nan")
        loss = float(losses[known, t].mean()) if known.any() else float("nan")
        metrics[task] = {"loss": loss, "auc": auc}
    return metrics


def mean_of(metrics):
    """The mean over findings: {finding: {"loss", "auc"}} -> {"loss", "auc"}, of those that are
    defined; NaN where none is."""
    found = {name: np.array([one[name] for one in metrics.values()]) for name in ("loss", "auc")}
    known = {name: values[~np.isnan(values)] for name, values in found.items()}
    return {name: float(x.mean()) if len(x) else float("nan") for name, x in known.items()}


def sigmoid(logits):
    """Probabilities of logits, float64."""
    return expit(np.asarray(logits, np.float64))
