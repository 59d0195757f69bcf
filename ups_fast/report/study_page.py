"""study.html: the tables and pictures of many trials on one page, made of the lines of study.jsonl alone."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ups_fast.report import study_figure
from ups_fast.report.gallery import text_table
from ups_fast.report.page import document
from ups_fast.report.study_figure import FEW, MOST_CURVES, Record
from ups_fast.state import task_in
from ups_fast.tasks import MULTI
from ups_fast.words import many

# Of a table the columns: their titles, and the share in % that they show.
COLUMNS = {
    "test": "test_acc",
    "test mAP": "test_map",
    "unlabeled": "unlabeled_acc",
    "unlabeled mAP": "unlabeled_map",
    "selected": "positives",
    "right": "positive_acc",
    "negatives right": "negative_acc",
    "ECE": "ece",
    "ECE selected": "ece_selected",
}
READING = """\
<p class="muted">All numbers are in %: mean ± standard deviation over n seeds, of the last round.
<b>test</b>: accuracy on test samples. <b>unlabeled</b>: share of all unlabeled samples whose label is right.
<b>selected</b>: share of them that is selected as positive; <b>right</b>: share right of these.
<b>negatives right</b>: share of the negative classes that the sample truly is not.
<b>ECE</b>: calibration error of all labels, and of the selected ones. <b>seconds</b>: median of a trial.</p>
"""
PAIRS = """\
<p class="muted">Where samples have several labels, <b>mAP</b> is the mean over the classes of average precision,
and all else counts pairs of sample and class: a pair is right where the sample is of the class.</p>
"""
WOULD = """What other limits would keep of the last labeling, without new training. Large marks on the right:
what was selected, above the curve if uncertainty finds better labels than confidence alone."""
CELLS = """\
<h2>Where labels are wrong</h2>
<p class="muted">Of the labels in each cell of confidence and uncertainty the share that is wrong, in %, of all seeds
together. Cells of fewer than {few} labels are pale, and empty ones have none. The variants are those of the first
table.</p>
"""


@dataclass(frozen=True)
class Table:
    """A table of the page: its variants by name, and where they list values of a key, that key and those values."""

    title: str
    variants: Sequence[str]
    key: str = ""
    values: Mapping[str, str] = field(default_factory=dict)  # by variant, in the order of the picture


def study_page(
    title: str,
    tables: Sequence[Table],
    keys: Mapping[str, Mapping[str, object]],  # of each variant what it changes
    records: Sequence[Record],  # lines of study.jsonl
    settings: str,  # the base's keys, as YAML
) -> str:
    """The whole page as HTML. A trial whose line has "error" counts in no mean, and is listed."""
    good = [each for each in records if "error" not in each]
    by_variant = {name: [each for each in good if each["variant"] == name] for name in keys}
    base = next((name for name, changed in keys.items() if not changed), "")
    body = [f"<p>{html.escape(_summary(keys, records))}</p>\n"]
    bad = [each for each in records if "error" in each]
    if bad:
        items = "".join(
            f"<li>{html.escape(each['trial'])}: {html.escape(each['error'])}</li>" for each in bad
        )
        body.append(f"<p><b>Not in the tables:</b></p>\n<ul>{items}</ul>\n")
    body.append(READING)
    if any(task_in(each) is MULTI for each in good):
        body.append(PAIRS)
    for table in tables:
        found = {name: by_variant[name] for name in table.variants if by_variant[name]}
        body += [f"<h2>{html.escape(table.title)}</h2>\n", text_table(*_table(found)), "\n"]
        points = [(value, found[name]) for name, value in table.values.items() if name in found]
        if len(points) > 1:
            body.append(_picture(study_figure.trained(table.key, points), f"Results by {table.key}"))
        if picture := study_figure.curves(found, base):
            more = f" Only the first {MOST_CURVES} variants." if len(found) > MOST_CURVES else ""
            body += [
                f'<p class="muted">{WOULD}{more}</p>\n',
                _picture(picture, "Calibration error by limit, accuracy by share"),
            ]
    first = {name: by_variant[name] for name in tables[0].variants} if tables else {}
    if picture := study_figure.cells(first):
        body += [CELLS.format(few=FEW), _picture(picture, "Share of wrong labels by confidence and std")]
    body.append(f"<h2>What each variant changes</h2>\n<ul>{''.join(map(_changes, keys.items()))}</ul>\n")
    body.append(f"<h2>Settings of the base</h2>\n<pre>{html.escape(settings)}</pre>\n")
    return document(html.escape(title), "".join(body))


def _summary(keys: Mapping[str, object], records: Sequence[Record]) -> str:
    done = [each for each in records if "error" not in each]
    seeds = sorted({each["seed"] for each in records})
    said = f"{many(len(keys), 'variant')} with {many(len(seeds), 'seed')} ({', '.join(map(str, seeds))}): "
    said += f"{len(done):,} of {many(len(records), 'trial')} done"
    if done:
        minutes = sum(each["seconds"] for each in done) / 60
        made = sorted({f"ups_fast {each['ups_fast']}, torch {each['torch']}" for each in done})
        said += f", {minutes:,.1f} minutes of training and labeling in all. {'; '.join(made)}"
    return said + "."


def _changes(variant: tuple[str, Mapping[str, object]]) -> str:
    name, changed = variant
    keys = ", ".join(f"{key}={value}" for key, value in changed.items())
    return f"<li><b>{html.escape(name)}</b>: {html.escape(keys or 'nothing')}</li>"


def _table(variants: Mapping[str, Sequence[Record]]) -> tuple[list[str], list[list[str]]]:
    """Columns of which nothing is known are left out."""
    every = [each for found in variants.values() for each in found]
    known = {title: key for title, key in COLUMNS.items() if any(each.get(key) is not None for each in every)}
    body = [
        [
            name,
            *(_cell([_share(each, key) for each in found]) for key in known.values()),
            str(len(found)),
            f"{statistics.median(each['seconds'] for each in found):,.1f}",
        ]
        for name, found in variants.items()
    ]
    return ["variant", *known, "n", "seconds"], body


def _share(record: Record, key: str) -> float | None:
    value: float | None = record.get(key)
    return value / max(1, record["unlabeled"]) if key == "positives" and value is not None else value


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _picture(svg: str, what: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/svg+xml;base64,{data}">\n'
