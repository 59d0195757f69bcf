"""sweep.html: the best point, all points, and how trials went, on one page made of the lines of sweep.jsonl alone."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ups_fast.report import sweep_figure
from ups_fast.report.gallery import text_table
from ups_fast.report.page import document
from ups_fast.words import many

Record = Mapping[str, Any]  # a line of sweep.jsonl
MOST_POINTS = 100  # rows of the table
MOST_LISTED = 50  # trials that were pruned or have failed
READING = """\
<p class="muted">All shares are in %: mean ± standard deviation over n seeds. <b>val</b>: what points are judged by, the
best share of validation samples that is right, or of several labels the best mAP, over the rounds. <b>test</b>,
<b>unlabeled</b>: the same share of test samples and of all unlabeled ones, in the round that validates best.
<b>right</b>: of the pseudo-labels of that round. <b>seconds</b>: median of a trial.</p>
"""
LUCK = """\
<p class="muted">The best of many points is lucky, too: expect less than its val on new samples. Few validation samples
make it worse.</p>
"""


@dataclass(frozen=True)
class Point:
    """Values of the keys that vary, and what trials with them came to."""

    number: int
    keys: Mapping[str, Any]
    records: Sequence[Record]  # trials that ran to their end
    whole: bool  # all its seeds have

    @property
    def val(self) -> float:
        return statistics.mean(record["val"] for record in self.records)

    @property
    def seed(self) -> int:
        """Of its best trial."""
        return int(max(self.records, key=lambda record: record["val"])["seed"])

    @property
    def said(self) -> str:
        seeds = f" over {many(len(self.records), 'seed')}" if len(self.records) > 1 else ""
        return f"val {spread(self.records, 'val')} %{seeds}"


def points_of(records: Sequence[Record], seeds: int) -> list[Point]:
    """Points with a finished trial, the best first. Those that lack seeds come last."""
    by_point: dict[int, list[Record]] = {}
    for record in records:
        if record["state"] == "done" and record["val"] is not None:
            by_point.setdefault(record["point"], []).append(record)
    found = [Point(number, each[0]["keys"], each, len(each) == seeds) for number, each in by_point.items()]
    return sorted(found, key=lambda point: (not point.whole, -point.val, point.number))


def sweep_page(
    title: str,
    axes: Mapping[str, bool],  # the keys that vary, and whether on a logarithmic scale
    records: Sequence[Record],
    points: Sequence[Point],  # as `points_of` has them
    importance: Mapping[str, float],
    settings: str,  # the base's keys, as YAML
) -> str:
    """The whole page as HTML."""
    body = [f"<p>{html.escape(_summary(records))}</p>\n"]
    if points:
        best = points[0]
        body.append(
            f"<p><b>Best:</b> {html.escape(best.said)}, with {html.escape(keys_of(best.keys) or 'the base')}. "
            "<code>best.yaml</code> has all its keys.</p>\n"
        )
        body.append(LUCK)
    drawn = [record for record in records if record["val_by_round"]]
    if drawn:
        best_trials = {record["trial"] for record in points[0].records} if points else set()
        body.append(_picture(sweep_figure.rounds(drawn, best_trials), "Validation by round"))
    if points and axes:
        picture = sweep_figure.by_key(axes, points, importance)
        body += ["<h2>By key</h2>\n", _importance(importance), _picture(picture, "Validation by key")]
    if points:
        more = f" The best {MOST_POINTS} of {len(points):,}." * (len(points) > MOST_POINTS)
        body += ["<h2>Points</h2>\n", READING.replace("</p>", f"{more}</p>")]
        body += [text_table(*_table(axes, points[:MOST_POINTS])), "\n"]
    for state, what in (("pruned", "Ended early by the pruner"), ("failed", "Failed")):
        body.append(_listed(what, [record for record in records if record["state"] == state]))
    body.append(f"<h2>Settings that do not vary</h2>\n<pre>{html.escape(settings)}</pre>\n")
    return document(html.escape(title), "".join(body))


def keys_of(values: Mapping[str, Any]) -> str:
    """Such as "train.lr=0.0316, select.tau_p=0.6"."""
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def spread(records: Sequence[Record], key: str) -> str:
    """Mean and standard deviation in %; "-" where nothing is known."""
    known = [100 * record[key] for record in records if record.get(key) is not None]
    if not known:
        return "-"
    more = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{more}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _summary(records: Sequence[Record]) -> str:
    states = [record["state"] for record in records]
    counts = [
        f"{states.count(state):,} {state}"
        for state in ("done", "pruned", "failed", "running", "waiting")
        if state in states
    ]
    said = f"{many(len(records), 'trial')}: {', '.join(counts) or 'none'}"
    ran = [record for record in records if "seconds" in record]
    if ran:
        made = sorted({f"ups_fast {record['ups_fast']}, torch {record['torch']}" for record in ran})
        minutes = sum(record["seconds"] for record in ran) / 60
        said += f"; {minutes:,.1f} minutes of training and labeling in all. {'; '.join(made)}"
    return f"{said}."


def _table(axes: Mapping[str, bool], points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Columns of which nothing is known are left out."""
    every = [record for point in points for record in point.records]
    known = [
        name
        for name in ("val", "test", "unlabeled", "right")
        if any(record.get(name) is not None for record in every)
    ]
    body = [
        [
            f"{point.number}",
            *(_short(point.keys.get(key, "-")) for key in axes),
            *(spread(point.records, name) for name in known),
            str(len(point.records)),
            f"{statistics.median(record['seconds'] for record in point.records):,.1f}",
        ]
        for point in points
    ]
    return ["point", *axes, *known, "n", "seconds"], body


def _importance(importance: Mapping[str, float]) -> str:
    if not importance:
        return ""
    said = ", ".join(f"{html.escape(key)} {100 * share:.0f} %" for key, share in importance.items())
    return f'<p class="muted">Share of the spread that each key explains (fANOVA): {said}.</p>\n'


def _listed(what: str, records: Sequence[Record]) -> str:
    if not records:
        return ""
    items = []
    for record in records[:MOST_LISTED]:
        keys = ", ".join(filter(None, (keys_of(record["keys"]), f"seed={record['seed']}")))
        rounds = len(record["val_by_round"])
        best = "" if record["val"] is None else f"after round {rounds - 1}, val {percent(record['val'])} %"
        text = html.escape(record.get("error") or best)
        items.append(f"<li>{record['trial']}: {text} <span class='muted'>[{html.escape(keys)}]</span></li>")
    more = f"<li>and {len(records) - MOST_LISTED:,} more</li>" * (len(records) > MOST_LISTED)
    return f"<h2>{what}</h2>\n<ul>{''.join(items)}{more}</ul>\n"


def _picture(svg: str, what: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/svg+xml;base64,{data}">\n'
