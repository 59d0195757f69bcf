"""What a person should look at: samples that are worth a label next, given labels that look wrong, and samples that
are unlike all labeled ones.

All work on features, with scikit-learn, in seconds.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

SHARE, LEAST, MOST = (
    4,
    200,
    20_000,
)  # of the samples a quarter are candidates: the least certain, of such numbers
FOLDS = 5
FAMILIAR = 0.95  # of the labeled samples are familiar by definition
PRODUCTS = 10**11  # of numbers in distances: what still takes seconds


@dataclass(frozen=True)
class Next:
    """Samples that are worth a person's label, the most uncertain first."""

    place: np.ndarray  # int64 [k], which of the samples
    margin: (
        np.ndarray
    )  # float64 [k], by how much the first class is more probable than the second, or than not
    first: np.ndarray  # int64 [k], the most probable class; of several labels the least certain one
    second: np.ndarray  # likewise


def next_to_label(
    features: np.ndarray, p: np.ndarray, count: int = 10, seed: int = 0, *, several: bool = False
) -> Next:
    """Picks samples that are uncertain and unlike each other (weighted k-means: Zhdanov, arXiv 1901.05954, 2019).

    The quarter of the samples with the smallest margins is clustered, each sample with the weight 1 - margin. The
    sample nearest to the center of each cluster is picked.

    features  [n, d]
    p         [n, C], probabilities
    several   a sample may be of several classes: its margin is |2 p - 1| of the class that is nearest to 1/2, its
              first, and the next one is its second
    """
    from sklearn.cluster import KMeans

    rows = np.arange(len(p))
    if several:
        order = np.argsort(np.abs(2 * p - 1), axis=1)
        first, second = order[:, 0], order[:, min(1, p.shape[1] - 1)]
        margin = np.abs(2 * p[rows, first] - 1)
    else:
        order = np.argsort(p, axis=1)
        first, second = order[:, -1], order[:, -2]
        margin = p[rows, first] - p[rows, second]
    known = np.flatnonzero(np.isfinite(margin))
    count = min(count, len(known))
    if not count:
        return Next(known, margin[known], first[known], second[known])
    candidates = known[np.argsort(margin[known], kind="stable")]
    candidates = candidates[: min(max(LEAST, len(known) // SHARE), MOST)]
    x = _standardized(features[candidates])
    weight = np.maximum(1 - margin[candidates], 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        clusters = KMeans(count, n_init=1, random_state=seed).fit(x, sample_weight=weight)
    far = np.square(x - clusters.cluster_centers_[clusters.labels_]).sum(1)
    picked = [members[far[members].argmin()] for members in _groups(clusters.labels_)]
    place = candidates[np.array(picked)]
    place = place[np.argsort(margin[place], kind="stable")]
    return Next(place, margin[place], first[place], second[place])


@dataclass(frozen=True)
class Suspects:
    """Given labels that look wrong, the most suspicious first."""

    place: np.ndarray  # int64 [k], which of the labeled samples
    given: np.ndarray  # int64 [k], the label
    likely: np.ndarray  # int64 [k], the class that is more probable
    p_given: np.ndarray  # float64 [k], by a model that has not seen the label
    p_likely: np.ndarray  # likewise


def suspects(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> Suspects:
    """Labels with which models disagree that were trained on the other labels (logistic regression, up to 5 folds).

    Only classes of at least two samples can be judged, and at least two such classes are needed.

    features  [n, d]
    labels    int64 [n]
    """
    score = suspicion(features, labels, seed)
    wrong = np.flatnonzero(score.likely != labels)
    wrong = wrong[np.argsort(-(score.p_likely - score.p_given)[wrong], kind="stable")]
    return Suspects(wrong, labels[wrong], score.likely[wrong], score.p_given[wrong], score.p_likely[wrong])


def suspicion(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> Suspects:
    """The same numbers for every label, in their order."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    classes, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
    usable = counts[code] >= 2
    place = np.arange(len(labels))
    p_given, p_likely, likely = np.ones(len(labels)), np.ones(len(labels)), labels.copy()
    if (counts >= 2).sum() >= 2:
        kept = place[usable]
        folds = StratifiedKFold(min(FOLDS, int(counts[counts >= 2].min())), shuffle=True, random_state=seed)
        model = LogisticRegression(C=0.01, max_iter=500)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            p = cross_val_predict(
                model, _standardized(features[kept]), labels[kept], cv=folds, method="predict_proba"
            )
        known = classes[counts >= 2]
        p_given[kept] = p[np.arange(len(kept)), np.searchsorted(known, labels[kept])]
        p_likely[kept], likely[kept] = p.max(1), known[p.argmax(1)]
    return Suspects(place, labels, likely, p_given, p_likely)


@dataclass(frozen=True)
class Unfamiliar:
    """How far samples are from the nearest labeled one."""

    ratio: (
        np.ndarray
    )  # float64 [n], above 1: farther than labeled samples are from each other; NaN where unknown
    nearest: np.ndarray  # int64 [n], which of the labeled samples it is; -1 where unknown


def unfamiliar(labeled: np.ndarray, features: np.ndarray, seed: int = 0) -> Unfamiliar:
    """Compares the distance to the nearest labeled sample with a threshold that the labeled samples give.

    The threshold is what 95 % of the labeled samples keep, each beside all others: nearest neighbors in the features of
    a network, after Sun et al. (ICML 2022). Distances are Euclidean, with columns standardized over all samples. Their
    scaling of rows to length 1 is left out, so that a row far out in a known direction is unlike the others, too.

    Samples that are not finite are unknown. All are where fewer than two labeled ones are finite, or nearly all of
    these are equal. Of very many labeled samples a random part is compared.

    labeled   [L, d]
    features  [n, d]

    >>> found = unfamiliar(np.array([[0.0], [1.0], [2.0]]), np.array([[1.2], [7.0]]))
    >>> found.ratio.round(1).tolist(), found.nearest.tolist()
    ([0.2, 5.0], [1, 2])
    """
    from sklearn.neighbors import NearestNeighbors

    ratio, nearest = np.full(len(features), np.nan), np.full(len(features), -1)
    known, finite = (np.flatnonzero(np.isfinite(x).all(1)) for x in (labeled, features))
    columns = max(1, features.shape[1])
    most = min(PRODUCTS // (columns * max(1, len(features))), math.isqrt(PRODUCTS // columns))
    if len(known) > (most := max(2, most)):  # among each other, and with all others
        known = np.sort(np.random.default_rng(seed).permutation(known)[:most])
    if len(known) < 2 or not len(finite):
        return Unfamiliar(ratio, nearest)
    seen = features[finite[:: 1 + len(finite) // MOST]]  # of very many samples a part has the same moments
    mean, scale = _moments(np.concatenate([labeled[known], seen]))
    model = NearestNeighbors(n_neighbors=1, algorithm="brute").fit((labeled[known] - mean) / scale)
    threshold = np.quantile(model.kneighbors()[0], FAMILIAR)  # without an argument none is its own neighbor
    if threshold > 0:
        for part in np.array_split(finite, 1 + len(finite) // MOST):
            distance, place = model.kneighbors((features[part] - mean) / scale)
            ratio[part], nearest[part] = distance[:, 0] / threshold, known[place[:, 0]]
    return Unfamiliar(ratio, nearest)


def _standardized(x: np.ndarray) -> np.ndarray:
    mean, scale = _moments(x)
    return (x.astype(np.float32) - mean) / scale


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n, d] -> float32 [d], float32 [d]
    """Mean and standard deviation of each column; 1 where that is 0."""
    x = x.astype(np.float32)
    std = x.std(0)
    return x.mean(0), np.where(std > 0, std, np.float32(1))


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each cluster that is not empty."""
    return [np.flatnonzero(labels == each) for each in np.unique(labels)]
