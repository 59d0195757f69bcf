"""From texts to features to labels: `python examples/text.py`. A minute or less, nothing is downloaded.

The texts are the docstrings of six modules of Python's standard library. Which module is a docstring from? The module's
name is taken out. Ten docstrings of each module have a label, about 1,100 have none.

UPS does not win here: logistic regression on the same features labels as many of them rightly, and knows better which
of its labels are right. So look at a simple rival, too. The report of a run does.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from ups_fast import UPSClassifier

MODULES = ("asyncio", "email", "logging", "turtle", "unittest", "_pydecimal")
LABELS = 10  # of each module


def docstrings(module: str) -> Iterator[str]:
    """Of its files, which are parsed and not imported; those of eight words or more."""
    place, name = Path(sysconfig.get_path("stdlib")) / module, module.removeprefix("_py")
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 8:
                    yield re.sub(rf"{name}\w*", " ", text, flags=re.IGNORECASE)


def features_of(texts: list[str]) -> np.ndarray:
    """float [n, 20]: counts of words, of which the 20 main directions are kept."""
    # An embedding knows what words mean, and needs its weights from the internet. It would go here:
    #     from sentence_transformers import SentenceTransformer
    #     return SentenceTransformer("all-MiniLM-L6-v2").encode(texts)  # float32 [n, 384]
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english", min_df=2)
    return make_pipeline(words, TruncatedSVD(20, random_state=0), Normalizer()).fit_transform(texts)


def main() -> None:
    found = [sorted(set(docstrings(module))) for module in MODULES]
    X = features_of([text for texts in found for text in texts])
    truth = np.repeat(MODULES, [len(texts) for texts in found])
    order = np.random.default_rng(0).permutation(len(truth))
    given = np.concatenate([order[truth[order] == module][:LABELS] for module in MODULES])
    y = np.full(len(truth), -1, dtype=object)  # -1: no label
    y[given] = truth[given]
    hidden = np.setdiff1d(order, given)

    model = UPSClassifier(dropout=0.3, rounds=3, steps=100, random_state=0, n_jobs=1).fit(X, y)
    right = (model.transduction_ == truth)[hidden]
    trusted = model.positive_[hidden]
    print(f"UPS: {right.mean():.3f} of {len(hidden):,} right")
    print(f"of {trusted.sum()} labels that it trusts: {right[trusted].mean():.3f} right")

    alone = LogisticRegression(C=10, max_iter=1000).fit(X[given], truth[given])
    p = alone.predict_proba(X[hidden])
    right = alone.classes_[p.argmax(1)] == truth[hidden]
    surest = np.argsort(-p.max(1))[: trusted.sum()]
    print(f"logistic regression on the same {len(given)} labels: {right.mean():.3f} right")
    print(f"of as many labels that it is most sure of: {right[surest].mean():.3f} right")


if __name__ == "__main__":
    main()
