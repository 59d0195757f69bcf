"""What a limit on uncertainty does to the labels that are kept: a table and a picture of docs/results.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import record

KAPPAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, float("inf"))
# Okabe and Ito's colors that are dark enough for lines on white. Markers tell the curves apart without color.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"))
TITLES = ("Right, % of the labels that are kept", "Calibration error (ECE) of these, %")
Means = dict[str, list[list[float]]]  # set -> by kappa: kept, right, ECE, all in %; NaN where nothing is kept


def means(lines: list[dict[str, Any]], fewest: dict[str, int]) -> Means:
    """Of UPS over the seeds. `fewest`: the labels of a class, by set."""
    found: Means = {}
    for name, count in fewest.items():
        key = {"set": name, "labels": count, "method": "UPS"}
        if runs := [line for line in lines if key.items() <= line.items()]:
            found[name] = [
                [
                    100 * statistics.mean(run["by_kappa"][at][0] / run["unlabeled"] for run in runs),
                    *(_mean([run["by_kappa"][at][i] for run in runs]) for i in (1, 2)),
                ]
                for at in range(len(KAPPAS))
            ]
    return found


def _mean(values: list[float | None]) -> float:
    known = [100 * value for value in values if value is not None]
    return statistics.mean(known) if known else float("nan")


def table(found: Means) -> str:
    body = [
        [
            name,
            *(f"{kept:.0f} / {right:.1f} / {error:.1f}".replace("nan", "-") for kept, right, error in rows),
        ]
        for name, rows in found.items()
    ]
    return record.grid(["kappa", *(f"{kappa:g}" for kappa in KAPPAS)], body)


def draw(found: Means, path: Path) -> None:
    """Two panels over kappa, with a curve for each set."""
    figure = Figure(figsize=(9.5, 4.2), facecolor="white", layout="constrained")
    for axes, column, title in zip(figure.subplots(1, 2), (1, 2), TITLES, strict=True):
        for (name, rows), (color, marker) in zip(found.items(), STYLES, strict=False):
            axes.plot([row[column] for row in rows], color=color, marker=marker, markersize=5, label=name)
        axes.set_xticks(range(len(KAPPAS)), [*(f"{kappa:g}" for kappa in KAPPAS[:-1]), "no limit"])
        axes.set_xlabel("kappa: the largest standard deviation that is kept")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="y", color="#E4E7EB")
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    axes.set_ylim(bottom=0)  # of the errors
    figure.savefig(path, dpi=100)
