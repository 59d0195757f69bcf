"""Do suspicious labels turn out to be those that experts doubt? Average precision, on photographs of solar cells.

Some cells are drawn, and their labels are given: the experts' probability of a defect, rounded. Where it was 1/3 or
2/3, they doubted. Each score ranks the same labels by the same cross-validation, `ups_fast.review.suspicion`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from benchmarks import record
from ups_fast.review import Suspects, suspicion

COUNTS = (200, 400, 600)
SCORES: dict[str, Callable[[Suspects], np.ndarray]] = {
    "suspects": lambda found: found.p_likely - found.p_given,
    "1 - p of the given label": lambda found: 1 - found.p_given,
    "1 - p of the likely label": lambda found: 1 - found.p_likely,
}


def measure(x: np.ndarray, p: np.ndarray, count: int, score: str, seed: int) -> dict[str, Any]:
    """Of features [n, d] and probabilities of a defect [n], so many are drawn."""
    drawn = np.random.default_rng(seed).permutation(len(p))[:count]
    doubtful = (p[drawn] > 0) & (p[drawn] < 1)
    found = suspicion(x[drawn], (p[drawn] > 0.5).astype(np.int64), seed)
    return {
        "average_precision": float(average_precision_score(doubtful, SCORES[score](found))),
        "chance": float(doubtful.mean()),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and deviation of the average precision in %, and what an order by chance has."""

    def row(name: str, key: str, runs: list[dict[str, Any]]) -> list[str]:
        many = [[100 * run[key] for run in runs if run["labels"] == count] for count in COUNTS]
        cells = [f"{statistics.mean(x):.1f} ± {statistics.stdev(x):.1f}" if len(x) > 1 else "" for x in many]
        return [name, *cells]

    runs = {score: [line for line in lines if line["method"] == score] for score in SCORES}
    body = [row(score, "average_precision", runs[score]) for score in SCORES]
    body.append(row("by chance", "chance", runs["suspects"]))
    return record.grid(["given labels", *map(str, COUNTS)], body)
