"""UPS on features against scikit-learn, on real data: `python -m benchmarks.features digits animals ...`.

Each fit is a line of results/features.jsonl. A line that is there is not run again, so the command can be stopped.
`--table` prints the tables of docs/results.md from that file, and `--figure` draws its picture. `time` runs all methods
in turn on silhouettes, for their seconds. `doubt` asks of solar cells which labels are worth a second look. Images
become features of EfficientNet-Lite0 with its ImageNet weights, which are computed once and kept in runs/.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

from benchmarks import curves, data, doubt, record
from ups_fast import config
from ups_fast.build import Run, prepare
from ups_fast.calibration import ece, or_none, reliability
from ups_fast.data import ImageSet
from ups_fast.data.features import column_moments
from ups_fast.models import build
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.rounds import rounds

RECORD = record.RESULTS / "features.jsonl"
ROOT = Path(__file__).parents[1]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # features and labels to train, and to test


def digits() -> Rows:
    """1,797 x 64: the pixels of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    return _shared_out(*load_digits(return_X_y=True), test=360)


def cancer() -> Rows:
    """569 x 30: a table of measurements, two classes."""
    from sklearn.datasets import load_breast_cancer

    return _shared_out(*load_breast_cancer(return_X_y=True), test=114)


def animals() -> Rows:
    """10,000 x 1,280: lite0 on silhouettes of 96 pixels."""
    images, labels, test_images, test_labels = data.animals(8000)
    return _of_lite0("animals", images, 96), labels, _of_lite0("animals_test", test_images, 96), test_labels


def fashion() -> Rows:
    """5,000 x 1,280: lite0 on Fashion-MNIST at 96 pixels."""
    images, labels, test_images, test_labels = data.fashion(4000, 1000)
    return _of_lite0("fashion", images, 96), labels, _of_lite0("fashion_test", test_images, 96), test_labels


def elpv() -> Rows:
    """2,624 x 1,280: lite0 on photographs of solar cells; defect or not, the experts' doubt rounded."""
    x, p = _cells()
    return _shared_out(x, (p > 0.5).astype(np.int64), test=524)


SETS: dict[str, tuple[Callable[[], Rows], tuple[int, ...]]] = {
    "digits": (digits, (4, 10)),
    "cancer": (cancer, (4, 10)),
    "animals": (animals, (4, 10, 40)),
    "fashion": (fashion, (4, 10, 40)),
    "elpv": (elpv, (10, 40, 160)),
}
FEWEST = {name: counts[0] for name, (_, counts) in SETS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", choices=[*SETS, "time", "doubt", []], help="which data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument(
        "--write", type=Path, metavar="PATH", help="write the set, 10 labels a class, and run nothing"
    )
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the picture and run nothing")
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(tables(read())))
    if args.figure:
        curves.draw(curves.means(read(), FEWEST), args.figure)
    for name in args.sets if args.write else []:
        write(args.write, Split(SETS[name][0](), 10, seed=0))
    if args.table or args.figure or args.write:
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in args.sets:
        for key, fit in fits(name, args.seeds):
            if not any(key.items() <= line.items() for line in read()):
                start = time.monotonic()
                found = fit()
                add({**key, **found, "seconds": round(time.monotonic() - start, 2)})


