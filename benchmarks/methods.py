"""All methods on real data, with equal numbers of training images: `python -m benchmarks.methods digits`.

Each run is a line of results/methods.jsonl. A line that is there is not run again, so the command can be stopped, and
two of them may share the work (--methods). `--table` prints the tables of docs/results.md from that file.

The budget of a set is the number of images that UPS learns from on the same seed, counted row by row of its batches;
every other method gets as many epochs as come nearest to it. So the rows of a batch that are seen twice, weak and
strong, count twice. Label spreading (scikit-learn, on pixels, no network) has none.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import data, record
from ups_fast import config, rounds
from ups_fast.build import Run, prepare
from ups_fast.calibration import ece, or_none, reliability
from ups_fast.data import load_set
from ups_fast.inputs import split_of
from ups_fast.methods import METHODS
from ups_fast.step import TrainStep

ROOT = Path(__file__).parents[1]
RECORD = record.RESULTS / "methods.jsonl"
# Of each set the config file, the labels in all where the set is written for each seed, and what is set besides: UPS
# then learns from 40 to 230 thousand images, and a run takes minutes.
SETS: dict[str, tuple[str, int, str]] = {
    "digits": ("configs/digits.yaml", 0, "train.epochs=30"),
    "fashion_mnist": ("benchmarks/gray14.yaml", 400, "train.round0_epochs=50"),
    "animals": ("benchmarks/gray14.yaml", 100, "train.round0_epochs=200"),
}
SPREADING = "label_spreading"
NAMES = [SPREADING, *METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="which data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(tables(read())))
        return
    torch.set_num_threads(1)
    for name in args.sets:
        for seed in args.seeds:
            for method in sorted(args.methods, key=lambda each: each != "ups"):  # its images are the budget
                if not any(same(line, name, method, seed) for line in read()):
                    add({"set": name, "method": method, "seed": seed, **run(name, method, seed)})


def same(line: dict[str, Any], name: str, method: str, seed: int) -> bool:
    return (line["set"], line["method"], line["seed"]) == (name, method, seed)


def read() -> list[dict[str, Any]]:
    return record.lines(RECORD)


def add(line: dict[str, Any]) -> None:
    record.append(RECORD, line)
    print(
        line["set"],
        line["method"],
        line["seed"],
        f"{line['test_acc']:.4f}",
        f"{line['seconds']:.0f} s",
        flush=True,
    )


# A run -----------------------------------------------------------------------------------------------------


def run(name: str, method: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, labels, more = SETS[name]
        words = [f"seed={seed}", "threads=1", f"run_dir={folder}/run", more]
        if labels:
            data.write(name, Path(folder) / "set.npz", labels, seed)
            words.append(f"data.root={folder}/set.npz")
        start = time.monotonic()
        if method == SPREADING:
            found = spreading(config.load(ROOT / path, words))
        else:
            found = trained(config.load(ROOT / path, [*words, f"method.name={method}"]), name, seed)
        return {**found, "seconds": time.monotonic() - start}


def trained(cfg: config.Config, name: str, seed: int) -> dict[str, Any]:
    images = load_set(cfg.data.name, cfg.data.root)
    if cfg.method.name != "ups":
        run = prepare(cfg, images)
        if run.method.continues:  # its rounds are one training: the budget says how long
            cfg.train.min_steps = 0
        cfg.train.epochs = epochs_for(run, budget(name, seed))
    with Counted() as count:
        found = rounds.run(cfg, images, console=Console(file=io.StringIO()))
    row = found.rows[-1]
    keys = ("test_acc", "test_ece", "positives", "positive_acc", "ece", "ece_selected")
    return {
        **{key: row[key] for key in keys},  # type: ignore[literal-required]
        "round0_acc": found.rows[0]["test_acc"],
        "unlabeled": len(found.truth),
        "unlabeled_acc": float((found.pseudo_labels.label == found.truth).double().mean()),
        "images": count.images,
        "epochs": cfg.train.epochs,
    }


def budget(name: str, seed: int) -> int:
    """The images of the UPS run."""
    return next(line["images"] for line in read() if same(line, name, "ups", seed))


def epochs_for(run: Run, images: int) -> int:
    """Epochs of a round with which a method learns from about so many images in all."""
    sizes = {"labeled": len(run.state.labeled), "unlabeled": len(run.state.unlabeled)}
    if not run.method.continues:  # its lists grow from round to round: about as UPS's do
        return run.cfg.train.epochs
    layout = run.method.lay_out(sizes, run.cfg.train.batch_size)
    return max(1, round(images / (run.cfg.train.rounds * layout.steps * layout.rows)))


class Counted:
    """Counts the rows of all batches."""

    def __enter__(self) -> Counted:
        self.images, self.original = 0, TrainStep.__call__

        def call(step: TrainStep, *args: Any) -> None:
            self.images += step.rows.shape[1]
            self.original(step, *args)

        TrainStep.__call__ = call  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        TrainStep.__call__ = self.original  # type: ignore[method-assign]


def spreading(cfg: config.Config) -> dict[str, Any]:
    """scikit-learn's label spreading on pixels in [0, 1], the same split."""
    from sklearn.semi_supervised import LabelSpreading

    images = load_set(cfg.data.name, cfg.data.root)
    labeled, unlabeled = split_of(cfg, images)
    pixels = images.train_images.flatten(1).numpy() / 255
    target = np.full(len(pixels), -1)
    target[labeled] = images.train_labels[labeled]
    model = LabelSpreading(kernel="knn", n_neighbors=7, alpha=0.2, max_iter=100).fit(pixels, target)
    p = torch.from_numpy(model.label_distributions_[unlabeled])
    confidence, label = p.max(1)
    truth = images.train_labels[unlabeled]
    right, kept = label == truth, confidence >= cfg.select.tau_p
    test = model.predict(images.test_images.flatten(1).numpy() / 255)
    return {
        "test_acc": float((torch.from_numpy(test) == images.test_labels).double().mean()),
        "positives": int(kept.sum()),
        "positive_acc": or_none(right[kept].double().mean()),
        "ece": or_none(ece(reliability(confidence, right))),
        "ece_selected": or_none(ece(reliability(confidence[kept], right[kept]))),
        "unlabeled": len(unlabeled),
        "unlabeled_acc": float(right.double().mean()),
        "images": 0,
    }


