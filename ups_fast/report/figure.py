"""report.png: accuracy and selection by round, calibration, and confidence against uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ups_fast.calibration import Reliability, ece, reliability
from ups_fast.config import Config
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.report.sentences import Rows, headline, one_training
from ups_fast.state import Row, headline_of, task_in
from ups_fast.tasks import MULTI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion (Okabe and Ito) differ for every kind of color vision, and in a gray print.
BLUE, VERMILION, GREEN, PALE = "#0072B2", "#D55E00", "#008F6B", "#C9D1D9"
INK, MUTED, RULE = "#1F2933", "#616E7C", "#E4E7EB"
DASHES = (0, (4, 3))
MOST_POINTS = 6000  # of the plane: further ones would only lie on top of each other

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
}


def draw(rows: Rows, pseudo_labels: Any, truth: Tensor, cfg: Config, labeled: int) -> Figure:
    """The four panels as a matplotlib figure; arguments as in `write_report`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 9.2), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, left=0.06, right=0.975, top=0.81, bottom=0.06, wspace=0.19, hspace=0.5
        )
        accuracy, counts, calibration, plane = (figure.add_subplot(grid[i]) for i in range(4))
        figure.text(0.06, 0.95, headline(rows, cfg), fontsize=17, fontweight="bold", parse_math=False)
        figure.text(0.06, 0.918, _subline(pseudo_labels, cfg, labeled), fontsize=11, color=MUTED)
        _draw_accuracy(accuracy, rows, cfg.noun, any_known=bool((truth >= 0).any()))
        task, all_known = task_in(rows[-1]), bool((truth >= 0).all())
        labels, truth = task.entries(pseudo_labels, truth)
        _draw_counts(counts, rows, cfg, len(labels.index), all_known=all_known)
        _draw_calibration(calibration, _bins(rows[-1], labels, truth, cfg.noun), cfg.noun)
        _draw_plane(plane, labels, truth, cfg, multi=task is MULTI)
    return figure


def _subline(pseudo_labels: Any, cfg: Config, labeled: int) -> str:
    rounds = f"Round 0 trained on the labeled {cfg.noun}s alone."
    if one_training(cfg):
        rounds = f"Rounds are parts of one training by {cfg.method.name}."
    return (
        f"{labeled:,} labeled and {len(pseudo_labels.index):,} unlabeled {cfg.noun}s, {cfg.model.name}, "
        f"seed {cfg.seed}. {rounds}"
    )


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=37)
    axes.text(0, 1.095, note, transform=axes.transAxes, fontsize=9.5, color=MUTED, va="bottom")


def _legend(axes: Axes) -> None:
    """One row between title and panel, where it can cover nothing."""
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.0),
        ncols=4,
        borderpad=0,
        borderaxespad=0.4,
        columnspacing=1.4,
        markerscale=1.3,
        fontsize=9.5,
    )


