"""What a run leaves for people: pseudo_labels.csv, report.png and report.html.

All of it comes from the rows of the rounds and from the last labeling. Where the truth of unlabeled images
is not known (-1), what would need it is left out, and the report says so.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor

from ups_fast import config_file
from ups_fast.checkpoint import BEST
from ups_fast.config import Config
from ups_fast.data.cells import csv_line, write_cell
from ups_fast.data.classes import uneven
from ups_fast.files import write_atomic
from ups_fast.reference import Selection, unpack_mask
from ups_fast.selection import PseudoLabels, Reliability, ece, interval, recall, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]  # one mapping per round, as in metrics.jsonl

# Blue and vermilion (Okabe and Ito) differ for every kind of color vision, and in a gray print.
BLUE, VERMILION, GREEN, PALE = "#0072B2", "#D55E00", "#008F6B", "#C9D1D9"
INK, MUTED, RULE = "#1F2933", "#616E7C", "#E4E7EB"
DASHES = (0, (4, 3))
MOST_POINTS = 6000  # of the plane: further ones would only lie on top of each other


def write_pseudo_labels(
    path: str | Path,
    pseudo_labels: PseudoLabels,  # U samples, on the CPU
    classes: Sequence[str],  # C names
    *,
    first: int = 0,  # the training set's index that counts as 0
    names: Sequence[str] | None = None,  # [N] the file of each training image
) -> None:
    """Writes one line per unlabeled sample, in columns:

    index       its place in the training set; of one's own arrays, in x_unlabeled
    label       number of the class, -1 where the network gave no finite answer or the image could not be read
    confidence  mean probability of the label over the passes; nan for label -1
    std         standard deviation of that probability; nan for label -1
    positive    1 if the label is trusted, else 0
    negative    numbers of the classes that it surely is not, separated by spaces
    name        the label's class name
    path        the image's file, where it has one, as in the folder or table that was read

    A name or path that a spreadsheet would run as a formula begins with an apostrophe more; `scan` takes it away again.
    """
    table = io.StringIO(newline="")
    columns = ["index", "label", "confidence", "std", "positive", "negative", "name"]
    write = label_table(table, [*columns, "path"] if names else columns)
    for index, row in zip(pseudo_labels.index.tolist(), label_rows(pseudo_labels, classes), strict=True):
        write({**row, "index": str(index - first), "path": names[index] if names else ""})
    # A file's name may be no text.
    write_atomic(Path(path), table.getvalue().encode("utf-8", "surrogateescape"))


def label_table(file: TextIO, columns: Sequence[str]) -> Callable[[Mapping[str, str]], None]:
    """Begins a table of labels and returns what writes a row by the names of its columns."""
    file.write(csv_line(columns))

    def write(row: Mapping[str, str]) -> None:
        # Numbers are the table's own and stay numbers: -1 is no formula.
        text = ("name", "path", "error")
        file.write(csv_line(write_cell(row[name]) if name in text else row[name] for name in columns))

    return write


def label_rows(found: PseudoLabels | Selection, classes: Sequence[str]) -> Iterator[dict[str, str]]:
    """Of each sample the columns of `write_pseudo_labels` that a network's answer gives."""
    columns = zip(
        found.label.tolist(),
        found.confidence.numpy(),  # float32 prints as few digits as give the same number back
        found.std.numpy(),
        found.positive.int().tolist(),
        unpack_mask(found.negative, len(classes)).numpy(),
        strict=True,
    )
    for label, confidence, std, positive, negative in columns:
        yield {
            "label": str(label),
            "confidence": str(confidence),
            "std": str(std),
            "positive": str(positive),
            "negative": " ".join(map(str, np.flatnonzero(negative))),
            "name": classes[label] if label >= 0 else "",
        }


