"""What a person should look at: worth a label next, labels that look wrong, and what is unlike all labeled samples."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from ups_fast import review
from ups_fast.review import LEAST, next_to_label, suspects, suspicion, unfamiliar


def fit(x, y):
    return LogisticRegression(C=0.01, max_iter=500).fit(x, y)


@pytest.mark.parametrize(("load", "per_class"), [(load_digits, 4), (load_wine, 2)])
def test_ten_labels_so_chosen_gain_more_than_ten_at_random(load, per_class):
    """Logistic regression on the other samples, mean of seeds 0 to 4, and of four random draws each."""
    x, truth = load(return_X_y=True)
    x, n = StandardScaler().fit_transform(x), len(truth)
    chosen, random = [], []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        classes = range(truth.max() + 1)
        labeled = np.concatenate([draw.permutation(np.flatnonzero(truth == c))[:per_class] for c in classes])
        rest = np.setdiff1d(np.arange(n), labeled)

        def gain(more, labeled=labeled, rest=rest):
            seen, hidden = np.concatenate([labeled, rest[more]]), np.delete(rest, more)
            return fit(x[seen], truth[seen]).score(x[hidden], truth[hidden])

        p = fit(x[labeled], truth[labeled]).predict_proba(x[rest])
        chosen.append(gain(next_to_label(x[rest], p, 10).place))
        random += [gain(draw.choice(len(rest), 10, replace=False)) for _ in range(4)]
    assert np.mean(chosen) > np.mean(random) + 0.01


def test_the_picks_are_uncertain_and_apart():
    draw = np.random.default_rng(0)
    centers = 20 * np.eye(5)
    x = np.concatenate([centers[i % 5] + draw.normal(size=(1, 5)) for i in range(1000)])
    p = np.full((1000, 3), 0.001)
    p[:, 0], p[:, 1] = 0.99, 0.009
    p[:500, 0], p[:500, 1] = 0.5, 0.499  # the first half is uncertain
    found = next_to_label(x, p, 5)
    assert (found.place < 500).all() and sorted(found.place % 5) == [0, 1, 2, 3, 4], "one of each group"
    assert (np.diff(found.margin) >= 0).all()
    assert (found.first == 0).all() and (found.second == 1).all()


def test_few_equal_and_unknown_samples():
    x, p = np.zeros((3, 2)), np.full((3, 2), 0.5)
    assert 1 <= len(next_to_label(x, p, 10).place) <= 3
    p[1] = np.nan  # no answer
    assert 1 not in next_to_label(x, p, 10).place
    assert len(next_to_label(x[:0], p[:0], 10).place) == 0
    draw = np.random.default_rng(0)
    many = next_to_label(draw.normal(size=(5000, 3)), draw.dirichlet([1, 1], 5000), LEAST)
    assert len(set(many.place.tolist())) == len(many.place) > LEAST // 2


def test_wrong_labels_are_suspected_first():
    x, truth = load_digits(return_X_y=True)
    x, labels = x[:400], truth[:400].copy()
    wrong = np.random.default_rng(0).choice(400, 20, replace=False)
    labels[wrong] = (labels[wrong] + 3) % 10
    found = suspects(x, labels)
    assert np.isin(found.place[:20], wrong).mean() > 0.7
    assert (found.given != found.likely).all() and (found.p_likely >= found.p_given).all()
    assert np.isin(found.likely[:10], truth).all()
    assert (found.likely[:10] == truth[found.place[:10]]).mean() > 0.7


def test_classes_of_one_sample_are_not_judged():
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.normal(size=(10, 4)), 9 + draw.normal(size=(10, 4)), np.full((1, 4), 30.0)])
    labels = np.array([0] * 10 + [1] * 10 + [2])
    assert 20 not in suspects(x, labels).place
    assert len(suspects(x[:11], np.array([0] * 10 + [1])).place) == 0, "one class alone tells nothing"
    assert (suspicion(x, labels).p_given[:20] > 0.5).all()


# Unlike all labeled samples ---------------------------------------------------------------------------------


def test_the_example_runs():
    assert doctest.testmod(review) == doctest.TestResults(0, 2)


@pytest.mark.parametrize(("n_labeled", "n", "d"), [(2, 1, 1), (3, 7, 5), (40, 300, 33)])
def test_unfamiliar_is_the_ratio_that_it_says(n_labeled, n, d, monkeypatch):
    """Against all distances, one by one, in float64."""
    monkeypatch.setattr(review, "MOST", 64)  # several parts
    draw = np.random.default_rng(d)
    scale, shift = 10.0 ** draw.integers(-3, 4, d), draw.normal(size=d)
    labeled, x = (draw.normal(size=(k, d)) * scale + shift for k in (n_labeled, n))
    found = unfamiliar(labeled.astype(np.float32), x.astype(np.float32))
    both = np.concatenate([labeled, x[:: 1 + n // 64]])
    a, b = ((each - both.mean(0)) / both.std(0) for each in (labeled, x))
    among = np.linalg.norm(a[:, None] - a[None], axis=2)
    np.fill_diagonal(among, np.inf)
    apart = np.linalg.norm(b[:, None] - a[None], axis=2)
    np.testing.assert_allclose(found.ratio, apart.min(1) / np.quantile(among.min(1), 0.95), rtol=1e-3)
    assert (found.nearest == apart.argmin(1)).all()


def test_foreign_samples_are_unfamiliar_and_others_are_not():
    x, truth = load_digits(return_X_y=True)
    order = np.random.default_rng(1).permutation(len(x))  # the data set is sorted by writers
    x, truth = x[order], truth[order]
    labeled, rest = x[:100], x[100:]
    found = unfamiliar(labeled, rest)
    assert 0.01 < (found.ratio > 1).mean() < 0.25, "about as many as of the labeled"
    assert (truth[:100][found.nearest] == truth[100:]).mean() > 0.75
    noise = np.random.default_rng(0).uniform(0, 16, (50, 64))
    foreign = unfamiliar(labeled, np.concatenate([rest, noise, 16 - rest[:50]])).ratio
    assert (foreign[-100:] > 1).all() and foreign[-100:].min() > np.quantile(foreign[:-100], 0.99)


def test_where_nothing_is_known_nothing_is_unfamiliar(monkeypatch):
    x = np.random.default_rng(0).normal(size=(6, 3))
    bad = x.copy()
    bad[1, 2], bad[4, 0] = np.nan, np.inf
    found = unfamiliar(bad, bad)
    assert np.isnan(found.ratio[[1, 4]]).all() and (found.nearest[[1, 4]] == -1).all()
    good = [0, 2, 3, 5]
    assert (found.ratio[good] < 1e-3).all() and found.nearest[good].tolist() == good
    for few in (x[:0], x[:1], np.full((5, 3), 7.0), bad[[1, 4]]):
        found = unfamiliar(few, x)
        assert np.isnan(found.ratio).all() and (found.nearest == -1).all()
    assert len(unfamiliar(x, x[:0]).ratio) == 0
    monkeypatch.setattr(review, "PRODUCTS", 3 * 18)
    some = unfamiliar(x, x).nearest
    assert len(set(some)) == 3, "a part of the labeled"


def test_many_labeled_samples_take_seconds_however_few_are_not(monkeypatch):
    """All are compared with each other, too."""
    monkeypatch.setattr(review, "PRODUCTS", 5 * 400)
    seen, fit = [], NearestNeighbors.fit
    monkeypatch.setattr(NearestNeighbors, "fit", lambda self, x: (seen.append(len(x)), fit(self, x))[1])
    x = np.random.default_rng(0).normal(size=(50, 5))
    for n in (1, 20, 40):
        unfamiliar(x, x[:n])
    assert seen == [20, 20, 10]
