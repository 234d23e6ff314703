"""Areas under curves and correlations, with ties, against scikit-learn and scipy where they are there."""

import numpy as np
import pytest

from jaxlab.icl.ranking import auc, correlation, one_vs_one, one_vs_rest

RNG = np.random.default_rng(0)


def test_by_hand():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert auc(np.array([1.0, 1.0, 1.0]), np.array([True, False, False])) == 0.5
    assert np.isnan(auc(np.array([1.0, 2.0]), np.array([True, True])))
    assert np.isnan(auc(np.array([1.0, np.nan]), np.array([True, False])))
    assert np.isnan(one_vs_rest(np.ones((3, 2)), np.zeros(3, int)))
    assert np.isnan(one_vs_one(np.ones((3, 2)), np.full(3, -1)))
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 60.0]), ranks=True) == 1.0
    assert np.isnan(correlation(np.array([1.0, 2.0, np.nan]), np.array([1.0, 2.0, 3.0])))
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))


@pytest.mark.parametrize("labels", [2, 4])
def test_against_scikit_learn(labels):
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    scores = np.round(RNG.random((60, labels)), 1) + 0.05  # rounded: many ties
    classes = RNG.integers(0, labels, 60)
    for label in range(labels):
        expected = metrics.roc_auc_score(classes == label, scores[:, label])
        assert auc(scores[:, label], classes == label) == pytest.approx(expected, rel=1e-12)
    share = scores / scores.sum(1, keepdims=True)
    if labels > 2:
        expected = metrics.roc_auc_score(classes, share, multi_class="ovr")
        assert one_vs_rest(share, classes) == pytest.approx(expected, rel=1e-12)
        expected = metrics.roc_auc_score(classes, share, multi_class="ovo")
        assert one_vs_one(scores, classes) == pytest.approx(expected, rel=1e-12)
    else:
        assert one_vs_one(scores, classes) == auc(scores[:, 1], classes == 1)
    x, y = scores[:, 0], scores[:, 1]
    assert correlation(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert correlation(x, y, ranks=True) == pytest.approx(stats.spearmanr(x, y).statistic)
    # A class of -1 is none.
    out = np.where(RNG.random(60) < 0.3, -1, classes)
    kept = out >= 0
    assert one_vs_rest(scores, out) == one_vs_rest(scores[kept], out[kept])