def fits(name: str, seeds: list[int]) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What tells each fit from all others, and the fit."""
    wanted = SETS.get("animals" if name == "time" else name, (_cells, ()))
    counts = {"doubt": doubt.COUNTS, "time": (10,)}.get(name, wanted[1])
    methods = doubt.SCORES if name == "doubt" else METHODS
    rows: Any = wanted[0]()

    def fit(count: int, method: str, seed: int) -> dict[str, Any]:
        if name == "doubt":
            return doubt.measure(*rows, count, method, seed)
        return METHODS[method](Split(rows, count, seed))

    for seed, count, method in product(seeds, counts, methods):
        key = {"set": name, "labels": count, "method": method, "seed": seed}
        yield key, partial(fit, count, method, seed)


def read() -> list[dict[str, Any]]:
    return record.lines(RECORD)


def add(line: dict[str, Any]) -> None:
    record.append(RECORD, line)
    print(
        *(line[key] for key in ("set", "labels", "method", "seed")),
        f"{line.get('unlabeled_acc', line.get('average_precision')):.4f}",
        flush=True,
    )


# Data ------------------------------------------------------------------------------------------------------


class Split:
    """A draw of so many labels of each class from the seed."""

    def __init__(self, rows: Rows, per_class: int, seed: int) -> None:
        self.x, self.truth, self.x_test, self.test_truth = rows
        self.x, self.x_test = self.x.astype(np.float32), self.x_test.astype(np.float32)
        draw, self.seed = np.random.default_rng(seed), seed
        classes = range(int(self.truth.max()) + 1)
        given = [draw.permutation(np.flatnonzero(self.truth == c))[:per_class] for c in classes]
        self.labeled = np.sort(np.concatenate(given))
        self.y = np.full(len(self.truth), -1)
        self.y[self.labeled] = self.truth[self.labeled]
        self.hidden = self.y < 0

    def scores(self, p: np.ndarray, p_test: np.ndarray) -> dict[str, Any]:
        """Of probabilities of all rows to train, and of those to test."""
        confidence, label = torch.from_numpy(p[self.hidden]).max(1)
        right = label == torch.from_numpy(self.truth[self.hidden])
        return {
            "unlabeled_acc": float(right.double().mean()),
            "test_acc": float((p_test.argmax(1) == self.test_truth).mean()),
            "ece": or_none(ece(reliability(confidence, right))),
        }


def _shared_out(x: np.ndarray, y: np.ndarray, test: int) -> Rows:
    order = np.random.default_rng(0).permutation(len(y))
    return x[order[test:]], y[order[test:]], x[order[:test]], y[order[:test]]


def _cells() -> tuple[np.ndarray, np.ndarray]:  # -> float32 [2624, 1280], float64 [2624]
    """Features of the photographs at 160 pixels, and the experts' probability of a defect."""
    images, p = data.elpv()
    return _of_lite0("elpv", images, 160), p


def _of_lite0(name: str, images: np.ndarray, size: int) -> np.ndarray:  # uint8 [N, H, W] -> float32 [N, 1280]
    path = ROOT / f"runs/features_{name}.npy"
    if not path.exists():
        with torch.random.fork_rng():
            network = build(
                "lite0",
                n_classes=2,
                channels=1,
                size=images.shape[1:3],
                dropout=0.0,
                freeze=True,
                head="linear",
                input_size=size,
            )
        parts = torch.from_numpy(images.reshape(len(images), 1, *images.shape[1:3])).split(64)
        rows = torch.cat([network.eval().features(part.float() / 255) for part in parts])  # type: ignore[operator]
        path.parent.mkdir(exist_ok=True)
        np.save(path, rows.numpy())
    found: np.ndarray = np.load(path)
    return found


# Methods ---------------------------------------------------------------------------------------------------


def logistic(split: Split) -> dict[str, Any]:
    model = make_pipeline(StandardScaler().fit(split.x), LogisticRegression(C=0.01, max_iter=500))
    model[1].fit(model[0].transform(split.x[split.labeled]), split.y[split.labeled])
    return split.scores(model.predict_proba(split.x), model.predict_proba(split.x_test))


def self_training(split: Split) -> dict[str, Any]:
    base = LogisticRegression(C=0.01, max_iter=500)
    model = make_pipeline(StandardScaler(), SelfTrainingClassifier(base, threshold=0.75)).fit(
        split.x, split.y
    )
    return split.scores(model.predict_proba(split.x), model.predict_proba(split.x_test))


def spreading(split: Split) -> dict[str, Any]:
    scale = StandardScaler().fit(split.x)
    model = LabelSpreading(kernel="knn", n_neighbors=7, alpha=0.2, max_iter=100)
    model.fit(scale.transform(split.x), split.y)
    p = np.nan_to_num(model.label_distributions_)
    return split.scores(p, np.nan_to_num(model.predict_proba(scale.transform(split.x_test))))


def prepared(split: Split, **keys: Any) -> Run:
    """A run of the recipe with these keys."""
    x, x_test = torch.from_numpy(split.x), torch.from_numpy(split.x_test)
    mean, std = column_moments(x)
    classes = [str(c) for c in range(int(split.truth.max()) + 1)]
    truth, test_truth = torch.from_numpy(split.truth), torch.from_numpy(split.test_truth)
    rows = ImageSet("features", classes, x, truth, x_test, test_truth, mean, std)
    rows = replace(rows, labeled=torch.from_numpy(split.labeled))
    cfg = config.make({"recipe": "features", "data.name": "features", "seed": split.seed, **keys})
    return prepare(cfg, rows)