def write_report(
    run_dir: str | Path,
    rows: Rows,
    pseudo_labels: PseudoLabels,  # of the last round: U samples, on the CPU
    truth: Tensor | None,  # int64 [U], -1 where unknown; None: all unknown
    cfg: Config,
    classes: Sequence[str],  # C names
    *,
    labeled: int | None = None,  # how many images; None: as the config says
    class_labels: Sequence[int] | None = None,  # [C] labeled images of each class; None: not known
    class_tests: Sequence[int] | None = None,  # [C] test images likewise
    notes: Sequence[str] = (),  # sentences on the data, such as one for each damaged file
) -> tuple[Path, Path]:
    """Writes report.png and report.html into `run_dir`, replacing earlier ones, and returns their paths."""
    truth = torch.full_like(pseudo_labels.label, -1) if truth is None else truth
    image = io.BytesIO()
    labeled = cfg.data.n_labels if labeled is None else labeled
    draw(rows, pseudo_labels, truth, cfg, labeled).savefig(image, format="png", dpi=144)
    png, page = Path(run_dir) / "report.png", Path(run_dir) / "report.html"
    write_atomic(png, image.getvalue())
    table = _class_table(rows[-1], pseudo_labels, truth, classes, class_labels, class_tests)
    if class_labels and (note := uneven(classes, class_labels)):
        notes = [note, *notes]
    text = _page(rows, pseudo_labels, truth, cfg, classes, notes, image.getvalue(), table)
    write_atomic(page, text.encode("utf-8", "replace"))
    return png, page


# The picture --------------------------------------------------------------------------------------


