"""What the rounds have come to, in sentences: for the console, the picture and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ups_fast.calibration import interval
from ups_fast.config import Config
from ups_fast.methods import METHODS
from ups_fast.models.saved import BEST
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.state import Row, headline_of, task_in
from ups_fast.tasks import MULTI

Rows = Sequence[Row]  # one per round


def headline(rows: Rows, cfg: Config) -> str:
    """The result in a line, such as "digits: test accuracy 88.9 % → 96.4 % in 6 rounds"."""
    name = Path(cfg.data.root).stem if cfg.data.name in ("npz", "features", "folder") else cfg.data.name
    first, last = headline_of(rows[0]), headline_of(rows[-1])
    word = task_in(rows[-1]).word
    if one_training(cfg):
        return f"{name}: test {word} {percent(last)} by {cfg.method.name}"
    if len(rows) == 1:
        return f"{name}: test {word} {percent(last)} after one round"
    return f"{name}: test {word} {percent(first)} → {percent(last)} in {len(rows)} rounds"


def one_training(cfg: Config) -> bool:
    """Whether the rounds are parts of one training, so that round 0 is no network of labels alone."""
    return METHODS[cfg.method.name].continues


def summary(rows: Rows, pseudo_labels: PseudoLabels, truth: Tensor, cfg: Config) -> str:
    """`pseudo_labels` and `truth` as `Task.entries` gives them."""
    last, unlabeled, multi = rows[-1], len(pseudo_labels.index), task_in(rows[-1]) is MULTI
    noun = cfg.noun
    score = headline_of(last)
    of = (
        f"pairs of unlabeled {noun} and class" if multi else f"unlabeled {noun}s have a positive pseudo-label"
    )
    kept = f"{last['positives']:,} of {unlabeled:,} {of}" + " are labeled as positive" * multi
    if last["positive_acc"] is not None:
        kept += f", {percent(last['positive_acc'])} of them correct"
    told = f"{last['negative_samples']:,} others have negative ones"
    if multi:
        told = f"{last['negatives']:,} are labeled as negative"
    if last["negative_acc"] is not None:
        told += f", {percent(last['negative_acc'])} of which are correct"
    known = int((truth >= 0).sum())
    if known == 0:
        told += (
            f". The true classes of the unlabeled {noun}s are not known, so these labels cannot be checked"
        )
        if guess := test_guess(last, noun):
            told += f". {guess}"
    elif known < unlabeled:
        told += f" (checked on the {known:,} {'pairs' if multi else f'{noun}s'} whose true class is known)"
    if score is None:
        return f"No test {noun} could be read. {kept}; {told}. {_doubts(pseudo_labels, cfg)}"
    step = ""
    if len(rows) > 1 and (first := headline_of(rows[0])) is not None and not one_training(cfg):
        step = f", {100 * (score - first):+.1f} points from round 0"
    right = f"The network is right on {percent(score)} of the test {noun}s{step}."
    if multi:
        right = f"Mean average precision on the test {noun}s is {percent(score)}{step}."
    sentences = (
        f"{right} {advice(rows, cfg)} {kept}; {told}. {_doubts(pseudo_labels, cfg)} {chosen(rows, noun)}"
    )
    return " ".join(sentences.split())


def chosen(rows: Rows, noun: str = "image") -> str:
    """By what the best network was chosen."""
    judged = [(score, row["round"]) for row in rows if (score := headline_of(row, "val")) is not None]
    if not judged:
        return f"There are no validation {noun}s, so no round was chosen as the best."
    score, number = max(judged)
    right = percent(score)
    return f"{BEST} holds the network of round {number}, the best on validation {noun}s ({right})."


def _doubts(pseudo_labels: PseudoLabels, cfg: Config) -> str:
    """What uncertainty has done."""
    if not math.isfinite(cfg.select.kappa_p):
        return ""
    sure = pseudo_labels.confidence >= cfg.select.tau_p
    doubted = int((sure & ~pseudo_labels.candidate).sum())
    said = f"Of {int(sure.sum()):,} confident labels {doubted:,} were too uncertain (std above {cfg.select.kappa_p:g})"
    dropped = int((pseudo_labels.candidate & ~pseudo_labels.positive).sum())
    return said + (f", and {dropped:,} more were left out to balance the classes." if dropped else ".")


def advice(rows: Rows, cfg: Config) -> str:
    """What to do where the rounds have made the network worse; else empty."""
    train, select = cfg.train, cfg.select
    settings = {
        "a higher train.min_steps" if train.min_steps else "more train.epochs": True,
        "a higher select.tau_p": getattr(cfg.method, "schedule", "") != "curriculum",
        "train.warm_start=true with train.later_rounds_lr a third of train.lr": not train.warm_start,
        "a higher train.labeled_repeats": train.labeled_repeats == 1,
        f"select.balance_rounds={train.rounds}": select.balance_rounds < train.rounds,
        "select.balance_rounds=0 where classes are of unequal size": select.balance_rounds > 0,
        **_augmentation(cfg),
    }
    help_ = [words for words, open_ in settings.items() if open_]
    if (headline_of(rows[-1]) or 0) >= (headline_of(rows[0]) or 0) or one_training(cfg):
        return ""
    return f"The last round is worse than round 0 on the test {cfg.noun}s. What may help: {', '.join(help_)}."


def _augmentation(cfg: Config) -> dict[str, bool]:
    """What augmentation this run could have, and whether it lacks it."""
    if cfg.model.freeze:
        return {"data.views=4 with data.flip, data.crop or data.ops": cfg.data.views == 1}
    if cfg.data.name == "features":
        return {"data.noise or data.drop_columns": not (cfg.data.noise or cfg.data.drop_columns)}
    return {"augmentation (data.ops)": not cfg.data.ops}


def test_guess(row: Row, noun: str = "image") -> str:
    """A sentence on what the selection does to test samples; empty where it was not tried."""
    if (count := row.get("test_positives")) is None:
        return ""
    of_all = sum(each[0] for each in row["test_bins"]["all"])
    right = ""
    if (accuracy := row["test_positive_acc"]) is not None:
        low, high = interval(accuracy, count)
        share = f"{percent(accuracy)} of them with the right label"
        right = f", {share} (95 % interval {percent(low)} to {percent(high)})"
    what = f"pairs of test {noun} and class" if task_in(row) is MULTI else f"test {noun}s"
    took = f"The same thresholds select {count:,} of {of_all:,} {what}{right}"
    return f"{took}. This estimates how good the pseudo-labels are" if count else took


def recall_line(row: Row, classes: Sequence[str], most: int = 10) -> str:
    """The test recall or AP of each class, the lowest first, for a console; empty where it is not known."""
    values = row.get("test_ap") or row.get("test_recall") or []
    found = [(each, name) for each, name in zip(values, classes, strict=False) if each is not None]
    if not found:
        return ""
    lowest = sorted(found, key=lambda each: each[0])[:most]
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    what = "AP" if task_in(row) is MULTI else "recall"
    return f"test {what} by class, lowest first: {', '.join(f'{n!r} {percent(r)}' for r, n in lowest)}{more}"


def percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"