# Tables ----------------------------------------------------------------------------------------------------


def tables(lines: list[dict[str, Any]]) -> Iterator[str]:
    for name in SETS:
        if mine := [line for line in lines if line["set"] == name]:
            yield f"### {name}\n\n{table(mine)}"


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each method, the best first: means over seeds, spread of the accuracy, median seconds."""
    groups = {method: [line for line in lines if line["method"] == method] for method in NAMES}
    rows = []
    for method, runs in groups.items():
        if runs:
            acc = [100 * run["test_acc"] for run in runs]
            spread = f"{statistics.stdev(acc):.1f}" if len(acc) > 1 else ""
            rows.append((statistics.mean(acc), [
                f"`{method}`",
                f"{statistics.mean(acc):.1f}",
                spread,
                str(len(acc)),
                percent(runs, "unlabeled_acc"),
                percent(runs, "positives", "unlabeled"),
                percent(runs, "positive_acc"),
                percent(runs, "ece"),
                f"{statistics.mean(run['images'] for run in runs) / 1000:,.0f}",
                f"{statistics.median(run['seconds'] for run in runs):,.0f}",
            ]))  # fmt: skip
    head = ["method", "test %", "std", "seeds", "unlabeled %", "selected %", "right %", "ECE %"]
    head += ["thousand images", "seconds"]
    return record.grid(head, [cells for _, cells in sorted(rows, key=lambda row: -row[0])])


def percent(runs: list[dict[str, Any]], key: str, of: str | None = None) -> str:
    known = [run[key] / (run[of] if of else 1) for run in runs if run.get(key) is not None]
    return f"{100 * statistics.mean(known):.1f}" if known else ""


if __name__ == "__main__":
    main()