def _note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], **how: Any) -> None:
    """Small text at a point of the data, shifted by points of print."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(text, at, xytext=shift, textcoords="offset points", fontsize=9.5, bbox=ground, **how)


def _by_round(axes: Axes, rows: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    edge = max(0.6, 0.05 * len(rows))
    axes.set_xlim(rows[0]["round"] - edge, rows[-1]["round"] + edge)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.grid(axis="y", color=RULE)


def _draw_accuracy(axes: Axes, rows: Rows, noun: str, *, any_known: bool) -> None:
    curves = [
        ("test set", [headline_of(row) for row in rows], BLUE, "-o"),
        ("positive pseudo-labels", [row["positive_acc"] for row in rows], GREEN, "--s"),
        ("negative pseudo-labels", [row["negative_acc"] for row in rows], MUTED, ":^"),
    ]
    for name, shares, color, line in curves:
        pairs = zip(rows, shares, strict=True)
        if points := [(row["round"], 100 * share) for row, share in pairs if share is not None]:
            axes.plot(*zip(*points, strict=True), line, color=color, ms=5, lw=2, label=name)
    low, high = axes.get_ylim()
    low = min(low, high - 4)  # no drama where there is one round
    # Room for the numbers below the first and last point, and for half a marker at 100.
    axes.set_ylim(low - 0.1 * (high - low), min(high, 100 + 0.03 * (high - low)))
    for row in (rows[0], rows[-1])[: len(rows)]:
        if (share := headline_of(row)) is None:
            continue
        value = 100 * share
        _note(axes, f"{value:.1f}", (row["round"], value), (0, -15), ha="center", weight="bold", color=BLUE)
    unknown = "" if any_known else f". The true classes of unlabeled {noun}s are not known"
    multi = task_in(rows[-1]) is MULTI
    what = "mAP, and correct pseudo-labels," if multi else "Correct answers"
    _title(axes, "mAP by round" if multi else "Accuracy by round", f"{what} in percent{unknown}")
    _legend(axes)
    _by_round(axes, rows)


def _draw_counts(axes: Axes, rows: Rows, cfg: Config, unlabeled: int, *, all_known: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    rounds = [row["round"] for row in rows]
    positives = np.array([row["positives"] for row in rows])
    multi = task_in(rows[-1]) is MULTI
    others = np.array([row["negatives" if multi else "negative_samples"] for row in rows])
    if all_known:
        right = np.array([round(row["positives"] * (row["positive_acc"] or 0)) for row in rows])
        axes.bar(rounds, right, 0.7, color=BLUE, label="positive, correct")
        axes.bar(rounds, positives - right, 0.7, bottom=right, color=VERMILION, label="positive, wrong")
    else:
        axes.bar(rounds, positives, 0.7, color=BLUE, label="positive")
    pale = "negative" if multi else "negative classes only"
    axes.bar(rounds, others, 0.7, bottom=positives, color=PALE, label=pale)
    axes.axhline(unlabeled, color=INK, lw=1, ls=DASHES)
    what = "whose labels pass the limits" if one_training(cfg) else "that a next round would train on"
    of = f"Pairs of unlabeled {cfg.noun} and class" if multi else f"Unlabeled {cfg.noun}s"
    _title(axes, "What was selected", f"{of} {what}")
    _legend(axes)
    _by_round(axes, rows)
    _note(axes, f"all {unlabeled:,}", (axes.get_xlim()[1], unlabeled), (0, 3), ha="right")
    axes.set_ylim(0, 1.1 * max(unlabeled, 1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _bins(row: Row, pseudo_labels: PseudoLabels, truth: Tensor, noun: str) -> dict[str, Reliability]:
    """How far confidence is deserved, by groups of samples: of unlabeled ones, or else of test samples."""
    if not (truth >= 0).any():
        found = row.get("test_bins") or {}
        names = {"all": f"all test {noun}s", "selected": "selected"}
        return {names[key]: Reliability(*torch.tensor(found[key]).T) for key in names if found.get(key)}
    groups = {"all unlabeled": torch.ones_like(pseudo_labels.positive), "selected": pseudo_labels.positive}
    judged = {name: each & (truth >= 0) & (pseudo_labels.label >= 0) for name, each in groups.items()}
    correct = pseudo_labels.label == truth
    return {
        name: reliability(pseudo_labels.confidence[each], correct[each])
        for name, each in judged.items()
        if each.any()
    }


def _draw_calibration(axes: Axes, groups: Mapping[str, Reliability], noun: str) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=DASHES)
    for name, bins in groups.items():
        how: Any = {"color": BLUE, "marker": "s"} if name == "selected" else {"color": MUTED, "marker": "o"}
        filled = bins.count > 0
        x, y, count = (each[filled].numpy() for each in (bins.confidence, bins.accuracy, bins.count))
        axes.plot(x, y, lw=0.8, alpha=0.5, color=how["color"])  # thin: a bin may hold one sample
        axes.scatter(x, y, 15 + 200 * count / count.sum(), lw=0, zorder=3, clip_on=False, **how)
        axes.plot([], [], ms=6, lw=0, label=f"{name}: ECE {ece(bins):.3f}", **how)
    _title(axes, "Is the confidence right?", f"Perfect on the dashed line. Larger points are more {noun}s")
    _legend(axes)
    if not groups:
        axes.text(0.5, 0.5, "No label can be checked", ha="center", color=MUTED, backgroundcolor="white")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.grid(color=RULE)


def _draw_plane(axes: Axes, pseudo_labels: PseudoLabels, truth: Tensor, cfg: Config, *, multi: bool) -> None:
    tau, kappa = cfg.select.tau_p, cfg.select.kappa_p
    finite = np.flatnonzero(pseudo_labels.label >= 0)
    drawn = finite
    if len(finite) > MOST_POINTS:
        drawn = np.random.default_rng(0).choice(finite, MOST_POINTS, replace=False)
    x, y = pseudo_labels.confidence.numpy()[drawn], pseudo_labels.std.numpy()[drawn]
    known = truth.numpy()[drawn] >= 0
    correct = (pseudo_labels.label == truth).numpy()[drawn]

    left = min(x.min(initial=1), tau) - 0.03
    top = 1.08 * max(y.max(initial=0), 1.4 * kappa if math.isfinite(kappa) else 0, 0.02)
    axes.fill_between([tau, 1.02], 0, min(kappa, top), color=BLUE, alpha=0.09, lw=0)
    axes.axvline(tau, color=INK, lw=1)
    if tau - left < 0.75 * (1.02 - left):
        _note(axes, f"tau_p = {tau:g}", (tau, top), (5, -5), va="top")
    else:
        _note(axes, f"tau_p = {tau:g}", (tau, top), (-5, -5), va="top", ha="right")
    if math.isfinite(kappa):
        axes.axhline(kappa, color=INK, lw=1)
        _note(axes, f"kappa_p = {kappa:g}", (left, kappa), (5, 4), zorder=4)
    right, wrong = ("is of the class", "is not") if multi else ("correct", "wrong")
    groups = [
        ("truth unknown", ~known, MUTED, "o", 9, 0.45),
        (right, known & correct, BLUE, "o", 9, 0.45),
        (wrong, known & ~correct, VERMILION, "X", 22, 0.9),
    ]
    for name, members, color, marker, size, alpha in groups:
        if members.any():
            dots: Any = {"color": color, "marker": marker, "alpha": alpha, "lw": 0, "clip_on": False}
            axes.scatter(x[members], y[members], size, label=name, **dots)
    sampled = len(drawn) < len(finite)
    of = "pair" if multi else cfg.noun
    points = f"{MOST_POINTS:,} of {len(finite):,} {of}s" if sampled else f"One point per {of}"
    _title(axes, "Confidence and uncertainty", f"{points}. The tinted corner passes both limits")
    _legend(axes)
    axes.set(xlim=(left, 1.02), ylim=(0, top))
    spread = "std over the passes" if cfg.select.passes > 1 else "std: 0, as there is one pass"
    axes.set(xlabel="confidence: mean probability of the label", ylabel=spread)
