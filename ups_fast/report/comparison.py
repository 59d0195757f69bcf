"""A run beside the baselines: the features they learn from, their results in its folder, and what is said of them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ups_fast.checkpoint import BASELINES
from ups_fast.config import Config
from ups_fast.data import Images
from ups_fast.data.features import column_moments
from ups_fast.files import RunFolderError, read_bytes, write_atomic
from ups_fast.models import Network
from ups_fast.models.saved import load_model
from ups_fast.report.baselines import Part, Rival, compare
from ups_fast.report.sentences import Rows, one_training, percent
from ups_fast.selection import features_of, labeling_rows
from ups_fast.words import line_of

MOST_IMAGES = 50_000  # whose features a network computes in seconds
_MOST_BYTES = 100_000  # of a baselines.json; one has some 1,000


@dataclass(frozen=True)
class Comparison:
    """The baselines of a run after so many rounds."""

    rounds: int
    tau_p: float
    given: bool  # the features are the data's own, rather than the trained network's
    known: Mapping[str, int]  # of test, unlabeled and val: how many samples a share is of
    seconds: float = 0.0  # that the features took
    rivals: list[Rival] = field(default_factory=list)
    why: str = ""  # there are none

    @property
    def final(self) -> bool:
        """No other attempt can come to more."""
        return not self.why.startswith("failed") and not any(rival.failed for rival in self.rivals)


@dataclass(frozen=True)
class Samples:
    """What a run knows of its samples."""

    images: Images
    test_images: Images
    index: Mapping[str, Tensor]  # of labeled, unlabeled and val, int64, into the training set
    labels: Tensor  # int64 [N], of the training set, -1 where unknown
    test_labels: Tensor  # int64 [M]
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # results of `features`

    def readable(self, name: str) -> tuple[Images, Tensor]:
        """The images of a part and the ids of those that are there."""
        images = self.test_images if name == "test" else self.images
        index = torch.arange(len(images)) if name == "test" else self.index[name]
        gone = torch.tensor(sorted(images.unreadable), dtype=torch.int64)
        return images, index[~torch.isin(index, gone)]

    def features(self, network: Network, name: str) -> tuple[Tensor, Tensor]:  # int64 [n], float32 [n, D]
        """The ids of a part's images that are there and what the network's classifier gets, on the host, once."""
        if name not in self.seen:
            images, ids = self.readable(name)
            rows = labeling_rows(images.device, images.shape)
            found = (
                features_of(network, images, ids, batch_size=rows).cpu() if len(ids) else torch.zeros(0, 0)
            )
            there = ~torch.isin(ids, torch.tensor(sorted(images.unreadable), dtype=torch.int64))
            self.seen[name] = ids[there], found[there]  # a file may be gone only now
        return self.seen[name]

    def truth(self, name: str, index: Tensor) -> Tensor:
        return (self.test_labels if name == "test" else self.labels)[index]


PARTS = ("labeled", "unlabeled", "test", "val")


def baselines_of(folder: Path, samples: Samples, rounds: int, n_classes: int, tau_p: float) -> Comparison:
    """From the run's folder, if it has them of these rounds; else they are computed and kept there. Raises nothing."""
    found = kept(folder / BASELINES)
    if found and (found.rounds, found.tau_p) == (rounds, tau_p) and found.final:
        return found
    new = _computed(folder, samples, rounds, n_classes, tau_p)
    with suppress(RunFolderError):  # they are in the report
        write_atomic(folder / BASELINES, (json.dumps(_plain(new), indent=1) + "\n").encode())
    return new


def _computed(folder: Path, samples: Samples, rounds: int, n_classes: int, tau_p: float) -> Comparison:
    given, none = len(samples.images.shape) == 1, {"test": 0, "unlabeled": 0, "val": 0}
    count = sum(len(samples.readable(name)[1]) for name in PARTS)
    if not given and count > MOST_IMAGES:
        why = f"skipped: features of {count:,} images, more than {MOST_IMAGES:,}, would take minutes"
        return Comparison(rounds, tau_p, given, none, why=why)
    began = time.perf_counter()
    try:
        parts = _given(samples) if given else _of_network(folder, samples)
    except Exception as error:  # the report is worth more than its baselines
        return Comparison(rounds, tau_p, given, none, why=f"failed: {line_of(error)}")
    seconds = round(time.perf_counter() - began, 3)
    known = {name: parts[name].known for name in none}
    return Comparison(rounds, tau_p, given, known, seconds, compare(parts, n_classes, tau_p))


def _given(samples: Samples) -> dict[str, Part]:
    """The rows themselves, as the run has standardized them, read when they are needed: they may be a million."""

    def part(name: str) -> Part:
        images, index = samples.readable(name)

        def read(ids: Tensor) -> Tensor:
            return next(iter(images.clean_batches(ids.to(images.device), max(1, len(ids)))))

        return Part(read, index, samples.truth(name, index))

    return {name: part(name) for name in PARTS}


def _of_network(folder: Path, samples: Samples) -> dict[str, Part]:
    """What the trained network's classifier gets, standardized on the labeled and unlabeled images."""
    network = load_model(folder, samples.images.device)
    index: dict[str, Tensor] = {}
    features: dict[str, Tensor] = {}
    for name in PARTS:
        index[name], found = samples.features(network, name)
        if name == "labeled" and not len(found):
            raise ValueError("no labeled image can be read any more")
        features[name] = found if len(found) else features["labeled"][:0]
    mean, std = map(torch.tensor, column_moments(torch.cat([features["labeled"], features["unlabeled"]])))
    return {
        name: Part(((x - mean) / std).__getitem__, torch.arange(len(x)), samples.truth(name, index[name]))
        for name, x in features.items()
    }


