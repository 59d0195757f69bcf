"""What a person should look at: worth a label next, and labels that look wrong."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ups_fast.review import LEAST, next_to_label, suspects, suspicion


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
