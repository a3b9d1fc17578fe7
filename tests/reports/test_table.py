"""The table of all findings, its means, and the two origins of labels."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from mrnet.errors import InputError
from mrnet.evaluation.metrics import MetricError, OneClassError, auc_interval, mean_auc_interval
from mrnet.layout.description import read_own_labels
from mrnet.reports.table import DERIVED, OWN, markdown
from mrnet.stacking.results import Results


def some(n=300, findings=3, shared=0.0, seed=0):
    """Labels and scores (n, findings); `shared` is what the findings' scores have in common."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 1))
    noise = shared * common + (1 - shared**2) ** 0.5 * rng.normal(size=(n, findings))
    labels = (rng.random((n, findings)) < 0.4).astype(float)
    return labels, labels + noise


def test_of_one_finding_it_is_delongs():
    labels, scores = some(400, 1)
    assert mean_auc_interval(labels, scores) == pytest.approx(
        auc_interval(labels[:, 0], scores[:, 0])
    )


@pytest.mark.whole
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_with_many_exams_it_is_the_bootstraps(shared):
    """Exams drawn with all their findings: what no formula about correlations went into."""
    labels, scores = some(400, 3, shared, seed=5)
    labels[::7, 1] = np.nan
    means, rng = [], np.random.default_rng(2)
    for _ in range(600):
        drawn = rng.integers(400, size=400)
        pairs = [(labels[drawn, k], scores[drawn, k]) for k in range(3)]
        means.append(np.mean([roc_auc_score(y[~np.isnan(y)], s[~np.isnan(y)]) for y, s in pairs]))
    _, low, high = mean_auc_interval(labels, scores)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.006)


def test_the_mean_of_independent_findings_has_the_width_of_a_mean():
    """Three findings of disjoint exams are independent: their limits add up as squares do."""
    labels, scores = some(900, 3)
    for k in range(3):
        labels[[i for i in range(900) if i % 3 != k], k] = np.nan
    value, low, high = mean_auc_interval(labels, scores)
    alone = [auc_interval(labels[k::3, k], scores[k::3, k]) for k in range(3)]
    assert value == pytest.approx(np.mean([one.value for one in alone]))
    below = np.sqrt(sum((one.value - one.low) ** 2 for one in alone)) / 3
    above = np.sqrt(sum((one.high - one.value) ** 2 for one in alone)) / 3
    assert (value - low, high - value) == pytest.approx((below, above))


def test_findings_that_are_the_same_are_no_more_certain_than_one():
    labels, scores = some(60, 1)
    three = mean_auc_interval(np.repeat(labels, 3, axis=1), np.repeat(scores, 3, axis=1))
    assert three == pytest.approx(auc_interval(labels[:, 0], scores[:, 0]))


def test_the_interval_of_few_positives_covers():
    """95 % of intervals hold the true mean; the bootstrap's percentiles had 90 % here."""
    rng, findings, inside = np.random.default_rng(0), 3, 0
    distance = norm.ppf(0.9) * 2**0.5  # AUC 0.9 of two normal distributions
    for _ in range(200):
        labels = np.zeros((60, findings))
        for k in range(findings):
            labels[rng.permutation(60)[:6], k] = 1
        _, low, high = mean_auc_interval(labels, rng.normal(size=labels.shape) + distance * labels)
        inside += low <= 0.9 <= high
    assert inside / 200 > 0.93


def test_what_findings_share_widens_the_interval():
    widths = []
    for shared in (0.0, 0.95):
        rng = np.random.default_rng(1)
        labels, _ = some(300, 1, seed=1)
        labels = np.repeat(labels, 3, axis=1)
        noise = shared * rng.normal(size=(300, 1))
        scores = labels + noise + (1 - shared**2) ** 0.5 * rng.normal(size=(300, 3))
        _, low, high = mean_auc_interval(labels, scores)
        widths.append(high - low)
    assert widths[1] > 1.25 * widths[0]


def test_a_perfect_ranking_is_not_certain():
    labels = np.array([[1.0, 0], [1, 1], [1, 1], *[[0, 0]] * 9])
    perfect = labels + np.linspace(0, 0.5, 12)[:, None]
    value, low, high = mean_auc_interval(labels, perfect)
    alone = [auc_interval(labels[:, k], perfect[:, k]) for k in range(2)]
    assert value == high == 1
    assert low == pytest.approx(np.mean([one.low for one in alone])) and low < 0.7
    tied = mean_auc_interval(labels[:, :1], np.zeros((12, 1)))
    assert tied == pytest.approx(auc_interval(labels[:, 0], np.zeros(12))) and tied.value == 0.5