# In the run's folder ---------------------------------------------------------------------------------------


def _plain(found: Comparison) -> dict[str, Any]:
    return {**asdict(found), "rivals": [rival._asdict() for rival in found.rivals]}


def kept(path: Path) -> Comparison | None:
    """What is kept there; None where there is nothing that can be believed."""
    if not os.path.lexists(path):
        return None
    try:
        tree = json.loads(read_bytes(path, _MOST_BYTES))
        found = Comparison(**{**tree, "rivals": [Rival(**each) for each in tree["rivals"]]})
        return found if _fits(found) else None
    except (RunFolderError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _fits(found: Comparison) -> bool:
    """Whether all that a report shows has its type and range."""

    def number(value: Any, most: float = math.inf) -> bool:
        return type(value) in (int, float) and 0 <= value <= most

    def share(value: Any) -> bool:
        return value is None or number(value, 1)

    return (
        type(found.rounds) is int
        and number(found.tau_p)
        and type(found.given) is bool
        and type(found.known) is dict
        and set(found.known) == {"test", "unlabeled", "val"}
        and all(type(each) is int and each >= 0 for each in found.known.values())
        and number(found.seconds)
        and type(found.why) is str
        and all(
            all(type(each) is str for each in (rival.name, rival.why, rival.note))
            and type(rival.failed) is bool
            and number(rival.seconds)
            and all(map(share, (rival.test, rival.unlabeled, rival.val)))
            for rival in found.rivals
        )
    )


# What is said of them --------------------------------------------------------------------------------------


def verdict(found: Comparison, rows: Rows, cfg: Config) -> str:
    """A sentence for a user whose data are better served by a baseline; else empty.

    Better is an accuracy that is higher by more than its standard error, sqrt(p (1 - p) / n), the largest one of the
    two and of their mean: on validation images where there are some, else on test images, and that is said.
    """
    judge = "val" if found.known["val"] and rows[-1].get("val_acc") is not None else "test"
    ours = rows[-1]["val_acc" if judge == "val" else "test_acc"]
    tried = [(share, rival.name) for rival in found.rivals if (share := getattr(rival, judge)) is not None]
    if ours is None or not tried:
        return ""
    best, name = max(tried, key=lambda each: each[0])
    n = found.known[judge]
    error = math.sqrt(max(p * (1 - p) for p in (best, ours, (best + ours) / 2)) / n)
    if best - ours <= error:
        return ""
    part = "validation" if judge == "val" else "test"
    features = "the features" if found.given else "the features of the trained network"
    looked = "" if judge == "val" else f", but test {cfg.noun}s were looked at to find this"
    return (
        f"A baseline serves these data better: {name} on {features} is right on {percent(best)} of {n:,} {part} "
        f"{cfg.noun}s, the last round of {cfg.method.name} on {percent(ours)} (standard error {100 * error:.1f} "
        f"points){looked}."
    )


def source(found: Comparison, cfg: Config) -> str:
    """Which features the baselines have used."""
    settings = (
        "All have the same labels and standardized features. Logistic regression has C = 0.01, label spreading 7 "
        f"neighbors and alpha = 0.2. Self-training trusts what logistic regression gives at least {found.tau_p:g}."
    )
    if found.given:
        which = "features of the pretrained network" if cfg.model.freeze else "given features"
        return f"The baselines learn from the {which}. {settings} Seconds of a round include those before it."
    return (
        f"The baselines learn from features of the trained network on clean {cfg.noun}s, in the state of the last "
        f"round. That network has learned from the pseudo-labels of {cfg.method.name}, which makes the baselines look "
        f"better than on features of their own. {settings} Seconds of a round include those before it, those of "
        f"baselines neither training nor the features ({found.seconds:.1f} s)."
    )


def table(found: Comparison, rows: Rows, cfg: Config) -> tuple[list[str], list[list[str]]]:
    """Head and lines: labels alone, the baselines, the rounds. Columns that nothing is known of are left out."""
    method, total, lines = cfg.method.name, 0.0, []
    for row in rows:
        total += row["seconds"]
        name = f"{method}, round {row['round']}"
        if row["round"] == 0 and not one_training(cfg):
            name = "labels alone (round 0)"
        lines.append(Rival(name, row["test_acc"], row.get("unlabeled_acc"), row.get("val_acc"), total))
    rivals = found.rivals or [Rival("baselines", why=found.why)]
    if one_training(cfg):
        alone = Rival("labels alone", why=f"not available: {method} is one training over all rounds")
        shown = [alone, *rivals, *lines]
    else:
        shown = [lines[0], *rivals, *lines[1:]]
    columns = {
        "": [each.name for each in shown],
        "test": [percent(each.test) for each in shown],
        "unlabeled": [percent(each.unlabeled) for each in shown],
        "validation": [percent(each.val) for each in shown],
        "seconds": [
            "n/a" if each.why else f"{each.seconds:.{1 if each.seconds >= 1 else 2}f}" for each in shown
        ],
        "note": [each.why or each.note for each in shown],
    }
    dull = {"n/a", ""}
    kept = {name: cells for name, cells in columns.items() if name in ("", "test") or set(cells) - dull}
    return list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)]