def draw(rows: Rows, pseudo_labels: PseudoLabels, truth: Tensor, cfg: Config, labeled: int) -> Figure:
    """The four panels as a matplotlib figure; arguments as in `write_report`."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
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
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 9.2), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, left=0.06, right=0.975, top=0.81, bottom=0.06, wspace=0.19, hspace=0.5
        )
        accuracy, counts, calibration, plane = (figure.add_subplot(grid[i]) for i in range(4))
        figure.text(0.06, 0.95, headline(rows, cfg), fontsize=17, fontweight="bold", parse_math=False)
        figure.text(0.06, 0.918, _subline(pseudo_labels, cfg, labeled), fontsize=11, color=MUTED)
        _draw_accuracy(accuracy, rows, any_known=bool((truth >= 0).any()))
        _draw_counts(counts, rows, len(pseudo_labels.index), all_known=bool((truth >= 0).all()))
        _draw_calibration(calibration, _bins(rows[-1], pseudo_labels, truth))
        _draw_plane(plane, pseudo_labels, truth, cfg)
    return figure


def headline(rows: Rows, cfg: Config) -> str:
    """The result in a line, such as "digits: test accuracy 88.9 % → 96.4 % in 6 rounds"."""
    name = Path(cfg.data.root).stem if cfg.data.name in ("npz", "folder") else cfg.data.name
    first, last = rows[0]["test_acc"], rows[-1]["test_acc"]
    if len(rows) == 1:
        return f"{name}: test accuracy {_percent(last)} after one round"
    return f"{name}: test accuracy {_percent(first)} → {_percent(last)} in {len(rows)} rounds"


def _subline(pseudo_labels: PseudoLabels, cfg: Config, labeled: int) -> str:
    return (
        f"{labeled:,} labeled and {len(pseudo_labels.index):,} unlabeled images, {cfg.model.name}, seed {cfg.seed}. "
        f"Round 0 trained on the labeled images alone."
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


def _draw_accuracy(axes: Axes, rows: Rows, *, any_known: bool) -> None:
    curves = [
        ("test set", "test_acc", BLUE, "-o"),
        ("positive pseudo-labels", "positive_acc", GREEN, "--s"),
        ("negative pseudo-labels", "negative_acc", MUTED, ":^"),
    ]
    for name, key, color, line in curves:
        points = [(row["round"], 100 * row[key]) for row in rows if row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=color, ms=5, lw=2, label=name)
    low, high = axes.get_ylim()
    low = min(low, high - 4)  # no drama where there is one round
    # Room for the numbers below the first and last point, and for half a marker at 100.
    axes.set_ylim(low - 0.1 * (high - low), min(high, 100 + 0.03 * (high - low)))
    for row in [row for row in (rows[0], rows[-1])[: len(rows)] if row["test_acc"] is not None]:
        value = 100 * row["test_acc"]
        _note(axes, f"{value:.1f}", (row["round"], value), (0, -15), ha="center", weight="bold", color=BLUE)
    unknown = "" if any_known else ". The true classes of unlabeled images are not known"
    _title(axes, "Accuracy by round", f"Correct answers in percent{unknown}")
    _legend(axes)
    _by_round(axes, rows)


def _draw_counts(axes: Axes, rows: Rows, unlabeled: int, *, all_known: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    rounds = [row["round"] for row in rows]
    positives = np.array([row["positives"] for row in rows])
    others = np.array([row["negative_samples"] for row in rows])
    if all_known:
        right = np.array([round(row["positives"] * (row["positive_acc"] or 0)) for row in rows])
        axes.bar(rounds, right, 0.7, color=BLUE, label="positive, correct")
        axes.bar(rounds, positives - right, 0.7, bottom=right, color=VERMILION, label="positive, wrong")
    else:
        axes.bar(rounds, positives, 0.7, color=BLUE, label="positive")
    axes.bar(rounds, others, 0.7, bottom=positives, color=PALE, label="negative classes only")
    axes.axhline(unlabeled, color=INK, lw=1, ls=DASHES)
    _title(axes, "What was selected", "Unlabeled images that a next round would train on")
    _legend(axes)
    _by_round(axes, rows)
    _note(axes, f"all {unlabeled:,}", (axes.get_xlim()[1], unlabeled), (0, 3), ha="right")
    axes.set_ylim(0, 1.1 * max(unlabeled, 1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _bins(row: Mapping[str, Any], pseudo_labels: PseudoLabels, truth: Tensor) -> dict[str, Reliability]:
    """How far confidence is deserved, by groups of images: of unlabeled ones, or else of test images."""
    if not (truth >= 0).any():
        found = row.get("test_bins") or {}
        names = {"all": "all test images", "selected": "selected"}
        return {names[key]: Reliability(*torch.tensor(found[key]).T) for key in names if found.get(key)}
    groups = {"all unlabeled": torch.ones_like(pseudo_labels.positive), "selected": pseudo_labels.positive}
    judged = {name: each & (truth >= 0) & (pseudo_labels.label >= 0) for name, each in groups.items()}
    correct = pseudo_labels.label == truth
    return {
        name: reliability(pseudo_labels.confidence[each], correct[each])
        for name, each in judged.items()
        if each.any()
    }


def _draw_calibration(axes: Axes, groups: Mapping[str, Reliability]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=DASHES)
    for name, bins in groups.items():
        how: Any = {"color": BLUE, "marker": "s"} if name == "selected" else {"color": MUTED, "marker": "o"}
        filled = bins.count > 0
        x, y, count = (each[filled].numpy() for each in (bins.confidence, bins.accuracy, bins.count))
        axes.plot(x, y, lw=0.8, alpha=0.5, color=how["color"])  # thin: a bin may hold one image
        axes.scatter(x, y, 15 + 200 * count / count.sum(), lw=0, zorder=3, clip_on=False, **how)
        axes.plot([], [], ms=6, lw=0, label=f"{name}: ECE {ece(bins):.3f}", **how)
    _title(axes, "Is the confidence right?", "Perfect on the dashed line. Larger points are more images")
    _legend(axes)
    if not groups:
        axes.text(0.5, 0.5, "No label can be checked", ha="center", color=MUTED, backgroundcolor="white")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.grid(color=RULE)


def _draw_plane(axes: Axes, pseudo_labels: PseudoLabels, truth: Tensor, cfg: Config) -> None:
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
    groups = [
        ("truth unknown", ~known, MUTED, "o", 9, 0.45),
        ("correct", known & correct, BLUE, "o", 9, 0.45),
        ("wrong", known & ~correct, VERMILION, "X", 22, 0.9),
    ]
    for name, members, color, marker, size, alpha in groups:
        if members.any():
            dots: Any = {"color": color, "marker": marker, "alpha": alpha, "lw": 0, "clip_on": False}
            axes.scatter(x[members], y[members], size, label=name, **dots)
    sampled = len(drawn) < len(finite)
    points = f"{MOST_POINTS:,} of {len(finite):,} images" if sampled else "One point per image"
    _title(axes, "Confidence and uncertainty", f"{points}. The tinted corner passes both limits")
    _legend(axes)
    axes.set(xlim=(left, 1.02), ylim=(0, top))
    spread = "std over the passes" if cfg.select.passes > 1 else "std: 0, as there is one pass"
    axes.set(xlabel="confidence: mean probability of the label", ylabel=spread)


# The page -----------------------------------------------------------------------------------------

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2933; --muted: #52606d; --rule: #d9dee3; --ground: #ffffff; --tint: #f5f7fa;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --muted: #9aa5b1; --rule: #3a444f; --ground: #14181d; --tint: #1e242b; }
}
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 46rem; }
.muted { color: var(--muted); }
img { display: block; width: 100%; margin: 1.5rem 0; border-radius: 8px; background: #ffffff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .8rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { background: var(--tint); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .88rem; }
"""

