"""Sources of uncertainty on the same digits: `python -m benchmarks.uncertainty`, as images and as rows of pixels.

Each run is a line of results/uncertainty.jsonl. A line that is there is not run again, so the command can be stopped.
`--table` prints the tables of docs/results.md from that file. Networks and rounds are smaller than in
configs/digits.yaml, so that a run takes seconds: the tables compare sources, and not UPS with anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from benchmarks import features, record
from ups_fast import config
from ups_fast.build import Run, prepare
from ups_fast.data import load_set
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.rounds import rounds

ROOT = Path(__file__).parents[1]
RECORD = record.RESULTS / "uncertainty.jsonl"
SMALL = ["model.name=wrn-10-1", "train.rounds=3", "train.epochs=6", "train.round0_epochs=100", "threads=1"]
LABELS = 4  # of a class

# Of each set the sources by the words that they add to its config.
SOURCES: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "dropout": {},
        "spatial": {"select.uncertainty": "spatial"},
        "dropblock": {"select.uncertainty": "dropblock"},
        "augment": {"select.uncertainty": "augment"},
        # Chosen on seed 10, where in round 0 shifts have four times the std of dropout.
        "augment, kappas x 6": {
            "select.uncertainty": "augment",
            "select.kappa_p": 0.3,
            "select.kappa_n": 0.03,
        },
        "heads, 3": {"select.uncertainty": "heads", "select.heads": 3, "select.passes": 3},
    },
    "rows": {
        "dropout": {"select.heads": 1, "select.passes": 10},
        "dropout, 5 heads": {},  # the recipe
        "augment": {
            "select.uncertainty": "augment",
            "select.heads": 1,
            "select.passes": 10,
            "data.noise": 0.3,
        },
        "heads, 5": {"select.uncertainty": "heads"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(tables(read())))
        return
    torch.set_num_threads(1)
    for name, sources in SOURCES.items():
        for seed in args.seeds:
            for source, words in sources.items():
                key = {"set": name, "source": source, "seed": seed}
                if not any(key.items() <= line.items() for line in read()):
                    start = time.process_time()  # the machine may do other work, too
                    found = RUNS[name](seed, words)
                    add({**key, **found, "seconds": round(time.process_time() - start, 2)})


def read() -> list[dict[str, Any]]:
    return record.lines(RECORD)


def add(line: dict[str, Any]) -> None:
    record.append(RECORD, line)
    print(*(line[key] for key in ("set", "source", "seed", "unlabeled_acc", "auroc", "seconds")), flush=True)


# A run -----------------------------------------------------------------------------------------------------


def of_images(seed: int, words: dict[str, Any]) -> dict[str, Any]:
    given = [f"{key}={value}" for key, value in words.items()]
    cfg = config.load(ROOT / "configs/digits.yaml", [*SMALL, f"seed={seed}", *given])
    cfg.run_dir = ""
    return found_by(prepare(cfg, load_set("digits", "")))


def of_rows(seed: int, words: dict[str, Any]) -> dict[str, Any]:
    return found_by(features.prepared(features.Split(features.digits(), LABELS, seed), **words))


def found_by(run: Run) -> dict[str, Any]:
    """What the run's last labeling is worth, and whether its std tells which labels are wrong."""
    *_, row = rounds(run, Console(quiet=True))
    found = PseudoLabels(**run.state.pseudo_labels)  # type: ignore[arg-type]
    right = found.label == run.truth
    keys = ("test_acc", "positives", "positive_acc", "ece", "ece_selected")
    return {
        **{key: row[key] for key in keys},  # type: ignore[literal-required]
        "unlabeled": len(right),
        "unlabeled_acc": float(right.double().mean()),
        "auroc": float(roc_auc_score(~right, found.std)),
        "auroc_confidence": float(roc_auc_score(~right, -found.confidence)),
        "mean_std": float(found.std.double().mean()),
    }


RUNS = {"images": of_images, "rows": of_rows}


# Tables ----------------------------------------------------------------------------------------------------


def tables(lines: list[dict[str, Any]]) -> Iterator[str]:
    for name in SOURCES:
        if mine := [line for line in lines if line["set"] == name]:
            yield f"### {name}\n\n{table(name, mine)}"


def table(name: str, lines: list[dict[str, Any]]) -> str:
    """A row for each source: mean and spread over seeds, in %."""
    head = [
        "source",
        "seeds",
        "unlabeled",
        "selected",
        "right",
        "ECE",
        "ECE selected",
        "AUROC of std",
        "of confidence",
    ]
    body = []
    for source in SOURCES[name]:
        if runs := [line for line in lines if line["source"] == source]:
            share = [100 * run["positives"] / run["unlabeled"] for run in runs]
            keys = ("positive_acc", "ece", "ece_selected", "auroc", "auroc_confidence")
            rest = [_cell([100 * run[key] for run in runs if run[key] is not None]) for key in keys]
            first = _cell([100 * run["unlabeled_acc"] for run in runs])
            seconds = f"{statistics.median(run['seconds'] for run in runs):.0f}"
            body.append([source, str(len(runs)), first, _cell(share), *rest, seconds])
    return record.grid([*head, "seconds"], body)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