def test_what_cannot_be_measured_is_refused():
    labels, scores = some(20, 2)
    with pytest.raises(MetricError, match="findings"):
        mean_auc_interval(labels[:, 0], scores[:, 0])
    labels[:, 1] = 0
    with pytest.raises(OneClassError):
        mean_auc_interval(labels, scores)


def results_of(task, ids, labels, scores):
    rows = {name: {"auc": 0.5} for name in scores}
    content = {"task": task, "protocol": "held-out", "folds": 3, "valid": rows}
    return Results(Path(), task, content, ids, labels, ids, labels, scores, scores, {}, [])


@pytest.fixture
def found():
    labels, scores = some(60, 2)
    ids = [str(i) for i in range(60)]
    one = {"axial": scores[:, 0].copy(), "stack": scores[:, 0] + 0.5 * labels[:, 0]}
    one["axial"][7] = np.nan  # no axial volume
    two = {"axial": scores[10:, 1], "stack": scores[10:, 1]}
    return [
        results_of("acl", ids, labels[:, 0], one),
        results_of("effusion", ids[10:], labels[10:, 1], two),
    ]


def cells(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_table_of_two_findings(found):
    table, means = markdown(found)
    head, _, counts, axial, stack, *published = cells(table)
    assert head == ["who", "protocol", "acl", "effusion", "mean of 2"]
    positive = [int(one.labels.sum()) for one in found]
    assert counts[2:4] == [f"60 ({positive[0]})", f"50 ({positive[1]})"]
    known = np.arange(60) != 7
    auc = roc_auc_score(found[0].labels[known], found[0].scores["axial"][known])
    assert axial[:2] == ["ours, axial", "held-out, folds 3"] and axial[2].startswith(f"{auc:.3f} [")
    aucs = [roc_auc_score(one.labels, one.scores["stack"]) for one in found]
    assert stack[4].startswith(f"{np.mean(aucs):.3f} [")
    assert means["all"]["stack"]["value"] == pytest.approx(np.mean(aucs))
    assert means["all"]["stack"]["findings"] == 2 and means["all"]["stack"]["n"] == 60
    assert "0.965" in [row[2] for row in published]
    alone, _ = markdown(found[:1])
    assert cells(alone)[0] == ["who", "protocol", "acl"]


def test_own_and_derived_labels_are_never_in_one_figure(found):
    own = {"acl": {str(i) for i in range(20)}, "effusion": set()}
    table, means = markdown(found, own)
    rows = {row[0]: row for row in cells(table)}
    assert not {"ours, stack", "exams (positive)"} & rows.keys()
    acl = found[0]
    for title, part in ((OWN, slice(0, 20)), (DERIVED, slice(20, 60))):
        auc = roc_auc_score(acl.labels[part], acl.scores["stack"][part])
        assert rows[f"ours, stack, {title}"][2].startswith(f"{auc:.3f} [")
        count = f"{part.stop - part.start} ({int(acl.labels[part].sum())})"
        assert rows[f"exams (positive), {title}"][2] == count
    assert rows[f"ours, stack, {OWN}"][3] == "-" and means[OWN]["stack"]["findings"] == 1
    assert rows[f"exams (positive), {OWN}"][3] == "0 (0)"
    assert "leaves out the findings" in table


@pytest.mark.parametrize("own", [None, {"acl": {str(i) for i in range(20)}}])
def test_figures_of_fewer_exams_are_noted(found, own):
    """With two origins of labels, too, of which one has no labels of its own."""
    note = "a plane's figures are of the exams that have it"
    assert note in markdown(found[:1], own)[0]
    whole = found[0]._replace(scores=found[0].scores | {"axial": found[0].scores["stack"]})
    assert note not in markdown([whole], own)[0]
    none = {"acl": {str(i) for i in range(60)}}
    assert note in markdown(found[:1], none)[0]


def test_the_file_of_own_labels(tmp_path):
    assert read_own_labels(tmp_path) is None
    (tmp_path / "own-labels.csv").write_text("0007,acl\n7,effusion\n12,acl\n")
    assert read_own_labels(tmp_path) == {"acl": {"7", "12"}, "effusion": {"7"}}
    (tmp_path / "own-labels.csv").write_text("7;acl\n")
    with pytest.raises(InputError, match="own-labels.csv"):
        read_own_labels(tmp_path)