_READING = """
<li><b>Accuracy by round:</b> the first point is the network trained on the labels alone. Where pseudo-labels help,
 the test curve rises above it.</li>
<li><b>What was selected:</b> the dashed line is all unlabeled images. Good bars grow towards it and show few wrong
 labels.</li>
<li><b>Is the confidence right?</b> On the diagonal, confidence equals accuracy. Below it the network is
 overconfident. The expected calibration error (ECE) is the mean distance.</li>
<li><b>Confidence and uncertainty:</b> labels in the tinted corner pass both limits and are trained on, except for
 those that the class balance leaves out. Few of them should be wrong.</li>
"""


def _page(
    rows: Rows,
    pseudo_labels: PseudoLabels,
    truth: Tensor,
    cfg: Config,
    classes: Sequence[str],
    notes: Sequence[str],
    image: bytes,
    class_table: tuple[list[str], list[list[str]]],
) -> str:
    """The whole of report.html: one file without links to others."""
    title = html.escape(headline(rows, cfg))
    settings = html.escape(config_file.write(asdict(cfg)))
    picture = base64.b64encode(image).decode()
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    wrong = rows[-1].get("test_mistakes") or []
    pairs = [[classes[a], classes[b], f"{n:,}"] for a, b, n in wrong]
    confused = "<h2>Most frequent mistakes on the test images, last round</h2>\n" if wrong else ""
    confused += _table(["is", "labeled as", "images"], pairs) + "\n" if wrong else ""
    data = f"<h2>About the data</h2>\n<ul>{items}</ul>\n" if notes else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{html.escape(_summary(rows, pseudo_labels, truth, cfg))}</p>
<img alt="Charts: accuracy and selected images by round, calibration, confidence against uncertainty"
 src="data:image/png;base64,{picture}">
