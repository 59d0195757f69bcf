"""Pictures of a sweep: validation by round of each trial, and of each point by each key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ups_fast.report.figure import MUTED, RULE
from ups_fast.report.study_figure import COLORS, figure_of, svg_of, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ups_fast.report.sweep_page import Point

MOST_CURVES = 200
MOST_KEYS = 6
COLUMNS = 3
BEST, PRUNED = COLORS[0], COLORS[1]


def rounds(records: Sequence[Mapping[str, Any]], best: set[str]) -> str:
    """Share of validation samples by round, a curve for each trial, as SVG. Trials of the best point stand out."""
    with figure_of(1) as (figure, (axes,)):
        for record in sorted(records[:MOST_CURVES], key=lambda record: record["trial"] in best):
            curve = [100 * share for share in record["val_by_round"]]
            mine = record["trial"] in best
            how: dict[str, Any] = {"color": BEST if mine else MUTED, "lw": 2.0 if mine else 1.0}
            axes.plot(curve, **how, alpha=1.0 if mine else 0.35, marker="o", ms=4 if mine else 2.5)
            if record["state"] == "pruned":
                axes.plot([len(curve) - 1], curve[-1:], color=PRUNED, marker="X", ms=6, ls="none")
        axes.plot([], [], color=BEST, marker="o", lw=2.0, label="best point")
        if any(record["state"] == "pruned" for record in records):
            axes.plot([], [], color=PRUNED, marker="X", ls="none", label="pruned")
        axes.plot([], [], color=MUTED, marker="o", ms=2.5, alpha=0.5, label="others")
        axes.legend(loc="lower right", frameon=False)
        longest = max(len(record["val_by_round"]) for record in records)
        axes.set_xticks(range(0, longest, -(-longest // 20)))
        axes.set_xlabel("round")
        titled(axes, "Validation by round", "% of the validation samples")
        return svg_of(figure)


def by_key(axes: Mapping[str, bool], points: Sequence[Point], importance: Mapping[str, float]) -> str:
    """The mean of each point by each of its keys, the most important first, as SVG. Bars are standard deviations."""
    keys = sorted(axes, key=lambda key: -importance.get(key, 0.0))[:MOST_KEYS]
    with figure_of(COLUMNS, -(-len(keys) // COLUMNS)) as (figure, panels):
        for panel in panels[len(keys) :]:
            panel.set_visible(False)
        for panel, key in zip(panels, keys, strict=False):
            known = [point for point in points if key in point.keys]
            _points(panel, key, known, log=axes[key])
            share = f", {100 * importance[key]:.0f} % of the spread" if key in importance else ""
            titled(panel, key, f"validation, %{share}")
        return svg_of(figure)


def _points(axes: Axes, key: str, points: Sequence[Point], *, log: bool) -> None:
    values = [point.keys[key] for point in points]
    words = list(dict.fromkeys(str(value) for value in values))
    listed = any(isinstance(value, str) for value in values)
    if listed:
        words.sort(key=_number)
        at: list[float] = [words.index(str(value)) for value in values]
        axes.set_xticks(range(len(words)), words)
        axes.set_xlim(-0.5, len(words) - 0.5)
    else:
        at = [float(value) for value in values]
        if log:
            _log(axes)
    for place, point in zip(at, points, strict=True):
        best = point is points[0]
        shares = [100 * record["val"] for record in point.records]
        mean = sum(shares) / len(shares)
        error = math.sqrt(sum((x - mean) ** 2 for x in shares) / (len(shares) - 1)) if len(shares) > 1 else 0
        how: dict[str, Any] = {"color": BEST if best else MUTED, "zorder": 3 if best else 2}
        axes.errorbar(
            [place], [mean], [error] if error else None, marker="o", ms=7 if best else 4.5,
            alpha=1.0 if best else 0.6, lw=1.0, capsize=2, **how,
        )  # fmt: skip
    axes.grid(axis="y", color=RULE)


def _log(axes: Axes) -> None:
    """A logarithmic scale with few plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _number(word: str) -> tuple[int, float, str]:
    try:
        return 0, float(word), word
    except ValueError:
        return 1, 0.0, word
