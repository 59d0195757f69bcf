"""A trial: one run of many that are compared, in a folder of its own, and the numbers that are kept of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import ups_fast
from ups_fast import command
from ups_fast.build import prepare
from ups_fast.calibration import by_confidence, by_limit, error_cells
from ups_fast.checkpoint import CHECKPOINT, CONFIG, METRICS, SELECTION, check_config
from ups_fast.config import Config
from ups_fast.data import ImageSet
from ups_fast.files import load_arrays, read_bytes
from ups_fast.inputs import load_data
from ups_fast.machine import pick_device
from ups_fast.rounds import rounds
from ups_fast.state import Row, headline_of, task_in

MOST_METRICS = 2**26  # bytes of a metrics.jsonl
# Of the last row of a run, as metrics.jsonl has them.
KEPT = (
    "positives",
    "positive_acc",
    "negatives",
    "negative_acc",
    "negative_samples",
    "ece",
    "ece_selected",
    "test_ece",
)
PARTS = ("test", "val", "unlabeled")  # whose accuracy is kept, or of several labels their mAP
MOST_KEPT = 2**27  # bytes of data beyond which only those of the last trial are kept
_loaded: dict[str, ImageSet] = {}  # the data of this process's last trials, which may differ by seed alone


@dataclass(frozen=True)
class Trial:
    """What is trained: a config whose `run_dir` is the trial's own folder."""

    name: str
    cfg: Config

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir)


def train(trial: Trial, tell: Callable[[str], None]) -> None:
    """Trains what the trial's folder lacks. `tell` hears of each round in a few words. Raises as `begin`."""
    tell("reading data")
    found = begin(trial)
    tell(f"round 0 of {trial.cfg.train.rounds}")
    for row in found:
        score = headline_of(row)
        said = "" if score is None else f", test {100 * score:.1f} %"
        tell(f"round {row['round'] + 1} of {trial.cfg.train.rounds}{said}")


def begin(trial: Trial) -> Iterator[Row]:
    """The rows of the trial's rounds, as `rounds.rounds` gives them: each new one is trained when it is asked for.

    Data are loaded once for trials of equal data and seed that follow each other in a process.
    Raises as `rounds.rounds` and `prepare`.
    """
    cfg = trial.cfg
    device = pick_device(cfg.device)
    command.check_kernels(device)
    torch.set_num_threads(cfg.threads or 1)
    nobody = Console(file=io.StringIO(), quiet=True)
    return rounds(prepare(cfg, _data(cfg, device, nobody), nobody), nobody)


def _data(cfg: Config, device: torch.device, console: Console) -> ImageSet:
    if cfg.data.name == "folder":  # what is read of it depends on the run's folder
        return load_data(cfg, device, console)
    key = json.dumps([asdict(cfg.data), cfg.seed])
    if key not in _loaded:
        if sum(each.train_images.nbytes for each in _loaded.values()) > MOST_KEPT:
            _loaded.clear()
        _loaded[key] = load_data(cfg, device, console)
    return _loaded[key]


def check(trial: Trial) -> None:
    """Raises RunFolderError where the trial's folder belongs to a run with another config."""
    if (trial.folder / CONFIG).exists():
        check_config(trial.folder / CONFIG, asdict(trial.cfg))


def record_of(trial: Trial) -> dict[str, Any] | None:
    """The numbers of a finished trial, of its last labeling and with curves; None where it is not finished.

    Of several labels, labelings and curves count pairs of sample and class.
    Files that cannot be read count as missing: the trial, run again, writes them anew from its checkpoint.
    """
    cfg, folder = trial.cfg, trial.folder
    try:
        if not (folder / CHECKPOINT).is_file():
            return None
        rows = [json.loads(line) for line in read_bytes(folder / METRICS, MOST_METRICS).splitlines()]
        if len(rows) != cfg.train.rounds:
            return None
        arrays = {name: torch.from_numpy(each) for name, each in load_arrays(folder / SELECTION).items()}
        truth = arrays.pop("truth")
        last, task = rows[-1], task_in(rows[-1])
        found, truth = task.entries(task.of(arrays), truth)
        record = {name: last[name] for name in (*(f"{part}_{task.headline}" for part in PARTS), *KEPT)}
        seconds = round(sum(row["seconds"] for row in rows), 2)
        round0 = {f"round0_test_{task.headline}": rows[0][f"test_{task.headline}"]}
    except (ValueError, OSError, KeyError, TypeError):
        return None
    return {
        **record,
        **round0,
        "unlabeled": len(found.index),
        "seconds": seconds,
        "by_kappa": by_limit(found, truth, tau=cfg.select.tau_p),
        "by_tau": by_limit(found, truth, kappa=cfg.select.kappa_p if cfg.select.passes > 1 else None),
        "by_confidence": by_confidence(found, truth),
        "cells": error_cells(found, truth),
        "torch": str(torch.__version__),
        "ups_fast": ups_fast.__version__,
    }