<h2>How to read the charts</h2>
<ul>{_READING}</ul>
<h2>Rounds</h2>
{_table(*_round_table(rows))}
<h2>Classes, last round</h2>
<p class="muted">Recall is the share of a class's images that get its label. Correct is the share of a class's
 positive pseudo-labels that are right.</p>
{_table(*class_table)}
{confused}{data}<h2>Settings</h2>
<pre>{settings}</pre>
</main>
</body>
</html>
"""


def _summary(rows: Rows, pseudo_labels: PseudoLabels, truth: Tensor, cfg: Config) -> str:
    last, unlabeled = rows[-1], len(pseudo_labels.index)
    kept = f"{last['positives']:,} of {unlabeled:,} unlabeled images have a positive pseudo-label"
    if last["positive_acc"] is not None:
        kept += f", {_percent(last['positive_acc'])} of them correct"
    told = f"{last['negative_samples']:,} others have negative ones"
    if last["negative_acc"] is not None:
        told += f", {_percent(last['negative_acc'])} of which are correct"
    known = int((truth >= 0).sum())
    if known == 0:
        told += ". The true classes of the unlabeled images are not known, so these labels cannot be checked"
        if guess := test_guess(last):
            told += f". {guess}"
    elif known < unlabeled:
        told += f" (checked on the {known:,} images whose true class is known)"
    if last["test_acc"] is None:
        return f"No test image could be read. {kept}; {told}. {_doubts(pseudo_labels, cfg)}"
    step = ""
    if len(rows) > 1 and rows[0]["test_acc"] is not None:
        step = f", {100 * (last['test_acc'] - rows[0]['test_acc']):+.1f} points from round 0"
    right = f"The network is right on {_percent(last['test_acc'])} of the test images{step}."
    return f"{right} {advice(rows, cfg)} {kept}; {told}. {_doubts(pseudo_labels, cfg)}".replace("  ", " ")


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
        "more train.epochs": True,
        "a higher select.tau_p": True,
        "train.warm_start=true with train.later_rounds_lr a third of train.lr": not train.warm_start,
        "a higher train.labeled_repeats": train.labeled_repeats == 1,
        f"select.balance_rounds={train.rounds}": select.balance_rounds < train.rounds,
        "augmentation (data.ops)": not cfg.data.ops,
    }
    help_ = [words for words, open_ in settings.items() if open_]
    best = max(rows, key=lambda row: (row.get("val_acc") or 0, row["round"]))
    kept = "A run with data.val_share keeps the network of the best round, too"
    if (accuracy := best.get("val_acc")) is not None:
        kept = f"{BEST} holds that of round {best['round']}, the best on the validation images ({_percent(accuracy)})"
    if (rows[-1]["test_acc"] or 0) >= (rows[0]["test_acc"] or 0):
        return ""
    return (
        f"The last round is worse than round 0 on the test images. {kept}. What may help: {', '.join(help_)}."
    )


def test_guess(row: Mapping[str, Any]) -> str:
    """A sentence on what the selection does to test images; empty where it was not tried."""
    if (count := row.get("test_positives")) is None:
        return ""
    of_all = sum(each[0] for each in row["test_bins"]["all"])
    right = ""
    if count:
        low, high = interval(row["test_positive_acc"], count)
        share = f"{_percent(row['test_positive_acc'])} of them with the right label"
        right = f", {share} (95 % interval {_percent(low)} to {_percent(high)})"
    took = f"The same thresholds select {count:,} of {of_all:,} test images{right}"
    return f"{took}. This estimates how good the pseudo-labels are"


def _round_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    head = [
        "round",
        "test",
        "positives",
        "correct",
        "negatives",
        "correct",
        "on images",
        "ECE",
        "ECE selected",
        "ECE test, without dropout",
        "time",
    ]
    body = [
        [
            str(row["round"]),
            _percent(row["test_acc"]),
            f"{row['positives']:,}",
            _percent(row["positive_acc"]),
            f"{row['negatives']:,}",
            _percent(row["negative_acc"]),
            f"{row['negative_samples']:,}",
            _decimals(row["ece"]),
            _decimals(row["ece_selected"]),
            _decimals(row.get("test_ece")),
            f"{row['seconds']:.1f} s",
        ]
        for row in rows
    ]
    return head, body


def _class_table(
    row: Mapping[str, Any],  # of the last round
    pseudo_labels: PseudoLabels,
    truth: Tensor,
    classes: Sequence[str],
    labels: Sequence[int] | None,
    tests: Sequence[int] | None,
) -> tuple[list[str], list[list[str]]]:
    """Columns that nothing is known of are left out."""
    n, names = len(classes), range(len(classes))
    positive = [pseudo_labels.positive & (pseudo_labels.label == c) for c in names]
    judged = [truth[each & (truth >= 0)] for each in positive]
    columns: dict[str, Sequence[str]] = {"class": classes, "number": list(map(str, names))}
    if labels is not None:
        columns["labeled"] = [f"{each:,}" for each in labels]
    if tests is not None:
        columns["test images"] = [f"{each:,}" for each in tests]
    if (found := row.get("test_recall")) is not None:
        columns["test recall"] = list(map(_percent, found))
    if bool((truth >= 0).any()):
        columns["unlabeled recall"] = list(map(_percent, recall(pseudo_labels.label, truth, n)))
    columns["positives"] = [f"{int(each.sum()):,}" for each in positive]
    columns["correct"] = [
        _percent(float((each == c).double().mean()) if len(each) else None) for c, each in enumerate(judged)
    ]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def recall_line(row: Mapping[str, Any], classes: Sequence[str], most: int = 10) -> str:
    """The test recall of each class, the lowest first, for a console; empty where it is not known."""
    found = [
        (each, name)
        for each, name in zip(row.get("test_recall") or [], classes, strict=False)
        if each is not None
    ]
    if not found:
        return ""
    lowest = sorted(found, key=lambda each: each[0])[:most]
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    return f"test recall by class, lowest first: {', '.join(f'{n!r} {_percent(r)}' for r, n in lowest)}{more}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(line("td", cells) for cells in body)
    head_line = line("th", head)
    return f'<div class="wide"><table>\n<thead>{head_line}</thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"


def _decimals(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
