"""What a sweep has come to: a line for each trial, the best config, and the page."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from ups_fast import config_file
from ups_fast.files import read_bytes, write_atomic
from ups_fast.report.sweep_page import Point, Record, keys_of, percent, points_of, sweep_page
from ups_fast.sweep_storage import Entry, Plan
from ups_fast.words import many

PAGE, RECORDS, BEST = "sweep.html", "sweep.jsonl", "best.yaml"
FEW_FOR_IMPORTANCE = 8  # points
_STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def records_of(plan: Plan, entries: Sequence[Entry]) -> list[Record]:
    """Lines of sweep.jsonl: plain values."""
    return [
        {
            "trial": f"{entry.index:04d}",
            "point": plan.point_of(entry.index)[0],
            "keys": entry.values,
            "seed": entry.seed,
            "state": _STATES[entry.state],
            "val": entry.score,
            "val_by_round": [entry.curve[round] for round in sorted(entry.curve)],
            **({"error": entry.notes["error"]} if "error" in entry.notes else {}),
            **entry.notes.get("numbers", {}),
        }
        for entry in entries
    ]


def line_of(plan: Plan, entry: Entry) -> str:
    """A trial that has ended, for the terminal."""
    (record,) = records_of(plan, [entry])
    said = record["state"]
    if "error" in record:
        said = f"failed: {record['error']}"
    elif record["val"] is not None:
        test = "" if record.get("test") is None else f", test {percent(record['test'])} %"
        stopped = f"pruned after round {len(record['val_by_round']) - 1}, " * (said == "pruned")
        said = f"{stopped}val {percent(record['val'])} %{test} ({record.get('seconds', 0):.0f} s)"
    keys = ", ".join(filter(None, (keys_of(entry.values), f"seed={entry.seed}")))
    return f"{record['trial']}  {said}  [{keys}]"


def write(plan: Plan, records: Sequence[Record], study: optuna.Study) -> list[str]:
    """Writes sweep.jsonl, best.yaml and sweep.html, and returns what there is to say of them."""
    space = plan.space
    write_atomic(space.folder / RECORDS, "".join(json.dumps(record) + "\n" for record in records).encode())
    points = points_of(records, len(space.seeds))
    settings = asdict(space.first)
    for key in ("run_dir", "seed"):  # of each trial its own
        del settings[key]
    page = sweep_page(
        f"Sweep {space.folder.name}",
        {axis.key: axis.log for axis in space.axes},
        records,
        points,
        _importance(space.axes, points, study),
        config_file.write(settings),
    )
    write_atomic(space.folder / PAGE, page.encode("utf-8", "replace"))
    said = [f"page: {space.folder / PAGE}"]
    if failed := [record for record in records if record["state"] == "failed"]:
        said.insert(
            0, f"{many(len(failed), 'trial')} failed, such as {failed[0]['trial']}: {failed[0]['error']}"
        )
    if points:
        said.insert(0, f"best: {points[0].said} {keys_of(points[0].keys)}".rstrip())
        said.append(_write_best(plan, points[0]))
    return said


def _write_best(plan: Plan, best: Point) -> str:
    """Writes best.yaml, but not over what the user has made of it, and returns what there is to say of it."""
    path = plan.space.folder / BEST
    if path.exists() and not _is_ours(path):
        return (
            f"{path} was changed by hand and stays as it is: rename it, and the same command writes a new one"
        )
    cfg = replace(plan.space.make(best.keys, best.seed), run_dir="")
    text = f"# The best point of a sweep: {best.said}\n{config_file.write(asdict(cfg))}"
    write_atomic(path, (text + _seal(text)).encode())
    return f"to run it: python -m ups_fast.train {path}"


def _seal(text: str) -> str:
    """The last line of best.yaml, by which a later command sees that nobody has changed it."""
    return f"# as it was written: {hashlib.sha256(text.encode()).hexdigest()[:16]}\n"


def _is_ours(path: Path) -> bool:
    try:
        *lines, last = read_bytes(path, config_file.LARGEST).decode().splitlines(keepends=True)
        return last == _seal("".join(lines))
    except (OSError, ValueError):
        return False


def _importance(axes: Sequence[Any], points: Sequence[Point], study: optuna.Study) -> Mapping[str, float]:
    """Each key's share of the spread of results, by Optuna's fANOVA; nothing for few points."""
    if len(axes) < 2 or len(points) < FEW_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError, ImportError):  # all results are equal, or there is no scikit-learn
            return {}
