"""report.html: what came of a run, on one page without links to others, with report.png in it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ups_fast import config_file
from ups_fast.calibration import recall
from ups_fast.config import Config
from ups_fast.data.classes import uneven
from ups_fast.files import write_atomic
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.report import comparison
from ups_fast.report.comparison import Comparison
from ups_fast.report.figure import draw
from ups_fast.report.gallery import STYLE, text_table
from ups_fast.report.sentences import Rows, headline, one_training, percent, summary
from ups_fast.state import Row, headline_of, task_in
from ups_fast.tasks import MULTI

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
main > img { display: block; width: 100%; margin: 1.5rem 0; border-radius: 8px; background: #ffffff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .8rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { background: var(--tint); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .88rem; }
"""

_FIRST_POINT = {
    False: """
<li><b>Accuracy by round:</b> the first point is the network trained on the labels alone. Where pseudo-labels help,
 the test curve rises above it.</li>""",
    True: """
<li><b>Accuracy by round:</b> the points are stages of one training. The curve should rise to its end.</li>""",
}
_READING = """
<li><b>What was selected:</b> the dashed line is all that is unlabeled. Good bars grow towards it and show few wrong
 labels.</li>
<li><b>Is the confidence right?</b> On the diagonal, confidence equals accuracy. Below it the network is
 overconfident. The expected calibration error (ECE) is the mean distance.</li>
"""
_CORNER = {
    False: """
<li><b>Confidence and uncertainty:</b> labels in the tinted corner pass both limits and are trained on, except for
 those that the class balance leaves out. Few of them should be wrong.</li>
""",
    True: """
<li><b>Confidence and uncertainty:</b> labels in the tinted corner pass both limits. Few of them should be wrong.</li>
""",
}


_CLASS_NUMBERS = {
    "single": "Recall is the share of a class's {noun}s that get its label.",
    "multilabel": "AP is average precision. ECE is the calibration error of the class's probability.",
}


def write_report(
    run_dir: str | Path,
    rows: Rows,
    pseudo_labels: Any,  # of the last round: U samples, a record of the task on the CPU
    truth: Tensor | None,  # int64 [U] or int8 [U, C], -1 where unknown; None: all unknown
    cfg: Config,
    classes: Sequence[str],  # C names
    *,
    labeled: int | None = None,  # how many samples; None: as the config says
    class_labels: Sequence[int] | None = None,  # [C] labeled samples of each class; None: not known
    class_tests: Sequence[int] | None = None,  # [C] test samples likewise
    class_vals: Sequence[int] | None = None,  # [C] validation samples likewise
    notes: Sequence[str] = (),  # sentences on the data, such as one for each damaged file
    baselines: Comparison | None = None,
    examples: str = "",  # HTML, as of `examples`
) -> tuple[Path, Path]:
    """Writes report.png and report.html into `run_dir`, replacing earlier ones, and returns their paths."""
    truth = torch.full_like(pseudo_labels.label, -1) if truth is None else truth
    image = io.BytesIO()
    labeled = cfg.data.n_labels if labeled is None else labeled
    draw(rows, pseudo_labels, truth, cfg, labeled).savefig(image, format="png", dpi=144)
    png, page = Path(run_dir) / "report.png", Path(run_dir) / "report.html"
    write_atomic(png, image.getvalue())
    counts = {
        "labeled": class_labels,
        f"validation {cfg.noun}s": class_vals,
        f"test {cfg.noun}s": class_tests,
    }
    entries, truth = task_in(rows[-1]).entries(pseudo_labels, truth)
    table = _class_table(rows[-1], entries, truth, classes, counts)
    told = summary(rows, entries, truth, cfg)
    if class_labels and (note := uneven(classes, class_labels)):
        notes = [note, *notes]
    text = _page(rows, told, cfg, classes, notes, image.getvalue(), table, baselines, examples)
    write_atomic(page, text.encode("utf-8", "replace"))
    return png, page


