"""Few labels and many features: `python examples/features.py`. A minute or less.

The features here are the 64 pixels of scikit-learn's digits. Yours may come from any pretrained network:

    import timm, torch
    network = timm.create_model("resnet50", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        features = network(images)  # float32 [n, 2048]
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading

from ups_fast import UPSClassifier


def main() -> None:
    digits = load_digits()
    X, truth = digits.data, digits.target
    given = np.concatenate([np.flatnonzero(truth == c)[:4] for c in range(10)])
    y = np.full(len(truth), -1)  # -1: no label
    y[given] = truth[given]
    hidden = y < 0

    alone = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(X[given], y[given])
    print(f"logistic regression on {len(given)} labels: {alone.score(X[hidden], truth[hidden]):.3f} right")
    spread = LabelSpreading(kernel="knn", n_neighbors=7).fit(X, y)
    print(f"label spreading: {(spread.transduction_ == truth)[hidden].mean():.3f} right")

    model = UPSClassifier(random_state=0, n_jobs=1).fit(X, y)
    right = model.transduction_ == truth
    trusted = model.positive_ & hidden
    print(f"UPS: {right[hidden].mean():.3f} right")
    print(f"of {trusted.sum():,} labels that it trusts: {right[trusted].mean():.3f} right")


if __name__ == "__main__":
    main()