def ups(split: Split, **keys: Any) -> dict[str, Any]:
    run = prepared(split, **keys)
    cfg = run.cfg
    made = list(rounds(run, Console(quiet=True)))
    found = PseudoLabels(**run.state.pseudo_labels)  # type: ignore[arg-type]
    right = found.label == run.truth
    return {
        "unlabeled_acc": float(right.double().mean()),
        "test_acc": made[-1]["test_acc"],
        "round0_test_acc": made[0]["test_acc"],
        "ece": made[-1]["ece"],
        "positives": made[-1]["positives"],
        "positive_acc": made[-1]["positive_acc"],
        "unlabeled": len(right),
        "by_kappa": [by_kappa(found, right, kappa, cfg.select.tau_p) for kappa in curves.KAPPAS],
    }


def by_kappa(found: PseudoLabels, right: torch.Tensor, kappa: float, tau: float) -> list[float | None]:
    """Of the labels of at least that confidence and at most that std: how many, the share right, their ECE."""
    kept = (found.confidence >= tau) & (found.std <= kappa)
    error = ece(reliability(found.confidence[kept], right[kept]))
    return [int(kept.sum()), or_none(right[kept].double().mean()), or_none(error)]


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "logistic regression": logistic,
    "self-training of it": self_training,
    "label spreading": spreading,
    "UPS": ups,
    "UPS, confidence only": lambda split: ups(split, **{"select.kappa_p": 1.0, "select.kappa_n": 1.0}),
    "UPS, heads with dropout": lambda split: ups(split, **{"select.uncertainty": "dropout"}),
    "UPS, one head": lambda split: ups(split, **{"select.heads": 1}),
    "UPS, not balanced": lambda split: ups(split, **{"select.balance_rounds": 0}),
}


def write(path: Path, split: Split) -> None:
    """The split as a file for `data.name=features`."""
    np.savez(
        path,
        x_labeled=split.x[split.labeled],
        y_labeled=split.truth[split.labeled],
        x_unlabeled=split.x[split.hidden],
        y_unlabeled=split.truth[split.hidden],
        x_test=split.x_test,
        y_test=split.test_truth,
    )


# Tables ----------------------------------------------------------------------------------------------------


def tables(lines: list[dict[str, Any]]) -> Iterator[str]:
    for name, (_, counts) in SETS.items():
        if mine := [line for line in lines if line["set"] == name]:
            yield f"### {name}\n\n{_table(mine, counts)}"
    if mine := [line for line in lines if line["set"] == "time"]:
        yield f"### Time\n\n{_times(mine)}"
    if means := curves.means(lines, FEWEST):
        yield f"### By kappa\n\n{curves.table(means)}"
    if mine := [line for line in lines if line["set"] == "doubt"]:
        yield f"### Doubt\n\n{doubt.table(mine)}"


def _table(lines: list[dict[str, Any]], counts: tuple[int, ...]) -> str:
    """Accuracy on unlabeled rows; with the fewest labels also the share that is trusted, and the share right of it."""
    head = ["labels of a class", *(str(count) for count in counts), f"selected ({counts[0]})", "right"]
    body = []
    for method in METHODS:
        runs = [line for line in lines if line["method"] == method]
        cells = [_cell([run for run in runs if run["labels"] == count]) for count in counts]
        kept = [run for run in runs if run["labels"] == counts[0] and "positives" in run]
        of_all = statistics.mean(run["positives"] / run["unlabeled"] for run in kept) if kept else None
        right = statistics.mean(run["positive_acc"] for run in kept) if kept else None
        if runs:
            body.append([method, *cells, *("" if x is None else f"{100 * x:.1f}" for x in (of_all, right))])
    return record.grid(head, body)


def _times(lines: list[dict[str, Any]]) -> str:
    """Medians, their ratio to UPS, and the spread."""
    seconds = {name: [run["seconds"] for run in lines if run["method"] == name] for name in METHODS}
    ups = statistics.median(seconds["UPS"])
    body = [
        [
            name,
            f"{statistics.median(x):.1f}",
            f"{min(x):.1f} to {max(x):.1f}",
            f"{statistics.median(x) / ups:.2f}",
        ]
        for name, x in seconds.items()
        if x
    ]
    return record.grid(["method", "seconds", "from, to", "of UPS"], body)


def _cell(runs: list[dict[str, Any]]) -> str:
    """Mean and spread of the accuracy on unlabeled rows."""
    if not runs:
        return ""
    acc = [100 * run["unlabeled_acc"] for run in runs]
    return f"{statistics.mean(acc):.1f}" + (f" ± {statistics.stdev(acc):.1f}" if len(acc) > 1 else "")


if __name__ == "__main__":
    main()