def _page(
    rows: Rows,
    told: str,
    cfg: Config,
    classes: Sequence[str],
    notes: Sequence[str],
    image: bytes,
    class_table: tuple[list[str], list[list[str]]],
    baselines: Comparison | None,
    examples: str,
) -> str:
    """The whole of report.html: one file without links to others."""
    title, noun = html.escape(headline(rows, cfg)), cfg.noun
    settings = html.escape(config_file.write(asdict(cfg)))
    picture = base64.b64encode(image).decode()
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    wrong = rows[-1].get("test_mistakes") or []
    pairs = [[classes[a], classes[b], f"{n:,}"] for a, b, n in wrong]
    confused = f"<h2>Most frequent mistakes on the test {noun}s, last round</h2>\n" if wrong else ""
    confused += text_table(["is", "labeled as", f"{noun}s"], pairs) + "\n" if wrong else ""
    better, rivals = _baselines(baselines, rows, cfg) if baselines else ("", "")
    data = f"<h2>About the data</h2>\n<ul>{items}</ul>\n" if notes else ""
    return document(
        title,
        f"""<p>{html.escape(told)}</p>
{better}<img alt="Charts: accuracy and selected {noun}s by round, calibration, confidence against uncertainty"
 src="data:image/png;base64,{picture}">
<h2>How to read the charts</h2>
<ul>{_FIRST_POINT[one_training(cfg)]}{_READING}{_CORNER[one_training(cfg)]}</ul>
<h2>Rounds</h2>
{text_table(*_round_table(rows, noun))}
{rivals}{examples}<h2>Classes, last round</h2>
<p class="muted">{_CLASS_NUMBERS[task_in(rows[-1]).name].format(noun=noun)} Correct is the share of a class's
 positive pseudo-labels that are right.</p>
{text_table(*class_table)}
{confused}{data}<h2>Settings</h2>
<pre>{settings}</pre>
""",
    )


def document(title: str, body: str) -> str:
    """A whole page without links to other files; both arguments are HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}</main>
</body>
</html>
"""


def _baselines(found: Comparison, rows: Rows, cfg: Config) -> tuple[str, str]:
    """The sentence for the top, where there is one, and the section."""
    said = comparison.verdict(found, rows, cfg)
    better = f"<p><b>{html.escape(said)}</b></p>\n" if said else ""
    about = html.escape(comparison.source(found, cfg))
    table = text_table(*comparison.table(found, rows, cfg))
    return better, f'<h2>Baselines</h2>\n<p class="muted">{about}</p>\n{table}\n'


def _round_table(rows: Rows, noun: str) -> tuple[list[str], list[list[str]]]:
    judged = headline_of(rows[-1], "val") is not None
    head = [
        "round",
        "test mAP" if task_in(rows[-1]) is MULTI else "test",
        *(["validation"] if judged else []),
        "positives",
        "correct",
        "negatives",
        "correct",
        f"on {noun}s",
        "ECE",
        "ECE selected",
        "ECE test, without dropout",
        "time",
    ]
    body = [
        [
            str(row["round"]),
            percent(headline_of(row)),
            *([percent(headline_of(row, "val"))] if judged else []),
            f"{row['positives']:,}",
            percent(row["positive_acc"]),
            f"{row['negatives']:,}",
            percent(row["negative_acc"]),
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
    row: Row,  # of the last round
    pseudo_labels: PseudoLabels,
    truth: Tensor,
    classes: Sequence[str],
    counts: Mapping[str, Sequence[int] | None],  # by the name of a column: [C] samples of each class
) -> tuple[list[str], list[list[str]]]:
    """Columns that nothing is known of are left out."""
    n, names = len(classes), range(len(classes))
    kept = pseudo_labels.positive
    positives = torch.bincount(pseudo_labels.label[kept], minlength=n)
    judged = torch.bincount(pseudo_labels.label[kept & (truth >= 0)], minlength=n)
    right = torch.bincount(pseudo_labels.label[kept & (pseudo_labels.label == truth)], minlength=n)
    columns: dict[str, Sequence[str]] = {"class": classes, "number": list(map(str, names))}
    for name, count in counts.items():
        if count is not None:
            columns[name] = [f"{each:,}" for each in count]
    if (found := row.get("test_recall")) is not None:
        columns["test recall"] = list(map(percent, found))
    if task_in(row) is MULTI:
        columns["test AP"] = list(map(percent, row["test_ap"]))
        columns["test ECE"] = list(map(_decimals, row["test_class_ece"]))
    elif bool((truth >= 0).any()):
        columns["unlabeled recall"] = list(map(percent, recall(pseudo_labels.label, truth, n)))
    columns["positives"] = [f"{each:,}" for each in positives.tolist()]
    shares = (right.double() / judged).tolist()
    columns["correct"] = [percent(None if math.isnan(share) else share) for share in shares]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def _decimals(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
