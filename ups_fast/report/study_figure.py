"""Pictures of a study: what limits on confidence and uncertainty keep, what was trained, and where labels are wrong."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ups_fast.calibration import KAPPAS, SHARES, TAUS
from ups_fast.report.figure import INK, MUTED, RULE, STYLE
from ups_fast.state import headline_of, task_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]  # a line of study.jsonl
# Okabe and Ito's colors that are dark enough for lines on white. Markers tell the curves apart without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5195", "#8C6D1F", "#56B4E9")
MARKERS = "os^DvPX"
MOST_CURVES, MOST_CELLS = 7, 6
FEW = 5  # labels of a cell say little
_STYLE: Any = {
    **STYLE,
    "font.size": 9.5,
    "legend.handlelength": 2.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "study",  # the same picture is the same file
}


def curves(variants: Mapping[str, Sequence[Record]], base: str = "") -> str:
    """What other limits would keep, as SVG: a curve for each variant, the mean over its seeds. "" without truth.

    base  the variant that looks the same in every picture
    """
    shown = {name: found for name, found in variants.items() if any(each["by_confidence"] for each in found)}
    shown = dict(list(shown.items())[:MOST_CURVES])
    if not shown:
        return ""
    with figure_of(3) as (figure, (kappa, tau, share)):
        styles = iter(zip(COLORS, MARKERS, strict=True))
        for name, found in shown.items():
            color, marker = (INK, "*") if name == base else next(styles)
            how: dict[str, Any] = {
                "color": color,
                "marker": marker,
                "ms": 9 if name == base else 4.5,
                "lw": 1.5,
            }
            for axes, key in ((kappa, "by_kappa"), (tau, "by_tau")):
                axes.plot([_mean([each[key][i][2] for each in found]) for i in range(len(KAPPAS))], **how)
            rows = np.array([each["by_confidence"] for each in found if each["by_confidence"]])
            share.plot(100 * np.array(SHARES), 100 * rows.mean(0), color=color, lw=1.5, alpha=0.7)
            at = _mean([each["positives"] / each["unlabeled"] for each in found])
            right = _mean([each["positive_acc"] for each in found])
            share.plot(
                [at],
                [right],
                color=color,
                marker=marker,
                ms=13 if name == base else 9,
                mec="white",
                ls="none",
            )
            kappa.plot([], [], label=name, **how)
        _ticks(kappa, [*(f"{each:g}" for each in KAPPAS[:-1]), "none"], "kappa_p: largest std that is kept")
        _ticks(tau, [f"{each:g}" for each in TAUS], "tau_p: least confidence that is kept")
        titled(kappa, "Calibration error by kappa", "ECE % of what the limit would keep at tau_p")
        titled(tau, "Calibration error by tau", "ECE % of what the limit would keep at kappa_p")
        titled(share, "Accuracy by share", "Right % of the most confident labels")
        for axes in (kappa, tau):
            axes.set_ylim(bottom=0)
        share.set(xlim=(0, 102), xlabel="share of the unlabeled samples that is kept, %")
        _legend(figure, kappa)
        return svg_of(figure)


def trained(key: str, points: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """Results over the values of a key, each value trained, as SVG: means with standard deviations."""
    with figure_of(3) as (figure, panels):
        what = (
            ("test", f"Test {task_in(points[0][1][0]).word}", "%"),
            ("positive_acc", "Right labels", "% of the positives"),
            ("ece_selected", "Calibration error", "ECE of the positives, %"),
        )
        for axes, (name, title, note) in zip(panels, what, strict=True):
            values = [[headline_of(r) if name == "test" else r[name] for r in found] for _, found in points]
            each = [[100 * value for value in some if value is not None] for some in values]
            known = [i for i, values in enumerate(each) if values]
            means = [statistics.mean(each[i]) for i in known]
            spread = [statistics.stdev(each[i]) if len(each[i]) > 1 else 0.0 for i in known]
            axes.errorbar(known, means, spread, color=COLORS[0], marker="o", ms=5, lw=1.5, capsize=3)
            _ticks(axes, [value for value, _ in points], key)
            titled(axes, title, note)
        return svg_of(figure)


def cells(variants: Mapping[str, Sequence[Record]]) -> str:
    """Wrong labels by confidence and std, all seeds together, as SVG. "" where no truth is known."""
    from matplotlib.colors import LinearSegmentedColormap

    sums = {
        name: np.sum([each["cells"] for each in found], axis=0) for name, found in variants.items() if found
    }
    sums = {name: each for name, each in sums.items() if each[..., 0].any()}
    sums = dict(list(sums.items())[:MOST_CELLS])
    if not sums:
        return ""
    colors = LinearSegmentedColormap.from_list("errors", ["#F5F7FA", "#F4B183", "#D55E00", "#6B2F00"])
    edges = ["0", *(f"{each:g}" for each in KAPPAS[:-1]), "inf"]
    first = next(c for c in range(10) if any(each[:, c, 0].any() for each in sums.values()))
    with figure_of(3, -(-len(sums) // 3)) as (figure, panels):
        for axes in panels[len(sums) :]:
            axes.set_visible(False)
        for axes, (name, found) in zip(panels, sums.items(), strict=False):
            n, wrong = found[:, first:, 0], found[:, first:, 1]
            share = np.where(n > 0, wrong / np.maximum(n, 1), np.nan)
            shade = np.where(n < FEW, np.nan, share)
            axes.pcolormesh(shade, cmap=colors, vmin=0, vmax=1, edgecolor="white", lw=1)
            for y, x in zip(*np.nonzero(n), strict=True):
                ink = MUTED if n[y, x] < FEW else "white" if share[y, x] > 0.4 else INK
                text = f"{100 * share[y, x]:.0f}"
                axes.text(x + 0.5, y + 0.42, text, ha="center", va="center", fontsize=7.5, color=ink)
            axes.set_xticks(range(11 - first), [f"{c / 10:g}" for c in range(first, 11)])
            axes.set_yticks(range(8), edges)
            axes.tick_params(length=0, pad=5)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set(xlabel="confidence", ylabel="std over the passes")
            axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
        return svg_of(figure)


@contextmanager
def figure_of(columns: int, rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 3.5 * rows + 0.3), facecolor="white", layout="constrained")
        yield figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _mean(values: Sequence[float | None]) -> float:
    """In %; NaN where nothing is known, which leaves a gap in a curve."""
    known = [100 * value for value in values if value is not None]
    return statistics.mean(known) if known else math.nan


def titled(axes: Axes, title: str, note: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9, color=MUTED)
    axes.grid(axis="y", color=RULE)


def _ticks(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.3, len(names) - 0.7)
    axes.set_xlabel(label)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=4)


def svg_of(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
